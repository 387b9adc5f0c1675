"""`Source`: where activations come from, in the arguments that `attach`, `fuse` and the adapters have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import check_flags
from fastreg.prepare import place_of
from fastreg.problem import Coefficient, Place, is_list
from fastreg.rnn_dropout import FusedRNNDropout


@dataclass(frozen=True, eq=False)
class Source:
    """Name a module and its dropout, and say how to read raw and its time steps from the module's output.

    Attributes:
        module: the module that returns raw; in an adapter its attribute path in the model, or a list of paths, or
            `None` where the model itself returns `(decoded, raw, dropped)`.
        dropout: the module that computes dropped from raw; `None` where dropped is raw; in an adapter its path, one
            for all modules, or a list with one, or `None`, for each.
        output: picks raw from the module's output; `None` if raw is that output, its first item, or its
            `last_hidden_state`.
        batch_first: `False` for `(time, batch, hidden)`; `None` to read it from the module.
        time_dim: the axis of time, instead of batch_first.
        valid: takes the arguments of the module's forward, in an adapter the batch, and returns the valid steps, or
            `None` if all are valid.
        starts: takes the same arguments, and returns the steps at which segments start, or `None`.
        stepwise: whether the runs of a step are joined along time.
        scale: the upstream gradient of the penalty in every backward; `None` to take that of the loss.
        place: where time is, of a source that `checked` has returned.
        fused: makes a fused dropout from a probability, which takes the place of the dropout while it is attached.
        plain: the class of the dropout that it replaces.

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
    place: Place = field(default_factory=Place)
    fused: Any = None
    plain: Any = None

    def __post_init__(self) -> None:
        for name in ("output", "valid", "starts"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a callable or None, got {type(function).__name__}")

    # For `attach`, with modules

    def checked(self) -> Source:
        """Check the modules, and return the source with the place of time.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`.
        """
        check_flags(stepwise=self.stepwise)
        _check_module("module", self.module)
        if self.dropout is not None:
            _check_module("dropout", self.dropout)
        name, own = type(self.module).__name__, getattr(self.module, "batch_first", None)
        if not self.stepwise:
            if isinstance(self.module, nn.RNNCellBase):
                raise TypeError(
                    f"module: expected one that runs over all time steps, got {name}, which runs one; attach the "
                    "module that calls it, or attach(..., stepwise=True)"
                )
        elif self.scale is not None:
            raise ValueError("stepwise: expected False with in_backward, which sees one run at a time, got True")
        elif self.time_dim is not None:
            raise ValueError(f"time_dim: expected None with stepwise, got {self.time_dim}")
        layout = self.batch_first
        if layout is None and self.time_dim is None:
            layout = layout_of(self.module)
        elif isinstance(own, bool) and layout is (not own):
            raise ValueError(f"batch_first: expected {own}, as the {name} has it, or None, got {layout}")
        place = place_of(layout, self.time_dim)
        if isinstance(self.dropout, FusedRNNDropout) and self.dropout.place() != place:
            of_module = f", as the {name} has it" if self.time_dim is None else ""
            got = self.dropout.place()
            raise ValueError(f"dropout: expected a FusedRNNDropout with {place}{of_module}, got {got}")
        return replace(self, place=place)

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
            raw = raw[0] if is_list(raw) and raw else raw
            where = f"attach: expected the {name} to return"
            advice = ", or one as the first of a tuple or as last_hidden_state; pick it by attach(..., output=...)"
        kinds, words = (Tensor, PackedSequence), "a tensor or a PackedSequence"
        if self.stepwise:
            kinds, words = (Tensor,), "a tensor with stepwise=True"
        if not isinstance(raw, kinds):
            raise TypeError(f"{where} {words}, got {type(raw).__name__}{advice}")
        is_told = self.stepwise or self.output is not None or self.time_dim is not None
        if not (is_told or isinstance(self.module, nn.RNNBase)) and isinstance(raw, Tensor) and raw.dim() == 2:
            raise ValueError(
                f"attach: expected (batch, time, hidden) or (time, batch, hidden) from the {name}, got "
                f"{tuple(raw.shape)}. If that is one time step, attach the module that runs over all of them, or "
                "attach(..., stepwise=True); if it is (time, hidden) of one sequence, say so by output=lambda result: "
                "result, or what picks it"
            )
        return raw

    def marks(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the valid steps and the starts, by their names, for the arguments of the module, or the batch.

        Raises:
            TypeError: a function returns neither a tensor nor `None`.
        """
        functions = {"valid": self.valid, "starts": self.starts}
        marks = {name: None if of is None else of(*args, **kwargs) for name, of in functions.items()}
        for name, x in marks.items():
            if not isinstance(x, (Tensor, type(None))):
                raise TypeError(f"{name}: expected the callable to return a tensor or None, got {type(x).__name__}")
        return marks

    # For the adapters, with paths and functions of the batch

    def of_batch(self, batch: Callable[[], Sequence[Any]], takes_more: Callable[[Any], bool] | None = None) -> Source:
        """Call `valid` and `starts` with a batch, whatever the module's arguments.

        Args:
            batch: returns the inputs of the batch.
            takes_more: returns whether a function takes the module's arguments, too, behind the batch; `None` for none.
        """

        def of(function: Callable[..., Tensor | None] | None) -> Callable[..., Tensor | None] | None:
            if function is None:
                return None
            if takes_more is not None and takes_more(function):
                return lambda *args, **kwargs: function(*batch(), *args, **kwargs)
            return lambda *_, **__: function(*batch())

        return replace(self, valid=of(self.valid), starts=of(self.starts))

    def of_language_model(self, **options: Any) -> Source:
        """Return the source in a fastai language model if the dropout is `True`, and no module is named."""
        if self.dropout is True and self.module is None:
            return replace(self, module="0", dropout="1.output_dp", **options)
        return replace(self, dropout=None if self.dropout is False else self.dropout)

    def attach(self, regularizer: Any, model: Any, layout: bool | None = None) -> ExitStack:
        """Attach a regularizer to all modules at the paths, or to none, until the returned stack is closed.

        Args:
            regularizer: an `RNNRegularizer`.
            model: the model; nothing is attached where the source says nothing of modules.
            layout: `batch_first` of a module that does not have it.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`, or a path names no module.
        """
        with ExitStack() as attached:
            if (self.module, self.dropout, self.output, self.batch_first) == (None,) * 4:
                return attached
            rnns = self.module if is_list(self.module) else [self.module]
            dropouts = self.dropout if is_list(self.dropout) else [self.dropout] * len(rnns)
            if not rnns or len(dropouts) != len(rnns):
                raise ValueError(
                    "rnn and dropout: expected a dropout, or None, for each RNN, "
                    f"got {len(rnns)} RNNs and {len(dropouts)} dropouts"
                )
            for rnn, path in zip(rnns, dropouts, strict=True):
                dropout = None if path is None else _module_at(model, "dropout", path)
                module = _module_at(model, "rnn", rnn)
                if self.fused is not None:
                    dropout = self._swap(model, path, dropout, attached)
                batch_first = layout_of(module, layout) if self.batch_first is None else self.batch_first
                options = {"output": self.output, "batch_first": batch_first, "valid": self.valid}
                attached.enter_context(regularizer.attach(module, dropout, starts=self.starts, **options))
            return attached.pop_all()

    def _swap(self, model: nn.Module, path: Any, own: Any, undo: ExitStack) -> Any:
        """Swap a dropout for a fused one in the same mode, until a stack is closed."""
        if type(own) not in (self.plain, self.fused):  # a fit that was cut off may have left the fused one
            raise ValueError(f"dropout: expected an {self.plain.__name__} to swap, got {type(own).__name__}")
        fused = self.fused(own.p).train(own.training)
        model.set_submodule(path, fused)
        undo.callback(lambda: model.set_submodule(path, own.train(fused.training)))
        return fused


def layout_of(module: nn.Module, default: bool | None = None) -> bool:
    """Return whether a module returns `(batch, time, hidden)`, as it or the RNNs of PyTorch inside it have it.

    Raises:
        ValueError: neither has it, and the default is not `True`; or an RNN inside has `(time, batch, hidden)`.
    """
    own = getattr(module, "batch_first", True if isinstance(module, nn.RNNCellBase) else None)
    if isinstance(own, bool):
        return own
    inner = [x for x in module.modules() if isinstance(x, nn.RNNBase)]
    if all(x.batch_first for x in inner) and (inner or default):
        return True
    why = f", and may return (time, batch, hidden) like the {type(inner[0]).__name__} inside it" if inner else ""
    raise ValueError(
        "batch_first: expected True for (batch, time, hidden) or False for (time, batch, hidden), as the "
        f"{type(module).__name__} does not have it{why}, got None"
    )


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


def _module_at(model: nn.Module, kind: Literal["rnn", "dropout"], path: Any) -> nn.Module:
    """Return the module at an attribute path; if there is none, list those whose paths are the most alike."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    candidates = ", ".join(map(repr, get_close_matches(str(path), names, n=5, cutoff=0)))
    raise ValueError(f"{kind}: {type(model).__name__} has no such module at {path!r}; candidates: {candidates}")
