"""Rows on disk as they come: `python -m bench.measure.lines FILE` says which are missing, and why.

The first line of a file has the facts of the run and the names of its tests. Each other line has a test's row, or why
it is missing, and is on disk before the next test begins. A run with the same file goes on behind the test during which
the run before it died.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

DIED = "the process died or hung"
NOT_REACHED = "not reached"
LONGEST = 200  # bytes of a test's name


def records(file: Path) -> list[dict[str, Any]]:
    """Read the lines; one that was cut off is left out."""
    found = []
    for line in file.read_text().splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


class Lines:
    """Write the lines of a run to a file, which may have lines of an earlier run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.now = os.open(f"{file}.now", os.O_CREAT | os.O_RDWR)  # the test that runs, in case it ends the process
        earlier = records(file) if file.exists() else []
        if file.exists() and not file.read_bytes().endswith(b"\n"):
            self._append("\n")  # behind a line that was cut off
        died = os.pread(self.now, LONGEST, 0).decode().strip()
        if earlier and died and "end" not in earlier[-1]:
            self.write(test=died, missing=DIED)
            earlier.append({"test": died})
        self.running("")
        self.done = {line["test"] for line in earlier if "test" in line}  # the tests that have a line

    def write(self, **record: Any) -> None:
        """Append a line, and wait until it is on disk."""
        self._append(json.dumps(record, default=str) + "\n")

    def _append(self, text: str) -> None:
        with self.file.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def running(self, test: str) -> None:
        """Leave the name of the test whose code runs from now on; this takes a microsecond."""
        os.pwrite(self.now, test.encode()[:LONGEST].ljust(LONGEST), 0)


def read(file: Path) -> dict[str, Any]:
    """Return the JSON that pytest-benchmark writes of a finished run; `missing` says why tests have no row."""
    found = records(file)
    facts = next(line["run"] for line in found if "run" in line)
    rows = [line["row"] for line in found if "row" in line]
    missing = {line["test"]: line["missing"] for line in found if "missing" in line}
    reached = {line["test"] for line in found if "test" in line}
    missing |= {test: NOT_REACHED for test in facts.pop("tests") if test not in reached}
    return facts | {"benchmarks": rows, "missing": missing}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.measure.lines", description="Say which rows are missing, and why.")
    parser.add_argument("file", type=Path, help="what `pytest bench --lines=FILE` has written")
    found = read(parser.parse_args().file)
    print(f"{len(found['benchmarks'])} rows; without a row: {len(found['missing'])}")
    for test, why in found["missing"].items():
        print(f"{test}: {why}")


if __name__ == "__main__":
    main()
