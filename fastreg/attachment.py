"""`Attachment`: captures the runs of a recurrent module and of the dropout that follows it by forward hooks.

The hook on the module starts a capture, with all that has to be known of the moment: the place of the run in the
autograd graph, and the version of its output, which shows a later change in place. The hook on the dropout completes
it. `fastreg.regularizer` tells when captures are used and when they are dropped.

A capture lives as long as somebody can still use the run. Both hooks put a node of their own into the autograd graph,
behind the tensors that they see, and the node holds a token. When all that was computed from these tensors is gone, so
is the token, and with it what was captured under it; the tokens of the latest run alone are held here as well. What is
captured lies before that node in the graph, never behind it, where it would hold its own token.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from fastreg.prepare import plain
from fastreg.problem import Coefficient
from fastreg.rnn_dropout import Activations, FusedRNNDropout, tensor_of
from fastreg.torch_state import is_memory, observed

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # the attributes of a module that name the hooks of its forward


class Owner(Protocol):
    """Declare what an attachment needs of the regularizer that made it."""

    alpha: Coefficient
    beta: Coefficient

    def forget(self, attachment: Attachment) -> None:
        """Leave out an attachment that removes itself."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """Name the modules to attach to, and say how to read what they return.

    Attributes:
        module: what gives raw.
        dropout: what gives dropped from raw; `None` where dropped is raw.
        output: picks raw from what the module returned; `None` where it is that, or the first of it.
        batch_first: whether raw is `(batch, time, hidden)`.
        valid: gets what the module was called with, and returns its valid steps, or `None` where all are.
    """

    module: nn.Module
    dropout: nn.Module | None
    output: Callable[[Any], Any] | None
    batch_first: bool
    valid: Callable[..., Tensor | None] | None

    def raw_of(self, result: Any) -> Tensor | PackedSequence:
        """Return raw of what the module returned.

        Raises:
            TypeError, ValueError: it cannot be told; the message says what to do.
        """
        name = type(self.module).__name__
        if self.output is not None:
            raw, where, advice = self.output(result), "output: expected the callable to pick", ""
        else:
            raw = getattr(result, "last_hidden_state", result)
            if isinstance(raw, (list, tuple)) and not isinstance(raw, PackedSequence) and len(raw) > 0:
                raw = raw[0]
            where = f"attach: expected the {name} to return"
            advice = ", or one as the first of a tuple or as last_hidden_state; pick it by attach(..., output=...)"
        if not isinstance(raw, (Tensor, PackedSequence)):
            raise TypeError(f"{where} a tensor or a PackedSequence, got {type(raw).__name__}{advice}")
        runs_over_time = self.output is not None or isinstance(self.module, nn.RNNBase)
        if isinstance(raw, Tensor) and raw.dim() == 2 and not runs_over_time:
            raise ValueError(
                f"attach: expected (batch, time, hidden) or (time, batch, hidden) from the {name}, got "
                f"{tuple(raw.shape)}. If that is one time step, attach the module that runs over all of them; if it is "
                "(time, hidden) of one sequence, say so by output=lambda result: result, or what picks it"
            )
        return raw


@dataclass(frozen=True, eq=False)
class Run:
    """Hold one run of an attached module.

    Attributes:
        raw: its output.
        valid: its valid steps, or `None`.
        nodes: those nodes of the autograd graph that what it returned comes from.
        grad_enabled: whether gradients were enabled.
        version: the version of raw.
    """

    raw: Tensor | PackedSequence
    valid: Tensor | None
    nodes: frozenset[Any]
    grad_enabled: bool
    version: int


@dataclass(frozen=True, eq=False)
class Kept:
    """Hold what to regularize of a run.

    Attributes:
        activations: raw and dropped.
        output: what the dropout returned, or raw.
        grad_enabled: whether gradients were enabled in the dropout.
        version: the version of the output.
    """

    activations: Activations
    output: Tensor
    grad_enabled: bool
    version: int


class Token:
    """Stand for a run, or for what its dropout returned: what is captured lasts as long as somebody holds it."""

    def __init__(self) -> None:
        self.completed: Callable[[], Token | None] = nobody  # the token of what the dropout returned for this run


class Attachment:
    """Hold the hooks on a module and its dropout until `remove()`. A copy of the model has none."""

    def __init__(self, owner: Owner, source: Source) -> None:
        self.source = source
        self.runs: MutableMapping[Token, Run] = weakref.WeakKeyDictionary()
        self.kept: MutableMapping[Token, Kept] = weakref.WeakKeyDictionary()
        self._latest: list[Token] = []
        self._unheld: list[Token] = []  # of runs with a graph that cannot hold a token
        self._owner = weakref.ref(owner, lambda _: self.remove())
        self._undisturbed: Callable[..., Any] = torch.compiler.disable(lambda hook, *args: hook(*args))
        self._last = [source.module.register_forward_hook(self._after_module, with_kwargs=True)]
        self._first = [source.module.register_forward_pre_hook(self._before_module)]
        if source.dropout is not None:
            self._last.append(source.dropout.register_forward_hook(self._after_dropout, with_kwargs=True))
            self._first.append(source.dropout.register_forward_pre_hook(self._before_dropout, with_kwargs=True))
        for module in self._modules():
            vars(module)["__getstate__"] = MethodType(_state_without_hooks, module)

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out of a copy or a pickle: a copied model's hooks must not reach this regularizer."""
        inert = {"source": None, "runs": {}, "kept": {}, "_latest": [], "_unheld": [], "_first": [], "_last": []}
        return inert | {"_owner": nobody, "_undisturbed": nobody}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off, and drop what they captured; a second call does nothing."""
        for hook in (*self._first, *self._last):
            hook.remove()
        for module in self._modules():
            if not any(map(_is_own, vars(module)["_forward_hooks"].values())):
                vars(module).pop("__getstate__", None)
        self.clear()
        owner, self._owner = self._owner(), nobody
        if owner is not None:
            owner.forget(self)

    def clear(self) -> None:
        """Drop all captures, and the penalty in a `FusedRNNDropout`."""
        self._latest, self._unheld = [], []
        self.kept.clear()
        self.runs.clear()
        for module in self._modules():
            if isinstance(module, FusedRNNDropout):
                module.clear()

    def activations(self, loss: Tensor) -> list[Activations]:
        """Return the activations of the runs that belong to the step of this loss.

        Raises:
            RuntimeError: a run has no dropped, no gradients, or was changed in place; the message says what to do.
        """
        runs, training = list(self.runs.items()), self.source.module.training
        if len(runs) > 1 or not training:
            latest = runs[-1:] if training else []
            runs = [(token, run) for token, run in runs if _depends(loss, run.nodes)] or latest
        return [self._checked(run, self._kept_of(token), loss) for token, run in runs]

    def _modules(self) -> list[nn.Module]:
        """Return the modules that have hooks."""
        source: Source | None = self.source
        return [] if source is None else [x for x in (source.module, source.dropout) if x is not None]

    # The hooks. A compiler cannot follow what they do, and breaks its graph.

    def _before_module(self, *_: Any) -> None:
        self._undisturbed(self._go_last)

    def _after_module(self, *args: Any) -> Any:
        return self._undisturbed(self._capture, *args)

    def _before_dropout(self, *args: Any) -> None:
        self._undisturbed(self._lend, *args)

    def _after_dropout(self, *args: Any) -> Any:
        return self._undisturbed(self._complete, *args)

    def _go_last(self) -> None:
        """Put the hooks behind those added later, which may return something else in the place of a result."""
        for hook in self._last:
            hooks = hook.hooks_dict_ref()
            if hooks is not None and hook.id in hooks:
                hooks.move_to_end(hook.id)

    def _capture(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        """Start the capture of a run, and return the result from a node in the graph that holds its token."""
        in_backward = torch._C._current_graph_task_id() != -1  # activation checkpointing runs the forward again
        if self._owner() is None or in_backward or not module.training or torch.is_inference_mode_enabled():
            return None
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"attach: DataParallel runs a replica of the attached {type(module).__name__} on each device, where "
                "each penalty would count in full. Use DistributedDataParallel; or let the model return (decoded, raw, "
                "dropped), which DataParallel gathers, for on_loss_begin"
            )
        source = self.source
        raw = source.raw_of(result)
        rows = tensor_of(raw)
        given = [id(x) for x in _tensors((args, kwargs))]
        returned = [rows, *(x for x in _tensors(result) if id(x) not in given)]
        valid = None if source.valid is None else source.valid(*args, **kwargs)
        if not isinstance(valid, (Tensor, type(None))):
            raise TypeError(f"valid: expected the callable to return a tensor or None, got {type(valid).__name__}")
        token = Token()
        nodes = frozenset(get_gradient_edge(x).node for x in returned if x.requires_grad)  # also those of leaves
        self.runs[token] = Run(raw, valid, nodes, torch.is_grad_enabled(), _version(rows))
        if source.dropout is None:
            self._keep(token, token, Activations(raw, raw, source.batch_first, valid=valid), rows)
        passed = _passed_on(returned, token)
        self._latest = [token]
        given_back = _with(passed, result)
        if nodes and given_back is result:  # nothing that it returned can hold the token
            self._unheld.append(token)
        return given_back

    def _lend(self, dropout: nn.Module, args: Any, kwargs: Any) -> None:
        """Tell a `FusedRNNDropout` what to form the penalty with."""
        owner = self._owner()
        if owner is not None and dropout.training and isinstance(dropout, FusedRNNDropout):
            found = self._run_of(args, kwargs)
            dropout.use_once(owner.alpha, owner.beta, None if found is None else found[1].valid)

    def _complete(self, dropout: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        """Complete the capture of the run whose raw the dropout got, and return the result likewise."""
        found = self._run_of(args, kwargs)
        if found is None:
            return None
        token, run, given = found
        if not isinstance(result, (Tensor, PackedSequence)):
            raise TypeError(
                f"dropout: expected the attached {type(dropout).__name__} to return a tensor, got "
                f"{type(result).__name__}"
            )
        formed = dropout.hand_over() if isinstance(dropout, FusedRNNDropout) else None
        rows, batch_first = tensor_of(result), self.source.batch_first
        if rows is given:  # it dropped nothing
            self._keep(token, token, Activations(run.raw, run.raw, batch_first, valid=run.valid), rows)
            return None
        raw = given if given.requires_grad else tensor_of(run.raw)
        dropped: Any = result
        if isinstance(run.raw, PackedSequence):
            if isinstance(result, Tensor) and formed is not None:
                raise TypeError(
                    "FusedRNNDropout: expected the RNN's output as a tensor, got the data of a PackedSequence, "
                    "whose rows are of several sequences; use another dropout with packed sequences"
                )
            raw = run.raw._replace(data=raw)
            dropped = run.raw._replace(data=result) if isinstance(result, Tensor) else result
        if isinstance(dropout, FusedRNNDropout) and dropout.ar_of == "raw":
            dropped = raw
        valid = run.valid if run.valid is not None or formed is None else formed.valid
        # Another hook or a subclass may have replaced the dropout's input or output: its penalty is of others then.
        activations = Activations(raw, dropped, batch_first, valid=valid).or_formed(formed)
        completed = Token()
        self._keep(token, completed, activations, rows)
        passed = _passed_on([rows], completed)
        if token in self._latest:
            self._latest.append(completed)
        elif not passed:
            self._unheld.append(completed)
        return _with(passed, result)

    # What was captured

    def _keep(self, run: Token, completed: Token, activations: Activations, output: Tensor) -> None:
        """Keep what to regularize of a run under a token."""
        run.completed = weakref.ref(completed)
        # Detached, as an output behind the node would hold its own token; the version is still that of both.
        self.kept[completed] = Kept(activations, output.detach(), torch.is_grad_enabled(), _version(output))

    def _kept_of(self, token: Token) -> Kept | None:
        completed = token.completed()
        return None if completed is None else self.kept.get(completed)

    def _run_of(self, args: Any, kwargs: Any) -> tuple[Token, Run, Tensor] | None:
        """Find the run whose raw is among the arguments of a dropout, and that argument's tensor."""
        given = [tensor_of(x) for x in (*args, *kwargs.values()) if isinstance(x, (Tensor, PackedSequence))]
        for token, run in reversed(list(self.runs.items())):
            for x in given:
                if _is_same(x, tensor_of(run.raw)):
                    return token, run, x
        return None

    def _checked(self, run: Run, kept: Kept | None, loss: Tensor) -> Activations:
        module = type(self.source.module).__name__
        if loss.requires_grad and not (run.grad_enabled and (kept is None or kept.grad_enabled)):
            raise RuntimeError(
                f"on_backward_begin: the {module} or its dropout ran without gradients, so that the penalty's would "
                "be lost. For activation checkpointing pass use_reentrant=False; else run both outside torch.no_grad()"
            )
        if kept is None:
            raise RuntimeError(
                f"on_backward_begin: the attached {type(self.source.dropout).__name__} did not get the output of the "
                f"{module}: something lies between them (packing, padding, a slice, another module), or the model was "
                "compiled before attach(); or what it returned for a run before the latest is gone. Attach the module "
                "that takes that very tensor, or none, or use on_loss_begin"
            )
        if (_version(tensor_of(run.raw)), _version(kept.output)) != (run.version, kept.version):
            raise RuntimeError(
                f"on_backward_begin: the output of the {module} or of its dropout was changed in place after it was "
                "captured; use Dropout(inplace=False), and no operation like relu_() on it"
            )
        return kept.activations


