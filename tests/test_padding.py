"""Lengths, masks of valid steps and packed sequences, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import INTERPRETED
from tests.exact import check_dropout, check_penalty, spoil, truth

ALPHA, BETA = 2.0, 3.0


def front(time: int, *lengths: int) -> list[str]:
    return ["x" * n + "." * (time - n) for n in lengths]


# Each row is a sequence, and each x is a step that counts; the names say how the steps are given.
STEPS: dict[str, list[str]] = {
    "lengths, some": front(9, 5, 0, 9, 1, 2, 9),
    "lengths, full": front(7, 7, 7, 7),
    "lengths, none": front(4, 0, 0),
    "lengths, one step": front(1, 1, 0, 1),
    "lengths, one row": front(5, 3),
    "lengths, several runs": front(70, 70, 17, 20, 21, 40),  # a run has 20 steps
    "lengths, many": front(6, *[n % 7 for n in range(70)]),
    "valid, padding on the left": ["..xxxxx", "xxxxxxx", "......x", "....xxx"],
    "valid, padding on both sides": [".xx....", "....xx.", "xx.....", ".xxxxx."],
    "valid, holes": ["xx.xx.x", "x.x.x.x", ".xx..xx", "x......"],
    "valid, burn-in": [".....xxxxxxxxxxxx"] * 2,
    "valid, nothing": ["....", "...."],
    "valid, all": ["xxxxxxxxx"] * 3,
    "valid, one step": ["x", ".", "x"],
    "valid, one row": ["xx.xxx...x"],
    "valid, several runs": ["x" * 19 + "." + "x" * 20, "." * 20 + "x" * 20, "xx." * 13 + "x"],
    "valid, many": [f"{n * 2654435761 % 2**5:05b}".replace("0", ".").replace("1", "x") for n in range(20)],
}
by_both = pytest.mark.parametrize("steps", ["lengths, some", "valid, holes"])
# Triton's interpreter takes seconds a case of marks.
SLOW = ["valid, holes", "valid, several runs"]
by_steps = pytest.mark.parametrize("steps", [x for x in STEPS if not (INTERPRETED and x[:5] == "valid") or x in SLOW])


def marks(steps: str, device: str = "cpu") -> Tensor:
    """Return the steps that count as a mask, `(batch, time)`."""
    return torch.tensor([[c == "x" for c in row] for row in STEPS[steps]], device=device)


def given(steps: str, device: str = "cpu") -> dict[str, Any]:
    """Return the argument that says which steps count."""
    valid = marks(steps, device)
    return {"lengths": valid.sum(1)} if steps.startswith("lengths") else {"valid": valid}


def leaves(valid: Tensor, hidden: int = 12) -> list[Tensor]:
    """Return two `(batch, time, hidden)` tensors, with NaN and infinity where steps do not count."""
    xs = (torch.randn(*valid.shape, hidden, device=valid.device) for _ in range(2))
    return [spoil(x, valid=valid).requires_grad_() for x in xs]


@pytest.mark.parametrize("way", ["two tensors", "one tensor", "time first"])
@by_steps
def test_penalty(steps: str, way: str, device: str, poison: None) -> None:
    raw, dropped = leaves(marks(steps, device))
    if way == "time first":
        raw, dropped = (x.detach().transpose(0, 1).contiguous().requires_grad_() for x in (raw, dropped))
    options = {"batch_first": way != "time first", **given(steps, device)}
    check_penalty(raw, raw if way == "one tensor" else dropped, ALPHA, BETA, **options)


@pytest.mark.parametrize("full", [False, True])
@by_steps
def test_dropout(steps: str, full: bool, device: str, poison: None) -> None:
    raw, _ = leaves(marks(steps, device))
    mask = (torch.rand(len(raw), raw.shape[1] if full else 1, 12, device=device) > 0.5).float() * 2
    check_dropout(raw, mask, ALPHA, BETA, **given(steps, device))


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_the_formula_is_a_sum_over_the_sequences(steps: str, starts: bool) -> None:
    """All other tests compare with this formula."""
    raw, dropped = torch.randn(2, *marks(steps).shape, 3)
    begins = (torch.rand(marks(steps).shape) < 0.3) & starts
    options = given(steps) | ({"starts": begins} if starts else {})
    squares = [d[counts].square().sum() for d, counts in zip(dropped, marks(steps), strict=True)]
    into = zip(raw, marks(steps), ~begins, strict=True)
    pairs = [(r[1:] - r[:-1])[counts[1:] & counts[:-1] & goes_on[1:]] for r, counts, goes_on in into]
    ar, tar = sum(squares), sum(x.square().sum() for x in pairs)
    torch.testing.assert_close([*truth(raw, dropped, 2, 3, "sum", **options)], [2 * ar + 3 * tar, ar, tar])
    counts = max(3 * int(marks(steps).sum()), 1), max(sum(x.numel() for x in pairs), 1)
    _, *means = truth(raw, dropped, 2, 3, **options)
    torch.testing.assert_close(means, [ar / counts[0], tar / counts[1]])


def test_more_sequences_than_are_added_at_once(device: str) -> None:
    raw, dropped = (torch.randn(1100, 3, 1, device=device, requires_grad=True) for _ in range(2))
    check_penalty(raw, dropped, ALPHA, BETA, lengths=torch.arange(1100, device=device) % 4)


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


@by_both
def test_steps_made_in_inference_mode(steps: str, device: str) -> None:
    with torch.inference_mode():
        made = given(steps, device)
    raw, _ = leaves(marks(steps, device))
    got, want = (fused_ar_tar(raw, raw, ALPHA, BETA, **options) for options in (made, given(steps)))
    assert torch.equal(*(torch.autograd.grad(x, raw)[0] for x in (got, want)))


@pytest.mark.parametrize("padded", [True, False])
def test_an_infinite_mask_is_no_part_of_tar(padded: bool, device: str) -> None:
    raw = torch.randn(2, 4, 3, device=device, requires_grad=True)
    options: Any = {"lengths": torch.tensor([3, 1])} if padded else {}
    mask = torch.full((2, 1, 3), torch.inf, device=device)
    _, got = fused_dropout_ar_tar(raw, 0.5, 0, BETA, mask=mask, **options)
    (want,) = torch.autograd.grad(fused_ar_tar(raw, None, 0, BETA, **options), raw)
    torch.testing.assert_close(*torch.autograd.grad(got, raw), want)


def pack(x: Tensor, lengths: Tensor, sort: bool) -> PackedSequence:
    if sort:
        order = lengths.argsort(descending=True)
        x, lengths = x[order], lengths[order]
    return pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=sort)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("steps", ["lengths, several runs", "lengths, full", "lengths, one row"])
@pytest.mark.parametrize("hidden", [12] if INTERPRETED else [1, 12, 3000])
def test_packed(hidden: int, steps: str, same: bool, device: str, poison: None) -> None:
    lengths, count = given(steps, device)["lengths"], 1 if same else 2
    padded = [torch.randn(*marks(steps).shape, hidden, device=device, requires_grad=True) for _ in range(count)]
    packed: list[Any] = [pack(x, lengths, sort=same) for x in padded]
    for scale in (1, 100, 100):
        got = fused_ar_tar(packed[0], packed[-1], ALPHA, BETA, return_terms=True)
        want = fused_ar_tar(padded[0], padded[-1], ALPHA, BETA, return_terms=True, lengths=lengths)
        torch.testing.assert_close([*got], [*want])
        gradients = (torch.autograd.grad(x.penalty * scale, padded, retain_graph=True) for x in (got, want))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("byte", [2, 255])
@pytest.mark.parametrize("fused", [False, True])
def test_any_byte_but_0_is_true(byte: int, fused: bool, device: str) -> None:
    """A view of integers as bool has such bytes, and so has memory of other libraries."""
    masks = torch.rand(2, 5, 9, device=device) < torch.tensor([0.7, 0.2], device=device).view(2, 1, 1)
    x = torch.randn(5, 9, 12, device=device, requires_grad=True)

    def call(valid: Tensor, starts: Tensor) -> list[Tensor]:
        options: Any = {"valid": valid, "starts": starts, "return_terms": True}
        if fused:
            _, got = fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, mask=torch.ones_like(x), **options)
        else:
            got = fused_ar_tar(x, x, ALPHA, BETA, **options)
        return [*got, *torch.autograd.grad(got.penalty, x)]

    others = (masks.to(torch.uint8) * byte).view(torch.bool)
    torch.testing.assert_close(call(*others), call(*masks), rtol=0, atol=0)
