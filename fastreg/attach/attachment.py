"""`Attachment`: the forward hook on a recurrent module and on the dropout that follows it.

After the module it begins a run, and writes a `Call` into raw. After the dropout that gets this raw it computes the
penalty, and returns dropped behind a mark, by which a loss finds the run. Without a dropout it does both after the
module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from fastreg.attach.mark import mapped, mark, tensors_in
from fastreg.attach.runs import Alarm, Calls, Run
from fastreg.attach.source import Source
from fastreg.call.penalty import penalize
from fastreg.call.private import current, hooks_on_saved, version_of
from fastreg.call.problem import Options, Penalty, TimeAxis, axes_of, data_of, is_on
from fastreg.call.rnn_dropout import Call, FusedRNNDropout, calls_in
from fastreg.call.steps import given_steps
from fastreg.call.torch_state import transformed, untraced

SHARED = (
    "attach: this {} shares the hooks of an attached module, as a shallow copy or a replica does, and its penalty "
    "would be lost. Use DistributedDataParallel instead of DataParallel, or on_loss_begin; or remove() the attachment"
)
CHANGED = (
    "attach: the output of the {module} was changed in place before its dropout, or by it; use Dropout(inplace=False)"
)
TWICE = "attach: the {dropout} got one output of the {module} twice, and AR is of one dropped tensor; use fused_ar_tar"
MASKED = {"valid": "only valid steps count", "starts": "changes into starts do not count"}
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
        calls: the calls of the module.
        alarm: the alarm of the module.
        names: the names of the types of the module and of its dropout, for messages.
        time_steps: the number of time steps of the last run; 0 before the first one.
    """

    def __init__(self, regularizer: Any, attachments: list[Attachment], source: Source) -> None:
        self.regularizer, self.source, self._attachments = regularizer, source, attachments
        modules = {"module": source.module, "dropout": source.dropout}
        self.names = {name: type(x).__name__ for name, x in modules.items() if x is not None}
        self.calls, self.time_steps, self._shown = Calls(), 0, ""
        self.alarm = ALARMS.setdefault(source.module, Alarm(self.names["module"]))
        self._runs = list[ReferenceType[Run]]()  # which are held, and some that no longer are
        self._key = f"_fastreg_call_{id(self)}"  # the attribute of raw that holds a call
        self._ar_of_raw = isinstance(source.dropout, FusedRNNDropout) and source.dropout.ar_of == "raw"
        self._handles = [x.register_forward_hook(self, with_kwargs=True) for x in modules.values() if x is not None]
        attachments.append(self)

    def __repr__(self) -> str:
        labels, layers = [*self.names.values()], getattr(self.source.module, "num_layers", 1)
        if isinstance(self.source.module, nn.RNNBase) and layers > 1:
            labels[0] += f" (last of {layers} layers)"
        return f"{' -> '.join(labels)}: {self._shown or 'no run yet'}"

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
        for x in self._handles:
            x.remove()
        self._handles, self._shown = [], "removed"
        self.clear()

    def is_attached(self) -> bool:
        """Return whether the hooks are on the modules."""
        return bool(self._handles)

    def is_dropout(self, module: nn.Module) -> bool:
        """Return whether a module is the attached dropout."""
        return module is self.source.dropout and self.is_attached()

    def clear(self) -> None:
        """Drop the runs."""
        for run in self.held():
            run.end()

    def held(self) -> list[Run]:
        """Return the runs that are alive, and whose penalties no loss has taken."""
        held = [run for x in self._runs if (run := x()) is not None and run.is_held]
        self._runs = [*map(ref, held)]
        return held

    @untraced
    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Run after the forward of the module or its dropout, with its arguments and its output."""
        if module is self.source.module:
            return self._after_module(*given)
        if module is self.source.dropout:
            return self._after_dropout(*given)
        if module.training:
            raise RuntimeError(SHARED.format(type(module).__name__))
        return None

    def _after_module(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Begin a run, and return the output with marks."""
        source, calls, alarm = self.source, self.calls, self.alarm
        if not source.module.training:
            return self._note_evaluation(result)
        calls.total += 1
        alarm.losses = 0
        if not torch.is_grad_enabled() or transformed():
            calls.without_gradients += 1
            return None
        raw = source.raw_of(result)
        rows, regularizer = data_of(raw), self.regularizer
        given, again = (regularizer.alpha, regularizer.beta), current() != -1
        run = Run(self, is_held=source.dropout is not None and not again)
        # Only the recomputation, which has no hooks on saved tensors, shows that a reentrant checkpoint loses a run.
        if rows.requires_grad and any(map(is_on, given)) and not (again and hooks_on_saved(False)):
            alarm.count(run)
        call = Call(
            attachment=self,
            run=None if again else run,
            coefficients=[x.to(rows.device) if isinstance(x, Tensor) else x for x in given],
            masks=source.masks.of(*args, **kwargs),
            time_axis=source.time_axis_of_raw(raw),
            version=version_of(rows),
            packed=None if raw is rows else raw._replace(data=None),  # pyright: ignore
        )
        if source.dropout is None:
            self._form(call, call.run, rows, rows)
        else:
            setattr(rows, self._key, call)
            if rows.grad_fn is not None:  # the graph keeps a run that waits for its dropout, as raw itself may be gone
                rows.grad_fn.metadata[self._key] = call  # pyright: ignore[reportIndexIssue]
        if again:
            return None  # a backward computes this run again, and needs no marks
        self._runs.append(ref(run))
        if len(self._runs) % 100 == 0:  # a loop without a loss must not fill the memory
            self.held()
        if result is rows and source.dropout is not None:
            return None
        return self._marked(run, rows, result, (*args, *kwargs.values()))

    def _note_evaluation(self, result: Any) -> None:
        """Note whether the module, which is in evaluation, takes part in a training."""
        takes_part = torch.is_grad_enabled() and any(x.requires_grad for x in tensors_in(result))
        if not takes_part:  # it was called as it should be
            self.alarm.losses = 0
        if torch.is_grad_enabled():
            self.calls.constant += not takes_part
            self.calls.is_evaluated_in_training = takes_part

    def _marked(self, run: Run, rows: Tensor, result: Any, inputs: Any) -> Any:
        """Return the output of the module with its tensors behind marks, except for tensors that are its inputs.

        Before a dropout raw gets no mark: the penalty of the run will depend on raw, and must not hold the run.
        """
        unmarked, marks = {id(x) for x in tensors_in(inputs)}, dict[int, Tensor]()
        if self.source.dropout is None:
            unmarked.discard(id(rows))
        else:
            unmarked.add(id(rows))

        def marked(x: Tensor) -> Tensor:
            if x.requires_grad and id(x) not in unmarked and id(x) not in marks:
                marks[id(x)] = mark(run, x is rows or x._is_view(), x)
            return marks.get(id(x), x)

        return mapped(result, marked)

    def _after_dropout(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Compute the penalty of the run whose raw is the input of the dropout, and return dropped behind a mark."""
        call, raw = self._call_of(args, kwargs)
        if call is None or not torch.is_grad_enabled():
            return None
        dropout, run = self.source.dropout, call.run
        penalty = dropout.take_of(call) if isinstance(dropout, FusedRNNDropout) else None
        if run is None and current() == -1:
            raise RuntimeError(TWICE.format(**self.names))
        if run is not None:
            if not run.is_held:  # it was cleared
                return None
            call.run, run.is_held = None, False  # raw must not own the penalty, and an error ends the run
        if version_of(raw) != call.version:
            raise RuntimeError(CHANGED.format(**self.names))
        if not isinstance(result, (Tensor, PackedSequence)):
            name = self.names["dropout"]
            raise TypeError(f"dropout: expected a tensor from the attached {name}, got {type(result).__name__}")
        rows = data_of(result)
        self._form(call, run, raw, rows, penalty)
        if run is None or not rows.requires_grad:
            return None
        dropped = mark(run, True, rows)
        return dropped if result is rows else result._replace(data=dropped)  # pyright: ignore

    def _call_of(self, args: Any, kwargs: Any) -> Any:
        """Return the call of the module whose raw is among the arguments of the dropout, and raw; or `None` twice."""
        for x in (*args, *kwargs.values()):
            raw = data_of(x)
            for call in calls_in(raw):
                if call.attachment is self:
                    return call, raw
        return None, None

    def _form(self, call: Call, run: Run | None, raw: Tensor, dropped: Tensor, penalty: Penalty | None = None) -> None:
        """Compute the penalty of a run, unless a fused dropout has done so.

        A recomputation, which has no run, computes the penalty, too, so that it saves the same tensors as the forward.
        """
        whole: Any = raw if call.packed is None else call.packed._replace(data=raw)
        if penalty is None and (raw.requires_grad or dropped.requires_grad):
            pair = whole, dropped if call.packed is None else call.packed._replace(data=dropped)
            batch_first, time_dim = call.time_axis
            options = Options(batch_first, time_dim, return_terms=True, predicts=False)
            steps = given_steps(None, call.masks.get("valid"), call.masks.get("starts"))
            penalty = penalize(pair, call.coefficients, steps, options)
        if run is None:
            return
        needs_gradient = penalty is not None and penalty.value.requires_grad
        time_steps = raw.shape[call.time_axis.number()] if call.packed is None else len(call.packed.batch_sizes)
        run.penalty, run.is_held = penalty, needs_gradient or dropped.requires_grad
        run.is_one_step = time_steps == 1 and is_on(call.coefficients[1])
        if not run.is_held:
            self.calls.constant += 1
            self.alarm.forget(run)
        self.time_steps, self._shown = time_steps, self._shown or described(whole, call.time_axis, call.masks)


def described(raw: Tensor | PackedSequence, time_axis: TimeAxis, masks: Mapping[str, Tensor]) -> str:
    """Say which axes of raw were taken for what, and which time steps count."""
    rows = data_of(raw)
    shape = (*rows.shape,)
    if isinstance(raw, PackedSequence):
        sequences = f"{raw.batch_sizes[0]} packed sequences of up to {len(raw.batch_sizes)} time steps"
        return f"raw {shape} as {sequences}, hidden {shape[-1]}; every step counts"
    time, batch = axes_of(rows, time_axis.number())
    names = {time: "time", batch: "batch"}
    axes = ", ".join([f"{names.get(i, 'hidden')} {size}" for i, size in enumerate(shape)])
    steps = "; ".join([f"{name} {(*mask.shape,)}: {MASKED[name]}" for name, mask in masks.items()])
    return f"raw {shape} as {axes}; {steps or 'no mask: every step counts'}"


def attachments_of(module: nn.Module, attachments: list[Attachment]) -> list[Attachment]:
    """Return the attachments of a module, and the given attachments of it whose hooks another one has removed."""
    hooks: Any = vars(module)["_forward_hooks"].values()
    found = dict.fromkeys(x for x in (*attachments, *hooks) if isinstance(x, Attachment))
    return [x for x in found if x.source.module is module]
