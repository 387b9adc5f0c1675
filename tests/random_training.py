"""Random sequences of training steps with `attach`, compared with plain PyTorch in float64.

`python -m tests.random_training --seed 0 --count 2000` plays 2,000 sequences. It prints the seed and the events of each
in which a loss, AR, TAR or a gradient is wrong, or an error or a warning comes. All steps are right as documented:
which losses are errors is a table in `tests/attach/test_runs.py`. At the end it prints how often each kind of event was
played.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout, RNNRegularizer
from tests.language_model import Elementwise, Locked, Loop, Quantizer
from tests.random_calls import play_all

BATCH, HIDDEN, P = 3, 4, 0.4
KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "cell": Loop, "elementwise": Elementwise}
DROPOUTS: dict[str, Callable[[bool], nn.Module]] = {
    "none": lambda _: nn.Identity(),
    "plain, not attached": lambda _: nn.Dropout(P),
    "plain": lambda _: nn.Dropout(P),
    "of 0": lambda _: nn.Dropout(0.0),
    "locked": lambda batch_first: Locked(P, batch_first),
    "fused": lambda batch_first: FusedRNNDropout(P, batch_first=batch_first),
    "fused, AR of raw": lambda batch_first: FusedRNNDropout(P, batch_first=batch_first, ar_of="raw"),
    "quantizer": lambda _: Quantizer(),
}
DONE = torch.tensor([0, 2])  # where a state is reset
NOT_ATTACHED = "none", "plain, not attached"
random_bits = torch.Generator().manual_seed(5)
MASKS = {name: torch.rand(BATCH, 8, generator=random_bits) < p for name, p in (("valid", 0.8), ("starts", 0.3))}
EVENTS = "the net checkpointed", "the RNN checkpointed", "the RNN and its dropout checkpointed"


class Net(nn.Module):
    """Layers with a dropout each, and a GRU beside them; the last may share the module or the dropout of the first.

    It returns tensors by their names: its output, raw and dropped of all layers if it keeps them, and the output of the
    GRU if that has run; and the states.
    """

    def __init__(self, dropouts: Sequence[str], play: Play) -> None:
        super().__init__()
        first, last = play.batch_first, len(play.kinds) - 1
        layers = [KINDS[kind](HIDDEN, HIDDEN, batch_first=first) for kind in play.kinds]
        after = [DROPOUTS[name](first) for name in dropouts]
        layers[last] = layers[0 if play.shared == "module" else last]
        after[last] = after[0 if play.shared else last]
        self.layers, self.dropouts = nn.ModuleList(layers), nn.ModuleList(after)
        self.decoder, self.keeps = nn.Linear(HIDDEN, 3), play.keeps
        self.beside = nn.GRU(HIDDEN, HIDDEN, batch_first=first)

    def forward(self, x: Any, states: Any = None, event: str = "", at: int = 0, beside: bool = False) -> Any:
        tensors, after = {"beside": self.beside(x)[0]} if beside else {}, []
        for i in range(len(self.layers)):
            given = (x,) if states is None else (x, states[i])
            through = partial(self.through, i, event if i == at else "")
            if i == at and event == "the RNN and its dropout checkpointed":
                through = partial(checkpoint, through, use_reentrant=False)
            raw, state, x = through(*given)
            after.append(state)
            tensors |= {f"raw of {i}": raw, f"dropped of {i}": x} if self.keeps else {}
        return tensors | {"out": self.decoder(x)}, after

    def through(self, i: int, event: str, *given: Any) -> Any:
        """Run a layer and its dropout."""
        layer, dropout = self.layers[i], self.dropouts[i]
        if event == "the RNN checkpointed":
            layer = partial(checkpoint, layer, use_reentrant=False)
        raw, state = layer(*given)
        return raw, state, dropout(raw)


@dataclass(eq=False)
class Run:
    """A run of an attached module, in training and with gradients enabled."""

    module: nn.Module  # on the side of plain PyTorch
    raw: Tensor
    coefficients: tuple[float, float]
    terms: Any = None  # AR and TAR, once dropped is computed
    is_taken: bool = False  # by a loss, or dropped by `clear()`


class ByHand:
    """Follow the documentation of `attach` by hooks in plain PyTorch: a marked tensor's node leads to its run."""

    def __init__(self, play: Play, net: Net) -> None:
        self.play, self.runs, self.marks = play, list[Run](), dict[Any, Run]()
        self.dropouts = dict(zip(net.layers, play.dropouts, strict=True))
        if play.has_beside:
            self.dropouts[net.beside] = "none"
        for module in self.dropouts:
            module.register_forward_hook(self.after_module)
        for dropout in {*net.dropouts}:
            dropout.register_forward_hook(self.after_dropout)

    def after_module(self, module: nn.Module, args: Any, result: Any) -> Any:
        if not (module.training and torch.is_grad_enabled() and module in self.dropouts):
            return None
        raw, state = result
        run = Run(module, raw, self.play.coefficients)
        self.runs.append(run)
        if self.dropouts[module] in NOT_ATTACHED:
            raw = self.measured(run, raw)
        return raw, tree_map(partial(self.mark, run), state)

    def after_dropout(self, _: nn.Module, args: Any, dropped: Tensor) -> Any:
        run = next((run for run in self.runs[::-1] if run.raw is args[0]), None)
        return None if run is None or self.dropouts[run.module] in NOT_ATTACHED else self.measured(run, dropped)

    def measured(self, run: Run, dropped: Tensor) -> Tensor:
        """Form AR and TAR of a run by the formula, and return dropped, marked; a frozen run adds nothing."""
        squared = run.raw if "AR of raw" in self.dropouts[run.module] else dropped
        squared, raw = (x if self.play.batch_first else x.transpose(0, 1) for x in (squared, run.raw))
        masks = {name: mask[:, : raw.shape[1]] for name, mask in self.play.masks.items()}
        valid = masks.get("valid", torch.ones(raw.shape[:2], dtype=torch.bool))
        pairs = valid[:, 1:] & valid[:, :-1] & ~masks.get("starts", torch.zeros_like(valid))[:, 1:]
        run.terms, run.is_taken = (mean(squared, valid), mean(raw.diff(dim=1), pairs)), not dropped.requires_grad
        return self.mark(run, dropped)

    def mark(self, run: Run, x: Tensor) -> Tensor:
        """Return a copy of a tensor, by whose node the run is found."""
        if not x.requires_grad:
            return x
        copy = x.clone()
        self.marks[copy.grad_fn] = run
        return copy

    def counted(self, loss: Tensor) -> list[Run]:
        """Return the runs that are marked in the graph of a loss, and that no earlier loss has taken."""
        left, seen = list[Any]([loss.grad_fn]), set[Any]([None])
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                left += [following for following, _ in node.next_functions]
        return [*{run: None for node, run in self.marks.items() if node in seen and not run.is_taken}]


