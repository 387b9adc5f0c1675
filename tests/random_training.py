"""Random training steps with `attach`, compared with plain PyTorch in float64.

`python -m tests.random_training --seed 0 --count 2000` trains 2,000 nets. It prints the seed and the events of each in
which a loss, AR, TAR or a gradient is wrong, or an error or a warning comes. All steps are right as documented, and
compare values and gradients: tables in `tests/attach` say which runs count, and which losses are errors. At the end it
prints how often each kind of event was played.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from fastreg import FusedDropout, FusedRNNDropout, RNNRegularizer
from tests.language_model import Drawn, Elementwise, Locked
from tests.random_calls import play_all

BATCH, HIDDEN, P = 3, 4, 0.4
KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "elementwise": Elementwise}
DROPOUTS: dict[str, Callable[[bool], nn.Module]] = {
    "none": lambda _: nn.Identity(),
    "plain, not attached": lambda _: nn.Dropout(P),
    "plain": lambda _: nn.Dropout(P),
    "of 0": lambda _: nn.Dropout(0.0),
    "locked": lambda batch_first: Locked(P, batch_first),
    "fused": lambda batch_first: FusedRNNDropout(P, 0, 0, batch_first=batch_first),
    "elementwise fused": lambda batch_first: FusedDropout(P, 0, 0, batch_first=batch_first),
}
IN_PLAIN: dict[str, Callable[[bool], nn.Module]] = {  # with the same masks
    **DROPOUTS,
    "fused": lambda batch_first: Locked(P, batch_first),
    "elementwise fused": lambda batch_first: Drawn(P, batch_first),
}
NOT_ATTACHED = "none", "plain, not attached"
DONE = torch.tensor([0, 2])  # where a state is reset
random_bits = torch.Generator().manual_seed(5)
MASKS = {name: torch.rand(BATCH, 8, generator=random_bits) < p for name, p in (("valid", 0.8), ("starts", 0.3))}
REGIONS = "the net", "the RNN", "the RNN and its dropout"  # which a checkpoint may run
GRADIENTS = "once", "twice", "of the gradients", "of activations, too", "of the penalty alone"

cp: Any = partial(checkpoint, use_reentrant=False)
Call = list[dict[str, Tensor]]  # the tensors from the net with the hooks, and those from the net in plain PyTorch


class Net(nn.Module):
    """Layers with a dropout each, and a GRU beside them; the last may share the module or the dropout of the first.

    It returns tensors by their names: its output, the GRU's output, and raw and dropped of all layers; and the states.
    """

    def __init__(self, play: Play, makes: Mapping[str, Callable[[bool], nn.Module]]) -> None:
        super().__init__()
        layers = [KINDS[kind](HIDDEN, HIDDEN, batch_first=play.batch_first) for kind in play.kinds]
        after = [makes[name](play.batch_first) for name in play.dropouts]
        layers[-1] = layers[0] if play.shared == "module" else layers[-1]
        after[-1] = after[0] if play.shared else after[-1]
        beside = nn.GRU(HIDDEN, HIDDEN, batch_first=play.batch_first)
        self.layers, self.dropouts = nn.ModuleList([beside, *layers]), nn.ModuleList([nn.Identity(), *after])
        self.decoder = nn.Linear(HIDDEN, 3)

    def forward(self, x: Any, states: Any, region: str, at: int) -> Any:
        tensors, after = {"beside": self.layer(0, "", x)[2]}, []
        for i in range(1, len(self.layers)):
            layer = partial(self.layer, i, region if i == at else "")
            if i == at and region == "the RNN and its dropout":
                layer = partial(cp, layer)
            raw, state, x = layer(*((x,) if states is None else (x, states[i - 1])))
            after.append(state)
            tensors |= {f"raw of {i}": raw, f"dropped of {i}": x}
        return tensors | {"out": self.decoder(x)}, after

    def layer(self, i: int, region: str, *given: Any) -> Any:
        rnn = self.layers[i]
        raw, state = cp(rnn, *given) if region == "the RNN" else rnn(*given)
        return raw, state, self.dropouts[i](raw)


class Plain(Net):
    """The same net in plain PyTorch, which follows the documentation of `attach` by hand."""

    def __init__(self, play: Play) -> None:
        super().__init__(play, IN_PLAIN)
        self.play = play
        self.runs = list[tuple[list[Tensor], list[Tensor]]]()  # AR and TAR, and the tensors that are marked for the run

    def layer(self, i: int, region: str, *given: Any) -> Any:
        """Run a layer and its dropout, and mark tensors by copies: a loss that depends on a copy depends on the run."""
        marked, name = list[Tensor](), ["none", *self.play.dropouts][i]

        def mark(x: Tensor) -> Tensor:
            marked.append(x.clone())
            return marked[-1]

        raw, state = self.layers[i](*given)
        if name in NOT_ATTACHED:
            terms, raw = self.terms(raw, raw), mark(raw)
            dropped = self.dropouts[i](raw)
        else:
            dropped = self.dropouts[i](raw)
            terms, dropped = self.terms(raw, dropped), mark(dropped)
        self.runs.append((terms, marked))
        return raw, tree_map(mark, state), dropped

    def terms(self, *tensors: Tensor) -> list[Tensor]:
        """Return AR and TAR of raw, and of raw or dropped, by the formula."""
        raw, squared = tensors if self.play.batch_first else [x.transpose(0, 1) for x in tensors]
        masks = {name: mask[:, : raw.shape[1]] for name, mask in self.play.masks.items()}
        valid = masks.get("valid", torch.ones(raw.shape[:2], dtype=torch.bool))
        pairs = valid[:, 1:] & valid[:, :-1] & ~masks.get("starts", torch.zeros_like(valid))[:, 1:]
        return [mean(squared, valid), mean(raw.diff(dim=1), pairs)]

    def counted(self, loss: Tensor) -> list[list[Tensor]]:
        """Return AR and TAR of the runs on which a loss depends."""
        options: Any = {"retain_graph": True, "allow_unused": True}
        xs = [[x for x in marked if x.requires_grad] for _, marked in self.runs]  # a state may have been detached
        is_found = [any(x is not None for x in torch.autograd.grad(loss, of_run, **options)) for of_run in xs]
        return [terms for (terms, _), found in zip(self.runs, is_found, strict=True) if found]


class Play:
    """Random training steps of a net."""

    def __init__(self, seed: int, compiles: float = 0.2) -> None:
        """Draw a net from a seed, which is compiled by chance."""
        draw = self.draw = random.Random(seed)
        torch.manual_seed(seed)
        count = draw.randint(1, 3)
        self.compiled = draw.random() < compiles
        self.batch_first, self.carries = draw.random() < 0.7, draw.random() < 0.7
        self.regions = ["", "", "", "", *REGIONS]
        if self.compiled:  # code that is compiled for states may be taken for a recomputation, which PyTorch refuses
            self.regions = [""] if self.carries else ["", "the net"]
        self.shared = draw.choice(["", "", "", "module", "dropout"]) if count > 1 else ""
        self.kinds, self.dropouts = ([draw.choice([*names]) for _ in range(count)] for names in (KINDS, DROPOUTS))
        self.dropouts[-1] = self.dropouts[0 if self.shared else -1]
        self.kinds[-1] = self.kinds[0 if self.shared == "module" else -1]
        self.masks = {name: MASKS[name] for name in draw.choice([(), (), (), ("valid",), ("starts",), (*MASKS,)])}
        self.net, self.plain = Net(self, DROPOUTS).double(), Plain(self).double()
        self.plain.load_state_dict(self.net.state_dict())
        self.sides: list[Any] = [self.net, self.plain]
        if self.compiled:
            torch._dynamo.reset()
            self.sides[0] = torch.compile(self.net, backend="eager")
        self.states: Any = None  # of the last call of each net, which the next call may get
        self.events, self.counts = list[str](), Counter[str]()
        self.counts.update([*self.kinds, *self.dropouts, *self.masks, f"{count} layers", f"shared {self.shared}"])
        self.reg = RNNRegularizer(0, 0)
        options: Any = {name: partial(self.mask_for, mask) for name, mask in self.masks.items()}
        for rnn, i in {rnn: i for i, rnn in enumerate(self.net.layers)}.items():
            is_attached = i > 0 and self.dropouts[i - 1] not in NOT_ATTACHED
            self.reg.attach(rnn, self.net.dropouts[i] if is_attached else None, **options)

    def mask_for(self, mask: Tensor, x: Tensor, *_: Any) -> Tensor:
        """Return a mask of (batch, time) for an input, with its axes in the input's order."""
        return mask[:, : x.shape[1]] if self.batch_first else mask[:, : x.shape[0]].t()

    def note(self, kind: str, more: str = "") -> None:
        """Note an event, and count its kind."""
        self.events.append(f"{kind} {more}")
        self.counts[kind] += 1

    def __str__(self) -> str:
        names = ["compiled", "kinds", "dropouts", "shared", "batch_first"]
        plan = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return "\n  ".join([f"{plan}, masks={[*self.masks]}", *self.events])

    def change_coefficients(self) -> None:
        """Change alpha and beta: to numbers, to other tensors, or in place."""
        self.coefficients = self.draw.choice([(2.0, 1.0), (0.75, 3.0), (1.5, 0.0), (0.0, 2.0), (0.0, 0.0)])
        kind = self.draw.choice(("numbers", "tensors", "in place"))
        self.note(f"coefficients: {kind}", f"{self.coefficients}")
        for name, value in zip(("alpha", "beta"), self.coefficients, strict=True):
            if kind == "in place" and isinstance(getattr(self.reg, name), Tensor):
                getattr(self.reg, name).fill_(value)
            else:
                setattr(self.reg, name, value if kind == "numbers" else torch.tensor(value))

    def call(self) -> Call:
        """Call both nets with the same input and the same masks of dropout."""
        draw, states = self.draw, self.carried()
        steps = 3 if self.compiled else draw.randint(2, 6)
        region, at, seed = draw.choice(self.regions), draw.randint(1, len(self.kinds)), draw.randrange(1000)
        self.note(f"call: {region and region + ' checkpointed'}", f"layer {at}")
        x = torch.randn(*((BATCH, steps) if self.batch_first else (steps, BATCH)), HIDDEN).double()
        call, after = Call(), []
        for side, net in enumerate(self.sides):
            torch.manual_seed(seed)
            through = partial(cp, net) if side == 0 and region == "the net" else net
            made, state = through(x, states and states[side], "" if side else region, at)
            after.append(state)
            call.append(made | {f"state {i}": y for i, y in enumerate(tree_leaves(state))})
        self.states = after
        return call

    def carried(self) -> Any:
        """Return the states of the last call for the next, or `None`; a part of them may be reset in place."""
        how = self.draw.choice(["none", "none", "detached", "with their graph"])
        states = self.states
        if states is None or how == "none" or not self.carries:
            return None
        if how == "detached":  # in place, as training loops do, where a state is no view
            states = tree_map(lambda x: x.detach() if x._is_view() else x.detach_(), states)
        self.note(f"states {how}")
        # The elementwise state is a view of raw, which PyTorch protects.
        if "elementwise" not in self.kinds and self.draw.random() < 0.4:
            self.note(f"states {how}, reset in place")
            for x in tree_leaves(states):
                x[..., DONE] = 0
        return states

    def loss(self, calls: Sequence[Call]) -> list[Tensor]:
        """Return a loss of each side, on some of the tensors that calls have returned."""
        draw, losses = self.draw, list[Tensor]()
        named = [(i, name) for i, call in enumerate(calls) for name, x in call[1].items() if x.requires_grad]
        parts = draw.sample(named, min(len(named), draw.randint(1, 4)))
        functions = draw.choices([torch.sin, torch.square, torch.tanh], k=len(parts))
        self.note(f"loss on {len(parts)} tensors", f"{parts}")
        for side in (0, 1):
            of_parts = [f(calls[i][side][name]).mean() for f, (i, name) in zip(functions, parts, strict=True)]
            losses.append(torch.stack(of_parts).sum())
        return losses

    def step(self) -> None:
        """Call the nets, regularize a loss, and compare it and its gradients; then change the parameters."""
        self.plain.runs.clear()
        self.change_coefficients()
        calls = [self.call() for _ in range(self.draw.randint(1, 3))]
        losses = self.loss(calls)
        counted, how = self.plain.counted(losses[1]), self.draw.choice(GRADIENTS)
        if counted:  # a loss of raw alone is an error
            self.note(f"gradients {how}", f"of {len(counted)} runs")
            ar, tar = (torch.stack(terms).sum() for terms in zip(*counted, strict=True))
            penalty = self.coefficients[0] * ar + self.coefficients[1] * tar
            if how == "of the penalty alone":
                taken: Any = self.reg.take(losses[0])
                totals = [taken.penalty, penalty]
            else:
                totals = [self.reg.on_backward_begin(losses[0]), losses[1] + penalty]
            compare([totals[0], self.reg.ar, self.reg.tar], [totals[1], ar, tar])
            compare(*(self.gradients(side, calls, totals[side], how) for side in (0, 1)))
            self.counts["compared"] += 1
        with torch.no_grad():
            for x in self.net.parameters():
                x += 0.1 * torch.randn_like(x)
        self.plain.load_state_dict(self.net.state_dict())
        self.states = tree_map(torch.detach, self.states)

    def gradients(self, side: int, calls: Sequence[Call], total: Tensor, how: str) -> Sequence[Tensor]:
        """Return the gradients of one side, after a backward of a kind."""
        xs: list[Tensor] = [*(self.net, self.plain)[side].parameters()]
        options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        total = total + 0 * torch.stack([x.sum() for x in xs]).sum()  # the penalty may need no gradient
        if how == "of the gradients":
            first = torch.autograd.grad(total, xs, create_graph=True, **options)
            total = total + torch.stack([x.square().sum() for x in first]).sum()
        if how == "of activations, too":  # that the net has returned, and attach may have marked
            names = [(call, name) for call in calls for name, x in call[1].items() if x.requires_grad]
            xs += [call[side][name] for call, name in names]
        if how == "twice":
            torch.autograd.grad(total, xs, **options)
        return torch.autograd.grad(total, xs, **options)

    def play(self, steps: int = 5) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "attach|FusedRNNDropout|on_backward_begin")
            for _ in range(steps):
                self.step()


def compare(got: Sequence[Any], want: Sequence[Tensor]) -> None:
    torch.testing.assert_close([*got], [*want], rtol=1e-9, atol=1e-11)


def mean(x: Tensor, counts: Tensor) -> Tensor:
    """Return the mean square of the rows that count; 0 for none."""
    return (x.square() * counts.unsqueeze(-1)).sum() / (counts.sum() * x.shape[-1]).clamp(min=1)


if __name__ == "__main__":
    play_all(Play)
