"""`Paths`: the modules of a model that an adapter attaches to, named by their attribute paths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from fastreg.attach.source import Masks, batch_first_of, check_callable
from fastreg.call.problem import is_list
from fastreg.call.rnn_dropout import FusedRNNDropout


@dataclass(frozen=True)
class Swap:
    """Swap a dropout of a model for a fused one while a regularizer is attached.

    Attributes:
        path: the attribute path of the dropout.
        plain: the class of the dropout.
        fused: a function that makes a fused dropout from a probability.
    """

    path: str
    plain: type[Any]
    fused: Callable[[float], FusedRNNDropout]

    def into(self, model: nn.Module, undo: ExitStack) -> FusedRNNDropout:
        """Put a fused dropout into the model, in the same mode, until a stack is closed; return the fused dropout."""
        own: Any = _module_at(model, "dropout", self.path)
        if type(own) is not self.plain:
            raise ValueError(f"dropout: expected an {self.plain.__name__} to swap, got {type(own).__name__}")
        fused = self.fused(own.p).train(own.training)
        model.set_submodule(self.path, fused)
        undo.callback(lambda: model.set_submodule(self.path, own.train(fused.training)))
        return fused


@dataclass(frozen=True, eq=False)
class Paths:
    """Name the modules of a model by their attribute paths.

    Attributes:
        pairs: the path of each RNN, with the path of its dropout, a `Swap` or `None`; there are none if the model
            itself returns `(decoded, raw, dropped)`.
        masks: the functions of a batch that say which time steps count.
        output: as for `RNNRegularizer.attach`.
        batch_first: as for `RNNRegularizer.attach`.

    Raises:
        TypeError: `output` is neither callable nor `None`, or an option needs the path of an RNN, and there is none.
    """

    pairs: Sequence[tuple[str, str | Swap | None]] = ()
    masks: Masks = field(default_factory=Masks)
    output: Callable[[Any], Any] | None = None
    batch_first: bool | None = None

    def __post_init__(self) -> None:
        check_callable("output", self.output)
        if not self.pairs and (self.output, self.batch_first) != (None, None):
            raise TypeError("rnn: expected the path of the RNN that output and batch_first describe, got None")

    def with_batch(
        self, batch: Callable[[], Sequence[Any]], takes_more: Callable[[Callable[..., Any]], bool] | None = None
    ) -> Paths:
        """Return the paths with functions that modules may call: see `Masks.of_batch`."""
        return replace(self, masks=self.masks.of_batch(batch, takes_more))

    def attach(
        self,
        regularizer: Any,
        model: nn.Module,
        say: Callable[[str], Any] | None = None,
        layout: bool | None = None,
    ) -> ExitStack:
        """Attach a regularizer to all modules at the paths, until the returned stack is closed.

        If an error occurs, no module stays attached.

        Args:
            regularizer: an `RNNRegularizer`.
            model: the model.
            say: a function that is called once for each module, at the first loss, with a line that names the axes of
                raw.
            layout: the `batch_first` of a module that does not show it.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`, or a path names no module.
        """
        with ExitStack() as attached:
            for rnn, path in self.pairs:
                if isinstance(path, Swap):
                    dropout, path = path.into(model, attached), path.path
                else:
                    dropout = None if path is None else _module_at(model, "dropout", path)
                module = _module_at(model, "rnn", rnn)
                batch_first = self.batch_first
                if batch_first is None and layout is not None:
                    batch_first = batch_first_of(module, layout)
                options = {"output": self.output, "valid": self.masks.valid, "starts": self.masks.starts}
                handle = attached.enter_context(regularizer.attach(module, dropout, batch_first=batch_first, **options))
                handle.paths, handle.say = (rnn, path), say
            return attached.pop_all()


def pairs_of(rnn: object, dropout: object) -> list[tuple[str, str | None]]:
    """Pair the attribute path of each RNN with the path of its dropout.

    Args:
        rnn: a path or a list of paths.
        dropout: a path or `None` for all RNNs, or a list with a path or `None` for each.

    Raises:
        TypeError: an item is no path.
        ValueError: there is no RNN or the same RNN twice, or the lists have different lengths.
    """
    rnns: Any = rnn if is_list(rnn) else [rnn]
    dropouts: Any = dropout if is_list(dropout) else [dropout] * len(rnns)
    for name, paths, no in (("dropout", [x for x in dropouts if x is not None], ", None"), ("rnn", rnns, "")):
        for path in paths:
            if not isinstance(path, str) or not path:  # an empty path would be the model itself
                got = "an empty one" if isinstance(path, str) else type(path).__name__
                raise TypeError(
                    f"{name}: expected the attribute path of a module, such as 'encoder.lstm'{no}, or a list of these, "
                    f"got {got}"
                )
    if not rnns or len({*rnns}) < len(rnns):
        raise ValueError(f"rnn: expected at least one path, and each path once, got {rnns}")
    if len(dropouts) != len(rnns):
        counts = f"{len(rnns)} RNNs and {len(dropouts)} dropouts"
        raise ValueError(f"rnn and dropout: expected a dropout, or None, for each RNN, got {counts}")
    return list(zip(rnns, dropouts, strict=True))


def pairs_of_learner(rnn: object, dropout: object) -> Sequence[tuple[str, str | None]]:
    """Pair the paths that a learner of fastai was given; without paths, the dropout may be `True` or `False`.

    Raises:
        TypeError, ValueError: as `pairs_of`.
    """
    dropout = None if dropout is False or (dropout is True and rnn is None) else dropout
    return () if rnn is None and dropout is None else pairs_of(rnn, dropout)


def check_no_coefficients(options: Collection[str]) -> None:
    """Check that `fuse` of an adapter gets no coefficients, because the learner's own callback has them."""
    for name in ("alpha", "beta"):
        if name in options:
            raise TypeError(
                f"{name}: expected no coefficient, as fuse keeps those of the learner's callback; change its attribute "
                f"{name} before or after fuse"
            )


def _module_at(model: nn.Module, kind: str, path: str) -> nn.Module:
    """Return the module at an attribute path; the error for a wrong path lists the paths that are most similar."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    candidates = ", ".join(map(repr, get_close_matches(path, names, n=5, cutoff=0)))
    raise ValueError(f"{kind}: {type(model).__name__} has no such module at {path!r}; candidates: {candidates}")
