"""Messages: a case for each bad argument, and the mistakes of newcomers, whose error or warning names the remedy."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar, fused_dropout_ar_tar
from tests import language_model as lm
from tests.conftest import skip_without
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME
from tests.samples import Decorated

X = torch.randn(2, 5, 8)
JAGGED = torch.nested.nested_tensor([X[0], X[0]], layout=torch.jagged)
LENGTHS = torch.tensor([5, 3])
STARTS = torch.tensor([[1, 0, 0, 1, 0]] * 2) > 0
PACKED = pack_padded_sequence(X, LENGTHS, batch_first=True)
OTHER = pack_padded_sequence(X, torch.tensor([4, 4]), batch_first=True)
DECORATED = PackedSequence(OTHER.data, OTHER.batch_sizes.as_subclass(Decorated))
SHORT = PackedSequence(PACKED.data[:-1], PACKED.batch_sizes)
HALVES = PackedSequence(PACKED.data, PACKED.batch_sizes.float())
LOWEST = -(2**63) + 1
# The sum and differences of the first ones wrap.
WRONG_SIZES = [torch.tensor(x) for x in ([1, LOWEST, 1, LOWEST, 4], [1, 1, 2, 2, 2], [8, 1, -1])]
WRONG_SIZES += [WRONG_SIZES[1].as_subclass(Decorated)]
ROWS_OF_ROWS = tuple.__new__(PackedSequence, (PACKED.data[None], PACKED.batch_sizes, None, None))
SIZES = "raw.batch_sizes: expected sizes above 0 that never grow and add up to the 8 rows, got"
OTHER_STEPS = r"raw\[1\]: expected the batch and time steps of raw\[0\],"


# One tensor or list for both; or raw and dropped.
BAD_ACTIVATIONS: list[tuple[Any, type[Exception], str]] = [
    ((1, X), TypeError, "raw: expected a tensor, a PackedSequence, or a list or tuple of them, got int"),
    ((X, None), TypeError, "dropped: expected a tensor, .* got NoneType .* only if alpha is 0"),
    ((None, X), TypeError, "raw: expected a tensor, .* got NoneType .* only if beta is 0"),
    ((X, X.to(torch.complex64)), TypeError, "dropped: expected float16, .* got torch.complex64"),
    ((X, JAGGED), TypeError, "dropped: expected a dense .* got nested"),
    ((X[0, 0], X), ValueError, r"raw: expected \(batch, time, hidden\), .* got \(8,\)$"),
    ((X, X[:, :4]), ValueError, r"dropped: expected the shape of raw, \(2, 5, 8\), got \(2, 4, 8\)"),
    ((X, X.to("meta")), ValueError, "dropped: expected a tensor on cpu, where raw is, got .* meta"),
    (([X, X], [X]), ValueError, "raw and dropped: expected the same layers .* 2 layers and 1 layers"),
    (([], []), ValueError, "raw: expected a tensor a layer, got an empty list"),
    (([X, X], [X, X[..., :3]]), ValueError, r"dropped\[1\]: expected the shape of raw\[1\]"),
    (([X, None], [X, X]), TypeError, r"raw\[1\]: expected a tensor, got NoneType"),
    (([X, (X, X)], [X, X]), TypeError, r"raw\[1\]: expected a tensor, got tuple \(an RNN returns"),
    (((X, X[:, :1]),) * 2, ValueError, rf"{OTHER_STEPS} .* \(2, 5, 8\), got \(2, 1, 8\) \(an RNN returns"),
    (([PACKED, OTHER],) * 2, ValueError, r"raw\[1\]: expected the batch_sizes of raw\[0\], got others"),
    ((PACKED, PACKED.data), TypeError, "dropped: expected a PackedSequence, as raw is, got a tensor"),
    ((PACKED, OTHER), ValueError, "dropped: expected the batch_sizes of raw, got others"),
    ((PACKED, DECORATED), ValueError, "dropped: expected the batch_sizes of raw, got others"),
    ((HALVES, HALVES), TypeError, "raw.batch_sizes: expected an integer tensor, got one of torch.float"),
    ((SHORT, SHORT), ValueError, "raw.batch_sizes: expected sizes above 0 .* add up to the 7 rows, got"),
    *[((PackedSequence(PACKED.data, x),) * 2, ValueError, SIZES) for x in WRONG_SIZES],
    ((ROWS_OF_ROWS, ROWS_OF_ROWS), ValueError, r"raw.data: expected \(rows, hidden\), got \(1, "),
]

# Options of both functions.
BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"raw": X.int()}, TypeError, "raw: expected float16, bfloat16, float32 or float64, got torch.int32"),
    ({"alpha": 10**400}, ValueError, "alpha: expected a finite number of at least 0, got inf"),
    ({"alpha": "2"}, TypeError, "alpha: expected a real number, got str"),
    ({"alpha": torch.tensor(2)}, ValueError, "alpha: expected a number or a 0-dim floating-point tensor, got"),
    ({"alpha": torch.tensor(-1.0)}, ValueError, "alpha: expected a finite number of at least 0, got -1.0"),
    ({"alpha": torch.tensor(1.0, device="meta")}, ValueError, "alpha: expected a tensor on cpu, where raw is"),
    ({"beta": torch.ones(1)}, ValueError, "beta: expected a number or a 0-dim floating-point tensor, got"),
    ({"beta": torch.ones((), requires_grad=True)}, ValueError, "beta: expected a tensor that requires no"),
    ({"batch_first": 1}, TypeError, "batch_first: expected True or False, got 1"),
    ({"time_dim": 3}, ValueError, r"time_dim: expected an axis of raw, .* from -3 to 2, got 3"),
    ({"raw": X.sum(), "time_dim": 0}, ValueError, r"time_dim: expected an axis of raw, of shape \(\), got 0"),
    ({"time_dim": [1]}, TypeError, "time_dim: expected an int, the axis of time, got list"),
    ({"time_dim": True}, TypeError, "time_dim: expected an int, the axis of time, got bool"),
    ({"time_dim": 1, "batch_first": True}, ValueError, "batch_first and time_dim: expected one of"),
    ({"starts": STARTS[0]}, ValueError, r"starts: expected shape \(2, 5\), batch and time steps, got"),
    ({"starts": STARTS.int() * 2}, ValueError, "starts: expected 0 or 1, got 2"),
    ({"valid": STARTS.float()}, TypeError, "valid: expected a bool or .*, got one of torch.float32; use .bool()"),
    ({"valid": STARTS, "batch_first": False}, ValueError, r"valid: expected shape \(5, 2\), .* in every layout, got"),
    ({"valid": STARTS.to("meta")}, ValueError, "valid: expected a tensor on cpu, or another device with memory"),
    ({"valid": STARTS, "lengths": LENGTHS}, ValueError, "lengths and valid: expected one of them, got both"),
    ({"return_terms": "no"}, TypeError, "return_terms: expected True or False, got 'no'"),
    ({"reduction": ["mean"]}, ValueError, r"reduction: expected 'mean' or 'sum', got \['mean'\]"),
    ({"reduction": "none"}, ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
    ({"lengths": X[:, 0, 0] > 0}, TypeError, "lengths: expected an integer tensor, .* torch.bool; use .long.*valid="),
    ({"lengths": [5, 3]}, TypeError, r"lengths: expected an integer tensor, got list; use torch.tensor\(\)"),
    ({"valid": LENGTHS}, ValueError, r"valid: expected shape \(2, 5\), .* got \(2,\); a mask of lengths is"),
    ({"lengths": LENGTHS[:1]}, ValueError, r"lengths: expected shape \(2,\), one .*, got \(1,\)"),
    ({"raw": X[0], "lengths": LENGTHS, "time_dim": 0}, ValueError, r"lengths: expected shape \(1,\), .* got \(2,\)"),
    ({"lengths": LENGTHS + 1}, ValueError, "lengths: expected from 0 to the 5 time steps .* got 6"),
    ({"lengths": LENGTHS - 4}, ValueError, "lengths: expected from 0 to the 5 time steps .* got -1"),
    ({"lengths": LENGTHS.to("meta")}, ValueError, "lengths: expected a tensor on cpu, .* on meta"),
    ({"lengths": LENGTHS.to_sparse()}, TypeError, "lengths: expected a dense .*, got torch.sparse_coo"),
]

# Options that do not go with packed sequences or layers.
BAD_PAIRS: list[tuple[Any, dict[str, Any], str]] = [
    (PACKED, {"lengths": LENGTHS}, "lengths: expected None with a PackedSequence; pad_packed_sequence returns"),
    (PACKED, {"valid": STARTS}, "valid: expected None with a PackedSequence"),
    (PACKED, {"starts": STARTS}, "starts: expected None with a PackedSequence"),
    (PACKED, {"time_dim": 1}, "time_dim: expected 0 or None with a PackedSequence"),
    (PACKED, {"time_dim": 0, "batch_first": True}, "batch_first and time_dim: expected one of them"),
    ([X, X.movedim(2, 1)], {"time_dim": -1}, OTHER_STEPS),
]

BAD_DROPOUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"raw": None}, TypeError, "raw: expected a tensor, got NoneType"),
    ({"raw": [X]}, TypeError, "raw: expected a tensor, got list"),
    ({"p": Fraction(10**20 - 1, 10**20)}, ValueError, "p: expected a probability from 0 to below 1, got 9"),
    ({"training": "no"}, TypeError, "training: expected True or False, got 'no'"),
    ({"mask": 1}, TypeError, "mask: expected a tensor, got int"),
    ({"mask": X[:, :3]}, ValueError, r"mask: expected shape \(2, 1, 8\) or raw's shape .* got"),
    ({"mask": X.double()}, TypeError, "mask: expected the dtype of raw, torch.float32, got"),
    ({"mask": X.to("meta")}, ValueError, "mask: expected a tensor on cpu, .* got one on meta"),
    ({"mask": X.clone().requires_grad_()}, ValueError, "mask: expected .* requires no gradient"),
]

BAD_MODULE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ar_of": "out"}, ValueError, "ar_of: expected 'dropped' or 'raw', got 'out'"),
    ({"batch_first": True, "time_dim": 1}, ValueError, "batch_first and time_dim: expected one of them, got both"),
]

GOOD: dict[Any, dict[str, Any]] = {
    fused_ar_tar: {"raw": X, "dropped": X, "alpha": 2.0, "beta": 1.0},
    fused_dropout_ar_tar: {"raw": X, "p": 0.5, "alpha": 2.0, "beta": 1.0},
    FusedRNNDropout: {},
}
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    *[(fused_ar_tar, {"raw": x, "dropped": y}, error, message) for (x, y), error, message in BAD_ACTIVATIONS],
    *[(fused_dropout_ar_tar, *row) for row in BAD_OPTIONS],
    *[(fused_ar_tar, {"dropped": bad.get("raw", X), **bad}, *expected) for bad, *expected in BAD_OPTIONS],
    *[(fused_ar_tar, {"raw": x, "dropped": x, **bad}, ValueError, message) for x, bad, message in BAD_PAIRS],
    *[(fused_dropout_ar_tar, *row) for row in BAD_DROPOUT],
    *[(FusedRNNDropout, *row) for row in BAD_MODULE],
]


@pytest.mark.parametrize(("function", "bad", "error", "message"), BAD, ids=[x[3] for x in BAD])
def test_bad_arguments(function: Any, bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}") as raised:
        function(**GOOD[function] | bad)
    assert raised.type is error


def test_a_bad_coefficient_that_is_set_later() -> None:
    module = FusedRNNDropout(0.1)
    module.alpha = -1.0
    with pytest.raises(ValueError, match="alpha: expected a finite number of at least 0, got -1"):
        module(X)


def test_numbers_of_numpy_are_coefficients_and_axes() -> None:
    skip_without("numpy")
    import numpy

    assert torch.equal(fused_ar_tar(X, X, numpy.float32(2), 1), fused_ar_tar(X, X, 2.0, 1.0))
    assert torch.equal(fused_ar_tar(X, X, 2, 1, time_dim=numpy.int64(-1)), fused_ar_tar(X, X, 2, 1, time_dim=-1))


# Mistakes of newcomers

Mistake = Callable[[], Any]
RAW = lm.inputs()


def own() -> Tensor:
    """Return raw as the output of a layer that is trained."""
    return nn.Linear(HIDDEN, HIDDEN)(RAW)


def bare(take: bool = False, forwards: int = 1, **options: Any) -> FusedRNNDropout:
    """Run a fused dropout without coefficients in training."""
    dropout = FusedRNNDropout(0.3, **options)
    for _ in range(forwards):
        dropout(own())
    if take:
        dropout.take()
    return dropout


def captures(*activations: Tensor, reg: Any = None, between: Callable[[RNNRegularizer], Any] = lambda _: None) -> None:
    """Capture activations one after the other, without `on_backward_begin`."""
    reg = reg or lm.regularizer()
    for x in activations:
        reg.on_loss_begin((x, x, x))
        between(reg)


def states_as_activations(**options: Any) -> None:
    """Give `(decoded, h, c)` to `on_loss_begin`, as an LSTM returns them."""
    rnn = nn.LSTM(HIDDEN, HIDDEN, num_layers=2, batch_first=True)
    raw, (h, c) = rnn(RAW)
    reg = lm.regularizer()
    reg.on_loss_begin((nn.Linear(HIDDEN, 5)(raw), h, c), **options)
    reg.on_backward_begin(raw.mean())


NO_PENALTY = r"FusedRNNDropout: there is no penalty, .* FusedRNNDropout\(p, "
STEPS = rf"raw\[0\]: expected .* got \({BATCH}, {HIDDEN}\)\. .* torch\.stack\(states, 1\)"
DISCARDED = r"on_loss_begin: the last capture is discarded, .* on_backward_begin\(loss\) .* clear\(\)"
NO_LAYOUT = rf"batch_first: .* got None: raw is \(2, {BATCH}, {HIDDEN}\), .* not its states h and c"
STATES = r"on_loss_begin: raw is .* has the size of its batch, 2\. .* not its states h and c"
# The mistake, the error or warning that it causes now, and its message
MISTAKES: dict[str, tuple[Mistake, type[Exception], str]] = {
    "a dropout without coefficients": (lambda: bare(True), RuntimeError, rf"{NO_PENALTY}alpha=2\.0, .*attach\(rnn"),
    "its second step": (lambda: bare(forwards=2), UserWarning, rf"{NO_PENALTY}.* write FusedRNNDropout\(p, 0, 0\)"),
    "a list of time steps": (lambda: fused_ar_tar([*RAW.unbind(1)], [*RAW.unbind(1)], ALPHA, BETA), ValueError, STEPS),
    "a second capture": (lambda: captures(own(), own()), UserWarning, DISCARDED),
    "a second capture, the first with a gradient": (lambda: captures(own(), RAW), UserWarning, DISCARDED),
    "states for activations": (states_as_activations, ValueError, NO_LAYOUT),
    "states, batch first": (lambda: states_as_activations(batch_first=True), UserWarning, STATES),
    "states, with time_dim": (lambda: states_as_activations(time_dim=1), UserWarning, STATES),
}


@pytest.mark.parametrize(("mistake", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told(mistake: Mistake, kind: type[Exception], message: str) -> None:
    if not issubclass(kind, Warning):
        with pytest.raises(kind, match=message):
            mistake()
        return
    with pytest.warns(kind, match=f"^{message}") as caught:
        mistake()
    assert [warning.filename for warning in caught] == [__file__]


def attached(dropout: FusedRNNDropout) -> None:
    """Run a dropout attached, and then twice without the regularizer."""
    rnn, reg = lm.gru(), lm.regularizer()
    with reg.attach(rnn, dropout):
        lm.run(rnn, dropout)
    for _ in range(2):
        lm.run(rnn, dropout)


def in_evaluation(dropout: FusedRNNDropout) -> None:
    dropout(RAW)
    for _ in range(2):
        assert dropout.eval()(RAW) is RAW
        assert dropout.take() is None


def loss_of(reg: RNNRegularizer) -> Tensor:
    return reg.on_backward_begin(own().mean())


RIGHT: dict[str, Mistake] = {
    "coefficients of 0 that were said": lambda: captures(RAW, reg=RNNRegularizer(0, 0), between=loss_of),
    "a dropout with coefficients of 0": lambda: bare(True, 3, alpha=0, beta=0.0),
    "a dropout with an alpha of 0": lambda: bare(True, 3, alpha=0),
    "a dropout with a beta of 0": lambda: bare(True, 3, beta=0),
    "one forward without coefficients": bare,
    "a dropout that was attached once": lambda: attached(FusedRNNDropout(0.3)),
    "a dropout that has run once, and is then attached": lambda: attached(bare()),
    "a dropout without coefficients in evaluation": lambda: in_evaluation(FusedRNNDropout(0.3)),
    "samples of a dropout without coefficients": torch.no_grad()(lambda: bare(forwards=2)),
    "captures without gradients": lambda: captures(RAW, RAW, own()),
    "captures that clear() has dropped": lambda: captures(own(), own(), between=RNNRegularizer.clear),
    "captures that an epoch drops": lambda: captures(own(), own(), between=lambda x: x.on_epoch_begin(nn.Linear(1, 1))),
    "captures that losses have taken": lambda: captures(own(), own(), between=loss_of),
    "the states of an RNN with the batch second": lambda: states_as_activations(batch_first=False),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_silent(right: Mistake) -> None:
    right()


@pytest.mark.parametrize(
    ("mistake", "made", "message"),
    [
        (lambda dropout: [dropout(own()) for _ in range(2)], bare, "there is no penalty"),
        (lambda reg: captures(own(), own(), reg=reg), lm.regularizer, "the last capture is discarded"),
        (lambda reg: reg.on_loss_begin((torch.zeros(7, 8, 9), RAW, RAW), batch_first=True), lm.regularizer, "no axis"),
    ],
)
def test_a_warning_comes_once_for_each_object_and_again_for_its_copy(mistake: Any, made: Any, message: str) -> None:
    one = made()
    for duplicate in (lambda x: x, copy.deepcopy, lm.pickled):
        twin = duplicate(one)
        with pytest.warns(UserWarning, match=message):
            mistake(twin)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mistake(twin)


def test_none_beside_a_number_is_0_and_a_schedule_may_set_it() -> None:
    dropout, raw = FusedRNNDropout(0.3, beta=BETA), own()
    assert (dropout.alpha, dropout.beta) == (0.0, BETA)
    assert re.fullmatch(r"FusedRNNDropout\(p=0.3, alpha=0.0, beta=\d.*\)", str(dropout))
    assert str(FusedRNNDropout(0.3)) == "FusedRNNDropout(p=0.3)"
    dropout = FusedRNNDropout(0.3)
    dropout.alpha = ALPHA
    dropped, taken = dropout(raw), dropout.take()
    torch.testing.assert_close(taken and taken.penalty, lm.formula(raw, dropped, 1, ALPHA, 0.0))


def by_hand(x: Tensor, **options: Any) -> Tensor:
    """Return the penalty of captured activations."""
    reg = lm.regularizer()
    reg.on_loss_begin((x, x, x), **options)
    return lm.penalty_of(reg)


ONE, BATCHED = {"time_dim": 0}, {"batch_first": True}
# Each computes the penalty of one sequence, whose axis is said, or of a batch of that sequence.
SAID: dict[str, Callable[..., Any]] = {
    "a tensor": lambda x, **said: fused_ar_tar(x, x, ALPHA, BETA, **said),
    "dropped alone": lambda x, **said: fused_ar_tar(None, x, ALPHA, 0.0, **said),
    "a list": lambda x, **said: fused_ar_tar([x, 2 * x], [x, x], ALPHA, BETA, **said),
    "by hand": by_hand,
    "a dropout": lambda x, **said: fused_dropout_ar_tar(x, 0.3, ALPHA, BETA, **said)[1],
    "a FusedRNNDropout": lambda x, **said: [d := FusedRNNDropout(0.3, ALPHA, BETA, **said), d(x), d.take()][-1].penalty,
    "under vmap": lambda x, **said: torch.vmap(lambda x: fused_ar_tar(x, x, ALPHA, BETA, **said))(x[None])[0],
}
UNSAID = rf"^(raw(\[0\])?|dropped): expected \(batch, .* got \({TIME}, {HIDDEN}\)\. (Pass time_dim=0 if|.*torch\.stack)"


@pytest.mark.parametrize("call", SAID.values(), ids=SAID)
def test_one_sequence_needs_its_axis_and_counts_as_a_batch_of_one(call: Callable[..., Any]) -> None:
    for unsaid in ({}, BATCHED, {"batch_first": False}):
        with pytest.raises(ValueError, match=UNSAID):
            call(RAW[0], **unsaid)
    got, want = [lm.seeded(lambda x=x, said=said: call(x, **said)) for x, said in ((RAW[0], ONE), (RAW[:1], BATCHED))]
    torch.testing.assert_close(got, want)
