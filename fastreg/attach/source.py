"""`Source`, which says where activations come from, and `attach_at`, which attaches the modules at attribute paths.

`RNNRegularizer.attach` checks a source once. Its hooks then ask the source for raw and for the masks of time steps. The
adapters fill a source with attribute paths, and `attach_at` attaches to the modules at these paths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.prepare import place_of
from fastreg.call.problem import Place, is_list
from fastreg.call.rnn_dropout import FusedRNNDropout

# Classes of modules that return no raw, or whose hooks do not run, with the expectation that an error names
REFUSED: dict[Any, str] = {
    nn.RNNCellBase: "a module that runs over all time steps, got {}, which runs one; attach the module that calls it, "
    "or stack its outputs and call fused_ar_tar",
    (nn.ModuleList, nn.ModuleDict): "a module that is called itself, got {}; attach each of its modules",
    torch.jit.ScriptModule: "a module that takes hooks, got a ScriptModule; let an nn.Module call it and return its "
    "output, and attach that nn.Module",
}

ONE_SEQUENCE = Place(None, 0)  # (time, hidden)


class MaskError(RuntimeError):
    """Report an error of the function given as `valid` or `starts`, and the arguments of that function."""


@dataclass(frozen=True, eq=False)
class Source:
    """Hold the facts that say where raw and dropped come from, and which time steps count.

    Attributes:
        module: the module that returns raw. In an adapter it is the attribute path of that module in the model, or a
            list of paths, or `None` if the model itself returns `(decoded, raw, dropped)`.
        dropout: the module that computes dropped from raw; `None` if dropped is raw. In an adapter it is the path of
            that module or a `Swap`, for all modules, or a list with a path or `None` for each module.
        output: a function that picks raw from the module's output; `None` if raw is that output, its first item, or its
            `last_hidden_state`.
        batch_first: `False` for `(time, batch, hidden)`; `None` to read it from the module.
        time_dim: the axis of time, instead of batch_first.
        valid: a function of the arguments of the module's forward, or in an adapter of the batch, that returns the mask
            of valid steps, or `None` if all steps are valid.
        starts: a function of the same arguments that returns the mask of the steps at which segments start, or `None`.
        place: the axis of time; `checked` sets it.

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
        """Check the modules, and return the source with its axis of time.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`.
        """
        _check_module("module", self.module)
        if self.dropout is not None:
            _check_module("dropout", self.dropout)
        name, own = type(self.module).__name__, getattr(self.module, "batch_first", None)
        layout = self.batch_first
        if layout is None and self.time_dim is None:
            layout = batch_first_of(self.module)
        elif isinstance(own, bool) and layout is (not own):
            raise ValueError(f"batch_first: expected {own}, as the {name} has it, or None, got {layout}")
        elif isinstance(self.module, nn.RNNBase) and self.time_dim is not None:
            raise ValueError(f"time_dim: expected None, as the {name} has batch_first={own}, got {self.time_dim}")
        place = place_of(layout, self.time_dim)
        if isinstance(self.dropout, FusedRNNDropout):
            if type(self.dropout).forward is not FusedRNNDropout.forward:
                raise TypeError(
                    "dropout: expected the forward of FusedRNNDropout, to which the regularizer passes its "
                    f"coefficients, got the forward of {type(self.dropout).__name__}; derive it from nn.Module instead"
                )
            if (its := self.dropout.place()) != place:
                raise ValueError(f"dropout: expected a FusedRNNDropout with {place}, as the {name} has it, got {its}")
        return replace(self, place=place)

    def raw_of(self, result: Any) -> Tensor | PackedSequence:
        """Return raw from the output of the module.

        Raises:
            TypeError, ValueError: the output does not show which tensor is raw; the message names the remedy.
        """
        if self.output is not None:
            raw = self.output(result)
        elif type(result) is Tensor:  # asking a tensor for an attribute that it lacks takes long
            raw = result
        else:
            ask: Any = dict.get if isinstance(result, dict) else getattr  # a dictionary may take it for an item
            raw = ask(result, "last_hidden_state", result)
            raw = next(iter(raw), raw) if is_list(raw) else raw
        if not isinstance(raw, (Tensor, PackedSequence)):
            expected, advice = "output: expected the callable to pick", ""
            if self.output is None:
                expected = f"attach: expected the {type(self.module).__name__} to return"
                advice = "; return it first in a tuple or as last_hidden_state, or pick it by attach(..., output=...)"
            raise TypeError(f"{expected} a tensor or a PackedSequence, got {type(raw).__name__}{advice}")
        is_told = self.output is not None or self.time_dim is not None or isinstance(self.module, nn.RNNBase)
        if not is_told and isinstance(raw, Tensor) and raw.dim() == 2:
            name = type(self.module).__name__
            raise ValueError(
                f"attach: expected (batch, time, hidden) or (time, batch, hidden) from the {name}, got "
                f"{tuple(raw.shape)}. If this is one time step, attach the module that runs over all time steps. If it "
                "is one sequence, (time, hidden), say so by a function that picks it: output=lambda result: result"
            )
        return raw

    def place_for(self, raw: Tensor | PackedSequence) -> Place:
        """Return the axis of time of raw, which is the first if `raw_of` has accepted a tensor of two axes."""
        is_one = self.place.time_dim is None and isinstance(raw, Tensor) and raw.dim() == 2
        return ONE_SEQUENCE if is_one else self.place

    def masks(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the masks of valid steps and of starts, by their names, for the arguments of the module, or the batch.

        Raises:
            RuntimeError: a function has raised an error, which is the cause of this one.
            TypeError: a function has returned neither a tensor nor `None`.
        """
        return {
            "valid": None if self.valid is None else _mask("valid", self.valid, args, kwargs),
            "starts": None if self.starts is None else _mask("starts", self.starts, args, kwargs),
        }


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


def of_language_model(source: Source, swap: Swap, **facts: Any) -> Source:
    """Return the source of fastai's language models, if `source` has the dropout `True` and names no module.

    Any other source is returned with `None` instead of a dropout that is `False`.

    Args:
        source: the source.
        swap: swaps the output dropout of a language model.
        **facts: other attributes of the source of language models.
    """
    if source.dropout is True and source.module is None:
        return replace(source, module="0", dropout=swap, **facts)
    return replace(source, dropout=None if source.dropout is False else source.dropout)


def of_batch(source: Source, batch: Callable[[], Sequence[Any]], takes_more: Any = None) -> Source:
    """Return a source that calls `valid` and `starts` with a batch instead of the module's arguments.

    Args:
        source: the source.
        batch: a function that returns the inputs of the batch.
        takes_more: a function that returns whether a given function also takes the module's arguments, behind the
            batch; `None` if no function takes them.
    """

    def of(name: str) -> Callable[..., Tensor | None] | None:
        function = getattr(source, name)
        if function is None:
            return None
        if takes_more is not None and takes_more(function):
            return lambda *args, **kwargs: _mask(name, function, (*batch(), *args), kwargs)
        return lambda *_, **__: _mask(name, function, batch(), {})

    return replace(source, valid=of("valid"), starts=of("starts"))


def check_paths(rnn: object) -> None:
    """Check the `rnn` of an adapter that captures nothing itself."""
    if not isinstance(rnn, str) and not is_list(rnn):
        raise TypeError(
            f"rnn: expected the attribute path of a module, such as 'encoder.lstm', or a list, got {type(rnn).__name__}"
        )


def check_no_coefficients(options: Collection[str]) -> None:
    """Check that `fuse` of an adapter gets no coefficients, because the learner's own callback has them."""
    for name in ("alpha", "beta"):
        if name in options:
            raise TypeError(
                f"{name}: expected no coefficient, as fuse keeps those of the learner's callback; change its attribute "
                f"{name} before or after fuse"
            )


def attach_at(regularizer: Any, model: Any, source: Source, say: Any = None, layout: bool | None = None) -> ExitStack:
    """Attach a regularizer to all modules at the paths of a source, until the returned stack is closed.

    If an error occurs, no module stays attached.

    Args:
        regularizer: an `RNNRegularizer`.
        model: the model.
        source: the source, which names modules by their paths; nothing is attached if it names none.
        say: a function that is called once for each module, at the first loss, with a line that names the axes of raw.
        layout: the `batch_first` of a module that does not show it.

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
                dropout, path = path.into(model, attached), path.path
            elif path is not None:
                dropout = _module_at(model, "dropout", path)
            module = _module_at(model, "rnn", rnn)
            options = {"output": source.output, "valid": source.valid, "starts": source.starts}
            batch_first = source.batch_first
            options["batch_first"] = batch_first_of(module, layout) if batch_first is None else batch_first
            handle = attached.enter_context(regularizer.attach(module, dropout, **options))
            handle.paths, handle.say = (rnn, path), say
        return attached.pop_all()


def batch_first_of(module: nn.Module, default: bool | None = None) -> bool:
    """Return `batch_first` of a module, or of the RNNs of PyTorch inside it, or a default.

    Raises:
        ValueError: neither the module nor an RNN inside it has `batch_first`, and the default is not `True`; or an RNN
            inside it returns `(time, batch, hidden)`.
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
    """Call the function given as `valid` or `starts`, and check its result.

    Raises:
        MaskError: the function has raised an error.
        TypeError: the function has returned neither a tensor nor `None`.
    """
    try:
        mask = function(*args, **kwargs)
    except MaskError:  # an adapter has already called the same function with the batch
        raise
    except Exception as error:
        got = [f"{type(x).__name__}{[*x.shape] if isinstance(x, Tensor) else ''}" for x in (*args, *kwargs.values())]
        called = f"{getattr(function, '__qualname__', function)}({', '.join(got)})"
        raise MaskError(f"{name}: {called} raised {type(error).__name__}: {error}") from error
    if not isinstance(mask, (Tensor, type(None))):
        raise TypeError(f"{name}: expected the callable to return a tensor or None, got {type(mask).__name__}")
    return mask


def _check_module(name: str, module: object) -> None:
    """Check that a module is of a kind whose hooks run, and that it is not compiled."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
    for kinds, expected in REFUSED.items():
        if isinstance(module, kinds):
            raise TypeError(f"{name}: expected {expected.format(type(module).__name__)}")
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise RuntimeError(f"{name}: the module is compiled already; attach() it before torch.compile")


def _module_at(model: nn.Module, kind: Literal["rnn", "dropout"], path: Any) -> nn.Module:
    """Return the module at an attribute path; the error for a wrong path lists the paths that are most similar."""
    if not isinstance(path, str):
        raise TypeError(f"{kind}: expected the attribute path of a module, a str, got {type(path).__name__}")
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    candidates = ", ".join(map(repr, get_close_matches(path, names, n=5, cutoff=0)))
    raise ValueError(f"{kind}: {type(model).__name__} has no such module at {path!r}; candidates: {candidates}")
