"""Benchmark cases, the peers that take turns in each, and one call of each peer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.formulas import ALPHA, BETA, awd_lstm_lm, changes, fastai, padded, rnn_dropout
from bench.machine import DEFAULT, KEPT
from bench.steps import AWDLSTMStep, CompiledStep, LightningStep, LSTMStep, MambaStep, MinGRUStep, Step, TanhStep
from bench.timing import Call
from fastreg import fused_ar_tar, fused_dropout_ar_tar

Peer = Callable[..., Any]  # one of the implementations that a case compares

P = 0.4  # AWD-LSTM's output dropout
DEMO = 20, 70, 96
SHAPES = [(64, 70, 400), (64, 70, 1152), (80, 70, 400), (32, 512, 1024), (128, 512, 1024), (8, 4096, 2048)]
CPU_CACHE = 2**25  # bytes: more than most last-level caches give one process
MOST_SETS = 64


@dataclass(frozen=True)
class Case:
    """The base of all cases. `shape` is (batch, time, hidden), whatever the order of axes in memory.

    A kind adds its counts, its inputs, its peers and one call of each peer. fastreg is the last of its PEERS, so that
    a result that has fastreg has all of them.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    batch_first: bool = True

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), f"{self.dtype}".removeprefix("torch.")]
        return "-".join(parts + ([] if self.batch_first else ["time_first"]))

    @property
    def info(self) -> dict[str, Any]:
        layout = "batch first" if self.batch_first else "time first"
        return {"shape": self.shape, "dtype": f"{self.dtype}".removeprefix("torch."), "layout": layout}

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def least_bytes(self) -> int:
        """Return the bytes that any implementation moves at least: all inputs read once, all results written once."""
        raise NotImplementedError

    def bytes_moved(self, peer: str) -> int | None:
        """Return the bytes that a peer moves: for compiled code those of separate passes; `None` for eager formulas."""
        raise NotImplementedError

    @property
    def formula(self) -> Callable[..., Tensor]:
        """Return the formula as users of this layout write it."""
        return fastai if self.batch_first else awd_lstm_lm

    @property
    def fused(self) -> Callable[..., Tensor]:
        return functools.partial(fused_ar_tar, batch_first=self.batch_first)

    def tensor(self, device: str) -> Tensor:
        batch, time, hidden = self.shape
        shape = (batch, time, hidden) if self.batch_first else (time, batch, hidden)
        return torch.randn(shape, device=device).to(self.dtype)


