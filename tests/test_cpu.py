"""The blocked path: accuracy, the size of what it allocates, and the places where blocks meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastreg import cpu, fused_ar_tar, fused_dropout_ar_tar
from fastreg.problem import Layer, Problem
from fastreg.reference import ar_tar
from tests.conftest import KERNELS_ON_CPU
from tests.samples import BF16, FLOAT

pytestmark = pytest.mark.skipif(KERNELS_ON_CPU, reason="TRITON_INTERPRET=1 is set: the kernels take the CPU tensors")


def some_lengths(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(shape[0]) * 5 % shape[1] + 1


@pytest.mark.parametrize("block", [1, 7, 64, 500])
@pytest.mark.parametrize("shape", [(3, 7, 12), (1, 90, 5), (2, 1, 9), (40, 3, 1)])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_of_any_size_meet(
    block: int, shape: tuple[int, ...], same: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", block)
    lengths = some_lengths(shape) if padded else None
    for dtype in (FLOAT, BF16):
        xs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(1 if same else 2)]
        ys = [x.detach().double().requires_grad_() for x in xs]
        got = fused_ar_tar(xs[0], xs[-1], 2.0, 1.0, lengths=lengths)
        want = ar_tar(Layer(ys[0], ys[-1], lengths), Problem(2.0, 1.0)).penalty
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        for x, y in zip(torch.autograd.grad(got, xs), torch.autograd.grad(want, ys), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=torch.finfo(dtype).eps, atol=1e-6 * y.abs().max().item())


@pytest.mark.parametrize("block", [1, 7, 64, 500])
@pytest.mark.parametrize("shape", [(3, 7, 12), (1, 90, 5), (2, 1, 9), (40, 3, 1)])
@pytest.mark.parametrize("full", [False, True], ids=["locked", "full"])
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_of_any_size_meet_in_dropout(
    block: int, shape: tuple[int, ...], full: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", block)
    lengths = some_lengths(shape) if padded else None
    for dtype in (FLOAT, BF16):
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = x.detach().double().requires_grad_()
        mask = torch.rand(shape if full else (shape[0], 1, shape[2])).to(dtype)
        dropped, got = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, mask=mask, lengths=lengths)
        product = y * mask
        rounded = dropped.detach().double() + product - product.detach()
        want = ar_tar(Layer(y, rounded, lengths), Problem(2.0, 1.0)).penalty
        torch.testing.assert_close(dropped.double(), product, rtol=torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        direction = torch.randn(shape).to(dtype)
        # The penalty alone, too: beside the other gradient its own hardly counts.
        for slope in (direction, torch.zeros(shape, dtype=dtype)):
            (grad,) = torch.autograd.grad([dropped, got], x, [slope, torch.tensor(1.0)], retain_graph=True)
            (true,) = torch.autograd.grad(
                [product, want], y, [slope.double(), torch.tensor(1.0, dtype=y.dtype)], retain_graph=True
            )
            torch.testing.assert_close(
                grad.double(), true, rtol=torch.finfo(dtype).eps, atol=1e-6 * true.abs().max().item()
            )


class Allocations(TorchDispatchMode):
    """Notes the bytes of each storage that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                at = x.untyped_storage().data_ptr()
                self.sizes[at] = max(x.untyped_storage().nbytes(), self.sizes.get(at, 0))
        return result


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize(("shape", "block"), [((32, 70, 1152), cpu.BLOCK), ((2, 3, 5000), 500)])
def test_no_temporary_is_as_large_as_the_input(
    shape: tuple[int, ...], block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", block)
    monkeypatch.setattr(cpu, "_idle", cpu.Idle())
    made: list[Allocations] = []

    def watched(call: Any) -> Any:
        def run(*arguments: Any) -> Any:
            with Allocations() as allocations:
                made.append(allocations)
                return call(*arguments)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, watched(getattr(cpu, name)))
    raw, dropped = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    grads = torch.autograd.grad(fused_ar_tar(raw, dropped, 2.0, 1.0), (raw, dropped))
    assert len(made) == 2
    given = {x.untyped_storage().data_ptr() for x in (raw, dropped, *grads)}
    sizes = [size for allocations in made for at, size in allocations.sizes.items() if at not in given]
    assert max(sizes) <= 4 * 3 * block  # of float32, with a row before and one after where a block is one row
    assert max(sizes) < raw.nbytes


def test_a_thread_keeps_its_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever mode it was made in, and whoever asked for it: no more than one call needs."""
    monkeypatch.setattr(cpu, "_idle", cpu.Idle())
    kept: list[set[int]] = []
    for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad, *[torch.enable_grad] * 12):
        for dtype in (BF16, FLOAT):
            x = torch.randn(3, 7, 12).to(dtype).requires_grad_()
            with mode():
                dropped, penalty = fused_dropout_ar_tar(x, 0.5, 2.0, 1.0, lengths=torch.tensor([7, 2, 0]))
                assert penalty.isfinite()
            if penalty.requires_grad:
                (dropped.sum() + penalty).backward()
            del dropped, penalty
        kept.append({x.data_ptr() for x in cpu._idle.memory})
    assert kept[-1] == kept[-2]
    assert 0 < len(kept[-1]) <= 8
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: cpu._idle.memory).result() == []


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "constant", "heavy"])
def test_error_of_a_large_sum(dtype: torch.dtype, kind: str) -> None:
    """16.8 million elements, within 2e-6."""
    x = torch.randn(64, 256, 1024, generator=torch.Generator().manual_seed(0))
    x = {"normal": x, "constant": torch.full_like(x, 0.1), "heavy": x**3}[kind].to(dtype)
    got = fused_ar_tar(x, x, 1.0, 1.0, return_terms=True)
    for name, value, true in (
        ("ar", got.ar, sum(part.double().square().sum() for part in x) / x.numel()),
        ("tar", got.tar, sum(part.double().diff(dim=0).square().sum() for part in x) / (64 * 255 * 1024)),
    ):
        assert abs(value.double() - true) <= 2e-6 * true, name
