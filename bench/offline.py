"""What can be said of the kernels without a GPU: `python -m bench.offline`.

Read from code compiled for an H100: registers, width of loads, instructions a byte, and, from the launch's plan,
programs a multiprocessor and halo rows for each shape. Measured on this machine: what a call costs in Python, its
launches going to a driver that makes none. bench/NOTES.md says what was learned from both.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.cases import SHAPES
from bench.report import table
from bench.stand_in import StandInDriver
from fastreg import fused_ar_tar, penalty
from fastreg.kernels import penalty as kernels
from fastreg.kernels import tiling
from fastreg.kernels.reduction import ticket_for
from fastreg.layout import canonical, check_coefficient, check_flags, check_layers, check_reduction
from fastreg.reference import Steps, divisors

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS, REGISTERS, MOST_THREADS = 132, 65536, 2048  # of an H100, the last two of each multiprocessor
BANDWIDTH, LATENCY = 3.35e12, 0.7e-6  # bytes a second by the datasheet; seconds, about, that a busy memory takes


def compile_all(dtype: torch.dtype, same: bool) -> dict[str, Any]:
    """Both kernels as a call on an H100 would compile them."""
    compiled = {}
    raw, dropped = (torch.zeros(4, 70, 400, dtype=dtype, requires_grad=True) for _ in range(2))
    for kernel in (kernels.penalty_forward, kernels.penalty_backward):
        kernel.device_caches.clear()
    fused_ar_tar(raw, raw if same else dropped, 2.0, 1.0).backward()
    for name in ("penalty_forward", "penalty_backward"):
        (compiled[name],) = getattr(kernels, name).device_caches[0][0].values()
    return compiled


def code_row(name: str, binary: Any, dtype: torch.dtype, same: bool) -> list[str]:
    """One kernel: registers, bytes spilled, loads of 16 bytes in the inner loop, its instructions for each byte that
    a thread moves, programs that fit on a multiprocessor, and what they have in flight, over what Little's law asks.
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
        name.removeprefix("penalty_") + (", raw is dropped" if same else ""),
        f"{dtype}".removeprefix("torch."),
        f"{registers}",
        f"{spilled}",
        f"{wide} of {loads}",
        f"{len(loop) / moved:.2f}",
        f"{resident}",
        f"{in_flight / 1024:.0f} KB, {in_flight / needed:.1f}x",
    ]


def inner_loop(sass: str) -> list[str]:
    """From the target of a branch back to that branch: the shortest such loop with wide loads."""
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
    """How a launch is cut."""
    batch, time_steps, hidden = shape
    x = torch.empty(0, dtype=dtype)
    plan = tiling.Plan((batch, time_steps, hidden), [(time_steps * hidden, hidden)] * 2, (x, x), torch.float32)
    runs = plan.items // plan.blocks
    return [
        f"{shape}",
        f"{dtype}".removeprefix("torch."),
        f"{plan.items}",
        f"{plan.items / MULTIPROCESSORS:.1f}",
        f"{runs} of {plan.run}",
        # of all reads: raw is one of two tensors read
        f"{(runs - 1) / time_steps / 2:.1%}",
        f"{2 * (runs - 1) / time_steps / 2:.1%}",
    ]


def microseconds(call: Callable[[], object]) -> float:
    """Of a call, the median over rounds; the thread's own time, which other programs do not add to."""
    rounds = []
    for _ in range(30):
        start = time.thread_time()
        for _ in range(100):
            call()
        rounds.append((time.thread_time() - start) / 100)
    return 1e6 * statistics.median(rounds)


def host_rows() -> list[list[str]]:
    """What a call costs in Python, in all and by part."""
    raw, dropped = (torch.zeros(4, 32, 64, requires_grad=True) for _ in range(2))
    plain = raw.detach(), dropped.detach()
    one = torch.ones(())
    sizes, _, strides = canonical(plain, Steps())
    gradients = torch.zeros_like(raw), torch.zeros_like(raw)
    four = *plain, *gradients
    _, _, four_strides = canonical(four, Steps())
    cpu = torch.device("cpu")

    def forward() -> Tensor:
        return fused_ar_tar(raw, dropped, 2.0, 1.0)

    def both() -> object:
        return torch.autograd.grad(fused_ar_tar(raw, dropped, 2.0, 1.0), (raw, dropped), one)

    def checks() -> object:
        for name, value in (("alpha", 2.0), ("beta", 1.0)):
            check_coefficient(name, value)
        check_flags(batch_first=True, return_terms=False)
        check_reduction("mean")
        return check_layers(raw, dropped, 2.0, 1.0)

    def allocate() -> object:
        return torch.empty((), device=cpu), torch.empty(100, device=cpu)

    def around() -> None:
        with tiling.current_device(cpu):
            ticket_for(cpu)

    def launch_forward() -> object:
        return kernels.forward(*plain, False, sizes, strides, None, None, 2.0, 1.0, (1, 1))

    def launch_backward() -> object:
        return kernels.backward(one, *plain, *gradients, False, sizes, four_strides, None, None, None, 1.0, 1.0)

    def plan() -> object:
        return tiling.Plan(sizes, strides, plain, torch.float32)

    def plan_backward() -> object:
        return tiling.Plan(sizes, four_strides, plain, torch.float32)

    parts: dict[str, Callable[[], object]] = {
        "forward + backward": both,
        "forward, no gradient needed": lambda: fused_ar_tar(*plain, 2.0, 1.0),
        "forward": forward,
        "checks of the arguments": checks,
        "canonical() and divisors(), forward": lambda: (canonical(plain, Steps()), divisors(raw, Steps(), "mean")),
        "canonical() and divisors(), backward": lambda: (canonical(four, Steps()), divisors(raw, Steps(), "mean")),
        "Plan, forward": plan,
        "Plan, backward": plan_backward,
        "two allocations, forward": allocate,
        "two gradients allocated": lambda: (torch.empty_like(raw), torch.empty_like(raw)),
        "ticket and current device": around,
        "kernels.forward in all": launch_forward,
        "kernels.backward in all": launch_backward,
    }
    took = {name: microseconds(call) for name, call in parts.items()}
    took["Triton's launch, forward"] = took["kernels.forward in all"] - sum(
        took[part] for part in ("Plan, forward", "two allocations, forward", "ticket and current device")
    )
    took["Triton's launch, backward"] = took["kernels.backward in all"] - took["Plan, backward"]
    took["autograd Function, forward"] = took["forward"] - took["forward, no gradient needed"]
    return [[name, f"{us:.1f}"] for name, us in took.items()]


def main() -> None:
    driver._active = StandInDriver(GPUTarget("cuda", 90, 32))  # pyright: ignore[reportAttributeAccessIssue]
    penalty.RUNNERS["cpu"] = kernels
    code = [["kernel", "dtype", "registers", "spilled", "wide loads", "instructions a byte", "fit", "in flight"]]
    cut = [["shape", "dtype", "items", "a multiprocessor", "runs", "halo reads forward", "backward"]]
    for dtype in (torch.float32, torch.bfloat16):
        for same in (False, True):
            code += [code_row(name, binary, dtype, same) for name, binary in compile_all(dtype, same).items()]
        cut += [shape_row(shape, dtype) for shape in SHAPES]
    print(table(code), table(cut), table([["host", "us"], *host_rows()]), sep="\n")


if __name__ == "__main__":
    main()