@dataclass(frozen=True)
class PenaltyCase(Case):
    """The penalty by itself: the formula, the same compiled, and fastreg.

    With CHANGING every backward has another upstream gradient than the one before, which fastreg does not expect.
    """

    PEERS: ClassVar = ("eager", "compiled", "fastreg")
    same: bool = False  # raw is dropped
    backward: bool = True
    changing: bool = False

    def __str__(self) -> str:
        parts = [super().__str__(), *["same"] * self.same]
        parts += ["forward+backward" if self.backward else "forward", *["changing"] * self.changing]
        return "-".join(parts)

    @property
    def info(self) -> dict[str, Any]:
        kind = "forward + backward, changing" if self.changing else "forward + backward" if self.backward else "forward"
        return super().info | {"same": self.same, "pass": kind}

    @property
    def input_bytes(self) -> int:
        return self.tensor_bytes * (1 if self.same else 2)

    @property
    def least_bytes(self) -> int:
        """Every input is read once, and every gradient written once."""
        return self.input_bytes * (2 if self.backward else 1)

    def bytes_moved(self, peer: str) -> int | None:
        """Compiled code reads the inputs again in the backward; fastreg only after a wrong prediction."""
        if peer == "eager":
            return None
        if not self.backward:
            return self.input_bytes
        return self.input_bytes * (3 if peer == "compiled" else 4 if self.changing else 2)

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Raw and dropped."""
        raw = self.tensor(device).requires_grad_()
        return raw, raw if self.same else self.tensor(device).requires_grad_()

    def peers(self) -> dict[str, Peer]:
        return {"eager": self.formula, "compiled": torch.compile(self.formula), "fastreg": self.fused}

    def call(self, penalty: Peer, sets: list[tuple[Tensor, ...]]) -> Call:
        """One call: forward as in training, the graph kept, or forward and backward."""
        if not self.backward:
            return lambda i: (penalty(*sets[i % len(sets)], ALPHA, BETA),)
        # Made here, not by each backward.
        upstream = [torch.full_like(penalty(*sets[0], ALPHA, BETA).detach(), x) for x in (1, 1 + self.changing)]

        def both(i: int) -> tuple[Tensor, ...]:
            raw, dropped = sets[i % len(sets)]
            leaves = (raw,) if self.same else (raw, dropped)
            return torch.autograd.grad(penalty(raw, dropped, ALPHA, BETA), leaves, next(grads))

        grads = itertools.cycle(upstream)
        return both


@dataclass(frozen=True)
class DropoutCase(Case):
    """Variational dropout, forward and backward: alone, with the penalty after it, and with it in the same pass."""

    PEERS: ClassVar = (
        *("dropout alone", "eager", "fused_ar_tar"),
        *("compiled dropout alone", "compiled", "compiled fused_ar_tar", "compiled fastreg", "fastreg"),
    )

    def __str__(self) -> str:
        return f"{super().__str__()}-dropout-forward+backward"

    @property
    def info(self) -> dict[str, Any]:
        return super().info | {"pass": "dropout, forward + backward"}

    @property
    def input_bytes(self) -> int:
        return 2 * self.tensor_bytes

    @property
    def least_bytes(self) -> int:
        """Raw and dropped in the forward, both gradients in the backward, and raw again for that of the penalty."""
        return self.tensor_bytes * 5

    def bytes_moved(self, peer: str) -> int | None:
        """Dropout alone goes without the penalty; `fused_ar_tar` and the sum of gradients are added to it."""
        passes = {"dropout alone": 4, "compiled dropout alone": 4, "fastreg": 5, "compiled": 5, "compiled fastreg": 5}
        passes["fused_ar_tar"] = 4 + 4 + 6  # two gradients for raw, and one for dropped, are added to others
        return self.tensor_bytes * passes[peer] if peer in passes else None

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Raw, and the gradient of dropped, as from a decoder."""
        return self.tensor(device).requires_grad_(), self.tensor(device)

    def peers(self) -> dict[str, Peer]:
        """Each gives dropped and, but for dropout alone, the penalty."""

        def drop(raw: Tensor) -> Tensor:
            return rnn_dropout(raw, P, self.batch_first)

        def followed_by(penalty: Peer) -> Peer:
            def both(raw: Tensor) -> tuple[Tensor, ...]:
                dropped = drop(raw)
                return dropped, penalty(raw, dropped, ALPHA, BETA)

            return both

        fused = functools.partial(fused_dropout_ar_tar, p=P, alpha=ALPHA, beta=BETA, batch_first=self.batch_first)
        ways: list[Peer] = [lambda raw: (drop(raw),), followed_by(self.formula), followed_by(self.fused), fused]
        compiled = [torch.compile(way) for way in ways]
        return dict(zip(self.PEERS, (*ways[:-1], *compiled, fused), strict=True))

    def call(self, peer: Peer, sets: list[tuple[Tensor, ...]]) -> Call:
        """One call, forward and backward. It gives dropped, too: in training the decoder has it all the while."""
        ones = [torch.ones_like(penalty.detach()) for penalty in peer(sets[0][0])[1:]]

        def both(i: int) -> tuple[Tensor, ...]:
            raw, slope = sets[i % len(sets)]
            results = peer(raw)
            return results[0], *torch.autograd.grad(results, raw, [slope, *ones])

        return both


