"""The key of a call, and the plans that are kept under keys.

A key is a flat tuple of the metadata of the arguments and of the state of PyTorch. It holds every fact that a check, a
view or compiled code depends on. It holds no tensor. For a coefficient, it records one of three facts: the coefficient
is zero, a nonzero number, or a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.call.plan import Plan, facts_of
from fastreg.call.private import is_deterministic
from fastreg.call.problem import Options

Key = tuple[object, ...]
PLANS: dict[Key, Plan] = {}  # the plans of calls, by their keys
SIZE = 8192  # plans: enough for thousands of pairs of a batch size and a number of time steps; each takes up to 7.5 KB


def key_of(operation: type[Plan], inputs: Sequence[object], options: Options) -> Key | None:
    """Return the key of a call, or `None` if its facts do not determine a plan.

    Args:
        operation: the subclass of `Plan`.
        inputs: the activations, which may be one tensor, given twice; the coefficients; and lengths, valid and starts,
            if one of them is given.
        options: the other arguments.
    """
    facts = facts_of(inputs)
    if facts is None:
        return None
    state = torch.is_grad_enabled(), is_deterministic()
    return (operation, inputs[0] is inputs[1], *facts, *options, *map(type, options), *state)


def keep(key: Key, plan: Plan) -> None:
    """Keep a plan under a key, and drop all others if the memory is full; threads may do this at the same time."""
    if len(PLANS) >= SIZE:
        PLANS.clear()
    one_of: dict[object, object] = {}  # equal facts share memory
    PLANS[tuple([one_of.setdefault((type(x), x), x) for x in key])] = plan
