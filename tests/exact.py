"""The formulas in float64, the tolerances of results, and checks of a call against the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg import ARTAR, fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import BF16, DOUBLE, FLOAT, HALF, INTERPRETED


def exact(x: Tensor) -> Tensor:
    """Return a leaf with the values of a tensor in float64, and 0 instead of values that are not finite."""
    return x.detach().double().nan_to_num(0, 0, 0).requires_grad_()


def axis_of(x: Tensor, batch_first: bool | None = None, time_dim: int | None = None, **_: Any) -> int:
    """Return the axis of time of activations, given the options of a call."""
    return (time_dim if time_dim is not None else 0 if batch_first is False else -2) % x.dim()


def steps_of(
    x: Tensor, lengths: Tensor | None = None, valid: Tensor | None = None, starts: Tensor | None = None, **layout: Any
) -> tuple[Tensor, Tensor]:
    """Return the steps that count, and the changes into steps, as masks that broadcast to activations."""
    axis = axis_of(x, **layout)
    batch = 0 if axis else 1 if x.dim() > 2 else None
    shape = [n if i in (axis, batch) else 1 for i, n in enumerate(x.shape)]
    steps = torch.ones(1 if batch is None else x.shape[batch], x.shape[axis], dtype=torch.bool)

    def by_sequence(mask: Tensor) -> Tensor:
        """Return a mask, which has the axes of x in their order, as (batch, time) bool."""
        assert list(mask.shape) == [x.shape[i] for i in sorted({axis, batch} - {None})]
        return (mask if axis else mask.t()).cpu().reshape(steps.shape) != 0

    if lengths is not None:
        steps = torch.arange(x.shape[axis]) < lengths.cpu().unsqueeze(-1)
    elif valid is not None:
        steps = by_sequence(valid)
    changes = steps & steps.roll(1, 1)
    changes[:, :1] = False
    if starts is not None:
        changes &= ~by_sequence(starts)
    along, into = ((marks if axis else marks.t()).reshape(shape).to(x.device) for marks in (steps, changes))
    return along, into


def truth(raw: Tensor, dropped: Tensor, alpha: float, beta: float, reduction: str = "mean", **options: Any) -> ARTAR:
    """Compute the formulas from float64 tensors."""
    steps, changes = steps_of(raw, **options)
    change = (raw - raw.roll(1, axis_of(raw, **options))).where(changes, 0)
    ar, tar = dropped.where(steps, 0).square().sum(), change.square().sum()
    if reduction == "mean":
        ar, tar = (x / max(n.expand(raw.shape).sum().item(), 1) for x, n in ((ar, steps), (tar, changes)))
    return ARTAR(alpha * ar + beta * tar, ar, tar)


def spoil(x: Tensor, **options: Any) -> Tensor:
    """Fill activations with NaN and infinity where steps do not count."""
    nothing = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype, device=x.device)
    with torch.no_grad():
        x.copy_(x.where(steps_of(x, **options)[0], nothing.repeat(x.shape[-1])[: x.shape[-1]]))
    return x


def eps(*dtypes: torch.dtype) -> float:
    """Return the unit of rounding of a computation with tensors of some dtypes."""
    return torch.finfo(DOUBLE if DOUBLE in dtypes else FLOAT).eps


def rounding(x: Tensor) -> float:
    """Return the relative error of one rounding to the dtype of `x`; Triton's interpreter truncates bfloat16."""
    cut_off = INTERPRETED and x.device.type == "cpu" and x.dtype == BF16
    return torch.finfo(x.dtype).eps / (1 if cut_off else 2)


def assert_terms(got: Any, want: ARTAR, *dtypes: torch.dtype, count: int = 0) -> Tensor:
    """Check a penalty and its measured terms, given the dtypes of the activations; return the penalty.

    A few units are allowed, and in float64 more of them for sums of up to `count` elements, which the formulas round as
    often as the kernels do. A chain of n additions rounds its k-th partial sum, about k / n of the total, by up to half
    a unit. Such a rounding has a variance of (k / n)**2 / 12 square units, and all of them together of n / 36. Two
    standard deviations, of a sum that no vector shortens, are sqrt(n) / 3 units.
    """
    units = 8 + (math.sqrt(count) / 3 if DOUBLE in dtypes else 0)
    results = got if isinstance(got, ARTAR) else (got,)
    assert results[0].dtype == (DOUBLE if DOUBLE in dtypes else FLOAT)
    assert not any(x.requires_grad for x in results[1:])
    doubles = [x.detach().double().cpu() for x in results]
    wanted = [x.detach().cpu() for x in want[: len(results)]]
    torch.testing.assert_close(doubles, wanted, rtol=units * eps(*dtypes), atol=0)
    return results[0]


