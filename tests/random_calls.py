"""Random calls of `fused_ar_tar`, `fused_dropout_ar_tar` and the fused dropouts, compared with the formulas in float64.

`python -m tests.random_calls --count 3000` draws 3,000 kinds of calls, and prints the seed and the arguments of each of
which a result or a gradient is wrong. A kind has an operation, dtypes, layouts, steps and coefficients. Three calls of
a kind follow one another with other values, so that the second and the third meet the plan of the first.
"""

from __future__ import annotations

import argparse
import random
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from fastreg import ARTAR, FusedDropout, FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.backends import backend_for
from fastreg.call.problem import TimeAxis
from fastreg.call.rnn_dropout import Request
from tests.calls import Decorated, Nothing
from tests.conftest import BF16, DOUBLE, FLOAT, HALF, INTERPRETED, by_triton
from tests.exact import assert_dropped, assert_gradient, assert_terms, exact, gradients_of, spoil, steps_of, truth

DTYPES = [FLOAT, FLOAT, HALF, DOUBLE, *([] if INTERPRETED else [BF16])]  # the interpreter truncates bfloat16
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
STEPS = [(), (), ("lengths",), ("valid",), ("starts",), ("lengths", "starts"), ("valid", "starts")]
CALLS = 3  # of one kind


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


def in_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def with_gaps(x: Tensor) -> Tensor:
    """Return a copy whose axes are in the opposite order in memory, with gaps between its elements."""
    return x.new_empty([*x.shape[::-1], 2])[..., 0].permute([*reversed(range(x.dim()))]).copy_(x)


