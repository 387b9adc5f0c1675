"""The common part of both operations: the plan of calls of one kind, and the values that a backward needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastreg.arguments import check_saved
from fastreg.backends import backend_for
from fastreg.kernels.view import Layout, Steps, layout_of
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


def pack(alpha: Any, beta: Any, steps: Steps | None) -> tuple[Sequence[Tensor | None], Any]:
    """Split coefficients and steps into tensors, for autograd to save, and the rest."""
    if steps is None and type(alpha) is float is type(beta):
        return (), (alpha, beta)
    values = alpha, beta, *(steps or Steps())
    tensors = [x if isinstance(x, Tensor) else None for x in values]
    return tensors, [layout_of(x) if isinstance(x, Tensor) else x for x in values]


def unpack(saved: Sequence[Tensor | None], rest: Any) -> tuple[Any, Any, Steps | None]:
    """Return alpha, beta and steps, as `pack` has split them.

    Raises:
        RuntimeError: a hook on saved tensors has changed the shape or the dtype of one.
    """
    if not saved:
        return *rest, None
    if not observed():
        for name, x, before in zip(("alpha", "beta", "steps", "counts", "offsets"), saved, rest, strict=True):
            if x is not None and (x.dtype is not before.dtype or x.shape != before.shape):
                check_saved(name, before, x)
    values = [before if x is None else x.contiguous() for x, before in zip(saved, rest, strict=True)]
    alpha, beta, marks, _, offsets = values
    return alpha, beta, None if marks is offsets is None else Steps(*values[2:])


def restored(name: str, x: Tensor | None, before: Layout | None) -> Tensor | None:
    """Return a tensor that a backward has unpacked as kernels read it: in the layout of the forward.

    Raises:
        RuntimeError: it has another shape or dtype, as its `data` and hooks on saved tensors may change.
    """
    if x is None or before is None or layout_of(x) == before:
        return x
    check_saved(name, before, x)
    size = 2 + sum((n - 1) * stride for n, stride in zip(before.shape, before.stride, strict=True))
    memory = torch.empty(size, dtype=x.dtype, device=x.device)[0 if before.aligned else 1 :]
    copy = to = memory.as_strided(before.shape, before.stride)
    for axis, stride in enumerate(before.stride):
        if stride == 0:
            to, x = to.narrow(axis, 0, 1), x.narrow(axis, 0, 1)
    to.copy_(x)
    return copy
