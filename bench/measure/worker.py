"""A process that does tasks one after the other, so that a task that crashes or hangs takes no other with it.

The process that runs pytest uses no GPU: it sends each task to a worker, and starts another worker after one that died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.5  # seconds
START = 120  # seconds for a worker to start
GRACE = 10  # seconds for a killed process to end; one that hangs in a driver may never do so
NOT_REACHED = "not reached"  # why a task is lost that had no time left
LONGEST = 200  # bytes of a word that a task says
Say = Callable[[str], None]


class Lost(Exception):
    """A task without a result; `said` is the last word that it said."""

    def __init__(self, why: str, said: str = "") -> None:
        super().__init__(why)
        self.said = said


class Worker:
    """Do tasks in one process, with additions to the environment that are set before its Python starts."""

    def __init__(self, **environment: str) -> None:
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def do(self, task: Callable[..., Any], *arguments: Any, limit: float) -> Any:
        """Return `task(say, *arguments)`.

        Args:
            task: a function of a module, which announces each next action by `say`.
            *arguments: the other arguments of the task.
            limit: the seconds that it may take, beside the start of the process.

        Raises:
            Lost: after an exception, a crash, or the limit. The next task gets another process, because a device on
                which a kernel has failed can do nothing more.
        """
        process = self.process or self._start()
        os.ftruncate(self.words, 0)
        try:
            self.pipe.send((task, arguments))
            has_result, found = self._answer(process, limit)
        except (EOFError, OSError):
            has_result, found = False, f"the process ended with status {process.wait(GRACE)}"
        if has_result:
            return found
        said = os.pread(self.words, LONGEST, 0).rstrip(b"\0").decode()
        self.stop()
        raise Lost(found, said)

    def _start(self) -> subprocess.Popen[bytes]:
        self.pipe, theirs = Pipe()
        self.words = os.memfd_create("words")
        files = theirs.fileno(), self.words
        command = [sys.executable, "-m", "bench.measure.worker", *map(str, files)]
        environment = os.environ | self.environment
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=files, start_new_session=True)
        theirs.close()
        return self.process

    def _answer(self, process: subprocess.Popen[bytes], limit: float) -> tuple[bool, Any]:
        """Return whether there is a result, and the result or why there is none."""
        if not self.pipe.poll(START):
            return False, f"the process did not start in {START} s"
        self.pipe.recv()
        end = monotonic() + limit
        while not self.pipe.poll(min(POLL, max(0.0, end - monotonic()))):
            if monotonic() > end:
                return False, f"out of time after {limit:.0f} s"
            if process.poll() is not None and not self.pipe.poll():  # its own children may hold the pipe
                raise EOFError
        return self.pipe.recv()

    def stop(self) -> None:
        """Kill the process and its own children. A process that the system cannot end is left behind."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
            self.pipe.close()
            os.close(self.words)
            self.process = None


def serve(pipe: Connection, words: int) -> None:
    """Do the tasks that come through a pipe until it is closed; their words go to a file, which costs no time."""

    def say(word: str) -> None:
        os.pwrite(words, word.encode()[:LONGEST].ljust(LONGEST, b"\0"), 0)

    with suppress(EOFError):
        while True:
            task, arguments = pipe.recv()
            pipe.send("begun")
            try:
                answer = True, task(say, *arguments)
            except Exception as error:
                answer = False, in_a_line(error)
            pipe.send(answer)


def in_a_line(error: Exception) -> str:
    """Describe an error by its class and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
