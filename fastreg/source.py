"""`Source`: the facts that say where activations come from; and the modules of a model attached by their paths.

`RNNRegularizer.attach` checks a source once. Its hooks then ask for raw and for the masks of time steps. The adapters
fill the same record with attribute paths, and `attach_at` attaches to the modules there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.prepare import place_of
from fastreg.problem import Place, is_list
from fastreg.rnn_dropout import FusedRNNDropout

# Modules that return no raw, or whose hooks do not run
REFUSED: dict[Any, str] = {
    nn.RNNCellBase: "one that runs over all time steps, got {}, which runs one; attach the module that calls it, or "
    "stack its outputs and call fused_ar_tar",
    (nn.ModuleList, nn.ModuleDict): "one that is called itself, got {}; attach each of its modules",
    torch.jit.ScriptModule: "one that takes hooks, got a ScriptModule; let an nn.Module call it and return what it "
    "returns, and attach that",
}


class MaskError(RuntimeError):
    """Say that the function given as `valid` or `starts` has raised an error, and what it was called with."""


@dataclass(frozen=True, eq=False)
class Source:
    """Hold the facts that say where raw and dropped come from, and which time steps count.

    Attributes:
        module: the module that returns raw; in an adapter its attribute path in the model, or a list of paths, or
            `None` where the model itself returns `(decoded, raw, dropped)`.
        dropout: the module that computes dropped from raw; `None` where dropped is raw; in an adapter its path or a
            `Swap`, one for all modules, or a list with one, or `None`, for each.
        output: picks raw from the module's output; `None` if raw is that output, its first item, or its
            `last_hidden_state`.
        batch_first: `False` for `(time, batch, hidden)`; `None` to read it from the module.
        time_dim: the axis of time, instead of batch_first.
        valid: takes the arguments of the module's forward, in an adapter the batch, and returns the valid steps, or
            `None` if all are valid.
        starts: takes the same arguments, and returns the steps at which segments start, or `None`.
        place: where time is, of a source that `checked` has returned.

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
    place: Place = field(default_factory=Place)

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
        _check_module("module", self.module)
        if self.dropout is not None:
            _check_module("dropout", self.dropout)
        name, own = type(self.module).__name__, getattr(self.module, "batch_first", None)
        layout = self.batch_first
        if layout is None and self.time_dim is None:
            layout = layout_of(self.module)
        elif isinstance(own, bool) and layout is (not own):
            raise ValueError(f"batch_first: expected {own}, as the {name} has it, or None, got {layout}")
        place = place_of(layout, self.time_dim)
        if isinstance(self.dropout, FusedRNNDropout):
            if type(self.dropout).forward is not FusedRNNDropout.forward:
                raise TypeError(
                    "dropout: expected the forward of FusedRNNDropout, to which the regularizer passes its "
                    f"coefficients, got that of {type(self.dropout).__name__}; derive that class from nn.Module instead"
                )
            if (its := self.dropout.place()) != place:
                raise ValueError(f"dropout: expected a FusedRNNDropout with {place}, as the {name} has it, got {its}")
        return replace(self, place=place)

    def raw_of(self, result: Any) -> Tensor | PackedSequence:
        """Return raw from the output of the module.

        Raises:
            TypeError, ValueError: the output does not show which tensor is raw; the message names the remedy.
        """
        name = type(self.module).__name__
        if self.output is not None:
            raw, expected, advice = self.output(result), "output: expected the callable to pick", ""
        else:
            # A tensor takes long to say that it has no such attribute.
            raw = result if type(result) is Tensor else getattr(result, "last_hidden_state", result)
            raw = next(iter(raw), raw) if is_list(raw) else raw
            expected = f"attach: expected the {name} to return"
            advice = ", or one as the first of a tuple or as last_hidden_state; pick it by attach(..., output=...)"
        if not isinstance(raw, (Tensor, PackedSequence)):
            raise TypeError(f"{expected} a tensor or a PackedSequence, got {type(raw).__name__}{advice}")
        is_told = self.output is not None or self.time_dim is not None or isinstance(self.module, nn.RNNBase)
        if not is_told and isinstance(raw, Tensor) and raw.dim() == 2:
            raise ValueError(
                f"attach: expected (batch, time, hidden) or (time, batch, hidden) from the {name}, got "
                f"{tuple(raw.shape)}. If that is one time step, attach the module that runs over all of them; if it is "
                "(time, hidden) of one sequence, say so by output=lambda result: result, or what picks it"
            )
        return raw

    def masks(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the valid steps and the starts, by their names, for the arguments of the module, or the batch.

        Raises:
            RuntimeError: a function raises an error, from which this one is raised.
            TypeError: a function returns neither a tensor nor `None`.
        """
        functions = {"valid": self.valid, "starts": self.starts}
        return {name: None if x is None else _mask(name, x, args, kwargs) for name, x in functions.items()}


@dataclass(frozen=True)
class Swap:
    """Swap a dropout of a model for a fused one while a regularizer is attached.

    Attributes:
        path: the attribute path of the dropout.
        plain: its class.
        fused: makes the fused dropout from a probability.
    """

    path: str
    plain: type[Any]
    fused: Callable[[float], FusedRNNDropout]

    def into(self, model: nn.Module, undo: ExitStack) -> FusedRNNDropout:
        """Put a fused dropout, in the same mode, into the model until a stack is closed, and return it."""
        own: Any = _module_at(model, "dropout", self.path)
        if type(own) is not self.plain:
            raise ValueError(f"dropout: expected an {self.plain.__name__} to swap, got {type(own).__name__}")
        fused = self.fused(own.p).train(own.training)
        model.set_submodule(self.path, fused)
        undo.callback(lambda: model.set_submodule(self.path, own.train(fused.training)))
        return fused


def of_language_model(source: Source, swap: Swap, **facts: Any) -> Source:
    """Return the source in fastai's language models, with these facts, if its dropout is `True` and no module is named.

    The dropout of any other source may be `False` for `None`.
    """
    if source.dropout is True and source.module is None:
        return replace(source, module="0", dropout=swap, **facts)
    return replace(source, dropout=None if source.dropout is False else source.dropout)


def of_batch(source: Source, batch: Callable[[], Sequence[Any]], takes_more: Any = None) -> Source:
    """Return a source that calls `valid` and `starts` with a batch, whatever the module's arguments.

    Args:
        source: the source.
        batch: returns the inputs of the batch.
        takes_more: returns whether a function takes the module's arguments, too, behind the batch; `None` for none.
    """

    def of(name: str) -> Callable[..., Tensor | None] | None:
        function = getattr(source, name)
        if function is None:
            return None
        if takes_more is not None and takes_more(function):
            return lambda *args, **kwargs: _mask(name, function, (*batch(), *args), kwargs)
        return lambda *_, **__: _mask(name, function, batch(), {})

    return replace(source, valid=of("valid"), starts=of("starts"))


def attach_at(regularizer: Any, model: Any, source: Source, layout: bool | None = None) -> ExitStack:
    """Attach a regularizer to all modules at the paths of a source, or to none, until the returned stack is closed.

    Args:
        regularizer: an `RNNRegularizer`.
        model: the model; nothing is attached where the source says nothing of modules.
        source: names the modules by their paths.
        layout: `batch_first` of a module that does not have it.

    Raises:
        TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`, or a path names no module.
    """
    with ExitStack() as attached:
        if (source.module, source.dropout, source.output, source.batch_first) == (None,) * 4:
            return attached
        rnns = source.module if is_list(source.module) else [source.module]
        dropouts = source.dropout if is_list(source.dropout) else [source.dropout] * len(rnns)
        if not rnns or len(dropouts) != len(rnns):
            counts = f"{len(rnns)} RNNs and {len(dropouts)} dropouts"
            raise ValueError(f"rnn and dropout: expected a dropout, or None, for each RNN, got {counts}")
        for rnn, path in zip(rnns, dropouts, strict=True):
            dropout = path
            if isinstance(path, Swap):
                dropout = path.into(model, attached)
            elif path is not None:
                dropout = _module_at(model, "dropout", path)
            module = _module_at(model, "rnn", rnn)
            options = {"output": source.output, "valid": source.valid, "starts": source.starts}
            options["batch_first"] = layout_of(module, layout) if source.batch_first is None else source.batch_first
            attached.enter_context(regularizer.attach(module, dropout, **options))
        return attached.pop_all()


def layout_of(module: nn.Module, default: bool | None = None) -> bool:
    """Return whether a module returns `(batch, time, hidden)`, as it or the RNNs of PyTorch inside it have it.

    Raises:
        ValueError: neither has it, and the default is not `True`; or an RNN inside has `(time, batch, hidden)`.
    """
    own = getattr(module, "batch_first", None)
    if isinstance(own, bool):
        return own
    inside = {x.batch_first: type(x).__name__ for x in module.modules() if isinstance(x, nn.RNNBase)}
    if list(inside or [default]) == [True]:
        return True
    why = f", and may return (time, batch, hidden) like the {inside[False]} inside it" if inside else ""
    raise ValueError(
        "batch_first: expected True for (batch, time, hidden) or False for (time, batch, hidden), as the "
        f"{type(module).__name__} does not have it{why}, got None"
    )


def _mask(name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> Tensor | None:
    """Call the function given as `valid` or `starts`, and check what it returns.

    Raises:
        MaskError: the function raises an error.
        TypeError: the function returns neither a tensor nor `None`.
    """
    try:
        mark = function(*args, **kwargs)
    except MaskError:  # of the same function, which an adapter has called with the batch
        raise
    except Exception as error:
        got = [f"{type(x).__name__}{[*x.shape] if isinstance(x, Tensor) else ''}" for x in (*args, *kwargs.values())]
        called = f"{getattr(function, '__qualname__', function)}({', '.join(got)})"
        raise MaskError(f"{name}: {called} raised {type(error).__name__}: {error}") from error
    if not isinstance(mark, (Tensor, type(None))):
        raise TypeError(f"{name}: expected the callable to return a tensor or None, got {type(mark).__name__}")
    return mark


def _check_module(name: str, module: object) -> None:
    """Check for a module whose hooks run."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
    for kinds, expected in REFUSED.items():
        if isinstance(module, kinds):
            raise TypeError(f"{name}: expected {expected.format(type(module).__name__)}")
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise RuntimeError(f"{name}: the module is compiled already; attach() it before torch.compile")


def _module_at(model: nn.Module, kind: Literal["rnn", "dropout"], path: Any) -> nn.Module:
    """Return the module at an attribute path; if there is none, list those whose paths are the most alike."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    candidates = ", ".join(map(repr, get_close_matches(str(path), names, n=5, cutoff=0)))
    raise ValueError(f"{kind}: {type(model).__name__} has no such module at {path!r}; candidates: {candidates}")
