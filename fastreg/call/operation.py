"""One call: the plan under the key of its arguments, and the node that differentiates it.

A call looks its plan up. If its key is new, `Plan.checked` checks all arguments, and a plan for the problem that they
pose is kept for later calls with the same key. Values are checked in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.call import arguments
from fastreg.call.backends import backend_for
from fastreg.call.fold import Fold, fold_of
from fastreg.call.key import PLANS, facts_of, keep, key_of
from fastreg.call.private import apply_of, version_of
from fastreg.call.problem import Coefficient, Options, Penalty, Problem, axes_of, compute_dtype, is_on, sizes_of
from fastreg.call.steps import GivenSteps
from fastreg.call.torch_state import keepable, observed, plain, untraced
from fastreg.kernels.backend import Backend, Encoder
from fastreg.kernels.prediction import Ahead, Gradients
from fastreg.kernels.view import ALL_STEPS, Layout, Spec, Values, layout_of

USUAL = {Tensor, float, type(None)}  # types that `plain` does not change
# Raw; dropped, or for an operation that drops units, the mask or the probability to drop a unit; alpha and beta.
Inputs: TypeAlias = tuple[Tensor | None, Tensor | float | None, Coefficient, Coefficient]
Pair: TypeAlias = tuple[Tensor | None, Tensor | None]  # the tensors of a call: raw, and dropped or the mask
Results: TypeAlias = tuple[Sequence[Tensor], Penalty]  # results before the penalty, and the penalty


def compute(
    operation: type[Plan],
    activations: Sequence[Any],
    coefficients: Sequence[Coefficient],
    steps: GivenSteps | None,
    options: Options,
    layer: int | None = None,
) -> Results | None:
    """Compute a call by the plan under its key; the first call with a key checks all arguments and makes the plan.

    Args:
        operation: the subclass of `Plan`.
        activations: the first two of `Inputs`, not checked.
        coefficients: alpha and beta.
        steps: the steps that the call counts, or `None` if it counts all.
        options: the other arguments.
        layer: the number of the layer in a list, for messages.

    Returns:
        The results of the operation, or `None` if no term reads anything.
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
        key = key_of(operation, inputs if steps is None else (*inputs, *steps.given), options)
        try:
            plan = None if key is None else PLANS.get(key)
        except TypeError:  # an option of a wrong type, which may have no hash, is an error of the checks
            key = None
    is_new = plan is None
    if plan is None:
        problem = operation.checked(inputs, options, layer)
        if problem is None:
            return None
        plan = operation(problem, None if key is None else backend_for(problem.device))
    tensors = plan.tensors_of(inputs[0], inputs[1])
    counted = ALL_STEPS if steps is None else steps.encoded(inputs[1] if inputs[0] is None else inputs[0], plan)
    values = Values(alpha, beta, counted)
    if is_new and key is not None:
        plan.finish(tensors, values)
        keep(key, plan)
    return plan(tensors, values)


def checked_coefficient(name: str, value: object) -> Coefficient:
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


def problem_of(
    raw: object, dropped: object, coefficients: Sequence[Coefficient], options: Options, layer: int | None
) -> Problem | None:
    """Check all arguments of the first call with a key, and return the problem that all calls with this key pose.

    Args:
        raw: raw; `None` if no term reads it.
        dropped: dropped; `None` if the operation does not take it, or if no term reads it.
        coefficients: alpha and beta.
        options: the other arguments of the call.
        layer: the number of the layer in a list, for messages.

    Returns:
        The problem, or `None` if no term reads anything.

    Raises:
        TypeError, ValueError: as `fused_ar_tar` and `fused_dropout_ar_tar`.
    """
    arguments.check_options(options.reduction, return_terms=options.measured)
    time_axis = arguments.time_axis_of(options.batch_first, options.time_dim)
    if raw is None and dropped is None:
        return None
    pair = arguments.check_pair(raw, dropped, time_axis.time_dim, layer)
    arguments.check_devices(coefficients, pair)
    x = next(iter(pair.values()))
    alpha, beta = coefficients
    axis = time_axis.number() % x.dim() - x.dim()
    spec = Spec(
        by_ar=is_on(alpha),
        by_tar=is_on(beta),
        measured=options.measured,
        ar_of_raw=options.ar_of_raw or raw is dropped,
        dtype=options.dtype or compute_dtype(pair.values()),
        time_dim=axis,
        reduction=options.reduction,
    )
    return Problem(
        spec=spec,
        shape=x.shape,
        sizes=sizes_of(x, axis),
        is_time_first=axes_of(x, axis) == (0, 1),
        device=x.device,
        predicts=options.predicts,
    )


