"""Figures of the kernels that need no GPU: `python -m bench.offline`.

Read from code compiled for an H100: registers, width of loads, instructions a byte, and, from the launch's plan,
programs a multiprocessor and halo rows for each shape. Calculated: the share of a copy's bandwidth that forward and
backward together should reach; `--beside RESULT` prints it beside the measured share instead. bench/NOTES.md draws the
conclusions; `bench.host` measures the time on the host.
"""

from __future__ import annotations

import argparse
import math
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

from bench.cases import SHAPES
from bench.report import BOTH, Result, load, table
from bench.stand_in import StandInDriver
from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.backends import TRITON, cpu_tensors_by
from fastreg.kernels import ar_tar as kernels
from fastreg.kernels import tiling
from fastreg.kernels.view import Operand, Operands, View
from fastreg.plans import forget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS, REGISTERS, MOST_THREADS = 132, 65536, 2048  # of an H100, the last two of each multiprocessor
BANDWIDTH, LATENCY = 3.35e12, 0.7e-6  # bytes a second by the datasheet; seconds, about, that a busy memory takes
COPY = {  # bytes a second that a copy moves, both ways together, and the source of the figure
    "T4": (0.29e12, "90% of the datasheet's 320 GB/s, a guess"),
    "L4": (0.27e12, "90% of the datasheet's 300 GB/s, a guess"),
    "A100": (1.4e12, "90% of the datasheet's 1555 GB/s (40 GB), a guess"),
    "H100": (3.0e12, "90% of the datasheet's 3350 GB/s, as https://github.com/Dao-AILab/quack measured"),
    "H200": (4.3e12, "90% of the datasheet's 4800 GB/s, measured"),
    "B200": (7.0e12, "88% of the datasheet's 8000 GB/s, a guess"),
}
FORWARD, BACKWARD = 4.6e-6, 2.5e-6  # seconds beyond the traffic: trips to memory in a row, and the ticket


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


def shape_row(shape: tuple[int, int, int], dtype: torch.dtype) -> list[str]:
    """Describe how a launch is cut, and predict the share of a copy's bandwidth on each device."""
    items, runs, run = cut(shape, dtype)
    return [
        f"{shape}",
        f"{dtype}".removeprefix("torch."),
        f"{items / MULTIPROCESSORS:.1f}",
        f"{runs} of {run}",
        f"{(runs - 1) / shape[1]:.1%}",
        *[f"{share(shape, dtype, copy):.0%}" for copy, _ in COPY.values()],
    ]


def cut(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the programs of a launch, the runs of a sequence and the time steps of a run."""
    batch, time_steps, hidden = shape
    view = View(batch, time_steps, hidden, Operands(*[Operand(dtype, time_steps * hidden, hidden)] * 4))
    *_, run, blocks, items = tiling.Tiling(view, torch.float32).numbers
    return items, items // blocks, run


def share(shape: tuple[int, int, int], dtype: torch.dtype, copy: float) -> float:
    """Predict the share of a copy's bandwidth that a forward that writes gradients and its backward reach together.

    Both tensors are read and both gradients written once, and raw's halo rows are read again. Only traffic counts, and
    the time that each launch takes beside it; not the last, half empty wave of programs, nor hits in the L2 cache.
    """
    _, runs, _ = cut(shape, dtype)
    traffic = 4 * math.prod(shape) * dtype.itemsize
    halo = (runs - 1) / shape[1] / 2
    return (traffic / copy) / (traffic * (1 + halo) / copy + FORWARD + BACKWARD)


def beside(result: Result) -> str:
    """Render the measured share of the copy beside the predicted, at the copy's bandwidth of the same run."""
    copy = result.machine["copy_bandwidth"]
    rows = [["shape, dtype", "of the copy, measured", "predicted"]]
    for case in result.of(BOTH):
        info = case.info["fastreg"]
        if info["layout"] == "batch first" and not info.get("same") and "share_of_copy" in info:
            predicted = share(tuple(info["shape"]), getattr(torch, info["dtype"]), copy)
            rows.append([case.label, f"{info['share_of_copy']:.0%}", f"{predicted:.0%}"])
    sources = "".join(f"- {name}: {copy / 1e12:.2f} TB/s, {source}\n" for name, (copy, source) in COPY.items())
    return f"A copy moves {copy / 1e12:.2f} TB/s in this run. Expected:\n\n{sources}\n{table(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.offline", description=__doc__)
    parser.add_argument("--beside", type=Path, metavar="RESULT", help="a JSON of a GPU that bench.run bench wrote")
    if file := parser.parse_args().beside:
        print(beside(load(file)))
        return
    chosen.set_active(StandInDriver(GPUTarget("cuda", 90, 32)))  # pyright: ignore[reportArgumentType]
    code = [["way", "dtype", "registers", "spilled", "wide loads", "instructions a byte", "fit", "in flight"]]
    shapes = [["shape", "dtype", "programs a multiprocessor", "runs", "halo reads of gradients", *COPY]]
    for dtype in (torch.float32, torch.bfloat16):
        code += code_rows(dtype)
        shapes += [shape_row(shape, dtype) for shape in SHAPES]
    print(table(code), table(shapes), sep="\n")


if __name__ == "__main__":
    main()
