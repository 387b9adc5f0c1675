"""The Triton kernels as they run: launches, the shared sum, streams, and sizes that stretch the indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import fused_ar_tar
from fastreg.kernels.view import Operand, Operands, View
from tests.conftest import INTERPRETED, gpu, interpreted, skip_without
from tests.exact import check_dropout, check_penalty, drawn_number, truth

skip_without("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fastreg.kernels import launch, reduction, tiling  # noqa: E402
from fastreg.kernels.draws import draw_of, drawn_row, words_of  # noqa: E402
from fastreg.kernels.rows import Tile  # noqa: E402

pytestmark = pytest.mark.numbers


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def leaves(device: str, *shape: int) -> tuple[Tensor, Tensor]:
    raw, dropped = torch.randn(2, *shape, device=device).unbind()
    return raw.requires_grad_(), dropped.requires_grad_()


@pytest.mark.parametrize("same", [True, False])
def test_a_call_takes_one_launch_forward_and_one_backward(
    same: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    call = launch.Launch.__call__
    monkeypatch.setattr(launch.Launch, "__call__", lambda its, *values: launched.append(its) or call(its, *values))
    raw, dropped = leaves(device, 2, 33, 4)
    options: Any = {"lengths": torch.tensor([33, 20]), "starts": torch.ones(2, 33, dtype=torch.bool)}
    for layers, steps, counts in ((1, {}, (1, 1)), (1, options, (2, 1)), (3, {}, (3, 3)), (3, options, (4, 3))):
        for _ in range(2):  # the second call finds the plan of the first
            got = fused_ar_tar([raw] * layers, [raw if same else dropped] * layers, 2.0, 1.0, **steps)
            forward = len(launched)
            got.backward()
            assert (forward, len(launched) - forward) == counts
            launched.clear()


@pytest.mark.parametrize(("setting", "value"), [("PROGRAMS", 2), ("PROGRAMS", 5), ("LARGE", 0)])
def test_few_programs_share_the_items_and_indices_have_64_bits(
    setting: str, value: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, setting, value)
    check_penalty(*leaves(device, 4, 3, 400), batch_first=False)
    check_penalty(*leaves(device, 5, 1, 1), batch_first=False)
    raw, dropped = leaves(device, 2, 40, 600)
    check_penalty(raw, dropped)
    check_dropout(raw, dropped.detach())


def test_more_partial_sums_than_are_loaded_at_once_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "SHORT_STRETCH", tiling.UNROLL)
    if INTERPRETED:
        monkeypatch.setattr(reduction, "CHUNK", type(reduction.CHUNK)(16))
    time = tiling.UNROLL * (reduction.CHUNK.value + 3)
    check_penalty(*leaves(device, 1, time, 1))


def test_stretches_are_shorter_where_programs_are_few(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = [], []
    for longest in (16, 4):
        monkeypatch.setattr(tiling, "SHORT_STRETCH", longest)
        for items, (outer, time, hidden) in ((few, (64, 70, 400)), (many, (128, 512, 1024))):
            operands = Operands(*[Operand(torch.bfloat16, time * hidden, hidden)] * 4)
            items.append(tiling.Tiling(View(outer, time, hidden, operands), torch.float32).numbers[-1])
    assert few[1] > 2 * few[0]
    assert many[1] == many[0]
    check_penalty(*leaves(device, 2, 33, 4))


def test_sums_over_long_times_do_not_drift(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal numbers are the worst case, because every rounding goes the same way."""
    monkeypatch.setattr(tiling, "PROGRAMS", 1)
    raw = torch.full((1, 1024, 1), 0.1, device=device)
    raw[:, ::2] *= -1
    got = fused_ar_tar(raw, raw, 1.0, 1.0, return_terms=True)
    want = truth(raw.double(), raw.double(), 1.0, 1.0)
    torch.testing.assert_close([x.double() for x in got], list(want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("launches", [0, 1, 2])
def test_a_launch_leaves_its_ticket_as_it_was(launches: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier launches may have drawn all their numbers from it."""
    ticket, begins = torch.zeros(1, dtype=torch.int32, device=device), []

    def draw(_: launch.Launch, __: int | None, programs: int) -> Tensor:
        begins.append(launches * programs)
        return ticket.fill_(launches * programs)

    monkeypatch.setattr(launch.Launch, "ticket", draw)
    for _ in range(2):
        check_penalty(*leaves(device, 2, 33, 4))
        assert ticket == begins[-1]


@triton.jit
def draw_far(seed, to):
    unit = tl.arange(0, 32)
    tile = Tile(tl.full((32,), 65536, tl.int64), unit + 1, unit >= 0, 0, 8)  # of sequences of 65536 lanes
    draw = draw_of(seed, 32768, tl.float32, tl.float32)
    tl.store(to + unit, drawn_row(draw, words_of(draw, tile, 65536, 0, 1), 3))


def test_lanes_have_64_bits(device: str) -> None:
    found = torch.empty(32, device=device)
    draw_far[(1,)](torch.tensor(5, device=device), found)
    want = [drawn_number(5, 2**32 + 1 + lane, 3) >= 32768 for lane in range(32)]
    assert torch.equal(found.cpu() != 0, torch.tensor(want))
