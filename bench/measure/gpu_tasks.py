"""The tasks of the first minutes on a GPU, which workers do for bench/test_first.py:

smoke    compares penalty and gradients with the formula in float64
order    compares the bits of many launches, beside another kernel that fills the GPU
sweep    measures one setting of the constants by the time of CUDA graphs
compile  compiles the kernels of a setting for Triton's cache on disk
clocks   asks nvidia-smi for driver and clocks
ncu      profiles forward and backward by Nsight Compute

Smoke and order check themselves, because a device that computes nothing finds all values equal. Their verdict is
"right" only if a known sum is right, and a wrong value that they plant is noticed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import cases
from bench.measure.formulas import ALPHA, BETA
from bench.measure.timing import Call, graph_seconds
from bench.measure.worker import ROOT, Say
from fastreg.call.backends import PLANS
from fastreg.kernels import tiling

DTYPES = "bfloat16", "float32"
SMALL, LARGE = ((64, 70, 400), (20, 70, 1152)), ((128, 512, 1024), (32, 512, 1024))
SUM_ERROR = 4e-6  # of a penalty, relative
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
CALLS, REPLAYS = 50, 1000  # of a graph: two launches a call make 100,000
NOISE, NOISES = 2**26, 16  # elements that another kernel writes meanwhile, and how often it does so in a replay
NCU = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")  # sections of a profile
NOT_THERE = "not there"


class Setting(NamedTuple):
    """A penalty's dtype and shape, and the values of the constants in kernels/tiling.py."""

    dtype: str
    shape: tuple[int, int, int]
    short_run: int = 16
    programs: int = 1024

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.dtype} {shape} SHORT_RUN={self.short_run} PROGRAMS={self.programs}"

    def apply(self) -> cases.PenaltyCase:
        """Set the constants of this process, and return the case."""
        tiling.SHORT_RUN, tiling.PROGRAMS = self.short_run, self.programs
        PLANS.clear()
        return cases.PenaltyCase(self.shape, getattr(torch, self.dtype))


def smoke_settings() -> Iterator[Setting]:
    """List the headline cases, with two values of the constant that a sweep is to choose for them."""
    for shape, dtype, run in itertools.product((SMALL[0], LARGE[0]), DTYPES, (16, 4)):
        yield Setting(dtype, shape, run)


def order_settings() -> Iterator[Setting]:
    """List the settings whose launches are compared."""
    yield from (Setting(dtype, SMALL[0], *values) for dtype in DTYPES for values in ((), (4,)))


def sweep_settings() -> Iterator[Setting]:
    """List the settings to measure: shorter runs where programs are few, and whole waves where programs are many."""
    for shapes, runs, programs in ((SMALL, (16, 8, 4), (1024,)), (LARGE, (16,), (1024, 792, 528))):
        for shape, dtype, *values in itertools.product(shapes, DTYPES, runs, programs):
            yield Setting(dtype, shape, *values)


def compile_settings() -> Iterator[Setting]:
    """List a setting for each code that the others run."""
    yield from (Setting(dtype, SMALL[0]) for dtype in DTYPES)


def computes() -> bool:
    """Return whether the device computes a known sum."""
    return torch.arange(5, device="cuda").sum().item() == 10


