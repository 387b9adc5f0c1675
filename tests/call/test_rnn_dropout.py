"""`FusedRNNDropout`: by itself, and attached, where it works for the regularizer."""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout, fused_ar_tar
from tests import language_model as lm
from tests.language_model import ALPHA, BATCH, BETA, STARTS, TIME, VALID

# An attached dropout gives no warning.
pytestmark = pytest.mark.filterwarnings("error", "ignore:fastreg runs the plain formula on CPUs")
OTHER = torch.arange(TIME).expand(BATCH, -1) != 3


def check_own(dropout: Any, raw: Tensor) -> None:
    """Check that a dropout uses its own coefficients, 3 and 5, and counts all steps."""
    dropped, taken = dropout(raw), dropout.take()
    torch.testing.assert_close(taken.penalty, lm.formula(raw, dropped, 1, 3.0, 5.0))
    assert dropout.take() is None


# Attached


@pytest.mark.parametrize("of", [float, torch.tensor], ids=["numbers", "tensors"])
@pytest.mark.parametrize("p", [0.3, 0.0])
def test_an_attached_dropout_takes_masks_and_coefficients_of_the_regularizer(p: float, of: Any) -> None:
    (rnn, dropout), reg = (lm.gru(), FusedRNNDropout(p, 3.0, 5.0)), lm.regularizer()
    with reg.attach(rnn, dropout, valid=lambda _: VALID, starts=lambda _: STARTS):
        for alpha, beta in ((0.0, 3.0), (3.0, 0.0), (0.0, 0.0), (0.5, 0.25)):
            reg.alpha, reg.beta = of(alpha), of(beta)
            raw, dropped = lm.run(rnn, dropout)
            assert dropout.take() is None
            want = fused_ar_tar(raw, dropped, alpha, beta, valid=VALID, starts=STARTS, return_terms=True)
            loss = dropped.sin().sum()
            lm.check_gradients(rnn, reg.on_backward_begin(loss), loss + want.penalty)
            torch.testing.assert_close((reg.ar, reg.tar), want[1:])
        assert str(dropout) == f"FusedRNNDropout(p={p:g}, alpha=3.0, beta=5.0)"
        check_own(dropout, lm.inputs())  # of another module's output
        assert dropout.state_dict() == {}
    check_own(dropout, rnn(lm.inputs())[0])


@pytest.mark.parametrize("name", ["valid", "starts"])
@pytest.mark.parametrize("by_position", [False, True])
def test_a_mask_of_the_call_takes_precedence(by_position: bool, name: str) -> None:
    dropout, rnn, reg = FusedRNNDropout(0.4, 0, 0), lm.gru(), lm.regularizer()
    reg.attach(rnn, dropout, valid=lambda _: VALID, starts=lambda _: STARTS)
    raw, _ = rnn(lm.inputs())
    own: Any = {"valid": None, "starts": None, name: OTHER}
    dropped = dropout(raw, None, *own.values()) if by_position else dropout(raw, **{name: OTHER})
    masks: Any = {"valid": VALID, "starts": STARTS, name: OTHER}
    lm.check_gradients(rnn, lm.penalty_of(reg, dropped), fused_ar_tar(raw, dropped, ALPHA, BETA, **masks))
    assert dropout.take() is None


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_attached_dropout_takes_one_sequence_with_or_without_a_gradient(around: Any, frozen: bool) -> None:
    (rnn, dropout), reg = (lm.gru().requires_grad_(not frozen), FusedRNNDropout(0.4, 0, 0)), lm.regularizer()
    reg.attach(rnn, dropout)
    with around():
        raw, dropped = lm.run(rnn, dropout, lm.inputs()[0])
    is_dropped = dropped == 0
    assert is_dropped.any()
    assert (is_dropped == is_dropped[0]).all()  # at all time steps
    if raw.requires_grad:
        lm.check_gradients(rnn, lm.penalty_of(reg, dropped), lm.formula(raw, dropped, 0))


@pytest.mark.parametrize("in_training", [True, False])
def test_a_mask_of_the_call_counts_in_evaluation_too(in_training: bool) -> None:
    dropout, rnn, reg = FusedRNNDropout(0.4, 0, 0), lm.gru(), lm.regularizer()
    reg.attach(rnn, dropout.train(in_training), valid=lambda _: VALID)
    raw, _ = rnn(lm.inputs())
    dropped = dropout(raw, valid=OTHER)
    torch.testing.assert_close(lm.penalty_of(reg, dropped), fused_ar_tar(raw, dropped, ALPHA, BETA, valid=OTHER))


# By itself


def test_coefficients_are_moved_to_the_device_of_raw() -> None:
    """The meta device stands for a GPU."""
    dropout = FusedRNNDropout(0.4, torch.tensor(ALPHA), torch.tensor(BETA))
    dropout(torch.empty(BATCH, TIME, 2, device="meta", requires_grad=True))
    assert [x.device.type for x in dropout.take()] == ["meta"] * 3  # pyright: ignore


def test_p_of_one_call_takes_precedence() -> None:
    dropout, raw = FusedRNNDropout(0.0, ALPHA, BETA), lm.inputs()
    assert dropout(raw, 0.25) is not raw
    assert dropout.take() is not None
    assert dropout.take() is None  # once
    assert dropout(raw) is raw  # by its own p
    torch.testing.assert_close(dropout.take().penalty, lm.formula(raw, raw, 1))  # pyright: ignore
    assert FusedRNNDropout(0.25, ALPHA, BETA)(raw, 0.0) is raw  # which is no missing p
    dropout(raw, 0.25)
    assert dropout.eval()(raw, 0.25, valid=VALID) is raw
    assert dropout.take() is None


def test_a_module_is_loaded_from_a_file_that_may_contain_its_class_and_weights_only() -> None:
    dropout = FusedRNNDropout(0.3, 3.0, 5.0)
    dropout(lm.inputs().requires_grad_())
    torch.save(dropout, file := io.BytesIO())
    file.seek(0)
    with torch.serialization.safe_globals([FusedRNNDropout]):
        twin = torch.load(file, weights_only=True)
    assert twin.take() is None
    check_own(twin, lm.inputs())


def test_a_checkpoint_recomputes_no_penalty_and_a_reentrant_one_warns_once() -> None:
    dropout, raw = FusedRNNDropout(0.3, ALPHA, BETA), lm.inputs().requires_grad_()
    with torch.no_grad():
        dropout(raw)
        dropout.take()
    warning = pytest.warns(UserWarning, match="FusedRNNDropout: the penalty has no gradient, .* use_reentrant=False")
    for use_reentrant, expected in ((False, nullcontext()), (True, warning), (True, nullcontext())):
        # sin() comes last, because a recomputation stops at the last tensor that it needs.
        dropped: Any = checkpoint(lambda x: dropout(x * 1).sin(), raw, use_reentrant=use_reentrant)
        with expected:
            taken: Any = dropout.take()
        assert taken.penalty.requires_grad != use_reentrant
        (dropped.sum() + taken.penalty).backward()
        assert dropout.take() is None


@pytest.mark.parametrize("coefficients", [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_a_replica_of_data_parallel_is_an_error_unless_its_coefficients_are_0(coefficients: Any) -> None:
    replica: Any = FusedRNNDropout(0.3, *coefficients)._replicate_for_data_parallel()
    error = pytest.raises(RuntimeError, match=r"FusedRNNDropout: DataParallel .* Use DistributedDataParallel")
    with nullcontext() if coefficients == (0.0, 0.0) else error:
        replica(lm.inputs())
    replica.eval()(lm.inputs())
