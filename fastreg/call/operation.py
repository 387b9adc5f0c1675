"""One call, by the plan under the key of its arguments.

A call looks its plan up. If its key is new, a new plan checks all arguments, and is kept for later calls with
the same key. Values are checked in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from torch import Tensor

from fastreg.call.arguments import check_coefficient
from fastreg.call.backends import backend_for
from fastreg.call.key import PLANS, keep, key_of
from fastreg.call.plan import Plan, Results
from fastreg.call.problem import Coefficient, Options
from fastreg.call.steps import GivenSteps
from fastreg.call.torch_state import keepable, observed, plain
from fastreg.kernels.view import Values

USUAL = {Tensor, float, type(None)}  # types that `plain` does not change


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
        first, second = operation.without_unread(first, second, alpha, beta, options.return_terms)
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
        plan = operation(inputs, options, layer)
        if plan.is_empty:
            return None
        plan.backend = None if key is None else backend_for(plan.device)
    tensors = plan.tensors_of(inputs[0], inputs[1])
    bits, counts = (None, None) if steps is None else steps.encoded(inputs[1] if inputs[0] is None else inputs[0], plan)
    values = Values(alpha, beta, bits, counts)
    if is_new and key is not None:
        plan.finish(tensors, values)
        keep(key, plan)
    return plan(tensors, values)


def checked_coefficient(name: str, value: object) -> Coefficient:
    """Check a coefficient; return a number, or a tensor that a backward can keep."""
    checked = check_coefficient(name, value)
    return keepable(plain(checked)) if isinstance(checked, Tensor) else checked
