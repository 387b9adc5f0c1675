"""Any axis of time, which time steps count, and random calls (`python -m tests.random_calls` makes more)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.backends import backend_for
from fastreg.call.reference import encoded
from tests.calls import lengths_for, marks_for, transposed
from tests.conftest import INTERPRETED, Poison, gpu, memory_of, skip_on_formula
from tests.exact import spoil, steps_of, truth
from tests.random_calls import Kind

pytestmark = pytest.mark.numbers

KINDS = 5  # a test
FIRST = range(0, 60 if INTERPRETED else 300, KINDS)  # the number in CONTRIBUTING.md
X = torch.randn(2, 5, 80)
NARROW = 64  # time steps from which kernels on a CPU read the innermost axis in place, as docs/functions.md says


@pytest.mark.parametrize("first", FIRST)
def test_random_calls_give_the_results_of_the_formulas(first: int, device: str) -> None:
    compared = 0
    for seed in range(first, first + KINDS):
        kind = Kind(seed, device)
        try:
            with Poison():
                kind.play()
        finally:
            print(f"seed {seed}: {kind}")  # pytest shows it if the test fails
        compared += kind.counts["gradients"]
    assert compared > 0


def laid_out(memory_order: str) -> Tensor:
    """Return `(batch, channels, time, height, width)` of 2, 3, 5, 4, 7 whose axes have some order in memory."""
    names = ["batch", "channels", "time", "height", "width"]
    order = [names.index(name) for name in memory_order.split()]
    return torch.randn([(2, 3, 5, 4, 7)[axis] for axis in order]).permute([order.index(axis) for axis in range(5)])


@pytest.mark.parametrize(
    ("x", "options", "copied"),
    [
        (transposed(X), {}, False),
        (X[..., 1:70], {}, False),
        (X[..., ::2], {}, True),
        (torch.randn(80, 2, 5).movedim(0, 2), {}, True),
        (laid_out("batch time channels height width"), {"time_dim": 2}, False),
        (laid_out("time batch channels height width"), {"time_dim": 2}, False),
        (laid_out("channels batch time height width"), {"time_dim": -3}, False),
        (laid_out("batch height time channels width"), {"time_dim": 2}, False),
        (laid_out("batch channels height width time"), {"time_dim": 2}, True),
        (torch.randn(2, 30, 5, 4), {"time_dim": 2}, False),
        (torch.randn(2, 30, 5, 4), {"time_dim": 2, "lengths": torch.tensor([5, 3])}, True),
        (torch.randn(2, 3, NARROW - 1), {"time_dim": -1}, True),
        (torch.randn(2, 3, NARROW), {"time_dim": -1}, False),
        (torch.randn(2, 3, 2 * NARROW)[..., ::2], {"time_dim": -1}, True),
    ],
)
def test_axes_that_fold_are_read_in_place(x: Tensor, options: dict[str, Any], copied: bool) -> None:
    skip_on_formula("cpu")
    allocated, got = memory_of(lambda: fused_ar_tar(x, None, 0.0, 1.0, **options), "cpu")
    assert (allocated >= x.nbytes) == copied
    torch.testing.assert_close(got.double(), truth(x.double(), x.double(), 0.0, 1.0, **options).tar, rtol=1e-6, atol=0)


def test_a_mask_of_one_row_is_copied_as_one_row(device: str) -> None:
    skip_on_formula(device)
    raw = torch.randn(2, 3, 40, 50, device=device)
    mask = torch.randn(50, 1, 3, 2, device=device).permute(3, 2, 1, 0).expand(2, 3, 40, 50)
    allocated, (dropped, _) = memory_of(lambda: fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, time_dim=2, mask=mask), device)
    assert torch.equal(dropped, raw * mask)
    assert allocated < 1.5 * raw.nbytes


def test_gradients_are_in_the_order_of_their_tensors(device: str) -> None:
    skip_on_formula(device)
    x = torch.randn(4, 7, 3, 2, 5, device=device).movedim(2, 1).requires_grad_()  # (batch, channels, time, ...)
    leaf = x.detach().requires_grad_()
    fused_ar_tar(leaf, leaf, 2.0, 1.0, time_dim=2).backward()
    assert leaf.grad.stride() == leaf.stride()
    dropped, penalty = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, time_dim=2)
    assert dropped.stride() == x.stride()
    assert torch.equal(dropped != 0, (dropped[:, :, :1] != 0).expand_as(dropped))  # the mask has one row
    (gradient,) = torch.autograd.grad(dropped.sum() + penalty, x)
    assert gradient.stride() == x.stride()


# Lengths and masks of valid steps

MAKERS = {"lengths": lengths_for, "valid": marks_for}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_an_upstream_gradient_that_is_not_finite_reaches_only_steps_that_count(
    upstream: float, create_graph: bool, name: str, device: str
) -> None:
    """The gradient of a step that does not count is 0 all the same."""
    raw, dropped, alone = xs = torch.randn(3, 12, 9, 12, device=device).unbind()
    argument: Any = {name: MAKERS[name](raw)}
    valid = steps_of(raw, **argument)[0].squeeze(-1)
    for x in () if create_graph else (raw, dropped):  # the formula reads all steps
        spoil(x, **argument)
    mask = torch.full((12, 1, 12), 2.0, device=device)
    penalty = fused_ar_tar(raw.requires_grad_(), dropped.requires_grad_(), 2.0, 3.0, **argument)
    _, other = fused_dropout_ar_tar(alone.requires_grad_(), 0.5, 2.0, 3.0, mask=mask, **argument)
    for x in torch.autograd.grad((penalty + other) * upstream, xs, create_graph=create_graph):
        assert (x[~valid] == 0).all()
        assert not x[valid].isfinite().all()
        assert not x[0, 1].isfinite().any()


def test_an_infinite_mask_is_no_part_of_tar(device: str) -> None:
    raw = torch.randn(2, 4, 3, device=device, requires_grad=True)
    mask = torch.full((2, 1, 3), torch.inf, device=device)
    for lengths in (None, torch.tensor([3, 1])):
        _, got = fused_dropout_ar_tar(raw, 0.5, 0, 3.0, mask=mask, lengths=lengths)
        (want,) = torch.autograd.grad(fused_ar_tar(raw, None, 0, 3.0, lengths=lengths), raw)
        torch.testing.assert_close(*torch.autograd.grad(got, raw), want)


@gpu
@pytest.mark.parametrize("name", MAKERS)
def test_a_refilled_pinned_buffer_leaves_a_queued_copy_alone(name: str) -> None:
    x = torch.randn(12, 9, 8, device="cuda")
    argument: Any = MAKERS[name](x)
    want, pinned = fused_ar_tar(x, x, 2.0, 3.0, **{name: argument}), argument.cpu().pin_memory()
    torch.cuda._sleep(10**8)  # the copy waits in the queue
    got = fused_ar_tar(x, x, 2.0, 3.0, **{name: pinned})
    pinned.zero_()
    assert torch.equal(got, want)


@pytest.mark.parametrize("given", ["lengths valid starts", "lengths", "valid", "starts", "valid starts"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 5), (3, 70), (911, 9), (2, 4099)], ids=str)
def test_backends_encode_as_the_formula_and_clamp_lengths(shape: tuple[int, int], given: str, device: str) -> None:
    """A view of integers as bool has any bytes, and so has memory of other libraries."""
    skip_on_formula(device)
    backend: Any = backend_for(torch.device(device))
    lengths = torch.randint(-2, shape[1] + 3, shape[:1], device=device) if "lengths" in given else None
    if lengths is not None:
        lengths[-1] = 2**40
    valid = torch.rand(shape, device=device) < 0.7 if "valid" in given else None
    starts = torch.rand(shape, device=device) < 0.2 if "starts" in given else None
    want = encoded(shape, lengths, valid, starts)
    for byte in (2, 255):  # random calls have masks of 0 and 1
        marks = [x if x is None else (x.to(torch.uint8) * byte).view(torch.bool) for x in (valid, starts)]
        got = backend.encoder(shape, torch.device(device))(lengths, *marks)
        torch.testing.assert_close([*got], [*want], rtol=0, atol=0)
