"""Add turns, facts about the machine, and a line on disk for each row to pytest-benchmark.

The ways of a case are measured in turns when its first test runs, and each test reports one of them as a row.
"""

from __future__ import annotations

import os

# Otherwise threads that wait for each other spin, and eager code on busy cores gets 600 times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faulthandler
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark import __version__ as VERSION

from bench.measure import before, figures, machine, results, timing
from bench.measure.lines import Lines
from bench.measure.timing import DEVICE, Rounds

torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise a compiled way becomes eager without a word
Prepare = Callable[[str], tuple[timing.Call, dict[str, Any]]]


@dataclass
class Session:
    """The state of a run."""

    lines: Lines | None
    case: str = ""  # that was measured last
    found: dict[str, Any] = field(default_factory=dict)  # by its ways: figures, or the error of a way without a row
    rows: list[Any] = field(default_factory=list)

    def write(self, **record: Any) -> None:
        if self.lines:
            self.lines.write(**record)

    def running(self, test: str) -> None:
        if self.lines:
            self.lines.running(test)


SESSION = pytest.StashKey[Session]()


def name(value: Any) -> str:
    """Name a parameter so that `-k` can select it, as in 64x70x400-bfloat16-batch_first."""
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
    return text.replace(" ", "_")


def case_of(item: Any) -> str:
    """Name the case of a test, as in penalty-64x70x400-bfloat16-batch_first."""
    params = [name(value) for key, value in item.callspec.params.items() if key != "way"]
    return "-".join([item.originalname.removeprefix("test_"), *params])


def test_of(item: Any) -> str:
    return f"{case_of(item)}/{name(item.callspec.params['way'])}"


def rows_of(items: list[Any]) -> list[Any]:
    """Return the tests of this folder; a run may have others, too."""
    return [item for item in items if item.path.is_relative_to(machine.ROOT / "bench")]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "benchmarks of fastreg")
    text = "append a line for each row as soon as it is measured, and go on behind a test that ended the run before"
    group.addoption("--lines", type=Path, help=text)
    limit = 90 if DEVICE == "cuda" else 600
    group.addoption("--limit", type=float, default=limit, help="end the process after so many seconds of one case")


def pytest_configure(config: pytest.Config) -> None:
    try:
        before.refuse_formula()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    file: Any = config.getoption("lines")
    config.stash[SESSION] = Session(Lines(file) if file else None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # pytest writes its results after an interrupt
    # This warning comes where a way fails its check, and would be a second error.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    # After torch.compiler.reset() a dictionary of Dynamo is empty when one of its keys dies.
    unraisable = "ignore:Exception ignored in. <function ExactWeakKeyDictionary:pytest.PytestUnraisableExceptionWarning"
    config.addinivalue_line("filterwarnings", unraisable)


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Leave out the tests that have a line."""
    lines = config.stash[SESSION].lines
    done = [item for item in rows_of(items) if lines and test_of(item) in lines.done]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item not in done]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the lines with the facts of the run."""
    if session.config.stash[SESSION].lines and not session.config.option.collectonly:
        own = {"copy_bandwidth": figures.copy_bandwidth()} if DEVICE == "cuda" else {"threads": torch.get_num_threads()}
        about = {"machine_info": machine.facts() | own, "commit_info": machine.commit_facts(), "version": VERSION}
        about |= {"datetime": datetime.now(timezone.utc).isoformat(), "tests": [*map(test_of, rows_of(session.items))]}
        session.config.stash[SESSION].write(run=about)


class Replay:
    """The clock of pytest-benchmark, which has no turns: it goes on by the measured seconds. The JSON has its name."""

    now, __name__ = 0.0, "seconds of turns"

    def __call__(self) -> float:
        return self.now


REPLAY = Replay()
in_turns = pytest.mark.benchmark(timer=REPLAY)  # the mark of every benchmark


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, way: str) -> Callable[..., None]:
    """Measure the selected ways of a case in turns, when its first test runs, and report the way of this test."""
    session, case = request.config.stash[SESSION], case_of(request.node)
    items: Any = request.session.items
    options: Any = request.config.option

    def run(prepare: Prepare, info: dict[str, Any], calls: int = 1, seconds: float = 1.0, own: bool = False) -> None:
        """Measure a case of ways that `prepare` checks, and returns as functions with their other figures.

        A turn is so many calls. The time of all turns of a way is `--benchmark-max-time` times `seconds`, as wall time,
        or as the process's own CPU time. `info` describes the case.
        """
        benchmark.group, benchmark.name = case, str(way)
        if session.case != case:
            ways = [item.callspec.params["way"] for item in rows_of(items) if case_of(item) == case]
            most, least = float(options.benchmark_max_time), options.benchmark_min_rounds
            rounds = None if benchmark.disabled else Rounds(calls, most * seconds * len(ways), least)
            session.case, session.found = case, measured(session, case, ways, prepare, rounds, own)
        found = session.found[way]
        if isinstance(found, Exception):
            raise found
        turns = found.pop("turns", [0.0])
        rest = iter(turns)

        def replay() -> None:
            REPLAY.now += next(rest)

        benchmark.extra_info |= {**info, "allocator": machine.allocator(), **found}
        benchmark.pedantic(replay, rounds=len(turns))

    return run


