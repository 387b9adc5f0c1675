"""Turns: how the ways of a case are timed, and compared with each other."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_ROUNDS = 50
MOST_WAITING = 0.1  # of a turn's time, that a thread may wait for a core before the machine counts as busy
Call = Callable[[], Any]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads that PyTorch uses on the CPU inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize() -> None:
    """Wait until the GPU has done its work, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Turn(NamedTuple):
    """The seconds of one call, as a mean over a turn."""

    wall: float  # the time that passed
    own: float  # the CPU time of all threads of the process, without other programs
    waiting: float  # how long threads that were ready to run waited for a core, because other programs had it


class Watch:
    """Measure a turn: `with Watch() as watch` around its calls, and then `watch.turn(calls)`."""

    def __enter__(self) -> Watch:
        synchronize()
        self.began = seconds_waiting(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize()
        now = seconds_waiting(), time.process_time(), time.perf_counter()
        self.passed = [end - begin for end, begin in zip(now, self.began, strict=True)]

    def turn(self, calls: int) -> Turn:
        """Return the seconds of one of so many calls."""
        waited, own, wall = self.passed
        # A thread computes at any time of a turn on the CPU. On a GPU the host may wait.
        waited = max(waited, wall - own) if DEVICE == "cpu" else waited
        return Turn(*(seconds / calls for seconds in (wall, own, waited)))


class Rounds(NamedTuple):
    """How long turns are and how many there are."""

    calls: int  # of a turn, which waits for the device once, at its end
    seconds: float  # that the rounds of all ways take together
    least: int = 5  # rounds, whatever they take


def take_turns(ways: Mapping[str, Call], rounds: Rounds, say: Callable[[str], object] = str) -> dict[str, list[Turn]]:
    """Measure all ways round by round, and return the turns of each.

    In a round each way has one turn, so that other load affects all alike, and no way finds the memory in the cache
    that it has just freed. Each round begins with another way. The first one is not counted. `say` gets the name of a
    way before its turn. A way that returns a `Turn` has measured its turn itself.
    """

    def turn(way: str) -> Turn:
        call, result = ways[way], None
        say(way)
        with Watch() as watch:
            for _ in range(rounds.calls):
                result = call()
        return result if isinstance(result, Turn) else watch.turn(rounds.calls)

    began = time.perf_counter()
    for way in ways:
        turn(way)
    first = time.perf_counter() - began
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    order = list(ways)
    gc.collect()
    gc.disable()
    try:
        for _ in range(min(max(int(rounds.seconds / first), rounds.least), MOST_ROUNDS)):
            for way in order:
                turns[way].append(turn(way))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return turns


def seconds_waiting() -> float:
    """Return how long the threads of this process have waited for a core until now; 0 where the system does not say."""
    waited = 0
    with suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError), open(f"/proc/self/task/{thread}/schedstat") as file:  # a thread may have ended
                waited += int(file.read().split()[1])
    return waited / 1e9


def share_waiting(turns: list[Turn]) -> float:
    """Return the share of the wall time during which a thread waited for a core, as a median over turns."""
    return statistics.median(turn.waiting / turn.wall for turn in turns)


def compared(seconds: Mapping[str, list[float]], way: str) -> dict[str, list[float]]:
    """Return the ratios of a way's times to those of each other way, by pairs of turns of a round."""
    others = {other: zip(seconds[way], seconds[other], strict=True) for other in seconds if other != way}
    return {other: median_and_error([x / y for x, y in pairs]) for other, pairs in others.items()}


def median_and_error(values: list[float]) -> list[float]:
    """Return the median and its standard error, as of normal values.

    That is the interquartile range over 1.349, which estimates the standard deviation, times sqrt(pi / 2) over the root
    of the count.
    """
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return [median, math.sqrt(math.pi / 2) * (high - low) / 1.349 / math.sqrt(len(values))]
