"""Figures of the kernels' code as compiled for an H100, without one: `python -m bench.registers`.

Of the penalty and of dropout: registers, spills, widths of loads, instructions a byte, and how many programs fit on a
multiprocessor, with their bytes in flight. bench/NOTES.md draws the conclusions; tests/test_compiled.py bounds the
first three.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as chosen

from bench.cases import DTYPES
from bench.report import table
from bench.stand_in import StandInDriver
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.backends import TRITON, cpu_tensors_by
from fastreg.kernels import ar_tar as kernels
from fastreg.kernels import tiling
from fastreg.plans import forget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS, REGISTERS, MOST_THREADS = 132, 65536, 2048  # of an H100, the last two of each multiprocessor
BANDWIDTH, LATENCY = 3.35e12, 0.7e-6  # bytes a second by the datasheet; seconds, about, that a busy memory takes


def compile_all(dtype: torch.dtype) -> dict[str, Any]:
    """Compile the kernel in all its ways, as calls on an H100 would."""
    shape = 4, 70, 400
    valid = torch.ones(shape[:2], dtype=torch.bool)
    raw, dropped = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    x, y = raw.detach(), dropped.detach()

    def penalty(first: Tensor, second: Tensor, **options: Any) -> None:
        fused_ar_tar(first, second, 2.0, 1.0, **options).backward()

    def dropout(**options: Any) -> None:
        results = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, **options)
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])

    calls = {
        ("sum and write", "write"): lambda: penalty(raw, dropped),
        ("sum",): lambda: fused_ar_tar(x, y, 2.0, 1.0),
        ("sum and write, raw is dropped", "write, raw is dropped"): lambda: penalty(raw, raw),
        ("sum, raw is dropped",): lambda: fused_ar_tar(x, x, 2.0, 1.0),
        ("sum and write, valid", "write, valid"): lambda: penalty(raw, dropped, valid=valid),
        ("dropout", "dropout, backward"): dropout,
        ("dropout, valid", "dropout, valid, backward"): lambda: dropout(valid=valid),
    }
    found = {}
    assert TRITON is not None
    for names, call in calls.items():
        kernels.ar_tar_kernel.device_caches.clear()
        forget()
        with cpu_tensors_by(TRITON):
            call()
        found |= zip(names, kernels.ar_tar_kernel.device_caches[0][0].values(), strict=True)
    return found


def code_rows(dtype: torch.dtype) -> list[list[str]]:
    """Describe the code of all ways."""
    rows = [code_row(name, binary, dtype) for name, binary in compile_all(dtype).items()]
    kernels.ar_tar_kernel.device_caches.clear()
    return rows


def code_row(name: str, binary: Any, dtype: torch.dtype) -> list[str]:
    """Describe the code of one kernel.

    Registers, bytes spilled, loads of 16 bytes in the inner loop, its instructions for each byte that a thread moves,
    programs that fit on a multiprocessor, and their bytes in flight over those that Little's law asks for.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    spilled = sum(int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    loop = inner_loop(sass)
    wide = sum("LDG" in line and ".128" in line for line in loop)
    loads = sum("LDG" in line for line in loop)
    stores = sum("STG" in line for line in loop)
    moved = 16 * (loads + stores)
    resident = min(MOST_THREADS // tiling.THREADS, REGISTERS // (-(-registers // 8) * 8 * tiling.THREADS))
    in_flight = resident * tiling.THREADS * 16 * loads
    needed = BANDWIDTH * LATENCY / MULTIPROCESSORS
    return [
        name,
        f"{dtype}".removeprefix("torch."),
        f"{registers}",
        f"{spilled}",
        f"{wide} of {loads}",
        f"{len(loop) / moved:.2f}",
        f"{resident}",
        f"{in_flight / 1024:.0f} KB, {in_flight / needed:.1f}x",
    ]


def inner_loop(sass: str) -> list[str]:
    """Find the shortest loop, from the target of a branch back to that branch, that has wide loads."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/;]+);", sass)]
    loops = []
    for at, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and (target := int(branch[1], 16)) < at:
            loop = [line for where, line in code if target <= where <= at]
            if any("LDG" in line and ".128" in line for line in loop):
                loops.append(loop)
    return min(loops, key=len)


def main() -> None:
    chosen.set_active(StandInDriver(GPUTarget("cuda", 90, 32)))  # pyright: ignore[reportArgumentType]
    rows = [["way", "dtype", "registers", "spilled", "wide loads", "instructions a byte", "fit", "in flight"]]
    for dtype in DTYPES:
        rows += code_rows(dtype)
    print(table(rows))


if __name__ == "__main__":
    main()
