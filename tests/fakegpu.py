"""Check a rehearsal of `bench/on_gpu.sh first` on a stand-in for a GPU: python -m tests.fakegpu FOLDER.

Its kernels do nothing. So each way that is checked has to be found wrong, and the largest shapes, which are not
checked, have to be measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.measure import lines

WRONG = "differs from the formula"
UNCHECKED = "x512x1024"  # in the names of shapes that are too large to be compared


def problems(folder: Path) -> list[str]:
    """List the faults of a rehearsal."""
    found = []
    for name in ("first", "sweep"):
        run = lines.read(folder / f"{name}.jsonl")
        rows = [f"{row['group']}/{row['name']}" for row in run["benchmarks"]]
        found += [f"{name}: {test} has a row of wrong values" for test in rows if UNCHECKED not in test]
        found += [f"{name}: no row of the largest shape"] * (not rows)
        checked = [test for test, why in run["missing"].items() if WRONG in why]
        found += [f"{name}: no way was found wrong"] * (not checked)
        lost = lines.DIED, lines.NOT_REACHED
        found += [f"{name}: {test}: {why}" for test, why in run["missing"].items() if why in lost]
    log, parts = (folder / "first.log").read_text(), ("== tests of tests/kernels", "== tests of tests/call")
    return found + [f"no {part!r} in the log" for part in parts if part not in log]


if __name__ == "__main__":
    if faults := problems(Path(sys.argv[1])):
        sys.exit("\n".join(faults))
    print("each check found the values wrong, and no test was lost")
