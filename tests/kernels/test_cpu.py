"""The C++ kernels: rounding, memory, threads, processes and the libraries for other processors."""

from __future__ import annotations

import ast
import ctypes
import multiprocessing
import os
import re
import shutil
import subprocess
from ctypes import string_at
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from bench.measure.timing import threads
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.backends import CPP
from fastreg.kernels import cpu
from tests.calls import transposed
from tests.conftest import BF16, CPU, DOUBLE, FLOAT, HALF, ROOT, memory_of, python
from tests.exact import drawn_number, spoil, truth

pytestmark = [
    pytest.mark.main,
    pytest.mark.processor,
    pytest.mark.skipif(CPU is not CPP or CPP is None, reason="the C++ kernels do not take the CPU tensors here"),
]
ALPHA, BETA = 2.0, 3.0


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw numbers that are the same on all processors."""
    return (torch.randint(-(2**20), 2**20, shape) / 2**19).to(dtype)


def step(raw: Tensor, dropped: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """Return the results and gradients of both operations."""
    got = fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=lengths)
    mask = dropped.detach()[:, :1].to(raw.dtype)
    kept, penalty = fused_dropout_ar_tar(raw, 0.5, ALPHA, BETA, mask=mask, lengths=lengths)
    (gradient,) = torch.autograd.grad([kept, penalty], raw, [torch.ones_like(kept), torch.ones_like(penalty)])
    return [got, *torch.autograd.grad(got, (raw, dropped)), kept, penalty, gradient]


@cache
def checksums() -> list[list[int]]:
    """Return checksums of results and gradients, in which all NaNs are the same."""
    torch.manual_seed(0)
    found = []
    small, large = [(7, 9, n) for n in (1, 33, 401, 4500)], [(2, 515, 2048), (2, 515, 2047)]
    cases = [*product(small, (Tensor.contiguous, transposed), (FLOAT, DOUBLE, BF16, HALF))]
    # Outputs of 8 MB and more go around the caches, in rows whose addresses are aligned, and others.
    cases += product(large, (Tensor.contiguous, transposed), (FLOAT,))
    for shape, layout, dtype in cases:
        for lengths in (None, (torch.arange(shape[0]) + 1) * 5 % shape[1]):
            spoiled = (spoil(values(shape, d), lengths=lengths) for d in (dtype, FLOAT if dtype == BF16 else dtype))
            results = step(*(layout(x).detach().requires_grad_() for x in spoiled), lengths)
            plain = [x.detach().nan_to_num(1e4).contiguous() for x in results]
            found.append([crc32(string_at(x.data_ptr(), x.nbytes)) for x in plain])
    return found


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_all_levels_of_processors_give_the_same_bits(capability: str) -> None:
    code = "from tests.kernels.test_cpu import checksums; print(checksums())"
    assert ast.literal_eval(python("-c", code, ATEN_CPU_CAPABILITY=capability).stdout) == checksums()


@pytest.mark.parametrize(
    ("capability", "level", "count"),
    [("AVX512", 4, 3), ("AVX512", 3, 2), ("AVX2", 4, 2), ("DEFAULT", 4, 1), ("SVE256", 0, 1), ("AVX10", 4, 3)],
)
def test_libraries_are_loaded_that_the_processor_runs_and_pytorch_allows(
    capability: str, level: int, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    libraries = [tmp_path / f"{name}.abi3.so" for name in ("_cpu_v4", "_cpu_v3", "_cpu")]
    (unfinished,) = re.findall(r'with_name\(f"(.*)"\)', (ROOT / "setup.py").read_text())  # a copy that a build makes
    for library in (*libraries, tmp_path / unfinished.format(old=libraries[-1])):
        library.touch()
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    monkeypatch.setattr(cpu, "processor_level", lambda: level)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert [*cpu.runnable()] == libraries[-count:]


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_halves_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """The products are ties, subnormal, infinite, and NaN whatever its bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, -1).requires_grad_()
    penalty = fused_ar_tar(None, every, 0.5, 0.0, reduction="sum")
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(FLOAT).item()
    for x in (1.0, -1.0, 1 + 2**-8, 1 + 2**-11, 1.5, 1 / 3, 2.0**-9, 3 * 2.0**-15, 7e-5, 255.0, 1e4, 1e38, nan):
        scale = torch.tensor(x)
        (got,) = torch.autograd.grad(penalty, every, scale, retain_graph=True)
        want = (every.detach().float() * scale).to(dtype)
        there = ~want.isnan()
        assert got[there].view(torch.int16).equal(want[there].view(torch.int16))
        assert got.isnan().equal(want.isnan())


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(32, 70, 1152), (500, 5000, 1), (2, 3, 2**19)])
def test_nothing_is_allocated_beyond_the_results(
    shape: tuple[int, ...], padded: bool, dtype: torch.dtype, dropout: bool
) -> None:
    """Padding takes a byte for each time step, and a few numbers for each sequence."""
    lengths = torch.arange(shape[0]) * 5 % shape[1] + 1 if padded else None
    raw, other = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))

    def call() -> list[Tensor]:
        if dropout:
            dropped, penalty = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, lengths=lengths)
            return [dropped, *torch.autograd.grad(penalty, raw)]
        return [*torch.autograd.grad(fused_ar_tar(raw, other, 2.0, 1.0, lengths=lengths), (raw, other))]

    allocated, results = memory_of(call, "cpu")
    needed = sum(x.nbytes for x in results) + (shape[0] * shape[2] * raw.itemsize if dropout else 0)
    needed += shape[0] * shape[1] if padded else 0
    assert needed <= allocated <= needed + 8 * shape[0] + 4096


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "constant", "heavy"])
def test_a_sum_of_16_million_elements_has_a_small_error(dtype: torch.dtype, kind: str) -> None:
    x = torch.randn(64, 256, 1024)
    x = {"normal": x, "constant": torch.full_like(x, 0.1), "heavy": x**3}[kind].to(dtype)
    got = fused_ar_tar(x, x, 1.0, 1.0, return_terms=True)
    ar = sum(part.double().square().sum() for part in x) / x.numel()
    tar = sum(part.double().diff(dim=0).square().sum() for part in x) / (64 * 255 * 1024)
    torch.testing.assert_close([got.ar.double(), got.tar.double()], [ar, tar], rtol=2e-6, atol=0)


