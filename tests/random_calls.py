"""Random calls of `fused_ar_tar` and `fused_dropout_ar_tar`, compared with loops over time steps in float64.

`python -m tests.random_calls --count 10000` makes 10,000 calls, and prints the seed and the arguments of each kind of
which a result or a gradient is wrong. A seed draws a kind: an operation, dtypes, layouts, steps and coefficients. Three
calls of a kind follow one another with other values, so that the second and the third meet the plan of the first.
"""

from __future__ import annotations

import argparse
import math
import random
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from fastreg import ARTAR, fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import INTERPRETED
from tests.exact import assert_gradient, assert_terms, eps, rounding, spoil
from tests.samples import BF16, DOUBLE, FLOAT, HALF, Decorated

DTYPES = [FLOAT, FLOAT, HALF, DOUBLE, *([] if INTERPRETED else [BF16])]  # which the interpreter cuts off
MARKS = [torch.bool, torch.uint8, torch.int32, torch.int64]
STEPS = [(), (), ("lengths",), ("valid",), ("starts",), ("lengths", "starts"), ("valid", "starts")]
CALLS = 3  # of one kind


class Nothing(TorchDispatchMode):
    """A dispatch mode that changes nothing; fastreg runs the formula, so that modes see its operators."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Steps(NamedTuple):
    """Time steps, one row a sequence: the arguments, whether each step counts, and whether the change into it does."""

    given: dict[str, Tensor]
    counts: list[list[bool]]
    changes: list[list[bool]]


class Terms(NamedTuple):
    """AR and TAR of layers, and for each layer the gradient of TAR for raw and that of AR for dropped."""

    ar: float
    tar: float
    gradients: list[tuple[Tensor, Tensor]]


def memory(values: Tensor, draw: random.Random, expands: bool) -> Tensor:
    """Lay out values in any order of axes, with gaps of NaN, every other element, or one row for all."""
    dims = values.dim()
    order = draw.choice([list(range(dims)), draw.sample(range(dims), dims)])
    wide = [n + draw.choice([0, 0, 0, 1, 3]) for n in values.shape]
    step = [draw.choice([1, 1, 1, 1, 2]) for _ in values.shape]
    held = values.new_full([wide[axis] * step[axis] for axis in order], torch.nan)
    x = held.permute([order.index(axis) for axis in range(dims)])
    for axis in range(dims):
        first = draw.randint(0, wide[axis] - values.shape[axis])
        x = x.narrow(axis, first * step[axis], values.shape[axis] * step[axis])
        x = x[(slice(None),) * axis + (slice(None, None, step[axis]),)]
    x.copy_(values)
    if expands and draw.random() < 0.1:
        axis = draw.randrange(dims)
        x = x.narrow(axis, 0, min(1, values.shape[axis])).expand(values.shape)
    return x.detach()


def by_loops(layers: Sequence[tuple[Tensor, Tensor]], steps: Steps, mean: bool) -> Terms:
    """Form the terms of raw and dropped of layers, float64 `(sequences, time, elements)`, by loops."""
    ar, tar, gradients = [], [], []
    for raw, dropped in layers:
        of_raw, of_dropped = torch.zeros_like(raw), torch.zeros_like(dropped)
        n, m = (max(raw.shape[2] * sum(map(sum, x)), 1) if mean else 1 for x in (steps.counts, steps.changes))
        for i, (counts, changes) in enumerate(zip(steps.counts, steps.changes, strict=True)):
            for t in range(raw.shape[1]):
                if counts[t]:
                    ar += (dropped[i, t] ** 2 / n).tolist()
                    of_dropped[i, t] += 2 / n * dropped[i, t]
                if changes[t]:
                    change = raw[i, t] - raw[i, t - 1]
                    tar += (change**2 / m).tolist()
                    of_raw[i, t] += 2 / m * change
                    of_raw[i, t - 1] -= 2 / m * change
        gradients.append((of_raw, of_dropped))
    return Terms(math.fsum(ar), math.fsum(tar), gradients)


class Kind:
    """Draw a kind of call from a seed, and compare calls of this kind with the loops.

    Attributes:
        chosen: the drawn values, by their names.
        counts: how many calls and gradients were compared.
    """

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.device = device
        self.draw, self.bits = random.Random(seed), torch.Generator().manual_seed(seed)
        self.chosen: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()
        self.operation = self.choose("operation", ["pair", "pair", "same", "packed", "dropout", "dropout"])
        self.choose_shape()
        layers = 0 if self.operation == "dropout" else self.choose("layers", [0, 0, 0, 1, 2, 3])
        self.is_list, tensors = layers > 0, 2 * max(layers, 1)
        one = self.operation in ("dropout", "same") or self.chance(0.5)
        self.dtypes = self.choose_each("dtypes", [self.draw.choice(DTYPES)] if one else DTYPES, tensors)
        self.needs = self.choose_each("need gradients", [True] * 5 + [False], tensors)
        self.options = {
            **self.layout,
            "reduction": self.choose("reduction", ["mean", "mean", "sum"]),
            "return_terms": self.choose("return_terms", [False, True]),
        }
        self.are_tensors = self.choose("tensors", [(False, False), (False, False), (True, True), (True, False)])
        self.zero = self.choose("coefficient of 0", [None, None, None, "alpha", "beta"])
        self.marks = ("lengths",) if self.operation == "packed" else self.choose("steps", STEPS)
        self.spoils = self.choose("NaN in padding", [False, True])
        self.full_mask = self.choose("a full mask", [False, True])
        self.decorates = self.choose("a subclass", [False, False, False, True])
        # The formula of dropout rounds each of its parts to half precision.
        rounds_parts = self.operation == "dropout" and self.dtypes[0] in (HALF, BF16)
        self.second = not rounds_parts and self.choose("second derivatives", [False] * 4 + [True])
        self.copies = self.choose("saved tensors copied", [False] * 4 + [True])
        self.formula = not rounds_parts and self.choose("under a dispatch mode", [False] * 4 + [True])

    def __str__(self) -> str:
        return ", ".join(f"{name}: {getattr(x, '__name__', x)}" for name, x in self.chosen.items())

    def chance(self, p: float) -> bool:
        return self.draw.random() < p

    def choose(self, name: str, choices: Sequence[Any]) -> Any:
        self.chosen[name] = chosen = self.draw.choice(choices)
        return chosen

    def choose_each(self, name: str, choices: Sequence[Any], count: int) -> list[Any]:
        chosen = [self.draw.choice(choices) for _ in range(count)]
        self.chosen[name] = [getattr(x, "__name__", x) for x in chosen]
        return chosen

    def choose_shape(self) -> None:
        """Choose a shape, the axis of time, and the argument that names it."""
        dims = 3 if self.operation == "packed" else self.draw.choice([1, 2, 3, 3, 3, 4, 5])
        sizes = [1, 2, 3, 5] if dims > 3 or INTERPRETED else [1, 2, 3, 4, 7, 16, 33]
        shape = [self.draw.choice(sizes) for _ in range(dims)]
        if self.operation != "packed" and self.chance(0.03):
            shape[self.draw.randrange(dims)] = 0
        self.axis, self.layout = max(dims - 2, 0), {}
        if dims in (1, 4, 5) or (self.operation != "packed" and self.chance(0.3)):
            self.axis = self.draw.randrange(dims)
            self.layout = {"time_dim": self.draw.choice([self.axis, self.axis - dims])}
        elif dims == 3 and self.operation != "packed" and self.chance(0.3):
            self.axis, self.layout = 0, {"batch_first": False}
        if dims < 4 and not INTERPRETED and self.chance(0.15):
            shape[self.axis] = self.draw.choice([20, 41, 64, 100])
        self.shape = tuple(shape)
        self.chosen |= {"shape": self.shape, **self.layout}

    def rows(self, x: Tensor) -> Tensor:
        """Return a tensor on the CPU as `(sequences, time, elements)`; the batch is the first axis beside time."""
        x = x.cpu()
        x = x.movedim(self.axis, 0) if self.axis == 0 else x.movedim(self.axis, 1)
        x = x.transpose(0, 1) if self.axis == 0 and x.dim() > 2 else x[None] if self.axis == 0 else x
        return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))

    def leaf(self, i: int, steps: Steps) -> Tensor:
        """Draw raw or dropped, with NaN and infinity where steps do not count."""
        values = torch.randn(self.shape, generator=self.bits, dtype=DOUBLE) * self.draw.choice([0.1, 1, 3])
        values = values.to(self.dtypes[i])
        if self.operation != "packed" and self.spoils:
            spoil(values, **steps.given, **self.layout)
        return memory(values.to(self.device), self.draw, expands=not steps.given).requires_grad_(self.needs[i])

    def steps(self) -> Steps:
        """Draw lengths, valid steps and starts."""
        sequences, time, _ = self.rows(torch.empty(self.shape)).shape
        given, counts = {}, torch.ones(sequences, time, dtype=torch.bool)
        starts = torch.zeros_like(counts)
        if "lengths" in self.marks:
            lengths = torch.randint(int(self.operation == "packed"), time + 1, (sequences,), generator=self.bits)
            counts = torch.arange(time) < lengths[:, None]
            given["lengths"] = lengths.to(self.draw.choice([torch.int32, torch.int64]))
        if "valid" in self.marks:
            counts = torch.rand(sequences, time, generator=self.bits) < self.draw.choice([0.3, 0.8, 1.0])
            given["valid"] = counts.to(self.draw.choice(MARKS))
        if "starts" in self.marks:
            starts = torch.rand(sequences, time, generator=self.bits) < 0.3
            given["starts"] = starts.to(self.draw.choice(MARKS))
        changes = counts & counts.roll(1, 1) & ~starts
        changes[:, :1] = False
        return Steps(given, counts.tolist(), changes.tolist())

    def coefficients(self) -> tuple[list[Any], list[float]]:
        """Draw alpha and beta, as the call gets them and as numbers."""
        numbers = [self.draw.choice([0.5, 2.0, 2.0, self.draw.uniform(0.1, 3)]) for _ in range(2)]
        if self.zero is not None:
            numbers[self.zero == "beta"] = 0.0
        given: list[Any] = list(numbers)
        for i in range(2):
            if self.are_tensors[i]:
                dtype = self.draw.choice([FLOAT, FLOAT, DOUBLE])
                given[i] = torch.tensor(numbers[i], dtype=dtype, device=self.device)
                numbers[i] = float(given[i])
        return given, numbers

    def seen(self, x: Tensor) -> Tensor:
        return x.as_subclass(Decorated) if self.decorates else x

    def play(self) -> None:
        for _ in range(CALLS):
            with ExitStack() as stack:
                if self.copies:
                    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x))
                if self.formula:
                    stack.enter_context(Nothing())
                (self.dropout if self.operation == "dropout" else self.penalty)(self.steps())
            self.counts["calls"] += 1

    def penalty(self, steps: Steps) -> None:
        """Compare a call of `fused_ar_tar`."""
        raws, kept = ([self.leaf(i, steps) for i in range(side, len(self.dtypes), 2)] for side in range(2))
        kept = raws if self.operation == "same" else kept
        exact = [
            (self.rows(x.detach().double()), self.rows(y.detach().double())) for x, y in zip(raws, kept, strict=True)
        ]
        terms = by_loops(exact, steps, self.options["reduction"] == "mean")
        given, (alpha, beta) = self.coefficients()
        self.chosen |= {"alpha": alpha, "beta": beta, **steps.given}
        arguments: list[Any] = [[self.seen(x) for x in side] for side in (raws, kept)]
        if self.operation == "packed":
            lengths = steps.given["lengths"].long()
            options: Any = {"batch_first": True, "enforce_sorted": False}
            arguments = [[pack_padded_sequence(x, lengths, **options) for x in side] for side in arguments]
        arguments = arguments[:1] * 2 if kept is raws else arguments
        arguments = arguments if self.is_list else [side[0] for side in arguments]
        is_read = [
            self.options["return_terms"] or x != 0 or is_tensor
            for x, is_tensor in ((beta, self.are_tensors[1]), (alpha, self.are_tensors[0]))
        ]
        arguments = [x if reads or self.chance(0.5) else None for x, reads in zip(arguments, is_read, strict=True)]
        marks = {} if self.operation == "packed" else steps.given
        got: Any = fused_ar_tar(arguments[0], arguments[1], *given, **marks, **self.options)
        dtypes = [x.dtype for side, reads in zip((raws, kept), is_read, strict=True) for x in side if reads]
        penalty = self.compare_terms(got, terms, (alpha, beta), dtypes)
        wanted: dict[int, tuple[Tensor, list[Tensor]]] = {}
        for side, (tensors, coefficient) in enumerate(((raws, beta), (kept, alpha))):
            for x, both in zip(tensors, terms.gradients, strict=True):
                if x.requires_grad and coefficient:
                    wanted.setdefault(id(x), (x, []))[1].append(coefficient * both[side])
        leaves = [x for x, _ in wanted.values()]
        for retain in (True, False) if leaves else ():  # a second backward forms the gradients anew
            scale = self.draw.choice([1.0, 1.0, 100.0, 7.0])
            gradients = torch.autograd.grad(penalty * scale, leaves, retain_graph=retain, create_graph=self.second)
            for gradient, (_, parts) in zip(gradients, wanted.values(), strict=True):
                self.compare_gradient(gradient, [scale * x for x in parts], penalty.dtype)

    def dropout(self, steps: Steps) -> None:
        """Compare a call of `fused_dropout_ar_tar`."""
        raw, shape = self.leaf(0, steps), list(self.shape)
        if not self.full_mask:
            shape[self.axis] = 1
        mask = memory((torch.rand(shape, generator=self.bits) < 0.6).to(raw) * 1.5, self.draw, expands=False)
        given, (alpha, beta) = self.coefficients()
        self.chosen |= {"alpha": alpha, "beta": beta, **steps.given}
        options: Any = {"mask": self.seen(mask), **steps.given, **self.options}
        dropped, got = fused_dropout_ar_tar(self.seen(raw), 0.4, given[0], given[1], **options)
        torch.testing.assert_close(
            dropped.double(), raw.double() * mask.double(), rtol=rounding(raw), atol=1e-7, equal_nan=True
        )
        exact = self.rows(raw.detach().double()), self.rows(dropped.detach().double())
        terms = by_loops([exact], steps, self.options["reduction"] == "mean")
        penalty = self.compare_terms(got, terms, (alpha, beta), [raw.dtype])
        if not raw.requires_grad:
            return
        of_raw, of_dropped = terms.gradients[0]
        keep = self.rows(mask.double().expand(self.shape))
        arriving = memory(torch.randn(self.shape, generator=self.bits).to(raw), self.draw, expands=True)
        for retain in (True, False):
            scale = self.draw.choice([1.0, 1.0, 100.0, 7.0])
            outputs, upstream = [dropped], [arriving]
            if penalty.requires_grad:
                outputs, upstream = [dropped, penalty], [arriving, torch.full_like(penalty, scale)]
            (gradient,) = torch.autograd.grad(outputs, raw, upstream, retain_graph=retain, create_graph=self.second)
            parts = [scale * beta * of_raw, scale * alpha * of_dropped * keep, self.rows(arriving.double()) * keep]
            self.compare_gradient(gradient, parts, penalty.dtype)

    def compare_terms(self, got: Any, terms: Terms, coefficients: tuple[float, float], dtypes: Sequence[Any]) -> Tensor:
        """Compare the results of a call, and return its penalty."""
        alpha, beta = coefficients
        want = torch.tensor([alpha * terms.ar + beta * terms.tar, terms.ar, terms.tar], dtype=DOUBLE).unbind()
        if self.options["return_terms"]:
            assert_terms(got, ARTAR(*want), *dtypes)
            return got.penalty
        assert got.dtype == (DOUBLE if DOUBLE in dtypes else FLOAT)
        torch.testing.assert_close(got.detach().double().cpu(), want[0], rtol=8 * eps(*dtypes), atol=0)
        return got

    def compare_gradient(self, got: Tensor, parts: list[Tensor], computed: torch.dtype) -> None:
        largest = sum(float(x.abs().max()) for x in parts if x.numel())
        assert_gradient(self.rows(got.detach()), torch.stack(parts).sum(0), largest, computed)
        self.counts["gradients"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Make random calls.")
    parser.add_argument("--seed", type=int, default=0, help="of the first kind of call")
    parser.add_argument("--count", type=int, default=1000, help="of calls, three a kind")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    for seed in range(args.seed, args.seed - (-args.count // CALLS)):
        kind: Any = None
        try:
            kind = Kind(seed, args.device)
            kind.play()
        except Exception:
            counts["wrong"] += 1
            print(f"seed {seed}: {kind}\n{traceback.format_exc(limit=-3)}", flush=True)
        counts.update(kind.counts if kind else {})
    print(f"{counts['wrong']} wrong: {dict(counts)}")
    raise SystemExit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
