"""Check a rehearsal of bench/test_first.py on a stand-in for a GPU: python -m tests.fakegpu LINES.

Its kernels do nothing. So each self-check has to find the values wrong, and everything goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.measure import first, gpu_tasks

MOST = 600  # seconds
CHECKS = "smoke", "order"
PARTS = {*CHECKS, "headline", "sweep", "device", "files"}


def problems(lines: Path) -> list[str]:
    """List the faults in the lines of a rehearsal."""
    found, page = first.findings(lines), lines.with_suffix(".md")
    seconds = first.seconds(found)
    wrong = [f"{part} {task}: no record" for (part, task), line in found.items() if not line]
    for (part, task), line in found.items():
        if part in CHECKS and line.get("found", {}).get("verdict") != "wrong":
            wrong.append(f"{part} {task}: {line}, where the values are wrong")
    wrong += [f"{part}: no task" for part in PARTS - {*seconds}]
    wrong += [f"{sum(seconds.values()):.0f} s in all"] * (sum(seconds.values()) > MOST)
    wrong += [f"no page {page}"] * (not page.exists())
    wrong += ["ncu"] * (found.get(("device", "ncu"), {}).get("found") != {"ncu": gpu_tasks.NOT_THERE})
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fakegpu", description=__doc__)
    parser.add_argument("lines", type=Path)
    lines: Path = parser.parse_args().lines
    for part, took in first.seconds(first.findings(lines)).items():
        print(f"{part}: {took:.0f} s")
    if wrong := problems(lines):
        parser.exit(1, "\n".join([*wrong, ""]))
    print("each self-check found the values wrong, and each task has a record")


if __name__ == "__main__":
    main()
