"""CPU tensors in all: memory, and the error of large sums."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.backends import CPP
from fastreg.kernels import cpu
from fastreg.kernels.view import Operand, Sums, Values, View
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


def in_a_process(code: str, **environment: str) -> None:
    """Run code that changes its process."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_valid_steps_need_no_memory_of_their_own() -> None:
    """Of 20 million marks, with 40 MB left."""
    code = """
import resource, torch
from fastreg import fused_ar_tar

def penalty(valid):
    raw = torch.ones(()).expand(*valid.shape, 1)
    return fused_ar_tar(raw, raw, 2.0, 1.0, valid=valid)

valid = torch.ones(1, 20_000_000, dtype=torch.bool)
valid[0, 1::3] = False
penalty(valid[:, :8].contiguous())
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 40_000_000, resource.RLIM_INFINITY))
value = penalty(valid)
assert value == 2, value
"""
    in_a_process(code)


def test_too_little_memory_is_an_error() -> None:
    """The offsets of 2**45 time steps of packed rows; a call after that is right."""
    row = Operand(torch.float32, 1, 1)
    sums = Sums(torch.float32, 2.0, 1.0, ar=True, tar=True, ar_of_raw=False, divisors=None)
    x, values = torch.ones(1), Values(batch_sizes=torch.ones(1, dtype=torch.int64))
    for steps in (2**45, 1):
        forward = cpu.PenaltyForward(View(1, steps, 1, (row, row, None, None), packed=True), sums, x.device)
        if steps > 1:
            with pytest.raises(MemoryError, match="offsets of sequences"):
                forward([x, x, None, None], values)
        else:
            assert forward([x, x, None, None], values).penalty == 2


@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_float16_keeps_its_subnormal_numbers(level: str) -> None:
    """Every finite number, copied and divided by 4, where the processor is told to flush those of float32."""
    code = """
import torch
from fastreg import fused_dropout_ar_tar
x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
x = x[x.isfinite()].view(1, 1, -1)
for factor in (1.0, 0.25):
    want = (x.double() * factor).half()
    assert torch.set_flush_denormal(True)
    got, _ = fused_dropout_ar_tar(x, 0.5, 0.0, 1.0, mask=torch.full_like(x, factor))
    torch.set_flush_denormal(False)
    assert got.view(torch.int16).equal(want.view(torch.int16)), (got != want).sum()
"""
    if level == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("PyTorch would not check that this processor has AVX-512")
    in_a_process(code, ATEN_CPU_CAPABILITY=level)


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
