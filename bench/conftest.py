"""Facts of a result besides its figures: the machine, the commit, and the missing cases."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from typing import Any

import pytest
import torch

from bench import benchmarks, machine

MISSING = pytest.StashKey[dict[str, dict[str, str]]]()  # case -> peer -> why it is not measured


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=math.inf, help="begin no case after them")
    parser.addoption("--commit", default="", help="what is measured, where there is no git to tell")


def pytest_report_header() -> str:
    of = len(benchmarks.cases.all_cases("cuda"))
    return f"fastreg: {len(benchmarks.CASES)} of {of} cases on {machine.device_name()}"


def pytest_collection_finish(session: pytest.Session) -> None:
    missing = session.config.stash[MISSING] = {}
    for item in session.items:
        values = item.callspec.params  # pyright: ignore[reportAttributeAccessIssue]
        missing.setdefault(benchmarks.group_of(values["name"]), {})[values["peer"]] = "not reached"


@pytest.fixture(scope="session")
def deadline(request: pytest.FixtureRequest) -> float:
    if benchmarks.DEVICE == "cuda":
        benchmarks.copy_bandwidth()  # now: nothing can be measured once a kernel has failed
    seconds: Any = request.config.getoption("--seconds")
    return time.monotonic() + seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    values = item.callspec.params  # pyright: ignore[reportAttributeAccessIssue]
    missing = item.config.stash[MISSING][benchmarks.group_of(values["name"])]
    if call.when == "call" and call.excinfo is None:
        del missing[values["peer"]]
    elif call.excinfo is not None and call.excinfo.type is not KeyboardInterrupt:
        missing[values["peer"]] = str(call.excinfo.value)
    return report


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the name of a machine is private
    machine_info |= machine.facts()
    if benchmarks.DEVICE == "cuda":
        machine_info["copy_bandwidth"] = benchmarks.copy_bandwidth()
    else:
        machine_info["threads"] = torch.get_num_threads()


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    if config.getoption("--commit"):
        commit_info["id"] = config.getoption("--commit")


def pytest_benchmark_update_json(config: Any, output_json: dict[str, Any]) -> None:
    output_json["missing"] = {name: peers for name, peers in config.stash[MISSING].items() if peers}
