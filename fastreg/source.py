"""`Source`: where activations come from, in the arguments that `attach`, `fuse` and the adapters have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import check_flags
from fastreg.prepare import time_given
from fastreg.problem import Coefficient
from fastreg.rnn_dropout import FusedRNNDropout


@dataclass(frozen=True, eq=False)
class Source:
    """Name a module and its dropout, and say how to read raw and its time steps from the module's output.

    Attributes:
        module: the module that returns raw; in an adapter its attribute path, or `None` where the model itself returns
            `(decoded, raw, dropped)`.
        dropout: the module that computes dropped from raw, or its path; `None` where dropped is raw.
        output: picks raw from the module's output; `None` if raw is that output, its first item, or its
            `last_hidden_state`.
        batch_first: `False` for `(time, batch, hidden)`; `None` to read it from the module.
        time_dim: the axis of time, instead of batch_first.
        valid: takes the arguments of the module's forward, in an adapter the batch, and returns the valid steps, or
            `None` if all are valid.
        starts: takes the same arguments, and returns the steps at which segments start, or `None`.
        stepwise: whether the runs of a step are joined along time.
        scale: the upstream gradient of the penalty in every backward; `None` to take that of the loss.
        time_at: `batch_first`, a bool, or `time_dim`, an int, of a source that `checked` has returned.

    Raises:
        TypeError: `output`, `valid` or `starts` is neither callable nor `None`.
    """

    module: Any = None
    dropout: Any = None
    output: Callable[[Any], Any] | None = None
    batch_first: bool | None = None
    time_dim: int | None = None
    valid: Callable[..., Tensor | None] | None = None
    starts: Callable[..., Tensor | None] | None = None
    stepwise: bool = False
    scale: Coefficient | None = None
    time_at: bool | int = True

    def __post_init__(self) -> None:
        for name in ("output", "valid", "starts"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a callable or None, got {type(function).__name__}")

    def checked(self) -> Source:
        """Check the modules, and return the source with the place of time.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`.
        """
        check_flags(stepwise=self.stepwise)
        if self.stepwise and self.scale is not None:
            raise ValueError("stepwise: expected False with in_backward, which sees one run at a time, got True")
        if self.stepwise and self.time_dim is not None:
            raise ValueError(
                f"time_dim: expected None with stepwise, whose runs have their own layout, got {self.time_dim}"
            )
        _check_module("module", self.module)
        if isinstance(self.module, nn.RNNCellBase) and not self.stepwise:
            raise TypeError(
                f"module: expected one that runs over all time steps, got {type(self.module).__name__}, which runs "
                "one; attach the module that calls it, or attach(..., stepwise=True)"
            )
        if self.dropout is not None:
            _check_module("dropout", self.dropout)
        layout = self.batch_first if self.time_dim is not None else self._layout()
        found = replace(self, time_at=time_given(layout, self.time_dim))
        if isinstance(self.dropout, FusedRNNDropout):
            found._check_time_of(self.dropout)
        return found

    def _layout(self) -> bool:
        """Return whether the module returns `(batch, time, hidden)`."""
        name, own = type(self.module).__name__, getattr(self.module, "batch_first", None)
        if self.batch_first is not None:
            check_flags(batch_first=self.batch_first)
            if isinstance(own, bool) and self.batch_first is not own:
                raise ValueError(f"batch_first: expected {own}, as the {name} has it, or None, got {self.batch_first}")
            return self.batch_first
        inner = [x for x in self.module.modules() if isinstance(x, nn.RNNBase)]
        if isinstance(own, bool) or isinstance(self.module, nn.RNNCellBase):
            return own is not False
        if inner and all(x.batch_first for x in inner):
            return True
        why = f", and may return (time, batch, hidden) like the {type(inner[0]).__name__} inside it" if inner else ""
        raise ValueError(
            "batch_first: expected True for (batch, time, hidden) or False for (time, batch, hidden), as the "
            f"{name} does not have it{why}, got None"
        )

    def _check_time_of(self, dropout: FusedRNNDropout) -> None:
        """Check that a dropout looks for time where the module has it."""
        own = dropout.batch_first if dropout.time_dim is None else dropout.time_dim
        if (type(own), own) != (type(self.time_at), self.time_at):
            got = f"batch_first={dropout.batch_first}" if dropout.time_dim is None else f"time_dim={dropout.time_dim}"
            expected = f"time_dim={self.time_at}"
            if isinstance(self.time_at, bool):
                expected = f"batch_first={self.time_at}, as the {type(self.module).__name__} has it"
            raise ValueError(f"dropout: expected a FusedRNNDropout with {expected}, got {got}")

    def raw_of(self, result: Any) -> Tensor | PackedSequence:
        """Return raw from the output of the module.

        Raises:
            TypeError, ValueError: the output does not show which tensor is raw; the message names the remedy.
        """
        name = type(self.module).__name__
        if self.output is not None:
            raw, where, advice = self.output(result), "output: expected the callable to pick", ""
        else:
            # A tensor takes long to say that it has no such attribute.
            raw = result if type(result) is Tensor else getattr(result, "last_hidden_state", result)
            if isinstance(raw, (list, tuple)) and not isinstance(raw, PackedSequence) and len(raw) > 0:
                raw = raw[0]
            where = f"attach: expected the {name} to return"
            advice = ", or one as the first of a tuple or as last_hidden_state; pick it by attach(..., output=...)"
        if not isinstance(raw, (Tensor, PackedSequence)):
            raise TypeError(f"{where} a tensor or a PackedSequence, got {type(raw).__name__}{advice}")
        if self.stepwise and isinstance(raw, PackedSequence):
            raise TypeError(f"{where} a tensor with stepwise=True, got PackedSequence")
        runs_over_time = self.stepwise or not isinstance(self.time_at, bool)
        runs_over_time = runs_over_time or self.output is not None or isinstance(self.module, nn.RNNBase)
        if isinstance(raw, Tensor) and raw.dim() == 2 and not runs_over_time:
            raise ValueError(
                f"attach: expected (batch, time, hidden) or (time, batch, hidden) from the {name}, got "
                f"{tuple(raw.shape)}. If that is one time step, attach the module that runs over all of them, or "
                "attach(..., stepwise=True); if it is (time, hidden) of one sequence, say so by output=lambda result: "
                "result, or what picks it"
            )
        return raw

    # An adapter's source, with paths and functions of the batch

    def of_batch(self, batch: Callable[[], Sequence[Any]]) -> Source:
        """Call `valid` and `starts` with the batch that a function returns, whatever the module's arguments."""

        def of(function: Callable[..., Tensor | None] | None) -> Callable[..., Tensor | None] | None:
            return None if function is None else lambda *_, **__: function(*batch())

        return replace(self, valid=of(self.valid), starts=of(self.starts))

    def attach(self, regularizer: Any, model: nn.Module, batch_first: bool | None = None) -> Any:
        """Attach a regularizer to the modules at the paths in a model; return the handle with `remove()`.

        Args:
            regularizer: an `RNNRegularizer`.
            model: the model.
            batch_first: the layout of a module that neither has one nor has an RNN of PyTorch inside.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`, or a path names no module.
        """
        dropout = None if self.dropout is None else _module_at(model, "dropout", self.dropout)
        module = _module_at(model, "rnn", self.module)
        shows = hasattr(module, "batch_first") or any(isinstance(x, nn.RNNBase) for x in module.modules())
        layout = batch_first if self.batch_first is None and not shows else self.batch_first
        options = {"output": self.output, "batch_first": layout, "valid": self.valid, "starts": self.starts}
        return regularizer.attach(module, dropout, **options)


def source_at(rnn: str | None, dropout: str | None, **options: Any) -> Source:
    """Return the source at the path of one module, or with `None` a model that returns `(decoded, raw, dropped)`.

    Raises:
        TypeError, ValueError: an argument is not as described, or there are options for a module, but no path.
    """
    for name, path in (("rnn", rnn), ("dropout", dropout)):
        if path is not None and not isinstance(path, str):
            raise TypeError(f"{name}: expected an attribute path or None, got {type(path).__name__}")
    source = Source(rnn, dropout, **options)
    for name in ("dropout", "output", "batch_first"):
        if rnn is None and (value := getattr(source, name)) is not None:
            raise ValueError(f"{name}: expected None without rnn, the path of a module, got {value!r}")
    return source


def sources_at(
    rnn: str | Sequence[str], dropout: str | Sequence[str | None] | None, **options: Any
) -> tuple[Source, ...]:
    """Return the sources at the paths of modules, with the paths of their dropouts: one for all, or one a module.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    for name, paths in (("rnn", rnn), ("dropout", dropout)):
        if not (isinstance(paths, (str, list, tuple)) or (paths is None and name == "dropout")):
            raise TypeError(f"{name}: expected an attribute path, or a list of them, got {type(paths).__name__}")
    rnns = (rnn,) if isinstance(rnn, str) else tuple(rnn)
    dropouts: Any = (dropout,) * len(rnns) if dropout is None or isinstance(dropout, str) else tuple(dropout)
    if not rnns or len(dropouts) != len(rnns):
        raise ValueError(
            "rnn and dropout: expected a dropout, or None, for each RNN, "
            f"got {len(rnns)} RNNs and {len(dropouts)} dropouts"
        )
    return tuple(source_at(*paths, **options) for paths in zip(rnns, dropouts, strict=True))


