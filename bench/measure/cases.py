"""The benchmark cases, the peers that take turns in each case, and one call of each peer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.measure.formulas import ALPHA, BETA, awd_lstm_lm, changes, fastai, padded, rnn_dropout
from bench.measure.machine import DEFAULT, KEPT
from bench.measure.steps import (
    AutocastStep,
    AWDLSTMStep,
    CompiledStep,
    LightningStep,
    LSTMStep,
    MambaStep,
    MinGRUStep,
    Step,
    TanhStep,
)
from bench.measure.timing import Call
from fastreg import fused_ar_tar, fused_dropout_ar_tar

Peer = Callable[..., Any]  # one of the implementations that a case compares; it takes the inputs

P = 0.4  # AWD-LSTM's output dropout
DEMO = 20, 70, 96
SHAPES = [(64, 70, 400), (64, 70, 1152), (80, 70, 400), (32, 512, 1024), (128, 512, 1024), (8, 4096, 2048)]
CPU_CACHE = 2**25  # bytes: more than most last-level caches give one process
MOST_SETS = 64
# The passes and the layouts, which are parts of a case's name.
FORWARD, BOTH, CHANGING = "forward", "forward + backward", "forward + backward, changing"
DROPOUT, PADDED, CHANGES = f"dropout, {BOTH}", f"padded, {BOTH}", f"changes, {BOTH}"
TIME_FIRST, CONTIGUOUS = "time first", "batch, channels, time"
MARKS = {"batch first": [], TIME_FIRST: ["time_first"], CONTIGUOUS: ["contiguous"]}


@dataclass(frozen=True)
class PenaltyCase:
    """The penalty by itself, by the formula, the compiled formula and fastreg; other cases derive from it.

    `shape` is (batch, time, hidden), whatever the order of axes in memory. With CHANGING, the upstream gradient of each
    backward differs from the one before, so fastreg's prediction is wrong. Derived cases have their own passes over
    memory, inputs and peers.
    """

    PEERS: ClassVar[tuple[str, ...]] = ("eager", "compiled", "fastreg")
    OURS: ClassVar[str] = "fastreg"  # the peer that the others are compared with
    shape: tuple[int, int, int]
    dtype: torch.dtype
    kind: str = BOTH
    layout: str = "batch first"
    same: bool = False  # raw and dropped are one tensor

    def __str__(self) -> str:
        marks = MARKS[self.layout] + ["same"] * self.same
        parts = "x".join(map(str, self.shape)), self.info["dtype"], *marks, self.kind
        return "-".join(parts).replace(" + ", "+").replace(", ", "-")

    @property
    def info(self) -> dict[str, Any]:
        dtype = f"{self.dtype}".removeprefix("torch.")
        return {"shape": self.shape, "dtype": dtype, "layout": self.layout, "same": self.same, "pass": self.kind}

    @property
    def passes(self) -> dict[str, int]:
        """Return how often each peer reads or writes a tensor of SHAPE; eager formulas are left out.

        `least` is the minimum of any implementation, which reads each input once and writes each result once. Compiled
        code reads the inputs again in the backward; fastreg does so only after a wrong prediction.
        """
        inputs = 1 if self.same else 2
        if self.kind == FORWARD:
            return dict.fromkeys(("least", "compiled", "fastreg"), inputs)
        return {"least": 2 * inputs, "compiled": 3 * inputs, "fastreg": (4 if self.kind == CHANGING else 2) * inputs}

    def bytes_moved(self, peer: str) -> int | None:
        """Return the bytes that a peer moves, or with `least` the minimum."""
        passes = self.passes.get(peer)
        return None if passes is None else math.prod(self.shape) * self.dtype.itemsize * passes

    def ways(self) -> tuple[Peer, Peer]:
        """Return the formula as users of this layout write it, and the call of fastreg; each gives the penalty."""
        penalty = awd_lstm_lm if self.layout == TIME_FIRST else fastai
        fused = partial(fused_ar_tar, alpha=ALPHA, beta=BETA, batch_first=self.layout != TIME_FIRST)
        return lambda raw, dropped: penalty(raw, dropped, ALPHA, BETA), fused

    def peers(self) -> dict[str, Peer]:
        formula, fused = self.ways()
        return {"eager": formula, "compiled": torch.compile(formula), "fastreg": fused}

    def tensor(self, device: str) -> Tensor:
        batch, time, hidden = self.shape
        shape = (time, batch, hidden) if self.layout == TIME_FIRST else (batch, time, hidden)
        return torch.randn(shape, device=device).to(self.dtype)

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Return raw and dropped."""
        raw = self.tensor(device).requires_grad_()
        return raw, raw if self.same else self.tensor(device).requires_grad_()

    def forward(self, peer: Peer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Call a peer's forward, and return all of its results."""
        return (peer(*inputs),)

    def call(self, peer: Peer, sets: list[tuple[Tensor, ...]]) -> Call:
        """Return a function that makes one call: the forward with its graph, or forward and backward."""
        if self.kind == FORWARD:
            return lambda i: self.forward(peer, sets[i % len(sets)])
        leaves = list(map(leaves_of, sets))
        penalty = peer(*sets[0]).detach()
        # The backward would make an upstream gradient of 1 in each call.
        upstream = itertools.cycle([torch.full_like(penalty, x) for x in (1, 1 + (self.kind == CHANGING))])

        def both(i: int) -> tuple[Tensor, ...]:
            i %= len(sets)
            return torch.autograd.grad(peer(*sets[i]), leaves[i], next(upstream))

        return both


@dataclass(frozen=True)
class DropoutCase(PenaltyCase):
    """Variational dropout, forward and backward: by itself, followed by the penalty, and fused with it."""

    PEERS: ClassVar = (
        *("dropout alone", "eager", "fused_ar_tar"),
        *("compiled dropout alone", "compiled", "compiled fused_ar_tar", "compiled fastreg", "fastreg"),
    )
    kind: str = DROPOUT

    @property
    def passes(self) -> dict[str, int]:
        """Count at least raw, dropped, both gradients, and raw again for the gradient of the penalty.

        Without the penalty, dropout reads and writes four times. `fused_ar_tar` adds its own four passes, and six in
        which autograd adds its gradients to the others.
        """
        alone = dict.fromkeys(("dropout alone", "compiled dropout alone"), 4)
        return alone | dict.fromkeys(("least", "fastreg", "compiled", "compiled fastreg"), 5) | {"fused_ar_tar": 14}

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Return raw, and a gradient of dropped, as a decoder would send it back."""
        return self.tensor(device).requires_grad_(), self.tensor(device)

    def peers(self) -> dict[str, Peer]:
        """Return functions from raw to dropped and, except for dropout by itself, the penalty."""
        batch_first = self.layout != TIME_FIRST

        def drop(raw: Tensor) -> Tensor:
            return rnn_dropout(raw, P, batch_first)

        def followed_by(penalty: Peer) -> Peer:
            def both(raw: Tensor) -> tuple[Tensor, ...]:
                dropped = drop(raw)
                return dropped, penalty(raw, dropped)

            return both

        fused = partial(fused_dropout_ar_tar, p=P, alpha=ALPHA, beta=BETA, batch_first=batch_first)
        ways: list[Peer] = [lambda raw: (drop(raw),), *map(followed_by, self.ways()), fused]
        compiled = [torch.compile(way) for way in ways]
        return dict(zip(self.PEERS, (*ways[:-1], *compiled, fused), strict=True))

    def forward(self, peer: Peer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return peer(inputs[0])

    def call(self, peer: Peer, sets: list[tuple[Tensor, ...]]) -> Call:
        """Return a function that makes one call. It returns dropped, too, as the decoder holds it during training."""
        ones = [torch.ones_like(penalty.detach()) for penalty in peer(sets[0][0])[1:]]

        def both(i: int) -> tuple[Tensor, ...]:
            raw, slope = sets[i % len(sets)]
            results = peer(raw)
            return results[0], *torch.autograd.grad(results, raw, [slope, *ones])

        return both


@dataclass(frozen=True)
class PaddedCase(PenaltyCase):
    """The penalty of a batch in which half of the steps are padding, forward and backward, with lengths and without."""

    PEERS: ClassVar = ("without lengths", *PenaltyCase.PEERS)
    kind: str = PADDED

    @property
    def passes(self) -> dict[str, int]:
        """Count at least half of the inputs and both whole gradients; compiled code reads the inputs twice."""
        return {"least": 3, "fastreg": 3, "without lengths": 4, "compiled": 6}

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Return raw, dropped, and lengths from 0 to all time steps in random order."""
        batch, time, _ = self.shape
        lengths = torch.linspace(0, time, batch).round().long()[torch.randperm(batch)]
        return *super().inputs(device), lengths.to(device)

    def ways(self) -> tuple[Peer, Peer]:
        return (
            lambda raw, dropped, lengths: padded(raw, dropped, lengths, ALPHA, BETA),
            lambda raw, dropped, lengths: fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=lengths),
        )

    def peers(self) -> dict[str, Peer]:
        return {"without lengths": lambda raw, dropped, _: fused_ar_tar(raw, dropped, ALPHA, BETA)} | super().peers()


