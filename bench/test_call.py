"""AR and TAR by themselves, forward and backward, by each of several ways: `pytest bench/test_call.py`.

Add your own kernel to WAYS, as `"mine": my_penalty`, and run `pytest bench/test_call.py -k "test_penalty and float32"`.
Each way is compared with the formula in float64, gradients included, before it is timed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.conftest import in_turns, name
from bench.measure import before, figures, formulas
from bench.measure.before import ELEMENTWISE, VARIATIONAL
from bench.measure.formulas import ALPHA, BETA
from bench.measure.results import BOTH
from bench.measure.timing import DEVICE
from fastreg import fused_ar_tar

pytestmark = in_turns
Measure = Callable[..., None]
Inputs = tuple[Tensor, ...]
Way = Callable[..., Tensor]
# The ways that are compared: (raw, dropped, alpha, beta) -> penalty, where raw and dropped are (batch, time, hidden).
WAYS: dict[str, Way] = {
    "eager": formulas.fastai,
    "tight": formulas.tight,
    "compiled": torch.compile(formulas.fastai),
    **before.both(lambda package: {"fastreg": package.fused_ar_tar}),
}

BFLOAT16, FLOAT32, FLOAT16 = torch.bfloat16, torch.float32, torch.float16
DTYPES = BFLOAT16, FLOAT32
DEMO, SMALL, MIDDLE, LARGE = (20, 70, 96), (64, 70, 400), (32, 512, 1024), (128, 512, 1024)
SHAPES = [SMALL, (64, 70, 1152), MIDDLE, LARGE]
BATCH_FIRST, TIME_FIRST, SAME = "batch first", "time first", "raw is dropped"
# The cases, the most important ones of a GPU first.
CASES: list[Any] = [
    pytest.param(*case, BATCH_FIRST, marks=pytest.mark.first) for case in product((LARGE, SMALL), DTYPES)
]
if DEVICE == "cuda":
    LONG = (8, 4096, 2048)
    CASES += product((*SHAPES[1:3], LONG), DTYPES, [BATCH_FIRST])
    CASES += product((*SHAPES, LONG), DTYPES, [TIME_FIRST])
    CASES += product(SHAPES, [FLOAT16], [BATCH_FIRST])
else:
    CASES += product(SHAPES[1:3], DTYPES, [BATCH_FIRST])
    CASES += [*product([SMALL], DTYPES, [TIME_FIRST]), (SMALL, FLOAT16, BATCH_FIRST)]
CASES += [*product([SMALL], DTYPES, [SAME]), (DEMO, FLOAT32, BATCH_FIRST)]

ERROR = {FLOAT32: 1e-4, BFLOAT16: 2e-2, FLOAT16: 2e-2}  # of penalty and gradients, relative to the greatest
MOST_CHECKED = 2**23  # elements: of LARGE the formula in float64 takes 26 s, and of MIDDLE a quarter of that
CPU_CACHE = 2**25  # bytes: more than most last-level caches give one process
MOST_SETS = 64
CALLS = 10 if DEVICE == "cuda" else 1  # of a turn
# How often a way reads or writes each input: compiled code reads the inputs again in the backward.
PASSES = {"compiled": 3, "fastreg": 2}
OTHERWISE = ("without lengths",)  # ways that compute something else


def measure_calls(
    measure: Measure,
    make: Callable[[], Inputs],
    call: Callable[[str, Inputs], Inputs],
    compare: Callable[[str, Inputs], None],
    about: dict[str, Any],
) -> None:
    """Measure a call of each way, by its name and each time with another set of inputs that `make` has made.

    Before that, `compare` gets the way and the first set.
    """

    @functools.cache
    def sets() -> list[Inputs]:
        """Make so many sets for all ways that none is in the cache when its turn comes again."""
        torch.compiler.reset()  # otherwise Inductor compiles the second shape for all shapes, and slower
        torch.manual_seed(0)
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if DEVICE == "cuda" else CPU_CACHE
        first = make()
        count = min(max(2, math.ceil(2 * cache / sum(x.nbytes for x in dict.fromkeys(first)))), MOST_SETS)
        return [first, *(make() for _ in range(count - 1))]

    def prepare(way: str) -> Any:
        first, *_ = sets()
        if first[0].numel() <= MOST_CHECKED:
            compare(way, first)
        passes = PASSES.get(way.removesuffix(before.BEFORE)) if about["pass"] == BOTH else None
        moved = passes * sum(x.nbytes for x in leaves_of(first)) if passes else None
        rotated = itertools.cycle(sets())
        return lambda: call(way, next(rotated)), figures.of(lambda i: call(way, sets()[i]), len(sets()), moved)

    measure(prepare, about, calls=CALLS)


def run(
    measure: Measure,
    ways: Mapping[Any, Way],
    formula: Way,
    make: Callable[[], Inputs],
    about: dict[str, Any],
) -> None:
    """Measure penalties and their gradients."""
    one = torch.ones((), device=DEVICE)

    def call(way: str, inputs: Inputs) -> Inputs:
        penalty = ways[way](*inputs)
        return torch.autograd.grad(penalty, leaves_of(inputs), one.to(penalty.dtype))

    @functools.cache
    def want(inputs: Inputs) -> list[Tensor]:
        return value_and_gradients(formula, doubled(inputs))

    def compare(way: str, inputs: Inputs) -> None:
        if way not in OTHERWISE:
            check(value_and_gradients(ways[way], inputs), want(inputs), inputs[0].dtype)

    measure_calls(measure, make, call, compare, about)


def doubled(inputs: Inputs) -> Inputs:
    """Return copies of the inputs in float64; two inputs that are one tensor stay one."""
    copies = {x: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs}
    return tuple(copies[x] for x in inputs)


def leaves_of(inputs: Inputs) -> list[Tensor]:
    """Return the inputs that need gradients, each once."""
    return list(dict.fromkeys(x for x in inputs if x.requires_grad))


def value_and_gradients(way: Way, inputs: Inputs) -> list[Tensor]:
    value = way(*inputs)
    return [value.detach(), *torch.autograd.grad(value, leaves_of(inputs), torch.ones_like(value))]


def check(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    """Compare values with the formula's in float64, on the CPU, which computes even if the GPU does not."""
    for x, exact in zip((x.cpu() for x in got), (x.cpu() for x in want), strict=True):
        error = ((x.double() - exact).abs().max() / exact.abs().max()).item()
        assert error < ERROR[dtype], f"differs from the formula in float64 by {error:.1e}"