# ---- the plan


class Plan:
    """Hold the facts that all calls with one key share, and compute these calls; each operation is a subclass.

    Without a backend, the plan computes calls by the formula. Otherwise `finish` prepares launches. Threads share
    plans, so a plan is complete when it is kept.

    Args:
        problem: the problem that the calls pose.
        backend: the code that runs; `None` if plain PyTorch has to see each call, or runs it.

    Attributes:
        spec: what is computed, of the tensors that kernels or the formula read.
        encoder: the function that encodes checked arguments; `None` until some are checked.
        mover: the fold that moves the tensors of a call; `None` if kernels read them in place.
        fold: the fold of the tensors that kernels read.
        needs: for each tensor of a call, whether it needs a gradient.
        saves_all: whether nodes save all tensors of a call, or only those that need a gradient.
        facts: the facts of the tensors that its nodes save.
        is_differentiable: whether a tensor of a call needs a gradient.
        in_memory: whether a coefficient is a tensor, which may change before the backward.
    """

    encoder: Encoder | None = None
    mover: Fold | None = None
    fold: Fold
    needs: Sequence[bool] = ()
    saves_all = False
    facts: Sequence[object] = ()

    def __init__(self, problem: Problem, backend: Backend | None) -> None:
        self.problem, self.spec, self.backend = problem, problem.spec, backend

    @staticmethod
    def checked(inputs: Inputs, options: Options, layer: int | None) -> Problem | None:
        """Check the arguments of the first call with a key, as `problem_of` does."""
        raise NotImplementedError

    @staticmethod
    def read(first: Any, second: Any, alpha: Coefficient, beta: Coefficient, options: Options) -> Sequence[Any]:
        """Return the activations of a call, with `None` for a tensor that no term reads."""
        return first, second

    def tensors_of(self, first: Any, second: Any) -> Pair:
        """Return the tensors of a call, given its activations."""
        raise NotImplementedError

    def formula(self, values: Values, tensors: Pair) -> Results:
        """Compute a call in plain PyTorch."""
        raise NotImplementedError

    def prepare(self, backend: Backend, tensors: Pair, layouts: Sequence[Layout | None]) -> None:
        """Prepare the launches of calls like this one; set `needs` and `saves_all`."""
        raise NotImplementedError

    def launch(self, values: Values, tensors: Pair) -> tuple[tuple[Tensor, ...], Ahead | None]:
        """Launch the forward; return a tuple of results, with terms if they are wanted; and gradients."""
        raise NotImplementedError

    def differentiate(self, upstream: Gradients, saved: Pair, values: Values, ahead: Ahead | None) -> Gradients:
        """Launch the backward; return a gradient, or `None`, for each tensor of the call.

        Args:
            upstream: the upstream gradients of the results; some may be `None`.
            saved: the tensors of the call, `None` for those that are not saved.
            values: the values of the call.
            ahead: the gradients that the forward has written ahead; `None` if it has written none, and in a second
                backward.
        """
        raise NotImplementedError

    def finish(self, tensors: Pair, values: Values) -> None:
        """Prepare launches, for the tensors and the values of the first call, unless the formula computes the calls."""
        if self.backend is None:
            return
        is_whole = values.steps.bits is None
        layouts = self.layouts(tensors, self.problem.shape)
        self.fold, fits = fold_of(layouts, self.spec.time_dim, is_whole)
        if not fits:
            self.mover, self.spec = self.fold, self.spec._replace(time_dim=-2)
            tensors = moved(self.mover, tensors)
            layouts = self.layouts(tensors, self.mover.sizes())
            self.fold, _ = fold_of(layouts, -2, is_whole)
        self.prepare(self.backend, tensors, layouts)
        self.is_differentiable = True in self.needs
        self.in_memory = isinstance(values.alpha, Tensor) or isinstance(values.beta, Tensor)
        self.facts = facts_of(self.saved(tensors)) or ()

    @staticmethod
    def layouts(tensors: Pair, shape: Sequence[int]) -> list[Layout | None]:
        """Return the layouts of the tensors of a call; a mask may repeat one row."""
        return [x if x is None else layout_of(x.expand(shape)) for x in tensors]

    def __call__(self, tensors: Pair, values: Values) -> Results:
        """Compute a call, and return its results."""
        mover = self.mover
        if mover is not None:
            tensors = moved(mover, tensors)
        if self.backend is None:
            return self.formula(values, tensors)
        results = _apply(self, values, *tensors) if self.is_differentiable else self.launch(values, tensors)[0]
        if self.spec.measured:
            *others, value, terms = results
        else:
            (*others, value), terms = results, None
        return others if mover is None else [*map(mover.restored, others)], Penalty(value, terms)

    def saved(self, tensors: Pair) -> Sequence[Tensor | None]:
        """Return the tensors that a node saves, with `None` for others."""
        return tensors if self.saves_all else [x if need else None for x, need in zip(tensors, self.needs, strict=True)]


