"""The groups of pytest-benchmark, one for each case, and the clock by which it gets the turns of a peer."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from bench.measure import cases, machine
from bench.measure.benchmarks import DEVICE

# PyTorch's allocator serves a GPU; a CPU's cases are measured with each setting of the system's.
ALLOCATORS: dict[str | None, dict[str, str]] = {None: {}} if DEVICE == "cuda" else {**machine.ALLOCATORS}


class Group(NamedTuple):
    """A case, and on a CPU the setting of the allocator."""

    case: cases.Case
    allocator: str | None

    def __str__(self) -> str:
        return f"{self.case} ({self.allocator})" if self.allocator == machine.DEFAULT else str(self.case)

    @property
    def info(self) -> dict[str, Any]:
        """Return the facts that all rows of the group share."""
        return {key: value for key, value in (self.case.info | {"allocator": self.allocator}).items() if value}


class Clock:
    """A clock that goes on when a measured turn is replayed.

    Peers are measured in turns, so that other load on the machine affects them alike. pytest-benchmark has no turns: it
    gets the seconds of one peer after the other, and its JSON names this clock.
    """

    now, __name__ = 0.0, "replay of measured turns"

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()
_groups = [Group(case, allocator) for allocator in ALLOCATORS for case in cases.all_cases(DEVICE, allocator)]
GROUPS = {str(group): group for group in _groups}
HEADLINE = {str(group): group for group in _groups if group.case in cases.HEADLINE}


def row_of_each_peer(groups: dict[str, Group]) -> pytest.MarkDecorator:
    """Return the mark of a test that reports the row of each peer of some groups."""
    return pytest.mark.parametrize(
        ("group", "peer"), [(name, peer) for name, group in groups.items() for peer in group.case.PEERS]
    )
