"""The C++ kernels against the formula in float64, called as a host calls them."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from fastreg.kernels import cpu
from fastreg.kernels.view import Operand, Prediction, Result, Sums, Values, View
from tests.samples import BF16, DOUBLE, FLOAT, HALF

pytestmark = pytest.mark.skipif(cpu.reason() is not None, reason=f"no C++ kernels here: {cpu.reason()}")

NAN = float("nan")
DTYPES = (FLOAT, DOUBLE, BF16, HALF)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Terms(NamedTuple):
    """What is computed."""

    alpha: float
    beta: float
    ar_of_raw: bool = False

    def sums(self, dtype: torch.dtype, divisors: tuple[int, int] | None) -> Sums:
        on = self.alpha != 0, self.beta != 0
        return Sums(dtype, self.alpha, self.beta, *on, self.ar_of_raw, divisors)


# ---- layouts of a (batch, time, hidden) tensor, and the view that a kernel has of it


def batch_first(x: Tensor) -> Tensor:
    return x.contiguous()


def time_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x: Tensor) -> Tensor:
    """Part of a wider hidden axis, at an odd address, with NaN around it."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), NAN)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def every_other_step(x: Tensor) -> Tensor:
    """Rows of a sequence with others between them."""
    wide = x.new_full((len(x), 2 * x.shape[1], x.shape[2]), NAN)
    wide[:, ::2] = x
    return wide[:, ::2]


LAYOUTS = (batch_first, time_first, sliced, every_other_step)


# ---- what is right: one sequence after the other, in float64