def nobody(*_: object) -> None:
    """Return no owner, as a weak reference to one that is gone does."""


def _is_own(hook: Any) -> bool:
    """Tell whether a hook is that of an attachment."""
    return isinstance(getattr(hook, "__self__", None), Attachment)


def _state_without_hooks(module: nn.Module) -> Any:
    """Return the state of a module for a copy or a pickle, without what attachments have added to it."""
    own = getattr(type(module), "__getstate__", None)  # of any object from Python 3.11 on
    state = dict(vars(module)) if own is None else own(module)
    if not isinstance(state, dict):
        return state
    ids = {i for name in HOOKS for i, hook in state[name].items() if _is_own(hook)}
    others = {name: OrderedDict((i, x) for i, x in state[name].items() if i not in ids) for name in HOOKS}
    return {name: value for name, value in state.items() if name != "__getstate__"} | others


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place, as far as torch counts."""
    return 0 if x.is_inference() else x._version


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors are one, or one the other as a hook has passed it on."""
    x, y = plain(x), plain(y)
    return x is y or (not observed() and is_memory(x) and is_memory(y) and _place(x) == _place(y))


def _place(x: Tensor) -> Any:
    """Return where the elements of a tensor lie; a view may have other strides along axes of one element."""
    return x.data_ptr(), x.dtype, x.shape, [step for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]


