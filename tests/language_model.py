"""Small language models that the tests of `RNNRegularizer` train, and the loop that trains them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg import FusedDropout, FusedRNNDropout, RNNRegularizer

VOCABULARY, HIDDEN, BATCH, TIME = 11, 6, 3, 7
ALPHA, BETA = 2.0, 1.0
VALID, STARTS = torch.rand(2, BATCH, TIME, generator=torch.Generator().manual_seed(0)) < 0.6

PLAIN, FUSED = nn.Dropout, FusedRNNDropout
each_dropout = pytest.mark.parametrize("dropout", [None, PLAIN, FUSED], ids=["none", "plain", "fused"])
either = pytest.mark.usefixtures("either_dropout")  # a plain dropout, and one that forms the penalty


def dropout_of(kind: Any, p: float = 0.4, **options: Any) -> Any:
    """Make a dropout; a fused one has no penalty, unless it is attached."""
    return kind(p, 0, 0, **options) if kind in (FUSED, FusedDropout) else kind(p, **options)


def formula(raw: Tensor, dropped: Tensor, time: int, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    return alpha * dropped.pow(2).mean() + beta * raw.diff(dim=time).pow(2).mean()


class Elementwise(nn.Module):
    """A gated sum along time: a recurrent module that `torch.compile` compiles, unlike PyTorch's own."""

    def __init__(self, size: int, _: int, batch_first: bool) -> None:
        super().__init__()
        self.gate, self.batch_first = nn.Linear(size, size), batch_first

    def forward(self, x: Tensor, state: Any = None) -> Any:
        time = int(self.batch_first)
        raw = (0.0 if state is None else state) + (x * self.gate(x).sigmoid()).cumsum(time)
        return raw, raw.narrow(time, -1, 1)


class Locked(nn.Module):
    """Variational dropout in plain PyTorch, with the mask of a `FusedRNNDropout` of the same seed."""

    def __init__(self, p: float, batch_first: bool = True) -> None:
        super().__init__()
        self.p, self.batch_first = p, batch_first

    def forward(self, raw: Tensor) -> Tensor:
        row = raw.narrow(int(self.batch_first), 0, 1)
        return raw * torch.empty_like(row).bernoulli_(1 - self.p).div_(1 - self.p) if self.training else raw


class Drawn(nn.Module):
    """Elementwise dropout in plain PyTorch, with the mask of a `FusedDropout` of the same seed."""

    def __init__(self, p: float, batch_first: bool = True) -> None:
        super().__init__()
        self.fused = FusedDropout(p, 0, 0, batch_first=batch_first)

    def forward(self, raw: Tensor) -> Tensor:
        return raw * self.fused(torch.ones_like(raw, requires_grad=False))


