"""What `python -m pytest bench` adds to pytest-benchmark: workers that measure, and a line on disk for each result."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_benchmark
from pytest_benchmark.utils import safe_dumps

from bench.measure import benchmarks, machine
from bench.measure.groups import ALLOCATORS, CLOCK, GROUPS
from bench.measure.lines import append
from bench.measure.worker import NOT_REACHED, Lost, Worker

QUIET = {"KINETO_LOG_LEVEL": "99"}  # PyTorch's profiler prints a line whenever it starts or stops
LEAST_SECONDS = 2  # a task begins only if so many are left
on_gpu = benchmarks.DEVICE == "cuda"
collect_ignore = [] if on_gpu else ["test_first.py"]


class Session:
    """Hold the state that all tests share: workers, the lines, and the figures of the latest group."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.lines: Any = config.getoption("--lines")
        self.began = self.told = time.monotonic()
        # A worker for each setting of the allocator, which a process reads when it starts.
        self.workers = {name: Worker(**QUIET, **setting) for name, setting in ALLOCATORS.items()}
        self.machine: dict[str, Any] = {}
        self.missing: list[dict[str, Any]] = []
        self.group: tuple[str, str] | None = None
        self.figures: tuple[benchmarks.Measured, benchmarks.Missing] = {}, {}

    def machine_info(self) -> dict[str, Any]:
        """Describe the machine; a worker does, as pytest's own process uses no GPU."""
        if not self.machine:
            try:
                self.machine = next(iter(self.workers.values())).do(benchmarks.facts, limit=60)
            except Lost as lost:
                self.machine = {"device": "unknown", "lost": str(lost)}
        return self.machine

    def write(self, items: list[Any], **record: Any) -> None:
        """Append a line, with the seconds since the last one; the first line has the facts, and names the tests."""
        if self.told == self.began:
            self.lines.unlink(missing_ok=True)
            facts = {"machine_info": self.machine_info(), "commit_info": machine.commit_facts()}
            append(self.lines, **facts, version=pytest_benchmark.__version__, tests=[*map(name_of, items)])
        now = time.monotonic()
        append(self.lines, seconds=round(now - self.told, 1), **record)
        self.told = now

    def seconds_left(self, item: Any) -> float:
        """Return the seconds that are left for the part of a test, with those that earlier parts have left."""
        marks = {x.originalname: x.get_closest_marker("part") for x in item.session.items}
        shares = {name: mark.args[0] if mark else 1.0 for name, mark in marks.items()}
        until = [*shares].index(item.originalname) + 1
        share = sum([*shares.values()][:until]) / sum(shares.values())
        seconds: Any = self.config.getoption("--seconds")
        return self.began + share * seconds - time.monotonic()

    def do(self, item: Any, allocator: str | None, task: Any, *arguments: Any, limit: float) -> Any:
        """Do a task of a test in a worker, if there is time left."""
        left = self.seconds_left(item)
        if left < LEAST_SECONDS:
            raise Lost(NOT_REACHED)
        return self.workers[allocator].do(task, *arguments, limit=min(limit, left))

    def measure(self, item: Any, once: bool) -> tuple[benchmarks.Measured, benchmarks.Missing]:
        """Measure those peers of a group that are selected, when the first of them is asked for.

        A peer in whose call the worker dies is left out of the next attempt.
        """
        name = item.callspec.params["group"]
        if self.group == (item.originalname, name):
            return self.figures
        limit: Any = self.config.getoption("--limit")
        group, measured, missing = GROUPS[name], {}, {}
        rows = [x.callspec.params for x in item.session.items if x.originalname == item.originalname]
        left = [row["peer"] for row in rows if row["group"] == name]
        while left:
            arguments = benchmarks.measure_peers, group.case, left, once
            try:
                measured, failed = self.do(item, group.allocator, *arguments, limit=limit)
                missing |= failed
                break
            except Lost as lost:
                gone = [lost.said] if lost.said in left else left
                missing |= dict.fromkeys(gone, str(lost))
                left = [peer for peer in left if peer not in gone]
        self.group, self.figures = (item.originalname, name), (measured, missing)
        return self.figures


SESSION = pytest.StashKey[Session]()


def name_of(item: Any) -> list[str]:
    """Name a test by its part, which is its function, and its case."""
    return [item.originalname.removeprefix("test_"), item.callspec.id]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "benchmarks of fastreg")
    lines = machine.ROOT / ".benchmarks" / "lines.jsonl"
    group.addoption("--seconds", type=float, default=math.inf, help="begin nothing more after them")
    group.addoption("--limit", type=float, default=90 if on_gpu else 600, help="seconds after which a group is lost")
    group.addoption("--lines", type=Path, default=lines, help="the file that gets a line for each result as it comes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # pytest writes its results after an interrupt
    # After an interrupt pytest-benchmark may have got no rounds; its warning, an error here, would lose the summary.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_sessionfinish(session: pytest.Session) -> None:
    for worker in session.config.stash[SESSION].workers.values():
        worker.stop()


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return config.stash[SESSION].machine_info()


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    commit_info |= machine.commit_facts()  # which knows a commit without git, too


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["missing"] = config.stash[SESSION].missing


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Write the line of a test that has ended: its benchmark, its findings, or the reason why they are missing."""
    report: Any = yield
    if call.when == "teardown" or (call.when == "setup" and call.excinfo is None):
        return report
    session, params, found = item.config.stash[SESSION], item.callspec.params, dict(item.user_properties)
    benchmark = item.funcargs.get("benchmark")
    why = str(call.excinfo.value) if call.excinfo else None
    if call.excinfo and isinstance(call.excinfo.value, Lost):
        report.longrepr = why  # without the frames of pytest-benchmark
    record: dict[str, Any] = dict(zip(("part", "task"), name_of(item), strict=True))
    if why and "group" in params:
        about = {"group": params["group"], "name": params["peer"], "extra_info": GROUPS[params["group"]].info}
        record["missing"] = about | {"why": why}
        session.missing.append(record["missing"])
    elif why and not found:
        record["lost"] = why
    elif benchmark and benchmark.stats:
        record["benchmark"] = json.loads(safe_dumps(benchmark.stats.as_dict()))
    else:
        record["found"] = found
    session.write(item.session.items, **record)
    return report


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Record the findings of a test."""
    return lambda found: request.node.user_properties.extend(found.items()) or found


@pytest.fixture
def do(session: Session, tell: Any, request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Do a task in a worker, and record its findings."""
    return lambda task, *arguments, limit: tell(session.do(request.node, None, task, *arguments, limit=limit))


@pytest.fixture
def row(session: Session, group: str, peer: str, benchmark: Any, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Report the turns of a peer as rounds; a peer that could not be measured raises the reason instead."""

    def report() -> None:
        measured, missing = session.measure(request.node, once=benchmark.disabled)
        figures = dict(measured.get(peer, {"seconds": [0.0]}))
        turns = figures.pop("seconds")
        rounds = iter(turns)
        benchmark.group, benchmark.name = group, peer
        benchmark.extra_info |= GROUPS[group].info | figures

        def replay() -> None:
            if peer in missing:
                raise Lost(missing[peer])
            CLOCK.now += next(rounds)

        benchmark.pedantic(replay, rounds=len(turns))

    return report
