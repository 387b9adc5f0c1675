"""Variational dropout and the penalty on CPU tensors, a block at a time.

Its functions take and give what those of `fastreg.kernels.dropout` do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.cpu import (
    Scratch,
    blocks,
    change_of_rows,
    change_square_sum,
    gradient_scales,
    padding,
    put,
    results,
    square_sum,
    view_of,
)
from fastreg.reference import compute_dtype


def forward(
    raw: Tensor,
    mask: Tensor,
    dropped: Tensor,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    lengths: Tensor | None,
    alpha: float,
    beta: float,
    ar_of_raw: bool,
    divisors: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill `dropped`; give what `fastreg.cpu.forward` does."""
    dtype = compute_dtype(raw)
    raw, mask, dropped = (view_of(x, sizes, s) for x, s in zip((raw, mask, dropped), strides, strict=True))
    rows, squares = Scratch(dtype), Scratch(dtype)
    ar = tar = 0.0
    for behind in padding(sizes, lengths):
        dropped[behind] = raw[behind] * mask[behind]
    for outer, start, stop, inner, _ in blocks(sizes, lengths):
        chosen = outer, slice(start, stop), inner
        if isinstance(outer, slice):
            target = dropped[chosen]
            torch.mul(raw[chosen], mask[chosen], out=target)
        else:
            target = dropped[chosen] = raw[chosen] * mask[chosen]
        if alpha:
            ar += square_sum(rows.hold(raw[chosen] if ar_of_raw else target), squares)
        if beta:
            tar += change_square_sum(rows.hold(raw[outer, max(start - 1, 0) : stop, inner]), squares)
    return results(ar, tar, alpha, beta, divisors, sizes, lengths, dtype)


def backward(
    grad: Tensor | None,
    raw: Tensor,
    mask: Tensor,
    grad_dropped: Tensor | None,
    grad_raw: Tensor,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    lengths: Tensor | None,
    scales: Tensor | None,
    ar_of_raw: bool,
    ar_factor: float,
    tar_factor: float,
) -> None:
    """Fill `grad_raw`; the gradient of the penalty or of dropped is None where there is none."""
    dtype = compute_dtype(raw)
    ar_scale, tar_scale = gradient_scales(grad, scales, ar_factor, tar_factor)
    with_ar, with_tar = grad is not None and ar_factor != 0, grad is not None and tar_factor != 0
    raw, mask, grad_raw = (view_of(x, sizes, strides[i]) for i, x in ((0, raw), (1, mask), (3, grad_raw)))
    arriving = None if grad_dropped is None else view_of(grad_dropped, sizes, strides[2])
    rows, changes, slopes = Scratch(dtype), Scratch(dtype), Scratch(dtype)
    for behind in padding(sizes, lengths):
        grad_raw[behind] = 0 if arriving is None else arriving[behind] * mask[behind]
    for outer, start, stop, inner, end in blocks(sizes, lengths):
        chosen = outer, slice(start, stop), inner
        keep = mask[chosen]
        slope, there = slopes.room(grad_raw, chosen, keep.shape)
        if with_ar and not ar_of_raw:
            # rounded as dropped was, which is not kept
            slope.copy_(raw[chosen] * keep).mul_(ar_scale)
            if arriving is not None:
                slope.add_(arriving[chosen])
            slope.mul_(keep)
        elif arriving is not None:
            torch.mul(arriving[chosen], keep, out=slope)
        else:
            slope.zero_()
        if with_ar and ar_of_raw:
            slope.add_(raw[chosen], alpha=ar_scale)
        if with_tar:
            change = change_of_rows(raw[outer, :end, inner], start, stop, rows, changes).mul_(tar_scale)
            slope.add_(change[:, :-1]).sub_(change[:, 1:])
        if not there:
            put(grad_raw, chosen, slope)
