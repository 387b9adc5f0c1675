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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from bench.offline import registers
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import more, python, skip_without
from tests.kernels.stand_in import StandInDriver, active, h100
from tests.samples import BF16, DOUBLE, FLOAT, HALF

skip_without("triton")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fastreg.kernels import ar_tar as kernels  # noqa: E402
from fastreg.kernels import launch, reduction, streams, tiling  # noqa: E402
from fastreg.kernels import steps as kernels_of_steps  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.compiled]
ALL_KERNELS = [kernels.ar_tar_kernel, kernels_of_steps.steps_kernel]
# Triton 3.9 spills nothing, releases before it up to so many bytes a thread, which are read once an item or a launch.
RELEASE = Version(triton.__version__)
MOST_SPILLED = 0 if Version("3.9") <= RELEASE else 16
# In bfloat16 on sm_80 and sm_86 code within 128 registers spills so many bytes, and four programs fit a multiprocessor;
# without a spill it takes up to 165 registers, and three fit.
SPILLED_BY_128 = 8
# Registers on sm_90 decide how many programs a multiprocessor holds: for sum and write of all steps, and with marks;
# and for the forward of dropout, and with marks.
REGISTERS = {FLOAT: (80, 91, 64, 72), BF16: (96, 111, 64, 72)}
if Version("3.9") > RELEASE:
    REGISTERS = {FLOAT: (94, 96, 64, 80), BF16: (128, 144, 96, 96)}