def _tensors(x: Any) -> Iterator[Tensor]:
    """Yield the tensors in a structure of lists, tuples, mappings and dataclasses."""
    if isinstance(x, Tensor):
        yield x
    else:
        for _, item in _items(x):
            yield from _tensors(item)


def _items(x: Any) -> list[tuple[Any, Any]]:
    """Return what a structure has, by index or name; nothing of what is no structure."""
    if isinstance(x, dict):
        return list(x.items())
    if isinstance(x, (list, tuple)):
        return list(enumerate(x))
    if is_dataclass(x) and not isinstance(x, type):
        return [(field.name, getattr(x, field.name)) for field in fields(x)]
    return []


class _Passed(Function):
    """Pass tensors on, and hold a token for as long as the graph goes on from them."""

    @staticmethod
    def forward(ctx: Any, token: Token, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.token = token
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in tensors)  # no views, which detach_() and other changes in place would refuse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads


def _passed_on(tensors: list[Tensor], token: Token) -> dict[int, Tensor]:
    """Return the tensors that have a graph from a node that holds the token, by the ids of those given."""
    if observed() or not torch.is_grad_enabled():
        return {}
    tensors = [x for x in tensors if x.requires_grad and is_memory(plain(x))]
    passed = _Passed.apply(token, *tensors) if tensors else ()
    return {id(old): new for old, new in zip(tensors, passed, strict=True)}


