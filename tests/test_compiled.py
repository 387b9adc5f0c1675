"""The kernels compiled for real GPUs by the offline compiler: width of loads, spills, and how often they compile.

A stand-in driver replaces that of a GPU: `fused_ar_tar` on CPU tensors compiles the kernels that it would launch.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from bench.stand_in import StandInDriver, active
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.backends import TRITON, cpu_tensors_by
from fastreg.plans import forget
from tests.conftest import KERNELS_ON_CPU
from tests.samples import BF16, DOUBLE, FLOAT

triton = pytest.importorskip("triton", reason="no Triton: nothing to compile")
kernels = pytest.importorskip("fastreg.kernels.penalty")
dropout_kernels = pytest.importorskip("fastreg.kernels.dropout")
reduction = pytest.importorskip("fastreg.kernels.reduction")
tiling = pytest.importorskip("fastreg.kernels.tiling")

pytestmark = pytest.mark.skipif(KERNELS_ON_CPU, reason="TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PENALTY = [kernels.penalty_kernel]
DROPOUT = [dropout_kernels.dropout_forward, dropout_kernels.dropout_backward]
# Triton 3.9 spills nothing, releases before it up to so many bytes a thread, which are read once an item or a launch.
RELEASE = Version(triton.__version__)
MOST_SPILLED = 0 if Version("3.9") <= RELEASE else 16
# Of sum and write on sm_90, which decide how many programs a multiprocessor holds.
MOST_REGISTERS = {
    (650, FLOAT): 128,
    (650, BF16): 96 if Version("3.7") <= RELEASE else 120,
    (401, FLOAT): 96,
    (401, BF16): 120,
}
# Where loads are narrow, values that are read once a launch, on sm_80.
MOST_SPILLED_NARROW = 24 if Version("3.7") <= RELEASE else 56
LENGTHS = (2, 3, 7, 15, 16, 17, 32, 33, 64, 70, 100)  # Triton compiles anew for 1 and for multiples of 16, unless told
PARTIAL_SUMS = 2 * reduction.CHUNK.value // tiling.THREADS  # loads a thread, one element each
MARKS = 8 * (tiling.UNROLL + 2)  # the same, of the walk: one for each of the lanes that one load reads
COUNTS = 2 * (reduction.STEPS.value + 2 * reduction.CHUNK.value) // tiling.THREADS  # the same, of valid steps


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
    for kernel in PENALTY + DROPOUT:
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    assert TRITON is not None
    with active(StandInDriver(chosen)), cpu_tensors_by(TRITON):
        yield chosen
        forget()
        for kernel in PENALTY + DROPOUT:
            kernel.device_caches.clear()  # compiled code is freed by the driver that loaded it


def compiled(kernel: Any, **constants: bool) -> list[Any]:
    """The code of a kernel that was compiled with these constants among others."""
    binaries = kernel.device_caches[0][0].values()
    names = kernel.arg_names
    return [x for x in binaries if all(x.src.constants[(names.index(k),)] == v for k, v in constants.items())]


def compiled_penalty() -> Iterator[list[Any]]:
    """The code of the penalty: in training, forward and backward."""
    return (compiled(kernels.penalty_kernel, SUM=sums, WRITE=True) for sums in (True, False))


def run(
    dtypes: tuple[torch.dtype, torch.dtype], same: bool, shape: tuple[int, ...] = (4, 70, 400), batch_first: bool = True
) -> None:
    raw, dropped = (torch.zeros(shape, dtype=dtype, requires_grad=True) for dtype in dtypes)
    got = fused_ar_tar(raw, raw if same else dropped, 2.0, 1.0, batch_first=batch_first)
    if got.requires_grad:
        got.backward()


def run_dropout(dtype: torch.dtype, shape: tuple[int, ...] = (4, 70, 400), batch_first: bool = True) -> None:
    raw = torch.zeros(shape, dtype=dtype, requires_grad=True)
    dropped, got = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, batch_first=batch_first)
    torch.autograd.backward([dropped, got], [torch.ones_like(raw), torch.ones_like(got)])


def run_padded(dtype: torch.dtype, shape: tuple[int, ...] = (4, 70, 400), **steps: Tensor) -> None:
    steps = steps or {"lengths": torch.full((shape[0],), shape[1] // 2)}
    raw, dropped = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    fused_ar_tar(raw, dropped, 2.0, 1.0, **steps).backward()
    out, got = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, **steps)
    torch.autograd.backward([out, got], [torch.ones_like(raw), torch.ones_like(got)])


def run_marked(dtype: torch.dtype, shape: tuple[int, ...] = (4, 70, 400)) -> None:
    run_padded(dtype, shape, valid=torch.ones(shape[:2], dtype=torch.bool))


def run_packed(dtype: torch.dtype, shape: tuple[int, ...] = (4, 70, 400)) -> None:
    sizes = torch.tensor([shape[0]] * (shape[1] // 2) + [1] * (shape[1] - shape[1] // 2))
    rows = (torch.zeros(int(sizes.sum()), shape[2], dtype=dtype, requires_grad=True) for _ in range(2))
    fused_ar_tar(*(PackedSequence(x, sizes) for x in rows), 2.0, 1.0).backward()


RAGGED = (run_padded, run_packed, run_marked)


def assert_accesses(binary: Any, folder: Path, wide_loads: int, other_loads: int, wide_stores: int) -> None:
    count = count_amd(binary) if "amdgcn" in binary.asm else count_nvidia(binary, folder)
    assert count[0] == wide_loads
    assert count[1] - count[0] <= other_loads
    assert count[2] == wide_stores


# Other dtypes than bfloat16, and one tensor for both activations, are compiled for sm_90 alone, to save time.
@pytest.mark.parametrize(
    ("target", "dtype", "same"),
    [
        *[(target, BF16, False) for target in TARGETS],
        *[("sm_90", *x) for x in ((BF16, True), (FLOAT, False), (DOUBLE, False))],
    ],
    indirect=["target"],
    ids=str,
)
def test_wide_loads_and_no_spills(target: Any, dtype: torch.dtype, same: bool, tmp_path: Path) -> None:
    run((dtype, dtype), same)
    rows = tiling.UNROLL * (1 if same else 2)
    (forward,), (backward,) = compiled_penalty()
    assert_accesses(forward, tmp_path, rows + 2, PARTIAL_SUMS + 2, rows)
    assert_accesses(backward, tmp_path, rows + 2, 2, rows)
    with torch.no_grad():
        run((dtype, dtype), same)
    (forward,) = compiled(kernels.penalty_kernel, WRITE=False)
    assert_accesses(forward, tmp_path, rows + 2, PARTIAL_SUMS, 0)


@pytest.mark.parametrize(
    ("target", "dtype"), [*[(target, BF16) for target in TARGETS], ("sm_90", FLOAT)], indirect=["target"], ids=str
)
def test_wide_loads_and_no_spills_with_dropout(target: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """The mask is one more load for a whole run."""
    run_dropout(dtype)
    (forward,), (backward,) = map(compiled, DROPOUT)
    assert_accesses(forward, tmp_path, tiling.UNROLL + 1 + 1, PARTIAL_SUMS, tiling.UNROLL)
    assert_accesses(backward, tmp_path, 2 * tiling.UNROLL + 2 + 1, 1, tiling.UNROLL)


@pytest.mark.parametrize(
    ("target", "dtype", "run_ragged"),
    [
        *[(*case, ragged) for case in (("sm_90", BF16), ("gfx942", BF16), ("sm_90", FLOAT)) for ragged in RAGGED],
        *[("sm_80", BF16, run_marked), ("sm_100", BF16, run_packed)],
    ],
    indirect=["target"],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_wide_loads_and_no_spills_where_not_all_steps_count(
    target: Any, dtype: torch.dtype, run_ragged: Callable[[torch.dtype], None], tmp_path: Path
) -> None:
    """Beside lengths, marks, and where each step's rows begin, no more and no narrower loads than without."""
    if target.backend == "hip" and not triton.knobs.amd.use_buffer_ops and run_ragged is not run_padded:
        pytest.skip("without buffer operations, loads of activations look like those of marks and offsets")
    run_ragged(dtype)
    rows = 2 * tiling.UNROLL
    counting, marks = (COUNTS, MARKS) if run_ragged is run_marked else (0, 0)
    (forward,), (backward,) = compiled_penalty()
    assert_accesses(forward, tmp_path, rows + 2, PARTIAL_SUMS + 2 * counting + marks + 40, rows)
    assert_accesses(backward, tmp_path, rows + 2, counting + marks + 40, rows)
    if run_ragged is not run_packed:
        (forward,), (backward,) = map(compiled, DROPOUT)
        assert_accesses(forward, tmp_path, tiling.UNROLL + 1 + 1, PARTIAL_SUMS + counting + marks + 30, tiling.UNROLL)
        assert_accesses(backward, tmp_path, 2 * tiling.UNROLL + 2 + 1, counting + marks + 30, tiling.UNROLL)