@dataclass(frozen=True)
class PaddedCase(Case):
    """The penalty of a batch that is half padding, forward and backward: with lengths, and without."""

    PEERS: ClassVar = ("without lengths", "eager", "compiled", "fastreg")

    def __str__(self) -> str:
        return f"{super().__str__()}-padded-forward+backward"

    @property
    def info(self) -> dict[str, Any]:
        return super().info | {"pass": "padded, forward + backward"}

    @property
    def input_bytes(self) -> int:
        return 2 * self.tensor_bytes

    @property
    def least_bytes(self) -> int:
        """The valid half of the inputs is read, and every gradient is written."""
        return self.input_bytes * 3 // 2

    def bytes_moved(self, peer: str) -> int | None:
        """Compiled code reads all inputs, once forward and once backward; without lengths all steps count."""
        moved = {"without lengths": 2 * self.input_bytes, "compiled": 3 * self.input_bytes, "fastreg": self.least_bytes}
        return moved.get(peer)

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Raw, dropped, and lengths from 0 to all time steps, in no order."""
        batch, time, _ = self.shape
        lengths = torch.linspace(0, time, batch).round().long()[torch.randperm(batch)]
        return self.tensor(device).requires_grad_(), self.tensor(device).requires_grad_(), lengths.to(device)

    def peers(self) -> dict[str, Peer]:
        """Each takes raw, dropped and lengths."""
        ways: list[Peer] = [
            lambda raw, dropped, _: fused_ar_tar(raw, dropped, ALPHA, BETA),
            lambda raw, dropped, lengths: padded(raw, dropped, lengths, ALPHA, BETA),
            torch.compile(lambda raw, dropped, lengths: padded(raw, dropped, lengths, ALPHA, BETA)),
            lambda raw, dropped, lengths: fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=lengths),
        ]
        return dict(zip(self.PEERS, ways, strict=True))

    def call(self, peer: Peer, sets: list[tuple[Tensor, ...]]) -> Call:
        one = torch.ones_like(peer(*sets[0]).detach())

        def both(i: int) -> tuple[Tensor, ...]:
            inputs = sets[i % len(sets)]
            return torch.autograd.grad(peer(*inputs), inputs[:2], one)

        return both


@dataclass(frozen=True)
class ChangesCase(Case):
    """TAR of a world model's representations, `(batch, channels, time, 1, 1)`, forward and backward.

    Memory has the order batch, time, channels; that of the axes with CONTIGUOUS.
    """

    PEERS: ClassVar = ("eager", "compiled", "fastreg")
    contiguous: bool = False

    def __str__(self) -> str:
        return "-".join([super().__str__(), *["contiguous"] * self.contiguous, "changes-forward+backward"])

    @property
    def info(self) -> dict[str, Any]:
        layout = "batch, channels, time" if self.contiguous else "batch first"
        return super().info | {"layout": layout, "pass": "changes, forward + backward"}

    @property
    def input_bytes(self) -> int:
        return self.tensor_bytes

    @property
    def least_bytes(self) -> int:
        """The input is read once, and its gradient written once."""
        return 2 * self.tensor_bytes

    def bytes_moved(self, peer: str) -> int | None:
        """Compiled code reads the input again in the backward; fastreg copies it where time is innermost."""
        moved = {"compiled": 3 * self.tensor_bytes, "fastreg": self.tensor_bytes * (4 if self.contiguous else 2)}
        return moved.get(peer)

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Representations."""
        x = self.tensor(device).movedim(1, 2)[..., None, None]
        return ((x.contiguous() if self.contiguous else x).requires_grad_(),)

    def peers(self) -> dict[str, Peer]:
        stock = functools.partial(changes, time_dim=2)
        fused = functools.partial(fused_ar_tar, dropped=None, alpha=0.0, beta=1.0, time_dim=2)
        return {"eager": stock, "compiled": torch.compile(stock), "fastreg": fused}

    def call(self, peer: Peer, sets: list[tuple[Tensor, ...]]) -> Call:
        one = torch.ones_like(peer(*sets[0]).detach())
        return lambda i: torch.autograd.grad(peer(*sets[i % len(sets)]), sets[i % len(sets)], one)


AnyCase = PenaltyCase | DropoutCase | PaddedCase | ChangesCase | Step


def all_cases(device: str, allocator: str | None = KEPT) -> list[AnyCase]:
    """All cases on a GPU, those first that are wanted most. A CPU takes a part of them, which shows the same.

    Of the training steps, the default allocator takes those alone that fetch the most memory for their time.
    """
    made = list(dict.fromkeys(_gpu_cases() if device == "cuda" else _cpu_cases()))
    return [case for case in made if allocator != DEFAULT or case in STACKS or not isinstance(case, Step)]


