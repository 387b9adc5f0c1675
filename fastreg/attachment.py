"""`Attachment`: the hooks on a recurrent module and on the dropout that follows it.

The hook on the module notes raw. The hook on the dropout computes the penalty, and returns dropped with a mark that
holds it. Without a dropout the hook on the module does this with raw. `fastreg.carrier` describes marks and runs.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.carrier import Run, is_marked, mark, stamps_of
from fastreg.penalty import penalize
from fastreg.problem import Coefficient, Options, data_of
from fastreg.rnn_dropout import FusedRNNDropout, Loan
from fastreg.source import Source
from fastreg.torch_state import current, level_of_caller, recomputes, transformed, untraced, version_of

SHARED = (
    "attach: this {} shares the hooks of the attached one, or its class got another forward; remove() the attachment "
    "before, and attach again"
)
REPLICA = (
    "attach: DataParallel runs a replica of the attached {} on each device, and the penalty of a replica is lost. Use "
    "DistributedDataParallel. Or remove() the attachment, let the model return (decoded, raw, dropped), which "
    "DataParallel gathers, and pass them to on_loss_begin"
)
SCRIPTED = (
    "attach: torch.jit.script cannot compile the hooks of an attached module; remove() the attachment before, or use "
    "torch.jit.trace or torch.export in evaluation"
)
NO_GRADIENTS = (
    "the attached {} or its dropout ran without gradients, so the gradient of the penalty would be lost. For "
    "activation checkpointing pass use_reentrant=False; otherwise run both outside torch.no_grad()"
)


_runs_of: WeakValueDictionary[int, Run] = WeakValueDictionary()  # the latest run of each raw, by the id of raw


class Hook:
    """Run a function as a hook on the forward of a module; in a copy or a pickle of the module, do nothing."""

    def __init__(self, attachment: Attachment, function: Callable[..., Any], register: Any) -> None:
        self.attachment, self.function, self.handle = attachment, function, register(self, with_kwargs=True)

    @untraced
    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    @property
    def __name__(self) -> str:
        # Only torch.jit.script asks for the name of a hook, to compile it.
        raise AttributeError(SCRIPTED)

    def __reduce__(self) -> Any:
        # The pickle has only a function of the standard library, because it may be loaded where fastreg is not
        # installed. From the handle PyTorch learns the ids of the hooks in the pickle, and gives these ids to no other
        # hook.
        return getattr, (nullcontext(self.handle), "__exit__")


class Hooked:
    """Hold the two hooks on a module until `remove()`.

    Attributes:
        module: the module.
        before: the function that the first hook calls after its checks.
        forward: the forward that an attachment has made an attribute of the module itself, or `None`.
    """

    def __init__(self, of: Attachment, module: nn.Module, before: Any, after: Any) -> None:
        self.module, self.before = module, before
        self.first = Hook(of, self._begin, module.register_forward_pre_hook)
        self.last = Hook(of, after, module.register_forward_hook)
        # Dynamo does not guard on hooks, and would run code that was compiled for a module without hooks. But it does
        # guard on whether the instance itself has an attribute forward.
        own = vars(module).setdefault("forward", module.forward)
        self.forward = own if own == MethodType(type(module).forward, module) else None

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Check that the hooks run on their own module, and move the later hook to the end, behind other hooks.

        Raises:
            RuntimeError: another module shares the hooks, or the module would run another forward than its class has.
        """
        if getattr(module, "_is_replica", False):
            raise RuntimeError(REPLICA.format(type(module).__name__))
        if module is not self.module or (self.forward and self.forward.__func__ is not type(module).forward):
            raise RuntimeError(SHARED.format(type(module).__name__))
        hooks, own = vars(module)["_forward_hooks"], self.last.handle.id
        if own in hooks:
            hooks.move_to_end(own)
        return self.before(args, kwargs)

    def remove(self) -> None:
        """Remove the hooks; if another hook calls this, PyTorch still calls them, but without keyword arguments."""
        for hook in (self.first, self.last):
            hook.handle.remove()
            hook.function = nothing
        if not attachments_of(self.module) and vars(self.module).get("forward", nothing) == self.forward:
            del self.module.forward


