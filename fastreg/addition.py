"""`Addition`: adds the gradient of a penalty to the gradient that arrives at its activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.backends import backend_for
from fastreg.dropout import BACKWARDS, launch_backward, plan_backward
from fastreg.kernels.view import layout_of
from fastreg.prepare import plain, restored
from fastreg.problem import Layer, Problem, compute_dtype
from fastreg.reference import ar_tar_gradients
from fastreg.torch_state import are_memory, observed


class Addition:
    """Add the gradient of a penalty to the gradient that arrives at its activations, in one pass.

    Args:
        layer: of raw alone, without a subclass that only decorates it.
        problem: of TAR, of AR of raw, or of both.

    Attributes:
        problem: the terms.
        layout: of the activations.
    """

    def __init__(self, layer: Layer, problem: Problem) -> None:
        raw = layer.given()
        self.problem, self.layout, self.dtype = problem, layout_of(raw), compute_dtype(raw)
        self.backend: Any = backend_for(raw.device) if raw.numel() > 0 else None
        self.backwards: dict[Any, Any] = {}  # by the layouts of raw and of the gradient that arrives

    def __call__(self, upstream: Tensor, layer: Layer, arrived: Tensor) -> Tensor:
        """Return the sum of both gradients.

        Args:
            upstream: (), the upstream gradient of the penalty.
            layer: of raw, as a hook on saved tensors returns it.
            arrived: the gradient, of the shape and dtype of raw.

        Raises:
            RuntimeError: a second derivative is wanted of activations that have no graph.
        """
        raw: Any = layer.raw
        layout = self.layout
        if upstream.dtype != self.dtype or upstream.device != layout.device:
            upstream = upstream.to(layout.device, self.dtype)
        if raw.dtype != layout.dtype or raw.shape != layout.shape:
            raw = restored("raw", raw, layout)
            layer = Layer(raw, None, layer.values)
        if self.backend is None or torch.is_grad_enabled() or observed() or not are_memory((raw, arrived, upstream)):
            return self._by_formula(upstream, layer, plain(arrived))
        key = raw.stride(), raw.data_ptr() % 16 == 0, arrived.stride(), arrived.dtype, arrived.data_ptr() % 16 == 0
        backward = self.backwards.get(key)
        if backward is None:
            backward = plan_backward(
                self.backend, (layout_of(raw), None, layout_of(arrived)), layer, self.problem, True
            )
            if len(self.backwards) < BACKWARDS:
                self.backwards[key] = backward
        return launch_backward(backward, (arrived, upstream), layer)

    def _by_formula(self, upstream: Tensor, layer: Layer, arrived: Tensor) -> Tensor:
        """Return the sum in plain PyTorch, which it sees."""
        if torch.is_grad_enabled() and not layer.given().requires_grad:
            raise RuntimeError(
                "attach: second derivatives need an activation that was freed; keep the output of the module and of "
                "its dropout until the backward, or use on_loss_begin"
            )
        wide, _ = ar_tar_gradients(upstream, layer, self.problem.penalized())
        return arrived if wide is None else (arrived.to(wide.dtype) + wide).to(arrived.dtype)
