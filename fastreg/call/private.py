"""All private functions of PyTorch that fastreg calls, looked up once, when fastreg is imported.

`MISSING` lists those that this release of PyTorch lacks, unless a public function takes their place. As long as it
lists any, `observed` in torch_state.py is true, so that PyTorch computes and differentiates every call by the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

MISSING: list[str] = []


def _found(path: str, neutral: object = None) -> Any:
    """Return a private function of PyTorch; note a missing one, and return a function that returns a neutral value."""
    try:
        return attrgetter(path)(torch)
    except AttributeError:
        MISSING.append(f"torch.{path}")
        return lambda *_: neutral


count_modes: Callable[[], int] = _found("_C._len_torch_dispatch_stack", 0)
is_recorded: Callable[[], bool] = _found("_C._is_tracing", False)
are_functions_transformed: Callable[[], bool] = _found("_C._are_functorch_transforms_active", False)
hooks_on_saved: Callable[[bool], Any] = _found("_C._autograd._top_saved_tensors_default_hooks")
current: Callable[[], int] = _found("_C._current_graph_task_id", -1)  # this thread's backward; -1 for none
is_view: Callable[[Tensor], bool] = _found("Tensor._is_view", True)
_found("autograd.Function._backward_cls")
# Without this function a compiler may run at any time, so `untraced` always hides functions from it.
compiler_of_frames: Callable[[], Any] = _found("_C._dynamo.eval_frame.get_eval_frame_callback", "unknown")
_found("autograd.forward_ad._current_level")
level_of_duals: Callable[[], int] = partial(getattr, forward_ad, "_current_level", -1)  # -1 without forward mode
# Public functions can replace these two. The private one takes half the time, and imports no compiler.
is_deterministic = getattr(torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled)
disable_compiler: Callable[[Any], Any] = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def check_attachable() -> None:
    """Check that PyTorch has the private functions that hooks on modules call, for which there is no substitute."""
    needed = "_C._current_graph_task_id", "Tensor._is_view", "autograd.Function._backward_cls"
    if lacking := ", ".join(f"torch.{path}" for path in needed if f"torch.{path}" in MISSING):
        why = f"as this PyTorch, {torch.__version__}, lacks {lacking}"
        raise RuntimeError(f"attach: penalties might be wrong, {why}; update fastreg, or call fused_ar_tar")


def class_of(node: type[Function]) -> type | None:
    """Return the class of a node's calls in the autograd graph."""
    return getattr(node, "_backward_cls", None)


def is_exporting() -> bool:
    """Return whether `torch.export` is tracing; the public function of torch 2.8 is true in all compiled code."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def skip_code(code: object) -> None:
    """Let Dynamo compile no frame of some code."""
    getattr(torch._dynamo.eval_frame, "skip_code", bool)(code)


def break_graph(why: str) -> None:
    """Let Dynamo break the graph that it traces, or raise an error that says why it cannot be one graph."""
    getattr(torch._dynamo, "graph_break", dict)(msg=why)


def version_of(x: Tensor) -> int:
    """Return how often a tensor was changed in place; for tensors of inference mode PyTorch does not count this."""
    return 0 if x.is_inference() else x._version


def apply_of(node: type[Function]) -> Callable[..., Any]:
    """Return `apply` of a node, without its part for transforms of torch.func, under which no plan is used."""
    return getattr(super(Function, node), "apply", node.apply)  # this saves 3 us
