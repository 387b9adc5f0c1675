"""The kernels compiled for real GPUs by the offline compiler: width of loads, spills, and how often they compile.

With a stand-in for the driver of a GPU, `fused_ar_tar` on CPU tensors compiles the kernels that it would launch.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.nn.utils.rnn import PackedSequence

from bench.offline import registers
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.__main__ import launches
from fastreg.call.backends import CPP
from fastreg.call.key import PLANS
from tests.conftest import more, python, skip_without
from tests.kernels.stand_in import StandInDriver, active
from tests.samples import BF16, DOUBLE, FLOAT, HALF

skip_without("triton")

import triton  # noqa: E402

from fastreg.kernels import ar_tar as kernels  # noqa: E402
from fastreg.kernels import launch, reduction, streams, tiling  # noqa: E402
from fastreg.kernels import steps as kernels_of_steps  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.compiled]
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    # Less is promised for these GPUs: an RTX 2080 or T4, 3090, 4090, 5090, an MI210, MI350 and RX 7900.
    "sm_75": ("cuda", 75, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
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
PARTIAL_SUMS = 2 * reduction.CHUNK.value // tiling.THREADS  # loads a thread, one element each
MARKS = 8 * (tiling.UNROLL + 1)  # the same, of the walk: one for each of the lanes that one load reads


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    from triton.backends.compiler import GPUTarget

    # Triton 3.4 does not bring the linker for AMD, whose result no test reads: this one copies its input.
    linker = tmp_path / "lld"
    linker.write_text('#!/bin/sh\n[ "$1" = --version ] || cp "$4" "$6"\n')
    linker.chmod(0o755)
    monkeypatch.setenv("TRITON_HIP_LLD_PATH", str(linker))
    chosen = GPUTarget(*TARGETS[request.param])
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
    """Run the penalty forward and backward, and dropout, too, unless rows are packed or one tensor is given twice."""
    raw, dropped = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    options: Any = {"batch_first": batch_first}
    if kind == "packed":
        sizes = torch.tensor([shape[0]] * (shape[1] // 2) + [1] * (shape[1] - shape[1] // 2))
        packed = (PackedSequence(x.flatten(0, 1)[: int(sizes.sum())], sizes) for x in (raw, dropped))
        fused_ar_tar(*packed, 2.0, 1.0).backward()  # pyright: ignore[reportArgumentType, reportCallIssue]
        return
    if kind == "padded":
        options["lengths"] = torch.full((shape[0],), shape[1] // 2)
    elif kind == "marked":
        options["valid"] = torch.ones(shape[:2], dtype=torch.bool)
    fused_ar_tar(raw, raw if kind == "one" else dropped, 2.0, 1.0, **options).backward()
    if kind != "one":
        results = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, **options)
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])


def assert_accesses(binary: Any, wide_loads: int, other_loads: int, wide_stores: int) -> None:
    count = count_amd(binary) if "amdgcn" in binary.asm else count_nvidia(binary)
    assert count[0] == wide_loads
    assert count[1] - count[0] <= other_loads
    assert count[2] == wide_stores


# These are only some of the combinations, to save time.
@pytest.mark.parametrize(
    ("target", "dtype", "kind"),
    [
        *[("sm_90", BF16, kind) for kind in ("two", "one", "marked")],
        ("gfx942", BF16, "two"),
        *(
            pytest.param(*case, marks=more)
            for case in [
                *[(target, dtype, "two") for target in ("sm_80", "sm_100") for dtype in (FLOAT, BF16)],
                *[(target, BF16, "one") for target in ("sm_80", "sm_100", "gfx942")],
                *[("sm_90", dtype, "two") for dtype in (FLOAT, DOUBLE)],
                *[(target, BF16, "marked") for target in ("sm_80", "sm_100", "gfx942")],
                ("sm_90", FLOAT, "marked"),
            ]
        ),
    ],
    indirect=["target"],
    ids=str,
)
def test_wide_loads_and_no_spills(target: Any, dtype: torch.dtype, kind: str) -> None:
    """Lengths, starts and packed sequences take the code of marks, which adds its own loads, and changes no other."""
    if target.backend == "hip" and not triton.knobs.amd.use_buffer_ops and kind == "marked":
        pytest.skip("without buffer operations, loads of activations look like those of marks")
    train(dtype, kind=kind)
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
def test_registers(target: Any, dtype: torch.dtype) -> None:
    train(dtype)
    train(dtype, kind="marked")
    binaries = [*next(trained(masked=False)), *next(trained(masked=True))]
    found = [int(re.findall(r"REG:(\d+)", registers.usage_of(binary))[0]) for binary in binaries]
    assert all(x <= most for x, most in zip(found, REGISTERS[dtype], strict=True)), found
    used, _, wide, *_ = registers.figures(binaries[0])
    assert (int(used), wide) == (found[0], "8 of 8")  # in the table of bench/NOTES.md


@more
@pytest.mark.parametrize(
    ("target", "dtype", "hidden", "kinds"),
    [
        *[
            (*case, 400, ("two", "marked"))
            for case in zip([*TARGETS][4:], (HALF, BF16, FLOAT, BF16, FLOAT, BF16, HALF), strict=True)
        ],
        *[(target, BF16, 401, ("two", "marked")) for target in ("sm_80", "sm_90", "sm_100", "gfx942")],
        ("sm_90", FLOAT, 401, ("two",)),
        *[("sm_90", dtype, 650, ("two", "marked")) for dtype in (FLOAT, BF16)],  # 1150 takes the code of 650
    ],
    indirect=["target"],
    ids=str,
)
def test_no_spills_on_other_gpus_or_with_narrow_loads(
    target: Any, dtype: torch.dtype, hidden: int, kinds: tuple[str, ...]
) -> None:
    for kind in kinds:
        train(dtype, (4, 70, hidden), kind)
    binaries = [*kernels.ar_tar_kernel.device_caches[0][0].values()]
    assert len(binaries) == 4 * len(kinds)
    binaries += kernels_of_steps.steps_kernel.device_caches[0][0].values()
    assert_no_spills(binaries, max(MOST_SPILLED, SPILLED_BY_128) if hidden == 400 else MOST_SPILLED_NARROW)


SPILL = r"\b(LDL|STL)\b"


def assert_no_spills(binaries: list[Any], most: int) -> None:
    """Check that nothing is spilled in a loop, and at most so many bytes a thread beside them."""
    for binary in binaries:
        if "amdgcn" in binary.asm:
            assert_no_spills_amd(binary.asm["amdgcn"])
        else:
            assert not any(re.search(SPILL, loop) for loop in loops_of_spilling(binary, most))


def loops_of_spilling(binary: Any, most: int) -> list[str]:
    """Check how many bytes a thread spills, and return the inner loops of code that spills any."""
    stack, local = (int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", registers.usage_of(binary)))
    assert stack <= most
    assert local == 0
    if not stack:
        return []
    loops = ["\n".join(x) for x in registers.inner_loops(registers.usage_of(binary, "-sass"))]
    assert loops, "the walk along time is a loop"
    return loops


def assert_no_spills_amd(assembly: str) -> None:
    assert re.search(r"\.vgpr_spill_count: *0\b", assembly)
    assert re.search(r"\.private_segment_fixed_size: *0\b", assembly)


def count_nvidia(binary: Any) -> tuple[int, int, int]:
    """Count loads of 16 bytes, all loads, and stores of 16 bytes; check that the loop over rows spills nothing."""
    most = max(MOST_SPILLED, SPILLED_BY_128 * (binary.metadata.target.arch == 80))
    if loops := loops_of_spilling(binary, most):
        wide_loops = [x for x in loops if re.search(r"\bLDG\S*\.128\b", x)]
        assert not re.search(SPILL, min(wide_loops, key=len))
    accesses = re.findall(r"\b(ld|st)\.global(\S*)", binary.asm["ptx"])
    wide = [kind for kind, rest in accesses if rest.endswith((".v4.b32", ".v2.b64"))]
    return wide.count("ld"), [kind for kind, _ in accesses].count("ld"), wide.count("st")


def count_amd(binary: Any) -> tuple[int, int, int]:
    """Do the same for AMD."""
    assembly = binary.asm["amdgcn"]
    assert_no_spills_amd(assembly)
    # Activations go through buffers, but by default not before Triton 3.5.
    kind = "buffer" if triton.knobs.amd.use_buffer_ops else "global"
    loads, stores = (re.findall(rf"\b{kind}_{access}_(\w+)", assembly) for access in ("load", "store"))
    return loads.count("dwordx4"), len(loads), stores.count("dwordx4")


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("hidden", [400, 1150, 401], ids="hidden{}".format)
def test_a_varying_batch_compiles_once(target: Any, hidden: int) -> None:
    for time in (1, *LENGTHS):
        train(FLOAT, (4 if time % 3 else 3, time, hidden))
    assert counts() == [1, 1, 1, 1]
    if hidden != 400:  # the other sizes differ only in the alignment of rows
        return
    for time, batch in product((1, 2, 35, 70), (1, 3, 4, 17, 64)):
        train(FLOAT, (time, batch, hidden), batch_first=False)
    assert counts() == [1, 1, 1, 1]
    for kind, want in (("padded", [2, 2, 2, 2]), ("marked", [2, 2, 2, 2]), ("packed", [2, 2, 2, 2])):
        for time in LENGTHS:
            train(FLOAT, (4 if time % 3 else 3, time, hidden), kind)
        assert counts() == want


def counts() -> list[int]:
    """Count the compilations of the penalty, forward and backward, and of dropout, forward and backward."""
    return [len(x) for x in (*trained(False), *trained(True))]


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_double_precision_keeps_the_coefficients_whole(target: Any) -> None:
    """Triton passes Python floats as float32 unless told otherwise."""
    train(DOUBLE)
    binaries = [*kernels.ar_tar_kernel.device_caches[0][0].values()]
    assert len(binaries) == 4
    for binary in binaries:
        scalars = [ty for name, ty in binary.src.signature.items() if re.fullmatch(r"alpha|beta|\w+_scale", name)]
        assert scalars == ["fp64"] * 4


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    ("before", "after", "directly"),
    [
        (None, None, 8),  # of the launches of three steps; the first of each kernel compiles it
        (SimpleNamespace(calls=[]), SimpleNamespace(calls=[]), 8),
        (print, None, 0),
        (None, SimpleNamespace(calls=[print]), 0),
    ],
    ids=["no hooks", "empty chains", "a hook before", "a chain after"],
)
def test_known_code_is_launched_directly_unless_a_profiler_has_hooked_launches(
    before: Any, after: Any, directly: int, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_jit: list[Any] = []
    direct: list[Any] = []
    run, runtime = triton.JITFunction.run, SimpleNamespace(launch_enter_hook=before, launch_exit_hook=after)

    def run_by_jit(its: Any, *arguments: Any, **options: Any) -> Any:
        code = run(its, *arguments, **options)
        by_jit.append(code)
        return SimpleNamespace(
            function=code.function,
            packed_metadata=code.packed_metadata,
            run=lambda *given: direct.append(given) or code.run(*given),
        )

    monkeypatch.setattr(triton.JITFunction, "run", run_by_jit)
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=runtime))
    for why, count in (("some reason", 0), (None, directly)):
        monkeypatch.setattr(launch.Launch, "why_jit", why)
        PLANS.clear()
        by_jit.clear()
        for _ in range(3):
            train(FLOAT)
        assert (len(by_jit), len(direct)) == (12 - count, count)
    assert all(sys.getsizeof(given) <= 512 for given in direct), "Python allocates longer tuples more slowly"
    by_jit.clear()
    direct.clear()
    gc.collect()  # the driver of this test has to free the compiled code


def test_which_releases_launch_directly() -> None:
    for release in ("3.4.0", "3.6.0+git1234", "3.9.1", "3.9.2.post1"):
        assert launch.why_not_direct(release, None) is launch.why_not_direct(release, "1") is None
        assert launch.why_not_direct(release, "0") == "FASTREG_DIRECT_LAUNCH is 0"
    for release in ("3.3.1", "3.10.0", "4.3.4", "unknown"):
        assert launch.why_not_direct(release, None) == f"no direct launch was tried with Triton {release}"


def test_the_report_of_an_installation_says_which_way_launches_go() -> None:
    script = "from fastreg import __main__ as main; from fastreg.call.backends import *; print(main.launches(TRITON))"
    said = python("-c", script, FASTREG_DIRECT_LAUNCH="0").stdout
    assert said == ", launched by Triton's JIT launcher (FASTREG_DIRECT_LAUNCH is 0)\n"
    assert launches(CPP) == launches(None) == ""


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
    assert allocated == [8]
    assert len({x.data_ptr() for x in drawn}) == 5
    assert not drawn[0].is_inference(), "launches change it outside of inference mode, too"
    tickets.fill(cpu)
    assert allocated == [8, 8], "less than half was left"
    monkeypatch.setattr(streams, "is_captured", lambda device: True)
    tickets.fill(cpu)
    for _ in range(11):
        tickets.drawn(cpu)
    assert allocated == [8, 8], "nothing is allocated during a capture, as long as there are any"
    tickets.drawn(cpu)
    assert allocated == [8, 8, 1]
