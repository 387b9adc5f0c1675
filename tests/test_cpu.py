"""The C++ kernels: rounding, memory, threads and processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.backends import CPP
from fastreg.kernels import cpu
from fastreg.plans import forget
from tests.conftest import CPU, more
from tests.exact import spoil
from tests.samples import BF16, DOUBLE, FLOAT, HALF, contiguous, transposed

pytestmark = pytest.mark.skipif(
    CPU is not CPP or CPP is None, reason="the C++ kernels do not take the CPU tensors here"
)

DTYPES = (FLOAT, DOUBLE, BF16, HALF)
ALPHA, BETA = 2.0, 3.0


Layout = Callable[[Tensor], Tensor]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).to(dtype)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


AtEachLevel = Callable[[Callable[[], list[Tensor]]], None]


@pytest.fixture
def at_each_level(monkeypatch: pytest.MonkeyPatch) -> Iterator[AtEachLevel]:
    """Compare, to the last bit, the results of a function with each library that this processor runs."""

    def compare(results: Callable[[], list[Tensor]]) -> None:
        found = {}
        for path in cpu.runnable():
            monkeypatch.setattr(cpu, "library", functools.partial(cpu.opened, path))
            forget()
            found[path.name] = results()
        name, want = found.popitem()
        for other, got in found.items():
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=f"{other} and {name} differ")

    yield compare
    forget()


@pytest.mark.parametrize(
    ("capability", "level", "names"),
    [
        ("AVX512", 4, ["_cpu_v4", "_cpu_v3", "_cpu"]),
        ("AVX512", 3, ["_cpu_v3", "_cpu"]),
        ("AVX2", 4, ["_cpu_v3", "_cpu"]),
        ("SVE256", 0, ["_cpu"]),
    ],
)
def test_libraries_that_are_loaded(
    capability: str, level: int, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those that the processor runs and PyTorch's capability allows, the best first."""
    for name in ("_cpu", "_cpu_v3", "_cpu_v4"):
        (tmp_path / f"{name}.abi3.so").touch()
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    monkeypatch.setattr(cpu, "processor_level", lambda: level)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert [path.name.partition(".")[0] for path in cpu.runnable()] == names


@pytest.mark.parametrize(
    "shape", [*[(7, 9, n) for n in (1, 33, 401, 4500)], *[pytest.param((2, 515, n), marks=more) for n in (2048, 2047)]]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, transposed], ids=lambda f: f.__name__)
def test_levels_agree(
    layout: Layout, dtype: torch.dtype, shape: tuple[int, int, int], at_each_level: AtEachLevel
) -> None:
    """Gradients of 8 MB and more together go around the caches, in rows whose addresses are aligned, and others."""
    other = FLOAT if dtype == BF16 else dtype
    for lengths in (None, (torch.arange(shape[0]) + 1) * 5 % shape[1]):
        spoiled = (spoil(values(shape, d), lengths=lengths) for d in (dtype, other))
        raw, dropped = (layout(x).detach().requires_grad_() for x in spoiled)
        at_each_level(lambda raw=raw, dropped=dropped, lengths=lengths: step(raw, dropped, lengths))


@contextmanager
def flushed(flush: bool) -> Iterator[None]:
    """Have the processor take subnormal numbers of float32 for 0."""
    assert torch.set_flush_denormal(flush)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("flush", [False, True])
def test_halves_are_rounded_as_torch_rounds(dtype: torch.dtype, flush: bool, at_each_level: AtEachLevel) -> None:
    """All of them, times numbers that lead to ties, to subnormal numbers, to infinity, and NaN whatever its bits."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1).requires_grad_()
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(FLOAT).item()
    scales = [1.0, -1.0, 1 + 2**-8, 1 + 2**-11, 1.5, 3.0, 1 / 3, 2.0**-9, 3 * 2.0**-15, 7e-5, 255.0, 1e4, 1e38, nan]

    torch.set_num_threads(1)  # the processor's modes are those of a thread

    def results() -> list[Tensor]:
        penalty = fused_ar_tar(None, every, 0.5, 0.0, reduction="sum")
        with flushed(flush):
            found = [torch.autograd.grad(penalty, every, torch.tensor(x), retain_graph=True)[0] for x in scales]
        for got, scale in zip(found, scales if not flush else [], strict=False):
            want = (every.detach().float() * torch.tensor(scale)).to(dtype)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            there = ~want.isnan()
            assert got.signbit()[there].equal(want.signbit()[there])
        assert found[-1].isnan().all()
        return found

    at_each_level(results)


def test_float16_keeps_its_subnormal_numbers(at_each_level: AtEachLevel) -> None:
    """Every finite number, copied and divided by 4, where the processor is told to flush those of float32."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(HALF)
    x = x[x.isfinite()].view(1, 1, -1)
    torch.set_num_threads(1)

    def results() -> list[Tensor]:
        found = []
        for factor in (1.0, 0.25):
            with flushed(True):
                found.append(fused_dropout_ar_tar(x, 0.5, 0.0, 1.0, mask=torch.full_like(x, factor))[0])
            assert found[-1].view(torch.int16).equal((x.double() * factor).half().view(torch.int16))
        return found

    at_each_level(results)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(32, 70, 1152), (500, 5000, 1), (2, 3, 2**19)])
