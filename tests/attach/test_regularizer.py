"""`RNNRegularizer` in a training loop: captures, penalties, lifetimes and errors."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastreg
from fastreg import ARTAR, RNNRegularizer, fused_ar_tar
from fastreg.attach.regularizer import reset_of
from tests import language_model as lm
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, STARTS, TIME, VALID


def captured(by_hooks: bool) -> tuple[lm.Model, RNNRegularizer, tuple[Tensor, Tensor, Tensor]]:
    """Return a model, a regularizer with a capture of one run, and the activations of that run."""
    model = lm.seeded(lm.Model)
    reg = lm.attached(model) if by_hooks else lm.regularizer()
    for x in (lm.tokens().flip(1), lm.tokens()):  # the first step fails before its backward
        output = model.activations(x)
        if not by_hooks:
            reg.clear()
            reg.on_loss_begin(output)
    return model, reg, output


@pytest.mark.parametrize(("layers", "first"), [(None, 2), ("last", 2), ("all", 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_last_layer_counts_or_all_layers(packed: bool, layers: Any, first: int) -> None:
    pack = (lambda x: pack_padded_sequence(x, torch.tensor([7, 4, 2]), batch_first=True)) if packed else torch.clone
    raw, dropped = ([pack(lm.inputs().requires_grad_()) for _ in range(3)] for _ in range(2))
    reg = lm.regularizer(layers=layers)
    reg.on_loss_begin((0, raw, dropped))
    assert lm.penalty_of(reg) == fused_ar_tar(raw[first:], dropped[first:], ALPHA, BETA)  # pyright: ignore


@lm.either
@pytest.mark.parametrize("by_hooks", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_the_loss_gets_its_terms(alone: bool, by_hooks: bool) -> None:
    assert lm.regularizer().ar is lm.regularizer().tar is None
    model, reg, (decoded, raw, dropped) = captured(by_hooks)
    loss, penalty = lm.criterion(decoded, lm.tokens()), lm.formula(raw, dropped, 1)
    before = loss.item()
    terms = reg.take(loss) if alone else None
    total = reg.on_backward_begin(loss) if terms is None else terms.penalty
    lm.check_gradients(model, total, penalty if alone else loss + penalty)
    assert not alone or (isinstance(terms, ARTAR) and (reg.ar, reg.tar) == terms[1:])
    assert loss.item() == before
    assert not any(x is None or x.requires_grad for x in (reg.ar, reg.tar))
    torch.testing.assert_close((reg.ar, reg.tar), (dropped.pow(2).mean(), raw.diff(dim=1).pow(2).mean()))
    for again in (reg.take, reg.on_backward_begin):
        with pytest.raises(RuntimeError, match="nothing was captured"):
            again(loss)


@pytest.mark.parametrize(
    "steps", [{}, {"lengths": torch.tensor([7, 4, 2])}, {"valid": VALID.long(), "starts": STARTS}], ids=list
)
@pytest.mark.parametrize(("axis", "layout"), [(1, {}), (0, {"batch_first": False}), (2, {"time_dim": -1})])
def test_captures_take_layouts_and_steps_as_the_call_does(
    axis: int, layout: dict[str, Any], steps: dict[str, Any]
) -> None:
    raw, dropped = torch.randn(2, BATCH, TIME, HIDDEN, requires_grad=True)
    want, reg = fused_ar_tar(raw, dropped, ALPHA, BETA, **steps), lm.regularizer()
    raw, dropped = raw.movedim(1, axis), dropped.movedim(1, axis)
    steps = {name: x.t() if axis == 0 and name != "lengths" else x for name, x in steps.items()}
    for output in ((0, raw, dropped), [0, [raw], [dropped]]):
        assert reg.on_loss_begin(output, **layout, **steps) == 0
        got = lm.penalty_of(reg)
        assert got == fused_ar_tar(raw, dropped, ALPHA, BETA, **layout, **steps)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_captures_move_coefficients_and_layers_to_the_device(layers: Any) -> None:
    """The meta device stands for a GPU."""
    reg = RNNRegularizer(torch.tensor(ALPHA), torch.tensor(BETA), layers=layers)
    raw = [torch.randn(BATCH, TIME, HIDDEN, device=name, requires_grad=True) for name in ("cpu", "meta")]
    reg.on_loss_begin((raw[0], raw, raw), valid=VALID)
    terms: Any = reg.take(torch.zeros((), device="meta"))
    assert terms.penalty.device.type == terms.ar.device.type == "meta"
    (gradient,) = torch.autograd.grad(terms.penalty, raw[1])
    assert gradient.shape == raw[1].shape


def test_time_steps_are_those_of_the_longest_run_of_the_last_step() -> None:
    model, reg = lm.Attached(nn.LSTM, nn.Dropout), lm.regularizer()
    assert model.reg.time_steps == reg.time_steps == 0
    with torch.no_grad():
        model.reg.on_backward_begin(model(lm.inputs()).loss)  # takes no penalty
    assert model.reg.time_steps == 0
    for lengths in ([4], [2, 5, 3], [1]):
        losses = [model(lm.inputs()[:, :length]).loss for length in lengths]
        model(lm.inputs())  # belongs to no loss
        model.reg.on_backward_begin(torch.stack(losses).sum())
        assert model.reg.time_steps == max(lengths)
    packed = pack_padded_sequence(lm.inputs().requires_grad_(), torch.tensor([6, 4, 2]), batch_first=True)
    for raw, axis, steps in (
        (packed, {}, 6),
        (packed.data, {"time_dim": 0}, 12),
        ([lm.inputs().requires_grad_()], {}, TIME),
    ):
        reg.on_loss_begin((0, raw, raw), **axis)
        lm.penalty_of(reg)
        assert reg.time_steps == steps


# Decoded of any number of classes, with an axis for them or flattened; of one sequence; of as many as time steps.
CLEAR = [(BATCH, TIME, size) for size in [(BATCH * TIME, 11), (BATCH * TIME,), (BATCH, TIME, 11), (BATCH, TIME, TIME)]]
CLEAR += [(1, TIME, (TIME, 2)), (TIME, TIME, (TIME, 2)), (TIME, TIME, (TIME, 2, TIME))]
# A row for each sequence, or as cross_entropy takes it, if raw is time first; time first as a CTC loss takes it
IN_DOUBT = [(BATCH, TIME, size) for size in [(TIME, 2), (TIME, 2, BATCH), (TIME, BATCH, 11)]]


@pytest.mark.parametrize(("batch", "time", "size"), CLEAR + IN_DOUBT, ids=str)
def test_a_layout_that_decoded_leaves_in_doubt_has_to_be_stated(batch: int, time: int, size: Any) -> None:
    raw, decoded, reg = torch.randn(batch, time, HIDDEN, requires_grad=True), torch.zeros(size), lm.regularizer()
    in_doubt, layouts = (batch, time, size) in IN_DOUBT, list[Any]([{}, {"batch_first": True}, {"batch_first": False}])
    for layout in layouts:
        message = r"batch_first: expected True or False, as raw is .* and decoded .*, got None"
        with nullcontext() if layout or not in_doubt else pytest.raises(ValueError, match=message):
            reg.on_loss_begin((decoded, raw, raw), **layout)
            assert lm.penalty_of(reg) == fused_ar_tar(raw, raw, ALPHA, BETA, **layout)


@pytest.mark.parametrize("alpha", [ALPHA, -1.0])
def test_nothing_is_held_after_the_loss_or_an_error(alpha: float) -> None:
    _, reg, output = captured(by_hooks=False)
    refs, loss, reg.alpha = [weakref.ref(x) for x in output[1:]], output[0].square().mean(), alpha
    with nullcontext() if alpha == ALPHA else pytest.raises(ValueError, match="alpha"):
        reg.on_backward_begin(loss).backward()
    del output, loss
    assert [ref() for ref in refs] == [None, None]
    reg.alpha = ALPHA
    with pytest.raises(RuntimeError, match="nothing was captured"):
        lm.penalty_of(reg)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lm.pickled])
@pytest.mark.parametrize("by_hooks", [False, True])
def test_copies_hold_no_capture(by_hooks: bool, duplicate: Callable[[Any], Any]) -> None:
    _, reg, (decoded, raw, dropped) = captured(by_hooks)
    with pytest.raises(RuntimeError, match="nothing was captured; call on_loss_begin"):
        lm.penalty_of(duplicate(reg))
    torch.testing.assert_close(lm.penalty_of(reg, decoded), lm.formula(raw, dropped, 1))


def test_on_epoch_begin_resets_a_model_that_can_be_reset() -> None:
    resets, reg = list[None](), lm.regularizer()
    model = SimpleNamespace(reset=lambda: resets.append(None))
    for one in (model, SimpleNamespace(module=model)):  # as DistributedDataParallel hides a model
        assert reset_of(one) is model.reset
        reg.on_epoch_begin(one)
    assert len(resets) == 2
    others = [nn.Linear(1, 1), *(SimpleNamespace(reset=x) for x in (nn.Linear(1, 1), lambda env: resets.append(env)))]
    for one in others:
        assert reset_of(one) is None
        with pytest.raises(TypeError, match=rf"reset\(\) .* got {type(one).__name__}; .* or call clear\(\)"):
            reg.on_epoch_begin(one)
    assert len(resets) == 2


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_captures_without_a_gradient_add_nothing(around: Any) -> None:
    model, reg = lm.seeded(lm.Model), lm.regularizer()
    with around():
        decoded = reg.on_loss_begin(model.activations(lm.tokens()))
        loss = lm.criterion(decoded, lm.tokens())
        assert reg.on_backward_begin(loss) is loss
    assert reg.ar is reg.tar is None
    with pytest.raises(RuntimeError, match="nothing was captured"):
        reg.on_backward_begin(loss)


@pytest.mark.parametrize(
    ("name", "module"),
    [("fuse", "fastai, or fastreg.fastai1"), ("ActivationRegularization", "lightning"), ("RegularizedTrainer", "tra")],
)
def test_an_import_of_an_adapter_from_the_package_names_its_module(name: str, module: str) -> None:
    with pytest.raises(ImportError, match=f"fastreg: {name} is in a module of .* import it from fastreg.{module}"):
        exec(f"from fastreg import {name}")
    assert not hasattr(fastreg, "other")


def test_a_scaled_lr_is_restored() -> None:
    shared = torch.tensor(0.25)
    groups = [{"lr": 0.3}, {"lr": 0.1}, {"lr": shared}, {"lr": shared}]
    reg, optimizer = RNNRegularizer(0, 0, bptt=70), SimpleNamespace(param_groups=groups)
    for error in (None, KeyError, None):
        with pytest.raises(error) if error else nullcontext(), reg.scaled_lr(optimizer, 35):  # pyright: ignore[reportArgumentType]
            assert [group["lr"] for group in groups] == [0.15, 0.05, 0.125, 0.125]
            assert groups[2]["lr"] is groups[3]["lr"] is shared
            if error:
                raise error
        assert [group["lr"] for group in groups] == [0.3, 0.1, 0.25, 0.25]
    assert repr(reg) == "RNNRegularizer(alpha=0.0, beta=0.0, layers=None, bptt=70)"


RAW, RNN = torch.randn(BATCH, TIME, HIDDEN), lm.gru()
OPTIMIZER: Any = SimpleNamespace(param_groups=[])
PAIR = [RAW, RAW]


@pytest.mark.parametrize(
    "output", [RAW, None, PAIR, (*PAIR, None), (RAW, PAIR, [RAW]), [RAW, [], []], (RAW, [RAW], [1])]
)
def test_on_loss_begin_rejects_outputs(output: Any) -> None:
    reg, came = lm.regularizer(), type(output).__name__
    with pytest.raises(TypeError, match=rf"expected \(decoded, raw, dropped\).* got {came}.* attach\(rnn, dropout\)"):
        reg.on_loss_begin(output)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        lm.penalty_of(reg)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RNNRegularizer(-1, 0), ValueError, "alpha"),
        (lambda: RNNRegularizer(0, float("nan")), ValueError, "beta"),
        (lambda: lm.regularizer(layers="first"), ValueError, "layers: expected 'last', 'all' or None, got 'first'"),
        (lambda: RNNRegularizer(0, 0, bptt=0), ValueError, "bptt: expected a positive integer, got 0"),
        (lambda: RNNRegularizer(0, 0, bptt=True), TypeError, "bptt: expected a positive integer, got bool"),
        (lambda: RNNRegularizer(0, 0, bptt=5).scaled_lr(OPTIMIZER, -1), ValueError, "seq_len: expected a positive"),
        (lambda: RNNRegularizer(0, 0).scaled_lr(OPTIMIZER, 70), RuntimeError, r"pass RNNRegularizer\(..., bptt="),
        (lambda: lm.regularizer(bptt=5).scaled_lr(None, 5), TypeError, "optimizer: expected an optimizer .* NoneType"),  # pyright: ignore[reportArgumentType]
        (lambda: lm.regularizer().on_epoch_begin(0), TypeError, "model: expected the model, .* got int"),
        (lambda: lm.regularizer().take(1.0), TypeError, "loss: expected a tensor, got float"),  # pyright: ignore[reportArgumentType]
        (lambda: lm.regularizer().take(RAW[0, 0]), ValueError, r"loss: expected one element, got shape \(6,\)"),
        (lambda: lm.penalty_of(lm.regularizer()), RuntimeError, r"call on_loss_begin\(output\) .* or attach\(rnn"),
        (lambda: lm.regularizer().on_loss_begin([RAW] * 3, valid=0.5), TypeError, "valid: expected"),  # pyright: ignore[reportArgumentType]
        (lambda: lm.attached(lm.Model()).on_loss_begin([RAW] * 3), RuntimeError, "on_loss_begin: modules are attached"),
        (lambda: lm.regularizer(layers="all").attach(RNN), ValueError, "layers: expected None with attach, .* 'all'"),
        (lambda: captured(False)[1].attach(lm.gru()), RuntimeError, "attach: on_loss_begin captures already"),
    ],
)
def test_a_wrong_use_names_what_was_expected(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert lm.hooks_of(RNN) == 0
