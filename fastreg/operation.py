"""The common part of both operations: the plan of calls of one kind, and the values that a backward needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastreg.arguments import check_saved
from fastreg.backends import backend_for
from fastreg.kernels.view import Layout, Steps, allocate, layout_of
from fastreg.problem import Call, terms_of
from fastreg.torch_state import observed


class Plan:
    """How to compute calls of one kind: by a backend, or by the formula.

    Attributes:
        kind: of the calls.
        backend: the code; `None` for the formula.
        terms: the terms of the penalty.
        device: where the tensors are.
    """

    def __init__(self, call: Call, mask: Tensor | None) -> None:
        x = call.given()
        self.kind, self.device = replace(call.kind, plans=None), x.device  # with its plans it would be a cycle
        self.backend: Any = None if 0 in x.shape else backend_for(x.device)
        if self.backend is not None:
            self.terms = terms_of(call)
            self.prepare(call, mask)

    @classmethod
    def of(cls, call: Call, mask: Tensor | None = None) -> Any:
        """Return the plan of a call, which the first of its kind makes; `None` if plain PyTorch has to see the call.

        Args:
            call: of one layer.
            mask: of a dropout.
        """
        plans = call.kind.plans
        if plans is None:
            return None
        plan = plans.get(cls)
        if plan is None:
            plan = plans[cls] = cls(call, mask)
        return plan

    def prepare(self, call: Call, mask: Tensor | None) -> None:
        """Plan the launches of the backend."""
        raise NotImplementedError


def keep(ctx: Any, tensors: Sequence[Tensor | None], call: Call) -> None:
    """Save tensors of a call for its backward, and its coefficients and steps: most are numbers, and none."""
    more, ctx.rest = pack(call.alpha, call.beta, call.steps)
    ctx.save_for_backward(*tensors, *more)


def pack(alpha: Any, beta: Any, steps: Steps | None) -> tuple[Sequence[Tensor], Any]:
    """Split coefficients and steps into tensors, for autograd to save, and the rest."""
    if steps is None and type(alpha) is float is type(beta):
        return (), (alpha, beta)
    values = alpha, beta, *(steps or ())
    rest = [layout_of(x) if isinstance(x, Tensor) else x for x in values]
    return [x for x in values if isinstance(x, Tensor)], rest


def unpack(saved: Sequence[Any], rest: Any) -> tuple[Any, Any, Steps | None]:
    """Return alpha, beta and steps, as `pack` has split them.

    Raises:
        RuntimeError: a hook on saved tensors has changed the shape or the dtype of one.
    """
    if not saved:
        return *rest, None
    tensors, values = iter(saved), []
    for name, x in zip(("alpha", "beta", "steps", "counts", "offsets"), rest, strict=False):
        values.append(_unpacked(name, next(tensors), x) if isinstance(x, Layout) else x)
    alpha, beta, *steps = values
    return alpha, beta, Steps(*steps) if steps else None


def _unpacked(name: str, x: Tensor, before: Layout) -> Tensor:
    """Check a saved tensor, and return it without gaps."""
    if (x.dtype is not before.dtype or x.shape != before.shape) and not observed():
        check_saved(name, before, x)
    return x.contiguous()


def restored(name: str, x: Tensor | None, before: Layout | None) -> Tensor | None:
    """Return a tensor that a backward has unpacked as kernels read it: in the layout of the forward.

    Raises:
        RuntimeError: it has another shape or dtype, as its `data` and hooks on saved tensors may change.
    """
    if x is None or before is None or layout_of(x) == before:
        return x
    check_saved(name, before, x)
    copy = to = allocate(before)  # aligned, also where the kernels do not rely on it
    for axis, stride in enumerate(before.stride):
        if stride == 0:
            to, x = to.narrow(axis, 0, 1), x.narrow(axis, 0, 1)
    to.copy_(x)
    return copy
