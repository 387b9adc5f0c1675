"""Devices, dtypes, fixtures and settings of the tests."""

from __future__ import annotations

import faulthandler
import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess, run
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bench.measure.figures import allocations
from fastreg import FusedDropout, FusedRNNDropout
from fastreg.call.backends import TRITON, backend_for
from fastreg.call.key import PLANS
from fastreg.kernels import cpu
from tests.language_model import Model

ROOT = Path(__file__).resolve().parent.parent
collect_ignore = [] if find_spec("triton") else ["kernels/ptx"]  # runs code that Triton compiles
CPU = backend_for(torch.device("cpu"))
KERNELS_ON_CPU = CPU is not None and CPU is TRITON
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slowly, and bfloat16 is cut off instead of rounded

# Each mark says that a case has a need, which may be met here or not.
NEEDS = {
    "gpu": (torch.cuda.is_available(), "a GPU"),
    "gpus": (torch.cuda.device_count() > 1, "a second GPU"),
    "no_gpu": (not torch.cuda.is_available(), "a machine without a GPU"),
    "interpreted": (KERNELS_ON_CPU, "TRITON_INTERPRET=1"),
    "compiled": (not KERNELS_ON_CPU, "a run without TRITON_INTERPRET=1"),
}
gpu, interpreted, compiled, more = pytest.mark.gpu, pytest.mark.interpreted, pytest.mark.compiled, pytest.mark.more
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
STDERR = pytest.StashKey[int]()


def pytest_report_header() -> str:
    path = "the plain formula" if CPU is None else CPU.name
    needs = ", ".join(need for met, need in NEEDS.values() if not met)
    return f"fastreg: CPU tensors take {path}; deselected are cases that need {needs}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, default=1, metavar="N", help="run only each N-th case of each test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that cannot run here, and those that the sample has not drawn."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if all(met or item.get_closest_marker(mark) is None for mark, (met, _) in NEEDS.items()):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for of_test in cases.values() for item in of_test[:: config.getoption("sample")]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_configure(config: pytest.Config) -> None:
    """End a run with libraries that were built from other sources, because it would test the formula.

    Turn oneDNN off on processors without AVX-512, for which it has no LSTM in bfloat16; PyTorch's own takes over.
    Let Triton's interpreter search its language for functions once, and not in each call of a function in a kernel.
    """
    if CPU is None and any(ROOT.glob("kernels/_cpu*.so")):
        build = f"{sys.executable} setup.py --quiet build_ext"
        pytest.exit(f"{cpu.reason()}; in a checkout build them by\n    {build}", 1)
    config.stash[STDERR] = os.dup(2)  # which pytest captures later
    if INTERPRETED:
        interpreter, language = import_module("triton.runtime.interpreter"), import_module("triton.language.core")
        names = cache(lambda package: [name for name, _ in inspect.getmembers(package, language.is_builtin)])
        current = {"getmembers": lambda package: [(x, getattr(package, x)) for x in names(package)]}  # replaced by then
        interpreter.inspect = SimpleNamespace(**vars(inspect) | current)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        torch.backends.mkldnn.set_flags(_enabled=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the process of a test in which a kernel hangs, which holds the interpreter and so leaves no other way."""
    if item.get_closest_marker("more") is None and item.path.parent.name in ("kernels", "call"):
        faulthandler.dump_traceback_later(60, exit=True, file=item.config.stash[STDERR])  # a test takes a few seconds
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def python(*arguments: str, folder: Path = ROOT, fails: bool = False, **environment: str) -> CompletedProcess[str]:
    """Run Python in a folder, which it imports from first, and then from `PYTHONPATH`; check whether it fails."""
    command, env = [sys.executable, *arguments], os.environ | environment
    done = run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, (done.stdout + done.stderr)[-5000:]
    return done


def skip_without(*packages: str) -> None:
    """Skip where a package is not installed; one that is, but cannot be imported, is a failure."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed", allow_module_level=True)


def skip_on_formula(device: str) -> None:
    """Skip a promise that only the kernels keep: the plain formula rounds and keeps memory as PyTorch does."""
    if device == "cpu" and CPU is None:
        pytest.skip("the C++ kernels were not built: CPU tensors take the plain formula")


def by_triton(device: str) -> bool:
    """Return whether the Triton kernels take tensors of a device."""
    return TRITON is not None and backend_for(torch.device(device)) is TRITON


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Let every import of some packages fail, as where they are not installed."""
    modules = [name for name in sys.modules if name.split(".")[0] in packages]
    with mock.patch.dict(sys.modules, dict.fromkeys([*packages, *modules])):
        yield


@pytest.fixture(autouse=True)
def start() -> None:
    """Let every test begin with the same seed and without plans, so that a failure repeats."""
    torch.manual_seed(0)
    PLANS.clear()


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Freeze the objects of the imports, which each garbage collection would visit."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class Poison(TorchFunctionMode):
    """Fill new memory with NaN, so that an element that no kernel writes shows in the result."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = function(*args, **(kwargs or {}))
        is_new = function in (torch.empty, torch.empty_like, torch.empty_strided)
        return x.fill_(torch.nan) if is_new and x.is_floating_point() else x


def memory_of(call: Callable[[], Any], device: str) -> tuple[int, Any]:
    """Return how many bytes of a device's memory a call takes from PyTorch, and its result.

    Each allocation counts. The profiler's sum for an operator lacks memory that a garbage collection frees meanwhile.
    """
    result, allocated = allocations(call, device)
    return sum(max(size, 0) for size in allocated), result


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Drop all compiled code before and after a test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[nn.Dropout, FusedRNNDropout, FusedDropout])
def either_dropout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the language models a plain dropout, and dropouts that compute the penalty."""
    monkeypatch.setattr(Model, "kind_of_dropout", request.param)