# Where loads are narrow, values that are read once a launch, on sm_80.
MOST_SPILLED_NARROW = 24 if Version("3.7") <= RELEASE else 56
LENGTHS = (2, 3, 7, 15, 16, 17, 32, 33, 64, 70, 100)  # Triton compiles anew for 1 and for multiples of 16, unless told
WIDE = ("dwordx4", ".v4.b32", ".v2.b64")  # accesses of 16 bytes
PARTIAL_SUMS = 2 * reduction.CHUNK.value // tiling.THREADS  # loads a thread, one element each
MARKS = 8 * (tiling.UNROLL + 1)  # the same, of the walk: one for each of the lanes that one load reads


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Compile for the GPU that the parameter names."""
    # Triton 3.4 does not bring the linker for AMD, whose result no test reads: this one copies its input.
    linker = tmp_path / "lld"
    linker.write_text('#!/bin/sh\n[ "$1" = --version ] || cp "$4" "$6"\n')
    linker.chmod(0o755)
    monkeypatch.setenv("TRITON_HIP_LLD_PATH", str(linker))
    name = request.param
    is_amd, lanes = name.startswith("gfx"), 64 if name.startswith("gfx9") else 32
    chosen = GPUTarget("hip", name, lanes) if is_amd else GPUTarget("cuda", int(name.removeprefix("sm_")), lanes)
    monkeypatch.setattr(tiling, "WARPS", tiling.THREADS // chosen.warp_size)
    with active(StandInDriver(chosen), *ALL_KERNELS):
        yield chosen


def compiled(masked: bool, **constants: bool) -> list[Any]:
    """Return the code of dropout, or of the penalty, that was compiled with these constants among others."""
    names, found = kernels.ar_tar_kernel.arg_names, []
    for binary in kernels.ar_tar_kernel.device_caches[0][0].values():
        known = {name: binary.src.constants.get((i,), ...) for i, name in enumerate(names)}
        if (known["mask"] is not None) == masked and all(known[name] == value for name, value in constants.items()):
            found.append(binary)
    return found


def trained(masked: bool) -> Iterator[list[Any]]:
    """Return the code of dropout, or of the penalty, in training, forward and backward."""
    constants = {} if masked else {"GRAD_TAR": True}
    return (compiled(masked, SUM_TAR=forward, **constants) for forward in (True, False))


def train(
    dtype: torch.dtype, shape: tuple[int, ...] = (4, 70, 400), kind: str = "two", batch_first: bool | None = None
) -> None:
    """Run the penalty forward and backward, and dropout, too, unless one tensor is given twice."""
    raw, dropped = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    options: Any = {"batch_first": batch_first}
    if kind == "padded":
        options["lengths"] = torch.full((shape[0],), shape[1] // 2)
    elif kind == "marked":
        options["valid"] = torch.ones(shape[:2], dtype=torch.bool)
    fused_ar_tar(raw, raw if kind == "one" else dropped, 2.0, 1.0, **options).backward()
    if kind != "one":
        results = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, **options)
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])


def assert_accesses(binary: Any, wide_loads: int, other_loads: int, wide_stores: int) -> None:
    """Check that nothing is spilled, and the loads and stores of 16 bytes and at most so many other loads."""
    is_sm_80 = binary.metadata.target.arch == 80
    assert_no_spills(binary, max(MOST_SPILLED, SPILLED_BY_128 * is_sm_80))
    if "amdgcn" in binary.asm:
        # Activations go through buffers, but by default not before Triton 3.5.
        kind = "buffer" if triton.knobs.amd.use_buffer_ops else "global"
        loads, stores = (re.findall(rf"\b{kind}_{x}_(\w+)", binary.asm["amdgcn"]) for x in ("load", "store"))
    else:
        loads, stores = (re.findall(rf"\b{x}\.global(\S*)", binary.asm["ptx"]) for x in ("ld", "st"))
    wide = sum(x.endswith(WIDE) for x in loads)
    assert (wide, sum(x.endswith(WIDE) for x in stores)) == (wide_loads, wide_stores)
    assert len(loads) - wide <= other_loads


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
    ("target", "dtype", "kind"),
    [
        *[("sm_90", BF16, kind) for kind in ("two", "one", "marked")],
        ("gfx942", BF16, "two"),
        *[pytest.param(name, BF16, "two", marks=more) for name in ("sm_80", "sm_100")],
        *[pytest.param(name, BF16, x, marks=more) for name in ("sm_80", "sm_100", "gfx942") for x in ("one", "marked")],
        *[pytest.param(name, FLOAT, "two", marks=more) for name in ("sm_80", "sm_90", "sm_100")],
        pytest.param("sm_90", DOUBLE, "two", marks=more),
    ],
    indirect=["target"],
    ids=str,
)
def test_wide_loads_and_no_spills(target: Any, dtype: torch.dtype, kind: str) -> None:
    """Lengths, starts and packed sequences take the code of marks, which adds its own loads, and changes no other."""
    if target.backend == "hip" and not triton.knobs.amd.use_buffer_ops and kind == "marked":
        pytest.skip("without buffer operations, loads of activations look like those of marks")
    train(dtype, kind=kind)
    for binary in kernels.ar_tar_kernel.device_caches[0][0].values():
        numbers = [x for name, x in binary.src.signature.items() if re.fullmatch(r"alpha|beta|\w+_scale", name)]
        assert numbers == ["fp64"] * 4, "Triton passes Python's numbers as fp32, unless it is told otherwise"
    unroll = tiling.UNROLL
    rows = unroll if kind == "one" else 2 * unroll
    others = MARKS + 12 if kind == "marked" else 0  # including counts
    (forward,), (backward,) = trained(masked=False)
    assert_accesses(forward, rows + 2, PARTIAL_SUMS + 2 + others, rows)
    assert_accesses(backward, rows + 2, 2 + others, rows)
    if kind in ("two", "marked"):
        (forward,), (backward,) = trained(masked=True)  # the mask is one more load for a whole run
        assert_accesses(forward, unroll + 1 + 1, PARTIAL_SUMS + others, unroll)
        assert_accesses(backward, rows + 2 + 1, 1 + others, unroll)
    if kind != "marked":
        raw, dropped = torch.zeros(2, 4, 70, 400, dtype=dtype)
        fused_ar_tar(raw, raw if kind == "one" else dropped, 2.0, 1.0)
        (forward,) = compiled(False, GRAD_TAR=False)
        assert_accesses(forward, rows + 1, PARTIAL_SUMS, 0)  # no row behind the run


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_registers_let_as_many_programs_run_at_once_as_planned(target: Any, dtype: torch.dtype) -> None:
    train(dtype)
    train(dtype, kind="marked")
    binaries = [*next(trained(masked=False)), *next(trained(masked=True))]
    found = [int(re.findall(r"REG:(\d+)", registers.usage_of(binary))[0]) for binary in binaries]
    assert all(x <= most for x, most in zip(found, REGISTERS[dtype], strict=True)), found
    assert registers.figures(binaries[0])[2] == "8 of 8", "loads in the table of bench/NOTES.md"
    for binary in binaries:  # the L1 cache does not see the stores of other programs
        assert binary.asm["ptx"].count("ld.global.cg.") == PARTIAL_SUMS


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
def test_no_spills_on_other_gpus_or_with_narrow_loads(target: Any, dtype: torch.dtype, hidden: int) -> None:
    for kind in ("two", "marked"):
        train(dtype, (4, 70, hidden), kind)
    binaries = [*kernels.ar_tar_kernel.device_caches[0][0].values()]
    assert len(binaries) == 8
    for binary in (*binaries, *kernels_of_steps.steps_kernel.device_caches[0][0].values()):
        assert_no_spills(binary, max(MOST_SPILLED, SPILLED_BY_128) if hidden == 400 else MOST_SPILLED_NARROW)


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("hidden", [400, 1150, 401], ids="hidden{}".format)
def test_a_varying_batch_compiles_once(target: Any, hidden: int) -> None:
    def counts() -> list[int]:
        return [len(x) for x in (*trained(masked=False), *trained(masked=True))]

    for time in (1, *LENGTHS):
        train(FLOAT, (4 if time % 3 else 3, time, hidden))
    assert counts() == [1, 1, 1, 1]
    if hidden != 400:  # the other sizes differ only in the alignment of rows
        return
    for time, batch in product((1, 2, 35, 70), (1, 3, 4, 17, 64)):
        train(FLOAT, (time, batch, hidden), batch_first=False)
    assert counts() == [1, 1, 1, 1]
    for kind, time in product(("padded", "marked"), LENGTHS):
        train(FLOAT, (4 if time % 3 else 3, time, hidden), kind)
    assert counts() == [2, 2, 2, 2]


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    ("why_jit", "before", "after", "directly"),
    [
        (None, None, None, 8),  # of 12 launches in three steps, as the first of each kernel compiles it
        (None, SimpleNamespace(calls=[]), SimpleNamespace(calls=[]), 8),
        (None, print, None, 0),
        (None, None, SimpleNamespace(calls=[print]), 0),
        ("some reason", None, None, 0),
    ],
    ids=["no hooks", "empty chains", "a hook before", "a chain after", "an untried release"],
)
def test_known_code_is_launched_directly_unless_a_profiler_has_hooked_launches(
    why_jit: str | None, before: Any, after: Any, directly: int, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_jit: list[Any] = []
    launched: list[tuple[Any, ...]] = []
    run, runtime = triton.JITFunction.run, SimpleNamespace(launch_enter_hook=before, launch_exit_hook=after)

    def run_by_jit(its: Any, *arguments: Any, **options: Any) -> Any:
        by_jit.append(its)
        return run(its, *arguments, **options)

    monkeypatch.setattr(triton.JITFunction, "run", run_by_jit)
    monkeypatch.setattr(StandInDriver, "launcher_cls", lambda *_: lambda *given: launched.append(given))
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(launch.Launch, "why_jit", why_jit)
    for _ in range(3):
        train(FLOAT)
    assert (len(launched) - len(by_jit), len(launched)) == (directly, 12)
    assert all(sys.getsizeof(given) <= 512 for given in launched), "Python allocates longer tuples more slowly"


def test_tried_releases_launch_directly_unless_a_variable_of_the_environment_is_0() -> None:
    for release in ("3.4.0", "3.6.0+git1234", "3.9.1", "3.9.2.post1"):
        assert launch.why_not_direct(release, None) is launch.why_not_direct(release, "1") is None
    for release in ("3.3.1", "3.10.0", "4.3.4", "unknown"):
        assert launch.why_not_direct(release, None) == f"no direct launch was tried with Triton {release}"
    script = "from fastreg.kernels import launch; print(launch.description())"
    said = python("-c", script, FASTREG_DIRECT_LAUNCH="0").stdout
    assert said == "launched by Triton's JIT launcher (FASTREG_DIRECT_LAUNCH is 0)\n"


@pytest.mark.parametrize(("hip", "lanes"), [(None, 32), ("6.4", 64)])
def test_a_program_has_as_many_threads_with_warps_of_32_and_of_64_lanes(
    hip: str | None, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    launched = []
    run = lambda x, y, z, stream, *_: launched.append((current[-1], stream))  # noqa: E731
    code = SimpleNamespace(function=0, packed_metadata=(), run=run)
    monkeypatch.setattr(launch.Launch, "why_jit", None)
    with h100():
        for index in (0, 3):
            one = launch.Launch({(4, 1, 1): lambda *_, **__: code}, (), 4, torch.device("cuda", index), draws=False)
            for _ in range(3):
                one()
    assert launched == [(0, 0)] * 2 + [(3, 3)] * 2, "the first launch compiles, and the others are direct"


def test_a_capture_on_one_device_is_none_on_another(current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 3)
    assert [streams.is_captured(torch.device("cuda", index)) for index in (0, 3)] == [False, True]


def test_tickets_are_ready_when_a_launch_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later another thread may capture a graph, during which no memory may be allocated."""
    device, filled = torch.device("cuda", 3), []
    monkeypatch.setattr(launch.TICKETS, "fill", filled.append)
    for draws in (True, False):
        launch.Launch(kernels.ar_tar_kernel, (), 4, device, draws)
    assert filled == [device]


def test_tickets_that_are_ready_are_drawn_without_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, filled, cpu = [], streams.filled, torch.device("cpu")
    monkeypatch.setattr(streams, "RESERVE", 8)
    monkeypatch.setattr(streams, "filled", lambda count, *others: allocated.append(count) or filled(count, *others))
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