def test_nothing_is_allocated_beyond_the_results(
    shape: tuple[int, ...], padded: bool, dtype: torch.dtype, dropout: bool
) -> None:
    """Gradients, dropped and its mask, a byte a step of padded sequences, and a few numbers a sequence."""
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
    needed += shape[0] * shape[1] if padded else 0
    assert needed <= allocated <= needed + 8 * shape[0] + 4096


IN_A_PROCESS = """
import torch
from fastreg import fused_ar_tar
fused_ar_tar(torch.ones(2, 3, 4), None, 0.0, 1.0)
paths = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
assert len({path for path in paths if "omp" in path.rpartition("/")[2]}) == 1, paths
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "constant", "heavy"])
def test_error_of_a_large_sum(dtype: torch.dtype, kind: str) -> None:
    """16.8 million elements, within 2e-6."""
    x = torch.randn(64, 256, 1024, generator=torch.Generator().manual_seed(0))
    x = {"normal": x, "constant": torch.full_like(x, 0.1), "heavy": x**3}[kind].to(dtype)
    got = fused_ar_tar(x, x, 1.0, 1.0, return_terms=True)
    ar = sum(part.double().square().sum() for part in x) / x.numel()
    tar = sum(part.double().diff(dim=0).square().sum() for part in x) / (64 * 255 * 1024)
    for value, true in ((got.ar, ar), (got.tar, tar)):
        assert abs(value.double() - true) <= 2e-6 * true


def step(raw: Tensor, dropped: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """The penalty, dropped and gradients of either operation."""
    got = fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=lengths)
    kept, penalty = fused_dropout_ar_tar(
        raw, 0.5, ALPHA, BETA, mask=dropped.detach()[:, :1].to(raw.dtype), lengths=lengths
    )
    (gradient,) = torch.autograd.grad([kept, penalty], raw, [torch.ones_like(kept), torch.ones_like(penalty)])
    return [got, *torch.autograd.grad(got, (raw, dropped)), kept, penalty, gradient]


@pytest.mark.parametrize("lengths", [None, torch.arange(40) * 5 % 91], ids=["whole", "lengths"])
@pytest.mark.parametrize("layout", [contiguous, transposed], ids=lambda f: f.__name__)
def test_the_same_bits_for_any_number_of_threads(layout: Layout, lengths: Tensor | None) -> None:
    raw, dropped = (layout(values((40, 90, 130), d)).requires_grad_() for d in (FLOAT, BF16))
    got: list[list[Tensor]] = []
    for number in (1, 2, 3, 8, 2):
        torch.set_num_threads(number)
        got.append(step(raw, dropped, lengths))
        assert all(x.equal(y) for x, y in zip(got[0], got[-1], strict=True))


def test_a_forked_process_does_not_wait_for_threads_it_has_not() -> None:
    torch.set_num_threads(2)
    raw, dropped = (values((64, 70, 100), FLOAT) for _ in range(2))
    want = fused_ar_tar(raw, dropped, ALPHA, BETA)

    def in_a_fork() -> None:
        os._exit(0 if fused_ar_tar(raw, dropped, ALPHA, BETA).equal(want) else 1)

    child = multiprocessing.get_context("fork").Process(target=in_a_fork)
    child.start()
    child.join(60)
    status = child.exitcode
    child.kill()
    assert status == 0  # it is None while the process waits


def test_without_a_library_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.library.cache_clear()
    assert "not built" in (cpu.reason() or "")
    (tmp_path / "_cpu.abi3.so").write_text("no library")
    assert "_cpu.abi3.so" in (cpu.reason() or "")
    subprocess.run(["g++", "-shared", "-x", "c", "/dev/null", "-o", tmp_path / "_cpu.abi3.so"], check=True)
    cpu.library.cache_clear()
    assert "built from another version" in (cpu.reason() or "")
    monkeypatch.undo()
    cpu.library.cache_clear()
    assert cpu.reason() is None
