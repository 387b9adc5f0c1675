"""The memory of plans. A key is a flat tuple of the metadata of a call's arguments and of the state of PyTorch.

Metadata are checked only when their key is new. So a key holds every fact that a check, a view or compiled code depends
on. It holds no tensor, and says of a coefficient only whether it is 0, another number or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.torch_state import plain

SIZE = 1024  # plans: enough for a few hundred sequence lengths, with and without gradients
PLANS: dict[Any, Any] = {}


def keep(key: Any, plan: Any) -> None:
    """Keep a plan under a key, and drop the oldest plan if there are too many; threads may do this at the same time."""
    if len(PLANS) >= SIZE:
        PLANS.pop(next(iter([*PLANS]), None), None)  # another thread may have dropped all plans
    PLANS[key] = plan


def forget() -> None:
    """Drop all plans, after a change of the registry of backends."""
    PLANS.clear()


def facts_of(values: Iterable[Any], of_others: Callable[[Any], Sequence[Any]]) -> list[Any]:
    """Return, in one list, all facts of some values that a check or a plan may depend on.

    A tensor has six facts. A float has one: whether it is 0.

    Args:
        values: tensors, floats, `None`, and other values.
        of_others: returns the facts of another value, such as a tensor of a subclass, or a tensor whose values are not
            in memory.

    Raises:
        RuntimeError: the facts do not determine a plan, or a tensor has no memory, such as a wrapper of vmap.
    """
    facts: list[Any] = []
    for x in values:
        # The values of a negated view have the other sign in memory. Zeros, meta and empty tensors have no address.
        if type(x) is Tensor and (address := x.data_ptr()) and not x.is_neg():
            facts += x.shape, x.stride(), x.dtype, x.device, address % 16 == 0, x.requires_grad
        else:
            facts += (None,) if x is None else (x != 0,) if type(x) is float else of_others(x)
    return facts


def facts_of_other(x: Any) -> Sequence[Any]:
    """Return the facts of a list, of packed rows, or of a tensor whose subclass only decorates it.

    Raises:
        RuntimeError: the value is something else.
    """
    if isinstance(x, PackedSequence) and type(x.batch_sizes) is Tensor:
        return ((*facts_of(x[:2], facts_of_other), *x.batch_sizes.view(-1)[:1].tolist()),)
    if type(x) in (list, tuple):
        return ((type(x), *facts_of(x, facts_of_other)),)
    undecorated = plain(x)
    return refused(x) if undecorated is x else facts_of((undecorated,), refused)


def refused(x: Any) -> Any:
    """Raise an error for a value whose facts would not determine a plan.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"no plan for {type(x)}")
