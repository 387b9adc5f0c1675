"""Hooks that record the machine, the commit and the missing cases beside the figures of a result."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from bench import benchmarks, machine, timing

MISSING = pytest.StashKey[dict[str, benchmarks.Missing]]()  # by case


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=math.inf, help="begin no case after them")
    parser.addoption("--commit", default="", help="what is measured, where there is no git to tell")


def case_and_peer(item: Any) -> tuple[str, str]:
    """Name the group and the peer of a benchmark."""
    values = item.callspec.params
    return benchmarks.group_of(values["case"]), values["peer"]


def pytest_collection_finish(session: pytest.Session) -> None:
    missing = session.config.stash[MISSING] = {}
    for group, peer in map(case_and_peer, session.items):
        missing.setdefault(group, {})[peer] = "not reached"


@pytest.fixture(scope="session")
def deadline(request: pytest.FixtureRequest) -> float:
    if benchmarks.DEVICE == "cuda":
        timing.copy_bandwidth()  # measured now, as nothing can be measured once a kernel has failed
    seconds: Any = request.config.getoption("--seconds")
    return time.monotonic() + seconds


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Record why a peer is missing, if it is."""
    group, peer = case_and_peer(item)
    missing = item.config.stash[MISSING][group]
    if call.excinfo is not None:
        missing[peer] = str(call.excinfo.value)
    elif call.when == "call":
        del missing[peer]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info |= machine.facts()
    if benchmarks.DEVICE == "cuda":
        machine_info["copy_bandwidth"] = timing.copy_bandwidth()
    else:
        machine_info["threads"] = torch.get_num_threads()


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    if commit := config.getoption("--commit"):
        commit_info["id"] = commit


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["missing"] = {group: peers for group, peers in config.stash[MISSING].items() if peers}
