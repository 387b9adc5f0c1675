"""Do tasks in worker processes, and keep each finding on disk as it comes.

A file gets a line of JSON when a task begins and when it has ended. One worker does task after task. If it dies, or a
task takes longer than its limit, the task is recorded as lost, with the reason, and another worker does the next task.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.machine import ROOT

POLL = 0.1  # seconds
GRACE = 10  # seconds for a killed process to end; one that hangs in a driver may never do so
STARTS = 2  # workers in a row that may die before they begin a task; a third would die, too


class Limits(NamedTuple):
    """Limit the time of tasks.

    end   the time by `time.monotonic()` after which no task begins
    task  seconds that a task may take, and a worker until it begins its first task
    last  the time at which a task that has not ended is lost
    """

    end: float
    task: float
    last: float = math.inf


def append(file: Path, **record: Any) -> None:
    """Write a record as one line, and wait until it is on disk, as the machine may be taken away."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            cut_off = lines.read() != b"\n"  # a process died while it was writing
            lines.write(b"\n" * cut_off)
        lines.write(json.dumps(record).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def records(file: Path) -> list[dict[str, Any]]:
    """Read all records. A line that was cut off is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def work(arguments: Sequence[str], do: Callable[[str, Path], dict[str, Any]]) -> None:
    """Do the tasks that `supervise` has passed as arguments: a file, the end of the time, and the tasks' names.

    Args:
        arguments: the arguments of the command.
        do: does the task of this name, and returns the result. It may append records to the file. After an
            exception the worker ends, because a device on which a kernel has failed can do nothing more.
    """
    file, end, *names = arguments
    for name in names:
        if time.monotonic() > float(end):
            return
        append(Path(file), begin=name)
        began = time.monotonic()
        try:
            found = do(name, Path(file))
        except Exception as error:
            append(Path(file), end=name, lost=in_a_line(error))
            sys.exit(1)
        append(Path(file), end=name, seconds=round(time.monotonic() - began, 1), **found)


def in_a_line(error: Exception) -> str:
    """Describe an error by its class and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


class Progress:
    """Follow the tasks of a worker in the records that it appends to a file."""

    def __init__(self, file: Path, tasks: list[str]) -> None:
        self.file, self.tasks, self.seen = file, tasks, len(records(file))
        self.current: str | None = None
        self.began = time.monotonic()  # when the worker, or its last task, began
        self.begun = False  # whether any task has begun

    def update(self) -> None:
        """Read the records that have come since the last time, and take the tasks that have ended off the list."""
        new = records(self.file)[self.seen :]
        self.seen += len(new)
        for record in new:
            if record.get("begin") in self.tasks:  # other workers may write to the same file
                self.current, self.begun, self.began = record["begin"], True, time.monotonic()
            elif record.get("end") in self.tasks:
                self.tasks.remove(record["end"])
                self.current, self.began = None, time.monotonic()
                print(
                    f"bench: {record['end']}: {record.get('lost') or '{:.0f} s'.format(record['seconds'])}", flush=True
                )

    def lose(self, task: str, why: str) -> None:
        """Record that a task is lost."""
        self.tasks.remove(task)
        append(self.file, end=task, lost=why)
        print(f"bench: {task}: {why}", flush=True)


def supervise(
    command: Sequence[str],
    file: Path,
    tasks: Sequence[str],
    limits: Limits,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `command FILE END TASK...` until each task has ended or is lost. `END` is when no more task begins."""
    left, failed_starts = list(tasks), 0
    while left and time.monotonic() < limits.end and failed_starts < STARTS:
        progress = Progress(file, left)
        arguments = [*command, str(file), str(limits.end), *left]
        child = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | (environment or {}), start_new_session=True)
        try:
            why = wait(child, progress, limits)
        finally:
            end(child)
        progress.update()
        if progress.current is not None:
            progress.lose(progress.current, why)
        failed_starts = 0 if progress.begun else failed_starts + 1
    why = "no worker could begin a task" if failed_starts == STARTS else "not reached"
    for task in [*left]:
        Progress(file, left).lose(task, why)


def wait(child: subprocess.Popen[Any], progress: Progress, limits: Limits) -> str:
    """Wait until a worker has ended or takes too long, and return the reason."""
    while child.poll() is None:
        time.sleep(POLL)
        progress.update()
        if time.monotonic() - progress.began > limits.task:
            return f"out of time after {limits.task:.0f} s"
        if time.monotonic() > limits.last:
            return "no time was left"
    return f"the process ended with status {child.returncode}"


def end(child: subprocess.Popen[Any]) -> None:
    """Kill a process and its own children. A process that the system cannot end is left behind."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
