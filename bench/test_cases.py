"""All benchmarks, for pytest-benchmark: a case is a group, and each of its peers a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.measure.groups import CLOCK, GROUPS, row_of_each_peer


@pytest.mark.benchmark(timer=CLOCK)
@row_of_each_peer(GROUPS)
def test_case(row: Callable[[], None]) -> None:
    row()