@dataclass(eq=False)
class Call:
    """A call of the net on both sides, with the hooks of fastreg and in plain PyTorch, and its runs of modules."""

    kind: str  # "train", "evaluation" or "no gradients"
    tensors: list[dict[str, Tensor]]  # what the net of each side returned, by names
    states: list[Any]  # of each side
    runs: list[Run]


Loss = list[tuple[Call, str, Any, float]]  # the tensors that it sums up: a call, its name, a function and a weight


class Play:
    """A random sequence of training steps."""

    def __init__(self, seed: int, compiles: float = 0.2) -> None:
        """Draw a net from a seed, which is compiled by chance."""
        draw = self.draw = random.Random(seed)
        torch.manual_seed(seed)
        count, self.has_beside = draw.randint(1, 3), draw.random() < 0.7
        self.compiled, self.batch_first, self.keeps = [draw.random() < p for p in (compiles, 0.7, 0.6)]
        self.shared = draw.choice(["", "", "", "module", "dropout"]) if count > 1 else ""
        self.frozen = draw.choices(["", "first", "all"], [7, 2, 1])[0]
        self.kinds, self.dropouts = ([draw.choice([*names]) for _ in range(count)] for names in (KINDS, DROPOUTS))
        if self.shared:
            self.dropouts[-1] = self.dropouts[0]
        if self.shared == "module":
            self.kinds[-1] = self.kinds[0]
            self.frozen = self.frozen and "all"
        self.masks = {name: MASKS[name] for name in draw.choice([(), (), (), ("valid",), ("starts",), (*MASKS,)])}
        self.net = Net(self.dropouts, self).double()
        self.plain = Net(["locked" if "fused" in name else name for name in self.dropouts], self).double()
        self.nets = self.net, self.plain
        for net in self.nets:
            net.layers[: {"": 0, "first": 1, "all": count}[self.frozen]].requires_grad_(False)
            net.beside.requires_grad_(not (self.frozen and self.has_beside))
        self.plain.load_state_dict(self.net.state_dict())
        self.events, self.counts = list[str](), Counter[str]()
        self.sides: list[Any] = [self.net, self.plain]
        self.calls: list[Call] = []  # whose graphs are alive
        self.last: Call | None = None  # whose states the next call may get
        self.checkpointed = False  # a call whose graph is alive
        if self.compiled:
            torch._dynamo.reset()
            self.sides[0] = torch.compile(self.net, backend="eager")
        self.counts.update([*self.kinds, *self.dropouts, *self.masks, f"{count} layers"])
        self.counts.update([f"shared {self.shared}", f"frozen {self.frozen}", f"batch first {self.batch_first}"])
        self.reg = RNNRegularizer(0, 0)
        time = int(self.batch_first)
        options: Any = {name: lambda x, *_, m=mask: m[:, : x.shape[time]] for name, mask in self.masks.items()}
        for layer, at in {layer: i for i, layer in enumerate(self.net.layers)}.items():
            dropout = None if self.dropouts[at] in NOT_ATTACHED else self.net.dropouts[at]
            self.reg.attach(layer, dropout, **options)
        if self.has_beside:
            self.reg.attach(self.net.beside, **options)
        self.by_hand = ByHand(self, self.plain)
        self.change_coefficients()

    def note(self, kind: str, more: str = "") -> None:
        """Note an event, and count its kind."""
        self.events.append(f"{kind} {more}")
        self.counts[kind] += 1

    def __str__(self) -> str:
        names = ["compiled", "kinds", "dropouts", "shared", "frozen", "batch_first", "keeps"]
        plan = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return "\n  ".join([f"{plan}, masks={[*self.masks]}", *self.events])

    # The coefficients

    def change_coefficients(self, *kinds: str) -> None:
        """Change alpha and beta: to numbers, to other tensors, or in place. A loss would refuse the runs before."""
        if self.checkpointed:
            return  # a recomputation would save other tensors than the forward
        self.clear()
        self.coefficients = self.draw.choice([(2.0, 1.0), (0.75, 3.0), (1.5, 0.0), (0.0, 2.0), (0.0, 0.0)])
        kind = self.draw.choice(kinds or ("numbers", "tensors", "in place"))
        self.note(f"coefficients: {kind}", f"{self.coefficients}")
        for name, value in zip(("alpha", "beta"), self.coefficients, strict=True):
            if kind == "in place" and isinstance(getattr(self.reg, name), Tensor):
                getattr(self.reg, name).fill_(value)
            else:
                setattr(self.reg, name, value if kind == "numbers" else torch.tensor(value))

    def clear(self) -> None:
        self.note("clear()")
        self.reg.clear()
        for run in self.by_hand.runs:
            run.is_taken = True

    # The events of a step

    def run(self, kind: str = "", carries: bool = True) -> Call:
        """Run the net of each side with the same input and the same masks of dropout."""
        draw, carried = self.draw, self.carried() if carries else None
        kind = kind or draw.choices(["train", "no gradients", "evaluation"], [10, 1, 1])[0]
        steps, event, at = 3 if self.compiled else draw.randint(2, 6), "", draw.randrange(len(self.kinds))
        beside = self.has_beside and (self.compiled or draw.random() < 0.8)
        if kind == "train":
            event = draw.choice(["", "", "", "", *EVENTS[: 1 if self.compiled else 3]])
        self.checkpointed = self.checkpointed or "checkpointed" in event
        self.note(f"call: {kind} {event}", f"is call {len(self.calls)}; layer {at}")
        x = torch.randn(*((BATCH, steps) if self.batch_first else (steps, BATCH)), HIDDEN).double()
        seed, before, made = draw.randrange(1000), len(self.by_hand.runs), list[Any]()
        for i in (1, 0):  # in plain PyTorch first, which says what to expect
            net, module = self.sides[i], self.nets[i]
            module.train(kind != "evaluation")
            torch.manual_seed(seed)
            given = x, carried and carried[i], "" if i and "checkpointed" in event else event, at, beside
            through = partial(checkpoint, net, use_reentrant=False) if "the net" in event and not i else net
            with torch.set_grad_enabled(kind != "no gradients"):
                tensors, states = through(*given)
            made.insert(0, (tensors | {f"state {j}": x for j, x in enumerate(tree_leaves(states))}, states))
            module.train()
        self.last = Call(kind, [x for x, _ in made], [x for _, x in made], self.by_hand.runs[before:])
        self.calls.append(self.last)
        return self.last

    def carried(self) -> Any:
        """Return the states of the last call for the next, or `None`; a part of them may be reset in place."""
        how = self.draw.choice(["none", "none", "detached", "with their graph"])
        if self.last is None or how == "none" or (self.compiled and self.checkpointed):
            return None  # code that is compiled for states may be taken for a recomputation, which PyTorch refuses
        how = how if self.last in self.calls else "detached"
        states = tree_map(detached, self.last.states) if how == "detached" else self.last.states
        self.note(f"states {how}")
        # The elementwise state is a view of raw, which PyTorch protects.
        if self.last.kind == "train" and "elementwise" not in self.kinds and self.draw.random() < 0.4:
            self.note(f"states {how}, reset in place")
            for x in tree_leaves(states):
                x[..., DONE] = 0
        return states

    def candidates(self) -> list[Call]:
        return [call for call in self.calls if call.kind == "train" and not all(run.is_taken for run in call.runs)]

    def loss(self) -> Loss:
        """Return a loss on calls, most often on those that no loss has taken."""
        draw, parts = self.draw, list[Any]()
        calls = self.candidates() if draw.random() < 0.9 else self.calls
        calls = calls or self.calls
        for call in draw.sample(calls, draw.randint(1, len(calls))):
            names = [name for name, x in call.tensors[1].items() if x.requires_grad]
            names = names if draw.random() < 0.4 else [name for name in names if name in ("out", "beside")]
            for name in draw.sample(names, min(len(names), draw.randint(1, 2))):
                parts.append((call, name, draw.choice([torch.sin, torch.square, torch.tanh]), draw.random()))
        on = [(self.calls.index(call), name, f.__name__) for call, name, f, _ in parts]
        self.note(f"loss on {len(parts)} calls", f"{on}")
        return parts

    def step(self) -> None:
        """Regularize a loss, or forget it, make a backward on each side, and compare."""
        draw, by_hand = self.draw, self.by_hand
        if not self.candidates() or draw.random() < 0.1:
            self.run("train")
        loss, keeps_graph = self.loss(), draw.random() < 0.7
        if not loss:
            return
        losses = [total_of(loss, side) for side in (0, 1)]
        counted = by_hand.counted(losses[1])
        hows = ["plain"] * 3 + ["twice", "second", "gradients of raw", "alone"] if counted else []
        how = draw.choice([*hows, "forgotten", "an attack"])
        self.note(f"backward: {how}", f"of {len(counted)} runs{', graph kept' * keeps_graph}")
        if how in ("forgotten", "an attack"):
            self.backward(loss, losses, how, True)
            return
        if how != "alone" and draw.random() < 0.5:
            total = self.reg.on_backward_begin(losses[0])
        else:
            taken: Any = self.reg.take(losses[0])
            total = taken.penalty if how == "alone" else losses[0] + taken.penalty
        ar, tar = (torch.stack(terms).sum() for terms in zip(*[run.terms for run in counted], strict=True))
        want: Any = sum(a * run.terms[0] + b * run.terms[1] for run in counted for a, b in [run.coefficients])
        want = want if how == "alone" else losses[1] + want
        self.compare("the loss, AR and TAR", [total, self.reg.ar, self.reg.tar], [want, ar, tar])
        for run in counted:
            run.is_taken = True
        self.backward(loss, [total, want], how, keeps_graph)
        if not keeps_graph:
            self.drop("the graph is freed")

    def backward(self, loss: Loss, totals: Sequence[Tensor], how: str, keeps_graph: bool) -> None:
        """Make a backward on each side, in one of many ways, and compare the gradients."""
        if how in ("gradients of raw", "an attack"):  # and of all that the net returned, which attach may have marked
            names = [(call, name) for call, *_ in loss for name, x in call.tensors[1].items() if x.requires_grad]
            by = [[*(call.tensors[i][name] for call, name in names), *parameters(self.nets[i])] for i in (0, 1)]
            options: Any = {"retain_graph": True, "allow_unused": True}
            gradients = [torch.autograd.grad(x, xs, **options) for x, xs in zip(totals, by, strict=True)]
            self.compare("the gradients of activations", *gradients)
        if how == "an attack":
            return
        if self.draw.random() < 0.1:
            self.change_coefficients("numbers", "tensors")  # which is too late; in place it is an error
        for keeps in [True, keeps_graph] if how == "twice" else [keeps_graph]:
            for net, x in zip(self.nets, totals, strict=True):
                if how == "second":
                    first = torch.autograd.grad(x, parameters(net), create_graph=True, allow_unused=True)
                    x = torch.stack([y.square().sum() for y in first if y is not None]).sum()
                if x.requires_grad:
                    x.backward(retain_graph=keeps)
        self.compare("the gradients", *([x.grad for x in parameters(net)] for net in self.nets))
        for net in self.nets:
            net.zero_grad()

    def train_step(self) -> None:
        """Change the parameters, as an optimizer does, and often the coefficients."""
        with torch.no_grad():
            for x in self.net.parameters():
                x += 0.1 * torch.randn_like(x)
        self.plain.load_state_dict(self.net.state_dict())
        self.drop("a step of the optimizer")
        if self.draw.random() < 0.5:
            self.change_coefficients()

    def drop(self, event: str) -> None:
        """Drop all graphs of calls; their states may be carried on, detached."""
        self.note(event)
        self.calls, self.checkpointed = [], False
        self.by_hand.marks.clear()
        if self.last is not None:
            self.last = Call(self.last.kind, [], tree_map(torch.detach, self.last.states), [])

    def play(self, events: int = 14) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "attach|FusedRNNDropout|on_backward_begin")
            warnings.filterwarnings("ignore", "attach: the penalties of .* got no gradient")  # of steps that forget it
            for _ in range(events):
                weights: dict[Any, float] = {self.run: 6, self.step: 8, self.train_step: 2}
                weights |= {self.clear: 0.3, self.change_coefficients: 1}
                self.draw.choices([*weights], [*weights.values()])[0]()
            self.clear()
            self.step()

    # The comparisons

    def compare(self, what: str, got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
        """Compare tensors by their norms; a norm far below the largest counts as a hundredth of that."""
        pairs = [[torch.zeros(()) if x is None else x.detach() for x in both] for both in zip(got, want, strict=True)]
        floor = max(y.norm() for _, y in pairs) / 100
        error = max(float((x - y).norm() / max(y.norm(), floor)) if x.ne(y).any() else 0.0 for x, y in pairs)
        self.counts["compared"] += 1
        assert error < 1e-9, f"{what}: relative error {error:.2g}"


def detached(x: Tensor) -> Tensor:
    """Detach a state in place, as training loops do, where it is no view."""
    return x.detach() if x._is_view() else x.detach_()


def parameters(net: nn.Module) -> list[nn.Parameter]:
    return [x for x in net.parameters() if x.requires_grad]


def mean(x: Tensor, counts: Tensor) -> Tensor:
    """Return the mean square of the rows that count; 0 for none."""
    return (x.square() * counts.unsqueeze(-1)).sum() / (counts.sum() * x.shape[-1]).clamp(min=1)


def total_of(loss: Loss, side: int) -> Tensor:
    return torch.stack([w * f(call.tensors[side][name]).mean() for call, name, f, w in loss]).sum()


if __name__ == "__main__":
    play_all(Play)