@pytest.mark.parametrize(
    ("target", "dtype", "hidden", "ragged"),
    [
        ("sm_80", BF16, 401, RAGGED),
        ("sm_90", BF16, 401, RAGGED),
        ("sm_100", BF16, 401, (run_marked,)),
        ("gfx942", BF16, 401, RAGGED),
        ("sm_90", FLOAT, 401, ()),
        ("sm_90", FLOAT, 650, (run_padded, run_packed)),  # 1150 takes the code of 650
        ("sm_90", BF16, 650, (run_marked,)),
    ],
    indirect=["target"],
    ids=lambda x: "+".join(run.__name__ for run in x) if isinstance(x, tuple) else str(x),
)
def test_no_spills_with_narrow_loads(
    target: Any, dtype: torch.dtype, hidden: int, ragged: tuple[Callable[..., None], ...], tmp_path: Path
) -> None:
    shape = 4, 70, hidden
    run((dtype, dtype), same=False, shape=shape)
    run_dropout(dtype, shape)
    if target.arch == 90:
        ((forward,), _) = compiled_penalty()
        registers = re.findall(r"REG:(\d+)", usage_of(forward, tmp_path))
        assert int(registers[0]) <= MOST_REGISTERS[hidden, dtype]
    for run_ragged in ragged:
        run_ragged(dtype, shape)
    binaries = [binary for kernel in PENALTY + DROPOUT for binary in compiled(kernel)]
    assert len(binaries) == 4 + sum(2 if run_ragged is run_packed else 4 for run_ragged in ragged)
    for binary in binaries:
        if "amdgcn" in binary.asm:
            assert_no_spills_amd(binary.asm["amdgcn"])
        else:
            for loop in loops_of_spilling(binary, tmp_path, MOST_SPILLED_NARROW):
                assert not re.search(SPILL, loop)


