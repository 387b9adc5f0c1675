"""The state of PyTorch: whether it is tracing, transforming, capturing, or packing saved tensors away."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])
_count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_is_recorded: Callable[[], bool] = torch._C._is_tracing
_are_functions_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
is_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms  # half the time of the public function
hooks_on_saved: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
current: Callable[[], int] = torch._C._current_graph_task_id  # this thread's backward; -1 for none
compiler_of_frames: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore[reportAttributeAccessIssue]


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
    def run(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or compiler_of_frames() is not None:
            return _outside(run, function, args)
        return function(*args)

    return run  # pyright: ignore[reportReturnType]


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _outside(run: Any, function: Any, args: Any) -> Any:
    """Call a function without Dynamo."""
    skip = getattr(torch._dynamo.eval_frame, "skip_code", bool)
    skip(run.__code__)  # otherwise Dynamo compiles a frame for each kind of call
    return function(*args)


def observed() -> bool:
    """Return whether PyTorch is tracing or transforming the call, and therefore has to see the formula."""
    return (
        torch.compiler.is_dynamo_compiling()  # a compiler fuses the formula with its neighbours
        or _count_modes() > 0  # a mode intercepts operators, such as the mode of fake tensors in an export
        or _is_recorded()  # torch.jit.trace records operators
        or _are_functions_transformed()  # vmap and grad transform operators
        or forward_ad._current_level >= 0  # forward mode differentiates operators
    )


def transformed() -> bool:
    """Return whether torch.jit.trace, a transform of torch.func or forward mode runs, where hooks see no gradients."""
    return _is_recorded() or _are_functions_transformed() or forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Return whether `torch.export` is tracing; the public function of torch 2.8 is true in all compiled code."""
    return torch.compiler._is_exporting_flag


def has_float64(device: torch.device) -> bool:
    """Return whether a device has float64, which GPUs of Apple and some of Intel lack."""
    return device.type != "mps" and (device.type != "xpu" or torch.xpu.get_device_properties(device).has_fp64)


def version_of(x: Tensor) -> int:
    """Return how often a tensor was changed in place; for tensors of inference mode PyTorch does not count this."""
    return 0 if x.is_inference() else x._version


def has_values(x: Tensor) -> bool:
    """Return whether the values of a tensor can be read without waiting for a device; a subclass may have none."""
    return type(x) is Tensor and x.device.type == "cpu" and x.numel() > 0 and not observed()


def keepable(x: Tensor) -> Tensor:
    """Return the tensor, or a copy if it was made in inference mode, because a backward could not keep it."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def plain(x: Any) -> Any:
    """Return a tensor without a subclass that only decorates it, and anything else unchanged.

    A subclass with its own dispatcher is kept. In compiled code all subclasses are kept, as the compiler sees through
    them.
    """
    if type(x) is Tensor or not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return x
    dispatches = getattr(type(x), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)
    return x if dispatches else x.as_subclass(Tensor)