@dataclass(frozen=True)
class ChangesCase(PenaltyCase):
    """TAR of a world model's representations, `(batch, channels, time, 1, 1)`, forward and backward.

    Memory has the order batch, time, channels, unless the layout is CONTIGUOUS.
    """

    kind: str = CHANGES

    @property
    def passes(self) -> dict[str, int]:
        """Count a copy by fastreg where time is innermost; compiled code reads the input again in the backward."""
        return {"least": 2, "compiled": 3, "fastreg": 4 if self.layout == CONTIGUOUS else 2}

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Return representations."""
        x = self.tensor(device).movedim(1, 2)[..., None, None]
        return ((x.contiguous() if self.layout == CONTIGUOUS else x).requires_grad_(),)

    def ways(self) -> tuple[Peer, Peer]:
        return partial(changes, time_dim=2), partial(fused_ar_tar, dropped=None, alpha=0.0, beta=1.0, time_dim=2)


Case = PenaltyCase | Step


def leaves_of(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the inputs that need gradients, each once."""
    return list(dict.fromkeys(x for x in inputs if x.requires_grad))


def all_cases(device: str, allocator: str | None = KEPT) -> list[Case]:
    """List the cases of a device, the most important ones first; a CPU runs only some of the GPU's.

    With the default allocator, only the training steps that allocate the most memory for their time are run.
    """
    made = list(dict.fromkeys(_gpu_cases() if device == "cuda" else _cpu_cases()))
    return [case for case in made if allocator != DEFAULT or case in STACKS or not isinstance(case, Step)]


