"""`FusedRNNDropout`: by itself, and attached, where it works for the regularizer and keeps nothing of it."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar
from tests import language_model as lm
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME

VALID, STARTS = torch.rand(2, BATCH, TIME, generator=torch.Generator().manual_seed(0)) < 0.6
OTHER = torch.arange(TIME).expand(BATCH, -1) != 3


@pytest.fixture(autouse=True)
def _strict() -> None:
    """Make every warning an error: an attached dropout has none to give."""
    warnings.simplefilter("error")


def functions_of(masks: dict[str, Tensor]) -> Any:
    """Return the functions of a module's arguments that give these masks."""
    return {name: lambda *_, mask=mask: mask for name, mask in masks.items()}


def check_own(dropout: Any, raw: Tensor, alpha: Any = 3.0, beta: Any = 5.0) -> None:
    """Check that a dropout works by its own coefficients, and with all steps."""
    dropped, taken = dropout(raw), dropout.take()
    torch.testing.assert_close(taken.penalty, lm.formula(raw, dropped, 1, alpha, beta))
    assert dropout.take() is None


# Attached: whose coefficients


@pytest.mark.parametrize("of", [float, torch.tensor], ids=["numbers", "tensors"])
def test_an_attached_dropout_follows_the_coefficients_of_the_regularizer(of: Any) -> None:
    """It keeps its own, for its copies and for later."""
    (rnn, dropout), reg = (lm.gru(), FusedRNNDropout(0.3, 3.0, 5.0)), lm.regularizer()
    with reg.attach(rnn, dropout, valid=lambda _: VALID):
        for alpha, beta in ((0.0, 3.0), (3.0, 0.0), (0.0, 0.0), (0.5, 0.25)):
            reg.alpha, reg.beta = of(alpha), of(beta)
            raw, dropped = lm.run(rnn, dropout)
            assert dropout.take() is None
            want = fused_ar_tar(raw, dropped, alpha, beta, valid=VALID, return_terms=True)
            loss = dropped.sin().sum()
            lm.check_gradients(rnn, reg.on_backward_begin(loss), loss + want.penalty)
            torch.testing.assert_close((reg.ar, reg.tar), want[1:])
        assert str(dropout) == str(FusedRNNDropout(0.3, 3.0, 5.0))
        check_own(dropout, lm.inputs())  # of another module's output
        copies = [copy.deepcopy(dropout), pickle.loads(pickle.dumps(dropout))]
        assert dropout.state_dict() == {}
    raw, _ = rnn(lm.inputs())
    for one in (dropout, *copies):
        check_own(one, raw)


def test_an_attached_dropout_has_no_penalty_to_take_and_keeps_no_activation() -> None:
    dropout = FusedRNNDropout(0.3, 3.0, 5.0)
    rnn, reg = lm.attach_gru(dropout)
    for _ in range(3):
        assert dropout.take() is None
        raw, dropped = lm.run(rnn, dropout)
        lost = weakref.ref(dropped)
        lm.penalty_of(reg, dropped).backward()
        del raw, dropped
        gc.collect()
        assert lost() is None
    lm.run(rnn, dropout)  # that no loss takes
    lm.run(rnn, dropout)
    assert dropout.take() is None


@pytest.mark.parametrize("mode", ["p=0", "the dropout in evaluation", "both in evaluation"])
@pytest.mark.parametrize("ar_of", ["dropped", "raw"])
def test_nothing_that_is_dropped(mode: str, ar_of: Any) -> None:
    dropout = FusedRNNDropout(0.0 if mode == "p=0" else 0.3, 3.0, 5.0, ar_of=ar_of)
    rnn, reg = lm.attach_gru(dropout)
    dropout.train(mode == "p=0")
    rnn.train(mode != "both in evaluation")
    for _ in range(2):
        raw, dropped = lm.run(rnn, dropout)
        torch.testing.assert_close(dropped, raw)
        assert dropout.take() is None
        if rnn.training:
            lm.check_gradients(rnn, lm.penalty_of(reg, dropped), lm.formula(raw, raw, 1))
        else:
            assert reg.take(dropped.sum()) is None


