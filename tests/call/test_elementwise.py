"""Elementwise dropout: its masks, bit by bit and by their statistics, and the call that draws them."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastreg import FusedDropout, FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.key import PLANS
from tests.conftest import BF16, DOUBLE, FLOAT, HALF, skip_on_formula
from tests.exact import MASK32, drawn_number, philox


def reference(seed: int, shape: tuple[int, ...], time_dim: int, threshold: int) -> Tensor:
    """Return which elements of a tensor are kept."""
    lanes, time = math.prod(shape) // shape[time_dim], shape[time_dim]
    rows = [[drawn_number(seed, lane, step) >= threshold for step in range(time)] for lane in range(lanes)]
    others = [n for i, n in enumerate(shape) if i != time_dim]
    return torch.tensor(rows).view(*others, time).movedim(-1, time_dim)


def seed_of_next(device: str) -> int:
    """Return the seed that the next call on a device draws, without drawing it."""
    with torch.random.fork_rng():
        return int(torch.empty((), dtype=torch.int64, device=device).random_())


def kept_of(like: Tensor, p: float = 0.4, **options: Any) -> Tensor:
    """Return which elements a call keeps."""
    with torch.no_grad():
        return fused_dropout_ar_tar(torch.ones_like(like), p, 2.0, 1.0, locked=False, **options)[0] != 0


def check_call(raw: Tensor, p: float, upstream: Tensor, **options: Any) -> None:
    """Check a call and its gradient against the call with its mask, which a call on ones with the same seed shows."""
    results = []
    torch.manual_seed(7)
    mask, _ = fused_dropout_ar_tar(torch.ones_like(raw), p, 2.0, 1.0, locked=False, **options)
    for own in ({"locked": False}, {"mask": mask.detach()}):
        torch.manual_seed(7)
        leaf = raw.detach().requires_grad_()
        dropped, penalty = fused_dropout_ar_tar(leaf, p, 2.0, 1.0, **own, **options)
        (gradient,) = torch.autograd.grad([dropped, penalty], leaf, [upstream, penalty.new_tensor(3.0)])
        results.append((dropped, penalty, gradient))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([MASK32] * 4, [MASK32] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_the_reference_gives_the_answers_of_random123(counter: list[int], key: list[int], words: str) -> None:
    assert philox(counter, key, 7) == [int(word, 16) for word in words.split()]


# Numbers: also interpreted, and executed as compiled


@pytest.mark.numbers
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize(
    ("shape", "time_dim"), [((3, 21, 40), 1), ((2, 9, 7), 1), ((5, 2, 33), 0), ((2, 3, 4), 2), ((1, 70, 16), 1)]
)
def test_masks_are_those_of_the_reference(
    shape: tuple[int, ...], time_dim: int, dtype: torch.dtype, device: str
) -> None:
    skip_on_formula(device)
    for p in (0.4, 0.9):
        want = reference(seed_of_next(device), shape, time_dim, round(65536 * p))
        assert torch.equal(kept_of(torch.empty(shape, dtype=dtype, device=device), p, time_dim=time_dim).cpu(), want)


@pytest.mark.numbers
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_forward_and_backward_are_those_of_the_call_with_its_mask(dtype: torch.dtype, device: str) -> None:
    for shape, options in (
        ((3, 21, 40), {}),
        ((2, 19, 6), {"lengths": torch.tensor([19, 4])}),
        ((10, 3, 24), {"batch_first": False, "lengths": torch.tensor([10, 4, 0])}),
        ((10, 3, 5), {"time_dim": -1, "valid": torch.rand(10, 5) < 0.7}),
    ):
        raw, upstream = torch.randn(2, *shape, dtype=dtype, device=device).unbind()
        check_call(raw, 0.25, upstream, **options)
        for axis in (1, -1):
            check_call(raw, 0.5, upstream.transpose(0, axis).contiguous().transpose(0, axis), **options)


@pytest.mark.numbers
@pytest.mark.parametrize("shape", [(2, 140, 40), (1, 80, 1030)])
def test_stretches_and_blocks_do_not_repeat_a_mask(shape: tuple[int, ...], device: str) -> None:
    skip_on_formula(device)
    want = reference(seed_of_next(device), shape, 1, 32768)
    assert torch.equal(kept_of(torch.empty(shape, device=device), 0.5).cpu(), want)


# Layouts


@pytest.mark.parametrize("time_dim", [0, 1, 2, -1])
def test_a_mask_does_not_depend_on_strides(time_dim: int) -> None:
    skip_on_formula("cpu")
    shape = (6, 17, 24)
    state = torch.get_rng_state()
    want = kept_of(torch.empty(shape), time_dim=time_dim)
    for order in permutations(range(3)):
        like = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(3)])
        torch.set_rng_state(state)
        assert torch.equal(kept_of(like, time_dim=time_dim), want)
        check_call(torch.randn_like(like), 0.3, torch.randn(shape), time_dim=time_dim)
    five = torch.empty(2, 4, 3, 5, 6)
    torch.set_rng_state(state)
    want = kept_of(five, time_dim=2)
    torch.set_rng_state(state)
    assert torch.equal(kept_of(five.to(memory_format=torch.channels_last_3d), time_dim=2), want)


def test_a_hit_draws_what_a_miss_draws_and_a_schedule_of_p_makes_no_plan() -> None:
    skip_on_formula("cpu")
    state, like = torch.get_rng_state(), torch.empty(4, 9, 8)
    masks = []
    for p in (0.5, 0.5, 0.25):
        torch.set_rng_state(state)
        masks.append(kept_of(like, p))
    assert torch.equal(masks[0], masks[1])
    assert (masks[2] | ~masks[0]).all()  # the same numbers, and a lower threshold
    assert len(PLANS) == 1
    assert not torch.equal(kept_of(like), kept_of(like))


# Values


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, BF16, HALF], ids=str)
def test_what_is_kept_is_scaled_by_the_rounded_probability(dtype: torch.dtype) -> None:
    skip_on_formula("cpu")
    ones = torch.ones(4, 64, 64, dtype=dtype)
    for p, n in ((0.3, 19661), (1e-6, 0), (0.9, 58982), (1 - 2**-10, 65472)):
        dropped, _ = fused_dropout_ar_tar(ones, p, 0.0, 0.0, locked=False)
        scale = torch.tensor(65536 / (65536 - n), dtype=DOUBLE).to(dtype)
        assert set(dropped.unique().tolist()) == ({0.0, scale.item()} if n else {1.0})


def test_at_most_65535_of_65536_elements_are_dropped() -> None:
    skip_on_formula("cpu")
    dropped, _ = fused_dropout_ar_tar(torch.ones(16, 256, 256), 1 - 1e-9, 0.0, 0.0, locked=False)
    assert set(dropped.unique().tolist()) == {0.0, 65536.0}


@pytest.mark.numbers
def test_an_element_whose_number_is_the_threshold_is_kept(device: str) -> None:
    skip_on_formula(device)
    seed, shape = seed_of_next(device), (2, 16, 8)
    numbers = {drawn_number(seed, lane, step) for lane in range(16) for step in range(16)}
    edge = sorted(numbers)[len(numbers) // 2]
    for n in (edge, edge + 1):
        torch.manual_seed(0)  # as the test began
        assert torch.equal(kept_of(torch.empty(shape, device=device), n / 65536).cpu(), reference(seed, shape, 1, n))


@pytest.mark.numbers
@pytest.mark.parametrize("seed", [5, 2**40 + 5, 2**63 - 1])
def test_both_halves_of_a_seed_count(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_on_formula(device)
    monkeypatch.setattr(torch.Tensor, "random_", lambda its: its.fill_(seed))
    like = torch.empty(1, 16, 8, device=device)
    assert torch.equal(kept_of(like).cpu(), reference(seed, (1, 16, 8), 1, 26214))


def test_statistics_are_those_of_independent_elements() -> None:
    kept = torch.stack([kept_of(torch.empty(64, 128, 96), 0.3) for _ in range(4)]).double()
    deviation = math.sqrt(0.3 * 0.7)
    z = (kept - 0.7) / deviation
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    for axis in range(4):  # seeds, sequences, steps, units
        for lag in (1, 2, 3, 8):
            if lag < z.shape[axis]:
                n = z.shape[axis] - lag
                product = z.narrow(axis, 0, n) * z.narrow(axis, lag, n)
                assert abs(product.mean()) < 5 / math.sqrt(product.numel())
    bits = kept.long().unflatten(2, (-1, 8))
    patterns = (bits << torch.arange(8)[:, None]).sum(3).flatten()
    ones = torch.tensor([bin(i).count("1") for i in range(256)])
    expected = patterns.numel() * 0.7**ones * 0.3 ** (8 - ones)
    chi = ((torch.bincount(patterns, minlength=256) - expected) ** 2 / expected).sum()
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


# Generators, derivatives and compilers


def test_the_default_generator_decides_and_a_fork_keeps_it() -> None:
    like = torch.empty(2, 5, 8)
    torch.manual_seed(3)
    first, second = kept_of(like), kept_of(like)
    torch.manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        assert torch.equal(kept_of(like), first)
    assert torch.equal(kept_of(like), first)
    assert torch.equal(kept_of(like), second)


def test_second_derivatives_see_the_mask_of_the_forward() -> None:
    def penalty(raw: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return fused_dropout_ar_tar(raw, 0.5, 1.0, 2.0, locked=False)

    raw = torch.randn(2, 5, 3, dtype=DOUBLE, requires_grad=True)
    once, again = (
        torch.autograd.grad(sum(penalty(raw)[1:], penalty(raw)[0].sin().sum()), raw, create_graph=x)
        for x in (False, True)
    )
    torch.testing.assert_close(once, again)
    assert torch.autograd.gradcheck(penalty, raw)
    assert torch.autograd.gradgradcheck(penalty, raw)


@pytest.mark.parametrize("around", [None, torch.autograd.graph.save_on_cpu])
def test_hooks_on_saved_tensors_keep_the_mask(around: Any) -> None:
    skip_on_formula("cpu")
    raw, state = torch.randn(3, 9, 8, requires_grad=True), torch.get_rng_state()
    hooks = around() if around else torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone())
    with hooks:
        dropped, penalty = fused_dropout_ar_tar(raw.transpose(0, 2), 0.4, 2.0, 1.0, locked=False)
    (got,) = torch.autograd.grad(dropped.sum() + penalty, raw)
    torch.set_rng_state(state)
    dropped, penalty = fused_dropout_ar_tar(raw.transpose(0, 2), 0.4, 2.0, 1.0, locked=False)
    torch.testing.assert_close(got, torch.autograd.grad(dropped.sum() + penalty, raw)[0])


@pytest.mark.parametrize("kind", [FusedDropout, FusedRNNDropout])
@pytest.mark.parametrize(("axes", "copies"), [((0, 1), 0), ((0, 2), 1)])
def test_only_a_gradient_without_a_contiguous_axis_is_copied(kind: Any, axes: Any, copies: int, device: str) -> None:
    """The raw of an nn.LSTM is time first in memory, and the gradient of the layer behind it batch first."""
    skip_on_formula(device)
    raw, upstream = torch.randn(2, 9, 4, 24, device=device).unbind()
    dropped = kind(0.4, 2.0, 1.0)(raw.transpose(0, 1).requires_grad_())
    upstream = upstream.view(4, 9, 24) if axes == (0, 1) else upstream.view(24, 9, 4).transpose(*axes)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        dropped.backward(upstream)
    assert sum(event.name == "aten::copy_" for event in record.events()) == copies


def test_a_node_saves_raw_and_a_seed() -> None:
    skip_on_formula("cpu")
    raw, saved = torch.randn(3, 9, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused_dropout_ar_tar(raw, 0.4, 2.0, 1.0, locked=False)
    assert [(x.shape, x.dtype) for x in saved] == [(raw.shape, FLOAT), ((), torch.int64)]


def test_compiled_a_call_is_dropout_and_the_formula() -> None:
    raw = torch.randn(3, 9, 8, requires_grad=True)
    call = torch.compile(lambda x: fused_dropout_ar_tar(x, 0.4, 2.0, 1.0, locked=False), backend="aot_eager")
    dropped, penalty = call(raw)
    torch.testing.assert_close(penalty, fused_ar_tar(raw, dropped, 2.0, 1.0))
    assert 0 < (dropped == 0).sum() < dropped.numel()


# Arguments and the module


def test_locked_is_a_flag_and_a_mask_is_one_of_variational_dropout() -> None:
    raw, mask = torch.ones(2, 3, 4), torch.ones(2, 1, 4)
    with pytest.raises(ValueError, match="locked and mask: expected locked=False without a mask"):
        fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, locked=False, mask=mask)
    with pytest.raises(TypeError, match="locked: expected True or False, got 'no'"):
        fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, locked="no")  # pyright: ignore[reportArgumentType, reportCallIssue]
    dropped, penalty = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, locked=True, mask=mask)
    torch.testing.assert_close(penalty, fused_ar_tar(raw, dropped, 2.0, 1.0))


@pytest.mark.parametrize("options", [{"training": False}, {"p": 0.0}])
def test_nothing_is_dropped_in_evaluation_or_with_p_of_0(options: Any) -> None:
    raw = torch.randn(2, 3, 4)
    dropped, terms = fused_dropout_ar_tar(
        raw, **{"p": 0.5, **options}, alpha=2.0, beta=1.0, locked=False, return_terms=True, reduction="sum"
    )
    assert dropped is raw
    torch.testing.assert_close(terms.ar, raw.square().sum())


def test_a_module_drops_elements_and_is_no_variational_dropout() -> None:
    dropout, raw = FusedDropout(0.4, 2.0, 1.0, batch_first=False), torch.randn(9, 3, 8)
    assert not isinstance(dropout, FusedRNNDropout)
    assert not issubclass(FusedRNNDropout, FusedDropout)
    dropped, terms = dropout(raw), dropout.take()
    assert terms is not None
    torch.testing.assert_close(terms.penalty, fused_ar_tar(raw, dropped, 2.0, 1.0, batch_first=False))
    per_unit = (dropped == 0).sum(0)
    assert ((per_unit > 0) & (per_unit < 9)).any()
    assert dropout.eval()(raw) is raw
