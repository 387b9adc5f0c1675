"""`Addition`: adds the gradient of a penalty to the gradient that arrives at its activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.backends import backend_for
from fastreg.dropout import BACKWARDS, Adding
from fastreg.kernels.view import Values, layout_of
from fastreg.operation import restored
from fastreg.problem import Call, Kind, terms_of
from fastreg.reference import ar_tar_gradients
from fastreg.torch_state import is_memory, observed, plain


class Addition:
    """Add the gradient of a penalty to the gradient that arrives at its activations, in one pass.

    Args:
        call: of raw and dropped.
        of_raw: whether the activations are raw, not dropped.
        ar: whether AR is of them.
        tar: whether TAR is of them.

    Attributes:
        of_raw: as above.
        kind: of the calls of the activations as raw, which the addition takes.
        layout: of the activations.
    """

    def __init__(self, call: Call, of_raw: bool, ar: bool, tar: bool) -> None:
        raw, kind = call.raw if of_raw else call.dropped, call.kind
        self.of_raw, self._ar, self._tar, self.layout = of_raw, ar, tar, layout_of(raw)
        self.kind = Kind(kind.time_dim, kind.reduction, measured=False, ar_of_raw=True, dtype=kind.dtype)
        self.backend: Any = backend_for(raw.device) if raw.numel() > 0 else None
        self.backwards: dict[Any, Adding] = {}  # by the layout of the gradient that arrives

    def of(self, call: Call) -> Call:
        """Return the call of the activations, without them; the coefficient of a term of other activations is 0."""
        alpha, beta = call.alpha if self._ar else 0.0, call.beta if self._tar else 0.0
        return Call(None, None, alpha, beta, call.steps, self.kind)

    def __call__(self, upstream: Tensor, call: Call, arrived: Tensor) -> Tensor:
        """Return the sum of both gradients.

        Args:
            upstream: (), the upstream gradient of the penalty.
            call: one of the same kind, of raw as a hook on saved tensors returns it.
            arrived: the gradient, of the shape and dtype of raw.

        Raises:
            RuntimeError: a second derivative is wanted of activations that have no graph.
        """
        raw = call.raw
        if upstream.dtype != self.kind.dtype or upstream.device != self.layout.device:
            upstream = upstream.to(self.layout.device, self.kind.dtype)
        if (
            self.backend is None
            or torch.is_grad_enabled()
            or observed()
            or not all(map(is_memory, (raw, arrived, upstream)))
        ):
            return self._by_formula(upstream, call, plain(arrived))
        layout = layout_of(arrived)
        backward = self.backwards.get(layout)
        if backward is None:
            backward = Adding(self.backend, (self.layout, None, layout), call, terms_of(call))
            if len(self.backwards) < BACKWARDS:
                self.backwards[layout] = backward
        return backward(upstream, (restored("raw", raw, self.layout), None, arrived), Values(*call[2:5]))

    def _by_formula(self, upstream: Tensor, call: Call, arrived: Tensor) -> Tensor:
        """Return the sum in plain PyTorch, which it sees."""
        if torch.is_grad_enabled() and not call.raw.requires_grad:
            raise RuntimeError(
                "attach: second derivatives need an activation that was freed; keep the output of the module and of "
                "its dropout until the backward, or use on_loss_begin"
            )
        wide, _ = ar_tar_gradients(upstream, call)
        return arrived if wide is None else (arrived.to(wide.dtype) + wide).to(arrived.dtype)
