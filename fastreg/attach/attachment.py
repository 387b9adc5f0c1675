"""`Attachment`: the forward hook on a recurrent module and on the dropout that follows it.

After the module it begins a run, which raw's node in the autograd graph owns. After the dropout that gets this raw it
computes the penalty, and returns dropped behind a mark, by which a loss finds the run. Without a dropout it does both
after the module. Before a fused dropout it passes what that needs to compute the penalty itself.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from fastreg.attach.activations import described, lengths_of
from fastreg.attach.mark import mapped, mark, tensors_in
from fastreg.attach.runs import CONSTANT, EVALUATED, RAN, TAKEN, WITHOUT_GRADIENTS, Alarm, Run
from fastreg.attach.source import Source
from fastreg.call.penalty import penalize
from fastreg.call.private import current, hooks_on_saved, is_view, version_of
from fastreg.call.problem import Options, data_of, moved
from fastreg.call.rnn_dropout import DropoutWithPenalty, Formed, Request
from fastreg.call.torch_state import transformed, untraced

SHARED = (
    "attach: this {} shares the hooks of an attached module, as a shallow copy or a replica does, and its penalty "
    "would be lost. Use DistributedDataParallel instead of DataParallel, or on_loss_begin; or remove() the attachment"
)
TWICE = "attach: the {dropout} got one output of the {module} twice, and AR is of one dropped tensor; use fused_ar_tar"
ALARMS = WeakKeyDictionary[nn.Module, Alarm]()  # of a module, which may be attached anew in each step


class Attachment(AbstractContextManager["Attachment"]):
    """Be the hook on a module and its dropout until `remove()`. Copies and pickles are hooks that do nothing.

    Args:
        regularizer: the regularizer, which has the coefficients.
        attachments: the attachments of the regularizer, among which this one is until `remove()`.
        source: the source, which has the modules.

    Attributes:
        regularizer: the regularizer.
        source: the source.
        open: weak references to the runs whose penalties a loss may take. One without a penalty waits for its dropout.
        events: what the module has done since a loss of the regularizer last took a penalty, or in its last step.
        starts_anew: whether the next call begins a step, as a loss that needs a gradient has come since the last call.
        alarm: the alarm of the module.
        handles: the handles of the hooks; none once they are removed.
        names: the names of the types of the module and of its dropout, for messages.
        shown: what was taken for what in the first run; empty before it.
    """

    def __init__(self, regularizer: Any, attachments: list[Attachment], source: Source) -> None:
        self.regularizer, self.source, self._attachments = regularizer, source, attachments
        modules = {"module": source.module, "dropout": source.dropout}
        self.names = {name: type(x).__name__ for name, x in modules.items() if x is not None}
        self.open, self.events = set[ReferenceType[Run]](), dict[str, None]()
        self.starts_anew, self.shown = False, ""
        self.alarm = ALARMS.setdefault(source.module, Alarm(self.names["module"]))
        self.handles = [x.register_forward_hook(self, with_kwargs=True) for x in modules.values() if x is not None]
        if isinstance(source.dropout, DropoutWithPenalty):
            self.handles.append(source.dropout.register_forward_pre_hook(self, with_kwargs=True))
        attachments.append(self)

    def __repr__(self) -> str:
        return f"{' -> '.join(self.names.values())}: {self.shown or 'no run yet'}"

    def __reduce__(self) -> Any:
        # The pickle has only a function of the standard library, because it may be loaded where fastreg is not
        # installed. From the handle PyTorch learns which ids of hooks the pickle may have, and gives them to no other.
        return getattr, (nullcontext(RemovableHandle(OrderedDict())), "__exit__")

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks and drop the runs; a second call does nothing."""
        self.unhook()
        if self in self._attachments:
            self._attachments.remove(self)

    def unhook(self) -> None:
        """Remove the hooks and drop the runs, but stay among the attachments of the regularizer."""
        for x in self.handles:
            x.remove()
        self.handles, self.shown = [], "removed"
        self.clear()

    def clear(self) -> None:
        """Drop the runs."""
        for run in self.runs():
            self.close(run)
            self.events = {TAKEN: None}

    def runs(self) -> list[Run]:
        """Return the open runs."""
        return [run for x in list(self.open) if (run := x()) is not None]

    def close(self, run: Run) -> None:
        """Let no loss take the penalty of a run."""
        self.open.discard(ref(run))
        run.penalty = None

    def _open(self, run: Run) -> None:
        """Let a loss take the penalty of a run, as long as the autograd graph owns it."""
        self.open.add(ref(run, self.open.discard))

    def _note(self, event: str) -> None:
        """Note what the module has done; what it did before the last loss no longer counts."""
        if current() != -1:  # a recomputation is no call
            return
        if self.starts_anew:
            self.events, self.starts_anew = {}, False
        self.events[event] = None
        if event in (CONSTANT, WITHOUT_GRADIENTS):  # it was called as it should be
            self.alarm.losses = 0

    @untraced
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *result: Any) -> Any:
        """Run after the forward of the module or its dropout, and, without a result, before that of a fused dropout."""
        if module is self.source.module:
            return self._after_module(args, kwargs, *result)
        if module is self.source.dropout:
            return self._after_dropout(args, kwargs, *result) if result else self._before_dropout(args, kwargs)
        if module.training:
            raise RuntimeError(SHARED.format(type(module).__name__))
        return None

    def _after_module(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Begin a run, and return the output with its tensors behind marks, except for tensors that are inputs."""
        source, regularizer, again = self.source, self.regularizer, current() != -1
        if not torch.is_grad_enabled() or transformed():
            if source.module.training:  # a validation excuses nothing
                self._note(WITHOUT_GRADIENTS)
            return None
        if not source.module.training:
            self._note(EVALUATED if any(x.requires_grad for x in tensors_in(result)) else CONSTANT)
            return None
        raw = source.raw_of(result)
        rows = raw if type(raw) is Tensor else data_of(raw)
        if not rows.requires_grad:
            self._note(CONSTANT)
            return None
        coefficients = moved((regularizer.alpha, regularizer.beta), rows.device)
        run = Run(
            attachment=self,
            request=Request(coefficients, source.time_axis_of_raw(raw), **source.masks.of(*args, **kwargs)),
            packed=None if raw is rows else raw._replace(data=None),  # pyright: ignore
            version=version_of(rows),
        )
        marks = {id(x): x for x in tensors_in((*args, *kwargs.values()))}
        if source.dropout is None:
            self._form(run, rows, rows)
            marks[id(rows)] = rows if again else mark(run, True, rows)
        else:  # raw gets no mark: the penalty of the run will depend on raw, and must not hold the run
            marks[id(rows)] = raw = rows.view_as(rows) if rows.grad_fn is None else rows  # a leaf has no node
            raw.grad_fn.metadata[self, raw.output_nr] = run  # pyright: ignore
        self._note(RAN)
        if not again:
            self._open(run)
        # Only the recomputation, which has no hooks on saved tensors, shows that a reentrant checkpoint loses it.
        elif run.request.is_on() and not hooks_on_saved(False):
            self.alarm.add(backwards=1)

        def marked(x: Tensor) -> Tensor:
            if x.requires_grad and id(x) not in marks and not again:  # a recomputation needs no marks
                marks[id(x)] = mark(run, is_view(x), x)
            return marks.get(id(x), x)

        return mapped(marked, result)

    def _found(self, args: Any, kwargs: Any) -> tuple[Any, Run | None]:
        """Return raw among the arguments of the dropout, and its run, if there is one.

        Raw is the tensor that the module has returned: its node leads to the run. A change in place gives it another
        node, or without gradients another version.

        Raises:
            RuntimeError: a dropout has had raw before.
        """
        again = current() != -1
        for x in (*args, *kwargs.values()) if torch.is_grad_enabled() else ():
            raw = x if type(x) is Tensor else data_of(x)
            if not isinstance(raw, Tensor) or raw.grad_fn is None:
                continue
            run = raw.grad_fn.metadata.get((self, raw.output_nr))  # pyright: ignore
            if isinstance(run, ReferenceType):
                if not again:
                    raise RuntimeError(TWICE.format(**self.names))
                run = run()
            if isinstance(run, Run) and run.version == version_of(raw) and (again or ref(run) in self.open):
                return raw, run
        return None, None

    def _before_dropout(self, args: Any, kwargs: Any) -> Any:
        """Return the arguments with which a fused dropout computes the penalty of the run whose raw it gets."""
        run, dropout, raw = self._found(args, kwargs)[1], self.source.dropout, (*args, kwargs.get("raw"))[0]
        if run is None:
            axis = self.source.time_axis_of_raw(raw)
            if axis == self.source.time_axis or raw.requires_grad:
                return None
            request = Request((dropout.alpha, dropout.beta), axis)  # one sequence without gradients # pyright: ignore
        elif run.packed is not None and not dropout.training:  # pyright: ignore
            return None
        else:
            request = run.request
        return args, {"request": request, **kwargs}

    def _after_dropout(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Compute the penalty of the run whose raw is the input of the dropout, and return dropped behind a mark."""
        raw, run = self._found(args, kwargs)
        if run is None:
            return None
        again, dropout = current() != -1, self.source.dropout
        formed = dropout.collect() if isinstance(dropout, DropoutWithPenalty) else None
        if again:
            if "request" not in kwargs:  # otherwise the forward has computed the penalty again
                self._form(run, raw, data_of(result))
            return None
        self.close(run)  # an error ends the run
        raw.grad_fn.metadata[self, raw.output_nr] = ref(run)  # as raw must not own the penalty
        if not isinstance(result, (Tensor, PackedSequence)):
            name = self.names["dropout"]
            raise TypeError(f"dropout: expected a tensor from the attached {name}, got {type(result).__name__}")
        dropped = result if type(result) is Tensor else data_of(result)
        self._form(run, raw, dropped, formed)
        self._open(run)
        marked = mark(run, True, dropped)
        return marked if dropped is result else result._replace(data=marked)  # pyright: ignore

    def _form(self, run: Run, raw: Tensor, dropped: Tensor, formed: Formed | None = None) -> None:
        """Compute the penalty of a run, unless a fused dropout has done so, and keep it for a loss.

        A recomputation computes the penalty, too, to save the same tensors as the forward, but keeps nothing.
        """
        pair: Any = raw, dropped
        if run.packed is not None:
            pair = [run.packed._replace(data=x) for x in pair]
        if formed is None:
            options = Options(*run.request.time_axis, return_terms=True)
            penalty = penalize(pair, run.request.coefficients, run.request.steps(), options)
        else:
            penalty, _, run.request = formed
        if current() == -1:
            run.penalty, run.lengths = penalty, lengths_of(pair[0], run.request.time_axis)
            self.shown = self.shown or described(pair[0], run.request.time_axis, run.request.masks())
            self.alarm.is_called |= run.request.is_on()


def attachments_of(module: nn.Module, attachments: list[Attachment]) -> list[Attachment]:
    """Return the attachments of a module, and the given attachments of it whose hooks another one has removed."""
    hooks: Any = vars(module)["_forward_hooks"].values()
    found = dict.fromkeys(x for x in (*attachments, *hooks) if isinstance(x, Attachment))
    return [x for x in found if x.source.module is module]