def sequences(x: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """What counts of (batch, time, hidden), each (steps, hidden)."""
    counts = [x.shape[1]] * len(x) if lengths is None else lengths.long().clamp(0, x.shape[1]).tolist()
    return [one[:count] for one, count in zip(x, counts, strict=True)]


def packed_sequences(x: Tensor, batch_sizes: Tensor) -> list[Tensor]:
    """The same of packed (rows, hidden)."""
    first = (batch_sizes.cumsum(0) - batch_sizes).tolist()
    return [
        x[[start + i for start, size in zip(first, batch_sizes.tolist(), strict=True) if size > i]]
        for i in range(int(batch_sizes[0]))
    ]


def penalty_of(raws: list[Tensor], kept: list[Tensor], terms: Terms, mean: bool) -> Tensor:
    """The penalty, ar and tar, (3,)."""
    ar = tar = torch.zeros((), dtype=DOUBLE)
    for x in kept:
        ar = ar + x.square().sum()
    for x in raws:
        tar = tar + (x[1:] - x[:-1]).square().sum()
    if mean:
        ar = ar / max(sum(x.numel() for x in kept), 1)
        tar = tar / max(sum(x[1:].numel() for x in raws), 1)
    return torch.stack([terms.alpha * ar + terms.beta * tar, ar, tar])


def assert_near(got: Tensor, want: Tensor) -> None:
    """To one rounding of its dtype, and a few of the largest elements', which smaller ones may be differences of."""
    info = torch.finfo(got.dtype)
    computed = torch.finfo(DOUBLE if got.dtype == DOUBLE else FLOAT).eps
    atol = 8 * computed * want.abs().max().item() + info.smallest_normal * info.eps  # the step of subnormal numbers
    torch.testing.assert_close(got.to(DOUBLE), want, rtol=info.eps, atol=atol)


# ---- calls, as a host makes them


def operand(x: Tensor | None) -> Operand | None:
    """Of (batch, time, hidden), or of packed (rows, hidden)."""
    return None if x is None else Operand(x.dtype, x.stride(0), x.stride(-2))


CPU = torch.device("cpu")


def flat(result: Result) -> Tensor:
    """Penalty, ar and tar, (3,)."""
    return torch.cat([result.penalty[None], result.terms])


def poisoned_like(x: Tensor | None) -> Tensor | None:
    """Memory in the order of axes of `x`, without gaps, that is NaN where nobody writes."""
    return None if x is None else torch.empty_like(x).fill_(NAN)


@dataclass
class Call:
    """A penalty of (batch, time, hidden), or of packed rows. A tensor that is None is a term that is off."""

    raw: Tensor | None
    dropped: Tensor | None
    terms: Terms
    lengths: Tensor | None = None
    packed: bool = False
    mean: bool = True

    def __post_init__(self) -> None:
        self.dtype = DOUBLE if any(x is not None and x.dtype == DOUBLE for x in (self.raw, self.dropped)) else FLOAT
        self.grads: tuple[Tensor | None, ...] = poisoned_like(self.raw), poisoned_like(self.dropped)
        x = self.raw if self.raw is not None else self.dropped
        assert x is not None
        if self.packed:
            assert self.lengths is not None
            sizes = int(self.lengths[0]), len(self.lengths), x.shape[1]
            divisors = x.numel(), max(x.numel() - int(self.lengths[0]) * x.shape[1], 1)
        else:
            sizes = x.shape
            divisors = None if self.lengths is not None else (x.numel(), max(x[:, 1:].numel(), 1))
        self.tensors = self.raw, self.dropped
        operands = tuple(operand(y) for y in (*self.tensors, *self.grads))
        self.view = View(*sizes, operands, self.packed)
        divisors = divisors if self.mean else (1, 1)
        self.sums = self.terms.sums(self.dtype, divisors)
        self.values = Values(None, self.lengths) if self.packed else Values(self.lengths)

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self.dtype)

    def forward(self, expected: float | None = None) -> Tensor:
        """Penalty, ar and tar, (3,); the gradients, too, for an upstream gradient that is expected."""
        view, grads = self.view, self.grads
        if expected is None:
            grads = None, None
            view = view._replace(operands=(*view.operands[:2], None, None))
        launch = cpu.PenaltyForward(view, self.sums, CPU)
        if expected is not None:
            launch.expected.learn(self.number(expected))
            self.poison()
        result = launch((*self.tensors, *grads), self.values)
        self.prediction = result.prediction
        assert (result.prediction is None) == (expected is None)
        return flat(result)

    def backward(self, grad: float, prediction: Prediction | None = None) -> None:
        upstream, tensors = self.number(grad), (*self.tensors, *self.grads)
        cpu.PenaltyBackward(self.view, self.sums, CPU)(upstream, tensors, self.values, prediction)

    def rewrites(self, grad: float) -> bool:
        """Whether a backward writes the gradients that the forward has written."""
        self.poison()
        self.backward(grad, self.prediction)
        return any(x is not None and not x.isnan().all() for x in self.grads)

    def poison(self) -> None:
        for x in self.grads:
            if x is not None:
                x.fill_(NAN)

    def check(self) -> None:
        """The sums, and the gradients of an upstream gradient of 0.75, by either pass, against the formula."""
        leaves = [None if x is None else x.to(DOUBLE).clone().requires_grad_() for x in (self.raw, self.dropped)]
        cut = packed_sequences if self.packed else sequences
        parts = [[] if x is None else cut(x, self.lengths) for x in leaves]
        want = penalty_of(parts[0], parts[0] if self.terms.ar_of_raw else parts[1], self.terms, self.mean)
        results = self.forward()
        rtol = 1e-6 if self.dtype == FLOAT else 1e-12
        torch.testing.assert_close(results.to(DOUBLE), want.detach(), rtol=rtol, atol=0)
        assert all(x is None or x.isnan().all() for x in self.grads)
        self.backward(0.75)
        (0.75 * want[0]).backward()
        written = []
        for got, leaf in zip(self.grads, leaves, strict=True):
            if got is not None and leaf is not None:
                assert_near(got, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
                written.append(got.clone())
        assert self.forward(0.75).equal(results)
        self.backward(0.75, self.prediction)
        assert all(x.equal(y) for x, y in zip([x for x in self.grads if x is not None], written, strict=True))
        assert not self.rewrites(0.75)
        assert self.forward(0.5).equal(results)
        self.backward(0.75, self.prediction)
        assert all(x.equal(y) for x, y in zip([x for x in self.grads if x is not None], written, strict=True))


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).to(dtype)


