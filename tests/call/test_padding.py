"""Lengths, masks of valid steps and packed sequences: against the formula in float64, and how they are encoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.backends import backend_for
from fastreg.call.reference import encoded
from tests.conftest import skip_on_formula
from tests.exact import check_dropout, check_penalty, spoil

pytestmark = pytest.mark.numbers

ALPHA, BETA = 2.0, 3.0


def front(time: int, *lengths: int) -> list[str]:
    return ["x" * n + "." * (time - n) for n in lengths]


# Each row is a sequence, and each x is a step that counts; the names say how the steps are given.
STEPS: dict[str, list[str]] = {
    "lengths, some": front(9, 5, 0, 9, 1, 2, 9),
    "lengths, full": front(7, 7, 7, 7),
    "lengths, none": front(4, 0, 0),
    "lengths, one row": front(5, 3),
    "lengths, several runs": front(70, 70, 17, 20, 21, 40),  # a run has 20 steps
    "valid, holes": ["xx.xx.x", "x.x.x.x", ".xx..xx", "x......"],
    "valid, nothing": ["....", "...."],
    "valid, several runs": ["x" * 19 + "." + "x" * 20, "." * 20 + "x" * 20, "xx." * 13 + "x"],
}
by_both = pytest.mark.parametrize("steps", ["lengths, some", "valid, holes"])


def marks(steps: str, device: str = "cpu") -> Tensor:
    """Return the steps that count as a mask, `(batch, time)`."""
    return torch.tensor([[c == "x" for c in row] for row in STEPS[steps]], device=device)


def given(steps: str, device: str = "cpu") -> dict[str, Any]:
    """Return the argument that says which steps count."""
    valid = marks(steps, device)
    return {"lengths": valid.sum(1)} if steps.startswith("lengths") else {"valid": valid}


def leaves(valid: Tensor) -> list[Tensor]:
    """Return two `(batch, time, 12)` tensors, with NaN and infinity where steps do not count."""
    xs = (torch.randn(*valid.shape, 12, device=valid.device) for _ in range(2))
    return [spoil(x, valid=valid).requires_grad_() for x in xs]


@pytest.mark.parametrize("way", ["two tensors", "one tensor", "time first", "dropout by rows", "dropout"])
@pytest.mark.parametrize("steps", STEPS)
def test_values_and_gradients(steps: str, way: str, device: str, poison: None) -> None:
    raw, dropped = leaves(marks(steps, device))
    options = given(steps, device)
    if way.startswith("dropout"):
        mask = (torch.rand(len(raw), raw.shape[1] if way == "dropout" else 1, 12, device=device) > 0.5).float() * 2
        check_dropout(raw, mask, ALPHA, BETA, **options)
        return
    if way == "time first":
        raw, dropped = (x.detach().transpose(0, 1).contiguous().requires_grad_() for x in (raw, dropped))
        options["batch_first"] = False
    check_penalty(raw, raw if way == "one tensor" else dropped, ALPHA, BETA, **options)


@by_both
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_an_upstream_gradient_that_is_not_finite(upstream: float, create_graph: bool, steps: str, device: str) -> None:
    """The gradient of a step that does not count is 0 all the same."""
    valid = marks(steps, device)
    raw, dropped = leaves(valid)
    alone = raw.detach().nan_to_num(7.0, 7.0).requires_grad_()
    if create_graph:  # the formula reads all steps
        raw, dropped = (x.detach().nan_to_num(7.0, 7.0).requires_grad_() for x in (raw, dropped))
    mask = torch.full((len(valid), 1, 12), 2.0, device=device)
    penalty = fused_ar_tar(raw, dropped, ALPHA, BETA, **given(steps, device))
    _, other = fused_dropout_ar_tar(alone, 0.5, ALPHA, BETA, mask=mask, **given(steps, device))
    for x in torch.autograd.grad((penalty + other) * upstream, (raw, dropped, alone), create_graph=create_graph):
        assert (x[~valid] == 0).all()
        assert not x[valid].isfinite().all()
        assert not x[0, 0].isfinite().any()


def test_an_infinite_mask_is_no_part_of_tar(device: str) -> None:
    raw = torch.randn(2, 4, 3, device=device, requires_grad=True)
    mask = torch.full((2, 1, 3), torch.inf, device=device)
    for lengths in (None, torch.tensor([3, 1])):
        _, got = fused_dropout_ar_tar(raw, 0.5, 0, BETA, mask=mask, lengths=lengths)
        (want,) = torch.autograd.grad(fused_ar_tar(raw, None, 0, BETA, lengths=lengths), raw)
        torch.testing.assert_close(*torch.autograd.grad(got, raw), want)


@pytest.mark.parametrize("same", [False, True])
def test_packed_rows_give_what_padded_ones_give(same: bool, device: str, poison: None) -> None:
    steps = "lengths, several runs"
    lengths, padded = given(steps, device)["lengths"], leaves(marks(steps, device))[: 1 if same else 2]
    packed: list[Any] = [pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False) for x in padded]
    got = fused_ar_tar(packed[0], packed[-1], ALPHA, BETA, return_terms=True)
    want = fused_ar_tar(padded[0], padded[-1], ALPHA, BETA, return_terms=True, lengths=lengths)
    torch.testing.assert_close(got, want)
    for scale in (1, 100):
        gradients = (torch.autograd.grad(x.penalty * scale, padded, retain_graph=True) for x in (got, want))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("byte", [2, 255])
def test_marks_of_any_bytes(byte: int, device: str) -> None:
    """A view of integers as bool has such bytes, and so has memory of other libraries."""
    marks = torch.rand(2, 5, 9, device=device) < torch.tensor([0.7, 0.2], device=device).view(2, 1, 1)
    x = torch.randn(5, 9, 12, device=device)
    got, want = (
        fused_ar_tar(x, x, ALPHA, BETA, valid=valid, starts=starts, return_terms=True)
        for valid, starts in ((marks.to(torch.uint8) * byte).view(torch.bool), marks)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@by_both
def test_a_refilled_pinned_buffer_leaves_a_queued_copy_alone(steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a GPU all tensors are pinned, and copies to a device are read only at the end."""
    queue, to, empty_like = [], Tensor.to, torch.empty_like

    def queued(x: Tensor, *args: Any, non_blocking: bool = False, **options: Any) -> Tensor:
        if non_blocking:
            queue.append(x)
        return to(x, *args, **options)

    monkeypatch.setattr(Tensor, "to", queued)
    monkeypatch.setattr(Tensor, "is_pinned", lambda _: True)
    monkeypatch.setattr(torch, "empty_like", lambda x, pin_memory: empty_like(x))
    ((name, argument),) = given(steps).items()
    before, x = argument.tolist(), torch.empty(*marks(steps).shape, 8, device="meta")
    fused_ar_tar(x, x, ALPHA, BETA, **{name: argument})
    argument.zero_()
    assert [x.tolist() for x in queue] == [before]


@pytest.mark.parametrize("given", ["lengths valid starts", "lengths", "valid", "starts", "valid starts"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 5), (3, 70), (911, 9), (2, 4099)], ids=str)
def test_backends_encode_as_the_formula_and_clamp_lengths(shape: tuple[int, int], given: str, device: str) -> None:
    skip_on_formula(device)
    backend: Any = backend_for(torch.device(device))
    lengths = torch.randint(-2, shape[1] + 3, shape[:1], device=device) if "lengths" in given else None
    if lengths is not None:
        lengths[-1] = 2**40
    valid = torch.rand(shape, device=device) < 0.7 if "valid" in given else None
    starts = torch.rand(shape, device=device) < 0.2 if "starts" in given else None
    got = backend.encoder(shape, torch.device(device))(lengths, valid, starts)
    want = encoded(shape, lengths, valid, starts)
    torch.testing.assert_close([*got], [*want], rtol=0, atol=0)