STACKS = MinGRUStep((4, 256, 256)), TanhStep((4, 256, 256))
DTYPES = torch.float32, torch.bfloat16
# eb_jepa's action-conditioned model, 17 steps of 512 channels
JEPA = [
    ChangesCase((128, 17, 512), dtype, layout=layout) for layout, dtype in product(("batch first", CONTIGUOUS), DTYPES)
]
SMALL_STEPS = LSTMStep((8, 10, 16)), LSTMStep((16, 35, 60)), MambaStep((4, 64, 64)), LightningStep((16, 35, 60))
SMALL_STEPS += CompiledStep((4, 256, 256)), CompiledStep((16, 35, 60))


# the model of Merity et al. on the Penn Treebank, with fastai's batch size
TREEBANK: dict[str, Any] = {"shape": (64, 70, 400), "words": 10000, "hidden": 1152, "layers": 3}
# The first minutes on a GPU go to these cases.
HEADLINE = (
    *(PenaltyCase(shape, torch.bfloat16) for shape in (SHAPES[4], SHAPES[0])),
    AutocastStep(**TREEBANK),
    *(PenaltyCase(shape, torch.float32) for shape in (SHAPES[4], SHAPES[0])),
)


def _gpu_cases() -> Iterator[Case]:
    large = SHAPES[4]
    yield from HEADLINE
    yield AWDLSTMStep(**TREEBANK)
    yield from (DropoutCase(shape, dtype) for shape, dtype in product((SHAPES[0], large), reversed(DTYPES)))
    yield from (*STACKS, MinGRUStep((16, 512, 512)), TanhStep((16, 512, 512)), *SMALL_STEPS)
    yield from (case for case in _cpu_cases() if not isinstance(case, Step))
    for dtype in reversed(DTYPES):
        yield PaddedCase(large, dtype)
        yield PenaltyCase(large, dtype, CHANGING)
        yield from (DropoutCase(shape, dtype) for shape in SHAPES)
    # The largest group comes last, and float16 at its end: where time runs out, these are missed first.
    for dtype, shape, kind in product((torch.bfloat16, torch.float32, torch.float16), SHAPES, (BOTH, FORWARD)):
        yield PenaltyCase(shape, dtype, kind)
        yield PenaltyCase(shape, dtype, kind, TIME_FIRST)


def _cpu_cases() -> Iterator[Case]:
    small = SHAPES[0]
    yield from (*STACKS, TanhStep((4, 512, 512)))
    yield AWDLSTMStep((20, 70, 400), words=2000, hidden=400, layers=2)  # a step takes a third of a second
    yield from SMALL_STEPS
    yield PenaltyCase(DEMO, torch.float32)
    for shape, dtype in product(SHAPES[:5], DTYPES):  # the sixth shape is as large as the fifth
        yield PenaltyCase(shape, dtype)
        if shape == small:
            yield PenaltyCase(shape, dtype, FORWARD)
            yield PenaltyCase(shape, dtype, layout=TIME_FIRST)
            yield PenaltyCase(shape, dtype, same=True)
            yield PenaltyCase(shape, dtype, CHANGING)
    yield PenaltyCase(small, torch.float16)
    # With 8 peers the fifth shape would take minutes; the fourth is larger than a cache as well.
    for kind, shape, dtype in product((DropoutCase, PaddedCase), (small, SHAPES[3]), DTYPES):
        yield kind(shape, dtype)
    yield from JEPA


def input_sets(case: Case, device: str) -> list[tuple[Tensor, ...]]:
    """Return so many sets of inputs that none is in the cache when its turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else CPU_CACHE
    first = case.inputs(device)
    size = sum(x.nbytes for x in dict.fromkeys(first))  # raw and dropped may be one tensor
    count = min(max(2, math.ceil(2 * cache / size)), MOST_SETS)
    return [first, *(case.inputs(device) for _ in range(count - 1))]
