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
from torch import Tensor, nn

from bench.conftest import in_turns, name
from bench.measure import before, figures, formulas
from bench.measure.before import ELEMENTWISE, VARIATIONAL
from bench.measure.formulas import ALPHA, BETA
from bench.measure.results import BOTH
from bench.measure.timing import DEVICE
from bench.study.awd_lstm import LockedDropout
from fastreg import fused_ar_tar

pytestmark = in_turns
Measure = Callable[..., None]
Tensors = tuple[Tensor, ...]
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
BATCH_FIRST, TIME_FIRST, SAME = "batch first", "time first", "raw is dropped"
# The cases, the most important ones of a GPU first.
CASES: list[Any] = [
    *(pytest.param(*case, BATCH_FIRST, marks=pytest.mark.first) for case in product((LARGE, SMALL), DTYPES)),
    *product([(64, 70, 1152), MIDDLE, *[(8, 4096, 2048)] * (DEVICE == "cuda")], DTYPES, [BATCH_FIRST]),
    *product([SMALL], DTYPES, [TIME_FIRST, SAME]),
    (SMALL, FLOAT16, BATCH_FIRST),
    (DEMO, FLOAT32, BATCH_FIRST),
]

ERROR = {FLOAT32: 1e-4, BFLOAT16: 2e-2, FLOAT16: 2e-2}  # of penalty and gradients, relative to the greatest
MOST_CHECKED = 2**23  # elements: of LARGE the formula in float64 takes 26 s, and of MIDDLE a quarter of that
CPU_CACHE = 2**25  # bytes: more than most last-level caches give one process
MOST_SETS = 64
CALLS = 10 if DEVICE == "cuda" else 1  # of a turn
PASSES = 3  # of each input: the forward and the backward read it, and the backward writes its gradient
ONE = torch.ones((), device=DEVICE)


def run(
    measure: Measure,
    make: Callable[[], Tensors],
    call: Callable[..., Tensors],
    exact: Callable[..., Tensors],
    about: dict[str, Any],
) -> None:
    """Measure a call of each way, `call(way, *inputs)`, each time with another set of inputs that `make` has made.

    Before that, the results and gradients for the first set are compared with `exact(way, results, *inputs)`.
    """

    @functools.cache
    def sets() -> list[Tensors]:
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
            got = call(way, *first)
            check(got, exact(way, got, *first), first[0].dtype)
        moved = PASSES * sum(x.nbytes for x in leaves_of(first)) if about["pass"] == BOTH else None
        rotated = itertools.cycle(sets())
        return lambda: call(way, *next(rotated)), figures.of(lambda i: call(way, *sets()[i]), len(sets()), moved)

    measure(prepare, about, calls=CALLS)


def with_gradients(results: Tensors, inputs: Tensors, *upstream: Tensor) -> Tensors:
    """Return results and the gradients of inputs; a result without an upstream gradient, a penalty, has that of 1."""
    ones = [ONE.to(penalty.dtype) for penalty in results[len(upstream) :]]
    return *results, *torch.autograd.grad(results, leaves_of(inputs), [*upstream, *ones])


def leaves_of(inputs: Tensors) -> list[Tensor]:
    """Return the inputs that need gradients, each once."""
    return list(dict.fromkeys(x for x in inputs if x.requires_grad))


def doubled(*inputs: Tensor) -> Tensors:
    """Return copies of the inputs in float64; two inputs that are one tensor stay one."""
    copies = {x: x.detach().double().requires_grad_() for x in inputs}
    return tuple(copies[x] for x in inputs)


def check(got: Tensors, want: Tensors, dtype: torch.dtype) -> None:
    """Compare values with the formula's in float64, on the CPU, which computes even if the GPU does not."""
    for x, exact in zip((x.detach().cpu() for x in got), (x.detach().cpu() for x in want), strict=True):
        error = ((x.double() - exact).abs().max() / exact.abs().max()).item()
        assert error < ERROR[dtype], f"differs from the formula in float64 by {error:.1e}"


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def penalty_inputs(shape: Any, dtype: torch.dtype, layout: str = BATCH_FIRST) -> Tensors:
    """Return raw and dropped, `(batch, time, hidden)`."""

    def leaf() -> Tensor:
        x = tensor(shape, dtype)
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if layout == TIME_FIRST else x  # in memory, time first
        return x.requires_grad_()

    raw = leaf()
    return raw, raw if layout == SAME else leaf()


def penalty_by(ways: Mapping[Any, Way], way: Any, *inputs: Tensor) -> Tensors:
    return with_gradients((ways[way](*inputs, alpha=ALPHA, beta=BETA),), inputs)


def exact_penalty(way: Any, got: Tensors, *inputs: Tensor) -> Tensors:
    copies = doubled(*inputs)
    return with_gradients((formulas.fastai(*copies, alpha=ALPHA, beta=BETA),), copies)


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES, ids=name)
def test_penalty(measure: Measure, shape: Any, dtype: Any, layout: str) -> None:
    """The penalty, its forward and backward: the cases that the README quotes."""
    about = {"pass": BOTH, "shape": shape, "dtype": name(dtype), "layout": layout}
    run(measure, partial(penalty_inputs, shape, dtype, layout), partial(penalty_by, WAYS), exact_penalty, about)


def with_lengths(package: Any) -> Way:
    return lambda raw, dropped, lengths, alpha, beta: package.fused_ar_tar(raw, dropped, alpha, beta, lengths=lengths)


PADDED_WAYS: dict[str, Way] = {  # (raw, dropped, lengths, alpha, beta) -> penalty
    "without lengths": lambda raw, dropped, lengths, alpha, beta: fused_ar_tar(raw, dropped, alpha, beta),
    "eager": formulas.padded,
    "compiled": torch.compile(formulas.padded),
    **before.both(lambda package: {"fastreg": with_lengths(package)}),
}


