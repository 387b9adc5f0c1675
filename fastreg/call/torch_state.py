"""The state of PyTorch: whether it is tracing, transforming, capturing, or packing saved tensors away."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastreg.call.private import (
    MISSING,
    are_functions_transformed,
    break_graph,
    compiler_of_frames,
    count_modes,
    disable_compiler,
    is_recorded,
    level_of_duals,
    skip_code,
)

WHY_OUTSIDE = (
    "fastreg runs the hooks of an attached module, and derivatives of the formula, outside the graph. Compile without "
    "fullgraph=True, or call fused_ar_tar in the model instead of attaching its modules"
)
Function = TypeVar("Function", bound=Callable[..., object])
Given = TypeVar("Given")


def level_of_caller() -> int:
    """Return the `stacklevel` with which a warning of the caller points to code outside of fastreg and PyTorch."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastreg", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def untraced(function: Function) -> Function:
    """Run a function, and everything it calls, outside Dynamo.

    Dynamo would compile each function that it calls as a separate frame. Such a frame would find that it is being
    compiled, and take the formula. Unlike `torch.compiler.disable`, this decorator takes no time without a compiler,
    and does not import the compiler, which would take seconds.
    """

    @functools.wraps(function)
    def run(*args: object) -> object:
        is_traced = torch.compiler.is_dynamo_compiling()
        if is_traced:
            break_graph(WHY_OUTSIDE)
        if is_traced or compiler_of_frames() is not None:
            return _outside(run, function, args)
        return function(*args)

    return run  # pyright: ignore[reportReturnType]


@disable_compiler
def _outside(run: Any, function: Callable[..., object], args: Sequence[object]) -> object:
    """Call a function without Dynamo."""
    skip_code(run.__code__)  # otherwise Dynamo compiles a frame for each kind of call
    return function(*args)


def observed() -> bool:
    """Return whether PyTorch is tracing or transforming the call, and therefore has to see the formula."""
    if torch.compiler.is_dynamo_compiling():  # a compiler fuses the formula with its neighbours
        return True
    if MISSING:  # it may be tracing or transforming
        lacks = f"this PyTorch, {torch.__version__}, lacks {', '.join(MISSING)}"
        warn_of_the_formula(f"fastreg runs the plain formula: {lacks}; update fastreg")
        return True
    return (
        count_modes() > 0  # a mode intercepts operators, such as the mode of fake tensors in an export
        or is_recorded()  # torch.jit.trace records operators
        or are_functions_transformed()  # vmap and grad transform operators
        or level_of_duals() >= 0  # forward mode differentiates operators
    )


@functools.cache
def warn_of_the_formula(message: str) -> None:
    """Warn, once in a process for each message, that calls are slower than necessary."""
    warnings.warn(message, stacklevel=level_of_caller())


def transformed() -> bool:
    """Return whether torch.jit.trace, a transform of torch.func or forward mode runs, where hooks see no gradients."""
    return is_recorded() or are_functions_transformed() or level_of_duals() >= 0


def has_float64(device: torch.device) -> bool:
    """Return whether a device has float64, which GPUs of Apple and some of Intel lack."""
    return device.type != "mps" and (device.type != "xpu" or torch.xpu.get_device_properties(device).has_fp64)


def has_values(x: Tensor) -> bool:
    """Return whether the values of a tensor can be read without waiting for a device; a subclass may have none."""
    return type(x) is Tensor and x.device.type == "cpu" and x.numel() > 0 and not observed()


def keepable(x: Tensor) -> Tensor:
    """Return the tensor, or a copy if it was made in inference mode, because a backward could not keep it."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def plain(x: Given) -> Given:
    """Return a tensor without a subclass that only decorates it, and anything else unchanged.

    A subclass with its own dispatcher is kept. In compiled code all subclasses are kept, as the compiler sees through
    them.
    """
    if type(x) is Tensor or not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return x
    dispatches = getattr(type(x), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)
    return x if dispatches else x.as_subclass(Tensor)  # pyright: ignore[reportReturnType]
