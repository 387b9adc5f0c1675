"""The memory of plans, under keys: the metadata of a call's arguments, and the state of PyTorch, as a flat tuple.

All checks of metadata run when a key is new, so a key holds every fact that a check, a view, or compiled code depends
on. It holds no tensor, and of coefficients only whether each is 0, a number or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.torch_state import plain

SIZE = 1024  # kinds of calls: a few hundred sequence lengths, with and without gradients
PLANS: dict[Any, Any] = {}


def keep(key: Any, plan: Any) -> None:
    """Keep a plan; drop the oldest of too many. Two threads may make one at once: both are right."""
    if len(PLANS) >= SIZE:
        PLANS.pop(next(iter([*PLANS]), None), None)  # another thread may have dropped all
    PLANS[key] = plan


def forget() -> None:
    """Drop all plans, as the registry of backends has changed."""
    PLANS.clear()


def facts_of(values: Iterable[Any], of_others: Callable[[Any], Sequence[Any]]) -> list[Any]:
    """Return the facts of values that a check or a plan may depend on, one after the other.

    A tensor has six, and a float one: whether it is 0.

    Args:
        values: tensors, floats, `None`, and others.
        of_others: returns the facts of others, among them tensors of subclasses, and tensors whose values do not lie in
            memory.

    Raises:
        RuntimeError: the facts do not determine a plan, or a tensor is a wrapper, as of vmap, which has no memory.
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
    """Return the facts of a tensor of a subclass that only decorates it, or one of a list or of packed rows.

    Raises:
        RuntimeError: it is something else.
    """
    if isinstance(x, PackedSequence) and type(x.batch_sizes) is Tensor:
        return ((*facts_of(x[:2], facts_of_other), *x.batch_sizes.view(-1)[:1].tolist()),)
    if type(x) in (list, tuple):
        return ((type(x), *facts_of(x, facts_of_other)),)
    undecorated = plain(x)
    return refused(x) if undecorated is x else facts_of((undecorated,), refused)


def refused(x: Any) -> Any:
    """Refuse a value whose facts would not determine a plan.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"no plan for {type(x)}")
