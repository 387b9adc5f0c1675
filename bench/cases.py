"""What is measured: cases, the peers that take turns in each, and one call of each peer."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.awd_lstm import AWDLSTM
from bench.formulas import awd_lstm_lm, fastai
from fastreg import fused_ar_tar

Call = Callable[[int], tuple[Tensor, ...]]  # the number of the call chooses its inputs; gives what it made

ALPHA, BETA = 2.0, 1.0
SHAPES = [(64, 70, 400), (64, 70, 1152), (80, 70, 400), (32, 512, 1024), (128, 512, 1024), (8, 4096, 2048)]
LARGE = 2**25  # elements from which a case takes seconds a call on a CPU
CPU_CACHE = 2**25  # bytes: more than most last-level caches give one process
MOST_SETS = 64


@dataclass(frozen=True)
class Case:
    """The penalty by itself. `shape` is (batch, time, hidden), whatever the order of axes in memory."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    batch_first: bool = True
    same: bool = False  # raw is dropped
    backward: bool = True

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), f"{self.dtype}".removeprefix("torch.")]
        parts += [] if self.batch_first else ["time_first"]
        parts += ["same"] if self.same else []
        return "-".join([*parts, "forward+backward" if self.backward else "forward"])

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize * (1 if self.same else 2)

    @property
    def bytes_moved(self) -> int:
        """The fewest: forward and backward each read every input once, and backward writes every gradient once."""
        return self.input_bytes * (3 if self.backward else 1)


def penalty_cases(device: str) -> list[Case]:
    """All cases on a GPU. A CPU takes a part of them, which shows the same in minutes: see the conditions."""
    return list(_gpu_cases() if device == "cuda" else _cpu_cases())


def _gpu_cases() -> Iterator[Case]:
    small, large = SHAPES[0], SHAPES[4]
    for dtype, shape in product((torch.bfloat16, torch.float32, torch.float16), SHAPES):
        for batch_first, same in [(True, False), (False, False)] + [(True, True)] * (shape in (small, large)):
            for backward in (True, False):
                yield Case(shape, dtype, batch_first, same, backward)


def _cpu_cases() -> Iterator[Case]:
    small = SHAPES[0]
    for shape, dtype in product(SHAPES[:5], (torch.float32, torch.bfloat16)):  # the last is as large as the fifth
        yield Case(shape, dtype)
        if shape == small:
            yield Case(shape, dtype, backward=False)
            yield Case(shape, dtype, batch_first=False)
            yield Case(shape, dtype, same=True)
    yield Case(small, torch.float16)


def peers(case: Case) -> dict[str, Callable[..., Tensor]]:
    """The formula of whoever uses this layout, the same compiled, and fastreg."""
    formula = fastai if case.batch_first else awd_lstm_lm
    torch.compiler.reset()  # else the second shape would be compiled for all shapes, and run slower
    return {
        "eager": formula,
        "compiled": torch.compile(formula),
        "fastreg": functools.partial(fused_ar_tar, batch_first=case.batch_first),
    }


def input_sets(case: Case, device: str) -> list[tuple[Tensor, Tensor]]:
    """Inputs enough to find the cache cold when their turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else CPU_CACHE
    count = min(max(2, math.ceil(2 * cache / case.input_bytes)), MOST_SETS)
    batch, time, hidden = case.shape
    shape = (batch, time, hidden) if case.batch_first else (time, batch, hidden)

    def leaf() -> Tensor:
        return torch.randn(shape, device=device).to(case.dtype).requires_grad_()

    sets = []
    for _ in range(count):
        raw = leaf()
        sets.append((raw, raw if case.same else leaf()))
    return sets


def call(penalty: Callable[..., Tensor], case: Case, sets: list[tuple[Tensor, Tensor]]) -> Call:
    """One call: forward as in training, the graph kept, or forward and backward."""
    if not case.backward:
        return lambda i: (penalty(*sets[i % len(sets)], ALPHA, BETA),)
    one = torch.ones_like(penalty(*sets[0], ALPHA, BETA).detach())  # made here, not by each backward

    def both(i: int) -> tuple[Tensor, ...]:
        raw, dropped = sets[i % len(sets)]
        leaves = (raw,) if case.same else (raw, dropped)
        return torch.autograd.grad(penalty(raw, dropped, ALPHA, BETA), leaves, one)

    return both


@dataclass(frozen=True)
class Step:
    """A whole training step of an AWD-LSTM: forward, loss, backward, clipping, SGD; float32."""

    batch: int
    time: int
    words: int
    embedding: int
    hidden: int
    layers: int

    def __str__(self) -> str:
        return f"step-{self.layers}x{self.hidden}-embedding{self.embedding}-words{self.words}-{self.batch}x{self.time}"


def step(device: str) -> Step:
    """That of Merity et al. on the Penn Treebank, at fastai's batch; on a CPU a smaller one, of a third of a second."""
    if device == "cuda":
        return Step(batch=64, time=70, words=10000, embedding=400, hidden=1152, layers=3)
    return Step(batch=20, time=70, words=2000, embedding=400, hidden=400, layers=2)


STEP_PEERS = ("no penalty", "eager", "fastreg", "compiled", "compiled fastreg")


def step_calls(case: Step, device: str) -> dict[str, Call]:
    """Each peer trains a model of its own. The compiled ones hold the penalty inside what is compiled."""
    torch.compiler.reset()
    torch.manual_seed(0)
    dropouts = {"word_p": 0.1, "input_p": 0.3, "weight_p": 0.5, "hidden_p": 0.25, "output_p": 0.4}
    model = AWDLSTM(case.words, case.embedding, case.hidden, case.layers, **dropouts).to(device)
    text = torch.randint(case.words, (case.batch, case.time + 1), device=device)

    def training_step(penalty: Callable[..., Tensor] | None, compiled: bool) -> Call:
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=1.0)

        def loss_of(ids: Tensor, following: Tensor) -> Tensor:
            decoded, raw, dropped = own(ids)
            loss = F.cross_entropy(decoded.flatten(0, 1), following.flatten())
            return loss if penalty is None else loss + penalty(raw, dropped, ALPHA, BETA)

        run = torch.compile(loss_of) if compiled else loss_of

        def call(_: int) -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            loss = run(text[:, :-1], text[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(own.parameters(), 0.25)
            optimizer.step()
            return (loss.detach(),)

        return call

    ways = [(None, False), (fastai, False), (fused_ar_tar, False), (fastai, True), (fused_ar_tar, True)]
    return {name: training_step(*way) for name, way in zip(STEP_PEERS, ways, strict=True)}
