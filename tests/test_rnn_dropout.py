"""A `FusedRNNDropout` that hands its penalty over to a regularizer, by hooks or by an offer."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar
from tests import language_model as lm
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME

pytestmark = lm.unwanted


def test_a_dropout_that_layers_share(formed: list[Any]) -> None:
    rnns, dropout, reg = nn.ModuleList([lm.gru(), lm.gru()]), FusedRNNDropout(0.3), lm.regularizer(layers="all")
    reg.attach(rnns[0], dropout)
    dropout(rnns[0](lm.inputs())[0])
    reg.clear()
    reg.attach(rnns[1], dropout)
    raw, _ = rnns[0](lm.inputs())
    dropped = dropout(raw)
    last_raw, _ = rnns[1](dropped)
    last_dropped = dropout(last_raw)
    lm.check_gradients(
        rnns, lm.penalty_of(reg, last_dropped), lm.formula(raw, dropped, 1) + lm.formula(last_raw, last_dropped, 1)
    )
    assert formed == []


@pytest.mark.parametrize("again", ["attached", "removed"])
def test_a_forward_that_fails_before_the_dropout_has_used_the_coefficients(again: str) -> None:
    rnn, dropout, reg = lm.gru(), FusedRNNDropout(0.3, 3.0, 5.0), lm.regularizer()
    masks = [torch.arange(steps) < steps - 1 for steps in (TIME, TIME - 1)]
    handle = reg.attach(rnn, dropout, valid=lambda x: masks[TIME - x.shape[1]].expand(BATCH, -1))
    raw, _ = rnn(lm.inputs())
    with dropout.register_forward_pre_hook(lambda *_: pytest.fail("a hook")), pytest.raises(pytest.fail.Exception):
        dropout(raw)
    if again == "removed":
        handle.remove()
        dropped = dropout(raw)
        torch.testing.assert_close(dropout.take().penalty, lm.formula(raw, dropped, 1, 3.0, 5.0))  # pyright: ignore
        return
    raw, dropped = lm.run(rnn, dropout, lm.inputs()[:, 1:])
    want = fused_ar_tar(raw, dropped, ALPHA, BETA, valid=masks[1].expand(BATCH, -1))
    lm.check_gradients(rnn, lm.penalty_of(reg, dropped), want)


def test_two_regularizers_of_one_dropout() -> None:
    """Each adds its own penalty, though the dropout forms but one."""
    model = lm.seeded(lm.Fused)
    one, other = lm.attached(model), RNNRegularizer(3.0, 5.0)
    other.attach(model.rnn, model.dropout)
    _, raw, dropped = model.activations(lm.tokens())
    total = lm.penalty_of(one, dropped) + 2 * lm.penalty_of(other, dropped)
    lm.check_gradients(model, total, lm.formula(raw, dropped, 1) + 2 * lm.formula(raw, dropped, 1, 3.0, 5.0))


class Changed(FusedRNNDropout):
    """Takes no masks, and may change its input or its output."""

    changed = ""

    def forward(self, raw: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        dropped = super().forward(1.5 * raw if self.changed == "input" else raw)
        return 1.5 * dropped if self.changed == "output" else dropped


class Deaf(FusedRNNDropout):
    """Keeps its masks to itself."""

    def forward(self, raw: Tensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(raw)


@pytest.mark.parametrize("alpha", [ALPHA, torch.tensor(ALPHA)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["valid", "starts"])
@pytest.mark.parametrize("kind", [FusedRNNDropout, Deaf])
def test_masks_that_another_hook_gives_the_dropout(kind: Any, name: str, alpha: Any) -> None:
    rnn, reg = lm.attach_gru(dropout := kind(0.4))
    reg.alpha, masks = alpha, {name: torch.rand(BATCH, TIME) < 0.6}
    dropout.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | masks), with_kwargs=True)
    raw, dropped = lm.run(rnn, dropout)
    lm.check_gradients(rnn, lm.penalty_of(reg, dropped), fused_ar_tar(raw, dropped, ALPHA, BETA, **masks))


@pytest.mark.parametrize("ar_of", ["dropped", "raw"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("how", ["nothing", "hook", "input", "output", "valid", "starts"])
def test_the_penalty_of_the_dropout_is_taken_as_long_as_it_is_right(
    how: str, batch_first: bool, ar_of: Any, formed: list[Any]
) -> None:
    model, reg = lm.seeded(lambda: lm.Fused(batch_first=batch_first)), lm.regularizer()
    if how == "hook":
        model.dropout.register_forward_hook(lambda _m, _i, output: output * 2)
    elif how != "nothing":
        model.dropout = Changed(0.3, batch_first=batch_first)
        model.dropout.changed = how
    model.dropout.ar_of = ar_of
    masks: Any = {how: torch.rand(BATCH, TIME) < 0.6} if how in ("valid", "starts") else {}
    functions: Any = {how: lambda *_: masks[how]} if masks else {}
    reg.attach(model.rnn, model.dropout, **functions)
    _, raw, dropped = model.activations(lm.tokens(*(BATCH, TIME) if batch_first else (TIME, BATCH)))
    squared = dropped if ar_of == "dropped" else raw
    want = fused_ar_tar(raw, squared, ALPHA, BETA, batch_first=batch_first, **masks)
    lm.check_gradients(model, lm.penalty_of(reg, dropped), want)
    assert len(formed) == (how not in ("nothing", "valid", "starts"))  # a loan reaches a subclass without masks
    assert model.dropout.take() is None  # once


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
    torch.testing.assert_close(dropout.take().penalty, lm.formula(raw, raw, axis))
    with pytest.raises(ValueError, match="p: expected a probability from 0 to below 1, got 1"):
        dropout(raw, 1.0)
    with pytest.raises(TypeError, match="valid: expected"):
        dropout(raw, valid=0.5)
    dropout(raw, 0.25)
    assert dropout.eval()(raw, 0.25, **masks) is raw
    assert dropout.take() is None


# Lost penalties


def test_an_untaken_penalty_warns_once() -> None:
    warnings.simplefilter("error")
    dropout, raw, reg = FusedRNNDropout(0.3, ALPHA, BETA), lm.inputs().requires_grad_(), lm.regularizer()
    for _ in range(3):
        dropout(raw)
        dropout.take()
    with reg.attach(lm.gru(), dropout):  # which may be used elsewhere, too
        for _ in range(3):
            dropout(raw)
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


def test_a_penalty_without_a_gradient_is_warned_of_once() -> None:
    warnings.simplefilter("error")
    dropout, raw = FusedRNNDropout(0.3, ALPHA, BETA), lm.inputs().requires_grad_()
    with torch.no_grad():
        dropout(raw)
        dropout.take()
    warning = pytest.warns(UserWarning, match="FusedRNNDropout: the penalty has no gradient, .* use_reentrant=False")
    for use_reentrant, expected in ((False, nullcontext()), (True, warning), (True, nullcontext())):
        checkpoint(dropout, raw, use_reentrant=use_reentrant)
        with expected:
            assert dropout.take().penalty.requires_grad != use_reentrant  # pyright: ignore[reportOptionalMemberAccess]


def test_a_module_loads_from_a_file_of_weights_alone(tmp_path: Path) -> None:
    """Where its class is allowed: it holds nothing else that `torch.load` refuses, before a warning and after."""
    dropout, raw = FusedRNNDropout(0.3, ALPHA, BETA), lm.inputs().requires_grad_()
    for expected in (nullcontext(), pytest.warns(UserWarning, match="nobody took it"), nullcontext()):
        with expected:
            dropout(raw)
        torch.save(dropout, tmp_path / "dropout.pt")
        with torch.serialization.safe_globals([FusedRNNDropout]):
            loaded = torch.load(tmp_path / "dropout.pt", weights_only=True)
        assert vars(loaded).keys() == vars(dropout).keys()


def test_torch_script_runs_it_in_evaluation() -> None:
    model, x = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), FusedRNNDropout(0.3, ALPHA, BETA)), lm.inputs()
    model(x)
    scripted = torch.jit.script(model.eval())
    assert torch.equal(scripted(x), model(x))
    with pytest.raises(torch.jit.Error, match=r"FusedRNNDropout: TorchScript cannot form a penalty; call eval\(\)"):
        scripted.train()(x)
    model.train()(x)
    assert model[1].take() is not None  # which the scripted copy left alone


# Whose coefficients


def test_an_attached_dropout_follows_the_coefficients_of_the_regularizer(formed: list[Any]) -> None:
    """And keeps its own, for its copies and for later."""
    model, reg = lm.seeded(lm.Fused), lm.regularizer()
    model.dropout.alpha, model.dropout.beta = 0.25, 0.5
    with reg.attach(model.rnn, model.dropout):
        for alpha, beta in ((0.0, 3.0), (3.0, 0.0), (0.0, 0.0)):
            reg.alpha, reg.beta = alpha, beta
            _, raw, dropped = model.activations(lm.tokens())
            torch.testing.assert_close(lm.penalty_of(reg, dropped), lm.formula(raw, dropped, 1, alpha, beta))
            torch.testing.assert_close([reg.ar, reg.tar], [dropped.pow(2).mean(), raw.diff(dim=1).pow(2).mean()])
        _, raw, dropped = model.activations(lm.tokens())
        reg.alpha, reg.beta = ALPHA, BETA  # after the forward: the penalty has these all the same
        lm.check_gradients(model, lm.penalty_of(reg, dropped), lm.formula(raw, dropped, 1))
        _, raw, dropped = model.activations(lm.tokens())
        reg.alpha = torch.full((2,), 9.0)
        with pytest.raises(ValueError, match="alpha: expected a number or a 0-dim floating-point tensor"):
            lm.penalty_of(reg, dropped)
        copies = [copy.deepcopy(model.dropout), pickle.loads(pickle.dumps(model.dropout))]
    assert len(formed) == 1  # for the coefficients that changed after the forward
    for dropout in (model.dropout, *copies):
        dropped = dropout(raw)
        torch.testing.assert_close(dropout.take().penalty, lm.formula(raw, dropped, 1, 0.25, 0.5))
