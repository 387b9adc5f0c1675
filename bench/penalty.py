"""The penalty, forward and backward, against the formula as fastai writes it.

    python -m bench.penalty

Prints a Markdown table. The versions compared take turns, so that whatever else the machine does hits all alike;
times are medians of whole calls, host time included, with the device synchronised.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastreg import fused_ar_tar

SHAPES = [(64, 70, 400), (64, 70, 1152), (128, 512, 1024)]
DTYPES = [torch.float32, torch.bfloat16]


def eager(raw: Tensor, dropped: Tensor, alpha: float, beta: float) -> Tensor:
    """AR and TAR as fastai's RNNRegularizer adds them to the loss."""
    ar = alpha * dropped.float().pow(2).mean() if alpha else 0.0
    tar = beta * (raw[:, 1:] - raw[:, :-1]).float().pow(2).mean() if beta else 0.0
    return torch.as_tensor(ar + tar)


def milliseconds(calls: dict[str, Callable[..., Tensor]], leaves: tuple[Tensor, ...], rounds: int) -> list[float]:
    """The median time of a forward and a backward of each call."""
    cuda = leaves[0].is_cuda
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            for x in leaves:
                x.grad = None
            start = time.perf_counter()
            call(*leaves, 2.0, 1.0).backward()
            if cuda:
                torch.cuda.synchronize()
            if turn >= 3:  # the first turns warm up and compile
                times[name].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times[name]) for name in calls]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy on the GPU reads and writes, in TB/s."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / statistics.median(times) / 1e9


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name()}; a copy moves {copy_bandwidth(device):.2f} TB/s"
    else:
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
        where = f"{platform.machine()} CPU, {threads}, the default allocator"
    print(f"Measured on: {where}; PyTorch {torch.__version__}.\n")
    calls: dict[str, Callable[..., Tensor]] = {
        "eager": eager,
        "compiled": torch.compile(eager),
        "fastreg": fused_ar_tar,
    }
    columns = ["shape", "dtype", *(f"{name}, ms" for name in calls), "against eager", "against compiled"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for shape in SHAPES:
        for dtype in DTYPES:
            leaves = tuple(torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
            rounds = 7 if device.type == "cpu" and leaves[0].numel() > 2**24 else 50
            times = milliseconds(calls, leaves, rounds)
            cells = [f"{shape}", f"{dtype}".removeprefix("torch."), *(f"{ms:.3g}" for ms in times)]
            print("| " + " | ".join([*cells, *(f"{ms / times[-1]:.1f}x" for ms in times[:-1])]) + " |", flush=True)


if __name__ == "__main__":
    main()
