"""Figures of a call beside its time: peak memory, launches, and the time in a CUDA graph."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.measure.timing import DEVICE

Call = Callable[[int], tuple[Tensor, ...]]  # returns the results; the number of the call chooses its inputs

REPLAYS = 20
CLOCK = 2e9  # cycles a second of a fast GPU; a slower GPU sleeps longer than it has to
COPY_BYTES = 2**30


def of(call: Call, sets: int, moved: int | None = None) -> dict[str, Any]:
    """Measure everything except the time of a call, which has so many sets of inputs, and must move so many bytes."""
    figures: dict[str, Any] = {"peak_bytes": peak_bytes(call, DEVICE)}
    if DEVICE == "cpu":
        return figures
    try:
        graph = capture(call, range(sets))
        seconds = replay_seconds(graph) / sets
        figures |= {"us_in_a_graph": 1e6 * seconds, "launches": nodes(graph) // sets}
        return figures | ({"share_of_copy": moved / seconds / copy_bandwidth()} if moved else {})
    except RuntimeError as error:  # the way cannot be captured
        return figures | {"no_graph": f"{error}".partition("\n")[0]}


def capture(call: Call, numbers: Sequence[int]) -> torch.cuda.CUDAGraph:
    """Record one call for each of `numbers` in a CUDA graph, and restore the current stream, even after an error."""
    stream = torch.cuda.Stream()  # of forward and backward
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(numbers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    # torch.cuda.graph does not restore the stream if the end of the capture raises
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
        results = [call(i) for i in numbers]  # kept, so that each call writes its gradients to other memory
    del results
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Measure the seconds of the device in a replay, without gaps between launches.

    The device sleeps until the host has launched the replay, so that this launch is not counted.
    """
    graph.replay()  # the first replay uploads the graph
    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    asleep = round(CLOCK * (1e-4 + 2 * (time.perf_counter() - began)))
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(asleep)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Count the kernels, copies and fills of a CUDA graph."""
    count = ctypes.c_size_t()
    # the functions of the CUDA runtime that torch has loaded
    status = ctypes.CDLL(None).cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"cudaGraphGetNodes: error {status}")
    return count.value


def peak_bytes(call: Call, device: str) -> int | None:
    """Measure the peak memory of one call beyond its inputs and results, in bytes; `None` if it cannot be measured.

    On a CPU PyTorch's profiler reports only the allocations of the calling thread.
    """
    call(0)
    if device == "cpu":
        results, allocated = allocations(lambda: call(0))
        return max(itertools.accumulate(allocated)) - sum(x.nbytes for x in results) if allocated else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)


def allocations(call: Callable[[], Any], device: str = "cpu") -> tuple[Any, list[int]]:
    """Return the result of a call, and the bytes that each allocation on a device adds in order, negative if freed."""
    with profile(activities=activities(device), profile_memory=True) as profiled:
        result = call()
    profiler: Any = profiled.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events = [event for event in events if event.device_type().name.lower() == device]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def counts(run: Callable[[AbstractContextManager[Any]], object]) -> dict[str, int]:
    """Count the operators that PyTorch's dispatcher runs between the entrance and the exit of a context given to `run`.

    Operators that another one calls are not counted. On a GPU launches are: kernels, copies and fills.
    """
    profiled = profile(activities=activities(DEVICE))
    run(profiled)
    events: Any = profiled.events()
    found = {"operators": sum(event.name.startswith("aten::") and not is_inside_operator(event) for event in events)}
    launches = {"launches": sum(bool(re.match(r"cu(da)?(Launch|Memcpy|Memset)", event.name)) for event in events)}
    return found | (launches if DEVICE == "cuda" else {})


def is_inside_operator(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or is_inside_operator(parent))


def activities(device: str) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")


@functools.cache
def copy_bandwidth() -> float:
    """Measure the bytes a second that a large copy on the GPU reads and writes."""
    source, target = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device="cuda")
    return 2 * COPY_BYTES * 4 / replay_seconds(capture(lambda _: (target.copy_(source),), [0] * 4))
