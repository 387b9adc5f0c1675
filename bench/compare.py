"""Whether fastreg lost: `python -m bench.compare FOLDER` fails when a result there is worse than the committed one.

The measure is how many times as fast as the eager formula fastreg is, measured in turns: another machine of the same
kind, or a busier one, changes that least.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.report import RESULTS, Result, load

ALLOWED = 0.15  # of the committed ratio


def losses(committed: Result, new: Result) -> list[str]:
    """A line for each case whose ratio fell by more than is allowed."""
    before = {case.name: case.times_as_fast(case.ours, "eager") for case in committed.cases}
    lines = []
    for case in new.cases:
        ratio = case.times_as_fast(case.ours, "eager")
        if case.name in before and ratio < before[case.name] * (1 - ALLOWED):
            lines.append(f"{case.name}: {ratio:.2f}x the eager formula's speed, {before[case.name]:.2f}x committed")
    return lines


def main(folder: Path, committed: Path = RESULTS) -> int:
    files = sorted(folder.glob("*.json"))
    known = [file for file in files if (committed / file.name).exists()]
    if not known:
        print(f"bench.compare: no result of this device is in {committed}: nothing to compare with")
        return 1
    lost = []
    for file in known:
        old, new = load(committed / file.name), load(file)
        shared = {case.name for case in old.cases} & {case.name for case in new.cases}
        if not shared:
            print(f"bench.compare: {file.name} has no case of the committed one")
            return 1
        print(f"bench.compare: {file.name}: {len(shared)} cases compared, {len(new.cases) - len(shared)} not committed")
        lost += losses(old, new)
    print("\n".join(lost) or f"bench.compare: no case is slower by more than {ALLOWED:.0%}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
