"""The common part of both operations: finding the plan of a call, and saving tensors for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import inf
from typing import Any

import torch
from torch import Tensor

from fastreg.call.arguments import check_saved
from fastreg.call.plans import PLANS, NoKeyError, facts_of, keep, key_of
from fastreg.call.prepare import converted, prepare
from fastreg.call.problem import Options, is_on
from fastreg.call.torch_state import observed
from fastreg.kernels.view import Steps, Values

NO_STEPS = Steps()
VALUES = "alpha", "beta", "steps", "counts", "offsets"  # the tensors in `Values`, as messages name them


def compute(
    operation: Any, tensors: Sequence[Any], coefficients: Sequence[Any], steps: Sequence[Any], options: Options
) -> Any:
    """Compute a call by the plan under its key; the first call with a key checks all arguments and makes the plan.

    Args:
        operation: the class of the plan for a backend.
        tensors: raw; and dropped, a mask, or the probability to drop a unit.
        coefficients: alpha and beta.
        steps: lengths, valid steps and starts.
        options: the other arguments.
    """
    (first, second), (alpha, beta) = tensors, coefficients
    found, key, is_seen = None, None, observed()
    are_floats = not is_seen and type(alpha) is float and type(beta) is float  # a symbol is not compared
    if not (are_floats and 0 <= alpha < inf and 0 <= beta < inf):
        alpha, beta = converted("alpha", alpha), converted("beta", beta)
    if not ((are_floats and alpha and beta) or operation.drops or options.measured or options.ar_of_raw):
        first, second = (
            first if is_on(beta) else None,
            second if is_on(alpha) else None,
        )  # only tensors that a term reads
    inputs = first, second, alpha, beta, *steps
    if not is_seen:  # a compiler would compile again for each new plan
        key = key_of(operation, inputs, options)
        try:
            found = PLANS.get(key)
        except TypeError:  # an option of a wrong type, which may have no hash, is an error of the checks
            key = None
    plan, backend = found, None
    if plan is None:
        plan, backend = prepare(operation, inputs, options, is_kept=key is not None)
    values = Values(alpha, beta, None if plan.steps_of is None else plan.steps_of(inputs))
    tensors = operation.tensors_of(first, second, plan)
    if backend is not None:
        plan = operation(plan, backend, options.fills, tensors, values)
    if found is None and key is not None:
        keep(key, plan)
    return plan(tensors, values)


def flat(tensors: Sequence[Tensor | None], values: Values) -> tuple[Sequence[Tensor | None], Sequence[Any]]:
    """Return the tensors that a node saves, with those among the values of its call, which are rare; and the others."""
    alpha, beta, steps = values
    if steps is None and type(alpha) is float and type(beta) is float:
        return tensors, values
    in_memory = [x if isinstance(x, Tensor) else None for x in (alpha, beta)]
    return (*tensors, *in_memory, *(steps or NO_STEPS)), [None if isinstance(x, Tensor) else x for x in (alpha, beta)]


def facts_of_saved(tensors: Sequence[Tensor | None], values: Values) -> Sequence[Any]:
    """Return the facts of the tensors that all nodes of a plan save; of packed rows, each node keeps its own facts."""
    is_packed = values.steps is not None and values.steps.offsets is not None
    return [] if is_packed else facts_of(flat(tensors, values)[0])


def save(ctx: Any, plan: Any, tensors: Sequence[Tensor | None], values: Values) -> None:
    """Let autograd save the tensors of a call for its backward."""
    tensors, ctx.values = flat(tensors, values)
    ctx.plan = plan
    if not plan.facts:  # packed rows, whose number differs from node to node
        ctx.facts = facts_of(tensors)
    ctx.save_for_backward(*tensors)


def unpack(ctx: Any, *upstream: Tensor | None) -> tuple[Sequence[Any], Values, bool]:
    """Return the tensors and the values of a node, and whether its backward has to run as the formula.

    It has to if PyTorch traces or differentiates it, or if a hook on saved tensors has changed the layout of a tensor.

    Args:
        ctx: the node.
        upstream: the upstream gradients.

    Raises:
        RuntimeError: a tensor has another shape or dtype, because its `data` or a hook on saved tensors has changed it.
    """
    tensors, values, plan, is_seen = ctx.saved_tensors, ctx.values, ctx.plan, torch.is_grad_enabled() or observed()
    if not is_seen:
        before = plan.facts or ctx.facts
        try:
            is_seen = facts_of((*tensors, *upstream))[: len(before)] != before
        except NoKeyError:
            is_seen = True
        if is_seen:
            facts = iter(before)
            for name, x in zip((*plan.names, *VALUES), tensors, strict=False):
                shape = next(facts)
                if shape is not None:  # of a tensor, which has five more facts
                    _, dtype, device, *_ = islice(facts, 5)
                    check_saved(name, {"shape": shape, "dtype": dtype, "device": device}, x)
    count = len(plan.names)
    if len(tensors) > count:
        alpha, beta = [y if x is None else x for x, y in zip(tensors[count:], values, strict=False)]
        bits, counts, offsets = tensors[count + 2 :]
        values = Values(alpha, beta, Steps(bits, counts, offsets) if plan.steps_of else None)
    return tensors, values, is_seen