def smoke(say: Say, setting: Setting) -> dict[str, Any]:
    """Compare the penalty and both gradients, after a right and a wrong prediction, with the formula in float64."""
    case = setting.apply()
    raw, dropped = case.inputs("cuda")
    doubles = [x.detach().double().requires_grad_() for x in (raw, dropped)]
    exact = ALPHA * doubles[1].pow(2).mean() + BETA * (doubles[0][:, 1:] - doubles[0][:, :-1]).pow(2).mean()
    slopes = torch.autograd.grad(exact, doubles)
    info = torch.finfo(case.dtype)
    most = 8 * info.eps if case.dtype == torch.float32 else info.eps  # of a gradient, relative to the greatest
    errors: dict[str, float] = {}
    noticed = True
    for upstream in (1.0, 1.0, 2.0):  # the second prediction is right, and the third one wrong
        penalty = case.ways()[1](raw, dropped)
        got = torch.autograd.grad(penalty, (raw, dropped), torch.full_like(penalty, upstream))
        errors[f"penalty, {upstream}"] = error_of(penalty.detach(), exact.detach()) / SUM_ERROR
        for name, x, slope in zip(("raw", "dropped"), got, slopes, strict=True):
            errors[f"{name}, {upstream}"] = error_of(x, upstream * slope) / most
            x.view(-1)[x.numel() // 2 :][:1] += 0.1 * slope.abs().max() * upstream  # the planted wrong value
            noticed &= error_of(x, upstream * slope) > most
    within = all(error <= 1 for error in errors.values())  # which a NaN is not
    right = computes() and within and noticed
    return {"errors": errors, "noticed": noticed, "verdict": "right" if right else "wrong"}


def error_of(got: Tensor, want: Tensor) -> float:
    """Return the greatest difference, relative to the greatest value."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def order(say: Say, setting: Setting) -> dict[str, Any]:
    """Count the results that differ in any bit from the first call, in replays of a graph, beside another kernel."""
    case = setting.apply()
    raw, dropped = case.inputs("cuda")

    def call() -> list[Tensor]:
        penalty = case.ways()[1](raw, dropped)
        return [penalty.detach(), *torch.autograd.grad(penalty, (raw, dropped), torch.ones_like(penalty))]

    call()
    first = [x.clone() for x in call()]  # by the code that is launched directly
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    graph, noise = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            for x, y in zip(call(), first, strict=True):
                wrong += (x.view(BITS[x.dtype]) != y.view(BITS[y.dtype])).any()
    other = torch.zeros(NOISE, device="cuda")
    torch.cuda.synchronize()
    for _ in range(REPLAYS):
        graph.replay()
        with torch.cuda.stream(noise):
            for _ in range(NOISES):
                other.add_(1.0)
    torch.cuda.synchronize()
    found = int(wrong.item())
    first[1].view(BITS[case.dtype]).view(-1)[:1] ^= 1  # the planted wrong bit
    graph.replay()
    noticed = int(wrong.item()) == found + CALLS
    right = computes() and found == 0 and noticed
    launches = 2 * CALLS * REPLAYS
    return {"launches": launches, "wrong": found, "noticed": noticed, "verdict": "right" if right else "wrong"}


def sweep(say: Say, setting: Setting) -> dict[str, Any]:
    """Measure the forward that writes gradients, and forward and backward, with inputs in turns."""
    forward, both, sets = calls(setting)
    numbers = range(len(sets))
    return {"forward_us": 1e6 * graph_seconds(forward, numbers), "both_us": 1e6 * graph_seconds(both, numbers)}


def calls(setting: Setting) -> tuple[Call, Call, list[tuple[Tensor, ...]]]:
    """Return the call of a forward, the call of forward and backward, and their inputs."""
    case = setting.apply()
    sets, way = cases.input_sets(case, "cuda"), case.ways()[1]
    return lambda i: case.forward(way, sets[i % len(sets)]), case.call(way, sets), sets


def compile_(say: Say, setting: Setting) -> dict[str, Any]:
    """Compile the code of forward and backward."""
    calls(setting)[1](0)
    torch.cuda.synchronize()
    return {}


def clocks(say: Say) -> dict[str, Any]:
    """Describe the device."""
    facts = torch.cuda.get_device_properties(0)
    queried = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    found = output_of(["nvidia-smi", f"--query-gpu={queried}", "--format=csv"])
    return {"properties": f"{facts}", "cuda": torch.version.cuda, "nvidia-smi": found}


def ncu(say: Say) -> dict[str, Any]:
    """Profile two calls of the smallest headline case, which another process makes."""
    path = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin:/opt/nvidia/nsight-compute"
    program = shutil.which("ncu", path=path)
    if program is None:
        return {"ncu": NOT_THERE}
    sections = [word for section in NCU for word in ("--section", section)]
    call = "from bench.measure.gpu_tasks import *; compile_(str, Setting(DTYPES[0], SMALL[0]))"
    profiled = [sys.executable, "-c", call]
    return {"ncu": output_of([program, *sections, "-k", "regex:ar_tar_kernel", "-c", "4", *profiled])}


def output_of(command: list[str]) -> str:
    """Run a program, and return the end of its output."""
    if shutil.which(command[0]) is None:
        return NOT_THERE
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout[-12000:]
