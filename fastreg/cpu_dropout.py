"""Variational dropout and the penalty on CPU tensors, a block at a time.

Its functions take and give what those of `fastreg.kernels.dropout` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.cpu import (
    Rows,
    Scratch,
    blocks,
    change_of_rows,
    change_square_sum,
    gradient_scales,
    results,
    square_sum,
    strides_of,
    sums_of_rows,
    view_of,
)
from fastreg.kernels.view import Result, Sums, View
from fastreg.problem import compute_dtype


class Forward:
    """Fill `dropped` and compute the penalty as `fastreg.kernels.dropout.Forward` does."""

    def __init__(self, view: View, sums: Sums, device: torch.device) -> None:
        self.view, self.sums, self.strides = view, sums, strides_of(view)

    def __call__(self, raw: Tensor, mask: Tensor, dropped: Tensor, lengths: Tensor | None) -> Result:
        sums = self.sums
        options = self.strides, lengths, sums.alpha, sums.beta, sums.ar_of_raw, sums.divisors
        return Result(*forward(raw, mask, dropped, self.view[:3], *options))


class Backward:
    """Fill the gradient of raw as `fastreg.kernels.dropout.Backward` does."""

    def __init__(self, view: View, sums: Sums, device: torch.device, penalized: bool) -> None:
        self.view, self.sums, self.strides = view, sums, strides_of(view)

    def __call__(
        self,
        upstream: tuple[Tensor | None, Tensor | None],
        inputs: tuple[Tensor, Tensor],
        gradient: Tensor,
        scales: Tensor | None,
        lengths: Tensor | None,
    ) -> None:
        grad_dropped, grad = upstream
        options = self.strides, lengths, scales, self.sums.ar_of_raw
        backward(grad, *inputs, grad_dropped, gradient, self.view[:3], *options, *self.sums.factors)


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
    for outer, start, stop, inner in blocks(sizes):
        target = dropped[outer, start:stop, inner]
        torch.mul(raw[outer, start:stop, inner], mask[outer, start:stop, inner], out=target)
        if alpha and lengths is None:
            counted = raw[outer, start:stop, inner] if ar_of_raw else target
            ar += square_sum(rows.hold(counted), squares)
        if beta and lengths is None:
            tar += change_square_sum(rows.hold(raw[outer, max(start - 1, 0) : stop, inner]), squares)
    if lengths is not None:
        kept = None if not alpha else raw if ar_of_raw else dropped
        used = strides[0], strides[0 if ar_of_raw else 2]
        ar, tar = sums_of_rows(raw if beta else None, kept, used, Rows(sizes, lengths), dtype)
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
    # One row for all time steps is cast beforehand: a product of two dtypes takes twice as long.
    keeps = mask[:, :1].to(dtype).expand_as(mask) if strides[1][1] == 0 else mask
    whole_ar, whole_tar = with_ar and lengths is None, with_tar and lengths is None
    rows, changes, slopes = Scratch(dtype), Scratch(dtype), Scratch(dtype)
    for outer, start, stop, inner in blocks(sizes):
        target = grad_raw[outer, start:stop, inner]
        keep = keeps[outer, start:stop, inner]
        slope = target if target.dtype == dtype else slopes.shaped(*target.shape)
        if whole_ar and not ar_of_raw:
            torch.mul(slopes.hold(raw[outer, start:stop, inner]), keep, out=slope)
            if slope is not target:  # rounded as dropped was, which is not kept
                slope.copy_(target.copy_(slope))
            if arriving is None:
                slope.mul_(ar_scale)
            else:
                torch.add(arriving[outer, start:stop, inner], slope, alpha=ar_scale, out=slope)
            slope.mul_(keep)
        elif arriving is not None:
            torch.mul(slopes.hold(arriving[outer, start:stop, inner]), keep, out=slope)
        else:
            slope.zero_()
        if whole_ar and ar_of_raw:
            slope.add_(raw[outer, start:stop, inner], alpha=ar_scale)
        if whole_tar:
            change = change_of_rows(raw[outer, :, inner], start, stop, rows, changes)
            slope.add_(change[:, :-1], alpha=tar_scale).sub_(change[:, 1:], alpha=tar_scale)
        if slope is not target:
            target.copy_(slope)
    if lengths is not None and (with_ar or with_tar):  # what is above is right for padding
        tensors = raw, mask, grad_raw, arriving
        places = strides[0], strides[1], strides[3], strides[2]
        counted = Rows(sizes, lengths)
        found = [None if x is None else counted.of(x, s) for x, s in zip(tensors, places, strict=True)]
        _fill_rows(found, counted, ar_of_raw, ar_scale if with_ar else None, tar_scale if with_tar else None, dtype)


def _fill_rows(
    found: Sequence[Any],
    counted: Rows,
    ar_of_raw: bool,
    ar_scale: float | None,
    tar_scale: float | None,
    dtype: torch.dtype,
) -> None:
    """The gradient of the rows that count; `found` are raw, mask, the gradient of raw, and that of dropped or None."""
    raw, mask, target, arriving = found
    rows, keeps, changes, slopes = Scratch(dtype), Scratch(dtype), Scratch(dtype), Scratch(dtype)
    for chosen in counted.blocks():
        keep = mask.take(chosen, keeps)
        slope = slopes.shaped(*keep.shape).zero_() if arriving is None else arriving.take(chosen, slopes)
        through_mask = ar_scale is not None and not ar_of_raw
        if through_mask:
            pull = raw.take(chosen, rows).mul_(keep).to(raw.rows.dtype)  # rounded as dropped was
            slope.add_(pull, alpha=ar_scale)
        if through_mask or arriving is not None:  # else 0 * inf would be NaN
            slope.mul_(keep)
        if ar_scale is not None and ar_of_raw:
            slope.add_(raw.take(chosen, rows), alpha=ar_scale)
        if tar_scale is not None:
            change = counted.changes(raw, chosen, rows, changes)
            slope.add_(change[:, :-1], alpha=tar_scale).sub_(change[:, 1:], alpha=tar_scale)
        target.put(chosen, slope)
