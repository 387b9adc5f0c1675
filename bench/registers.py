"""Figures of the code that Triton compiles for an H100, which need no GPU: `python -m bench.registers`.

It prints, for the penalty and for dropout, the registers, spills, widths of loads, instructions per byte, the number of
programs that fit on a multiprocessor, and their bytes in flight. bench/NOTES.md draws the conclusions, and
tests/test_compiled.py bounds the first three.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from bench.cases import DTYPES
from bench.offline import MULTIPROCESSORS
from bench.report import table
from bench.stand_in import h100
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.kernels import tiling
from fastreg.kernels.ar_tar import ar_tar_kernel
from fastreg.plans import forget

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS, MOST_THREADS = 65536, 2048  # a multiprocessor has so many
BANDWIDTH, LATENCY = 3.35e12, 0.7e-6  # bytes a second by the datasheet; seconds of a load from busy memory
HEAD = ["way", "dtype", "registers", "spilled", "wide loads", "instructions a byte", "fit", "in flight"]


def compiled(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Compile each variant of the kernel, as calls on an H100 would, and name it."""
    raw, dropped = (torch.zeros(4, 70, 400, dtype=dtype, requires_grad=True) for _ in range(2))
    valid = torch.ones(4, 70, dtype=torch.bool)

    def penalty(**options: Any) -> None:
        fused_ar_tar(raw, dropped, 2.0, 1.0, **options).backward()

    def dropout(**options: Any) -> None:
        results = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, **options)
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])

    calls = {
        ("sum and write", "write"): penalty,
        ("sum",): lambda: fused_ar_tar(raw.detach(), dropped.detach(), 2.0, 1.0),
        ("sum and write, valid", "write, valid"): lambda: penalty(valid=valid),
        ("dropout", "dropout, backward"): dropout,
        ("dropout, valid", "dropout, valid, backward"): lambda: dropout(valid=valid),
    }
    for names, call in calls.items():
        ar_tar_kernel.device_caches.clear()
        forget()
        call()
        yield from zip(names, ar_tar_kernel.device_caches[0][0].values(), strict=True)


def figures(binary: Any) -> list[str]:
    """Describe the code of one kernel.

    The figures are registers, spilled bytes, loads of 16 bytes in the inner loop, its instructions for each byte that a
    thread moves, the programs that fit on a multiprocessor, and their bytes in flight over what Little's law asks for.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", "-sass", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(re.findall(r"REG:(\d+)", text)[0])
    spilled = sum(int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", text))
    loop = inner_loop(text)
    wide = sum("LDG" in line and ".128" in line for line in loop)
    loads, stores = (sum(name in line for line in loop) for name in ("LDG", "STG"))
    resident = min(MOST_THREADS // tiling.THREADS, REGISTERS // (-(-registers // 8) * 8 * tiling.THREADS))
    in_flight = resident * tiling.THREADS * 16 * loads
    needed = BANDWIDTH * LATENCY / MULTIPROCESSORS
    instructions = f"{len(loop) / (16 * (loads + stores)):.2f}"
    flight = f"{in_flight / 1024:.0f} KB, {in_flight / needed:.1f}x"
    return [f"{registers}", f"{spilled}", f"{wide} of {loads}", instructions, f"{resident}", flight]


def inner_loop(sass: str) -> list[str]:
    """Find the shortest loop, from the target of a backward branch to that branch, that has wide loads."""
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
    with h100():
        rows = [[name, f"{x}".removeprefix("torch."), *figures(code)] for x in DTYPES for name, code in compiled(x)]
    print(table([HEAD, *rows]))


if __name__ == "__main__":
    main()
