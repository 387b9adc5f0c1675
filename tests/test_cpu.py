"""CPU tensors in all: memory, and the error of large sums."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.backends import CPP
from tests.conftest import CPU
from tests.samples import BF16, FLOAT

pytestmark = pytest.mark.skipif(
    CPU is not CPP or CPP is None, reason="the C++ kernels do not take the CPU tensors here"
)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(32, 70, 1152), (500, 5000, 1), (2, 3, 2**19)])
def test_nothing_is_allocated_beyond_the_results(
    shape: tuple[int, ...], padded: bool, dtype: torch.dtype, dropout: bool
) -> None:
    """Gradients, dropped and its mask, and a few numbers a sequence."""
    lengths = torch.arange(shape[0]) * 5 % shape[1] + 1 if padded else None
    raw, dropped = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        if dropout:
            dropped, penalty = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, lengths=lengths)
            results = [dropped, *torch.autograd.grad(penalty, raw)]
        else:
            results = [*torch.autograd.grad(fused_ar_tar(raw, dropped, 2.0, 1.0, lengths=lengths), (raw, dropped))]
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in record.events())
    needed = sum(x.nbytes for x in results) + (shape[0] * shape[2] * raw.itemsize if dropout else 0)
    assert needed <= allocated <= needed + 8 * shape[0] + 4096


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