def with_coefficients(ways: dict[str, Way]) -> dict[str, Way]:
    return {name: partial(way, alpha=ALPHA, beta=BETA) for name, way in ways.items()}


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def penalty_inputs(shape: Any, dtype: torch.dtype, layout: str = BATCH_FIRST) -> Inputs:
    """Return raw and dropped, `(batch, time, hidden)`."""

    def leaf() -> Tensor:
        x = tensor(shape, dtype)
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if layout == TIME_FIRST else x  # in memory, time first
        return x.requires_grad_()

    raw = leaf()
    return raw, raw if layout == SAME else leaf()


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES, ids=name)
def test_penalty(measure: Measure, shape: Any, dtype: Any, layout: str) -> None:
    """The penalty, its forward and backward: the cases that the README quotes."""
    about = {"pass": BOTH, "shape": shape, "dtype": name(dtype), "layout": layout}
    run(measure, with_coefficients(WAYS), formulas.penalty, partial(penalty_inputs, shape, dtype, layout), about)


def with_lengths(package: Any) -> Way:
    return lambda raw, dropped, lengths, alpha, beta: package.fused_ar_tar(raw, dropped, alpha, beta, lengths=lengths)


PADDED_WAYS: dict[str, Way] = {  # (raw, dropped, lengths, alpha, beta) -> penalty
    "without lengths": lambda raw, dropped, lengths, alpha, beta: fused_ar_tar(raw, dropped, alpha, beta),
    "eager": formulas.padded,
    "compiled": torch.compile(formulas.padded),
    **before.both(lambda package: {"fastreg": with_lengths(package)}),
}


def padded_inputs(shape: Any, dtype: torch.dtype) -> Inputs:
    """Return raw, dropped, and lengths from 0 to all time steps in random order."""
    lengths = torch.linspace(0, shape[1], shape[0]).round().long()[torch.randperm(shape[0])]
    return *penalty_inputs(shape, dtype), lengths.to(DEVICE)


@pytest.mark.parametrize("way", PADDED_WAYS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE] if DEVICE == "cuda" else [SMALL, MIDDLE], ids=name)
def test_padded(measure: Measure, shape: Any, dtype: Any) -> None:
    """The penalty of a batch in which half of the time steps are padding."""
    about = {"pass": "padded", "shape": shape, "dtype": name(dtype)}
    make = partial(padded_inputs, shape, dtype)
    run(measure, with_coefficients(PADDED_WAYS), formulas.padded_penalty, make, about)


FEW = product((SMALL, (20, 70, 1152)), DTYPES, [1024], [16, 8, 4])  # programs: shorter stretches make more of them
MANY = product((LARGE, MIDDLE), DTYPES, [1024, 792, 528], [16])  # whole waves of programs


@pytest.mark.skipif(DEVICE == "cpu", reason="the constants are those of GPUs")
@pytest.mark.parametrize(("shape", "dtype", "programs", "way"), [*FEW, *MANY], ids=name)
def test_sweep(measure: Measure, monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: Any, programs: int) -> None:
    """Other values of the constants in kernels/tiling.py; a way is a value of `SHORT_STRETCH`.

    The plans of calls are made anew in each call, so compare `graph_rotated_seconds`.
    """
    from fastreg.call.key import PLANS
    from fastreg.kernels import tiling

    def penalty(short_stretch: int, raw: Tensor, dropped: Tensor) -> Tensor:
        monkeypatch.setattr(tiling, "SHORT_STRETCH", short_stretch)
        monkeypatch.setattr(tiling, "PROGRAMS", programs)
        PLANS.clear()
        return fused_ar_tar(raw, dropped, ALPHA, BETA)

    about = {"pass": "sweep", "shape": shape, "dtype": name(dtype), "programs": programs}
    ways = {way: partial(penalty, way) for way in (16, 8, 4)}
    run(measure, ways, formulas.penalty, partial(penalty_inputs, shape, dtype), about)
    PLANS.clear()