@pytest.mark.parametrize("lengths", [None, torch.arange(40) * 5 % 91], ids=["whole", "lengths"])
@pytest.mark.parametrize("layout", [Tensor.contiguous, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtypes", [(FLOAT, BF16), (DOUBLE, DOUBLE)], ids=str)  # which shows the order of sums
def test_any_number_of_threads_gives_the_same_bits(dtypes: Any, layout: Any, lengths: Tensor | None) -> None:
    raw, dropped = (layout(values((40, 90, 130), d)).requires_grad_() for d in dtypes)
    got: list[list[Tensor]] = []
    for number in (1, 2, 3, 8, 2):
        with threads(number):
            got.append(step(raw, dropped, lengths))
        assert all(x.equal(y) for x, y in zip(got[0], got[-1], strict=True))


def test_more_items_than_programs_and_elements_than_32_bits_count_are_exact() -> None:
    """Many views of one sequence have the mean of that sequence; each of them is an item, in each of two walks."""
    raw, dropped = torch.randn(2, 1, 64, 256).unbind()
    many = 2**17 + 1, 64, 256
    with threads(2):
        got = fused_ar_tar(raw.expand(many), dropped.expand(many), ALPHA, BETA, return_terms=True)
    want = truth(raw.double(), dropped.double(), ALPHA, BETA)
    torch.testing.assert_close([x.double() for x in got], [*want], rtol=2e-6, atol=0)


COUNT_THREADS = """
import os, torch
from fastreg import fused_ar_tar
x = torch.randn(64, 70, 400)
for count in (1, 3):
    torch.set_num_threads(count)
    fused_ar_tar(x, x, 2.0, 1.0)
    print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list threads")
def test_a_call_takes_as_many_threads_as_pytorch_has_been_told() -> None:
    if "one thread" in cpu.description():
        pytest.skip("the compiler had no GNU OpenMP")
    one, three = map(int, python("-c", COUNT_THREADS, OMP_NUM_THREADS="1").stdout.split())
    assert three == one + 2


def test_a_forked_process_does_not_wait_for_threads_it_has_not() -> None:
    raw, dropped = (values((64, 70, 100), FLOAT) for _ in range(2))

    def in_a_fork() -> None:
        os._exit(0 if fused_ar_tar(raw, dropped, ALPHA, BETA).equal(want) else 1)

    child = multiprocessing.get_context("fork").Process(target=in_a_fork)
    with threads(2):
        want = fused_ar_tar(raw, dropped, ALPHA, BETA)
        child.start()
    child.join(60)
    status = child.exitcode
    child.kill()
    assert status == 0  # it is None while the process waits


DRAW_FAR = """
#include "cpu_draws.h"
extern "C" void draw_far(int64_t lane, int64_t seed, float *to) {
    draw_rows(Draw(&seed, 32768), FLOAT32, lane, 40, 0, 2, reinterpret_cast<char *>(to));
}
"""
FAR = 2**32 + 1  # a lane whose number does not fit 32 bits


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_lanes_have_64_bits_in_cpp(tmp_path: Path) -> None:
    source, built = tmp_path / "far.cpp", tmp_path / "far.so"
    source.write_text(DRAW_FAR)
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'kernels'}", source, "-o", built], check=True)
    found = torch.empty(16, 40)
    ctypes.CDLL(str(built)).draw_far(ctypes.c_int64(FAR), ctypes.c_int64(5), ctypes.c_void_p(found.data_ptr()))
    want = [[drawn_number(5, FAR + lane, step) >= 32768 for lane in range(40)] for step in range(16)]
    assert torch.equal(found != 0, torch.tensor(want))