def usage_of(binary: Any, folder: Path, *options: str) -> str:
    """Return registers and memory of a thread from cuobjdump; with `-sass` the instructions, too, which takes long."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, "-res-usage", *options, cubin], capture_output=True, text=True, check=True).stdout


SPILL = r"\b(LDL|STL)\b"


def loops_of_spilling(binary: Any, folder: Path, most: int) -> list[str]:
    """Check how many bytes a thread spills, and return the inner loops of code that spills any."""
    stack, local = (int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", usage_of(binary, folder)))
    assert stack <= most
    assert local == 0
    return inner_loops(usage_of(binary, folder, "-sass")) if stack else []


def inner_loops(dump: str) -> list[str]:
    """The instructions of each loop that has no other in it."""
    code = {int(at, 16): instruction for at, instruction in re.findall(r"^\s+/\*(\w+)\*/\s+(.*?);", dump, re.M)}
    jumps = [(at, int(to[1], 16)) for at, text in code.items() if (to := re.search(r"\bBRA\b.* 0x(\w+)", text))]
    loops = [(to, at) for at, to in jumps if to < at]
    inner = [(to, at) for to, at in loops if not any(to <= a and b <= at and (a, b) != (to, at) for a, b in loops)]
    return ["\n".join(text for i, text in code.items() if to <= i <= at) for to, at in inner]


def assert_no_spills_amd(assembly: str) -> None:
    assert re.search(r"\.vgpr_spill_count: *0\b", assembly)
    assert re.search(r"\.private_segment_fixed_size: *0\b", assembly)


def count_nvidia(binary: Any, folder: Path) -> tuple[int, int, int]:
    """Loads of 16 bytes, all loads, and stores of 16 bytes; nothing is spilled in each turn of the loop over rows."""
    loops = [x for x in loops_of_spilling(binary, folder, MOST_SPILLED) if re.search(r"\bLDG\S*\.128\b", x)]
    assert not re.search(SPILL, min(loops, key=len, default=""))
    accesses = re.findall(r"\b(ld|st)\.global(\S*)", binary.asm["ptx"])
    wide = [kind for kind, rest in accesses if rest.endswith((".v4.b32", ".v2.b64"))]
    return wide.count("ld"), [kind for kind, _ in accesses].count("ld"), wide.count("st")


def count_amd(binary: Any) -> tuple[int, int, int]:
    """The same for AMD."""
    assembly = binary.asm["amdgcn"]
    assert_no_spills_amd(assembly)
    # Activations go through buffers, but by default not before Triton 3.5; the offsets of packed rows, global, may be
    # read four at a time.
    kind = "buffer" if triton.knobs.amd.use_buffer_ops else "global"
    # Scalars that are needed once an item may wait in lanes of a vector register, but none that is needed in each turn.
    labels = {found[1]: found.start() for found in re.finditer(r"^(\.LBB\w+):", assembly, re.M)}
    jumps = [(found.start(), labels[found[1]]) for found in re.finditer(r"\bs_c?branch\w* (\.LBB\w+)", assembly)]
    loops = [assembly[to:at] for at, to in jumps if to < at]
    turn = min((loop for loop in loops if f"{kind}_load_dwordx4" in loop), key=len)
    assert "lane_b32" not in turn
    loads, stores = (re.findall(rf"\b{kind}_{access}_(\w+)", assembly) for access in ("load", "store"))
    return loads.count("dwordx4"), len(loads), stores.count("dwordx4")


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("hidden", [400, 1150, 401], ids="hidden{}".format)
def test_a_varying_batch_compiles_once(target: Any, hidden: int) -> None:
    """The sequence length differs from batch to batch, and the last batch is small; with lengths, too."""
    for time in (1, *LENGTHS):
        run((FLOAT, FLOAT), same=False, shape=(4 if time % 3 else 3, time, hidden))
        run_dropout(FLOAT, shape=(4 if time % 3 else 3, time, hidden))
    assert counts() == [1, 1, 1, 1]
    if hidden != 400:  # others differ in the alignment of rows alone
        return
    for time in LENGTHS:
        run_padded(FLOAT, shape=(4 if time % 3 else 3, time, hidden))
    assert counts() == [2, 2, 2, 2]
    for time in LENGTHS:
        run_packed(FLOAT, shape=(4 if time % 3 else 3, time, hidden))
    assert counts() == [3, 3, 2, 2]
    for time in LENGTHS:
        run_marked(FLOAT, shape=(4 if time % 3 else 3, time, hidden))
    assert counts() == [4, 4, 3, 3]


def counts() -> list[int]:
    """How often each kernel was compiled: the penalty forward and backward, and dropout forward and backward."""
    return [len(x) for x in (*compiled_penalty(), *map(compiled, DROPOUT))]


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_a_varying_batch_compiles_once_time_first(target: Any) -> None:
    for time, batch in product((1, 2, 35, 70), (1, 3, 4, 17, 64)):
        run((FLOAT, FLOAT), same=False, shape=(time, batch, 400), batch_first=False)
        run_dropout(FLOAT, shape=(time, batch, 400), batch_first=False)
    assert counts() == [1, 1, 1, 1]


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_tickets_of_any_alignment_compile_once(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = iter(torch.zeros(6, dtype=torch.int32).split(1))
    monkeypatch.setattr(reduction, "ticket_for", lambda *_: next(tickets))
    for _ in range(3):
        run((FLOAT, FLOAT), same=False)
        run_dropout(FLOAT)
    assert next(tickets, None) is None
    assert counts() == [1, 1, 1, 1]


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_double_precision_keeps_the_coefficients_whole(target: Any) -> None:
    """Triton passes Python floats as float32 unless told otherwise."""
    run((DOUBLE, DOUBLE), same=False)
    run_dropout(DOUBLE)
    for kernel in PENALTY + DROPOUT:
        for binary in compiled(kernel):
            scalars = [ty for name, ty in binary.src.signature.items() if re.fullmatch(r"alpha|beta|\w+_scale", name)]
            assert scalars == ["fp64"] * 4
