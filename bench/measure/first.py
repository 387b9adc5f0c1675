"""The first nine minutes on a GPU: `bash bench/on_gpu.sh first`, or `python -m bench.measure.first`.

FOLDER/DEVICE.jsonl gets a line of JSON for each finding as it comes, and then DEVICE.json the headline benchmarks and
DEVICE.md all findings in tables. Each part has a limit. The time that it leaves goes to the next part. A task that
crashes, hangs or does not compile is recorded as lost, and stops nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measure import benchmarks, cases, gpu_tasks, machine, report, run
from bench.measure.worker import Limits, append, records, supervise
from bench.offline import prediction

TASKS = [sys.executable, "-m", "bench.measure.gpu_tasks"]
COMPILERS, TESTERS = 4, 6  # processes at a time
HEADLINE = {benchmarks.name_of(case, None): (case, None) for case in cases.HEADLINE}
SECONDS = 540
STOP = 2  # seconds before the end of a part in which no task begins


class Part(NamedTuple):
    """Describe a part.

    seconds  its limit, to which the time that earlier parts have left is added
    limit    seconds of one of its tasks
    tasks    names of tasks
    do       does the tasks, given the file, the names and the limits
    """

    seconds: float
    limit: float
    tasks: list[str]
    do: Callable[[Path, list[str], Limits], None]


def by(command: list[str]) -> Callable[[Path, list[str], Limits], None]:
    """Do all tasks in one worker, which runs a command."""
    return lambda file, tasks, limits: supervise(command, file, tasks, limits, run.QUIET)


def at_once(file: Path, tasks: list[str], limits: Limits) -> None:
    """Do each task in its own worker, some at a time."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(lambda task: supervise(TASKS, file, [task], limits), tasks))


def tests(file: Path, tasks: list[str], limits: Limits) -> None:
    """Run files of tests, some at a time, and the one that needs much memory after the others."""
    large = f"tests {run.LARGE}"

    def one(task: str) -> None:
        name, began = task.removeprefix("tests "), time.monotonic()
        left = limits.last - run.GRACE - began
        outcome = run.run_file(name, min(left, limits.task)) if left > 0 else run.unfinished(name, "not reached")
        append(file, end=task, seconds=round(time.monotonic() - began, 1), **outcome)

    with ThreadPoolExecutor(max(1, min(TESTERS, (os.cpu_count() or 1) // 2))) as pool:
        list(pool.map(one, [task for task in tasks if task != large]))
    if large in tasks:
        one(large)


def names(kind: str, settings: Iterable[gpu_tasks.Setting]) -> list[str]:
    return [f"{kind} {setting}" for setting in settings]


PARTS = {
    "compile": Part(45, 45, names("compile", gpu_tasks.compile_settings()), at_once),
    "smoke": Part(30, 25, names("smoke", gpu_tasks.smoke_settings()), by(TASKS)),
    "headline": Part(170, 80, [*HEADLINE], by(run.WORKER)),
    "sweep": Part(100, 20, names("sweep", gpu_tasks.sweep_settings()), by(TASKS)),
    "order": Part(40, 30, names("order", gpu_tasks.order_settings()), by(TASKS)),
    "device": Part(30, 30, ["clocks", "ncu"], by(TASKS)),
    "tests": Part(110, 100, [f"tests {name}" for name in run.TESTS], tests),
}


def measure(file: Path, seconds: float) -> None:
    """Do one part after the other."""
    began = time.monotonic()
    append(file, machine=machine.facts() | {"threads": torch.get_num_threads()}, commit=machine.commit())
    end = began
    for name, part in PARTS.items():
        end = min(end + part.seconds, began + seconds)
        now = time.monotonic()
        part.do(file, part.tasks, Limits(end - STOP, part.limit, end))
        took = round(time.monotonic() - now, 1)
        append(file, part=name, seconds=took)
        print(f"bench.measure.first: {name}: {took} s", flush=True)


def page(lines: Path) -> str:
    """Render all findings."""
    found = records(lines)
    ended = {record["end"]: record for record in found if "end" in record}
    result = report.load(lines.with_suffix(".json"))
    took = ", ".join(f"{record['part']} {record['seconds']:.0f} s" for record in found if "part" in record)
    parts = [f"# The first minutes on {result.machine['device']}\n", f"{report.where(result)}\n", f"Parts: {took}.\n"]
    for kind in ("smoke", "order", "sweep"):
        parts += [f"## {kind.capitalize()}\n", table(kind, ended)]
    shares = [prediction.beside(result)] if result.on_gpu else []
    parts += ["## Headline\n", *shares, report.call_table(result), *report.step_tables(result)]
    for task in ("clocks", "ncu"):
        facts = {key: value for key, value in ended.get(task, {}).items() if key not in ("end", "seconds")}
        parts += [f"## {task.capitalize()}\n", *(f"{key}:\n\n```\n{value}\n```\n" for key, value in facts.items())]
    return "\n".join([*parts, "## Tests\n", table("tests", ended)])


HIDDEN = "end", "seconds", "errors", "failed"


def table(kind: str, ended: dict[str, dict[str, Any]]) -> str:
    """Render a row for each task of a part, with its result, or why it is lost."""
    rows = {task: ended.get(task, {"lost": "not reached"}) for task in PARTS[kind].tasks}
    columns = list(dict.fromkeys(key for record in rows.values() for key in record if key not in HIDDEN))
    columns += ["errors of tolerance"] * (kind == "smoke") + ["failed"] * (kind == "tests")
    lines = [[kind, *columns]]
    for task, record in rows.items():
        facts = {key: f"{value:.1f}" if isinstance(value, float) else f"{value}" for key, value in record.items()}
        if "errors" in record:
            facts["errors of tolerance"] = ", ".join(f"{name}: {x:.2f}" for name, x in record["errors"].items())
        facts["failed"] = report.some(record.get("failed", []))
        lines.append([task.removeprefix(f"{kind} "), *(facts.get(column, "") for column in columns)])
    return report.table(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.measure.first", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=report.FIRST)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that all parts take together")
    options = parser.parse_args(arguments)
    lines = (options.folder / f"{machine.file_name(machine.device_name())}l").absolute()
    lines.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        measure(lines, options.seconds)
    run.write(lines.with_suffix(".json"), run.in_rows(run.summary(records(lines), HEADLINE)))
    run.write(lines.with_suffix(".md"), page(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