def padded(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`x` with NaN for padding."""
    if lengths is not None:
        for one, length in zip(x, lengths.tolist(), strict=True):
            one[max(length, 0) :] = NAN
    return x


def some_lengths(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    """From 0 to all time steps."""
    return (torch.arange(shape[0]) * 5 % (shape[1] + 1)).to(dtype)


def penalty_call(shape: tuple[int, int, int], dtypes: Any, layouts: Any, lengths: Tensor | None, **terms: Any) -> Call:
    raw, dropped = (padded(layout(values(shape, d)), lengths) for d, layout in zip(dtypes, layouts, strict=True))
    chosen = Terms(**{"alpha": 2.0, "beta": 1.0, **terms})
    off = chosen.alpha == 0 or chosen.ar_of_raw
    return Call(None if chosen.beta == 0 else raw, None if off else dropped, chosen, lengths)


SHAPES = [(3, 7, 12), (1, 1, 1), (2, 1, 9), (1, 150, 2), (5, 300, 1), (4, 9, 401), (2, 3, 4500), (1, 2, 16)]
SHAPES += [(70, 40, 3)]


def named(value: Any) -> str:
    """A layout by its name, without its address."""
    return getattr(value, "__name__", str(value))


# Each shape in each layout, whole and with lengths, and each of these in each dtype, but not all at once.
CASES = [
    (shape, DTYPES[(i + j + k) % len(DTYPES)], layout, *switches)
    for (i, shape), (j, layout), (k, switches) in product(
        enumerate(SHAPES), enumerate(LAYOUTS), enumerate(product((False, True), repeat=2))
    )
]


@pytest.mark.parametrize(("shape", "dtype", "layout", "ar_of_raw", "with_lengths"), CASES, ids=named)
def test_penalty(shape: Any, dtype: torch.dtype, layout: Any, ar_of_raw: bool, with_lengths: bool) -> None:
    lengths = some_lengths(shape) if with_lengths else None
    penalty_call(shape, (dtype, dtype), (layout, layout), lengths, ar_of_raw=ar_of_raw).check()


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_penalty_of_two_dtypes(dtypes: Any) -> None:
    penalty_call((3, 7, 12), dtypes, (sliced, time_first), None).check()
    penalty_call((3, 7, 12), dtypes, (batch_first, every_other_step), some_lengths((3, 7))).check()


@pytest.mark.parametrize("terms", [{"alpha": 0.0}, {"beta": 0.0}, {"beta": 1e6}, {"alpha": 1e300}], ids=str)
def test_coefficients(terms: dict[str, float]) -> None:
    """A coefficient of 0 is a tensor that is not there; a large one is not too large before it is divided."""
    dtype = DOUBLE if 1e300 in terms.values() else FLOAT
    penalty_call((3, 7, 12), (dtype, dtype), (batch_first, batch_first), None, **terms).check()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_lengths_of_any_integers(dtype: torch.dtype) -> None:
    penalty_call((9, 7, 12), (FLOAT, FLOAT), (batch_first, batch_first), some_lengths((9, 7), dtype)).check()


def test_lengths_out_of_range_count_as_the_nearest() -> None:
    raw, dropped = values((4, 7, 12), FLOAT), values((4, 7, 12), FLOAT)
    far = Call(raw, dropped, Terms(2, 1), torch.tensor([-3, 9, 2**40, 5]))
    near = Call(raw, dropped, Terms(2, 1), torch.tensor([0, 7, 7, 5]))
    assert far.forward(1.0).equal(near.forward(1.0))
    assert all(x is not None and y is not None and x.equal(y) for x, y in zip(far.grads, near.grads, strict=True))


@pytest.mark.parametrize("lengths", [[0, 0, 0], [1, 0, 1]], ids=str)
def test_no_steps_or_no_changes(lengths: list[int]) -> None:
    """Of nothing a mean is 0, and so is a gradient."""
    call = penalty_call((3, 7, 12), (FLOAT, FLOAT), (batch_first, time_first), torch.tensor(lengths))
    call.check()
    assert call.forward()[2] == 0


@pytest.mark.parametrize("ar_of_raw", [False, True], ids=["two", "ar_of_raw"])
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
@pytest.mark.parametrize("hidden", [1, 12, 401, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_rows(dtype: torch.dtype, hidden: int, gaps: bool, ar_of_raw: bool) -> None:
    lengths = torch.tensor([3, 7, 1, 7, 4, 6])
    packed = [pack_padded_sequence(values((6, 7, hidden), dtype), lengths, True, False) for _ in range(2)]
    raw, dropped = (sliced(x.data) if gaps else x.data for x in packed)
    Call(raw, None if ar_of_raw else dropped, Terms(2, 1, ar_of_raw), packed[0].batch_sizes, packed=True).check()


def test_sums_that_are_not_divided() -> None:
    for lengths in (None, torch.tensor([7, 3, 0])):
        raw, dropped = (padded(values((3, 7, 12), FLOAT), lengths) for _ in range(2))
        Call(raw, dropped, Terms(2, 1), lengths, mean=False).check()


def test_only_one_gradient() -> None:
    """Memory that is not given is not written; the sums are those of both."""
    call = penalty_call((3, 7, 12), (FLOAT, FLOAT), (batch_first, batch_first), None)
    whole = call.forward(1.0)
    raw, dropped = (x.clone() for x in call.grads if x is not None)
    for kept in (0, 1):
        call.grads = tuple(x if i == kept else None for i, x in enumerate((raw.clone(), dropped.clone())))
        written = call.grads[kept]
        assert written is not None
        written.fill_(NAN)
        assert call.forward(1.0).equal(whole)
        assert written.equal((raw, dropped)[kept])
        written.fill_(NAN)
        call.backward(1.0)
        assert written.equal((raw, dropped)[kept])


@pytest.mark.parametrize("grad", [0.0, -2.0, math.inf, NAN, 1e-45, 3e38])
def test_any_upstream_gradient(grad: float) -> None:
    """In padding the gradient is 0 whatever the upstream one is; elsewhere as the formula has it."""
    lengths = torch.tensor([7, 3, 0])
    call = penalty_call((3, 7, 12), (FLOAT, FLOAT), (batch_first, time_first), lengths)
    call.backward(grad)
    raw, dropped = call.grads
    assert raw is not None
    assert dropped is not None
    scale = torch.tensor(grad)
    for i, length in enumerate(lengths.tolist()):
        assert raw[i, length:].eq(0).all()
        assert dropped[i, length:].eq(0).all()
        assert call.dropped is not None
        expected = scale * (2 * 2 / (10 * 12)) * call.dropped[i, :length]
        torch.testing.assert_close(dropped[i, :length], expected, rtol=1e-6, atol=2e-45, equal_nan=True)


def test_the_assumed_gradient_is_compared_by_its_bits() -> None:
    call = penalty_call((3, 7, 12), (FLOAT, FLOAT), (batch_first, batch_first), None)
    for expected, true, wrote in [(NAN, NAN, False), (0.0, -0.0, True), (1.0, 1.0, False), (1.0, 1 + 2**-23, True)]:
        call.forward(expected)
        assert call.rewrites(true) == wrote, (expected, true)


@pytest.mark.parametrize("value", [math.inf, -math.inf, NAN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_spread_as_in_the_formula(dtype: torch.dtype, value: float) -> None:
    raw, dropped = values((2, 5, 40), dtype), values((2, 5, 40), dtype)
    raw[0, 0, 3] = raw[1, 2, 5] = raw[1, 4, 39] = dropped[0, 1, 1] = value
    call = Call(raw, dropped, Terms(2, 1))
    leaves = [x.double().requires_grad_() for x in (raw, dropped)]
    want = penalty_of(sequences(leaves[0], None), sequences(leaves[1], None), Terms(2, 1), True)
    torch.testing.assert_close(call.forward(1.0).double(), want.detach(), equal_nan=True)
    want[0].backward()
    for got, leaf in zip(call.grads, leaves, strict=True):
        assert got is not None
        assert leaf.grad is not None
        assert got.isfinite().equal(leaf.grad.isfinite())
        assert got.isnan().equal(leaf.grad.isnan())


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_halves_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """All of them, times numbers that lead to ties, to subnormal numbers and to infinity."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1)
    call = Call(None, every, Terms(0.5, 0.0), mean=False)
    for scale in (1.0, -1.0, 1 + 2**-8, 1 + 2**-11, 1.5, 3.0, 1 / 3, 2.0**-9, 3 * 2.0**-15, 7e-5, 255.0, 1e4, 1e38):
        call.backward(scale)
        got, want = call.grads[1], (every.float() * torch.tensor(scale)).to(dtype)
        assert got is not None
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        there = ~want.isnan()
        assert got.signbit()[there].equal(want.signbit()[there])


@pytest.fixture
def at_each_level(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], list[Tensor]]], None]:
    """Compare, to the last bit, what a function returns with each library that this processor runs."""

    def compare(results: Callable[[], list[Tensor]]) -> None:
        found = {}
        for path in cpu.runnable():
            monkeypatch.setattr(cpu, "library", functools.partial(cpu.opened, path))
            found[path.name] = [x.clone() for x in results()]
        name, want = found.popitem()
        for other, got in found.items():
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=f"{other} and {name} differ")

    return compare


