"""The kernels compiled for real GPUs by the offline compiler: width of loads, spills, and how often they compile.

With a stand-in for the driver of a GPU, `fused_ar_tar` on CPU tensors compiles the kernels that it would launch.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from bench.offline import registers
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import BF16, DOUBLE, FLOAT, HALF, more, python, skip_without
from tests.kernels.stand_in import StandInDriver, active, h100

skip_without("triton")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fastreg.kernels import launch, reduction, streams, tiling  # noqa: E402
from fastreg.kernels.ar_tar import ar_tar_kernel  # noqa: E402
from fastreg.kernels.steps import steps_kernel  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.compiled]
# Triton 3.9 spills nothing, releases before it up to so many bytes a thread, which are read once an item or a launch.
RELEASE = Version(triton.__version__)
MOST_SPILLED = 0 if Version("3.9") <= RELEASE else 16
# In bfloat16 on sm_80 and sm_86 code within 128 registers spills so many bytes, and four programs fit a multiprocessor;
# without a spill it takes up to 165 registers, and three fit.
SPILLED_BY_128 = max(MOST_SPILLED, 8)
# Where loads are narrow, values that are read once a launch, on sm_80.
MOST_SPILLED_NARROW = 24 if Version("3.7") <= RELEASE else 56
# Registers on sm_90 decide how many programs a multiprocessor holds.
REGISTERS_OF = (
    "sum",
    "write",
    "write, valid",
    "dropout",
    "dropout, valid",
    "dropout, drawn",
    "dropout, drawn, backward",
)
REGISTERS = {FLOAT: (40, 64, 72, 64, 72, 48, 48), BF16: (56, 80, 80, 64, 72, 80, 72)}
if Version("3.9") > RELEASE:
    REGISTERS = {FLOAT: (48, 64, 72, 64, 80, 48, 56), BF16: (66, 80, 86, 96, 96, 80, 72)}
WIDE = ("dwordx4", ".v4.b32", ".v2.b64")  # accesses of 16 bytes
ROWS = tiling.UNROLL  # of a tensor, which a program has in flight
PARTIAL_SUMS = 2 * reduction.CHUNK.value // tiling.THREADS  # loads a thread, one element each
MARKS = 8 * (ROWS + 1) + 12  # the same, of the walk: one for each of the lanes that one load reads; and of counts
# Loads of 16 bytes, other loads at most, and stores of 16 bytes. A stretch has a halo row of raw at each end.
ACCESSES = {
    "sum": (2 * ROWS + 1, PARTIAL_SUMS, 0),
    "write": (2 * ROWS + 2, 1, 2 * ROWS),
    "sum of one": (ROWS + 1, PARTIAL_SUMS, 0),
    "write of one": (ROWS + 2, 1, ROWS),
    "dropout": (ROWS + 2, PARTIAL_SUMS, ROWS),  # the mask is one more load for a whole stretch
    "dropout, backward": (2 * ROWS + 3, 1, ROWS),
}
LENGTHS = (2, 3, 7, 15, 16, 17, 32, 33, 64, 70, 100)  # Triton compiles anew for 1 and for multiples of 16, unless told


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Compile for the GPU that the parameter names, or for an H100."""
    name = getattr(request, "param", "sm_90")
    is_amd, lanes = name.startswith("gfx"), 64 if name.startswith("gfx9") else 32
    if is_amd and Version("3.5") > RELEASE:
        pytest.skip("this release of Triton does not bring the linker for AMD")
    chosen = GPUTarget("hip", name, lanes) if is_amd else GPUTarget("cuda", int(name.removeprefix("sm_")), lanes)
    monkeypatch.setattr(tiling, "WARPS", tiling.THREADS // chosen.warp_size)
    with active(StandInDriver(chosen), ar_tar_kernel, steps_kernel):
        yield chosen


def variants(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Compile each variant of the kernel, and name it; one tensor may be both raw and dropped."""
    yield from registers.compiled(dtype, hidden=400)
    ar_tar_kernel.device_caches.clear()
    x = torch.zeros(4, 70, 400, dtype=dtype, requires_grad=True)
    fused_ar_tar(x, x, 2.0, 1.0).backward()
    yield from zip(("sum of one", "write of one"), ar_tar_kernel.device_caches[0][0].values(), strict=True)


def assert_no_spills(binary: Any, most: int) -> None:
    """Check that nothing is spilled in a loop, and at most so many bytes a thread beside them."""
    if "amdgcn" in binary.asm:
        for figure in ("vgpr_spill_count", "private_segment_fixed_size"):
            assert re.search(rf"\.{figure}: *0\b", binary.asm["amdgcn"])
        return
    stack, local = (int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", registers.usage_of(binary)))
    assert stack <= most
    assert local == 0
    if stack:
        loops = registers.inner_loops(registers.usage_of(binary, "-sass"))
        assert loops, "the walk along time is a loop"
        assert not any(re.search(r"\b(LDL|STL)\b", line) for loop in loops for line in loop)


# These are only some of the combinations, to save time.
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *[(name, BF16) for name in ("sm_90", "gfx942")],
        *[pytest.param(name, BF16, marks=more) for name in ("sm_80", "sm_100")],
        *[pytest.param(name, FLOAT, marks=more) for name in ("sm_80", "sm_90", "sm_100")],
        pytest.param("sm_90", DOUBLE, marks=more),
    ],
    indirect=["target"],
    ids=str,
)
def test_loads_are_wide_and_nothing_is_spilled(target: Any, dtype: torch.dtype) -> None:
    """Lengths, starts and packed sequences take the code of marks, which adds its own loads, and changes no other."""
    for name, binary in variants(dtype):
        numbers = [x for name, x in binary.src.signature.items() if re.fullmatch(r"alpha|beta|\w+_scale", name)]
        assert numbers == ["fp64"] * 4, "Triton passes Python's numbers as fp32, unless it is told otherwise"
        assert_no_spills(binary, SPILLED_BY_128 if target.arch == 80 else MOST_SPILLED)
        if "drawn" in name:  # a thread has fewer lanes, so its loads are narrow
            continue
        if target.backend == "hip":
            loads, stores = (re.findall(rf"\bbuffer_{x}_(\w+)", binary.asm["amdgcn"]) for x in ("load", "store"))
        else:
            loads, stores = (re.findall(rf"\b{x}\.global(\S*)", binary.asm["ptx"]) for x in ("ld", "st"))
        wide_loads, other_loads, wide_stores = ACCESSES[name.replace(", valid", "")]
        wide = sum(x.endswith(WIDE) for x in loads)
        assert (wide, sum(x.endswith(WIDE) for x in stores)) == (wide_loads, wide_stores), name
        assert len(loads) - wide <= other_loads + MARKS * ("valid" in name), name


@pytest.mark.parametrize("dtype", REGISTERS, ids=str)
def test_registers_let_as_many_programs_run_at_once_as_planned(target: Any, dtype: torch.dtype) -> None:
    binaries = dict(registers.compiled(dtype, hidden=400))
    found = {name: registers.figures(binaries[name]) for name in REGISTERS_OF}
    assert all(int(found[x][0]) <= most for x, most in zip(REGISTERS_OF, REGISTERS[dtype], strict=True)), found
    assert found["sum"][2] == found["write"][2] == "8 of 8", "loads in the table of bench/NOTES.md"
    for name in ("sum", "dropout", "dropout, valid"):  # the L1 cache does not see the stores of other programs
        assert binaries[name].asm["ptx"].count("ld.global.cg.") == PARTIAL_SUMS
    (steps,) = steps_kernel.device_caches[0][0].values()
    assert "ld.global.cg." in steps.asm["ptx"], "its partial counts"


@more
@pytest.mark.parametrize(
    ("target", "dtype", "hidden"),
    [
        # Less is promised for these: an RTX 2080 or T4, 3090, 4090, 5090, an MI210, MI350 and RX 7900.
        *[("sm_75", HALF, 400), ("sm_86", BF16, 400), ("sm_89", FLOAT, 400), ("sm_120", BF16, 400)],
        *[("gfx90a", FLOAT, 400), ("gfx950", BF16, 400), ("gfx1100", HALF, 400)],
        *[(target, BF16, 401) for target in ("sm_80", "sm_90", "sm_100", "gfx942")],
        *[("sm_90", *case) for case in ((FLOAT, 401), (FLOAT, 650), (BF16, 650))],  # 1150 takes the code of 650
    ],
    indirect=["target"],
    ids=str,
)
def test_nothing_is_spilled_on_other_gpus_or_with_narrow_loads(target: Any, dtype: torch.dtype, hidden: int) -> None:
    binaries = [binary for _, binary in registers.compiled(dtype, hidden)]
    for binary in (*binaries, *steps_kernel.device_caches[0][0].values()):
        assert_no_spills(binary, SPILLED_BY_128 if hidden == 400 else MOST_SPILLED_NARROW)


def train(*shape: int, batch_first: bool = True, **marks: Any) -> None:
    """Run the penalty and dropout, forward and backward: four variants of the kernel."""
    raw, dropped = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    fused_ar_tar(raw, dropped, 2.0, 1.0, batch_first=batch_first, **marks).backward()
    results = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, batch_first=batch_first, **marks)
    torch.autograd.backward(results, [torch.ones_like(x) for x in results])


@pytest.mark.parametrize("hidden", [400, 1150, 401], ids="hidden{}".format)
def test_a_varying_batch_compiles_once(target: Any, hidden: int) -> None:
    for time in (1, *LENGTHS):
        train(4 if time % 3 else 3, time, hidden)
    if hidden == 400:  # the other sizes differ only in the alignment of rows
        for time, batch in product((1, 2, 35, 70), (1, 3, 4, 17, 64)):
            train(time, batch, hidden, batch_first=False)
    assert len(ar_tar_kernel.device_caches[0][0]) == 4
    for time in LENGTHS if hidden == 400 else ():
        batch = 4 if time % 3 else 3
        train(batch, time, hidden, lengths=torch.full((batch,), time // 2))
        train(batch, time, hidden, valid=torch.ones(batch, time, dtype=torch.bool))
        assert [len(x.device_caches[0][0]) for x in (ar_tar_kernel, steps_kernel)] == [8, 2]


def test_known_code_is_launched_directly_unless_a_profiler_has_hooked_launches(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_jit: list[Any] = []
    launched: list[tuple[Any, ...]] = []
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *given, **to: by_jit.append(given) or run(*given, **to))
    monkeypatch.setattr(StandInDriver, "launcher_cls", lambda *_: lambda *given: launched.append(given))
    empty, chain = SimpleNamespace(calls=[]), SimpleNamespace(calls=[print])
    for why_jit, before, after, indirectly in (
        ("an untried release", None, None, 4),
        (None, None, None, 4),  # as the first launch of each variant finds its code
        (None, None, None, 0),
        (None, empty, empty, 0),
        (None, print, None, 4),
        (None, None, chain, 4),
    ):
        monkeypatch.setattr(launch.Launch, "why_jit", why_jit)
        runtime = SimpleNamespace(launch_enter_hook=before, launch_exit_hook=after)
        monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=runtime))
        by_jit.clear()
        launched.clear()
        train(4, 70, 400)
        assert (len(by_jit), len(launched)) == (indirectly, 4)
        assert all(sys.getsizeof(given) <= 512 for given in launched), "Python allocates longer tuples more slowly"


def test_tried_releases_launch_directly_unless_a_variable_of_the_environment_is_0() -> None:
    for release in ("3.4.0", "3.6.0+git1234", "3.9.1", "3.9.2.post1"):
        assert launch.why_not_direct(release, None) is launch.why_not_direct(release, "1") is None
    for release in ("3.3.1", "3.10.0", "4.3.4", "unknown"):
        assert launch.why_not_direct(release, None) == f"no direct launch was tried with Triton {release}"
    script = "from fastreg.kernels import launch; print(launch.description())"
    said = python("-c", script, FASTREG_DIRECT_LAUNCH="0").stdout
    assert said == "launched by Triton's JIT launcher (FASTREG_DIRECT_LAUNCH is 0)\n"


def test_a_program_has_as_many_threads_with_warps_of_32_and_of_64_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    for hip, lanes in ((None, 32), ("6.4", 64)):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert runpy.run_path(tiling.__file__)["WARPS"] * lanes == tiling.THREADS


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the current device, which there is none of, by the last item of a list."""
    devices = [0]

    @contextmanager
    def device_index(index: int) -> Iterator[None]:
        devices.append(index)
        yield
        devices.pop()

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: devices[-1])
    return devices


def test_a_launch_is_on_its_device_and_on_the_stream_of_this_device(
    current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tickets are ready when it is made, as later another thread may capture a graph, when nothing is allocated."""
    launched, filled = [], []
    run = lambda x, y, z, stream, *_: launched.append((current[-1], stream))  # noqa: E731
    code = SimpleNamespace(function=0, packed_metadata=(), run=run)
    monkeypatch.setattr(launch.Launch, "why_jit", None)
    monkeypatch.setattr(launch.Launch, "ticket", lambda *_: None)
    monkeypatch.setattr(launch.TICKETS, "fill", filled.append)
    with h100():
        for index, draws in ((0, False), (3, True)):
            one = launch.Launch({(4, 1, 1): lambda *_, **__: code}, (), 4, torch.device("cuda", index), draws)
            for _ in range(3):
                one()
    assert launched == [(0, 0)] * 2 + [(3, 3)] * 2, "the first launch compiles, and the others are direct"
    assert filled == [torch.device("cuda", 3)]


def test_a_capture_on_one_device_is_none_on_another(current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 3)
    assert [streams.is_captured(torch.device("cuda", index)) for index in (0, 3)] == [False, True]


def test_tickets_that_are_ready_are_drawn_without_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, zeros, cpu = [], streams.zeros, torch.device("cpu")
    monkeypatch.setattr(streams, "RESERVE", 8)
    monkeypatch.setattr(streams, "zeros", lambda count, *others: allocated.append(count) or zeros(count, *others))
    tickets = streams.Tickets()
    with torch.inference_mode():
        tickets.fill(cpu)
    drawn = [tickets.drawn(cpu) for _ in range(5)]
    tickets.fill(cpu)
    assert allocated == [8, 8], "less than half was left"
    monkeypatch.setattr(streams, "is_captured", lambda device: True)
    tickets.fill(cpu)
    drawn += [tickets.drawn(cpu) for _ in range(11)]
    assert allocated == [8, 8], "nothing is allocated during a capture, as long as there are any"
    drawn.append(tickets.drawn(cpu))
    assert allocated == [8, 8, 1]
    assert len({x.data_ptr() for x in drawn}) == 17
    assert not drawn[0].is_inference(), "launches change it outside of inference mode, too"


def test_each_stream_has_a_ticket_for_each_number_of_programs() -> None:
    tickets = streams.Tickets()
    at = [tickets.of(torch.device("cpu"), *key).data_ptr() for key in ((1, 4), (1, 8), (2, 4)) * 2]
    assert at[:3] == at[3:]
    assert len({*at}) == 3
