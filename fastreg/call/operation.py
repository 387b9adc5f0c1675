"""One call: the plan under the key of its arguments, and the node that differentiates it.

A call looks its plan up. If its key is new, `Plan` checks all arguments, and the plan is kept for later calls with the
same key. Values are checked in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.call import arguments
from fastreg.call.backends import backend_for
from fastreg.call.fold import fold_of
from fastreg.call.key import PLANS, facts_of, keep, key_of
from fastreg.call.problem import ARTAR, Coefficient, Options, axes_of, compute_dtype, is_on, sizes_of
from fastreg.call.torch_state import keepable, observed, plain, untraced, version_of
from fastreg.kernels.view import Spec, Values, layout_of

USUAL = {Tensor, float, type(None)}  # types that `plain` leaves alone


def compute(
    operation: Any, activations: Sequence[Any], coefficients: Sequence[Any], selectors: Any, options: Options
) -> Any:
    """Compute a call by the plan under its key; the first call with a key checks all arguments and makes the plan.

    Args:
        operation: the subclass of `Plan`.
        activations: raw; and dropped, or for an operation that drops units, the mask or the probability to drop a unit.
        coefficients: alpha and beta.
        selectors: the `Selectors` of the call, or `None` if all time steps count.
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
    inputs = first, second, alpha, beta
    if is_seen or not USUAL.issuperset(map(type, inputs)):  # PyTorch 2.8 cannot compile `issuperset`
        one = plain(first)
        inputs = one, one if first is second else plain(second), alpha, beta
    if not is_seen:  # a compiler would compile again for each new plan
        key = key_of(operation, inputs if selectors is None else (*inputs, *selectors.given), options)
        try:
            plan = PLANS.get(key)
        except TypeError:  # an option of a wrong type, which may have no hash, is an error of the checks
            key = None
    is_new = plan is None
    if plan is None:
        plan = operation(inputs, options, key is not None)
    if plan.spec is None:
        return None
    tensors = plan.tensors_of(inputs[0], inputs[1])
    if selectors is None:
        values = Values(alpha, beta)
    else:
        bits, counts = selectors.encoded(inputs[1] if inputs[0] is None else inputs[0], plan)
        values = Values(alpha, beta, bits, counts if options.reduction == "mean" else None)
    if is_new and key is not None:
        plan.finish(tensors, values)
        keep(key, plan)
    return plan(tensors, values)


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


# ---- the plan