def padded_inputs(shape: Any, dtype: torch.dtype) -> Tensors:
    """Return raw, dropped, and lengths from 0 to all time steps in random order."""
    lengths = torch.linspace(0, shape[1], shape[0]).round().long()[torch.randperm(shape[0])]
    return *penalty_inputs(shape, dtype), lengths.to(DEVICE)


def exact_padded(way: str, got: Tensors, raw: Tensor, dropped: Tensor, lengths: Tensor) -> Tensors:
    if way == "without lengths":
        return exact_penalty(way, got, raw, dropped)
    copies = doubled(raw, dropped)
    return with_gradients((formulas.padded(*copies, lengths=lengths, alpha=ALPHA, beta=BETA),), copies)


@pytest.mark.parametrize("way", PADDED_WAYS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", [SMALL, MIDDLE, *[LARGE] * (DEVICE == "cuda")], ids=name)
def test_padded(measure: Measure, shape: Any, dtype: Any) -> None:
    """The penalty of a batch in which half of the time steps are padding."""
    about = {"pass": "padded", "shape": shape, "dtype": name(dtype)}
    run(measure, partial(padded_inputs, shape, dtype), partial(penalty_by, PADDED_WAYS), exact_padded, about)


FEW = product((SMALL, (20, 70, 1152)), DTYPES, [1024], [16, 8, 4])  # programs: shorter stretches make more of them
MANY = product((LARGE, MIDDLE), DTYPES, [1024, 792, 528], [16])  # whole waves of programs


@pytest.mark.skipif(DEVICE == "cpu", reason="the constants are those of GPUs")
@pytest.mark.parametrize(("shape", "dtype", "programs", "way"), [*FEW, *MANY], ids=name)
def test_sweep(measure: Measure, monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: Any, programs: int) -> None:
    """Other values of the constants in kernels/tiling.py; a way is a value of `SHORT_STRETCH`.

    The plans of calls are made anew in each call, so compare `us_in_a_graph`.
    """
    from fastreg.call.key import PLANS
    from fastreg.kernels import tiling

    def penalty(short_stretch: int, raw: Tensor, dropped: Tensor) -> Tensors:
        monkeypatch.setattr(tiling, "SHORT_STRETCH", short_stretch)
        monkeypatch.setattr(tiling, "PROGRAMS", programs)
        PLANS.clear()
        return penalty_by({short_stretch: fused_ar_tar}, short_stretch, raw, dropped)

    about = {"pass": "sweep", "shape": shape, "dtype": name(dtype), "programs": programs}
    run(measure, partial(penalty_inputs, shape, dtype), penalty, exact_penalty, about)
    PLANS.clear()


P = 0.4  # AWD-LSTM's output dropout
OWN_DROPOUT: dict[str, nn.Module] = {VARIATIONAL: LockedDropout(P), ELEMENTWISE: nn.Dropout(P)}
Dropping = Callable[[Tensor], Tensors]  # raw -> dropped and, if there is one, the penalty


def alone(dropout: Callable[[Tensor], Tensor]) -> Dropping:
    return lambda raw: (dropout(raw),)


def followed_by(penalty: Way, dropout: Callable[[Tensor], Tensor]) -> Dropping:
    def both(raw: Tensor) -> Tensors:
        dropped = dropout(raw)
        return dropped, penalty(raw, dropped, ALPHA, BETA)

    return both


def dropouts_of(kind: str, package: Any) -> dict[str, Dropping]:
    fused = partial(package.fused_dropout_ar_tar, p=P, **({} if kind == VARIATIONAL else {"locked": False}))
    return {
        "fused_ar_tar": followed_by(package.fused_ar_tar, OWN_DROPOUT[kind]),
        "fused dropout alone": alone(lambda raw: fused(raw, alpha=0, beta=0)[0]),
        "fastreg": partial(fused, alpha=ALPHA, beta=BETA),
    }


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
DROPOUT_CASES = [
    (shape, dtype, kind, way)
    for kind, ways in DROPOUT_WAYS.items()
    for shape, dtype, way in product([SMALL, MIDDLE], DTYPES, ways)
]


@pytest.mark.parametrize(("shape", "dtype", "kind", "way"), DROPOUT_CASES, ids=name)
def test_dropout(measure: Measure, shape: Any, dtype: Any, kind: str) -> None:
    """A dropout and the penalty, and dropouts alone; dropped gets the gradient that a decoder sends back."""

    def make() -> Tensors:
        return tensor(shape, dtype).requires_grad_(), tensor(shape, dtype)

    def call(way: str, raw: Tensor, upstream: Tensor) -> Tensors:
        return with_gradients(DROPOUT_WAYS[kind][way](raw), (raw,), upstream)

    about = {"pass": "dropout", "shape": shape, "dtype": name(dtype), "dropout": kind}
    run(measure, make, call, partial(exact_dropout, kind), about)


def exact_dropout(kind: str, way: str, got: Tensors, raw: Tensor, upstream: Tensor) -> Tensors:
    """Return dropped, the penalty and the gradient of raw in float64 by the same mask."""
    (x,) = doubled(raw)
    kept = got[0].detach() != 0
    kept = kept.any(1, keepdim=True) if kind == VARIATIONAL else kept
    mask = kept.double() / (1 - P)
    assert abs(mask.count_nonzero() / mask.numel() - (1 - P)) < 0.02, "drops another share of the units"
    dropped = x * mask
    penalty = [formulas.fastai(x, dropped, ALPHA, BETA)] * (len(got) - 2)
    return with_gradients((dropped, *penalty), (x,), upstream.double())