def attach_all(
    sources: Sequence[Source], regularizer: Any, model: nn.Module, batch_first: bool | None = None
) -> ExitStack:
    """Attach a regularizer to the modules of a model, all or none, until the returned stack is closed."""
    with ExitStack() as attached:
        for source in sources:
            attached.enter_context(source.attach(regularizer, model, batch_first))
        return attached.pop_all()


def _check_module(name: str, module: object) -> None:
    """Check for a module whose hooks fire."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{name}: expected a module that takes hooks, got a ScriptModule; let an nn.Module call it and return what "
            "it returns, and attach that"
        )
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise RuntimeError(f"{name}: the module is compiled already; attach() it before torch.compile")


def _module_at(model: nn.Module, kind: Literal["rnn", "dropout"], path: str) -> nn.Module:
    """Return the module at an attribute path; if there is none, list candidates."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if path in modules:
        return modules[path]
    if kind == "rnn":
        likely = [name for name, module in modules.items() if isinstance(module, nn.RNNBase)]
    else:
        likely = [name for name, module in modules.items() if "drop" in type(module).__name__.lower()]
    candidates = ", ".join(map(repr, likely or [name for name in modules if name])) or "none"
    raise ValueError(f"{kind}: {type(model).__name__} has no such module at {path!r}; candidates: {candidates}")
