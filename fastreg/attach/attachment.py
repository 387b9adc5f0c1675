"""`Attachment`: the hooks on a recurrent module and on the dropout that follows it.

The hook on the module begins a run, and writes a `Call` into raw. The hook on the dropout finds the call in raw,
computes the penalty, and returns dropped with a mark by which a loss finds the run. Without a dropout the hook on the
module does this with raw. `fastreg.attach.runs` follows the runs.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.attach.mark import is_marked, mark
from fastreg.attach.outputs import address_of, mapped, tensors_in
from fastreg.attach.runs import FROZEN, NEVER, NO_GRADIENTS, RUN, Run, Runs, Tally, report
from fastreg.attach.source import Source
from fastreg.call.penalty import penalize
from fastreg.call.private import current, version_of
from fastreg.call.problem import Options, TimeAxis, axes_of, data_of, is_on
from fastreg.call.rnn_dropout import FusedRNNDropout, Loan
from fastreg.call.steps import given_steps
from fastreg.call.torch_state import recomputes, transformed, untraced

SHARED = (
    "attach: this {} shares the hooks of an attached module, as a shallow copy or a replica does, and its own weights "
    "and its penalty would be lost; or the forward of its class was replaced. Use DistributedDataParallel instead of "
    "DataParallel, or on_loss_begin; or remove() the attachment, and attach again"
)
MASKED = {"valid": "only valid steps count", "starts": "changes into starts do not count"}
KEY = "_fastreg_call"  # the attribute of raw that holds its call


class Hook:
    """Run functions before and after the forward of a module until `remove()`; in a copy or a pickle, do nothing.

    Attributes:
        attachment: the attachment; `None` after `remove()`.
        module: the module.
        after: a function of the arguments and the output of the forward.
        before: a function of the arguments; `None` if nothing comes before the forward.
        handles: the handles of the hooks; the first one runs after the forward.
        forward: the forward of the module's class, which is an attribute of the module itself while it is hooked.
    """

    def __init__(self, attachment: Attachment, module: nn.Module, after: Any, before: Any = None) -> None:
        self.attachment, self.module, self.after, self.before = attachment, module, after, before
        self.handles = [module.register_forward_hook(self, with_kwargs=True)]
        if before is not None:
            self.handles.append(module.register_forward_pre_hook(self, with_kwargs=True))
        # Dynamo does not guard on hooks, and would run code that was compiled for a module without hooks. But it does
        # guard on whether the instance itself has an attribute forward.
        self.forward = MethodType(type(module).forward, module)
        vars(module).setdefault("forward", self.forward)

    @untraced
    def __call__(self, module: nn.Module, *given: Any) -> Any:
        if module is self.module:
            args, kwargs, *result = given  # there is no result before the forward
            return self.after(args, kwargs, *result) if result else self.before(args, kwargs)
        # A shallow copy or a replica shares the hooks, and the forward, with the weights of the hooked module. torch.ao
        # puts the hooks on other modules, which are right in evaluation, and after `remove()`.
        if self.attachment is not None and (module.training or "forward" in vars(module)):
            raise RuntimeError(SHARED.format(type(module).__name__))
        return None

    def __reduce__(self) -> Any:
        # The pickle has only a function of the standard library, because it may be loaded where fastreg is not
        # installed. From the handles PyTorch learns the ids of the hooks in the pickle, and gives these ids to no other
        # hook.
        return getattr, (nullcontext(self.handles), "__exit__")

    def prepare(self) -> None:
        """Move the hook after the forward to the end, behind hooks that were registered later.

        Raises:
            RuntimeError: the module would run another forward than its class has.
        """
        if self.forward.__func__ is not type(self.module).forward:
            raise RuntimeError(SHARED.format(type(self.module).__name__))
        vars(self.module)["_forward_hooks"].move_to_end(self.handles[0].id)

    def remove(self) -> None:
        """Remove the hook."""
        self.attachment = None
        for handle in self.handles:
            handle.remove()
        if not attachments_of(self.module) and vars(self.module).get("forward") == self.forward:
            del self.module.forward


def attachments_of(module: nn.Module) -> list[Attachment]:
    """Return the attachments that have hooks on a module."""
    hooks: Any = vars(module)["_forward_hooks"].values()
    return [x.attachment for x in hooks if isinstance(x, Hook) and x.attachment is not None]


@dataclass(eq=False)
class Call:
    """Describe a call of an attached module for the dropout: a run, or the recomputation of one.

    Attributes:
        attachment: the attachment of the module.
        run: the run, until the dropout has got raw, because raw must not own the penalty; `None` in a recomputation.
        version: the version of raw when the module returned it.
        packed: the `PackedSequence` whose data is raw, without the data; `None` if raw is not packed.
        masks: the masks of valid steps and of starts, by their names; a mask may be `None`.
        coefficients: alpha and beta, on the device of raw. A tensor is not copied, so that its change before the
            backward is an error there.
    """

    attachment: Attachment
    run: Run | None
    version: int
    packed: PackedSequence | None
    masks: dict[str, Any]
    coefficients: Sequence[Any]

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # raw may be saved, and loaded with `weights_only=True` where fastreg is not installed


class Attachment(AbstractContextManager["Attachment"]):
    """Hold the hooks on a module and its dropout until `remove()`. Hooks in a copy of the model do nothing.

    Args:
        owner: the regularizer, which has the coefficients. With it the hooks are removed; but if the module has not run
            by then, its first call in training removes them, and warns.
        runs: the runs of the regularizer.
        source: the source, which has the modules.

    Attributes:
        owner: a weak reference to the regularizer.
        runs: the runs of the regularizer.
        source: the source.
        names: the names of the types of the module and of its dropout, for messages.
        paths: their paths in the model, where an adapter has found them there.
        say: a function that is called once with the `repr()`, at the first loss; `None` to say nothing.
        shown: the axes and the masks of the first run, in words.
        waiting: how many runs wait for their dropout.
        called: whether the module was called in training, and the strongest call since a loss last took a penalty.
        tally: the lost penalties of the module.
    """

    def __init__(self, owner: Any, runs: Runs, source: Source) -> None:
        self.owner: Callable[[], Any] = weakref.ref(owner, lambda _: self.shown and self.remove())
        self.runs, self.source = runs, source
        self.names, dropout = {"module": type(source.module).__name__}, source.dropout
        self.paths: tuple[Any, Any] = None, None
        self.say: Callable[[str], Any] | None = None
        self.shown, self.waiting, self.called = "", 0, NEVER
        self._hooks = [Hook(self, source.module, self._after_module, self._before_module)]
        if dropout is not None:
            self.names["dropout"] = type(dropout).__name__
            before = self._lend if isinstance(dropout, FusedRNNDropout) else None
            self._hooks.append(Hook(self, dropout, self._after_dropout, before))
        runs.attachments.append(self)
        self.tally = runs.tallies.setdefault(source.module, Tally())

    def __repr__(self) -> str:
        label = [f"{path} ({x})" if path else x for x, path in zip(self.names.values(), self.paths, strict=False)]
        return f"{' -> '.join(label)}: {self.shown or 'no run yet'}"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which has no hooks and no runs."""
        return {"names": {"module": "Attachment"}, "paths": (None, None), "shown": "removed", "_hooks": ()}

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks and drop the runs; a second call does nothing."""
        hooks, self._hooks = self._hooks, ()
        for x in hooks:
            x.remove()
        if hooks:
            self.runs.attachments.remove(self)
            self.shown = "removed"
            self.owner = lambda: None  # the callback of the reference would keep the batch that an adapter's masks hold

    # The hooks

    def _before_module(self, *_: Any) -> None:
        """Prepare the hooks of the module and of its dropout."""
        for x in self._hooks:
            x.prepare()

    def _after_module(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Begin a run, and mark tensors of the module's output: the states, and raw if there is no dropout."""
        source, owner = self.source, self.owner()
        if not source.module.training:
            return None
        if owner is None:
            self.remove()
            return report("a regularizer is deleted", [self])
        if not torch.is_grad_enabled():
            return self._note(NO_GRADIENTS)
        again = current() != -1
        if again and not recomputes():
            raise RuntimeError(
                f"attach: the attached {self.names['module']} runs in a backward, where its penalty is lost; pass "
                "use_reentrant=False to the checkpoint"
            )
        if transformed():
            raise RuntimeError(
                f"attach: no loss can find the penalty of the attached {self.names['module']} under a transform of "
                "torch.func, in forward-mode AD or in a trace; remove() the attachment there, and use fused_ar_tar"
            )
        raw = source.raw_of(result)
        rows = data_of(raw)
        self._check_apart(rows)
        given, masks = (owner.alpha, owner.beta), source.masks.of(*args, **kwargs)
        packed: Any = None if raw is rows else raw._replace(data=None)  # pyright: ignore
        run = None if again else self.runs.begin(self, given, rows.requires_grad)
        coefficients = [x.to(rows.device) if isinstance(x, Tensor) else x for x in given]
        call = Call(self, run, version_of(rows), packed, masks, coefficients)
        if source.dropout is None:
            self._form(call, run, rows, rows, None)
        else:
            setattr(rows, KEY, call)
            self.waiting += run is not None
        if run is None or (result is rows and source.dropout is not None):
            return None
        return self._marked(run, rows, result, (*args, *kwargs.values()))

    def _note(self, kind: int) -> None:
        """Note the kind of a call in training."""
        self.called, self.tally.losses = max(self.called, kind), 0
        if kind != NO_GRADIENTS:
            self.tally.ran = kind == RUN

    def _marked(self, run: Run, rows: Tensor, result: Any, inputs: Any) -> Any:
        """Return the output of a module with its tensors marked for a run, or `None` if there are none to mark.

        Args:
            run: the run.
            rows: raw, or the rows of a `PackedSequence`.
            result: the output of the module.
            inputs: the arguments of the module.
        """
        tensors, is_dropped = tensors_in(result), self.source.dropout is None
        if is_dropped and id(rows) not in tensors:
            raise TypeError(
                f"attach: expected raw as a tensor in tuples, lists, dictionaries or model outputs, got a "
                f"{type(result).__name__}, in which raw cannot be replaced. A function given as output= has to pick "
                "a tensor, and compute nothing. Let the module return raw in a tuple; or pass raw through an "
                "nn.Identity, and attach this nn.Identity"
            )
        at = {i: address_of(x) for i, x in tensors.items()}
        memory = [*at.values(), *map(address_of, tensors_in(inputs).values())]
        marked = {
            i: mark(run, x is rows or memory.count(at[i]) > 1, x)
            for i, x in tensors.items()
            if x.requires_grad and (is_dropped or x is not rows)
        }
        return mapped(result, lambda x: marked.get(id(x), x)) if marked else None

    def _lend(self, args: Any, kwargs: Any) -> Any:
        """Pass a fused dropout the coefficients and axis, and the masks of its run unless the caller gave some."""
        call, raw = self._call_of(args, kwargs)
        if call is None:
            return None
        if call.packed is not None and self.source.dropout.training:  # pyright: ignore[reportOptionalMemberAccess]
            raise TypeError(
                "FusedRNNDropout: expected (batch, time, hidden) as a tensor, got the data of a PackedSequence, whose "
                "rows belong to several sequences; use another dropout for packed data"
            )
        given = dict(zip(("p", "valid", "starts"), args[1:], strict=False)) | kwargs
        call.masks.update({name: given[name] for name in call.masks if given.get(name) is not None})
        alpha, beta = call.coefficients
        return args[:1], given | call.masks | {"loan": Loan(alpha, beta, self.source.time_axis_of_raw(raw))}

    def _after_dropout(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Compute the penalty of the run whose raw is the input of the dropout, and mark the output."""
        call, raw = self._call_of(args, kwargs)
        if call is None or not torch.is_grad_enabled():
            return None
        run = call.run
        if run is not None and not run.is_held:  # it was cleared
            return None
        self.waiting -= run is not None
        call.run = None
        if run is None and current() == -1:
            raise RuntimeError(
                f"attach: the attached {self.names['dropout']} got the same output of the {self.names['module']} "
                "twice, and AR is defined for one dropped tensor; use fused_ar_tar, or attach no dropout"
            )
        if not isinstance(result, (Tensor, PackedSequence)):
            name = self.names["dropout"]
            raise TypeError(f"dropout: expected a tensor from the attached {name}, got {type(result).__name__}")
        if version_of(raw) != call.version:
            raise RuntimeError(
                f"attach: the output of the {self.names['module']} was changed in place before or by its dropout; use "
                "Dropout(inplace=False), and apply no operation like relu_() to that output"
            )
        rows = data_of(result)
        self._form(call, run, raw, rows, kwargs.get("loan"))
        if run is None or not rows.requires_grad:
            return None
        dropped = mark(run, True, rows)
        return dropped if result is rows else result._replace(data=dropped)  # pyright: ignore

    def _call_of(self, args: Any, kwargs: Any) -> Any:
        """Return the call of the module whose raw is among the arguments of the dropout, and raw; or `None` twice."""
        for x in (*args, *kwargs.values()):
            raw = data_of(x)
            call = raw.__dict__.get(KEY) if isinstance(raw, Tensor) else None
            if isinstance(call, Call) and call.attachment is self:
                return call, raw
        return None, None

    def _check_apart(self, rows: Tensor) -> None:
        """Check that no attached module inside the module regularizes the same output.

        Args:
            rows: raw, or the rows of a `PackedSequence`.
        """
        call: Any = rows.__dict__.get(KEY)
        found: Any = call.attachment if call else rows.grad_fn.run.attachment if is_marked(rows) else None  # pyright: ignore
        module = self.source.module
        if found is not None and found.source.module is not module and found.source.module in module.modules():
            raise RuntimeError(
                f"attach: the output of the {self.names['module']} is regularized already, by an attached module "
                "inside it; attach only one of them"
            )

    def _form(self, call: Call, run: Run | None, raw: Tensor, dropped: Tensor, loan: Loan | None) -> None:
        """Compute the penalty of a run, or take it from the loan of a fused dropout.

        A recomputation, which has no run, computes the penalty, too, so that it saves the same tensors as the forward.
        """
        terms: Any = loan and loan.terms
        is_frozen = not (raw.requires_grad or dropped.requires_grad)  # then there is nothing to compute
        if not is_frozen and (loan is None or loan.dropped is not dropped or loan.version != version_of(dropped)):
            dropout: Any = self.source.dropout  # asking a module for an attribute that it lacks takes 2 us
            pair: Any = raw, raw if isinstance(dropout, FusedRNNDropout) and dropout.ar_of == "raw" else dropped
            if call.packed is not None:
                pair = [call.packed._replace(data=x) for x in pair]
            batch_first, time_dim = self.source.time_axis_of_raw(pair[0])
            options = Options(batch_first, time_dim, measured=True, predicts=False)
            terms = penalize(pair, call.coefficients, given_steps(None, **call.masks), options)
        if run is None:
            return None
        time_axis = self.source.time_axis
        whole: Any = raw if call.packed is None else call.packed._replace(data=raw)
        self.shown = self.shown or described(whole, time_axis, call.masks)
        if is_frozen or not terms.penalty.requires_grad:
            run.number = 0
        elif not dropped.requires_grad:
            raise RuntimeError(
                f"attach: no loss can find the penalty, as the output of the attached {self.names['dropout']} needs no "
                "gradient; let the dropout pass a gradient on, or attach no dropout, or use fused_ar_tar"
            )
        if not dropped.requires_grad:
            return self._note(FROZEN)
        self._note(RUN)
        steps = raw.shape[time_axis.number()] if call.packed is None else len(call.packed.batch_sizes)
        # Without TAR time_dim=0 is often the batch, and a batch of one is no time step, unless raw has three axes.
        is_batch = time_axis.time_dim == 0 and raw.dim() != 3 and not is_on(call.coefficients[1])
        run.terms, run.is_one_step = terms, steps == 1 and not is_batch
        return None


def described(raw: Tensor | PackedSequence, time_axis: TimeAxis, masks: Mapping[str, Tensor | None]) -> str:
    """Say which axes of raw were taken for what, and which time steps count."""
    rows = data_of(raw)
    shape = (*rows.shape,)
    if isinstance(raw, PackedSequence):
        sequences = f"{raw.batch_sizes[0]} packed sequences of up to {len(raw.batch_sizes)} time steps"
        return f"raw {shape} as {sequences}, hidden {shape[-1]}; every step counts"
    time, batch = axes_of(rows, time_axis.number())
    names = {time: "time", batch: "batch"}
    axes = ", ".join([f"{names.get(i, 'hidden')} {size}" for i, size in enumerate(shape)])
    steps = "; ".join([f"{x} {(*mask.shape,)}: {MASKED[x]}" for x, mask in masks.items() if mask is not None])
    return f"raw {shape} as {axes}; {steps or 'no mask: every step counts'}"
