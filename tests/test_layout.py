"""The one view of every layout, and one test for each kind of bad argument."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastreg import fused_ar_tar
from fastreg.kernels.view import NOTHING, layout_of
from fastreg.problem import Layer, Problem
from fastreg.view import fold_of, view_of

X = torch.randn(2, 5, 8)
JAGGED = torch.nested.nested_tensor([X[0], X[0]], layout=torch.jagged)
LENGTHS = torch.tensor([5, 3])
STARTS = torch.tensor([[1, 0, 0, 1, 0]] * 2) > 0
PACKED = pack_padded_sequence(X, LENGTHS, batch_first=True)
OTHER = pack_padded_sequence(X, torch.tensor([4, 4]), batch_first=True)
SHORT = PackedSequence(PACKED.data[:-1], PACKED.batch_sizes)
GROWING = PackedSequence(PACKED.data, PACKED.batch_sizes.flip(0))
HALVES = PackedSequence(PACKED.data, PACKED.batch_sizes.float())
WRAPPED = PackedSequence(PACKED.data[:1], torch.tensor([2**62 + 1, 2**62, 2**62, 2**62]))
WRAPPING = PackedSequence(  # a sum and differences that wrap to valid values
    torch.randn(24, 3), torch.tensor([2, -(2**62), -(2**63) + 10, 2**62, 1, -(2**62), -(2**63) + 10, 2**62, 1])
)
AWAY = tuple.__new__(PackedSequence, (PACKED.data, PACKED.batch_sizes.to("meta"), None, None))
EMPTY_STEP, NEGATIVE = (PackedSequence(PACKED.data, torch.tensor(sizes)) for sizes in ([4, 4, 0], [8, 1, -1]))
ROWS_OF_ROWS = tuple.__new__(PackedSequence, (PACKED.data[None], PACKED.batch_sizes, None, None))
IDS = PackedSequence(PACKED.data.long(), PACKED.batch_sizes)


@pytest.mark.parametrize(
    ("tensors", "batch_first", "sizes", "strides", "copied"),
    [
        ([X], True, (2, 5, 8), [(40, 8)], [False]),
        ([X], False, (1, 2, 40), [(8, 40)], [False]),
        ([X[0]], True, (1, 5, 8), [(8, 8)], [False]),
        ([X[:1]], True, (1, 5, 8), [(8, 8)], [False]),
        ([X.transpose(0, 1)], False, (2, 5, 8), [(40, 8)], [False]),
        ([X, X.transpose(0, 1).contiguous().transpose(0, 1)], True, (2, 5, 8), [(40, 8), (8, 16)], [False, False]),
        ([X[..., 1:7]], True, (2, 5, 6), [(40, 8)], [False]),
        ([X[..., ::2]], True, (2, 5, 4), [(20, 4)], [True]),
        ([X[..., :1]], True, (1, 5, 2), [(2, 2)], [True]),
        ([X[:1].expand(3, 5, 8)], True, (3, 5, 8), [(0, 8)], [False]),
        ([None, X], True, (2, 5, 8), [(0, 0), (40, 8)], [False, False]),
    ],
)
def test_view(
    tensors: Sequence[torch.Tensor | None], batch_first: bool, sizes: Any, strides: Any, copied: Sequence[bool]
) -> None:
    layouts = [None if x is None else layout_of(x) for x in tensors]
    first = next(x for x in tensors if x is not None)
    fold = fold_of(layouts, Layer(first, None), Problem(2.0, 1.0, -2 if batch_first else 0))
    got = view_of(layouts, fold, NOTHING)
    assert got[:3] == sizes
    assert [(0, 0) if x is None else (x.outer, x.time) for x in got.operands] == strides
    assert [x is not None and fold.read(x) is not x for x in tensors] == copied


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1, X, 2, 1), {}, TypeError, "raw: expected a tensor, a PackedSequence, or a list or tuple of them, got int"),
        ((X, None, 2, 1), {}, TypeError, "dropped: expected a tensor, .* got NoneType .* only where alpha is 0"),
        ((None, X, 2, 1), {}, TypeError, "raw: expected a tensor, .* got NoneType .* only where beta is 0"),
        ((X.numpy(), X, 2, 1), {}, TypeError, "raw: expected a tensor, .* got ndarray"),
        ((X.int(), X, 2, 1), {}, TypeError, "raw: expected float16, bfloat16, float32 or float64, got torch.int32"),
        ((X, X.to(torch.complex64), 2, 1), {}, TypeError, "dropped: expected float16, .* got torch.complex64"),
        ((X.to_sparse(), X, 2, 1), {}, TypeError, "raw: expected a dense .* got torch.sparse_coo"),
        ((X[0, 0], X, 2, 1), {}, ValueError, r"raw: expected \(batch, time, hidden\), .* got \(8,\)"),
        ((X, X[None], 2, 1), {}, ValueError, r"dropped: expected \(batch, time, hidden\), .* got \(1, 2, 5, 8\)"),
        ((X, X[:, :4], 2, 1), {}, ValueError, r"dropped: expected the shape of raw, \(2, 5, 8\), got \(2, 4, 8\)"),
        ((X, X.to("meta"), 2, 1), {}, ValueError, "dropped: expected a tensor on cpu, where raw is, got .* meta"),
        (([X, X], [X], 2, 1), {}, ValueError, "raw and dropped: expected the same layers .* 2 layers and 1 layers"),
        (([X], X, 2, 1), {}, ValueError, "raw and dropped: expected the same layers .* 1 layers and one tensor"),
        (([], [], 2, 1), {}, ValueError, "raw: expected a tensor a layer, got an empty list"),
        (([X, X], [X, X[..., :3]], 2, 1), {}, ValueError, r"dropped\[1\]: expected the shape of raw\[1\]"),
        (([X, None], [X, X], 2, 1), {}, TypeError, r"raw\[1\]: expected a tensor, got NoneType"),
        (
            ((X, X[:, :1]), (X, X[:, :1]), 2, 1),
            {},
            ValueError,
            r"raw\[1\]: expected the batch and time steps of raw\[0\], .* \(2, 5, 8\), got \(2, 1, 8\) \(an RNN gives",
        ),
        (
            ([X, X[0]], [X, X[0]], 0, 1),
            {},
            ValueError,
            r"raw\[1\]: expected the batch and time steps of raw\[0\], .* got \(5, 8\)",
        ),
        (
            ([PACKED, OTHER], [PACKED, OTHER], 2, 1),
            {},
            ValueError,
            r"raw\[1\]: expected the batch_sizes of raw\[0\], got others",
        ),
        (
            ([X, (X, X)], [X, X], 2, 1),
            {},
            TypeError,
            r"raw\[1\]: expected a tensor, got tuple \(an RNN gives",
        ),
        ((X, JAGGED, 2, 1), {}, TypeError, "dropped: expected a dense .* got nested"),
        ((X, X, 10**400, 1), {}, ValueError, "alpha: expected a finite number of at least 0, got inf"),
        ((X, X, -(10**400), 1), {}, ValueError, "alpha: expected a finite number of at least 0, got -inf"),
        ((X, X, "2", 1), {}, TypeError, "alpha: expected a real number, got str"),
        ((X, X, True, 1), {}, TypeError, "alpha: expected a real number, got bool"),
        ((X, X, 2, torch.ones(1)), {}, ValueError, "beta: expected a number or a 0-dim floating-point tensor, got"),
        ((X, X, torch.tensor(2), 1), {}, ValueError, "alpha: expected a number or a 0-dim floating-point tensor, got"),
        ((X, X, 2, torch.tensor(1.0, requires_grad=True)), {}, ValueError, "beta: expected a tensor that requires no"),
        ((X, X, torch.tensor(-1.0), 1), {}, ValueError, "alpha: expected a finite number of at least 0, got -1.0"),
        ((X, X, torch.tensor(1.0, device="meta"), 1), {}, ValueError, "alpha: expected a tensor on cpu, where raw is"),
        ((X, X, -1, 1), {}, ValueError, "alpha: expected a finite number of at least 0, got -1.0"),
        ((X, X, 2, float("nan")), {}, ValueError, "beta: expected a finite number of at least 0, got nan"),
        ((X, X, 2, float("inf")), {}, ValueError, "beta: expected a finite number of at least 0, got inf"),
        ((X, X, 2, 1), {"batch_first": 1}, TypeError, "batch_first: expected True or False, got 1"),
        ((X, X, 2, 1), {"time_dim": 3}, ValueError, r"time_dim: expected an axis of raw, .* from -3 to 2, got 3"),
        ((X, X, 2, 1), {"time_dim": -4}, ValueError, r"time_dim: expected an axis of raw, .* from -3 to 2, got -4"),
        ((X.sum(), X, 2, 1), {"time_dim": 0}, ValueError, r"time_dim: expected an axis of raw, of shape \(\), got 0"),
        ((X, X, 2, 1), {"time_dim": 1.0}, TypeError, "time_dim: expected an int, the axis of time, got float"),
        ((X, X, 2, 1), {"time_dim": True}, TypeError, "time_dim: expected an int, the axis of time, got bool"),
        ((X, X, 2, 1), {"time_dim": 1, "batch_first": True}, ValueError, "batch_first and time_dim: expected one of"),
        ((X[None], X[None], 2, 1), {}, ValueError, r"raw: expected \(batch, time, hidden\), .* or time_dim, got"),
        ((PACKED, PACKED, 2, 1), {"time_dim": 1}, ValueError, "time_dim: expected 0 or None with a PackedSequence"),
        (([X, X[:1]], [X, X[:1]], 2, 1), {}, ValueError, r"raw\[1\]: expected the batch and time steps of raw\[0\]"),
        (([X, X[0]], [X, X[0]], 2, 1), {"time_dim": 0}, ValueError, r"raw\[1\]: expected the batch and time steps of"),
        (
            ([X, X.movedim(2, 1)], [X, X.movedim(2, 1)], 2, 1),
            {"time_dim": -1},
            ValueError,
            r"raw\[1\]: expected the batch and time steps of raw\[0\]",
        ),
        (
            (X, X, 2, 1),
            {"starts": STARTS[0]},
            ValueError,
            r"starts: expected shape \(2, 5\), batch and time steps, got",
        ),
        ((X, X, 2, 1), {"starts": STARTS.t()}, ValueError, r"starts: expected shape \(2, 5\), .*, got \(5, 2\)"),
        (
            (X[None], X[None], 2, 1),
            {"starts": STARTS, "time_dim": 2},
            ValueError,
            r"starts: expected shape \(1, 5\), batch and time steps, got \(2, 5\)",
        ),
        ((X, X, 2, 1), {"starts": [0]}, TypeError, "starts: expected a bool or integer tensor, got list"),
        ((X, X, 2, 1), {"starts": STARTS.float()}, TypeError, "starts: expected a bool or integer .* torch.float32"),
        ((X, X, 2, 1), {"starts": STARTS.int() * 2}, ValueError, "starts: expected 0 or 1, got 2"),
        ((X, X, 2, 1), {"starts": STARTS.to("meta")}, ValueError, "starts: expected a tensor on cpu, .* on meta"),
        ((PACKED, PACKED, 2, 1), {"starts": STARTS}, ValueError, "starts: expected None with a PackedSequence"),
        ((X, X, 2, 1), {"return_terms": "no"}, TypeError, "return_terms: expected True or False, got 'no'"),
        ((X, X, 2, 1), {"reduction": X.numpy()}, ValueError, "reduction: expected 'mean' or 'sum', got array"),
        ((X, X, 2, 1), {"reduction": "none"}, ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
        ((X, X, 2, 1), {"lengths": [5, 3]}, TypeError, "lengths: expected an integer tensor, got list"),
        ((X, X, 2, 1), {"lengths": X[:, 0, 0]}, TypeError, "lengths: expected an integer tensor, got one of torch.fl"),
        (
            (X, X, 2, 1),
            {"lengths": X[:, 0, 0] > 0},
            TypeError,
            "lengths: expected an integer tensor, got one of torch.",
        ),
        ((X, X, 2, 1), {"lengths": LENGTHS[:1]}, ValueError, r"lengths: expected shape \(2,\), one .*, got \(1,\)"),
        ((X, X, 2, 1), {"lengths": LENGTHS[None]}, ValueError, r"lengths: expected shape \(2,\), .* got \(1, 2\)"),
        ((X[0], X[0], 2, 1), {"lengths": LENGTHS}, ValueError, r"lengths: expected shape \(1,\), .* got \(2,\)"),
        ((X, X, 2, 1), {"lengths": LENGTHS + 1}, ValueError, "lengths: expected from 0 to the 5 time steps .* got 6"),
        ((X, X, 2, 1), {"lengths": LENGTHS - 4}, ValueError, "lengths: expected from 0 to the 5 time steps .* got -1"),
        ((X, X, 2, 1), {"lengths": LENGTHS.to("meta")}, ValueError, "lengths: expected a tensor on cpu, .* on meta"),
        (
            (X, X, 2, 1),
            {"lengths": LENGTHS.to_sparse()},
            TypeError,
            "lengths: expected a dense .*, got torch.sparse_coo",
        ),
        ((HALVES, HALVES, 2, 1), {}, TypeError, "raw.batch_sizes: expected an integer tensor, got one of torch.float"),
        ((AWAY, AWAY, 2, 1), {}, ValueError, "raw.batch_sizes: expected a tensor on the CPU, got one on meta"),
        ((WRAPPED, WRAPPED, 2, 1), {}, ValueError, "raw.batch_sizes: expected sizes above 0 that never grow"),
        ((PACKED, PACKED, 2, 1), {"lengths": LENGTHS}, ValueError, "lengths: expected None, as a PackedSequence has"),
        ((PACKED, PACKED.data, 2, 1), {}, TypeError, "dropped: expected a PackedSequence, as raw is, got a tensor"),
        (
            ([PACKED], [X], 2, 1),
            {},
            TypeError,
            r"dropped\[0\]: expected a PackedSequence, as raw\[0\] is, got a tensor",
        ),
        ((PACKED, [PACKED], 2, 1), {}, ValueError, "raw and dropped: .* got one tensor and 1 layers"),
        ((PACKED, OTHER, 2, 1), {}, ValueError, "dropped: expected the batch_sizes of raw, got others"),
        ((SHORT, SHORT, 2, 1), {}, ValueError, "raw.batch_sizes: expected sizes above 0 .* add up to the 7 rows, got"),
        ((GROWING, GROWING, 2, 1), {}, ValueError, "raw.batch_sizes: expected sizes above 0 that never grow"),
        ((EMPTY_STEP, EMPTY_STEP, 2, 1), {}, ValueError, "raw.batch_sizes: expected sizes above 0 that never grow"),
        ((WRAPPING, WRAPPING, 2, 1), {}, ValueError, "raw.batch_sizes: expected sizes above 0 that never grow"),
        ((NEGATIVE, NEGATIVE, 2, 1), {}, ValueError, "raw.batch_sizes: expected sizes above 0 that never grow"),
        ((ROWS_OF_ROWS, ROWS_OF_ROWS, 2, 1), {}, ValueError, r"raw.data: expected \(rows, hidden\), got \(1, "),
        ((IDS, IDS, 2, 1), {}, TypeError, "raw.data: expected float16, bfloat16, float32 or float64, got torch.int64"),
    ],
)
def test_bad_arguments(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        fused_ar_tar(*arguments, **options)
    assert re.match(message, str(raised.value)), str(raised.value)
    assert type(raised.value) is error


def test_numbers_that_are_not_float_are_coefficients() -> None:
    numpy = pytest.importorskip("numpy")
    assert torch.equal(fused_ar_tar(X, X, numpy.float32(2), 1), fused_ar_tar(X, X, 2.0, 1.0))
