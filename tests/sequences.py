"""Random sequences of training steps with `attach`, compared with plain PyTorch in float64.

`python -m tests.sequences --seed 0 --count 2000` plays 2,000 sequences, and prints the seed and the events of each in
which a gradient, AR or TAR is wrong, or an error comes that the documentation does not announce.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout, RNNRegularizer
from tests.language_model import Elementwise, Locked, Loop, Wrapper
from tests.random_calls import play_all

BATCH, HIDDEN, P = 3, 4, 0.4
RTOL = {torch.float64: 1e-9, torch.float32: 1e-4}
KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
KINDS |= {"cell": Loop, "wrapper": Wrapper, "elementwise": Elementwise}
DROPOUTS: dict[str, Callable[[bool], nn.Module]] = {
    "none": lambda _: nn.Identity(),
    "plain": lambda _: nn.Dropout(P),
    "of 0": lambda _: nn.Dropout(0.0),
    "locked": lambda batch_first: Locked(P, batch_first),
    "fused": lambda batch_first: FusedRNNDropout(P, batch_first=batch_first),
    "fused, AR of raw": lambda batch_first: FusedRNNDropout(P, batch_first=batch_first, ar_of="raw"),
}
random_bits = torch.Generator().manual_seed(5)
VALID, STARTS = (torch.rand(2, BATCH, 8, generator=random_bits) < torch.tensor([0.8, 0.3]).view(2, 1, 1)).unbind()
Loss = list[tuple["Run", str, Any, float]]  # the tensors that it sums up: a run, its part, a function and a weight


class Net(nn.Module):
    """Layers, each with a dropout. It returns its output, the states, and raw and dropped of all layers, or `None`."""

    def __init__(self, kinds: Sequence[str], dropouts: Sequence[str], batch_first: bool, keeps: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KINDS[kind](HIDDEN, HIDDEN, batch_first=batch_first) for kind in kinds)
        self.dropouts = nn.ModuleList(DROPOUTS[dropout](batch_first) for dropout in dropouts)
        self.decoder, self.keeps = nn.Linear(HIDDEN, 3), keeps

    def forward(self, x: Tensor, states: Any = None) -> Any:
        after, raws, kept = [], [], []
        for i, (layer, dropout) in enumerate(zip(self.layers, self.dropouts, strict=True)):
            raw, state = layer(x) if states is None else layer(x, states[i])
            x = dropout(raw)
            after.append(state)
            raws.append(raw)
            kept.append(x)
        return self.decoder(x), after, (raws, kept) if self.keeps else None


@dataclass(eq=False)
class Run:
    """A call of the net on both sides, that of the hooks and plain PyTorch.

    Attributes:
        kind: "train", "evaluation" or "no gradients".
        steps: the number of time steps.
        results: the values that the net of each side returned.
        before: the run that the state came from with its graph, or `None`.
        taken: whether a loss was regularized with it, or with in_backward a backward went through it.
        missed: whether a loss did not depend on it.
    """

    kind: str
    steps: int
    results: list[Any]
    before: Run | None
    taken: bool = False
    missed: bool = False

    def part(self, name: str, side: int) -> Tensor:
        out, states, kept = self.results[side]
        state = states[-1]
        parts = {"out": out, "state": state[0] if isinstance(state, tuple) else state}
        return kept[0][-1] if name == "raw" else parts[name]


class Play:
    """A random sequence of training steps."""

    def __init__(self, seed: int, dtype: torch.dtype | None = None, compiles: bool | None = None) -> None:
        draw = self.draw = random.Random(seed)
        torch.manual_seed(seed)
        count = draw.randint(1, 3)
        self.dtype = draw.choice([torch.float64, torch.float64, torch.float32])
        self.dtype = dtype or self.dtype
        self.compiled = draw.random() < 0.2 if compiles is None else compiles
        self.use = draw.choices(["loss", "in_backward", "stepwise"], [5, 2, 2])[0]
        self.kinds, self.batch_first = [draw.choice([*KINDS]) for _ in range(count)], draw.random() < 0.7
        self.by_cell = [self.use == "stepwise" and kind == "cell" for kind in self.kinds]
        self.dropouts = ["none" if by_cell else draw.choice([*DROPOUTS]) for by_cell in self.by_cell]
        self.keeps, self.layers = draw.random() < 0.6, draw.choice(["last", "all"])
        self.masks: dict[str, Tensor] = {}
        if draw.random() < 0.4:
            self.masks = {"valid": VALID, "starts": STARTS}
            self.masks.pop(draw.choice(["valid", "starts", ""]), None)
        self.net = Net(self.kinds, self.dropouts, self.batch_first, self.keeps).to(self.dtype)
        plain = ["locked" if "fused" in name else name for name in self.dropouts]
        self.plain = Net(self.kinds, plain, self.batch_first, True).double()
        self.frozen = count > 1 and draw.random() < 0.1
        for net in (self.net, self.plain):
            net.layers[0].requires_grad_(not self.frozen)
        self.plain.load_state_dict(self.net.state_dict())
        self.events: list[str] = []
        self.counts: Counter[str] = Counter(compiled=self.compiled)
        self.coefficients = self.scale = (1.0, 1.0)
        self.attach()
        self.sides: list[Any] = [self.net, self.plain]
        if self.compiled:
            torch._dynamo.reset()
            if draw.random() < 0.3:  # as in a script that trains a model without the penalty before
                self.note("another model was compiled before")
                other = torch.compile(deepcopy(self.net), backend="eager")
                other(torch.randn(BATCH, 3, HIDDEN, dtype=self.dtype))
            self.sides[0] = torch.compile(self.net, backend="eager")
        self.runs: list[Run] = []

    def attach(self) -> None:
        draw, options = self.draw, {}
        self.reg = RNNRegularizer(layers=self.layers)
        self.change_coefficients()
        self.scale = draw.choice([1.0, 3.0])
        if self.use == "in_backward":
            options["in_backward"] = draw.choice([self.scale, torch.tensor(self.scale)])
        for i, layer in enumerate(self.net.layers):
            dropout: Any = None if self.dropouts[i] == "none" else self.net.dropouts[i]
            functions: Any = {name: self.mask_of(mask) for name, mask in self.masks.items() if not self.by_cell[i]}
            attached: Any = layer.cell if self.by_cell[i] else layer
            self.reg.attach(attached, dropout, stepwise=self.use == "stepwise", **functions, **options)

    def mask_of(self, mask: Tensor) -> Callable[..., Tensor]:
        return lambda x, *_: mask[:, : x.shape[int(self.batch_first)]]

    def change_coefficients(self) -> None:
        """Change alpha and beta, numbers or tensors, from one step to the next."""
        self.coefficients = self.draw.choice([(2.0, 1.0), (0.75, 3.0), (1.5, 0.0), (0.0, 2.0)])
        kind = self.draw.choice([float, torch.tensor])
        self.reg.alpha, self.reg.beta = map(kind, self.coefficients)
        self.note(f"alpha, beta = {self.reg.alpha}, {self.reg.beta}")

    def note(self, event: str) -> None:
        self.events.append(event)

    def __str__(self) -> str:
        names = ["dtype", "compiled", "use", "kinds", "dropouts", "layers", "batch_first", "keeps", "frozen", "scale"]
        plan = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return "\n  ".join([f"{plan}, masks={[*self.masks]}", *self.events])

    # The events of a step

    def run(self, kind: str = "train", before: Run | None = None, detach: bool = False) -> Run:
        """Run the net of each side with the same input and the same masks of dropout."""
        draw = self.draw
        steps = draw.randint(1, 3) if self.use == "stepwise" else 3 if self.compiled else draw.randint(2, 6)
        x = torch.randn(*((BATCH, steps) if self.batch_first else (steps, BATCH)), HIDDEN, dtype=self.dtype)
        checkpoints = kind == "train" and not self.compiled and draw.random() < 0.15
        seed, results = draw.randrange(1000), []
        self.note(f"run {len(self.runs)}: {kind}, {steps} steps{', checkpoint' * checkpoints}")
        self.note(f"  state of {'none' if before is None else self.runs.index(before)}{', detached' * detach}")
        for i, (net, module) in enumerate(zip(self.sides, (self.net, self.plain), strict=True)):
            module.train(kind != "evaluation")
            torch.manual_seed(seed)
            states = None if before is None else before.results[i][1]
            states = tree_map(detached, states) if detach and before is not None else states
            given = x.double() if i else x, states
            with torch.set_grad_enabled(kind != "no gradients"):
                results.append(checkpoint(net, *given, use_reentrant=False) if checkpoints else net(*given))
            module.train()
        has_graph = before is not None and not detach and kind != "no gradients" and before.kind != "no gradients"
        self.runs.append(Run(kind, steps, results, before if has_graph else None))
        return self.runs[-1]

    def loss(self, runs: Sequence[Run]) -> Loss:
        """Return a loss on some of the runs, at least one."""
        draw, parts = self.draw, []
        for run in draw.sample(runs, draw.randint(1, len(runs))):
            names = ["out"] * 8 + ["state"] + ["raw"] * self.keeps
            parts.append((run, draw.choice(names), draw.choice([torch.sin, torch.square, torch.tanh]), draw.random()))
        self.note(f"loss on {[(self.runs.index(run), part, f.__name__) for run, part, f, _ in parts]}")
        return parts

    def reached(self, loss: Loss) -> dict[Run, bool]:
        """Return the runs that a loss depends on, in order, and whether through dropped of the last layer."""
        found: dict[Run, bool] = {}
        whole = ["out", "raw"] if self.dropouts[-1] in ("none", "of 0") else ["out"]
        left = [(run, part in whole) for run, part, *_ in loss]
        while left:
            run, whole = left.pop()
            if run.before is not None and run not in found:
                left.append((run.before, False))
            found[run] = found.get(run, False) or whole
        return {run: found[run] for run in self.runs if run in found}

    def terms(self, runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
        """Return AR and TAR of runs by the formula, summed over runs and layers."""
        total = torch.zeros(2, dtype=torch.float64)
        for i, dropout in enumerate(self.dropouts):
            if self.layers == "last" and i < len(self.dropouts) - 1:
                continue
            for group in [runs] if self.use == "stepwise" else [[run] for run in runs]:
                both = [torch.cat([run.results[1][2][j][i] for run in group], int(self.batch_first)) for j in (0, 1)]
                raw, squared = both if self.batch_first else [x.transpose(0, 1) for x in both]
                squared = raw if "AR of raw" in dropout else squared
                masks = {} if self.by_cell[i] else self.masks
                marks = {name: torch.cat([mask[:, : run.steps] for run in group], 1) for name, mask in masks.items()}
                valid = marks.get("valid", torch.ones(raw.shape[:2], dtype=torch.bool))
                pairs = valid[:, 1:] & valid[:, :-1] & ~marks.get("starts", torch.zeros_like(valid))[:, 1:]
                total = total + torch.stack([mean(squared, valid), mean(raw[:, 1:] - raw[:, :-1], pairs)])
        return total[0], total[1]

    def regularize(self, loss: Loss, how: str, keeps_graph: bool) -> None:
        """Take the penalty for a loss, and make a backward on each side."""
        self.note(f"{how}{', graph kept' * keeps_graph}")
        in_backward, whole = self.use == "in_backward", self.reached(loss)
        # With in_backward a run counts in every backward through its output, and by its state alone not again.
        reached = [x for x in whole if x.kind == "train" and (not x.taken or (in_backward and whole[x]))]
        ar, tar = self.terms(reached)
        penalty = self.coefficients[0] * ar + self.coefficients[1] * tar
        losses = [total_of(loss, side) for side in (0, 1)]
        others = [total_of(loss, side, torch.cos) for side in (0, 1)]
        # Documented refusals, instead of the right numbers, which may come as well: activations that nothing keeps;
        # in_backward where the backward passes by an activation; runs that an earlier loss missed; second derivatives
        # that need activations; a frozen module, whose latest run counts.
        may = not all(whole[run] for run in reached) and (in_backward or not self.keeps)
        may = may or (any(run.missed for run in reached) and not in_backward)
        may = may or (how == "second" and (in_backward or self.use == "stepwise" or not self.keeps))
        may = may or (self.frozen and any(run.kind == "no gradients" for run in self.runs))
        try:
            total = losses[0]
            if not in_backward:
                if how != "alone" and self.draw.random() < 0.5:
                    total = self.reg.on_backward_begin(losses[0])
                else:
                    taken: Any = self.reg.take(losses[0])
                    total = taken.penalty if how == "alone" else losses[0] + taken.penalty
            of_plain = losses[1] + penalty * (self.scale if in_backward else 1)
            of_plain = penalty if how == "alone" else of_plain
            added = penalty * self.scale if in_backward else 0  # to any other loss, too
            if how == "mixed":
                total, of_plain = 3 * total + others[0], 3 * losses[1] + others[1] + (penalty * 3, added)[in_backward]
            if how == "another":
                for net, other in ((self.net, others[0]), (self.plain, others[1] + added)):
                    other.backward(retain_graph=True, inputs=parameters(net))
                self.same_gradients("the gradients of another loss")
            for _ in range(1 + (how == "twice")):
                for net, x in ((self.net, total), (self.plain, of_plain)):
                    if how == "second":
                        first = torch.autograd.grad(x, parameters(net), create_graph=True, allow_unused=True)
                        x = sum(y.square().sum() for y in first if y is not None)
                    x.backward(retain_graph=keeps_graph or how == "twice", inputs=parameters(net))  # pyright: ignore
        except RuntimeError as error:
            if not (may and re.search("attach|on_backward_begin|in_backward", str(error))):
                raise
            self.note("refused, as documented")
            self.counts["refused"] += 1
            raise Refused from error
        if not in_backward and not self.frozen:
            self.compare("the loss, AR and TAR", [total, self.reg.ar, self.reg.tar], [of_plain, ar, tar])
        for run in self.runs:
            run.taken, run.missed = run.taken or run in reached, run not in reached

    def step(self) -> None:
        """Make a training step of one or several backwards, with evaluation in between, and compare."""
        draw = self.draw
        self.runs = []
        if self.use != "stepwise" and draw.random() < 0.4:
            self.windows()
        else:
            for _ in range(1 if self.use == "stepwise" else draw.choice([1, 1, 2])):
                self.runs_of_one_loss()
        if self.use == "in_backward" and self.runs[-1].kind == "train" and not self.frozen:
            self.compare("AR and TAR", [self.reg.ar, self.reg.tar], [*self.terms(self.runs[-1:])])
        self.same_gradients("the gradients")

    def some_kinds(self) -> list[str]:
        kinds = ["train"] * self.draw.randint(1, 3)
        if self.draw.random() < 0.5:
            kinds.insert(self.draw.randint(0, len(kinds)), self.draw.choice(["evaluation", "no gradients"]))
        return kinds

    def windows(self) -> None:
        """Run windows of one sequence, whose graphs may be kept, or parts of a batch; each has a loss."""
        draw, before, kinds = self.draw, None, self.some_kinds()
        last = max(i for i, kind in enumerate(kinds) if kind == "train")
        by_state = self.kinds[-1] != "elementwise" and (self.layers == "last" or len(self.kinds) == 1)
        carried = draw.choice(["nothing", "detached"] + ["graph"] * (self.use == "loss" or by_state))
        for i, kind in enumerate(kinds):
            run = self.run(kind, before if carried != "nothing" else None, carried == "detached")
            if kind == "train":
                self.regularize(self.loss([run]), draw.choice(["plain", "plain", "twice"]), i < last)
                before = run

    def runs_of_one_loss(self) -> None:
        """Make several runs, and a loss on some of them and on earlier runs that had none."""
        draw, before = self.draw, None
        carries = self.use == "stepwise" or (self.use == "loss" and draw.random() < 0.5)
        for kind in self.some_kinds():
            run = self.run(kind, before if carries and kind == "train" else None)
            before = run if kind == "train" else before
        others = [run for run in self.runs if run.kind == "evaluation"][: draw.randint(0, 1)]
        hows = ["plain", "plain", "twice", "mixed", "another"] + ["alone"] * (self.use != "in_backward")
        if self.dtype == torch.float64:
            hows += ["second"] * (4 if self.use == "stepwise" else 1)
        loss = self.loss([run for run in self.runs if run.kind == "train" and not run.taken])
        self.regularize(loss + (self.loss(others) if others else []), draw.choice(hows), True)
        if self.use != "in_backward" and draw.random() < 0.1:
            self.is_refused(loss)

    def is_refused(self, loss: Loss) -> None:
        """Check that no run is regularized with a second loss."""
        message = "no error"
        try:
            self.reg.on_backward_begin(total_of(loss, 0))
        except RuntimeError as error:
            message = str(error)
        assert self.frozen or "nothing was captured" in message, f"a second loss: {message}"

    def same_gradients(self, what: str) -> None:
        """Compare the gradients of both sides, and clear them."""
        self.compare(what, *([x.grad for x in parameters(net)] for net in (self.net, self.plain)))
        for net in (self.net, self.plain):
            net.zero_grad()

    def compare(self, what: str, got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
        """Compare tensors by their norms; a norm far below the largest counts as a hundredth of that."""
        pairs = [(torch.zeros(()) if x is None else x.detach().double() for x in both) for both in zip(got, want)]  # noqa: B905
        errors, norms = zip(*[((x - y).norm(), y.norm()) for x, y in pairs], strict=True)
        floor = max(norms) / 100
        error = max(float(x / max(y, floor)) if x > 0 else 0.0 for x, y in zip(errors, norms, strict=True))
        self.counts["compared"] += 1
        assert error < RTOL[self.dtype], f"{what}: relative error {error:.2g}"

    def play(self, steps: int = 4) -> None:
        for _ in range(steps):
            try:
                self.step()
                self.counts["steps"] += 1
            except Refused:
                self.reg.clear()
            for net in (self.net, self.plain):
                net.zero_grad()
            with torch.no_grad():
                for x in self.net.parameters():
                    x += 0.1 * torch.randn_like(x)
            self.plain.load_state_dict(self.net.state_dict())
            if self.draw.random() < 0.5:
                self.change_coefficients()


class Refused(Exception):
    """The rest of a step is left out, as fastreg has refused a part."""


def detached(x: Tensor) -> Tensor:
    """Detach a state in place, as training loops do, where it is no view."""
    return x.detach() if x._is_view() else x.detach_()


def parameters(net: nn.Module) -> list[nn.Parameter]:
    return [x for x in net.parameters() if x.requires_grad]


def mean(x: Tensor, counts: Tensor) -> Tensor:
    """Return the mean square of the rows that count; 0 for none."""
    return (x.square() * counts.unsqueeze(-1)).sum() / (counts.sum() * x.shape[-1]).clamp(min=1)


def total_of(loss: Loss, side: int, more: Any = torch.clone) -> Tensor:
    return torch.stack([more(w * f(run.part(part, side)).mean()) for run, part, f, w in loss]).sum()


if __name__ == "__main__":
    play_all(Play)
