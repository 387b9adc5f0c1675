"""Steps that count: lengths, marks and packed sequences, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import INTERPRETED, skip_on_formula, skip_without
from tests.exact import check_dropout, check_penalty, spoil, truth
from tests.samples import FLOAT

ALPHA, BETA = 2.0, 3.0


def front(time: int, *lengths: int) -> list[str]:
    return ["x" * n + "." * (time - n) for n in lengths]


STEPS: dict[str, list[str]] = {  # given as lengths, or as marks; a row a sequence, x for each step that counts
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
BOTH = ["lengths, some", "valid, holes"]  # for tests that need not look at every pattern
by_both = pytest.mark.parametrize("steps", BOTH)
# Triton's interpreter takes seconds a case of marks.
SLOW = ["valid, holes", "valid, several runs"]
by_steps = pytest.mark.parametrize("steps", [x for x in STEPS if not (INTERPRETED and x[:5] == "valid") or x in SLOW])


def marks(steps: str, device: str = "cpu") -> Tensor:
    """`(batch, time)`: the steps that count."""
    return torch.tensor([[c == "x" for c in row] for row in STEPS[steps]], device=device)


def given(steps: str, device: str = "cpu") -> dict[str, Any]:
    """The argument that says which steps count."""
    valid = marks(steps, device)
    return {"lengths": valid.sum(1)} if steps.startswith("lengths") else {"valid": valid}


def activations(valid: Tensor, *dtypes: torch.dtype, hidden: int = 12) -> list[Tensor]:
    """`(batch, time, hidden)` tensors, with NaN and inf where steps do not count."""
    return [spoil(torch.randn(*valid.shape, hidden, device=valid.device).to(x), valid=valid) for x in dtypes]


def leaves(valid: Tensor) -> list[Tensor]:
    return [x.requires_grad_() for x in activations(valid, FLOAT, FLOAT)]


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
    """The one that all results are compared with."""
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
    """A step that does not count has a gradient of 0 anyway."""
    valid = marks(steps, device)
    raw, dropped = leaves(valid)
    alone = raw.detach().nan_to_num(7.0, 7.0).requires_grad_()
    if create_graph:  # where the formula reads all
        raw, dropped = (x.detach().nan_to_num(7.0, 7.0).requires_grad_() for x in (raw, dropped))
    mask = torch.full((len(valid), 1, 12), 2.0, device=device)
    penalty = fused_ar_tar(raw, dropped, ALPHA, BETA, **given(steps, device))
    _, other = fused_dropout_ar_tar(alone, 0.5, ALPHA, BETA, mask=mask, **given(steps, device))
    for x in torch.autograd.grad((penalty + other) * upstream, (raw, dropped, alone), create_graph=create_graph):
        assert (x[~valid] == 0).all()
        assert not x[valid].isfinite().all()
        assert not x[0, 0].isfinite().any()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_large_upstream_gradients_are_divided_first(dropout: bool, create_graph: bool, device: str) -> None:
    """1e38 times `2 * alpha` is more than float32 holds; over the count of elements it is not."""
    x = torch.full((2, 5, 8), 1e-30, device=device, requires_grad=True)
    grad = torch.tensor(1e38, device=device)
    gradients = []
    for lengths in (None, torch.tensor([5, 5])):
        if dropout:
            _, penalty = fused_dropout_ar_tar(x, 0.5, 40.0, 40.0, mask=torch.ones_like(x[:, :1]), lengths=lengths)
        else:
            penalty = fused_ar_tar(x, x, 40.0, 40.0, lengths=lengths)
        gradients += torch.autograd.grad(penalty, x, grad, create_graph=create_graph)
    torch.testing.assert_close(gradients[0], torch.full_like(x, 1e38 * (1e-30 * (80 / 80))))
    torch.testing.assert_close(gradients[1], gradients[0])


@by_both
def test_steps_changed_before_the_backward(steps: str, device: str) -> None:
    """A backward reads the steps that the forward read."""
    skip_on_formula(device)
    raw, _ = leaves(marks(steps, device))
    ((name, argument),) = given(steps, device).items()
    for x in (argument.clone(), argument.long()):
        penalty = fused_ar_tar(raw, raw, ALPHA, BETA, **{name: x})
        (want,) = torch.autograd.grad(penalty * 5, raw, retain_graph=True)
        x.zero_()
        assert torch.equal(*torch.autograd.grad(penalty * 5, raw), want)


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


def test_batch_sizes_that_change_in_shared_memory(device: str) -> None:
    """NumPy's writes raise no version: the checked values count."""
    skip_without("numpy")
    import numpy

    sizes = numpy.array([3, 2, 1])
    rows = torch.randn(6, 4, device=device, requires_grad=True)
    packed = PackedSequence(rows, torch.from_numpy(sizes))
    (want,) = torch.autograd.grad(fused_ar_tar(packed, None, 0.0, 1.0), rows, torch.tensor(5.0, device=device))
    torch.autograd.grad(fused_ar_tar(packed, None, 0.0, 1.0), rows, torch.tensor(7.0, device=device))
    got = fused_ar_tar(packed, None, 0.0, 1.0)  # expects 7, so that the backward reads the sizes
    sizes[:] = 10**8
    (gradient,) = torch.autograd.grad(got, rows, torch.tensor(5.0, device=device))
    assert torch.equal(gradient, want)


@pytest.mark.parametrize("byte", [2, 255])
@pytest.mark.parametrize("by_start", [False, True], ids=["valid alone", "with starts"])
@pytest.mark.parametrize("fused", [False, True])
def test_any_byte_but_0_is_true(byte: int, by_start: bool, fused: bool, device: str) -> None:
    """A view of integers as bool, and memory from other libraries, have other bytes than 1."""
    valid, starts = torch.rand(2, 5, 9, device=device) < torch.tensor([0.7, 0.2], device=device).view(2, 1, 1)
    x = torch.randn(5, 9, 12, device=device, requires_grad=True)

    def call(*given: Tensor) -> list[Tensor]:
        options: dict[str, Any] = dict(zip(("valid", "starts"), given, strict=False))
        if fused:
            _, got = fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, mask=torch.ones_like(x), return_terms=True, **options)
        else:
            got = fused_ar_tar(x, x, ALPHA, BETA, return_terms=True, **options)
        return [*got, *torch.autograd.grad(got.penalty, x)]

    masks = (valid, starts)[: 1 + by_start]
    others = [(mask.to(torch.uint8) * byte).view(torch.bool) for mask in masks]
    for got, want in zip(call(*others), call(*masks), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