class Plan:
    """Hold the facts that all calls with one key share, and compute these calls; each operation is a subclass.

    The constructor is the front door: it checks all arguments of the first call. Without a backend, the plan computes
    calls by the formula. Otherwise `finish` prepares launches. Threads share plans, so a plan is complete when it is
    kept.

    Args:
        activations: raw and dropped; `None` for each that the operation does not take, or that no term reads.
        coefficients: alpha and beta.
        options: the other arguments of the call.
        is_kept: whether later calls use the plan; it is `False` if plain PyTorch has to see each call.

    Attributes:
        spec: what is computed; `None` if no term reads anything.
        sizes: the numbers of sequences and of time steps.
        is_time_first: whether masks of time steps are `(time, batch)`.
        backend: the code that runs; `None` if the formula computes the calls.
        encoder: a function that encodes checked selectors; `None` until some are checked.
        fold: the fold of the tensors of a call.
        within: the plan that computes the calls of moved tensors; `None` if kernels read the tensors in place.
        needs: for each tensor of a call, whether it needs a gradient.
        saves: for each tensor of a call, whether nodes save it.
        facts: the facts of the tensors that its nodes save.
        is_differentiable: whether a tensor of a call needs a gradient.
        in_memory: whether a coefficient is a tensor, which may change before the backward.

    Raises:
        TypeError, ValueError: as `fused_ar_tar` and `fused_dropout_ar_tar`.
    """

    spec: Any = None
    is_time_first: bool = False
    backend: Any = None
    encoder: Any = None
    fold: Any = None
    within: Any = None
    needs: Sequence[bool] = ()
    saves: Sequence[bool] = ()
    facts: Sequence[Any] = ()

    def __init__(
        self, activations: Sequence[Any], coefficients: Sequence[Any], options: Options, is_kept: bool
    ) -> None:
        raw, dropped = activations
        alpha, beta = coefficients
        arguments.check_options(options.reduction, return_terms=options.measured)
        time_axis = arguments.time_axis_of(options.batch_first, options.time_dim)
        if raw is None and dropped is None:
            return
        pair = arguments.check_pair(raw, dropped, time_axis.time_dim)
        arguments.check_devices(coefficients, pair)
        x, *_ = pair.values()
        axis = time_axis.number() % x.dim() - x.dim()
        time, batch = axes_of(x, axis)
        self.is_time_first = batch is not None and time < batch
        self.sizes, self.backend = sizes_of(x, axis), backend_for(x.device) if is_kept else None
        dtype = options.dtype or compute_dtype(pair.values())
        of_raw = options.ar_of_raw or raw is dropped
        self.spec = Spec(is_on(alpha), is_on(beta), options.measured, of_raw, dtype, axis, options.reduction)

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

    def prepare(self, tensors: Sequence[Any], layouts: Sequence[Any]) -> None:
        """Prepare the launches of calls like this one; set `needs` and `saves`."""
        raise NotImplementedError

    def launch(self, values: Values, *tensors: Any) -> tuple[Any, Any]:
        """Launch the forward; return a tuple of results, with terms if they are wanted; and gradients."""
        raise NotImplementedError

    def differentiate(self, upstream: Sequence[Any], saved: Sequence[Any], values: Values, ahead: Any) -> Any:
        """Launch the backward; return a gradient, or `None`, for each tensor of the call.

        Args:
            upstream: the upstream gradients of the results; some may be `None`.
            saved: the tensors of the call, `None` for those that are not saved.
            values: the values of the call.
            ahead: the gradients that the forward has written ahead; `None` if it has written none, and in a second
                backward.
        """
        raise NotImplementedError

    def finish(self, tensors: Sequence[Any], values: Values) -> None:
        """Prepare launches, for the tensors and the values of the first call, unless the formula computes the calls."""
        if self.backend is None:
            return
        shape = next(x.shape for x in tensors if x is not None)
        layouts = [x if x is None else layout_of(x.expand(shape)) for x in tensors]  # a mask may repeat one row
        self.fold, fits = fold_of(layouts, self.spec.time_dim, values.bits is None)
        if not fits:
            self.within = copy(self)
            self.within.spec = self.spec._replace(time_dim=-2)
            self.within.finish([self.fold.moved(x) for x in tensors], values)
            return
        self.prepare(tensors, layouts)
        self.is_differentiable = True in self.needs
        self.in_memory = isinstance(values.alpha, Tensor) or isinstance(values.beta, Tensor)
        self.facts = facts_of(self.saved(tensors)) or ()

    def __call__(self, tensors: Sequence[Any], values: Values) -> Any:
        """Compute a call, and return its results. The last one is the penalty, or an `ARTAR`."""
        if self.within is not None:
            *others, penalty = self.within([self.fold.moved(x) for x in tensors], values)
            return *map(self.fold.restored, others), penalty
        if self.backend is None:
            *others, terms = self.formula(values, *tensors)
            return *others, terms if self.spec.measured else terms.penalty
        results = _apply(self, values, *tensors) if self.is_differentiable else self.launch(values, *tensors)[0]
        if not self.spec.measured:
            return results
        *others, penalty, terms = results
        return *others, ARTAR(penalty, *terms.unbind())

    def saved(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return the tensors that a node saves, with `None` for others."""
        return [x if is_saved else None for x, is_saved in zip(tensors, self.saves, strict=True)]


# ---- the node


class Node(Function):
    """Compute a call. Save the tensors that its backward reads, and keep the gradients that the forward wrote ahead.

    Coefficients need no saving: a node keeps them and their versions. Only the first backward gets the gradients of the
    forward; a second one computes them again.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, values: Values, *tensors: Any) -> Any:
        results, ctx.ahead = plan.launch(values, *tensors)
        ctx.plan, ctx.values = plan, values
        if plan.in_memory:
            ctx.versions = versions_of(values)
        ctx.save_for_backward(*plan.saved(tensors))
        if len(results) > 1:  # more outputs cost 3 us
            ctx.set_materialize_grads(False)  # PyTorch need not make zeros for an output without a gradient
            if plan.spec.measured:
                ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan, values = ctx.plan, ctx.values
        if plan.spec.measured:
            upstream = upstream[:-1]  # terms have no gradient
        if upstream[0] is None and upstream[-1] is None:
            return (None,) * (2 + len(plan.needs))
        saved = ctx.saved_tensors
        if plan.in_memory and upstream[-1] is not None:  # the gradient of dropped alone needs no coefficient
            arguments.check_unchanged(ctx.versions, versions_of(values))
        # Hooks on saved tensors, and changes of their `data`, may have changed a layout.
        facts = None if torch.is_grad_enabled() or observed() else facts_of((*saved, *upstream))
        if facts is None or facts[: len(plan.facts)] != plan.facts:
            return None, None, *differentiate_formula(plan, upstream, saved, values)
        ahead = vars(ctx).pop("ahead", None)  # atomic, for two threads
        return None, None, *plan.differentiate(upstream, saved, values, ahead)


def versions_of(values: Values) -> Sequence[int]:
    """Return how often each coefficient in memory had been changed in place."""
    return [version_of(x) if isinstance(x, Tensor) else 0 for x in (values.alpha, values.beta)]


# `Function.apply` without its part for transforms of torch.func, under which no plan is used. This saves 3 us.
_apply: Any = super(Function, Node).apply  # pyright: ignore[reportAttributeAccessIssue]


@untraced  # Dynamo may compile the frame of a backward, and AOTAutograd cannot differentiate in it
def differentiate_formula(plan: Plan, upstream: Sequence[Any], saved: Sequence[Any], values: Values) -> Sequence[Any]:
    """Differentiate the formula, so that its gradients can be differentiated again.

    The formula runs in the dtype of the penalty, and each gradient is rounded once.

    Args:
        plan: the plan of the call.
        upstream: the upstream gradients of the results; some may be `None`.
        saved: the tensors of the call.
        values: the values of the call.
    """
    again, dtype = torch.is_grad_enabled(), plan.spec.dtype
    tensors = [*zip(saved, plan.needs, strict=True)]
    with torch.enable_grad():
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