@pytest.mark.parametrize(
    ("capability", "level", "names"),
    [
        ("AVX512", 4, ["_cpu_v4", "_cpu_v3", "_cpu"]),
        ("AVX512", 3, ["_cpu_v3", "_cpu"]),
        ("AVX512", 1, ["_cpu"]),
        ("AVX2", 4, ["_cpu_v3", "_cpu"]),
        ("DEFAULT", 4, ["_cpu"]),
        ("SVE256", 0, ["_cpu"]),
    ],
)
def test_libraries_that_are_loaded(
    capability: str, level: int, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None that the processor does not run or that PyTorch's capability forbids, and the best first."""
    for name in ("_cpu", "_cpu_v3", "_cpu_v4"):
        (tmp_path / f"{name}.abi3.so").touch()
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    monkeypatch.setattr(cpu, "processor_level", lambda: level)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert [path.name.partition(".")[0] for path in cpu.runnable()] == names


@pytest.mark.parametrize(("shape", "dtype", "layout", "ar_of_raw", "with_lengths"), CASES, ids=named)
def test_levels_agree(
    shape: Any, dtype: torch.dtype, layout: Any, ar_of_raw: bool, with_lengths: bool, at_each_level: Any
) -> None:
    """Each is right, and all give the same bits."""
    lengths = some_lengths(shape) if with_lengths else None
    call = penalty_call(shape, (dtype, dtype), (layout, layout), lengths, ar_of_raw=ar_of_raw)
    drop = drop_call(shape, dtype, layout, with_lengths, lengths, ar_of_raw=ar_of_raw)

    def results() -> list[Tensor]:
        call.poison()
        call.check()
        drop.check()
        sums = call.forward(0.75), drop.forward()
        return [*sums, *(x for x in (*call.grads, drop.dropped, drop.backward(0.75)) if x is not None)]

    at_each_level(results)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("flush", [False, True])
def test_levels_round_alike(dtype: torch.dtype, flush: bool, at_each_level: Any) -> None:
    """Subnormal numbers, ties, infinity and NaN, whatever bits NaN has."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1)
    call = Call(None, every, Terms(0.5, 0.0), mean=False)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(FLOAT).item()

    def results() -> list[Tensor]:
        found = []
        for scale in (1.0, -1.0, 1 + 2**-8, 1.5, 1 / 3, 2.0**-9, 7e-5, 255.0, 1e38, nan):
            assert torch.set_flush_denormal(flush)
            call.backward(scale)
            torch.set_flush_denormal(False)
            assert call.grads[1] is not None
            found.append(call.grads[1].clone())
        assert found[-1].isnan().all()
        return found

    at_each_level(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [2048, 2047])
def test_levels_agree_on_outputs_beyond_the_caches(dtype: torch.dtype, hidden: int, at_each_level: Any) -> None:
    """Gradients of 8 MB and more together, in rows whose addresses are aligned, and others."""
    time = 2**23 // (2 * 2040 * dtype.itemsize) + 1
    call = Call(values((1, time, hidden), dtype), values((1, time, hidden), dtype), Terms(2.0, 1.0))

    def results() -> list[Tensor]:
        return [call.forward(0.75), *(x for x in call.grads if x is not None)]

    at_each_level(results)
    call.poison()
    call.check()


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "constant", "heavy"])
def test_error_of_a_large_sum(dtype: torch.dtype, kind: str) -> None:
    """16.8 million elements, within 2e-6."""
    x = torch.randn(64, 256, 1024)
    x = {"normal": x, "constant": torch.full_like(x, 0.1), "heavy": x**3}[kind].to(dtype)
    _, ar, tar = Call(x, x, Terms(1, 1)).forward().tolist()
    true = sum(one.double().square().sum().item() for one in x) / x.numel()
    changed = sum(one.double().diff(dim=0).square().sum().item() for one in x) / (64 * 255 * 1024)
    assert abs(ar - true) <= 2e-6 * true
    assert abs(tar - changed) <= 2e-6 * changed


# ---- dropout


@dataclass
class Drop:
    """Dropout of (batch, time, hidden) with the penalty; the mask is one row for all time steps, or has raw's shape."""

    raw: Tensor
    mask: Tensor
    terms: Terms
    lengths: Tensor | None = None
    arriving: Tensor | None = None  # the gradient of dropped

    def __post_init__(self) -> None:
        self.dtype = DOUBLE if self.raw.dtype == DOUBLE else FLOAT
        self.dropped, self.grad_raw = poisoned_like(self.raw), poisoned_like(self.raw)
        counted = self.raw.numel(), max(self.raw[:, 1:].numel(), 1)
        divisors = counted if self.lengths is None else None
        self.sums = self.terms.sums(self.dtype, divisors)

    def view(self, *others: Tensor | None) -> View:
        raw, mask, *rest = (operand(x) for x in (self.raw, self.mask, *others))
        assert mask is not None
        mask = mask._replace(time=0) if self.mask.shape[1] == 1 else mask
        return View(*self.raw.shape, (raw, mask, *rest))

    def forward(self) -> Tensor:
        assert self.dropped is not None
        call = cpu.DropoutForward(self.view(self.dropped), self.sums, CPU)
        return flat(call((self.raw, self.mask, self.dropped), Values(self.lengths)))

    def backward(self, grad: float | None) -> Tensor:
        assert self.grad_raw is not None
        self.grad_raw.fill_(NAN)
        upstream = None if grad is None else torch.tensor(grad, dtype=self.dtype)
        call = cpu.DropoutBackward(self.view(self.arriving, self.grad_raw), self.sums, CPU)
        call(upstream, (self.raw, self.mask, self.arriving, self.grad_raw), Values(self.lengths))
        return self.grad_raw

    def check(self) -> None:
        """Dropped and the sums; the gradient of both, of the penalty alone, and of dropped alone."""
        results = self.forward()
        assert self.dropped is not None
        assert self.dropped.equal((self.raw.to(self.dtype) * self.mask.to(self.dtype)).to(self.raw.dtype))
        raw = self.raw.to(DOUBLE).clone().requires_grad_()
        product = raw * self.mask.to(DOUBLE)
        dropped = product + (self.dropped.to(DOUBLE) - product).detach()
        kept = raw if self.terms.ar_of_raw else dropped
        off = torch.zeros(0, 1, 1, dtype=DOUBLE)
        terms = [x if coefficient else off for x, coefficient in zip((raw, kept), self.terms[1::-1], strict=True)]
        cut = [sequences(x, self.lengths if len(x) else None) for x in terms]
        want = penalty_of(cut[0], cut[1], self.terms, True)
        rtol = 1e-6 if self.dtype == FLOAT else 1e-12
        torch.testing.assert_close(results.to(DOUBLE), want.detach(), rtol=rtol, atol=0)
        arriving = torch.zeros_like(dropped) if self.arriving is None else self.arriving.to(DOUBLE)
        whole = 0.75 * want[0] + (arriving * dropped).sum()
        (both,) = torch.autograd.grad(whole, raw)
        assert_near(self.backward(0.75), both)
        if self.arriving is not None:
            assert_near(self.backward(None), arriving * self.mask.to(DOUBLE))


def drop_call(shape: Any, dtype: torch.dtype, layout: Any, full: bool, lengths: Tensor | None, **terms: Any) -> Drop:
    """Padding has small numbers here: it is dropped out, too."""
    mask = values(shape if full else (shape[0], 1, shape[2]), dtype).abs()
    chosen = Terms(**{"alpha": 2.0, "beta": 1.0, **terms})
    return Drop(layout(values(shape, dtype)), mask, chosen, lengths, layout(values(shape, dtype) / shape[2]))


@pytest.mark.parametrize(("shape", "dtype", "layout", "full", "with_lengths"), CASES, ids=named)
def test_dropout(shape: Any, dtype: torch.dtype, layout: Any, full: bool, with_lengths: bool) -> None:
    lengths = some_lengths(shape) if with_lengths else None
    drop_call(shape, dtype, layout, full, lengths).check()


TERMS = [{"alpha": 0.0}, {"beta": 0.0}, {"ar_of_raw": True}, {"ar_of_raw": True, "beta": 0.0}]
TERMS += [{"alpha": 0.0, "beta": 0.0}]


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arrives", [True, False], ids=["arriving", "alone"])
def test_dropout_with_some_of_its_terms(terms: dict[str, Any], dtype: torch.dtype, arrives: bool) -> None:
    for lengths in (None, torch.tensor([7, 0, 4])):
        call = drop_call((3, 7, 45), dtype, batch_first, False, lengths, **terms)
        call.arriving = call.arriving if arrives else None
        call.check()


def test_an_infinite_mask_spoils_no_term_that_does_not_pass_it() -> None:
    call = drop_call((3, 7, 12), FLOAT, batch_first, False, None, ar_of_raw=True)
    call.mask.fill_(math.inf)
    call.arriving = None
    assert call.backward(1.0).isfinite().all()


# ---- sequences beside each other at each time step: time first

BESIDE = {  # the lengths of sequences of 9 time steps
    "any": lambda i: i * 5 % 10,
    "none": lambda _: 0,
    "full": lambda _: 9,
    "two alike": lambda i: i // 2 * 7 % 10,
    "full or none": lambda i: i % 3 % 2 * 9,
    "one step or two": lambda i: 1 + i % 2,
    "the first alone": lambda i: 0 if i else 6,
    "all but the first": lambda i: 9 if i else 6,
}


def lengths_beside(kind: str, batch: int) -> Tensor:
    return torch.tensor([BESIDE[kind](i) for i in range(batch)])


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize(("batch", "hidden"), [(1, 12), (7, 1), (33, 12), (50, 401), (3, 9000)])
@pytest.mark.parametrize("kind", BESIDE)
def test_lengths_time_first(kind: str, batch: int, hidden: int, dtype: torch.dtype) -> None:
    """Blocks of lanes hold whole sequences, parts of one, or begin and end within one."""
    lengths = lengths_beside(kind, batch)
    penalty_call((batch, 9, hidden), (dtype, dtype), (time_first, time_first), lengths).check()


@pytest.mark.parametrize("mask_layout", [None, batch_first, time_first], ids=["locked", "batch first", "time first"])
@pytest.mark.parametrize(("batch", "hidden"), [(1, 12), (33, 12), (50, 401), (3, 9000)])
@pytest.mark.parametrize("kind", BESIDE)
def test_dropout_with_lengths_time_first(kind: str, batch: int, hidden: int, mask_layout: Any) -> None:
    call = drop_call((batch, 9, hidden), FLOAT, time_first, mask_layout is not None, lengths_beside(kind, batch))
    call.mask = call.mask if mask_layout is None else mask_layout(call.mask)
    call.check()


@pytest.mark.parametrize("kind", BESIDE)
def test_gradients_of_padding_time_first_are_0(kind: str) -> None:
    """Whatever is in it, and whatever the upstream gradient."""
    lengths = lengths_beside(kind, 20)
    for layouts in ((time_first, time_first), (time_first, sliced), (every_other_step, time_first)):
        call = penalty_call((20, 9, 12), (FLOAT, BF16), layouts, lengths)
        for grad in (1.0, math.inf, NAN):
            call.poison()
            call.backward(grad)
            for x in call.grads:
                assert x is not None
                assert all(not one[length:].any() for one, length in zip(x, lengths.tolist(), strict=True))


# ---- many cases, the same bits, threads and processes


def test_random_cases() -> None:
    draw = random.Random(0)
    for _ in range(100):
        shape = draw.choice([1, 2, 3, 17]), draw.choice([1, 2, 3, 33, 130]), draw.choice([1, 2, 31, 32, 33, 64, 200])
        dtypes = draw.choices(DTYPES, k=2)
        layouts = draw.choices(LAYOUTS, k=2)
        lengths = draw.choice([None, torch.tensor([draw.randint(0, shape[1]) for _ in range(shape[0])])])
        terms = {"alpha": draw.choice([0.5, 2.0]), "beta": draw.choice([1.0, 3.0]), "ar_of_raw": draw.random() < 0.3}
        penalty_call(shape, dtypes, layouts, lengths, **terms).check()
        drop_call(shape, dtypes[0], layouts[0], draw.random() < 0.5, lengths, **terms).check()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("layout", [batch_first, time_first], ids=lambda f: f.__name__)
def test_the_same_bits_for_any_number_of_threads(layout: Any, with_lengths: bool) -> None:
    shape = (40, 90, 130)
    lengths = some_lengths(shape) if with_lengths else None
    call = penalty_call(shape, (FLOAT, BF16), (batch_first, layout), lengths)
    drop = drop_call(shape, BF16, layout, False, lengths)
    got: list[list[Tensor]] = []
    for number in (1, 2, 3, 8, 2):
        torch.set_num_threads(number)
        made = [call.forward(1.0), *call.grads, drop.forward(), drop.dropped, drop.backward(1.0)]
        got.append([x.clone() for x in made if x is not None])
    for others in got[1:]:
        assert all(x.equal(y) for x, y in zip(got[0], others, strict=True))


def test_calls_from_many_threads_at_once() -> None:
    calls = [penalty_call((8, 90, 65), (FLOAT, FLOAT), (batch_first, batch_first), None) for _ in range(8)]
    want = [call.forward() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda call: [call.forward() for _ in range(20)], calls))
    assert all(x.equal(y) for some, y in zip(got, want, strict=True) for x in some)


