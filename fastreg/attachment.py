"""`Attachment`: captures the runs of a recurrent module and of the dropout that follows it by forward hooks.

The hook on the module starts a capture, and the hook on the dropout completes it. The autograd graph keeps it, as
`fastreg.capture` describes. A run without a graph, which no loss can be searched for, is held here until the next one.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.weak import WeakTensorKeyDictionary

from fastreg.capture import Captured, Mark, Reached, Run, Watch, are_before
from fastreg.carry import Always
from fastreg.dropout import carries
from fastreg.problem import ARTAR, rows_of, time_dim_of
from fastreg.rnn_dropout import FusedRNNDropout
from fastreg.source import Source
from fastreg.torch_state import current, is_memory, keeps_memory_low, observed, plain, transformed, untraced

if TYPE_CHECKING:
    from fastreg.regularizer import RNNRegularizer

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # the attributes of a module that name the hooks of its forward
ROOM = 64  # weak references to collect before dead ones are removed


class Attachment:
    """Hold the hooks on a module and its dropout until `remove()`. A copy of the model has none.

    Attributes:
        source: the modules.
        watch: of the backwards without a penalty; shared by the attachments of a regularizer.
        terms: AR and TAR of the latest run that adds its penalty in the backward, or `None`.
    """

    def __init__(self, owner: RNNRegularizer, source: Source, watch: Watch) -> None:
        self.source, self.watch = source, watch
        self._names = type(source.module).__name__, type(source.dropout).__name__
        self._single: list[Any] = []  # what `Always` notes of runs of one time step
        self._forwards: list[Any] = []  # of the modules, as attachments make them attributes
        self._unmarked = 0  # how many runs no search can find, since a loss was regularized
        self.terms: ARTAR | None = None
        self._runs: list[weakref.ref[Run]] = []
        self._room = ROOM
        self._held: list[Any] = []  # the latest run, and its tensors, where no graph can keep them
        self._without_graph = WeakTensorKeyDictionary()  # runs, by their raw, until their dropout has run
        self._marks = WeakTensorKeyDictionary()  # valid steps and starts for a fused dropout, by raw
        self._latest: Callable[[], Run | None] = nothing
        self._owner = weakref.ref(owner, lambda _: self.remove())
        self._last = [source.module.register_forward_hook(self._after_module, with_kwargs=True)]
        self._first = [source.module.register_forward_pre_hook(self._before, with_kwargs=True)]
        if source.dropout is not None:
            self._last.append(source.dropout.register_forward_hook(self._after_dropout, with_kwargs=True))
            self._first.append(source.dropout.register_forward_pre_hook(self._before, with_kwargs=True))
        for module in self._modules():
            vars(module)["__getstate__"] = MethodType(_state_without_hooks, module)
            # Dynamo does not guard on hooks, and would use code that was compiled for a module without them. It guards
            # on whether the instance has a forward of its own.
            own = vars(module).setdefault("forward", module.forward)
            if own == _forward_of_class(module):
                self._forwards.append(own)

    def __getstate__(self) -> dict[str, Any]:
        """Return an inert state: the hooks of a copied model must not reach this regularizer."""
        inert = {
            "source": None,
            "watch": None,
            "terms": None,
            "_single": [],
            "_forwards": [],
            "_unmarked": 0,
            "_runs": [],
            "_room": ROOM,
            "_held": [],
            "_without_graph": None,
            "_marks": None,
            "_first": [],
            "_last": [],
        }
        return inert | {"_latest": nothing, "_owner": nothing}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks and drop their captures; a second call does nothing."""
        for hook in (*self._first, *self._last):
            hook.remove()
        for module in self._modules():
            if not any(map(_is_own, vars(module)["_forward_hooks"].values())):
                vars(module).pop("__getstate__", None)
                if vars(module).get("forward") in self._forwards:
                    del module.forward
        self.clear()
        owner, self._owner = self._owner(), nothing
        if owner is not None:
            owner.forget(self)

    @property
    def runs(self) -> list[Run]:
        """Return the runs that are captured and not taken yet, in the order of the calls."""
        return [run for ref in self._runs if (run := ref()) is not None]

    def clear(self) -> None:
        """Drop all captures."""
        self.settle(self.runs)

    def settle(self, runs: Collection[Run]) -> None:
        """Drop taken runs, and the latest run, which only the next loss may take without depending on it."""
        left = []
        for ref in self._runs:
            run = ref()
            if run is not None and run in runs:
                run.drop()
            elif run is not None:
                left.append(ref)
        self._runs, self._held, self._latest, self._unmarked = left, [], nothing, 0

    def chosen(self, runs: list[Run], reached: Reached) -> list[Run]:
        """Return those of the runs that a loss reaches.

        If there are none, return the latest run, where it has no graph to be reached by, or the loss reaches no run of
        any module; but no run in evaluation.
        """
        found = [run for run in runs if run in reached]
        latest = self._latest() if self.source.module.training else None
        if not found and latest is not None and not (reached and latest.carriers and latest.marked):
            return [latest]
        return found

    def checked(self, runs: list[Run], loss: Tensor, reached: Reached) -> list[list[Run]]:
        """Check that runs can be regularized with a loss, and return them in groups that are one activation each.

        With `stepwise` all runs of a step are joined along time.

        Raises:
            RuntimeError: a run has no dropped or no gradients, or was changed in place or freed, or several runs have
                one time step each; the message names the remedy.
        """
        module, dropout = self._names
        if len(runs) > 1 and not self.source.stepwise and all(run.steps == 1 for run in runs):
            raise RuntimeError(
                f"on_backward_begin: the {module} ran {len(runs)} times, over one time step each, which leaves no "
                "changes for TAR; attach(..., stepwise=True) joins the runs of a step along time"
            )
        if self._unmarked > 1 and any(not run.marked for run in runs):
            raise RuntimeError(
                f"on_backward_begin: the {module} ran {self._unmarked} times under a transform of torch.func, under "
                "forward-mode AD or in a trace, of which the latest run alone is kept; use fused_ar_tar there"
            )
        for run in runs:
            if loss.requires_grad and not run.grad_enabled:
                raise RuntimeError(
                    f"on_backward_begin: the {module} or its dropout ran without gradients, so that the penalty's "
                    "would be lost. For activation checkpointing pass use_reentrant=False; else run both outside "
                    "torch.no_grad()"
                )
            if (fault := run.fault) is not None:
                raise RuntimeError(f"on_backward_begin: {fault}")
            if (lost := run.lost(reached.get(run, ()))) is not None:
                raise RuntimeError(
                    "on_backward_begin: the loss does not depend on the output of the attached "
                    f"{module if lost is run.raw else dropout}, which was freed, so that the gradient of its penalty "
                    "would be lost. Pass the loss of the step, which is computed from that output; or keep it until "
                    "on_backward_begin"
                )
        return [runs] if self.source.stepwise and runs else [[run] for run in runs]

    def _modules(self) -> list[nn.Module]:
        """Return the modules that have hooks."""
        source: Source | None = self.source
        return [] if source is None else [x for x in (source.module, source.dropout) if x is not None]

    # The hooks

    @untraced
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Move our hook to the end, as a later hook may replace the output; pass valid steps to a fused dropout."""
        if self._owner() is None:  # in a copy
            return None
        if "_is_replica" in vars(module):
            raise RuntimeError(
                f"attach: DataParallel runs a replica of the attached {type(module).__name__} on each device, where "
                "each penalty would count in full. Use DistributedDataParallel; or let the model return (decoded, raw, "
                "dropped), which DataParallel gathers, for on_loss_begin"
            )
        own: Any = vars(module).get("forward")
        if own in self._forwards and own != _forward_of_class(module):
            raise RuntimeError(
                f"attach: this {type(module).__name__} shares the attributes of the attached one, or its class got "
                "another forward, so that the old one would run; remove() the attachment before, and attach again"
            )
        hooks = vars(module)["_forward_hooks"]
        own = self._last[-1 if module is self.source.dropout else 0].id
        if own in hooks and next(reversed(hooks)) != own:
            hooks.move_to_end(own)
        if module is not self.source.dropout or self.source.valid is self.source.starts is None:
            return None
        found = self._marks_of(args, kwargs) if type(module).forward is FusedRNNDropout.forward else None
        if found is None:
            return None
        valid, starts = _marks_given(args, kwargs)
        args, kwargs = args[:2], kwargs.copy()
        kwargs["valid"] = found[0] if valid is None else valid
        kwargs["starts"] = found[1] if starts is None else starts
        return args, kwargs

    @untraced
    def _after_module(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Start the capture of a run."""
        if self._owner() is None or not module.training or torch.is_inference_mode_enabled():
            return
        source = self.source
        passes_marks = isinstance(source.dropout, FusedRNNDropout) and not (source.valid is source.starts is None)
        # Activation checkpointing runs the forward again, whose fused dropout has to save the same tensors. If it is
        # reentrant, the penalty's gradient passes the second forward alone.
        recomputed = current() != -1 and (source.scale is None or keeps_memory_low())
        if recomputed and not passes_marks:
            return
        raw = source.raw_of(result)
        rows = rows_of(raw)
        valid = None if source.valid is None else source.valid(*args, **kwargs)
        starts = None if source.starts is None else source.starts(*args, **kwargs)
        for name, marks in ("valid", valid), ("starts", starts):
            if not isinstance(marks, (Tensor, type(None))):
                raise TypeError(f"{name}: expected the callable to return a tensor or None, got {type(marks).__name__}")
        if passes_marks:
            self._marks[rows] = valid, starts
        if recomputed:
            return
        captured = Captured(rows)
        packed = raw._replace(data=captured.data) if isinstance(raw, PackedSequence) else None
        dropped = captured if source.dropout is None else None
        is_step = source.stepwise and rows.dim() < 3 and not isinstance(module, nn.RNNBase)
        run = Run(captured, dropped, packed, source.time_at, valid, starts, torch.is_grad_enabled(), is_step)
        run.names, run.guard = self._names, self._guard()
        self._note(run)
        run.marked = not transformed()
        if not run.marked:
            self._unmarked += 1
            if isinstance(run.guard, Always):
                raise RuntimeError(
                    "attach: in_backward does not go with transforms of torch.func, forward-mode AD and traces, where "
                    "no hook sees a gradient; use on_backward_begin or fused_ar_tar"
                )
        self._mark(run, captured, rows)
        if result is not rows and run.marked:
            self._mark_others(run, rows, (args, kwargs), result)
        if dropped is not None:
            self._carry(run)

    def _guard(self) -> Any:
        """Return the guard of the gradients of a run."""
        owner = self._owner()
        if self.source.scale is None or owner is None:
            return self.watch
        return Always(self._single) if owner.carries(self) else None

    def _note(self, run: Run) -> None:
        """Make a run the latest; its graph keeps it. Remove references to freed runs."""
        if len(self._runs) >= self._room:
            self._runs = [ref for ref in self._runs if ref() is not None]
            self._room = 2 * len(self._runs) + ROOM
        self._latest, self._held = weakref.ref(run), []
        self._runs.append(self._latest)

    def _mark(self, run: Run, captured: Captured, x: Tensor) -> None:
        """Let the graph keep a run, and hook its tensor; hold a run that has no graph, or that PyTorch transforms."""
        if captured.needs and run.marked:
            Mark(run, captured, x).hook(x)
        elif not self._held or self._held[0] is run:
            self._held += run, x
            self._without_graph[x] = run

    def _mark_others(self, run: Run, rows: Tensor, given: Any, result: Any) -> None:
        """Mark the other tensors that a module returned, as a loss may depend on the run through them alone.

        If raw was computed from one, a mark on it that kept raw would close a reference cycle: raw is held here.
        """
        inputs = {id(x) for x in _tensors(given)}
        others = [x for x in _tensors(result) if x is not rows and x.grad_fn is not None and id(x) not in inputs]
        if not others:
            return
        before = are_before(rows.grad_fn, [x.grad_fn for x in others])
        for x in others:
            Mark(run, None, x, None if x.grad_fn in before else rows).hook(x)
        if before and not self._held:
            self._held += run, rows

    @untraced
    def _after_dropout(self, dropout: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Complete the capture of the run whose raw is the input of the dropout."""
        if self._owner() is None:
            return
        formed = dropout.formed if isinstance(dropout, FusedRNNDropout) else None
        found = self._run_of(args, kwargs)
        if formed is not None:
            formed.claimed = True
            if found is not None:  # else the run may belong to another attachment
                dropout.formed = None  # pyright: ignore[reportArgumentType]
        if found is None:
            return
        run, given = found
        if not isinstance(result, Tensor) and not (run.packed is not None and isinstance(result, PackedSequence)):
            raise TypeError(
                f"dropout: expected the attached {type(dropout).__name__} to return a tensor, got "
                f"{type(result).__name__}"
            )
        if isinstance(dropout, FusedRNNDropout):
            valid, starts = _marks_given(args, kwargs)
            run.valid = run.valid if valid is None else valid
            run.starts = run.starts if starts is None else starts
        run.grad_enabled &= torch.is_grad_enabled()
        rows = rows_of(result)
        if run.dropped is not None and not (rows is given and run.dropped is run.raw):
            if not torch.is_grad_enabled():
                return
            raise RuntimeError(
                f"attach: the attached {type(dropout).__name__} got the same output of the {run.names[0]} twice, and "
                "AR is of one result; use fused_ar_tar, or attach no dropout"
            )
        if rows is given:  # the dropout dropped nothing
            run.dropped = run.raw
            self._carry(run)
            return
        if run.is_step and formed is not None:
            raise TypeError(
                "FusedRNNDropout: expected (batch, time, hidden) or (time, hidden), got one time step (batch, hidden), "
                "of which it would drop a unit in all sequences or in none; use another dropout with stepwise=True"
            )
        if run.packed is not None and formed is not None:
            raise TypeError(
                "FusedRNNDropout: expected the RNN's output as a tensor, got the data of a PackedSequence, "
                "whose rows are of several sequences; use another dropout with packed sequences"
            )
        of_raw = isinstance(dropout, FusedRNNDropout) and dropout.ar_of == "raw"
        captured = Captured(rows)
        run.dropped = run.raw if of_raw else captured
        # Another hook or a subclass may have replaced the dropout's input or output after the terms were computed.
        if (
            formed is not None
            and _is_same(formed.raw, given)
            and _is_same(formed.dropped, rows)
            and formed.valid is run.valid
            and formed.starts is run.starts
            and time_dim_of(formed.time_at) == time_dim_of(run.time_at)
            and not self.source.stepwise
            and carries(formed.dropped)
        ):
            run.fused, run.terms = captured, formed.terms[1:]
            Mark(run, captured, formed.dropped)
        elif not of_raw:
            self._mark(run, captured, rows)
        self._carry(run, None if run.fused is None or formed is None else formed.dropped.grad_fn)

    def _carry(self, run: Run, node: Any = None) -> None:
        """Add the penalty's gradient in every backward, if `in_backward` asks for it."""
        owner, scale = self._owner(), self.source.scale
        if owner is not None and scale is not None and isinstance(run.guard, Always):
            self.terms = run.guard.form(run, node, owner.alpha, owner.beta, scale)
            owner.note()
            self._runs = [ref for ref in self._runs if ref() is not run]
            self._held = []

    def _marks_of(self, args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor | None] | None:
        """Return the valid steps and the starts of the raw among the arguments of a fused dropout."""
        if (found := self._run_of(args, kwargs)) is not None:
            return found[0].valid, found[0].starts
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        return next((self._marks[x] for x in given if x in self._marks), None)

    def _run_of(self, args: Any, kwargs: Any) -> tuple[Run, Tensor] | None:
        """Return the run whose raw is among the arguments of a dropout, and that argument's tensor."""
        given = [rows_of(x) for x in (*args, *kwargs.values()) if isinstance(x, (Tensor, PackedSequence))]
        latest = self._latest()
        for x in given:  # mostly
            if latest is not None and latest.raw.itself() is x:
                return latest, x
        for run in reversed(self.runs):
            for x in given:
                if _is_same(x, run.raw.data):
                    return run, x
        return None


def nothing(*_: object) -> None:
    """Return `None`, as a dead weak reference does."""


def _is_own(hook: Any) -> bool:
    """Return whether a hook belongs to an attachment."""
    return isinstance(getattr(hook, "__self__", None), Attachment)


def _state_without_hooks(module: nn.Module) -> Any:
    """Return the state of a module for a copy or a pickle, without the hooks of attachments."""
    own = getattr(type(module), "__getstate__", None)  # of any object from Python 3.11 on
    state = dict(vars(module)) if own is None else own(module)
    if not isinstance(state, dict):
        return state
    ids = {i for name in HOOKS for i, hook in state[name].items() if _is_own(hook)}
    others = {name: OrderedDict((i, x) for i, x in state[name].items() if i not in ids) for name in HOOKS}
    added = {"__getstate__", "forward"} if state.get("forward") == _forward_of_class(module) else {"__getstate__"}
    return {name: value for name, value in state.items() if name not in added} | others


def _forward_of_class(module: nn.Module) -> MethodType:
    """Return the forward that a module has if no attribute of its own takes its place."""
    return MethodType(type(module).forward, module)


def _marks_given(args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the valid steps and the starts that a `FusedRNNDropout` was called with."""
    valid = args[2] if len(args) > 2 else kwargs.get("valid")
    return valid, args[3] if len(args) > 3 else kwargs.get("starts")


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are the same object, or share memory and layout."""
    x, y = plain(x), plain(y)
    return x is y or (not observed() and is_memory(x) and is_memory(y) and _place(x) == _place(y))


def _place(x: Tensor) -> Any:
    """Return the address and layout of a tensor, without the strides of axes of one element, which may differ."""
    return x.data_ptr(), x.dtype, x.shape, [step for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]


def _tensors(x: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples, dictionaries and dataclasses, which may be cyclic."""
    found, seen, left = [], set(), [x]
    while left:
        x = left.pop()
        if isinstance(x, Tensor):
            found.append(x)
            continue
        if isinstance(x, dict):
            items = x.values()
        elif isinstance(x, (list, tuple)):
            items = x
        elif is_dataclass(x) and not isinstance(x, type):
            items = [getattr(x, field.name, None) for field in fields(x)]  # a field may not be set
        else:
            continue
        if id(x) not in seen:
            seen.add(id(x))
            left += items
    return found
