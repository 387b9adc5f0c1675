"""One call: the key of its arguments, the plan under that key, and the node that differentiates it.

A call looks its plan up. If its key is new, `Plan` checks all arguments, and the plan is kept for later calls with the
same key. A key is a flat tuple of the metadata of the arguments and of the state of PyTorch. It holds every fact that a
check, a view or compiled code depends on. It holds no tensor. For a coefficient, it records one of three facts: the
coefficient is zero, a nonzero number, or a tensor. Values are checked in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from math import inf
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from fastreg.call import arguments
from fastreg.call.backends import PLANS, backend_for
from fastreg.call.problem import ARTAR, Coefficient, Options, Place, are_same, compute_dtype, is_on, sizes_of
from fastreg.call.reference import encoded
from fastreg.call.torch_state import has_values, hooks_on_saved, is_deterministic, keepable, observed, plain, untraced
from fastreg.kernels.view import Steps, Terms, Values

# Enough plans for thousands of pairs of a batch size and a number of time steps. A plan takes up to 7.5 KB. Each
# further layer of a list takes up to 5 KB, or 0.4 KB if it is of the same kind as another one.
SIZE = 8192


def compute(
    operation: Any, activations: Sequence[Any], coefficients: Sequence[Any], selectors: Sequence[Any], options: Options
) -> Any:
    """Compute a call by the plan under its key; the first call with a key checks all arguments and makes the plan.

    Args:
        operation: the subclass of `Plan`.
        activations: raw; and dropped, or for an operation that drops units, the mask or the probability to drop a unit.
        coefficients: alpha and beta.
        selectors: lengths, valid and starts, which select the time steps that count.
        options: the other arguments.

    Returns:
        The result of the operation, or `None` if no term reads anything.
    """
    (first, second), (alpha, beta) = activations, coefficients
    key, plan, is_seen = None, None, observed()
    are_floats = not is_seen and type(alpha) is float and type(beta) is float  # a symbol is not compared
    if not (are_floats and 0 <= alpha < inf and 0 <= beta < inf):
        alpha, beta = checked_coefficient("alpha", alpha), checked_coefficient("beta", beta)
    if not (are_floats and alpha and beta):
        first, second = operation.read(first, second, alpha, beta, options)
    inputs = first, second, alpha, beta, *selectors
    if not is_seen:  # a compiler would compile again for each new plan
        key = key_of(operation, inputs, options)
        try:
            plan = PLANS.get(key)
        except TypeError:  # an option of a wrong type, which may have no hash, is an error of the checks
            key = None
    is_new = plan is None
    if plan is None:
        plan = operation(inputs, options, key is not None)
    values = Values(alpha, beta, None if plan.steps_of is None else plan.steps_of(inputs))
    tensors = plan.tensors_of(first, second)
    if is_new and key is not None:
        plan.finish(tensors, values)
        keep(key, plan)
    return plan(tensors, values) if plan.terms else None


def checked_coefficient(name: str, value: Any) -> Coefficient:
    """Check a coefficient; return a float, or a tensor that a backward can keep."""
    arguments.check_coefficient(name, value)
    return keepable(plain(value)) if isinstance(value, Tensor) else coefficient(value)


def coefficient(value: Any) -> Coefficient:
    """Convert a checked coefficient: a number to a float, a tensor to itself."""
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():  # a compiler treats a NumPy scalar as an array
        return value if isinstance(value, (int, float)) else value.item()
    return float(value)  # np.float64 is a float, but becomes one of Python's


# ---- the key


class NoKeyError(Exception):
    """The facts of a call do not determine a plan."""


def key_of(operation: Any, inputs: Sequence[Any], options: Options) -> Any:
    """Return the key of a call, or `None` if its facts do not determine a plan.

    Args:
        operation: the subclass of `Plan`.
        inputs: all tensors and coefficients; the first two may be the same tensor.
        options: the other arguments.
    """
    first, second = inputs[0], inputs[1]
    try:
        facts = facts_of(inputs)
    except NoKeyError:
        return None
    are_one = first is second if isinstance(first, Tensor) else are_same(first, second)
    state = torch.is_grad_enabled(), hooks_on_saved(False) is None, is_deterministic()
    return (operation, are_one, *facts, *options, *map(type, options), *state)


def keep(key: Any, plan: Plan) -> None:
    """Keep a plan under a key, and drop all others if the memory is full; threads may do this at the same time."""
    if len(PLANS) >= SIZE:
        PLANS.clear()
    one_of: dict[Any, Any] = {}  # equal facts share memory
    key = tuple([one_of.setdefault((type(x), x), x) for x in key])
    plan.facts = [one_of.setdefault((type(x), x), x) for x in plan.facts]
    PLANS[key] = plan


def facts_of(values: Iterable[Any]) -> list[Any]:
    """Return, in one list, all facts of some values that a check or a plan may depend on.

    A tensor has six facts. A float has one: whether it is 0.

    Raises:
        NoKeyError: the facts do not determine a plan, or a tensor has no memory, such as a wrapper of vmap.
    """
    facts: list[Any] = []
    try:
        for x in values:
            # The values of a negated view have the other sign in memory. Zeros, meta and empty tensors have no address.
            if type(x) is Tensor and (address := x.data_ptr()) and not x.is_neg():
                facts += x.shape, x.stride(), x.dtype, x.device, address % 16 == 0, x.requires_grad
            else:
                facts += (None,) if x is None else (x != 0,) if type(x) is float else _facts_of_other(x)
    except RuntimeError as error:  # PyTorch's: a nested tensor has no strides, and a sparse one has no address
        raise NoKeyError from error
    return facts


def _facts_of_other(x: Any) -> Sequence[Any]:
    """Return the facts of a list, of packed rows, or of a tensor whose subclass only decorates it.

    Raises:
        NoKeyError: the value is something else.
    """
    if isinstance(x, PackedSequence) and type(plain(x.batch_sizes)) is Tensor:
        # Batch sizes are values, which are checked in every call. All numbers of dense rows have one plan.
        shape, *others = facts_of(x[:1])
        is_dense = others and others[0] == (*shape[1:], 1)
        return ((PackedSequence, shape[1:] if is_dense else shape, *others),)
    if type(x) in (list, tuple):
        return (type(x), len(x), *facts_of(x))
    undecorated = plain(x)
    if undecorated is x:
        raise NoKeyError
    return facts_of((undecorated,))


# ---- the plan


class Plan:
    """Hold the facts that all calls with one key share, and compute these calls; each operation is a subclass.

    The constructor is the front door: it checks all arguments of the first call. Without a backend, the plan computes
    calls by the formula. Otherwise `finish` prepares launches. Threads share plans, so a plan is complete when it is
    kept.

    Args:
        activations: raw and dropped; `None` for each that the operation does not take, or that no term reads.
        others: alpha, beta, lengths, valid and starts.
        options: the other arguments of the call.
        is_kept: whether later calls use the plan; it is `False` if plain PyTorch has to see each call.

    Attributes:
        terms: the terms of each layer's penalty; empty if no term reads anything.
        steps_of: a function of a call's arguments that checks the values of lengths, valid, starts or batch sizes, and
            returns the steps that count; `None` if all steps count.
        backend: the code that runs; `None` if the formula computes the calls.
        needs: for each tensor of a call, whether it needs a gradient.
        saves: for each tensor of a call, whether nodes save it.
        facts: the facts of the tensors that its nodes save; empty for packed rows, whose number differs.

    Raises:
        TypeError, ValueError: as `fused_ar_tar` and `fused_dropout_ar_tar`.
    """

    terms: Sequence[Terms] = ()
    steps_of: Callable[[Sequence[Any]], Steps] | None = None
    backend: Any = None
    needs: Sequence[bool] = ()
    saves: Sequence[bool] = ()
    facts: Sequence[Any] = ()

    def __init__(self, activations: Sequence[Any], others: Sequence[Any], options: Options, is_kept: bool) -> None:
        raw, dropped = activations
        alpha, beta, *selectors = others
        arguments.check_options(options.reduction, return_terms=options.measured)
        self.measured, place = options.measured, place_of(options.batch_first, options.time_dim)
        if raw is None and dropped is None:
            return
        one, layers = arguments.check_layers(raw, dropped, place)
        x, *_ = layers[0].values()
        axis = place.axis() % x.dim() - x.dim()
        self.backend = backend_for(x.device) if is_kept else None
        given = {name: y for name, y in zip(arguments.SELECTORS, selectors, strict=True) if y is not None}
        if isinstance(one, PackedSequence):
            arguments.check_packed_options(options.time_dim, given)
            self.steps_of = _offsets
        elif given:
            arguments.check_selectors(*selectors)
            arguments.check_selectors_of(x, axis, given)
            sizes = sizes_of(x, axis)
            encoder = partial(encoded, sizes) if self.backend is None else self.backend.encoder(sizes, x.device)
            self.steps_of = partial(_steps, encoder, sizes, x.device, options.reduction)
        dtype = compute_dtype([x for layer in layers for x in layer.values()])
        terms: list[Terms] = []
        for layer, is_same in zip_longest(layers, are_same(raw, dropped), fillvalue=False):
            arguments.check_layer(layer, layers[0], axis)  # pyright: ignore[reportArgumentType]
            of_raw = options.ar_of_raw or bool(is_same)
            terms.append(Terms(is_on(alpha), is_on(beta), options.measured, of_raw, dtype, axis, options.reduction))
        arguments.check_devices((alpha, beta), layers[0])
        self.terms = terms

    @staticmethod
    def read(first: Any, second: Any, alpha: Coefficient, beta: Coefficient, options: Options) -> Sequence[Any]:
        """Return the activations of a call, with `None` for a tensor that no term reads."""
        return first, second

    def tensors_of(self, first: Any, second: Any) -> Sequence[Any]:
        """Return the tensors of a call, given its activations."""
        raise NotImplementedError

    def formula(self, values: Values, *tensors: Any) -> Sequence[Any]:
        """Compute a call in plain PyTorch; return its results. The last one is an `ARTAR`."""
        raise NotImplementedError

    def prepare(self, tensors: Sequence[Any], values: Values) -> None:
        """Prepare the launches of calls like this one; set `needs` and `saves`."""
        raise NotImplementedError

    def launch(self, values: Values, *tensors: Any) -> tuple[Any, Any]:
        """Launch the forward; return the results, then the terms if they are wanted; and predictions for a backward."""
        raise NotImplementedError

    def differentiate(self, upstream: Sequence[Any], saved: Sequence[Any], values: Values, predictions: Any) -> Any:
        """Launch the backward; return a gradient, or `None`, for each tensor of the call.

        Args:
            upstream: the upstream gradients of the results; some may be `None`.
            saved: the tensors of the call, `None` for those that are not saved; maybe others behind them.
            values: the values of the call.
            predictions: the predictions of the forward; `None` in a second backward, or if the forward made none.
        """
        raise NotImplementedError

    def finish(self, tensors: Sequence[Any], values: Values) -> None:
        """Prepare launches, for the tensors and the values of the first call, unless the formula computes the calls."""
        if self.backend is None or not self.terms:
            return
        self.prepare(tensors, values)
        self.is_differentiable, self.saves_all = True in self.needs, False not in self.saves
        is_packed = values.steps is not None and values.steps.offsets is not None
        self.facts = [] if is_packed else facts_of(self.saved(tensors, values)[0])

    def __call__(self, tensors: Sequence[Any], values: Values) -> Any:
        """Compute a call: its only result, or a tuple of its results. The last one is the penalty, or an `ARTAR`."""
        if self.backend is None:
            *others, terms = self.formula(values, *tensors)
            penalty = terms if self.measured else terms.penalty
        else:
            results = _apply(self, values, *tensors) if self.is_differentiable else self.launch(values, *tensors)[0]
            if not self.measured:
                return results
            *others, penalty, terms = results
            penalty = ARTAR(penalty, *terms.unbind())
        return (*others, penalty) if others else penalty

    def saved(self, tensors: Sequence[Any], values: Values) -> tuple[Sequence[Tensor | None], Sequence[Any]]:
        """Return the tensors that a node saves, also those among the values of its call, and the other values."""
        if not self.saves_all:
            tensors = [x if is_saved else None for x, is_saved in zip(tensors, self.saves, strict=True)]
        alpha, beta, steps = values
        if steps is None and type(alpha) is float and type(beta) is float:
            return tensors, values
        in_memory = [x if isinstance(x, Tensor) else None for x in (alpha, beta)]
        numbers = [None if isinstance(x, Tensor) else x for x in (alpha, beta)]
        return (*tensors, *in_memory, *(steps or NO_STEPS)), numbers


NO_STEPS = Steps()


def place_of(batch_first: Any, time_dim: Any) -> Place:
    """Return the axis of time; the default is `(batch, time, hidden)`.

    Raises:
        TypeError, ValueError: one of them has another type, or both are given.
    """
    arguments.check_time(batch_first, time_dim)
    # index() returns a constant in compiled code; int() does not.
    return Place(batch_first is not False) if time_dim is None else Place(None, index(time_dim))


def _offsets(inputs: Sequence[Any]) -> Steps:
    """Return where each time step of packed rows begins, and at the end the number of rows.

    Kernels trust these offsets, in the backward, too. So they are new memory, and not a view of the batch sizes, whose
    memory NumPy may share. Batch sizes are values, and are checked in every call.
    """
    raw, dropped, *_ = inputs
    packed, _ = arguments.check_layers(raw, dropped, Place())
    arguments.check_not_captured("lengths", packed.data.device)
    arguments.check_no_parts(packed.data)
    return Steps(offsets=torch.nn.functional.pad(plain(packed.batch_sizes).long().cumsum(0), (1, 0)))


def _steps(encoder: Any, sizes: tuple[Any, Any], device: torch.device, reduction: str, inputs: Sequence[Any]) -> Steps:
    """Check the values of lengths, valid and starts, and encode which time steps count.

    Values are checked only on the CPU. On other devices a check would have to wait for the device.
    """
    named = zip(arguments.SELECTORS, inputs[4:], strict=True)
    bits, counts = encoder(*[None if x is None else _brought(name, device, sizes, x) for name, x in named])
    return Steps(bits, counts if reduction == "mean" else None)


def _brought(name: str, device: torch.device, sizes: tuple[Any, Any], x: Tensor) -> Tensor:
    """Check the values of lengths or of a mask, and return them on a device, a mask as bool; do not wait for the copy.

    The caller may refill pinned memory before the device has read it, so it is copied first. The copy is pinned, too.
    PyTorch does not free it before the device has read it, and the host does not wait.
    """
    x = plain(x)
    if x.device == device and x.dtype == torch.bool and x.shape == sizes:
        return x.contiguous()
    if device.type == "cpu" != x.device.type:
        x = x.cpu()
    if x.dtype != torch.bool and has_values(x):
        arguments.check_range(name, sizes[1], x)
    if name != "lengths":
        x = x.bool().reshape(sizes)
    if x.device.type == "cpu" != device.type:
        arguments.check_not_captured(name, device)
        if observed():  # a compiler cannot ask whether memory is pinned
            x = x.clone()
        elif x.is_pinned():
            x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=True).contiguous()


# ---- the node


class Node(Function):
    """Compute a call, and save the tensors that its backward reads, and the predictions of the forward.

    Only the first backward gets the predictions; a second one computes the gradients again.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, values: Values, *tensors: Any) -> Any:
        results, ctx.predictions = plan.launch(values, *tensors)
        ctx.plan = plan
        saved, ctx.values = plan.saved(tensors, values)
        if not plan.facts:
            ctx.facts = facts_of(saved)
        ctx.save_for_backward(*saved)
        if type(results) is tuple:  # more outputs cost 3 us
            ctx.set_materialize_grads(False)  # PyTorch need not make zeros for an output without a gradient
            if plan.measured:
                ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan, values = ctx.plan, ctx.values
        if plan.measured:
            upstream = upstream[:-1]  # terms have no gradient
        if upstream[0] is None and upstream[-1] is None:
            return (None,) * (2 + len(plan.needs))
        saved, by_formula = ctx.saved_tensors, torch.is_grad_enabled() or observed()
        if not by_formula:
            before = plan.facts or ctx.facts
            try:  # hooks on saved tensors, and changes of their `data`, may have changed a layout
                by_formula = facts_of((*saved, *upstream))[: len(before)] != before
            except NoKeyError:
                by_formula = True
        if len(saved) > len(plan.needs):
            alpha, beta, *steps = saved[len(plan.needs) :]
            alpha, beta = (y if x is None else x for x, y in zip((alpha, beta), values, strict=True))
            values = Values(alpha, beta, Steps(*steps) if plan.steps_of else None)
        if by_formula:
            return None, None, *differentiate_formula(plan, upstream, saved, values)
        predictions = vars(ctx).pop("predictions", None)  # atomic, for two threads
        return None, None, *plan.differentiate(upstream, saved, values, predictions)


