"""A release of PyTorch that lacks one of the private functions: the formula runs, with one warning."""

from __future__ import annotations

import pytest

from tests.conftest import python

SCRIPT = """
import sys, warnings
from functools import reduce
import torch
import torch._dynamo, torch.autograd.forward_ad
class Missing:  # an attribute that a class does not even inherit
    def __get__(self, *_):
        raise AttributeError
*owners, name = sys.argv[1].split(".")
owner = reduce(getattr, owners, torch)
kept = vars(owner).get(name)
setattr(owner, name, Missing()) if isinstance(owner, type) else delattr(owner, name)
with warnings.catch_warnings(record=True) as given:
    warnings.simplefilter("always")
    from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar
    from fastreg.call.key import PLANS
    from fastreg.call.private import MISSING
    from fastreg.call.torch_state import observed
    delattr(owner, name) if kept is None else setattr(owner, name, kept)  # PyTorch itself calls it
    raw, dropped = xs = [torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    results = [fused_ar_tar(*xs, 2.0, 1.0), 2 * dropped.square().mean() + raw.diff(dim=1).square().mean()]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[torch.autograd.grad(x, xs) for x in results])
    dropout = FusedRNNDropout(0.4, 2.0, 1.0)
    (dropout(raw).sum() + dropout.take().penalty).backward()
    rnn, regularizer, attach = torch.nn.Linear(4, 4).double(), RNNRegularizer(2.0, 1.0), "attached"
    try:
        with regularizer.attach(rnn, batch_first=True):
            got = rnn(raw)
            torch.testing.assert_close(regularizer.take(got.sum()).penalty, fused_ar_tar(got, got, 2.0, 1.0))
    except RuntimeError as error:
        attach = str(error)
warned = [str(x.message) for x in given if "fastreg" in str(x.message)]
print(len(MISSING), observed(), len(PLANS), attach, *warned, sep="|")
"""
CURRENT = "_C._current_graph_task_id"
NEEDED = [
    "_C._len_torch_dispatch_stack",
    "_C._is_tracing",
    "_C._are_functorch_transforms_active",
    "_C._autograd._top_saved_tensors_default_hooks",
    CURRENT,
    "_C._dynamo.eval_frame.get_eval_frame_callback",
    "autograd.forward_ad._current_level",
    "Tensor._is_view",
    "autograd.Function._backward_cls",
]
BY_ATTACH = CURRENT, "Tensor._is_view", "autograd.Function._backward_cls"
REPLACED = ["_C._get_deterministic_algorithms", "_disable_dynamo", "compiler._is_exporting_flag"]


@pytest.mark.parametrize("name", [*NEEDED, *REPLACED])
def test_without_a_private_function_the_formula_runs_with_one_warning_or_a_public_one_replaces_it(name: str) -> None:
    missing, observed, plans, attached, *warned = python("-c", SCRIPT, name).stdout.strip().split("|")
    is_needed, lacks = name in NEEDED, f"lacks torch.{name}; update fastreg"
    assert (missing, observed, plans == "0") == (f"{is_needed:d}", f"{is_needed}", is_needed)
    assert len(warned) == is_needed
    assert all(x.startswith("fastreg runs the plain formula: this PyTorch, ") and x.endswith(lacks) for x in warned)
    is_refused = attached.startswith("attach: penalties might be wrong, as this PyTorch, ")
    assert is_refused == (lacks in attached) == (name in BY_ATTACH) == (attached != "attached")
