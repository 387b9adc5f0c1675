"""Check a rehearsal of bench.measure.first on a stand-in for a GPU: python -m tests.fakegpu LINES.

Its kernels do nothing. So each self-check has to find the values wrong, and everything goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.measure import first, gpu_tasks
from bench.measure.worker import records

MOST = 600  # seconds


def main(lines: Path) -> None:
    found = records(lines)
    ended = {record["end"]: record for record in found if "end" in record}
    seconds = {record["part"]: record["seconds"] for record in found if "part" in record}
    for part, took in seconds.items():
        print(f"{part}: {took:.0f} s")
    checks = [task for kind in ("smoke", "order") for task in first.PARTS[kind].tasks]
    problems = [f"{x}: {ended.get(x)}" for x in checks if ended.get(x, {}).get("verdict") != "wrong"]
    problems += [f"no end of {part}" for part in first.PARTS if part not in seconds]
    problems += [f"{sum(seconds.values()):.0f} s in all"] * (sum(seconds.values()) > MOST)
    problems += [f"no record of {task}" for part in first.PARTS.values() for task in part.tasks if task not in ended]
    problems += [f"no page {page}" for page in [lines.with_suffix(".md")] if not page.exists()]
    problems += ["ncu"] * (ended.get("ncu", {}).get("ncu") != gpu_tasks.NOT_THERE)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(checks)} self-checks found the values wrong, in {sum(seconds.values()):.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