STACKS = MinGRUStep((4, 256, 256)), TanhStep((4, 256, 256))
# eb_jepa's action-conditioned model, 17 steps of 512 channels
JEPA = [
    ChangesCase((128, 17, 512), dtype, contiguous=x) for x in (False, True) for dtype in (torch.float32, torch.bfloat16)
]
SMALL_STEPS = LSTMStep((8, 10, 16)), LSTMStep((16, 35, 60)), MambaStep((4, 64, 64)), LightningStep((16, 35, 60))
SMALL_STEPS += CompiledStep((4, 256, 256)), CompiledStep((16, 35, 60))


def _gpu_cases() -> Iterator[AnyCase]:
    small, large = SHAPES[0], SHAPES[4]
    for shape, dtype in product((small, large), (torch.bfloat16, torch.float32)):
        yield PenaltyCase(shape, dtype)
        yield DropoutCase(shape, dtype)
    # that of Merity et al. on the Penn Treebank, at fastai's batch
    yield AWDLSTMStep((64, 70, 400), words=10000, hidden=1152, layers=3)
    yield from (*STACKS, MinGRUStep((16, 512, 512)), TanhStep((16, 512, 512)), *SMALL_STEPS)
    # Each compiles 4 peers, and time is short: (80, 70, 400), so like the first, is left out.
    for dtype, shape in product((torch.bfloat16, torch.float32), (*SHAPES[:2], *SHAPES[3:])):
        yield DropoutCase(shape, dtype)
        if shape == small:
            yield DropoutCase(shape, dtype, batch_first=False)
    yield DropoutCase(small, torch.float16)
    for shape, dtype in product((small, SHAPES[3], large), (torch.float32, torch.bfloat16)):
        yield PaddedCase(shape, dtype)
    yield from JEPA
    yield PenaltyCase(DEMO, torch.float32)
    for shape, dtype in product((large, small), (torch.bfloat16, torch.float32)):
        yield PenaltyCase(shape, dtype, changing=True)
    # The most cases come last, and half precision at their end: the first to be missed where time runs out.
    for dtype, shape in product((torch.bfloat16, torch.float32, torch.float16), SHAPES):
        for batch_first, same in [(True, False), (False, False)] + [(True, True)] * (shape in (small, large)):
            for backward in (True, False):
                yield PenaltyCase(shape, dtype, batch_first, same, backward)


def _cpu_cases() -> Iterator[AnyCase]:
    small = SHAPES[0]
    yield from (*STACKS, MinGRUStep((4, 512, 512)), TanhStep((4, 512, 512)))
    yield AWDLSTMStep((20, 70, 400), words=2000, hidden=400, layers=2)  # takes a third of a second
    yield from SMALL_STEPS
    yield PenaltyCase(DEMO, torch.float32)
    for shape, dtype in product(SHAPES[:5], (torch.float32, torch.bfloat16)):  # the last is as large as the fifth
        yield PenaltyCase(shape, dtype)
        if shape == small:
            yield PenaltyCase(shape, dtype, backward=False)
            yield PenaltyCase(shape, dtype, batch_first=False)
            yield PenaltyCase(shape, dtype, same=True)
            yield PenaltyCase(shape, dtype, changing=True)
    yield PenaltyCase(small, torch.float16)
    # With 8 peers the fifth would take minutes, and the fourth is larger than a cache, too.
    for shape, dtype in product((small, SHAPES[3]), (torch.float32, torch.bfloat16)):
        yield DropoutCase(shape, dtype)
    for shape, dtype in product((small, SHAPES[3]), (torch.float32, torch.bfloat16)):
        yield PaddedCase(shape, dtype)
    yield from JEPA


def input_sets(case: AnyCase, device: str) -> list[tuple[Tensor, ...]]:
    """Inputs enough to find the cache cold when their turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else CPU_CACHE
    count = min(max(2, math.ceil(2 * cache / case.input_bytes)), MOST_SETS)
    return [case.inputs(device) for _ in range(count)]


def calls(case: AnyCase, sets: list[tuple[Tensor, ...]]) -> dict[str, Call]:
    """One call of every peer."""
    torch.compiler.reset()  # else the second shape would be compiled for all shapes, and run slower
    return {name: case.call(peer, sets) for name, peer in case.peers().items()}