def assert_gradient(
    got: Tensor | None,
    parts: list[Tensor],
    computed: torch.dtype = FLOAT,
    counts: Tensor | None = None,
    rounds_parts: bool = False,
) -> None:
    """Check the sum of some parts: allow one rounding to the dtype of `got`, and a few roundings of parts before that.

    Where `counts` is false, only the last rounding is allowed. With `rounds_parts` each part and each of their sums may
    be rounded to the dtype of `got`.
    """
    assert got is not None
    want, info = sum(parts), torch.finfo(got.dtype)
    computed = FLOAT if got.dtype in (HALF, BF16) else torch.promote_types(computed, got.dtype)  # rounded through it
    largest: Any = sum(x.abs().max() for x in parts if x.numel())
    largest = largest if counts is None else largest * counts
    allowed = rounding(got) * want.abs() + 8 * eps(computed) * largest + info.smallest_normal * info.eps
    if rounds_parts:
        allowed = allowed + 2 * len(parts) * rounding(got) * sum(x.abs() for x in parts)
    error = (got.double() - want).abs()
    wrong = ~(error <= allowed)  # also NaN
    found = [x[:3].tolist() for x in (wrong.nonzero(), got[wrong], want[wrong], allowed[wrong])]
    assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} elements are wrong; at, got, want, allowed: {found}"


def gradients_of(terms: ARTAR, coefficients: Sequence[float], x: Tensor) -> list[Tensor]:
    """Return the gradients of AR and TAR, each with its coefficient; zeros of one that does not depend on `x`."""
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return [torch.autograd.grad(c * y, x, **options)[0] for c, y in zip(coefficients, terms[1:], strict=True)]


def check_penalty(raw: Tensor, dropped: Tensor, **layout: Any) -> None:
    """Check the penalty of two leaves with coefficients of 2 and 1, its terms and its gradients."""
    exactly = exact(raw), exact(dropped)
    want = truth(*exactly, 2.0, 1.0, **layout)
    # Upstream gradients that are expected, and others. The interpreter takes long.
    for scale, measured in ((100, False), (100, True), *(() if INTERPRETED else ((300, True), (300, False)))):
        got: Any = fused_ar_tar(raw, dropped, 2.0, 1.0, return_terms=measured, **layout)
        penalty = assert_terms(got, want, raw.dtype, dropped.dtype)
        gradients = torch.autograd.grad(penalty * scale, (raw, dropped))
        for x, gradient in zip(exactly, gradients, strict=True):
            assert_gradient(gradient, gradients_of(want, (2.0 * scale, 1.0 * scale), x), penalty.dtype)


def assert_dropped(dropped: Tensor, raw: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Check dropped; return it with its rounding, from which AR is computed, as a function of the values of raw."""
    smallest = torch.finfo(raw.dtype).smallest_normal * torch.finfo(raw.dtype).eps
    product = raw.detach().double() * mask.double()
    torch.testing.assert_close(dropped.detach().double(), product, rtol=rounding(raw), atol=smallest, equal_nan=True)
    product = values * mask.double()
    return product + (exact(dropped) - product).detach()


def check_dropout(raw: Tensor, mask: Tensor) -> None:
    """Check dropped and the penalty of a leaf and a mask, and the gradient of both together."""
    dropped, got = fused_dropout_ar_tar(raw, 0.4, 2.0, 1.0, mask=mask, return_terms=True)
    values = exact(raw)
    want = truth(values, assert_dropped(dropped, raw, mask, values), 2.0, 1.0)
    assert_terms(got, want, raw.dtype)
    arriving = torch.randn_like(dropped)
    (gradient,) = torch.autograd.grad([dropped, got.penalty], raw, [arriving, torch.full_like(got.penalty, 100)])
    assert_gradient(gradient, [arriving.double() * mask.double(), *gradients_of(want, (200.0, 100.0), values)])


MASK32, STEPS = 2**32 - 1, 8  # a word, and the time steps that one counter serves


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Compute the words of Philox4x32, as its authors define it."""
    x, y, z, w = counter
    low, high = key
    for _ in range(rounds):
        first, second = x * 0xD2511F53, z * 0xCD9E8D57
        x, y, z, w = second >> 32 ^ y ^ low, second & MASK32, first >> 32 ^ w ^ high, first & MASK32
        low, high = low + 0x9E3779B9 & MASK32, high + 0xBB67AE85 & MASK32
    return [x, y, z, w]


def drawn_number(seed: int, lane: int, step: int) -> int:
    """Return the random number of 16 bits of an element, as docs/kernels.md defines it."""
    words = philox([lane & MASK32, step // STEPS, lane >> 32, 0], [seed & MASK32, seed >> 32 & MASK32], 7)
    return words[step % STEPS // 2] >> 16 * (step % 2) & 0xFFFF
