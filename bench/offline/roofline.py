"""Predictions of the kernels' speed that need no GPU: `python -m bench.offline.roofline`.

bench/on_gpu.ipynb shows them beside the measurement, and bench/NOTES.md draws the conclusions.
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path

import torch

from bench.measure import lines
from bench.measure.report import table
from bench.measure.results import BOTH, Result, result_of
from fastreg.kernels import tiling
from fastreg.kernels.view import Operand, Operands, View

DTYPES = torch.float32, torch.bfloat16
SHAPES = [(64, 70, 400), (64, 70, 1152), (32, 512, 1024), (128, 512, 1024), (8, 4096, 2048)]
MULTIPROCESSORS = 132  # an H100 has so many
COPY = {  # bytes that a copy reads and writes in a second, and the source of the figure
    "T4": (0.29e12, "90% of the datasheet's 320 GB/s, a guess"),
    "L4": (0.27e12, "90% of the datasheet's 300 GB/s, a guess"),
    "A100": (1.4e12, "90% of the datasheet's 1555 GB/s (40 GB), a guess"),
    "H100": (3.0e12, "90% of the datasheet's 3350 GB/s, as https://github.com/Dao-AILab/quack measured"),
    "H200": (4.3e12, "90% of the datasheet's 4800 GB/s, measured"),
    "B200": (7.0e12, "88% of the datasheet's 8000 GB/s, a guess"),
}
FORWARD, BACKWARD = 4.6e-6, 2.5e-6  # seconds that a launch takes beside its traffic, for latencies and the ticket
PASSES = 6  # raw and dropped are read twice, and both gradients are written


def cut(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the items of a launch, the stretches of a sequence and the time steps of a stretch."""
    batch, time_steps, hidden = shape
    view = View(batch, time_steps, hidden, Operands(*[Operand(dtype, time_steps * hidden, hidden)] * 4))
    *_, stretch, blocks, items = tiling.Tiling(view, torch.float32).numbers
    return items, items // blocks, stretch


def share(shape: tuple[int, int, int], dtype: torch.dtype, copy: float) -> float:
    """Predict the share of a copy's bandwidth that a forward and its backward reach together.

    Both read both tensors, and raw's halo rows once more; the backward writes both gradients. The model counts
    this traffic and a constant time for each launch. It ignores hits in the L2 cache, and that the last programs do not
    fill the GPU.
    """
    _, stretches, _ = cut(shape, dtype)
    traffic = PASSES * math.prod(shape) * dtype.itemsize
    halo = 3 * (stretches - 1) / shape[1] / PASSES  # one row a stretch forward, and two backward
    return (traffic / copy) / (traffic * (1 + halo) / copy + FORWARD + BACKWARD)


def beside(result: Result) -> str:
    """Render the measured share of a copy's bandwidth beside the prediction for the copy of the same run."""
    copy = result.machine["copy_bandwidth"]
    rows = [["shape, dtype", "of the copy, measured", "predicted"]]
    for case in result.of(BOTH):
        info, own = case.info, case.ways["fastreg"]
        if info["layout"] == "batch first" and "share_of_copy" in own:
            predicted = share(tuple(info["shape"]), getattr(torch, info["dtype"]), copy)
            rows.append([case.label, f"{own['share_of_copy']:.0%}", f"{predicted:.0%}"])
    sources = "".join(f"- {name}: {copy / 1e12:.2f} TB/s, {source}\n" for name, (copy, source) in COPY.items())
    return f"A copy moves {copy / 1e12:.2f} TB/s in this run. Expected:\n\n{sources}\n{table(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.offline.roofline", description=__doc__)
    parser.add_argument("result", nargs="?", type=Path, help="lines of a GPU, to show beside the prediction")
    if file := parser.parse_args().result:
        print(beside(result_of(lines.read(file))))
        return
    rows = [["shape", "dtype", "programs a multiprocessor", "stretches", "halo rows of a backward", *COPY]]
    for dtype, shape in product(DTYPES, SHAPES):
        items, stretches, stretch = cut(shape, dtype)
        halo = 2 * (stretches - 1) / shape[1]
        figures = f"{items / MULTIPROCESSORS:.1f}", f"{stretches} of {stretch}", f"{halo:.1%}"
        shares = [f"{share(shape, dtype, copy):.0%}" for copy, _ in COPY.values()]
        rows.append([f"{shape}", f"{dtype}".removeprefix("torch."), *figures, *shares])
    print(table(rows))


if __name__ == "__main__":
    main()