def attachments_of(module: nn.Module) -> list[Attachment]:
    """Return the attachments that have hooks on a module."""
    return [hook.attachment for hook in vars(module)["_forward_hooks"].values() if isinstance(hook, Hook)]


def nothing(*_: object, **__: object) -> None:
    """Return `None`, as a dead weak reference does."""


class Attachment(AbstractContextManager["Attachment"]):
    """Hold the hooks on a module and its dropout until `remove()`. Hooks in a copy of the model do nothing.

    Args:
        owner: the `RNNRegularizer`, which has the coefficients.
        source: the source, which has the modules.

    Attributes:
        source: the source.
        names: the names of the modules' types, for messages.
        constant: the latest run that needs no gradient, until a loss takes it.
        without_gradients: whether a call in training had no gradients.
        is_idle: whether the module has never been called.
    """

    _owner: Callable[[], Any] = staticmethod(nothing)  # a copy of a handle reaches no regularizer
    _hooked: Any = ()
    _runs: Sequence[weakref.ref[Run]] = ()

    def __init__(self, owner: Any, source: Source) -> None:
        self.source, self.is_idle = source, True
        self.names = type(source.module).__name__, type(source.dropout).__name__
        self._owner = weakref.ref(owner, lambda _: self.remove())
        self.clear()
        self._hooked = [Hooked(self, source.module, nothing, self._after_module)]
        if source.dropout is not None:
            before = self._lend if isinstance(source.dropout, FusedRNNDropout) else nothing
            self._hooked.append(Hooked(self, source.dropout, before, self._after_dropout))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which has no hooks and no runs."""
        return {}

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks and drop the runs; a second call does nothing."""
        for hooked in self._hooked:
            hooked.remove()
        self.clear()
        owner, self._owner, self._hooked = self._owner(), nothing, ()
        if owner is not None:
            owner.forget(self)

    @property
    def runs(self) -> list[Run]:
        """Return the runs that the autograd graph still keeps."""
        return [run for x in self._runs if (run := x()) is not None]

    def chosen(self, found: Collection[Run], coefficients: tuple[Coefficient, Coefficient]) -> list[Run]:
        """Return the runs of this module on which a loss depends, and a constant run.

        Args:
            found: the runs of all modules on which the loss depends.
            coefficients: alpha and beta of the regularizer.

        Raises:
            RuntimeError: the dropout did not get the raw of a run, the coefficients have changed since a run, or
                several runs have one time step each; the message names the remedy.

        Warns:
            UserWarning: the module has never been called; it warns once.
        """
        (module, dropout), constant = self.names, self.constant if self.source.module.training else None
        if any([not run.again for run in self._waiting]):
            raise RuntimeError(
                f"on_backward_begin: the attached {dropout} did not get the output of the {module}: something lies "
                "between them (packing, padding, a slice, a full backward hook, another module), or a step ended "
                "before the dropout ran. Attach a dropout that gets this very tensor, or no dropout, or use "
                "on_loss_begin; after a step that ended early, call clear()"
            )
        if found and self.is_idle and self.source.module.training:
            self.is_idle = False
            missing = f"attach: the attached {module} was never called, and has no penalty; attach what the model calls"
            warnings.warn(missing, stacklevel=level_of_caller())
        runs = [run for run in found if run.attachment is self]
        if constant is not None:
            self.constant, runs = None, [*dict.fromkeys([*runs, constant])]
        if any([run.stamps != stamps_of(coefficients) for run in runs]):
            raise RuntimeError(
                f"on_backward_begin: alpha or beta has changed since the forward of the attached {module}, but the "
                "penalty has the coefficients of that forward; change them after the backward"
            )
        axis = self.source.place.axis()
        single = [x for x in runs if (x.shape[axis] if x.packed is None else len(x.packed.batch_sizes)) == 1]
        if len(single) > 1:
            raise RuntimeError(
                f"on_backward_begin: the {module} ran {len(single)} times over one time step, where AR would add up "
                "and TAR has no changes; stack its outputs along time, and call fused_ar_tar"
            )
        return runs

    def clear(self) -> None:
        """Drop all runs."""
        for run in self.runs:
            run.terms = None
        self._runs = []
        self._waiting: list[Run] = []  # runs whose dropout has not run yet; they hold no graph
        self.constant: Run | None = None
        self.without_gradients = False

    # The hooks

    def _after_module(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        """Note raw, and mark tensors of the module's output: the states, and raw if there is no dropout."""
        source, owner, again, self.is_idle = self.source, self._owner(), current() != -1, False
        if not module.training:
            return None
        if not torch.is_grad_enabled():
            self.without_gradients = True
            return None
        self._refuse_reentrant(again)
        if transformed():
            raise RuntimeError(
                f"attach: the attached {self.names[0]} ran under a transform of torch.func, under forward-mode AD or "
                "in a trace, where no loss can find the penalty; remove() the attachment there, and use fused_ar_tar"
            )
        raw = source.raw_of(result)
        rows, packed = data_of(raw), raw._replace(data=None) if isinstance(raw, PackedSequence) else None
        of_raw = weakref.ref(rows), version_of(rows), rows.shape, packed, source.masks(*args, **kwargs)
        run = Run(*of_raw, self, again, (owner.alpha, owner.beta))
        if not again:
            self._runs = [*[x for x in self._runs if x() is not None], weakref.ref(run)]
            self.constant = None
        marked = {id(rows): rows}
        if source.dropout is None:
            marked[id(rows)] = self._formed(run, rows, rows, {})
        else:
            waiting = [x for x in self._waiting if x.raw() is not None or not x.again]
            self._waiting = [*waiting[-999:], run]  # a loop without a loss must not fill the memory
        if again or result is rows is marked[id(rows)]:
            return None
        return self._marked(run, result, (args, kwargs), marked)

    def _marked(self, run: Run, result: Any, inputs: Any, marked: dict[int, Tensor]) -> Any:
        """Return the output of a module with its tensors marked for a run.

        Args:
            run: the run.
            result: the output of the module.
            inputs: the arguments of the module.
            marked: tensors that are marked already, by the ids of the tensors that they replace.
        """
        unique = {id(x): x for x in tensors_in(result)}
        if self.source.dropout is None and not marked.keys() & unique.keys():
            raise TypeError(
                f"attach: expected raw as a tensor in tuples, lists, dictionaries or model outputs, got a "
                f"{type(result).__name__} in which raw cannot be replaced, or an output= that computes raw. Let the "
                "module return raw in a tuple; or pass raw through an nn.Identity, and attach this nn.Identity"
            )
        others = [x for i, x in unique.items() if x.requires_grad and i not in marked]
        if others:
            memory = Counter([x.untyped_storage().data_ptr() for x in (*unique.values(), *tensors_in(inputs))])
            as_views = [memory[x.untyped_storage().data_ptr()] > 1 for x in others]
            marked.update(zip(map(id, others), mark(run, others, as_views), strict=True))
        return mapped(result, lambda x: marked.get(id(x), x))

    def _lend(self, args: Any, kwargs: Any) -> Any:
        """Lend a fused dropout coefficients and axis, and the masks of its run unless it is called with masks."""
        run = self._run_of(args, kwargs)
        if run is None:
            return None
        if run.packed is not None and self.source.dropout.training:
            raise TypeError(
                "FusedRNNDropout: expected (batch, time, hidden) as a tensor, got the data of a PackedSequence, whose "
                "rows belong to several sequences; use another dropout for packed data"
            )
        given = dict(zip(("p", "valid", "starts"), args[1:], strict=False)) | kwargs
        masks = {name: mask for name, mask in run.masks.items() if given.get(name) is None}
        alpha, beta = run.coefficients()
        return args[:1], given | masks | {"loan": Loan(alpha, beta, self.source.place_for(run.raw()))}

    def _after_dropout(self, dropout: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        """Compute the penalty of the run whose raw is the input of the dropout, and mark the output."""
        run, again = self._run_of(args, kwargs), current() != -1
        if run is None:
            self._refuse_reentrant(again)
            return None
        (module, name), raw = self.names, run.raw()
        is_first = run in self._waiting
        self._waiting = [x for x in self._waiting if x is not run]
        if not torch.is_grad_enabled():
            self.without_gradients = self.without_gradients or is_first
            return None
        if not (again or is_first):
            raise RuntimeError(
                f"attach: the attached {name} got the same output of the {module} twice, and AR is defined for one "
                "dropped tensor; use fused_ar_tar, or attach no dropout"
            )
        if not isinstance(result, (Tensor, PackedSequence)):
            raise TypeError(f"dropout: expected a tensor from the attached {name}, got {type(result).__name__}")
        if version_of(raw) != run.version:
            raise RuntimeError(
                f"attach: the output of the {module} was changed in place before or by its dropout; use "
                "Dropout(inplace=False), and apply no operation like relu_() to that output"
            )
        dropped = self._formed(run, raw, data_of(result), kwargs)
        return result._replace(data=dropped) if isinstance(result, PackedSequence) else dropped

    def _refuse_reentrant(self, again: bool) -> None:
        """Check that no forward without gradients is recomputed with gradients, as its penalty reached no loss."""
        if again and self.without_gradients and torch.is_grad_enabled() and not recomputes():
            raise RuntimeError(f"attach: {NO_GRADIENTS.format(self.names[0])}")

    def _run_of(self, args: Any, kwargs: Any) -> Run | None:
        """Return the run whose raw is among the arguments of a dropout, or `None`."""
        given = [data_of(x) for x in (*args, *kwargs.values()) if x is not None]
        return next((run for run in (*self._waiting, *self.runs) for x in given if run.raw() is x), None)

    def _formed(self, run: Run, raw: Tensor, dropped: Tensor, given: Any) -> Tensor:
        """Compute the penalty of a run, or take it from a loan; return dropped, marked if it needs a gradient.

        A recomputation computes the penalty, too, so that it saves the same tensors as the forward.

        Args:
            run: the run.
            raw: the module's output, or the rows of a `PackedSequence`.
            dropped: the output of the dropout, in the same form.
            given: the arguments of the dropout by their names; the arguments of a fused dropout contain a loan.
        """
        loan = given.get("loan")
        other = _runs_of.get(id(raw), run)  # of another attachment that has a dropout, or an earlier run of a parameter
        is_regularized = other.attachment is not self and other.raw() is raw and other.terms is not None
        if is_regularized or is_marked(raw) or is_marked(dropped):
            raise RuntimeError(
                f"attach: the output of the {self.names[0]} is regularized already, by another attached module that "
                "contains it or that it contains; attach only one of them"
            )
        terms: Any = loan and loan.terms
        if loan is None or loan.dropped is not dropped or loan.version != version_of(dropped):
            masks = [(run.masks if loan is None else given)[name] for name in ("valid", "starts")]
            squared = raw if getattr(self.source.dropout, "ar_of", None) == "raw" else dropped
            pair = [x if run.packed is None else run.packed._replace(data=x) for x in (raw, squared)]
            options = Options(*self.source.place_for(pair[0]), "mean", True, fills=False)
            terms = penalize(pair, run.coefficients(), (None, *masks), options)  # pyright: ignore
        if current() != -1:
            return dropped
        run.terms, _runs_of[id(raw)] = terms, run
        if dropped.requires_grad:
            return mark(run, [dropped], [True])[0]
        self.constant = run
        return dropped

    def passed(self, run: Run) -> None:
        """Tell the regularizer that a backward runs through a marked tensor of a run."""
        owner = self._owner()
        if owner is not None:
            owner.passed(run)


def mapped(result: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return an output in which a function has replaced each tensor.

    Tuples, lists, dictionaries, packed sequences and model outputs are copied. Any other object is returned unchanged,
    and so is a sparse tensor.
    """
    if isinstance(result, Tensor) and result.layout is torch.strided:
        return function(result)
    # A named tuple, such as a packed sequence, has a function that makes it from a list.
    make: Any = type(result) if type(result) in (tuple, list) else getattr(result, "_make", None)
    if make is not None:
        return make([mapped(x, function) for x in result])
    if isinstance(result, dict):
        made = copy(result)
        for items in (getattr(made, "__dict__", {}), made):  # a model output has the items as attributes, too
            for name, x in [*items.items()]:
                items[name] = mapped(x, function)
        return made
    return result


def tensors_in(result: Any) -> list[Tensor]:
    """Return the tensors that `mapped` would replace."""
    tensors: list[Tensor] = []
    mapped(result, lambda x: (tensors.append(x), x)[1])
    return tensors
