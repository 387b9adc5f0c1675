"""Timers, which wait for the device and leave out a warm-up."""

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
from torch.profiler import ProfilerActivity, profile

Call = Callable[[int], tuple[Tensor, ...]]  # returns the results; the number of the call chooses its inputs

WARM_UP = 4, 1  # turns that are not counted, on a GPU and on a CPU, after the calls that compile
LEAST, MOST = 5, 50  # of rounds
REPLAYS = 20
CLOCK = 2e9  # cycles a second of a fast GPU; a slower GPU sleeps longer than it has to
COPY_BYTES = 2**30


def synchronize(device: str) -> None:
    """Wait for the GPU, if the device is one."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads that PyTorch uses on the CPU inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Turn(NamedTuple):
    """The seconds of a call, as a mean over one turn."""

    wall: float
    own: float  # CPU time of all threads of the process, without other programs


def take_turns(
    calls: Mapping[str, Call],
    device: str,
    seconds: float,
    repeats: int,
    wait: bool = True,
    say: Callable[[str], object] = str,
) -> dict[str, list[Turn]]:
    """Measure every peer, round by round.

    In a round each peer has one turn, so that other load on the machine affects all peers alike, and each round begins
    with another peer. A turn is `repeats` calls and, with `wait`, one wait for the device at the end, as in training.
    Each call takes the next inputs. The rounds take `seconds` together, within limits. `say` gets the name of a peer
    before its turn.
    """
    number = itertools.count()

    def turn(name: str) -> Turn:
        call = calls[name]
        say(name)
        synchronize(device)
        wall, own = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call(next(number))
        if wait:
            synchronize(device)
        own, wall = time.process_time() - own, time.perf_counter() - wall
        return Turn(wall / repeats, own / repeats)

    warm = [sum(turn(name).wall for name in calls) * repeats for _ in range(WARM_UP[device == "cpu"])][-1]
    rounds = min(max(int(seconds / warm), LEAST), MOST)
    turns: dict[str, list[Turn]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name in order:
            turns[name].append(turn(name))
        order.append(order.pop(0))
    gc.enable()
    return turns


def held_bytes(forward: Callable[[], tuple[Tensor, ...]], device: str) -> int:
    """Measure the bytes that a forward leaves allocated for the backward, beyond its inputs and results.

    Hooks on saved tensors would change the measurement: with them fastreg writes no gradients ahead. On a CPU
    PyTorch's profiler reports the allocations of the calling thread, which runs forwards.
    """
    forward()
    gc.collect()  # now, so that nothing else is freed during the call
    if device == "cpu":
        results, allocated = allocations(forward)
        held = sum(allocated)
    else:
        before = torch.cuda.memory_allocated()
        results = forward()
        held = torch.cuda.memory_allocated() - before
    own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    return held - sum(own.values())


def page_faults(call: Call) -> int:
    """Count the page faults of one call."""
    for _ in range(2):  # the second call may reuse other blocks of memory than the first
        call(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def capture(call: Call, numbers: Sequence[int], stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    """Record one call for each of `numbers` in a CUDA graph, and restore the current stream, even after an error.

    A backward has to be captured on the stream of its forward.
    """
    stream = stream or torch.cuda.Stream()
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


def graph_seconds(call: Call, numbers: Sequence[int], stream: torch.cuda.Stream | None = None) -> float:
    """Measure the device seconds of a call without gaps between launches, in a CUDA graph of one call for each number.

    The device sleeps until the host has launched the replay, so that this launch is not counted.
    """
    graph = capture(call, numbers, stream)
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
    return statistics.median(times) / len(numbers)


def host_seconds(call: Call) -> float:
    """Measure the seconds until a call returns, with an idle device whose queue is never full."""
    turns = take_turns({"": call}, "cuda", 0.1, 5, wait=False)
    return statistics.median(turn.wall for turn in turns[""])


def launches(call: Call) -> int:
    """Count the kernels, copies and fills of one call, which are the nodes of its CUDA graph."""
    graph, count = capture(call, [0]), ctypes.c_size_t()
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


def allocations(call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], list[int]]:
    """Return the results of a call, and the bytes that each allocation on the CPU adds in order, negative if freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        results = call()
    profiler: Any = profiled.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return results, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@functools.cache
def copy_bandwidth() -> float:
    """Measure the bytes a second that a large copy on the GPU reads and writes."""
    return 2 * COPY_BYTES / copy_seconds(COPY_BYTES, [0] * 4)


def copy_seconds(size: int, numbers: Sequence[int]) -> float:
    """Measure the device seconds of a copy of so many bytes, with a pair of tensors for each value in `numbers`."""
    tensors = torch.empty(len({*numbers}), 2, size, dtype=torch.uint8, device="cuda")

    def copy(i: int) -> tuple[Tensor, ...]:
        source, target = tensors[i]
        return (target.copy_(source),)

    return graph_seconds(copy, numbers)
