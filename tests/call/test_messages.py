"""Messages of errors: a case for each bad argument."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastreg import FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import skip_without
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
AWAY = tuple.__new__(PackedSequence, (PACKED.data, PACKED.batch_sizes.to("meta"), None, None))
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
    ((X.to_sparse(), X), TypeError, "raw: expected a dense .* got torch.sparse_coo"),
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
    ((AWAY, AWAY), ValueError, "raw.batch_sizes: expected a tensor on the CPU, got one on meta"),
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
    ({"valid": STARTS.t()}, ValueError, r"valid: expected shape \(2, 5\), batch and time steps, got \(5, 2\)"),
    ({"valid": STARTS, "batch_first": False}, ValueError, r"valid: expected shape \(5, 2\), .* in every layout, got"),
    ({"valid": STARTS.to("meta")}, ValueError, "valid: expected a tensor on cpu, or another device with memory"),
    ({"valid": STARTS, "lengths": LENGTHS}, ValueError, "lengths and valid: expected one of them, got both"),
    ({"return_terms": "no"}, TypeError, "return_terms: expected True or False, got 'no'"),
    ({"return_terms": {}}, TypeError, "return_terms: expected True or False, got {}"),
    ({"reduction": ["mean"]}, ValueError, r"reduction: expected 'mean' or 'sum', got \['mean'\]"),
    ({"reduction": "none"}, ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
    ({"lengths": X[:, 0, 0] > 0}, TypeError, "lengths: expected an integer tensor, got one of torch.bool; use .long()"),
    ({"lengths": LENGTHS[:1]}, ValueError, r"lengths: expected shape \(2,\), one .*, got \(1,\)"),
    ({"raw": X[0], "lengths": LENGTHS, "time_dim": 0}, ValueError, r"lengths: expected shape \(1,\), .* got \(2,\)"),
    ({"lengths": LENGTHS + 1}, ValueError, "lengths: expected from 0 to the 5 time steps .* got 6"),
    ({"lengths": LENGTHS - 4}, ValueError, "lengths: expected from 0 to the 5 time steps .* got -1"),
    ({"lengths": LENGTHS.to("meta")}, ValueError, "lengths: expected a tensor on cpu, .* on meta"),
    ({"lengths": LENGTHS.to_sparse()}, TypeError, "lengths: expected a dense .*, got torch.sparse_coo"),
]

# Options that do not go with packed sequences or layers.
BAD_PAIRS: list[tuple[Any, dict[str, Any], str]] = [
    (PACKED, {"lengths": LENGTHS}, "lengths: expected None, as a PackedSequence has"),
    (PACKED, {"valid": STARTS}, "valid: expected None, as a PackedSequence has its own lengths"),
    (PACKED, {"starts": STARTS}, "starts: expected None with a PackedSequence"),
    (PACKED, {"time_dim": 1}, "time_dim: expected 0 or None with a PackedSequence"),
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
