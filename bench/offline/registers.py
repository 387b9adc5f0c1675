"""Figures of the code that Triton compiles for an H100, which need no GPU: `python -m bench.offline.registers`.

bench/NOTES.md draws the conclusions, and tests/kernels/test_compiled.py bounds registers, spills and widths of loads.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from bench.measure.report import table
from bench.offline.roofline import DTYPES
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.key import PLANS
from fastreg.kernels import tiling
from fastreg.kernels.ar_tar import ar_tar_kernel
from tests.kernels.stand_in import h100

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS, MOST_THREADS = 65536, 2048  # a multiprocessor has so many
HEAD = ["hidden", "way", "dtype", "registers", "spilled", "wide loads", "instructions a byte", "fit", "in flight"]
WIDE, NARROW = 400, 1150  # hidden sizes whose loads have 16 bytes, and two elements


def compiled(dtype: torch.dtype, hidden: int) -> Iterator[tuple[str, Any]]:
    """Compile each variant of the kernel, as calls on an H100 would, and name it."""
    raw, dropped = (torch.zeros(4, 70, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    valid = torch.ones(4, 70, dtype=torch.bool)

    def penalty(**options: Any) -> None:
        fused_ar_tar(raw, dropped, 2.0, 1.0, **options).backward()

    def dropout(**options: Any) -> None:
        results = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, **options)
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])

    calls = {
        ("sum", "write"): penalty,
        ("sum, valid", "write, valid"): lambda: penalty(valid=valid),
        ("dropout", "dropout, backward"): dropout,
        ("dropout, drawn", "dropout, drawn, backward"): lambda: dropout(locked=False),
        ("dropout, valid", "dropout, valid, backward"): lambda: dropout(valid=valid),
    }
    for names, call in calls.items():
        ar_tar_kernel.device_caches.clear()
        PLANS.clear()
        call()
        yield from zip(names, ar_tar_kernel.device_caches[0][0].values(), strict=True)


def figures(binary: Any) -> list[str]:
    """Describe the code of one kernel, as HEAD says; instructions and loads are those of its inner loop."""
    text = usage_of(binary, "-sass")
    registers = int(re.findall(r"REG:(\d+)", text)[0])
    spilled = sum(int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", text))
    loop = max(inner_loops(text), key=lambda loop: sum(width_of(line) for line in loop if "LDG" in line))  # the walk
    wide = sum("LDG" in line and ".128" in line for line in loop)
    loads, stores = ([width_of(line) for line in loop if name in line] for name in ("LDG", "STG"))
    resident = min(MOST_THREADS // tiling.THREADS, REGISTERS // (-(-registers // 8) * 8 * tiling.THREADS))
    instructions = f"{len(loop) / sum(loads + stores):.2f}"
    flight = f"{resident * tiling.THREADS * sum(loads) / 1024:.0f} KB"
    return [f"{registers}", f"{spilled}", f"{wide} of {len(loads)}", instructions, f"{resident}", flight]


def width_of(line: str) -> int:
    """Return the bytes that an instruction loads or stores for a thread."""
    found = re.search(r"\.(128|64|U16|U8)\b", line)
    return {"128": 16, "64": 8, "U16": 2, "U8": 1}[found[1]] if found else 4


def usage_of(binary: Any, *options: str) -> str:
    """Return registers and memory of a thread from cuobjdump; with `-sass` the instructions, too, which takes long."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", *options, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inner_loops(sass: str) -> list[list[str]]:
    """Return the instructions of each loop that contains no other loop.

    A loop begins at the target of a branch backward, and ends with that branch.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/;]+);", sass)]
    jumps = [(at, int(to[1], 16)) for at, text in code if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [(to, at) for at, to in jumps if to < at]
    inner = [(x, y) for x, y in loops if not any(x <= a and b <= y for a, b in loops if (a, b) != (x, y))]
    return [[text for at, text in code if x <= at <= y] for x, y in inner]


def main() -> None:
    argparse.ArgumentParser(prog="bench.offline.registers", description=__doc__).parse_args()
    with h100():
        rows = [
            [f"{hidden}", way, f"{dtype}".removeprefix("torch."), *figures(code)]
            for hidden, dtype in product((WIDE, NARROW), DTYPES)
            for way, code in compiled(dtype, hidden)
        ]
    print(f"Triton {triton.__version__}\n")
    print(table([HEAD, *rows]))


if __name__ == "__main__":
    main()
