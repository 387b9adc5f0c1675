"""The timers. All wait for the device, and leave out a warm-up."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Call = Callable[[int], tuple[Tensor, ...]]  # the number of the call chooses its inputs; returns the results

WARM_UP = 4, 1  # turns on a GPU and on a CPU, after calls that compile
LEAST, MOST = 5, 50  # rounds
REPLAYS = 20
CLOCK = 2e9  # cycles a second, about those of the slowest GPU; a slower clock sleeps longer than it has to
COPY_BYTES = 2**30


def synchronize(device: str) -> None:
    """Wait for a GPU; the CPU is always done."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch compute on so many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Turn(NamedTuple):
    """Seconds a call of one turn."""

    wall: float
    own: float  # of the process, all threads together, in which other programs do not count


def take_turns(
    calls: Mapping[str, Call], device: str, seconds: float, repeats: int, wait: bool = True
) -> dict[str, list[Turn]]:
    """Measure every peer, round by round.

    In a round each peer has one turn, so that whatever else the machine does hits all alike, and every round another
    begins. A turn is `repeats` calls and, with `wait`, one wait for the device at the end, as in training. Every call
    takes the next inputs. The rounds fill `seconds`, within limits.
    """
    number = itertools.count()

    def turn(call: Call) -> Turn:
        synchronize(device)
        wall, own = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call(next(number))
        if wait:
            synchronize(device)
        own, wall = time.process_time() - own, time.perf_counter() - wall
        return Turn(wall / repeats, own / repeats)

    warm = [sum(turn(call).wall for call in calls.values()) * repeats for _ in range(WARM_UP[device == "cpu"])][-1]
    rounds = min(max(int(seconds / warm), LEAST), MOST)
    turns: dict[str, list[Turn]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name in order:
            turns[name].append(turn(calls[name]))
        order.append(order.pop(0))
    gc.enable()
    return turns


class Replay:
    """A clock that stands still but for durations measured before.

    pytest-benchmark runs one benchmark after the other. The peers of a case take turns instead, and then each benchmark
    reads the durations of its peer from this clock.
    """

    now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def kept_bytes(call: Call, inputs: Sequence[Tensor]) -> int:
    """Return the bytes that a forward keeps for the backward, beyond its inputs and results."""
    kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no memory is handed out twice

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        results = call(0)
    for x in (*inputs, *results):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def page_faults(call: Call) -> int:
    """Count the pages of memory that one call gets from the system."""
    for _ in range(2):  # the second call may get other blocks than the first, between those that the first has left
        call(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def capture(call: Call, numbers: Sequence[int]) -> torch.cuda.CUDAGraph:
    """Record one call for each of `numbers` in a CUDA graph. The current stream stays so, even where that fails."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        call(numbers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    # torch.cuda.graph leaves its stream behind where the end of the capture raises
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        results = [call(i) for i in numbers]  # kept: each call writes its gradients to memory of its own
    del results
    return graph


def graph_seconds(call: Call, numbers: Sequence[int]) -> float:
    """Device seconds a call, without launch gaps: a CUDA graph of one call for each of `numbers`, replayed.

    The device sleeps until the host has launched the replay, so that the launch is not counted.
    """
    graph = capture(call, numbers)
    graph.replay()  # which instantiates it
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
    return statistics.median(times) / len(numbers)


def host_seconds(call: Call) -> float:
    """Seconds until a call returns, the device idle before and its queue never full."""
    turns = take_turns({"": call}, "cuda", 0.1, 5, wait=False)
    return statistics.median(turn.wall for turn in turns[""])


def launches(call: Call) -> int:
    """Count the kernels, copies and fills of one call: the nodes of its CUDA graph."""
    graph, count = capture(call, [0]), ctypes.c_size_t()
    # of the runtime that torch has loaded
    status = ctypes.CDLL(None).cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"cudaGraphGetNodes: error {status}")
    return count.value


def peak_bytes(call: Call, device: str) -> int | None:
    """Return the peak memory of one call beyond its inputs and results; `None` if it cannot be told.

    On a CPU PyTorch's profiler tells it, but of the calling thread alone.
    """
    call(0)
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            results = call(0)
        held = list(itertools.accumulate(allocations(profiled)))
        return max(held) - sum(x.nbytes for x in results) if held else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)


def allocations(profiled: Any) -> list[int]:
    """Bytes that were allocated, or with a minus freed, in order."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the GPU reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy(_: int) -> tuple[Tensor, ...]:
        return (target.copy_(source),)

    return 2 * source.nbytes / graph_seconds(copy, range(4))
