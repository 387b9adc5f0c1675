"""Plans, their keys, and the memory that holds them.

A key is a flat tuple of the metadata of a call's arguments and of the state of PyTorch. Metadata are checked only when
their key is new. So a key holds every fact that a check, a view or compiled code depends on. It holds no tensor. For a
coefficient, it records one of three facts: the coefficient is zero, a nonzero number, or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.problem import Options, are_same
from fastreg.call.torch_state import hooks_on_saved, is_deterministic, plain
from fastreg.kernels.view import Steps, Terms, Values

SIZE = 8192  # plans of up to 7.5 KB: enough for thousands of pairs of a batch size and a number of time steps


class Plan:
    """Hold the facts that all calls with one key share; a subclass computes these calls.

    Threads share plans, so a plan is complete when it is kept.

    Attributes:
        terms: the terms of each layer's penalty; empty if no term reads anything.
        steps_of: a function of a call's arguments that checks the values of lengths, valid steps, starts or batch
            sizes, and returns the steps that count; `None` if all steps count.
        row: the shape of a dropout mask with one row for all time steps.
        facts: the facts of the tensors that its nodes save.
    """

    facts: Sequence[Any] = ()

    def __init__(
        self, terms: Sequence[Terms], steps_of: Callable[[Sequence[Any]], Steps] | None, row: Sequence[int]
    ) -> None:
        self.terms, self.steps_of, self.row = terms, steps_of, row


class FormulaPlan(Plan):
    """Compute calls in plain PyTorch.

    Args:
        formula: a function of the tensors of a call, its `Values`, and the terms.
        facts: the arguments of `Plan`.
    """

    def __init__(self, formula: Callable[..., Any], *facts: Any) -> None:
        super().__init__(*facts)
        self.formula = formula

    def __call__(self, tensors: Sequence[Any], values: Values) -> Any:
        """Compute a call; return `None` if no term reads anything."""
        return self.formula(tensors, values, self.terms) if self.terms else None


PLANS: dict[Any, Any] = {}


class NoKeyError(Exception):
    """The facts of a call do not determine a plan."""


def key_of(operation: Any, arguments: Sequence[Any], options: Options) -> Any:
    """Return the key of a call, or `None` if its facts do not determine a plan.

    Args:
        operation: the class of the plan.
        arguments: all tensors and coefficients; the first two may be the same tensor.
        options: the other arguments.
    """
    first, second = arguments[0], arguments[1]
    try:
        facts = facts_of(arguments)
    except NoKeyError:
        return None
    are_one = first is second if isinstance(first, Tensor) else are_same(first, second)
    state = torch.is_grad_enabled(), hooks_on_saved(False) is None, is_deterministic()
    return (operation, are_one, *facts, *options, *map(type, options), *state)


def keep(key: Any, plan: Any) -> None:
    """Keep a plan under a key; threads may do this at the same time.

    If the memory is full, drop every other plan of its older half. Then a loop over somewhat more kinds of calls than
    fit into the memory still finds most of their plans.
    """
    if len(PLANS) >= SIZE:
        for old in [*PLANS][: SIZE // 2 : 2]:
            PLANS.pop(old, None)  # another thread may have dropped it
    one_of: dict[Any, Any] = {}  # equal facts share memory
    key = tuple([one_of.setdefault((type(x), x), x) for x in key])
    plan.facts = [one_of.setdefault((type(x), x), x) for x in plan.facts]
    PLANS[key] = plan


def forget() -> None:
    """Drop all plans, after a change of the registry of backends."""
    PLANS.clear()


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
    if isinstance(x, PackedSequence) and type(x.batch_sizes) is Tensor:
        # Batch sizes are values, which are checked in every call. All numbers of dense rows have one plan.
        shape, *others = facts_of(x[:1])
        is_dense = others and others[0] == (*shape[1:], 1)
        return ((PackedSequence, shape[1:] if is_dense else shape, *others),)
    if type(x) in (list, tuple):
        return ((type(x), *facts_of(x)),)
    undecorated = plain(x)
    if undecorated is x:
        raise NoKeyError
    return facts_of((undecorated,))