# `Function.apply` without its part for transforms of torch.func, under which no plan is used. This saves 3 us.
_apply: Any = super(Function, Node).apply  # pyright: ignore[reportAttributeAccessIssue]


@untraced  # Dynamo may compile the frame of a backward, and AOTAutograd cannot differentiate in it
def differentiate_formula(plan: Plan, upstream: Sequence[Any], saved: Sequence[Any], values: Values) -> Sequence[Any]:
    """Differentiate the formula, so that its gradients can be differentiated again.

    The formula runs in the dtype of the terms, and each gradient is rounded once.

    Args:
        plan: the plan of the call.
        upstream: the upstream gradients of the results; some may be `None`.
        saved: the tensors of the call, and maybe others behind them.
        values: the values of the call.
    """
    again, dtype = torch.is_grad_enabled(), plan.terms[0].dtype
    tensors = [*zip(saved, plan.needs, strict=False)]
    with torch.enable_grad():
        # Each input gets its own alias, because one tensor may be raw of two layers.
        inputs = [
            (x if x.requires_grad else x.detach().requires_grad_()).to(dtype).view_as(x) if need else x
            for x, need in tensors
        ]
        *others, terms = plan.formula(values, *inputs)
        wanted = [x for x, need in zip(inputs, plan.needs, strict=True) if need]
        pairs = zip((*others, terms.penalty), upstream, strict=True)
        pairs = [(x, grad.to(x.dtype)) for x, grad in pairs if grad is not None and x.requires_grad]
        found = map(torch.zeros_like, wanted)
        if pairs:
            results, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(results, wanted, grads, create_graph=again))
    return [next(found).to(x.dtype) if need else None for x, need in tensors]