def moved(mover: Fold, tensors: Pair) -> Pair:
    """Return the tensors of a call in a form that kernels can read."""
    first, second = tensors
    return None if first is None else mover.moved(first), None if second is None else mover.moved(second)


# ---- the node


class Node(Function):
    """Compute a call. Save the tensors that its backward reads, and keep the gradients that the forward wrote ahead.

    Coefficients need no saving: a node keeps them and their versions. Only the first backward gets the gradients of the
    forward; a second one computes them again.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, values: Values, first: Tensor | None, second: Tensor | None) -> Any:
        results, ctx.ahead = plan.launch(values, (first, second))
        ctx.plan, ctx.values = plan, values
        if plan.in_memory:
            ctx.versions = versions_of(values)
        ctx.save_for_backward(*plan.saved((first, second)))
        if len(results) > 1:  # more outputs cost 3 us
            ctx.set_materialize_grads(False)  # PyTorch need not make zeros for an output without a gradient
            if plan.spec.measured:
                ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan, values = ctx.plan, ctx.values
        if plan.spec.measured:
            upstream = upstream[:-1]  # terms have no gradient
        if upstream[0] is None and upstream[-1] is None:
            return (None,) * (2 + len(plan.needs))
        saved = ctx.saved_tensors
        if plan.in_memory and upstream[-1] is not None:  # only the penalty's gradient needs coefficients
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


_apply = apply_of(Node)


@untraced  # Dynamo may compile the frame of a backward, and AOTAutograd cannot differentiate in it
def differentiate_formula(plan: Plan, upstream: Gradients, saved: Any, values: Values) -> Gradients:
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
        inputs: Any = [
            (x if x.requires_grad else x.detach().requires_grad_()).to(dtype).view_as(x) if need else x
            for x, need in tensors
        ]
        others, penalty = plan.formula(values, inputs)
        wanted = [x for x, need in zip(inputs, plan.needs, strict=True) if need]
        pairs = zip((*others, penalty.value), upstream, strict=True)
        pairs = [(x, grad.to(x.dtype)) for x, grad in pairs if grad is not None and x.requires_grad]
        found = map(torch.zeros_like, wanted)
        if pairs:
            results, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(results, wanted, grads, create_graph=again))
    return [next(found).to(x.dtype) if need else None for x, need in tensors]