@pytest.mark.parametrize("ar_of", ["dropped", "raw"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "masks", [{}, {"valid": VALID}, {"starts": STARTS}, {"valid": VALID, "starts": STARTS}], ids=list
)
def test_the_masks_of_the_regularizer(masks: Any, batch_first: bool, ar_of: Any) -> None:
    dropout = FusedRNNDropout(0.3, batch_first=batch_first, ar_of=ar_of)
    rnn, reg = nn.GRU(HIDDEN, HIDDEN, batch_first=batch_first), lm.regularizer()
    x = lm.inputs() if batch_first else lm.inputs().transpose(0, 1)
    with reg.attach(rnn, dropout, **functions_of(masks)):
        raw, dropped = lm.run(rnn, dropout, x)
        squared = dropped if ar_of == "dropped" else raw
        want = fused_ar_tar(raw, squared, ALPHA, BETA, batch_first=batch_first, **masks)
        lm.check_gradients(rnn, lm.penalty_of(reg, dropped), want)
    raw, _ = rnn(x)
    dropout(raw)
    assert dropout.take().penalty == 0  # pyright: ignore[reportOptionalMemberAccess]


# Attached: forwards that fail, dropouts that are shared, hooks of others


@pytest.mark.parametrize("how", ["keyword", "position", "hook"])
def test_masks_that_the_dropout_is_called_with_take_precedence(how: str) -> None:
    """Each over the one of its name."""
    for name in ("valid", "starts"):
        dropout = FusedRNNDropout(0.4)
        rnn, reg = lm.attach_gru(dropout, valid=lambda _: VALID, starts=lambda _: STARTS)
        if how == "hook":
            dropout.register_forward_pre_hook(lambda _, args, own, n=name: (args, own | {n: OTHER}), with_kwargs=True)
        raw, _ = rnn(lm.inputs())
        positions = (None,) * (name == "starts") + (None, OTHER)
        dropped = dropout(raw, *positions * (how == "position"), **({name: OTHER} if how == "keyword" else {}))
        masks: Any = {"valid": VALID, "starts": STARTS} | {name: OTHER}
        lm.check_gradients(rnn, lm.penalty_of(reg, dropped), fused_ar_tar(raw, dropped, ALPHA, BETA, **masks))


@pytest.mark.parametrize("fails", ["before", "inside", "after"])
@pytest.mark.parametrize("then", ["attached", "removed"])
def test_a_forward_that_fails(then: str, fails: str) -> None:
    """Before the dropout has used the coefficients, by a mask of another shape, or in a hook behind it."""
    rnn, dropout, reg = lm.gru(), FusedRNNDropout(0.3, 3.0, 5.0), lm.regularizer()
    masks = [torch.arange(steps) < steps - 1 for steps in (TIME, TIME - 1)]
    handle = reg.attach(rnn, dropout, valid=lambda x: masks[TIME - x.shape[1]].expand(BATCH, -1))
    raw, _ = rnn(lm.inputs())
    register: Any = dropout.register_forward_hook if fails == "after" else dropout.register_forward_pre_hook
    failing = nullcontext() if fails == "inside" else register(lambda *_: pytest.fail("a hook"))
    with failing, pytest.raises((pytest.fail.Exception, ValueError), match=r"a hook|p: expected a probability"):
        dropout(raw, 1.0 if fails == "inside" else 0.3)
    assert (dropout.alpha, dropout.beta) == (3.0, 5.0)
    assert dropout.take() is None
    reg.clear()
    if then == "removed":
        handle.remove()
        return check_own(dropout, raw)
    check_own(dropout, lm.inputs())
    raw, dropped = lm.run(rnn, dropout, lm.inputs()[:, 1:])
    want = fused_ar_tar(raw, dropped, ALPHA, BETA, valid=masks[1].expand(BATCH, -1))
    lm.check_gradients(rnn, lm.penalty_of(reg, dropped), want)


@pytest.mark.parametrize("owners", [1, 2])
def test_a_dropout_that_two_rnns_share(owners: int) -> None:
    """They may run before either is dropped, and each has masks of its own, or even another regularizer."""
    rnns, dropout = nn.ModuleList([lm.gru(), lm.gru()]), FusedRNNDropout(0.3, 3.0, 5.0)
    regs = [lm.regularizer(), RNNRegularizer(0.5, 0.25)][:owners]
    masks: list[Any] = [{"valid": VALID}, {"starts": STARTS}]
    for i, rnn in enumerate(rnns):
        regs[i % owners].attach(rnn, dropout, **functions_of(masks[i]))
    raws = [rnn(lm.inputs())[0] for rnn in rnns]
    check_own(dropout, lm.inputs())
    dropped = [dropout(raw) for raw in reversed(raws)][::-1]
    assert dropout.take() is None
    pairs = [(reg.alpha, reg.beta) for reg in (regs[0], regs[-1])]
    want = [fused_ar_tar(*xs, *c, **m) for *xs, c, m in zip(raws, dropped, pairs, masks, strict=True)]  # pyright: ignore
    for i, reg in enumerate(regs):
        expected = want[i] if owners == 2 else want[0] + want[1]
        lm.check_gradients(rnns, lm.penalty_of(reg, *dropped), expected)


@pytest.mark.parametrize("attaches", ["before", "after"])
def test_a_hook_that_replaces_the_output_of_the_dropout(attaches: str) -> None:
    """The penalty is formed of what the model gets, with the same coefficients and masks."""
    dropout = FusedRNNDropout(0.3, 3.0, 5.0)
    rnn, reg = lm.gru(), lm.regularizer()
    if attaches == "before":
        reg.attach(rnn, dropout, valid=lambda _: VALID)
    dropout.register_forward_hook(lambda _m, _i, output: output * 2)  # pyright: ignore[reportOperatorIssue]
    if attaches == "after":
        reg.attach(rnn, dropout, valid=lambda _: VALID)
    for given in ({}, {"valid": OTHER}):
        raw, _ = rnn(lm.inputs())
        dropped = dropout(raw, **given)
        want = fused_ar_tar(raw, dropped, ALPHA, BETA, **({"valid": VALID} | given))  # pyright: ignore
        lm.check_gradients(rnn, lm.penalty_of(reg, dropped), want)
        assert dropout.take() is None


@pytest.mark.parametrize("attaches", ["before", "after"])
def test_a_hook_that_replaces_the_input_of_the_dropout_is_an_error(attaches: str) -> None:
    """The dropout then gets another tensor than raw."""
    rnn, dropout, reg = lm.gru(), FusedRNNDropout(0.3), lm.regularizer()
    if attaches == "before":
        reg.attach(rnn, dropout)
    dropout.register_forward_pre_hook(lambda _, args: (1.5 * args[0],))
    if attaches == "after":
        reg.attach(rnn, dropout)
    raw, dropped = lm.run(rnn, dropout)
    with pytest.raises(RuntimeError, match="attached FusedRNNDropout did not get the output of the GRU"):
        reg.on_backward_begin(dropped.sum() + raw.sum())


class Named(FusedRNNDropout):
    """Leaves the forward as it is."""


def test_a_subclass() -> None:
    rnn, reg = lm.attach_gru(dropout := Named(0.3))
    raw, dropped = lm.run(rnn, dropout)
    lm.check_gradients(rnn, lm.penalty_of(reg, dropped), lm.formula(raw, dropped, 1))


# Attached: under checkpointing and torch.compile


@pytest.mark.parametrize("masks", [{}, {"valid": VALID, "starts": STARTS}], ids=["all", "masks"])
def test_activation_checkpointing(masks: dict[str, Tensor]) -> None:
    dropout = FusedRNNDropout(0.4, 3.0, 5.0)
    (rnn, reg), plain, x = lm.attach_gru(dropout, **functions_of(masks)), lm.gru(), lm.inputs()
    torch.manual_seed(3)
    dropped = checkpoint(lambda x: lm.run(rnn, dropout, x)[1].sin(), x, use_reentrant=False)
    reg.on_backward_begin(dropped.sum()).backward()
    assert dropout.take() is None
    torch.manual_seed(3)
    raw, dropped = lm.run(plain, lm.Locked(0.4), x)
    (dropped.sin().sum() + fused_ar_tar(raw, dropped, ALPHA, BETA, **masks)).backward()  # pyright: ignore
    torch.testing.assert_close(*([p.grad for p in module.parameters()] for module in (rnn, plain)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("first", ["attach", "compile"])
def test_torch_compile_meets_a_schedule_of_numbers(first: str) -> None:
    """No number is compiled, and the dropout keeps none: afterwards it works by its own again."""
    warnings.simplefilter("default")  # the compiler's own
    counter = CompileCounterWithBackend("aot_eager")
    rnn, dropout = lm.seeded(lambda: lm.Elementwise(HIDDEN, HIDDEN, True)).double(), FusedRNNDropout(0.4, 3.0, 5.0)
    run, reg = torch.compile(lambda x: lm.run(rnn, dropout, x)[1].sin(), backend=counter), lm.regularizer()
    if first == "compile":
        run(lm.inputs().double())
        dropout.take()
    handle, compilations = reg.attach(rnn, dropout, valid=lambda _: VALID), []
    for step in range(6):
        reg.alpha, reg.beta, x = ALPHA + step, BETA / (step + 1), lm.inputs().double()
        torch.manual_seed(step)
        loss = run(x).sum()
        got = reg.on_backward_begin(loss)
        compilations.append(counter.frame_count)
        torch.manual_seed(step)
        raw, _ = type(rnn).forward(rnn, x)
        dropped = lm.Locked(0.4)(raw)
        want = dropped.sin().sum() + fused_ar_tar(raw, dropped, reg.alpha, reg.beta, valid=VALID)
        lm.check_gradients(rnn, got, want)
        assert dropout.take() is None
    assert compilations[1:] == compilations[1:2] * 5
    handle.remove()
    run(lm.inputs().double())
    assert dropout.take() is not None
    check_own(dropout, lm.inputs())


# By itself


@pytest.mark.parametrize(
    ("layout", "axis"), [({"batch_first": True}, 1), ({"batch_first": False}, 0), ({"time_dim": -1}, 2)], ids=str
)
def test_the_arguments_of_one_call(layout: dict[str, Any], axis: int) -> None:
    dropout, raw = FusedRNNDropout(0.0, ALPHA, BETA, **layout), torch.randn(4, 5, 600).movedim(1, axis)
    masks = dict(zip(("valid", "starts"), torch.rand(2, 4, 5) < 0.7, strict=True))
    dropped, taken = dropout(raw, 0.25, **masks), dropout.take()
    assert dropout.take() is None  # once
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    torch.testing.assert_close(taken, fused_ar_tar(raw, dropped, ALPHA, BETA, return_terms=True, **layout, **masks))
    assert dropout(raw) is raw  # by its own p
    torch.testing.assert_close(dropout.take().penalty, lm.formula(raw, raw, axis))  # pyright: ignore
    with pytest.raises(ValueError, match="p: expected a probability from 0 to below 1, got 1"):
        dropout(raw, 1.0)
    with pytest.raises(TypeError, match="valid: expected"):
        dropout(raw, valid=0.5)
    dropout(raw, 0.25)
    assert dropout.eval()(raw, 0.25, **masks) is raw
    assert dropout.take() is None


def test_an_untaken_penalty_warns_once() -> None:
    dropout, raw, reg = FusedRNNDropout(0.3, ALPHA, BETA), lm.inputs().requires_grad_(), lm.regularizer()
    for _ in range(3):
        dropout(raw)
        dropout.take()
    with reg.attach(lm.gru(), dropout):  # which may be used elsewhere, too
        for _ in range(3):
            dropout(raw)
            dropout.take()
    with torch.no_grad():
        for _ in range(3):
            dropout(raw)
    for _ in range(3):
        dropout.train()(raw)
        dropout.eval()(raw)
    dropout.train()(raw)
    with pytest.warns(UserWarning, match=r"penalty of the last forward .* add the penalty of take\(\)"):
        dropout(raw)
    dropout(raw)
    for coefficients in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (torch.tensor(0.5), 0.0)):
        (one := FusedRNNDropout(0.3, *coefficients))(raw)
        with pytest.warns(UserWarning, match="it was not taken") if any(coefficients) else nullcontext():
            one(raw)  # where both are 0 it may serve the embeddings, too


def test_a_penalty_without_a_gradient_is_warned_of_once() -> None:
    dropout, raw = FusedRNNDropout(0.3, ALPHA, BETA), lm.inputs().requires_grad_()
    with torch.no_grad():
        dropout(raw)
        dropout.take()
    warning = pytest.warns(UserWarning, match="FusedRNNDropout: the penalty has no gradient, .* use_reentrant=False")
    for use_reentrant, expected in ((False, nullcontext()), (True, warning), (True, nullcontext())):
        checkpoint(dropout, raw, use_reentrant=use_reentrant)
        with expected:
            assert dropout.take().penalty.requires_grad != use_reentrant  # pyright: ignore[reportOptionalMemberAccess]


def test_a_replica_of_data_parallel_is_an_error_where_a_coefficient_is_on() -> None:
    for coefficients in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0)):
        dropout = FusedRNNDropout(0.3, *coefficients)
        replica: Any = dropout._replicate_for_data_parallel()
        error = pytest.raises(RuntimeError, match=r"FusedRNNDropout: DataParallel .* Use DistributedDataParallel")
        with error if any(coefficients) else nullcontext():
            replica(lm.inputs())
        replica.eval()(lm.inputs())


def test_a_module_loads_from_a_file_of_weights_alone(tmp_path: Path) -> None:
    """Where its class is allowed: it holds nothing else that `torch.load` refuses, before a warning and after."""
    dropout, raw = FusedRNNDropout(0.3, ALPHA, BETA), lm.inputs().requires_grad_()
    for expected in (nullcontext(), pytest.warns(UserWarning, match="it was not taken"), nullcontext()):
        with expected:
            dropout(raw)
        torch.save(dropout, tmp_path / "dropout.pt")
        with torch.serialization.safe_globals([FusedRNNDropout]):
            loaded = torch.load(tmp_path / "dropout.pt", weights_only=True)
        assert vars(loaded).keys() == vars(dropout).keys()
