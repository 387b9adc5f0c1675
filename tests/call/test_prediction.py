"""The forward writes gradients for the upstream gradient that it expects; any other gives exact gradients, too."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.kernels import prediction
from tests.calls import CALLS, leaves
from tests.conftest import BF16, DOUBLE, FLOAT, HALF, INTERPRETED, PLANS, memory_of, skip_on_formula

pytestmark = pytest.mark.numbers

UPSTREAM = [1.0, 1.0, 65536.0, -2.0, 0.0, -0.0, math.nan, math.nan]
UPSTREAM += [] if INTERPRETED else [0.5, 0.5, -0.0, -0.0, math.inf, 1e-30, 1.0]  # which takes long


def assert_same_bits(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def alone(call: Any, upstream: Tensor, inputs: Any) -> list[Tensor]:
    """Return gradients that the backward has computed: with hooks on saved tensors the forward writes none."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        got = call()
    return [*torch.autograd.grad(got, inputs, upstream)]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*[("pair", x) for x in (DOUBLE, HALF, BF16, FLOAT)], *[(kind, FLOAT) for kind in ("same", "lengths", "alpha0")]],
    ids=str,
)
def test_any_upstream_gradient_after_any_other_is_exact(kind: str, dtype: torch.dtype, device: str) -> None:
    inputs = leaves(7, dtype, device)
    call = functools.partial(CALLS[kind], *inputs)
    upstream = [torch.tensor(x, dtype=DOUBLE if dtype == DOUBLE else FLOAT, device=device) for x in UPSTREAM]
    wanted = [alone(call, grad, inputs) for grad in upstream]  # before all others, as each is expected after it
    for grad, want in zip(upstream, wanted, strict=True):
        assert_same_bits(torch.autograd.grad(call(), inputs, grad), want)


def test_an_interrupt_while_gradients_are_handed_over_is_silent() -> None:
    """To pytest, an ignored error of a destructor is a failure."""
    half = prediction.Predicted.__new__(prediction.Predicted)
    del half
    gc.collect()


@pytest.mark.parametrize("time", [5, 7], ids=["of_another_plan", "of_the_plan"])
def test_a_backward_that_the_last_one_of_any_plan_has_announced_reads_no_activations(time: int, device: str) -> None:
    skip_on_formula(device)
    (other, _), (leaf, _) = leaves(time, device=device), leaves(7, device=device)
    grad = torch.tensor(3.0, device=device)
    want = alone(lambda: fused_ar_tar(leaf, leaf, 2.0, 1.0), grad, (leaf,))
    for upstream in (5 * grad, grad):  # a new plan expects the first one, and the second one from now on
        PLANS.clear()
        torch.autograd.grad(fused_ar_tar(other, other, 2.0, 1.0), other, upstream)
    got = fused_ar_tar(leaf, leaf, 2.0, 1.0)
    leaf.data.zero_()  # behind the back of autograd
    assert_same_bits(torch.autograd.grad(got, leaf, grad), want)


def test_graphs_in_flight_have_memory_of_their_own(device: str) -> None:
    """Each graph has its own memory, and expects the upstream gradient of the backward before its forward."""
    inputs, (grad, other) = leaves(7, device=device), torch.tensor([3.0, 5.0], device=device).unbind()
    call = functools.partial(fused_ar_tar, *inputs, 2.0, 1.0)
    wanted = [alone(call, x, inputs) for x in (grad, other)]
    graphs = []
    for x in (grad, other, grad, other):
        torch.autograd.grad(call(), inputs, x)
        graphs.append(call())
    returned: list[Tensor] = []
    for got, x, want in zip([*graphs, *graphs[::-1]], (grad, other) * 4, wanted * 4, strict=True):
        found = torch.autograd.grad(got, inputs, x, retain_graph=True)
        assert_same_bits(found, want)
        returned += [x.zero_() for x in found]  # the caller may change returned gradients
    assert len({x.data_ptr() for x in returned}) == len(returned)
    with torch.inference_mode():
        torch.autograd.grad(graphs[0], inputs, torch.tensor(7.0, device=device))
    torch.autograd.grad(call(), inputs, grad)
    late = call()
    grad.copy_(other)  # the forward has written gradients for the earlier value
    for got in (late, call()):
        assert_same_bits(torch.autograd.grad(got, inputs, grad), wanted[1])


def test_an_input_or_a_mask_changed_in_place_is_an_error(device: str) -> None:
    raw, mask = leaves(7, device=device)[0] * 1, torch.ones(3, 1, 8, device=device)
    _, of_dropout = fused_dropout_ar_tar(raw, 0.4, 2.0, 1.0, mask=mask)
    for changed, penalty in ((mask, of_dropout), (raw, fused_ar_tar(raw, raw, 2.0, 1.0))):
        changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()


def large(device: str) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Return tensors whose gradients take most of the memory of a call, and the call."""
    skip_on_formula(device)
    inputs = [torch.randn(2, 4, 500, device=device, requires_grad=True) for _ in range(2)]
    return inputs, functools.partial(fused_ar_tar, *inputs, 2.0, 1.0)


def forms_gradients(call: Callable[[], Tensor], inputs: list[Tensor], device: str) -> bool:
    """Return whether a forward writes gradients; check the gradients of the backward that follows."""
    allocated, got = memory_of(call, device)
    assert_same_bits(torch.autograd.grad(got, inputs), alone(call, torch.ones((), device=device), inputs))
    assert not 0.5 < allocated / inputs[0].nbytes < 1.9
    return allocated > inputs[0].nbytes


def test_hooks_and_checkpoints_keep_no_gradients(device: str) -> None:
    inputs, call = large(device)
    assert forms_gradients(call, inputs, device)
    assert not forms_gradients(lambda: checkpoint(call, use_reentrant=False), inputs, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert not forms_gradients(call, inputs, device)


def test_forwards_alone_form_no_gradients_until_a_backward_comes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "PATIENCE", 4)
    inputs, call = large(device)
    for count in (0, 3, 4, 0):
        for _ in range(count):
            call()
        assert forms_gradients(call, inputs, device) == (count < 4)  # and a backward comes
    for _ in range(2):  # layers, runs and accumulated batches keep their graphs until the backward
        graphs = [call() for _ in range(6)]
        assert forms_gradients(call, inputs, device)
        torch.stack(graphs).sum().backward()
