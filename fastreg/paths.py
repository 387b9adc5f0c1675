"""`Paths`: the modules of a model that an adapter attaches a regularizer to, by their attribute paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fastreg.regularizer import RNNRegularizer, layout_of


class Paths(NamedTuple):
    """Name the modules of a model that `RNNRegularizer.attach` takes, from the first layer to the last.

    Attributes:
        rnns: the path of each module that gives raw.
        dropouts: the path of the dropout of each, or `None`.
        output, batch_first: as `RNNRegularizer.attach` takes them, for all.
        default_layout: `batch_first` for a module that has no such attribute; `None` if it has to be given.
    """

    rnns: tuple[str, ...]
    dropouts: tuple[str | None, ...]
    output: Callable[[Any], Any] | None = None
    batch_first: bool | None = None
    default_layout: bool | None = None

    def attach(
        self,
        regularizer: RNNRegularizer,
        model: nn.Module,
        valid: Callable[..., Tensor | None] | None = None,
        starts: Callable[..., Tensor | None] | None = None,
    ) -> ExitStack:
        """Attach the regularizer to the modules of a model, all or none, until the returned stack is closed.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`, or a path names no module.
        """
        attached = ExitStack()
        try:
            for rnn, dropout in zip(self.rnns, self.dropouts, strict=True):
                after = None if dropout is None else _module_at(model, "dropout", dropout)
                module, layout = _module_at(model, "rnn", rnn), self.batch_first
                inside = any(isinstance(x, nn.RNNBase) for x in module.modules())
                if layout is None and layout_of(module) is None and not inside:
                    layout = self.default_layout
                options: Any = {"output": self.output, "batch_first": layout, "valid": valid, "starts": starts}
                attached.enter_context(regularizer.attach(module, after, **options))
        except BaseException:
            attached.close()
            raise
        return attached


def check_paths(
    rnn: str | Sequence[str],
    dropout: str | Sequence[str | None] | None,
    output: Callable[[Any], Any] | None = None,
    batch_first: bool | None = None,
) -> Paths:
    """Check the paths of modules, and of the dropouts behind them: one for all, or one or `None` a module.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    for name, paths in (("rnn", rnn), ("dropout", dropout)):
        if not (isinstance(paths, (str, list, tuple)) or (paths is None and name == "dropout")):
            raise TypeError(f"{name}: expected an attribute path, or a list of them, got {type(paths).__name__}")
    rnns = (rnn,) if isinstance(rnn, str) else tuple(rnn)
    one_for_all = dropout is None or isinstance(dropout, str)
    dropouts: Any = (dropout,) * len(rnns) if one_for_all else tuple(dropout or ())
    if not rnns or len(dropouts) != len(rnns):
        raise ValueError(
            "rnn and dropout: expected a dropout, or None, for each RNN, "
            f"got {len(rnns)} RNNs and {len(dropouts)} dropouts"
        )
    return Paths(rnns, dropouts, output, batch_first)


def check_path(
    rnn: str | None,
    dropout: str | None,
    output: Callable[[Any], Any] | None = None,
    batch_first: bool | None = None,
) -> Paths | None:
    """Check the optional path of one module and the arguments that describe it.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if rnn is not None:
        if not isinstance(rnn, str):
            raise TypeError(f"rnn: expected an attribute path or None, got {type(rnn).__name__}")
        return check_paths(rnn, dropout, output, batch_first)
    for name, value in (("dropout", dropout), ("output", output), ("batch_first", batch_first)):
        if value is not None:
            raise ValueError(f"{name}: expected None without rnn, the path of a module, got {value!r}")
    return None


def check_marks(of: str, **functions: object) -> None:
    """Check functions that return masks of time steps, by their names.

    Raises:
        TypeError: one is neither callable nor `None`.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function of {of}, or None, got {type(function).__name__}")


def _module_at(model: nn.Module, kind: Literal["rnn", "dropout"], path: str) -> nn.Module:
    """Return the module at an attribute path.

    Raises:
        ValueError: the model has no module at this path; the message lists candidates.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if path in modules:
        return modules[path]
    likely = [name for name, module in modules.items() if _is_likely(kind, module)]
    candidates = ", ".join(map(repr, likely or [name for name in modules if name])) or "none"
    raise ValueError(f"{kind}: {type(model).__name__} has no such module at {path!r}; candidates: {candidates}")


def _is_likely(kind: str, module: nn.Module) -> bool:
    """Return whether a module looks like an RNN, or like a dropout."""
    return isinstance(module, nn.RNNBase) if kind == "rnn" else "drop" in type(module).__name__.lower()