class Kind:
    """Draw a kind of call from a seed, and compare calls of this kind with the formulas."""

    layout: dict[str, Any]

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.device, self.counts = device, Counter[str]()
        self.draw, self.bits = random.Random(seed), torch.Generator().manual_seed(seed)
        choose = self.draw.choice
        self.operation = choose(["pair", "pair", "same", "packed", "dropout", "dropout"])
        self.choose_shape()
        layers = 0 if self.operation == "dropout" else choose([0, 0, 0, 1, 2, 3])
        self.is_list, tensors = layers > 0, 2 * max(layers, 1)
        one = self.operation in ("dropout", "same") or self.chance(0.5)
        self.dtypes = self.draw.choices([choose(DTYPES)] if one else DTYPES, k=tensors)
        self.need_gradients = self.draw.choices([True] * 5 + [False], k=tensors)
        reduction, return_terms = choose(["mean", "mean", "sum"]), choose([False, True])
        self.options = {**self.layout, "reduction": reduction, "return_terms": return_terms}
        self.are_tensors = choose([(False, False), (False, False), (True, True), (True, False)])
        self.coefficient_of_0 = choose([None, None, None, "alpha", "beta"])
        self.marks = ("lengths",) if self.operation == "packed" else choose(STEPS)
        self.dtype_of_batch_sizes = choose(INTEGERS)
        self.drops_by = choose(["mask", "mask", "draw", "module", "forward"])
        if self.operation == "dropout" and self.drops_by in ("module", "forward"):  # which have fewer options
            self.marks = tuple(name for name in self.marks if name != "lengths")
            self.options |= {"reduction": "mean", "return_terms": True}
        self.spoils_padding = choose([False, True])
        self.full_mask_or_rows_with_gaps = choose([False, True])
        self.decorates = choose([False, False, False, True])
        # The formula of dropout rounds each of its parts to half precision.
        rounds_parts = self.operation == "dropout" and self.dtypes[0] in (HALF, BF16)
        self.second_derivatives = not rounds_parts and choose([False] * 4 + [True])
        self.unpacks_by: Any = choose([None] * 6 + [torch.clone, in_double, with_gaps])
        self.under_a_mode = choose([False] * 4 + [True])
        self.under_autocast = self.operation != "packed" and choose([False] * 4 + [True])  # PyTorch packs no halves
        self.gives_inference_tensors = choose([False] * 4 + [True])
        takes_formula = self.under_a_mode or self.unpacks_by in (in_double, with_gaps)
        takes_formula |= backend_for(torch.device(device)) is None
        self.rounds_parts = rounds_parts and takes_formula
        self.locked = takes_formula or self.drops_by == "mask" or choose([True, False])

    def __str__(self) -> str:
        return ", ".join(f"{name}: {x}" for name, x in vars(self).items() if name not in ("counts", "draw", "bits"))

    def chance(self, p: float) -> bool:
        return self.draw.random() < p

    def choose_shape(self) -> None:
        """Choose a shape, the axis of time, and the argument that names it."""
        dims = 3 if self.operation == "packed" else self.draw.choice([1, 2, 3, 3, 3, 4, 5])
        sizes = [1, 2, 3, 5] if dims > 3 or INTERPRETED else [1, 2, 3, 4, 7, 16, 33]
        shape = self.draw.choices(sizes, k=dims)
        if self.operation != "packed" and self.chance(0.03):
            shape[self.draw.randrange(dims)] = 0
        self.axis, self.layout = max(dims - 2, 0), {"time_dim": 0} if dims == 2 else {}
        if dims in (1, 4, 5) or (self.operation != "packed" and self.chance(0.3)):
            self.axis = self.draw.randrange(dims)
            self.layout = {"time_dim": self.draw.choice([self.axis, self.axis - dims])}
        elif dims == 3 and self.operation != "packed" and self.chance(0.3):
            self.axis, self.layout = 0, {"batch_first": False}
        if dims < 4 and self.chance(0.15):
            shape[self.axis] = self.draw.choice([20, 41] if INTERPRETED else [20, 41, 64, 100])
        # A block of lanes holds several sequences of such a shape, or a part of one sequence.
        if dims == 3 and self.chance(0.15):
            shapes = [(3, 9, 4500), (17, 3, 401), (70, 33, 31), (33, 130, 12), (70, 9, 200)]
            shape = self.draw.choice([(2, 37, 201), (2, 19, 136)] if by_triton(self.device) else shapes)
        self.shape = tuple(shape)

    def leaf(self, i: int) -> Tensor:
        """Draw raw or dropped, with NaN and infinity where steps do not count."""
        values = torch.randn(self.shape, generator=self.bits, dtype=DOUBLE) * self.draw.choice([0.1, 1, 3])
        values = values.to(self.dtypes[i])
        if self.operation != "packed" and self.spoils_padding:
            spoil(values, **self.steps, **self.layout)
        expands = not self.steps or not self.spoils_padding
        return memory(values.to(self.device), self.draw, expands).requires_grad_(self.need_gradients[i])

    def draw_steps(self) -> None:
        """Draw lengths, valid steps and starts; masks have the axes of batch and time in the order of the shape."""
        batch, time = 0 if self.axis else 1, self.shape[self.axis]
        axes = sorted([batch, self.axis]) if self.axis or len(self.shape) > 2 else [self.axis]
        sequences = self.shape[batch] if len(axes) > 1 else 1
        self.steps: dict[str, Tensor] = {}
        for name in self.marks:
            if name == "lengths":
                x = torch.randint(int(self.operation == "packed"), time + 1, (sequences,), generator=self.bits)
                dtypes = INTEGERS[time > 127 :]
            else:
                share = self.draw.choice([0.3, 0.8, 1.0]) if name == "valid" else 0.3
                x = torch.rand([self.shape[axis] for axis in axes], generator=self.bits) < share
                dtypes = [torch.bool, *INTEGERS]
            x = x.to(self.draw.choice(dtypes))
            self.steps[name] = self.draw.choice([x, x, x.t().contiguous().t(), torch.stack([x] * 2, -1)[..., 0]])

    def draw_coefficients(self) -> None:
        """Draw alpha and beta, as numbers and as the call gets them."""
        self.numbers = [self.draw.choice([0.5, 2.0, 2.0, self.draw.uniform(0.1, 3)]) for _ in range(2)]
        if self.coefficient_of_0 is not None:
            self.numbers[self.coefficient_of_0 == "beta"] = 0.0
        self.given: list[Any] = [*self.numbers]
        for i in range(2):
            if self.are_tensors[i]:
                dtype = self.draw.choice([FLOAT, FLOAT, DOUBLE])
                with torch.inference_mode(self.gives_inference_tensors):
                    self.given[i] = torch.tensor(self.numbers[i], dtype=dtype, device=self.device)
                self.numbers[i] = float(self.given[i])

    def seen(self, x: Tensor) -> Tensor:
        return x.as_subclass(Decorated) if self.decorates else x

    def play(self) -> None:
        for _ in range(CALLS):
            self.draw_steps()
            self.draw_coefficients()
            with ExitStack() as stack:
                stack.enter_context(torch.autocast(self.device, torch.bfloat16, enabled=self.under_autocast))
                if self.unpacks_by is not None:
                    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, self.unpacks_by))
                if self.under_a_mode:
                    stack.enter_context(Nothing())
                (self.dropout if self.operation == "dropout" else self.penalty)()
            self.counts["calls"] += 1

    def truth(self, raw: Tensor, dropped: Tensor) -> ARTAR:
        return truth(raw, dropped, *self.numbers, self.options["reduction"], **self.steps, **self.layout)

    def check_gradients(self, penalty: Tensor, want: ARTAR, leaves: dict[Tensor, Tensor], *drops: Tensor) -> None:
        """Compare the gradients of leaves, which come with their values in float64, in two backwards.

        If the call drops units, `drops` is dropped, its upstream gradient, and their part of the gradient.
        """
        for retain in (True, False) if leaves else ():  # a second backward forms the gradients anew
            scale = self.draw.choice([1.0, 1.0, 100.0, 7.0])
            results = [(penalty, torch.full_like(penalty, scale))] if penalty.requires_grad else []
            outputs, upstream = zip(*results, *([drops[:2]] if drops else []), strict=True)
            gradients = torch.autograd.grad(
                outputs, [*leaves], upstream, retain_graph=retain, create_graph=self.second_derivatives
            )
            for gradient, (x, values) in zip(gradients, leaves.items(), strict=True):
                parts = [*drops[2:], *gradients_of(want, [scale * x for x in self.numbers], values)]
                counted = steps_of(x, **self.steps, **self.layout)[0].expand(x.shape)
                assert_gradient(gradient.detach(), parts, penalty.dtype, counted, self.rounds_parts)
                self.counts["gradients"] += 1

    def packed(self, side: list[Any]) -> list[Any]:
        """Pack the layers of raw or of dropped."""
        given = []
        for x in side:
            x = pack_padded_sequence(x, self.steps["lengths"].long(), batch_first=True, enforce_sorted=False)
            every_other = torch.stack([x.data] * 2, 2).flatten(1)[:, ::2]
            data = every_other if self.full_mask_or_rows_with_gaps else x.data
            given.append(x._replace(data=data, batch_sizes=x.batch_sizes.to(self.dtype_of_batch_sizes)))
        return given

    def penalty(self) -> None:
        """Compare a call of `fused_ar_tar`."""
        raws, kept = ([self.leaf(i) for i in range(side, len(self.dtypes), 2)] for side in range(2))
        kept = raws if self.operation == "same" else kept
        exactly = {x: exact(x) for x in (*raws, *kept)}
        layers = [self.truth(exactly[x], exactly[y]) for x, y in zip(raws, kept, strict=True)]
        want = ARTAR(*(torch.stack(x).sum() for x in zip(*layers, strict=True)))
        arguments: list[Any] = [[self.seen(x) for x in side] for side in (raws, kept)]
        marks = self.steps
        if self.operation == "packed":
            arguments, marks = [self.packed(side) for side in arguments], {}
        arguments = arguments[:1] * 2 if kept is raws else arguments
        arguments = arguments if self.is_list else [side[0] for side in arguments]
        (alpha, beta), is_measured = self.numbers, self.options["return_terms"]
        is_read = is_measured or self.are_tensors[1] or beta != 0, is_measured or self.are_tensors[0] or alpha != 0
        arguments = [x if reads or self.chance(0.5) else None for x, reads in zip(arguments, is_read, strict=True)]
        got: Any = fused_ar_tar(arguments[0], arguments[1], *self.given, **marks, **self.options)
        dtypes = [x.dtype for side, reads in zip((raws, kept), is_read, strict=True) for x in side if reads]
        penalty = assert_terms(got, want, *dtypes, count=raws[0].numel())
        assert type(penalty) is Tensor
        both = [(x, beta) for x in raws] + [(x, alpha) for x in kept]
        self.check_gradients(penalty, want, {x: exactly[x] for x, factor in both if x.requires_grad and factor})

    def dropout(self) -> None:
        """Compare a call of `fused_dropout_ar_tar`, or of a module; another call of the same seed shows the mask."""
        raw, shape = self.leaf(0), list(self.shape)
        if self.drops_by != "mask" or not self.full_mask_or_rows_with_gaps:
            shape[self.axis] = 1
        torch.manual_seed(seed := self.draw.getrandbits(16))
        if self.locked:  # as fastai draws it
            mask = raw.detach().new_empty(shape).bernoulli_(1 - 0.4).div_(1 - 0.4)
        else:
            ones = torch.ones(self.shape, dtype=raw.dtype, device=raw.device)
            mask, _ = fused_dropout_ar_tar(ones, 0.4, 0.0, 0.0, time_dim=self.axis, locked=False)
        torch.manual_seed(seed)
        options: Any = {}
        if self.drops_by in ("module", "forward"):
            kind = FusedRNNDropout if self.locked else FusedDropout
            module: Any = kind(0.4, 0, 0, **self.layout)
            module.alpha, module.beta = self.given
            if self.drops_by == "forward":  # whose arguments take precedence
                module = kind(0.1, 5.0, 5.0, time_dim=-1)
                options = {"p": 0.4, "request": Request(self.given, TimeAxis(None, self.axis))}
            dropped, got = module(self.seen(raw), **options, **self.steps), module.take()
        else:
            options = {"p": 0.4, "locked": self.locked, **self.steps, **self.options}
            if self.drops_by == "mask":
                with torch.inference_mode(self.gives_inference_tensors):
                    given = memory(mask, self.draw, expands=False)
                options |= {"p": 0, "mask": self.seen(given)}
            dropped, got = fused_dropout_ar_tar(self.seen(raw), alpha=self.given[0], beta=self.given[1], **options)
        values = exact(raw)
        want = self.truth(values, assert_dropped(dropped, raw, mask, values))
        penalty = assert_terms(got, want, raw.dtype, count=raw.numel())
        assert type(dropped) is type(penalty) is Tensor
        arriving = memory(torch.randn(self.shape, generator=self.bits).to(raw), self.draw, expands=True)
        leaves = {raw: values} if raw.requires_grad else {}
        self.check_gradients(penalty, want, leaves, dropped, arriving, arriving.double() * mask.double())


def play_all(make: Callable[[int], Any]) -> None:
    """Play a case of each seed that the command line asks for, print those that are wrong, and exit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--count", type=int, default=100, help="of the seeds")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    for seed in range(args.seed, args.seed + args.count):
        case: Any = None
        try:
            case = make(seed)
            case.play()
        except Exception:
            counts["wrong"] += 1
            print(f"seed {seed}: {case}\n{traceback.format_exc(limit=-3)}", flush=True)
        counts.update(case.counts if case else {})
    print(f"{args.count} seeds, {counts['wrong']} wrong: {dict(counts)}")
    raise SystemExit(counts["wrong"] > 0)


if __name__ == "__main__":
    play_all(Kind)