def in_a_fork(call: Call, want: Tensor) -> None:
    os._exit(0 if call.forward().equal(want) else 1)


@pytest.mark.usefixtures("threads")
def test_a_forked_process_does_not_wait_for_threads_it_has_not() -> None:
    torch.set_num_threads(2)
    call = penalty_call((64, 70, 100), (FLOAT, FLOAT), (batch_first, batch_first), None)
    want = call.forward()
    child = multiprocessing.get_context("fork").Process(target=in_a_fork, args=(call, want))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert child.exitcode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime() -> None:
    code = (
        "import torch\nfrom fastreg.kernels import cpu\ncpu.library()\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "paths = {path for path in paths if 'omp' in path.rpartition('/')[2]}\n"
        "assert len(paths) == 1, paths"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_a_library_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.library.cache_clear()
    assert "not built" in (cpu.reason() or "")
    (tmp_path / "_cpu.abi3.so").write_text("no library")
    assert "_cpu.abi3.so" in (cpu.reason() or "")
    subprocess.run(["g++", "-shared", "-x", "c", "/dev/null", "-o", tmp_path / "_cpu.abi3.so"], check=True)
    cpu.library.cache_clear()
    assert "built from another version" in (cpu.reason() or "")
    monkeypatch.undo()
    cpu.library.cache_clear()
    assert cpu.reason() is None