class Model(nn.Module):
    """A language model that knows nothing of fastreg. One dropout serves embeddings and output, as is common."""

    kind_of_dropout: Any = nn.Dropout

    def __init__(self, kind: Any = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.rnn: Any = kind(HIDDEN, HIDDEN, batch_first=True)
        self.dropout = dropout_of(self.kind_of_dropout, 0.3)
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw, _ = self.rnn(self.dropout(self.embedding(x)))
        dropped = self.dropout(raw)
        return self.decoder(dropped), raw, dropped

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(x)[0]


class Triple(Model):
    """The same model as fastai's callbacks want it."""

    forward = Model.activations  # pyright: ignore[reportAssignmentType]

    def reset(self) -> None: ...


def seeded(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Make something, always with the same weights."""
    torch.manual_seed(0)
    return make(*args, **options)


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def gru() -> nn.GRU:
    return seeded(nn.GRU, HIDDEN, HIDDEN, batch_first=True)


def run(rnn: nn.Module, dropout: nn.Module | None, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return raw and dropped of a run."""
    raw, _ = rnn(inputs() if x is None else x)
    return raw, raw if dropout is None else dropout(raw)


class Returning(nn.Module):
    """A module of any arguments; the test chooses the part of its GRU's output that it returns."""

    batch_first = True

    def __init__(self, give: Callable[[Tensor], Any] = lambda raw: raw) -> None:
        super().__init__()
        self.rnn, self.give = gru(), give

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return self.give(self.rnn(x)[0])


class Run(NamedTuple):
    """The outputs of the modules in a run of `Attached`, and a loss."""

    raw: Any
    dropped: Any
    state: Any
    loss: Tensor


class Attached(nn.Module):
    """A module with a dropout, or none, and the regularizer that is attached to them; a linear layer follows.

    Args:
        kind: the class of an RNN, or a module.
        dropout: the class of the dropout, or `None`.
        options: further arguments of `attach`.
    """

    def __init__(self, kind: Any = nn.LSTM, dropout: Any = None, **options: Any) -> None:
        super().__init__()
        self.rnn: Any = kind if isinstance(kind, nn.Module) else kind(HIDDEN, HIDDEN, batch_first=True)
        self.dropout: Any = nn.Identity() if dropout is None else dropout_of(dropout)
        self.head, self.reg = nn.Linear(HIDDEN, HIDDEN), regularizer()
        self.attach = partial(self.reg.attach, self.rnn, dropout and self.dropout, **options)
        self.handle = self.attach()

    def check(self, *runs: Run, loss: Any = None, **tolerance: float) -> None:
        """Check that a loss, of the first run unless it is given, gets the penalties of runs, and their gradients."""
        loss = want = runs[0].loss if loss is None else loss
        for run in runs:
            raw, dropped = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (run.raw, run.dropped))
            want = want + formula(raw, dropped, 1)
        check_gradients(self, self.reg.on_backward_begin(loss), want, **tolerance)

    def begin(self, x: Any, state: Any = None) -> Any:
        raw, state = self.rnn(x, state)
        return raw, self.dropout(raw), state

    def end(self, raw: Any, dropped: Any, state: Any = None) -> Run:
        return Run(raw, dropped, state, self.head(dropped).sin().mean())

    def forward(self, x: Any, state: Any = None) -> Run:
        return self.end(*self.begin(x, state))


def inputs() -> Tensor:
    return torch.randn(BATCH, TIME, HIDDEN)


def tokens(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(VOCABULARY, shape or (BATCH, TIME), generator=torch.Generator().manual_seed(1)).to(device)


def criterion(decoded: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(decoded.flatten(0, -2), x.flatten())


def warned(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of a function, and its warnings, which have to point to the tests."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    assert all(Path(x.filename).is_relative_to(Path(__file__).parent) for x in caught)
    return result, [str(x.message) for x in caught]


def hooks_of(model: nn.Module) -> int:
    """Count the hooks of fastreg, without the idle hooks in a copy of a model."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(type(hook).__module__.startswith("fastreg") for hook in hooks)


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def assert_same_weights(model: nn.Module, other: nn.Module, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    torch.testing.assert_close([*model.parameters()], [*other.parameters()], rtol=rtol, atol=atol)


def assert_other_weights(model: nn.Module, other: nn.Module) -> None:
    with pytest.raises(AssertionError):
        assert_same_weights(model, other, rtol=1e-3, atol=1e-4)


def regularizer(**options: Any) -> RNNRegularizer:
    return RNNRegularizer(ALPHA, BETA, **options)


def attached(model: Model) -> RNNRegularizer:
    made = regularizer()
    made.attach(model.rnn, model.dropout)
    return made


def penalty_of(reg: RNNRegularizer, *outputs: Tensor) -> Tensor:
    """Return the penalty of the current captures, for a loss of 0 that depends on these outputs of the model."""
    return reg.on_backward_begin(sum((0 * x.sum() for x in outputs), torch.zeros(())))


def check_gradients(model: nn.Module, got: Tensor, want: Tensor, **tolerance: float) -> None:
    """Check a penalty or a loss, and its gradients, against a sum that autograd differentiates."""
    torch.testing.assert_close(got, want)
    parameters = [x for x in model.parameters() if x.requires_grad]
    options: Any = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    gradients = [torch.autograd.grad(x, parameters, **options) for x in (got, want)]
    torch.testing.assert_close(*gradients, **tolerance)
    assert any(x.abs().max() > 0 for x in gradients[1])
