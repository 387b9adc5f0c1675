"""The lines that a session of benchmarks writes as it goes: `python -m bench.measure.lines LINES JSON`.

pytest-benchmark writes its JSON when pytest ends. Until then, and for good if the machine is taken away, the results
are in these lines: facts about the machine and the commit, and then a line for each test that has ended. This command
makes the JSON from them.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def append(file: Path, **record: Any) -> None:
    """Write a record as one line, and wait until it is on disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(record, default=str) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def records(file: Path) -> list[dict[str, Any]]:
    """Read all records. A line that was cut off is left out."""
    found = []
    for line in file.read_text().splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def session(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON that pytest-benchmark would have written, with the missing peers."""
    first, *ended = found
    return {
        "machine_info": first["machine_info"],
        "commit_info": first["commit_info"],
        "benchmarks": [record["benchmark"] for record in ended if "benchmark" in record],
        "missing": [record["missing"] for record in ended if "missing" in record],
        "datetime": datetime.now(timezone.utc).isoformat(),
        "version": first["version"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.measure.lines", description=__doc__)
    parser.add_argument("lines", type=Path)
    parser.add_argument("json", type=Path)
    options = parser.parse_args()
    options.json.write_text(json.dumps(session(records(options.lines)), indent=1))


if __name__ == "__main__":
    main()