def measured(
    session: Session, case: str, ways: list[str], prepare: Prepare, rounds: Rounds | None, own: bool
) -> dict[str, Any]:
    """Prepare each way, and measure those that work; without rounds each is called once."""
    found, calls, now = dict[str, Any](), dict[str, timing.Call](), ""

    def say(way: str) -> None:
        nonlocal now
        now = way
        session.running(f"{case}/{name(way)}")

    def lose(error: Exception) -> None:
        found[now] = error.with_traceback(None)  # whose frames hold tensors
        calls.pop(now, None)
        timing.synchronize()  # raises if a kernel has failed, after which no other way can run

    for way in ways:
        say(way)
        try:
            calls[way], found[way] = prepare(way)
            calls[way]()
            timing.synchronize()
        except Exception as error:
            lose(error)
    while rounds and calls:
        try:
            turns = timing.take_turns(calls, rounds, say)
        except Exception as error:  # such as a full memory
            lose(error)
            continue
        seconds = {way: [turn.own if own else turn.wall for turn in turns[way]] for way in calls}
        for way in calls:
            waiting, over = timing.share_waiting(turns[way]), timing.compared(seconds, way)
            found[way] |= {"turns": seconds[way], "waiting": waiting, "over": over}
        break
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Iterator[Any]:
    """End the process after a case that hangs. The watchdog is a thread that needs no lock of the interpreter."""
    stderr: Any = sys.__stderr__
    faulthandler.dump_traceback_later(item.config.option.limit, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        item.config.stash[SESSION].running("")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Append a line for a test that has ended: its row, or why it has none."""
    report = yield
    session, benchmark = item.config.stash[SESSION], item.funcargs.get("benchmark")
    if report.outcome == "failed" and call.when != "teardown":
        error: Any = call.excinfo
        session.write(test=test_of(item), missing=f"{error.typename}: {error.value}".partition("\n")[0])
    elif call.when == "call" and benchmark and benchmark.stats:
        session.rows.append(benchmark.stats)
        session.write(test=test_of(item), row=benchmark.stats.as_dict(include_data=False))
    elif call.when == "call" or report.outcome == "skipped":
        session.write(test=test_of(item))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[SESSION].write(end=int(exitstatus))


def comparison(way: str, over: dict[str, list[float]]) -> str:
    """Render the ratio of a way's time to that of the way it is compared with, or else the ratios to all others.

    A way by another commit is compared with its counterpart, a step with one without a penalty, and a call with
    fastreg.
    """
    closest = [other for other in (way.removesuffix(before.BEFORE), results.WITHOUT, "fastreg") if other in over]
    return ", ".join("{:.3f} ± {:.3f} of {}".format(*over[other], other) for other in closest[:1] or over)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how ways compare by pairs of turns, which the medians in the tables of pytest-benchmark do not say."""
    rows = config.stash[SESSION].rows
    if not rows:
        return
    terminalreporter.section("by pairs of turns, ± the standard error")
    for row in rows:
        terminalreporter.line(f"{row.group}: {row.name}: {comparison(row.name, row.extra_info['over'])}")
    busy = [row.extra_info["waiting"] for row in rows if row.extra_info["waiting"] > timing.MOST_WAITING]
    if busy:
        text = f"The machine was busy: threads of {len(busy)} rows, which no report shows, waited for a core for up to"
        terminalreporter.line(f"{text} {max(busy):.0%} of the time.", yellow=True)
