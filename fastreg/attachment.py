"""`Attachment`: captures the runs of a recurrent module and of the dropout that follows it by forward hooks.

The hook on the module starts a run, and the hook on the dropout completes it. The autograd graph keeps it, as
`fastreg.capture` describes. A run without a graph, which no loss can be searched for, is held here until the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from types import MethodType
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.weak import WeakTensorKeyDictionary

from fastreg.capture import Captured, Fused, Mark, Run, Watch, nodes_before
from fastreg.carry import Always
from fastreg.dropout import carries
from fastreg.problem import ARTAR, Coefficient, rows_of
from fastreg.rnn_dropout import FusedRNNDropout, Loan
from fastreg.source import Source
from fastreg.torch_state import current, is_memory, keeps_memory_low, observed, plain, transformed, untraced

REPLICA = (
    "attach: DataParallel runs a replica of the attached {} on each device, where each penalty would count in full. "
    "Use DistributedDataParallel; or let the model return (decoded, raw, dropped), which DataParallel gathers, for "
    "on_loss_begin"
)
SHARED = (
    "attach: this {} shares the attributes of the attached one, or its class got another forward, so that the old one "
    "would run; remove() the attachment before, and attach again"
)


class Owner(Protocol):
    """Decide which runs are regularized, and with which coefficients, as `RNNRegularizer` does."""

    alpha: Coefficient
    beta: Coefficient

    def carries(self, attachment: Attachment) -> bool:
        """Return whether the runs of an attachment are regularized."""
        ...

    def note(self) -> None:
        """Keep the terms of the latest runs that add their penalty in the backward."""
        ...

    def forget(self, attachment: Attachment) -> None:
        """Leave an attachment out from now on."""
        ...


class Hook:
    """Be a hook on the forward of a module; in a copy or a pickle of the module it does nothing."""

    def __init__(self, function: Callable[..., Any], register: Any) -> None:
        self.function, self.handle = function, register(self, with_kwargs=True)

    @untraced
    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> Any:
        # A function of the standard library, as fastreg may not be installed where a pickle is loaded. With the handle
        # PyTorch learns the ids of the hooks in the pickle, and gives them to no other hook.
        return getattr, (nullcontext(self.handle), "__exit__")


class Hooked:
    """Hold the hooks on a module until `remove()`.

    Attributes:
        module: the module.
        forward: its forward as an attribute of its own, if an attachment has made it one, or `None`.
    """

    def __init__(self, module: nn.Module, before: Callable[..., Any] | None, after: Callable[..., Any]) -> None:
        self.module = module
        self.first = Hook(before or self.check, module.register_forward_pre_hook)
        self.last = Hook(after, module.register_forward_hook)
        # Dynamo does not guard on hooks, and would use code that was compiled for a module without them. It guards on
        # whether the instance has a forward of its own.
        own = vars(module).setdefault("forward", module.forward)
        self.forward = own if own == MethodType(type(module).forward, module) else None

    def check(self, module: nn.Module, *_: Any) -> None:
        """Check that a module is the one with the hooks, and move the later hook to the end: others replace outputs.

        Raises:
            RuntimeError: it shares the attributes of that module, or runs another forward than its class.
        """
        if module is not self.module or (self.forward and self.forward.__func__ is not type(module).forward):
            message = REPLICA if "_is_replica" in vars(module) else SHARED
            raise RuntimeError(message.format(type(module).__name__))
        hooks, own = vars(module)["_forward_hooks"], self.last.handle.id
        if own in hooks:
            hooks.move_to_end(own)

    def remove(self) -> None:
        """Remove the hooks; PyTorch still calls one that another hook removes, without the keyword arguments."""
        for hook in (self.first, self.last):
            hook.handle.remove()
            hook.function = nothing
        others = any(isinstance(hook, Hook) for hook in vars(self.module)["_forward_hooks"].values())
        if self.forward is not None and not others and vars(self.module).get("forward") == self.forward:
            del self.module.forward


class Attachment:
    """Hold the hooks on a module and its dropout until `remove()`. Those in a copy of the model do nothing.

    Attributes:
        source: the modules.
        watch: of the backwards without a penalty; shared by the attachments of a regularizer.
        terms: AR and TAR of the latest run that adds its penalty in the backward, or `None`.
    """

    def __init__(self, owner: Owner, source: Source, watch: Watch) -> None:
        self.source, self.watch = source, watch
        self.terms: ARTAR | None = None
        self._names = type(source.module).__name__, type(source.dropout).__name__
        self._runs: WeakValueDictionary[int, Run] = WeakValueDictionary()  # by their ids, in the order of the calls
        self._latest: Callable[[], Run | None] = nothing
        self._held: list[Any] = []  # the latest run, and its tensors, where no graph can keep them
        self._without_graph = WeakTensorKeyDictionary()  # runs, by their raw, until their dropout has run
        self._unmarked = 0  # how many runs no search can find, since a loss was regularized
        self._single: list[Any] = []  # what `Always` notes of runs of one time step
        self._loan: Loan | None = None  # to a fused dropout that runs
        # With `in_backward` no other code needs the regularizer, which lives as long as the module then.
        is_kept = source.scale is not None
        self._owner: Callable[[], Any] = (lambda: owner) if is_kept else weakref.ref(owner, lambda _: self.remove())
        self._hooked = [Hooked(source.module, None, self._after_module)]
        if source.dropout is not None:
            before = self._lend if isinstance(source.dropout, FusedRNNDropout) else None
            self._hooked.append(Hooked(source.dropout, before, self._after_dropout))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a handle without hooks and runs: a copy must not reach this regularizer."""
        return {"_hooked": [], "_runs": {}, "_loan": None, "_owner": nothing}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks and drop their captures; a second call does nothing."""
        for hooked in self._hooked:
            hooked.remove()
        self.clear()
        owner, self._owner, self._hooked = self._owner(), nothing, []
        if owner is not None:
            owner.forget(self)

    @property
    def runs(self) -> list[Run]:
        """Return the runs that are captured and not taken yet, in the order of the calls."""
        return list(self._runs.values())

    def clear(self) -> None:
        """Drop all captures."""
        self.settle(self.runs)

    def settle(self, runs: Collection[Run]) -> None:
        """Drop taken runs, and the latest run, which only the next loss may take without depending on it."""
        for run in runs:
            run.drop()
            self._runs.pop(id(run), None)
        self._held, self._latest, self._unmarked = [], nothing, 0
        if self._loan is not None:  # a forward that failed has not used it, and it holds raw
            self._loan = self.source.dropout.loan = None

    def chosen(self, runs: list[Run], reached: Collection[Run]) -> list[Run]:
        """Return those of the runs that a loss reaches.

        If there are none, return the latest run, where it has no graph to be reached by, or the loss reaches no run of
        any module; but no run in evaluation.
        """
        found = [run for run in runs if run in reached]
        latest = self._latest() if self.source.module.training else None
        if not found and latest is not None and not (reached and latest.carriers and latest.marked):
            return [latest]
        return found

    def checked(self, runs: list[Run], loss: Tensor) -> list[list[Run]]:
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
            if (lost := run.lost()) is not None:
                raise RuntimeError(
                    "on_backward_begin: the loss does not depend on the output of the attached "
                    f"{module if lost is run.raw else dropout}, which was freed, so that the gradient of its penalty "
                    "would be lost. Pass the loss of the step, which is computed from that output; or keep it until "
                    "on_backward_begin"
                )
        return [runs] if self.source.stepwise and runs else [[run] for run in runs]

    # The hooks

    def _lend(self, dropout: Any, args: Any, kwargs: Any) -> None:
        """Lend a fused dropout the coefficients, and the masks of the run that it gets."""
        self._hooked[1].check(dropout)
        owner, found, self._loan = self._owner(), self._run_of(args, kwargs), None
        if owner is None or found is None:
            return
        run, raw = found
        # The loss reads saved tensors of the dropout's node, which may be packed away, as under checkpointing.
        lends = self.source.scale is None and not self.source.stepwise and not keeps_memory_low()
        is_same = raw.shape == run.raw.data.shape  # not one sequence in the other layout, in the same memory
        if lends and is_same and not isinstance(owner.alpha, Tensor) and not isinstance(owner.beta, Tensor):
            self._loan = dropout.loan = Loan(raw, owner.alpha, owner.beta, run.valid, run.starts)

    def _after_module(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Start the capture of a run."""
        source = self.source
        if not module.training or torch.is_inference_mode_enabled():
            return
        # Activation checkpointing runs the forward again. If it is reentrant, the penalty's gradient with `in_backward`
        # passes the second forward alone; if it is not, none passes the second.
        if current() != -1 and source.scale is None:
            return
        raw = source.raw_of(result)
        rows = rows_of(raw)
        axis = None
        if source.stepwise and rows.dim() < 3 and not isinstance(module, nn.RNNBase):
            axis = 1 if rows.dim() == 2 and source.place.batch_first else 0
        valid = starts = None
        if source.valid is not None or source.starts is not None:
            valid, starts = source.marks(*args, **kwargs).values()
            if axis is not None:
                valid, starts = [x if x is None or x.dim() > 1 else x.unsqueeze(-1) for x in (valid, starts)]
        captured, marked = Captured(rows, axis), not transformed()
        packed = raw._replace(data=captured.data) if isinstance(raw, PackedSequence) else None
        of_source = captured, packed, source.place, valid, starts, self._names
        run = Run(*of_source, self._guard(), torch.is_grad_enabled(), marked)
        self._latest, self._held, self._runs[id(run)] = weakref.ref(run), [], run
        self._unmarked += not marked
        if not marked and isinstance(run.guard, Always):
            raise RuntimeError(
                "attach: in_backward does not go with transforms of torch.func, forward-mode AD and traces, where no "
                "hook sees a gradient; use on_backward_begin or fused_ar_tar"
            )
        self._mark(run, captured, rows)
        if result is not rows and marked:
            self._mark_others(run, rows, (args, kwargs), result)
        if source.dropout is None:
            self._complete(run, captured)

    def _guard(self) -> Any:
        """Return the guard of the gradients of a run."""
        owner = self._owner()
        if self.source.scale is None or owner is None:
            return self.watch
        return Always(self._single) if owner.carries(self) else None

    def _mark(self, run: Run, captured: Captured, x: Tensor) -> None:
        """Let the graph keep a run, and hook its tensor; hold a run that has no graph, or that PyTorch transforms."""
        if captured.needs and run.marked:
            Mark(run, captured, x)
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
        before = nodes_before(rows.grad_fn, [x.grad_fn for x in others])
        for x in others:
            Mark(run, None, x, None if x.grad_fn in before else rows)
            if x.grad_fn in before and not self._held:
                self._held += run, rows

    def _after_dropout(self, dropout: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Complete the capture of the run whose raw is the input of the dropout."""
        loan, self._loan, fused = self._loan, None, dropout if isinstance(dropout, FusedRNNDropout) else None
        if fused is not None:
            fused.formed = None  # a penalty with coefficients of its own, which its user is not to take
        found = self._run_of(args, kwargs)
        if found is None:
            return
        run, given = found
        if not isinstance(result, Tensor) and not (run.packed is not None and isinstance(result, PackedSequence)):
            raise TypeError(
                f"dropout: expected the attached {type(dropout).__name__} to return a tensor, got "
                f"{type(result).__name__}"
            )
        if fused is not None:  # with the arguments that it ran with, as other hooks may have replaced them
            run.valid = _argument(args, kwargs, 2, "valid", run.valid)
            run.starts = _argument(args, kwargs, 3, "starts", run.starts)
        run.grad_enabled &= torch.is_grad_enabled()
        rows = rows_of(result)
        if run.dropped is not None and not (rows is given and run.dropped is run.raw):
            # Checkpointing that is not reentrant runs the dropout again, and the first run has the gradients.
            if not torch.is_grad_enabled() or (current() != -1 and run.grad_enabled):
                return
            raise RuntimeError(
                f"attach: the attached {type(dropout).__name__} got the same output of the {run.names[0]} twice, and "
                "AR is of one result; use fused_ar_tar, or attach no dropout"
            )
        if rows is given:  # the dropout dropped nothing
            self._complete(run, run.raw)
            return
        if fused is not None and not (run.packed is run.raw.axis is None):
            packed = run.packed is not None
            got = "the data of a PackedSequence" if packed else "one time step (batch, hidden)"
            raise TypeError(
                f"FusedRNNDropout: expected (batch, time, hidden) or (time, hidden) as a tensor, got {got}, whose rows "
                f"are of several sequences; use another dropout with {'packed data' if packed else 'stepwise=True'}"
            )
        if loan is not None and loan.formed is not None:
            # Another hook or a subclass may have replaced the masks, or the output after the penalty was formed.
            is_as_lent = loan.valid is run.valid and loan.starts is run.starts and loan.formed.place == run.place
            if is_as_lent and loan.formed.dropped is rows and carries(rows):
                run.fused = Fused(weakref.ref(rows.grad_fn), (loan.alpha, loan.beta), loan.formed.terms[1:])
        if fused is not None and fused.ar_of == "raw":
            self._complete(run, run.raw)
            return
        captured = Captured(rows, run.raw.axis)
        self._mark(run, captured, rows)
        self._complete(run, captured)

    def _complete(self, run: Run, dropped: Captured) -> None:
        """Complete a run; with `in_backward` add the penalty's gradient in every backward."""
        run.complete(dropped)
        owner, scale = self._owner(), self.source.scale
        if isinstance(run.guard, Always) and owner is not None:
            terms = run.guard.form(run, (owner.alpha, owner.beta), scale)  # pyright: ignore[reportArgumentType]
            if current() == -1:  # a recomputation is no later run
                self.terms = terms
                owner.note()
            self._runs.pop(id(run), None)
            self._held = []

    def _run_of(self, args: Any, kwargs: Any) -> tuple[Run, Tensor] | None:
        """Return the run whose raw is among the arguments of a dropout, and that argument's tensor."""
        given = [rows_of(x) for x in (*args, *kwargs.values()) if isinstance(x, (Tensor, PackedSequence))]
        latest = self._latest()
        for run in reversed(self.runs if latest is None else [*self.runs, latest]):
            for x in given:
                if run.raw.itself() is x or _is_same(x, run.raw.data):
                    return run, x
        return None


def nothing(*_: object, **__: object) -> None:
    """Return `None`, as a dead weak reference does."""


def _argument(args: Any, kwargs: Any, i: int, name: str, default: Tensor | None) -> Tensor | None:
    """Return a mask that a `FusedRNNDropout` was called with, or a default."""
    given = args[i] if len(args) > i else kwargs.get(name)
    return default if given is None else given


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors share memory and layout."""
    x, y = plain(x), plain(y)
    return not observed() and is_memory(x) and is_memory(y) and _place(x) == _place(y)


def _place(x: Tensor) -> Any:
    """Return the address and layout of a tensor, without axes of one element, whose strides may differ."""
    return x.data_ptr(), x.dtype, [(n, step) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]


def _tensors(x: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples, dictionaries and dataclasses, which may be cyclic."""
    found, seen, left = [], set(), [x]
    while left:
        x = left.pop()
        if isinstance(x, Tensor):
            found.append(x)
        elif id(x) not in seen:
            seen.add(id(x))
            if isinstance(x, dict):
                left += x.values()
            elif isinstance(x, (list, tuple)):
                left += x
            elif is_dataclass(x):
                left += [getattr(x, field.name, None) for field in fields(x)]  # a field may not be set
    return found
