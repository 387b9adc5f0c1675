"""The common part of both operations: the plan of calls of one kind, and the values that a backward needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastreg.arguments import check_call, check_saved
from fastreg.backends import backend_for
from fastreg.kernels.view import Layout, Steps, layout_of
from fastreg.plans import Plans, key_of
from fastreg.problem import Call, terms_of
from fastreg.torch_state import observed


class Plan:
    """How to compute calls of one kind: by a backend, or by the formula.

    Attributes:
        options: of the calls, neither tensors nor coefficients.
        additions: how to add gradients of the penalty, which `fastreg.carry` keeps with the plan.
        backend: the code; `None` for the formula.
        terms: the terms of the penalty.
        device: where the tensors are.
    """

    kept: ClassVar[Plans]

    def __init__(self, call: Call, mask: Tensor | None) -> None:
        x = call.given()
        self.options, self.additions, self.device = call.options(), {}, x.device
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

        Raises:
            TypeError, ValueError: as the operation.
        """
        key = key_of(call, mask)
        plan = None if key is None else cls.kept.get(key)
        if plan is None:
            check_call(call, mask)
            if key is not None:
                plan = cls(call, mask)
                cls.kept.keep(key, plan)
        return plan

    def prepare(self, call: Call, mask: Tensor | None) -> None:
        """Plan the launches of the backend."""
        raise NotImplementedError

    def call(self, raw: Any, dropped: Any, alpha: Any, beta: Any, steps: Steps | None) -> Call:
        """Return a call of this kind."""
        return Call(raw, dropped, alpha, beta, steps, *self.options)


def keep(ctx: Any, tensors: Sequence[Tensor | None], call: Call) -> None:
    """Save tensors of a call for its backward, and its coefficients and steps: most are numbers, and none."""
    more, ctx.rest = pack(call.alpha, call.beta, call.steps)
    ctx.save_for_backward(*tensors, *more)


def pack(alpha: Any, beta: Any, steps: Steps | None) -> tuple[Sequence[Tensor | None], Any]:
    """Split coefficients and steps into tensors, for autograd to save, and the rest."""
    if steps is None and type(alpha) is float is type(beta):
        return (), (alpha, beta, None)
    tensors = *[x if isinstance(x, Tensor) else None for x in (alpha, beta)], *(steps or Steps())
    numbers = [None if isinstance(x, Tensor) else x for x in (alpha, beta)]
    return tensors, (*numbers, [None if x is None else layout_of(x) for x in tensors])


def unpack(saved: Sequence[Tensor | None], rest: Any) -> tuple[Any, Any, Steps | None]:
    """Return alpha, beta and steps, as `pack` has split them.

    Raises:
        RuntimeError: a hook on saved tensors has changed the shape or the dtype of one.
    """
    alpha, beta, layouts = rest
    if layouts is None:
        return alpha, beta, None
    if not observed():
        for name, x, before in zip(("alpha", "beta", "steps", "counts", "offsets"), saved, layouts, strict=True):
            if x is not None and (x.dtype, x.shape) != (before.dtype, before.shape):
                check_saved(name, before, x)
    first, second, *steps = [None if x is None else x.contiguous() for x in saved]
    has_steps = any(x is not None for x in steps)
    return alpha if first is None else first, beta if second is None else second, Steps(*steps) if has_steps else None


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
