"""The common part of both operations: finding the plan of a call, and saving tensors for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from fastreg.arguments import check_saved
from fastreg.kernels.view import Layout, Steps, Values, allocate, layout_of
from fastreg.plans import PLANS, facts_of, facts_of_other, keep, refused
from fastreg.prepare import Given, converted
from fastreg.problem import Options, are_same, is_on
from fastreg.torch_state import hooks_on_saved, is_deterministic, observed

NO_STEPS = Steps()
VALUES = "alpha", "beta", "steps", "counts", "offsets"  # the tensors in `Values`, as messages name them


def compute(operation: Any, tensors: Sequence[Any], coefficients: Sequence[Any], given: Given, options: Options) -> Any:
    """Compute a call by the plan under its key; the first call with a key checks all arguments and makes the plan.

    Args:
        operation: the class of the plan.
        tensors: raw, and dropped or a mask.
        coefficients: alpha and beta.
        given: lengths, valid steps and starts.
        options: the other arguments.
    """
    (alpha, beta), key, plan, is_seen = coefficients, None, None, observed()
    are_floats = not is_seen and type(alpha) is float is type(beta)  # a symbol is not compared
    if not (are_floats and 0 <= alpha < inf and 0 <= beta < inf):
        alpha, beta = map(converted, ("alpha", "beta"), coefficients)
    if not (are_floats and alpha and beta):
        tensors = operation.read(tensors, (is_on(alpha), is_on(beta)), options)
    if not is_seen:  # a compiler would compile again for each new plan
        first, second = tensors
        try:
            key = (
                *(operation, first is second if isinstance(first, Tensor) else are_same(first, second)),
                *(*facts_of((first, second, alpha, beta, *given), facts_of_other), *options, *map(type, options)),
                *(torch.is_grad_enabled(), hooks_on_saved(False) is None, is_deterministic()),
            )
            plan = PLANS.get(key)
        except (RuntimeError, TypeError):  # a nested tensor has no strides, and a wrong option may have no hash
            key = None
    if plan is None:
        plan = operation(tensors, (alpha, beta), given, options, key is not None)
        if key is not None:
            keep(key, plan)
    steps_of = plan.steps_of
    return plan(tensors, Values(alpha, beta, None if steps_of is None else steps_of(given, tensors)))


def save(ctx: Any, plan: Any, tensors: Sequence[Tensor | None], values: Values) -> None:
    """Let autograd save the tensors of a call for its backward, and the tensors among its values, which are rare."""
    alpha, beta, steps = ctx.values = values
    if steps is not None or type(alpha) is not float or type(beta) is not float:
        in_memory = [x if isinstance(x, Tensor) else None for x in (alpha, beta)]
        ctx.values = [None if isinstance(x, Tensor) else x for x in (alpha, beta)]
        tensors = *tensors, *in_memory, *(steps or NO_STEPS)
    ctx.plan = plan
    ctx.save_for_backward(*tensors)
    if plan.saved is None:
        plan.layouts = [*map(layout_of, tensors)]
        plan.saved = facts_of(tensors, refused)


def unpack(ctx: Any, *upstream: Tensor | None) -> tuple[Sequence[Any], Values, bool]:
    """Return the tensors and the values of a node, and whether PyTorch has to see its backward as the formula.

    Args:
        ctx: the node.
        upstream: the upstream gradients.

    Raises:
        RuntimeError: a tensor has another shape or dtype, because its `data` or a hook on saved tensors has changed it.
    """
    tensors, values, plan, is_seen = ctx.saved_tensors, ctx.values, ctx.plan, torch.is_grad_enabled() or observed()
    if not is_seen:
        try:
            facts = facts_of((*tensors, *upstream), refused)
        except RuntimeError:
            is_seen = True
        else:
            if facts[: len(plan.saved)] != plan.saved:
                tensors = [*map(restored, (*plan.names, *VALUES), tensors, plan.layouts)]
    count = len(plan.names)
    if len(tensors) > count:
        alpha, beta = [y if x is None else x for x, y in zip(tensors[count:], values, strict=False)]
        bits, counts, offsets = tensors[count + 2 :]
        values = Values(alpha, beta, None if bits is offsets else Steps(bits, counts, offsets))
    return tensors, values, is_seen


def restored(name: str, x: Any, before: Layout | None) -> Any:
    """Return a tensor that a backward has unpacked, in the layout that it had in the forward.

    Raises:
        RuntimeError: the tensor has another shape or dtype.
    """
    if before is None or layout_of(x) == before:
        return x
    check_saved(name, before, x)
    copy = to = allocate(before)  # it is aligned, whether the kernels rely on that or not
    for axis, stride in enumerate(before.stride):
        if stride == 0:
            to, x = to.narrow(axis, 0, 1), x.narrow(axis, 0, 1)
    to.copy_(x)
    return copy
