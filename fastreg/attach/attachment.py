"""`Attachment`: the hooks on a recurrent module and on the dropout that follows it.

The hook on the module tells the ledger of raw. The hook on the dropout computes the penalty, and returns dropped with a
mark by which a loss finds the penalty. Without a dropout the hook on the module does this with raw.
`fastreg.attach.ledger` follows the runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.attach.ledger import HELD, NO_GRADIENTS, Ledger, Run
from fastreg.attach.mark import is_marked, mark
from fastreg.attach.source import Source
from fastreg.call.arguments import check_tensor
from fastreg.call.penalty import penalize
from fastreg.call.problem import Options, data_of
from fastreg.call.rnn_dropout import FusedRNNDropout, Loan
from fastreg.call.torch_state import address_of, current, recomputes, transformed, untraced, version_of

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


class Hook:
    """Run a function as a hook on the forward of a module; in a copy or a pickle of the module, do nothing."""

    def __init__(self, attachment: Attachment, module: nn.Module, function: Callable[..., Any], register: Any) -> None:
        self.attachment, self.module, self.function = attachment, module, function
        self.handle = register(self, with_kwargs=True)

    @untraced
    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if module is self.module:
            return self.function(*args)
        # A shallow copy or a replica shares the hooks, and torch.ao registers them on the modules that it makes.
        if module.training and self.function is not nothing:
            is_replica = getattr(module, "_is_replica", False)
            raise RuntimeError((REPLICA if is_replica else SHARED).format(type(module).__name__))
        return None

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
    """Hold the hooks on a module until `remove()`.

    Attributes:
        module: the module.
        hooks: the hooks; the last one runs after the forward.
        forward: the forward that an attachment has made an attribute of the module itself, or `None`.
    """

    def __init__(self, of: Attachment, module: nn.Module, before: Any, after: Any) -> None:
        for hook in (*vars(module)["_forward_hooks"].values(), *vars(module)["_forward_pre_hooks"].values()):
            if isinstance(getattr(hook, "__self__", None), nullcontext):  # an idle hook that a copy has brought
                hook.__self__.enter_result.remove()
        self.module, self.hooks = module, [Hook(of, module, after, module.register_forward_hook)]
        if before is not None:
            self.hooks.insert(0, Hook(of, module, before, module.register_forward_pre_hook))
        # Dynamo does not guard on hooks, and would run code that was compiled for a module without hooks. But it does
        # guard on whether the instance itself has an attribute forward.
        own = vars(module).setdefault("forward", module.forward)
        self.forward = own if own == MethodType(type(module).forward, module) else None

    def prepare(self) -> None:
        """Move the hook after the forward to the end, behind other hooks.

        Raises:
            RuntimeError: the module would run another forward than its class has.
        """
        if self.forward and self.forward.__func__ is not type(self.module).forward:
            raise RuntimeError(SHARED.format(type(self.module).__name__))
        hooks, own = vars(self.module)["_forward_hooks"], self.hooks[-1].handle.id
        if own in hooks:
            hooks.move_to_end(own)

    def remove(self) -> None:
        """Remove the hooks; if another hook calls this, PyTorch still calls them, but without keyword arguments."""
        for hook in self.hooks:
            hook.handle.remove()
            hook.function = nothing
        if not attachments_of(self.module) and vars(self.module).get("forward", nothing) == self.forward:
            del self.module.forward


def attachments_of(module: nn.Module) -> list[Attachment]:
    """Return the attachments that have hooks on a module."""
    return [hook.attachment for hook in vars(module)["_forward_hooks"].values() if isinstance(hook, Hook)]


def nothing(*_: object) -> None:
    """Return `None`."""


class Attachment(AbstractContextManager["Attachment"]):
    """Hold the hooks on a module and its dropout until `remove()`. Hooks in a copy of the model do nothing.

    Args:
        ledger: the ledger of the regularizer.
        source: the source, which has the modules.

    Attributes:
        ledger: the ledger.
        source: the source.
        names: the names of the modules' types, for messages.
        options: the options of the calls that compute penalties.
        paths: the paths of the module and of the dropout in the model, where an adapter has found them there.
        say: a function that is called once with the handle's `repr()`, at the first loss; `None` to say nothing.
    """

    names: dict[str, str] = {}  # noqa: RUF012 - of a copy
    paths: tuple[Any, Any] = None, None
    say: Callable[[str], Any] | None = None
    _hooked: Any = ()  # a copy of a handle has no hooks

    def __init__(self, ledger: Ledger, source: Source) -> None:
        self.ledger, self.source, dropout = ledger, source, source.dropout
        self.names = {"module": type(source.module).__name__}
        self.options = Options(*source.place, "mean", True, fills=False)
        self._hooked = [Hooked(self, source.module, self._before_module, self._after_module)]
        if dropout is not None:
            self.names["dropout"] = type(dropout).__name__
            before = self._lend if isinstance(dropout, FusedRNNDropout) else None
            self._hooked.append(Hooked(self, dropout, before, self._after_dropout))
        ledger.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which has no hooks and no runs."""
        return {}

    def __repr__(self) -> str:
        label = [f"{path} ({x})" if path else x for x, path in zip(self.names.values(), self.paths, strict=False)]
        shown = self.ledger.sites[self].shown or "no run yet" if self._hooked else "removed"
        return f"{' -> '.join(label) or 'Attachment'}: {shown}"

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks and drop the runs; a second call does nothing."""
        hooked, self._hooked = self._hooked, ()
        for x in hooked:
            x.remove()
        if hooked:
            self.ledger.remove(self)

    # The hooks

    def _before_module(self, *_: Any) -> None:
        """Prepare the hooks of the module and of its dropout."""
        for x in self._hooked:
            x.prepare()

    def _after_module(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Note raw, and mark tensors of the module's output: the states, and raw if there is no dropout."""
        source, again = self.source, current() != -1
        if not self.ledger.enter(self, source.module.training, again):
            return None
        if again:
            self._refuse_reentrant()
        if transformed():
            raise RuntimeError(
                f"attach: the attached {self.names['module']} ran under a transform of torch.func, under forward-mode "
                "AD or in a trace, where no loss can find the penalty; remove() the attachment there, and use "
                "fused_ar_tar"
            )
        raw = source.raw_of(result)
        rows = data_of(raw)
        if rows.is_nested:  # which has no shape
            check_tensor("raw", rows)
        other = self.ledger.find(rows)
        if is_marked(rows) or (other is not None and other.attachment is not self and other.state in HELD):
            self._refuse_regularized()
        run = self.ledger.begin(self, raw, source.masks.of(*args, **kwargs), again)
        marked = {id(rows): rows}
        if source.dropout is None:
            self.ledger.arrive(run)
            marked[id(rows)] = self._formed(run, rows, rows, None, again)
        if again or result is rows:
            return None if again else marked[id(rows)]
        return self._marked(run, result, (*args, *kwargs.values()), marked)

    def _marked(self, run: Run, result: Any, inputs: Any, marked: dict[int, Tensor]) -> Any:
        """Return the output of a module with its tensors marked for a run.

        Args:
            run: the run.
            result: the output of the module.
            inputs: the arguments of the module.
            marked: tensors that are marked already, by the ids of the tensors that they replace.
        """
        unique = tensors_in(result)
        if self.source.dropout is None and not marked.keys() <= unique.keys():
            raise TypeError(
                f"attach: expected raw as a tensor in tuples, lists, dictionaries or model outputs, got a "
                f"{type(result).__name__} in which raw cannot be replaced, or an output= that computes raw. Let the "
                "module return raw in a tuple; or pass raw through an nn.Identity, and attach this nn.Identity"
            )
        others = {i: x for i, x in unique.items() if x.requires_grad and i not in marked}
        if others:
            at = {i: address_of(x) for i, x in unique.items()}
            memory = [*at.values(), *map(address_of, tensors_in(inputs).values())]
            as_views = [at[i] is None or memory.count(at[i]) > 1 for i in others]
            marked.update(zip(others, mark(run, as_views, *others.values()), strict=True))
        return mapped(result, lambda x: marked.get(id(x), x))

    def _lend(self, args: Any, kwargs: Any) -> Any:
        """Pass a fused dropout the coefficients and axis, and the masks of its run unless the caller gave some."""
        run = self._run_of(args, kwargs)
        if run is None:
            return None
        if run.packed is not None and self.source.dropout.training:  # pyright: ignore[reportOptionalMemberAccess]
            raise TypeError(
                "FusedRNNDropout: expected (batch, time, hidden) as a tensor, got the data of a PackedSequence, whose "
                "rows belong to several sequences; use another dropout for packed data"
            )
        given = dict(zip(("p", "valid", "starts"), args[1:], strict=False)) | kwargs
        run.masks.update({name: given[name] for name in run.masks if given.get(name) is not None})
        alpha, beta = run.coefficients()
        return args[:1], given | run.masks | {"loan": Loan(alpha, beta, self.source.place_for(run.raw()))}

    def _after_dropout(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Compute the penalty of the run whose raw is the input of the dropout, and mark the output."""
        run, again = self._run_of(args, kwargs), current() != -1
        if again:
            self._refuse_reentrant()
        if run is None:
            return None
        raw, is_first = run.raw(), self.ledger.arrive(run)
        if not torch.is_grad_enabled():
            return None
        if not (again or is_first):
            raise RuntimeError(
                f"attach: the attached {self.names['dropout']} got the same output of the {self.names['module']} "
                "twice, and AR is defined for one dropped tensor; use fused_ar_tar, or attach no dropout"
            )
        if not isinstance(result, (Tensor, PackedSequence)):
            name = self.names["dropout"]
            raise TypeError(f"dropout: expected a tensor from the attached {name}, got {type(result).__name__}")
        if version_of(raw) != run.version:
            raise RuntimeError(
                f"attach: the output of the {self.names['module']} was changed in place before or by its dropout; use "
                "Dropout(inplace=False), and apply no operation like relu_() to that output"
            )
        rows = data_of(result)
        dropped = self._formed(run, raw, rows, kwargs.get("loan"), again)
        return dropped if result is rows else result._replace(data=dropped)  # pyright: ignore

    def _run_of(self, args: Any, kwargs: Any) -> Run | None:
        """Return the run of the module whose raw is among the arguments of the dropout, or `None`."""
        for x in (*args, *kwargs.values()):
            run = self.ledger.find(data_of(x))
            if run is not None and run.attachment is self:
                return run
        return None

    def _refuse_reentrant(self) -> None:
        """Check that no forward without gradients is recomputed with gradients, as its penalty reached no loss."""
        if self.ledger.sites[self].without and torch.is_grad_enabled() and not recomputes():
            raise RuntimeError(f"attach: {NO_GRADIENTS.format(**self.names)}")

    def _refuse_regularized(self) -> None:
        """Raise the error for a tensor that another attachment regularizes."""
        raise RuntimeError(
            f"attach: the output of the {self.names['module']} is regularized already, by another attached module that "
            "contains it or that it contains; attach only one of them"
        )

    def _formed(self, run: Run, raw: Tensor, dropped: Tensor, loan: Loan | None, again: bool) -> Tensor:
        """Compute the penalty of a run, or take it from a loan; return dropped, marked if it needs a gradient.

        A recomputation computes the penalty, too, so that it saves the same tensors as the forward.

        Args:
            run: the run.
            raw: the module's output, or the rows of a `PackedSequence`.
            dropped: the output of the dropout, in the same form.
            loan: the loan of a fused dropout.
            again: whether this is a recomputation.
        """
        if is_marked(dropped):
            self._refuse_regularized()
        terms: Any = loan and loan.terms
        if loan is None or loan.dropped is not dropped or loan.version != version_of(dropped):
            dropout: Any = self.source.dropout  # asking a module for an attribute that it lacks takes 2 us
            pair: Any = raw, raw if isinstance(dropout, FusedRNNDropout) and dropout.ar_of == "raw" else dropped
            if run.packed is not None:
                pair = [run.packed._replace(data=x) for x in pair]
            place, options = self.source.place_for(pair[0]), self.options
            if place is not self.source.place:
                options = options._replace(batch_first=place.batch_first, time_dim=place.time_dim)
            terms = penalize(pair, run.coefficients(), (None, run.masks["valid"], run.masks["starts"]), options)
        return dropped if again else self.ledger.form(run, dropped, terms)


def mapped(result: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return an output in which a function has replaced each tensor.

    Tuples, lists, dictionaries, packed sequences and model outputs are copied. Any other object is returned unchanged,
    and so is a sparse or nested tensor.
    """
    kind = type(result)
    if kind is tuple or kind is list:
        return kind([mapped(x, function) for x in result])
    if isinstance(result, Tensor):
        return function(result) if result.layout is torch.strided and not result.is_nested else result
    make = getattr(kind, "_make", None) if isinstance(result, tuple) else None
    if make is not None:  # of a named tuple, such as a packed sequence
        return make([mapped(x, function) for x in result])
    if isinstance(result, dict):
        own: Any = OrderedDict if isinstance(result, OrderedDict) else dict
        try:
            made = copy(result)
        except Exception:  # the class refuses items, or takes a missing attribute for a missing item
            made = own.__new__(kind)
        if kind.__dictoffset__:  # a model output has the items as attributes, too
            vars(made).update({name: mapped(x, function) for name, x in vars(result).items()})
        for name, x in own.items(result):
            own.__setitem__(made, name, mapped(x, function))
        return made
    return result


def tensors_in(result: Any) -> dict[int, Tensor]:
    """Return the tensors that `mapped` would replace, by their ids."""
    tensors: dict[int, Tensor] = {}
    mapped(result, lambda x: tensors.setdefault(id(x), x))
    return tensors