def _with(passed: dict[int, Tensor], x: Any) -> Any:
    """Return a structure with others in the place of tensors; one that has none of these as it is."""
    if isinstance(x, Tensor):
        return passed.get(id(x), x)
    changed = {name: new for name, old in _items(x) if (new := _with(passed, old)) is not old}
    if not changed:
        return x
    if isinstance(x, tuple):
        values = [changed.get(i, old) for i, old in enumerate(x)]
        if type(x).__module__ == "torch.return_types":
            return type(x)(values)
        new = tuple.__new__(type(x), values)  # whatever its own constructor takes
        if hasattr(x, "__dict__"):
            vars(new).update(vars(x))
        return new
    x = copy.copy(x)
    for name, new in changed.items():
        if isinstance(x, (dict, list)):
            x[name] = new
        else:
            object.__setattr__(x, name, new)  # also where it is frozen
    return x


def _depends(loss: Tensor, nodes: frozenset[Any]) -> bool:
    """Return whether the graph of `loss` has one of the nodes; search the nearest first."""
    queue: deque[Any] = deque([loss.grad_fn])
    seen: set[Any] = {None}
    while queue:
        node = queue.popleft()
        if node in nodes:
            return True
        if node not in seen:
            seen.add(node)
            queue.extend(following for following, _ in node.next_functions)
    return False