P = 0.4  # AWD-LSTM's output dropout
OWN_DROPOUT: dict[str, Callable[[Tensor], Tensor]] = {
    VARIATIONAL: partial(formulas.rnn_dropout, p=P),
    ELEMENTWISE: partial(F.dropout, p=P),
}
Dropping = Callable[[Tensor], tuple[Tensor, ...]]  # raw -> dropped and, if there is one, the penalty


def alone(dropout: Callable[[Tensor], Tensor]) -> Dropping:
    return lambda raw: (dropout(raw),)


def followed_by(penalty: Way, dropout: Callable[[Tensor], Tensor]) -> Dropping:
    def both(raw: Tensor) -> tuple[Tensor, ...]:
        dropped = dropout(raw)
        return dropped, penalty(raw, dropped, ALPHA, BETA)

    return both


def dropouts_of(kind: str, package: Any) -> dict[str, Dropping]:
    found = {"fused_ar_tar": followed_by(package.fused_ar_tar, OWN_DROPOUT[kind])}
    if before.fused_dropout(package, kind) is not None:
        fused = partial(package.fused_dropout_ar_tar, p=P, **({} if kind == VARIATIONAL else {"locked": False}))
        found["fused dropout alone"] = alone(lambda raw: fused(raw, alpha=0, beta=0)[0])
        found["fastreg"] = partial(fused, alpha=ALPHA, beta=BETA)
    return found


def dropping_ways(kind: str) -> dict[str, Dropping]:
    own = OWN_DROPOUT[kind]
    two_lines = {"two-line dropout": alone(partial(formulas.two_line_dropout, p=P))}
    return {
        "dropout alone": alone(own),
        **(two_lines if kind == ELEMENTWISE else {}),
        "eager": followed_by(formulas.fastai, own),
        "tight": followed_by(formulas.tight, own),
        "compiled dropout alone": torch.compile(alone(own)),
        "compiled with dropout": torch.compile(followed_by(formulas.fastai, own)),
        **before.both(partial(dropouts_of, kind)),
    }


DROPOUT_WAYS = {kind: dropping_ways(kind) for kind in OWN_DROPOUT}


def dropout_inputs(shape: Any, dtype: torch.dtype) -> Inputs:
    """Return raw, and the gradient of dropped that a decoder sends back."""
    return tensor(shape, dtype).requires_grad_(), tensor(shape, dtype)


DROPOUT_CASES = [
    (shape, dtype, kind, way)
    for kind, ways in DROPOUT_WAYS.items()
    for shape, dtype, way in product([SMALL, MIDDLE], DTYPES, ways)
]


@pytest.mark.parametrize(("shape", "dtype", "kind", "way"), DROPOUT_CASES, ids=name)
def test_dropout(measure: Measure, shape: Any, dtype: Any, kind: str) -> None:
    """Dropout, forward and backward: by itself, followed by the penalty, and fused with it."""

    def call(way: str, inputs: Inputs) -> Inputs:
        raw, slope = inputs
        results = DROPOUT_WAYS[kind][way](raw)
        ones = [torch.ones_like(penalty) for penalty in results[1:]]
        return *results, *torch.autograd.grad(results, raw, [slope, *ones])

    def compare(way: str, inputs: Inputs) -> None:
        check_dropout(list(call(way, inputs)), *inputs, kind=kind)

    about = {"pass": "dropout", "shape": shape, "dtype": name(dtype), "dropout": kind}
    measure_calls(measure, partial(dropout_inputs, shape, dtype), call, compare, about)


def check_dropout(got: list[Tensor], raw: Tensor, slope: Tensor, kind: str) -> None:
    """Compare dropped, the penalty and the gradient of raw with those in float64 by the same mask."""
    x = raw.detach().double().requires_grad_()
    kept = got[0].detach() != 0
    kept = kept.any(1, keepdim=True) if kind == VARIATIONAL else kept
    mask = kept.double() / (1 - P)
    assert abs(mask.count_nonzero() / mask.numel() - (1 - P)) < 0.02, "drops another share of the units"
    dropped = x * mask
    penalty = [formulas.penalty(x, dropped, ALPHA, BETA)] * (len(got) - 2)
    gradient = torch.autograd.grad([dropped, *penalty], x, [slope.double(), *map(torch.ones_like, penalty)])
    check([y.detach() for y in got], [y.detach() for y in (dropped, *penalty, *gradient)], raw.dtype)
