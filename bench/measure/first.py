"""The page of the first minutes on a GPU: `python -m bench.measure.first LINES`.

Beside DEVICE.jsonl, the lines of bench/test_first.py, it writes DEVICE.json, the compact result of the headline
benchmarks, and DEVICE.md, which has all findings in tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.measure import report
from bench.measure.lines import records, session
from bench.measure.worker import NOT_REACHED
from bench.offline import prediction

Found = dict[tuple[str, str], dict[str, Any]]  # part and task -> its line; of a task that was not reached, an empty one
HIDDEN = "errors", "failed"


def findings(lines: Path) -> Found:
    """Return the line of each task of a session."""
    first, *ended = records(lines)
    return {(part, task): {} for part, task in first["tests"]} | {(x["part"], x["task"]): x for x in ended}


def seconds(found: Found) -> dict[str, float]:
    """Return the seconds of each part."""
    took = dict.fromkeys((part for part, _ in found), 0.0)
    for (part, _), line in found.items():
        took[part] += line.get("seconds", 0.0)
    return took


def page(lines: Path) -> str:
    """Render all findings."""
    found, result = findings(lines), report.result_of(lines.stem, session(records(lines)))
    took = ", ".join(f"{part} {number:.0f} s" for part, number in seconds(found).items())
    parts = [f"# The first minutes on {result.machine['device']}\n", f"{report.where(result)}\n", f"Parts: {took}.\n"]
    parts += ["## Smoke\n", table("smoke", found)]
    shares = [prediction.beside(result)] if result.on_gpu else []
    parts += ["## Headline\n", *shares, report.call_table(result), *report.step_tables(result), report.caveats(result)]
    for part in ("sweep", "order", "files"):
        parts += [f"## {part.capitalize()}\n", table(part, found)]
    for (part, task), line in found.items():
        facts = line.get("found", {}) if part == "device" else {}
        parts += [f"## {task.capitalize()}\n"] * bool(facts)
        parts += [f"{key}:\n\n```\n{value}\n```\n" for key, value in facts.items()]
    return "\n".join(parts)


def table(part: str, found: Found) -> str:
    """Render a row for each task of a part, with its findings, or the reason why it is lost."""
    rows = {task: line for (of, task), line in found.items() if of == part}
    rows = {task: line.get("found") or {"lost": line.get("lost", NOT_REACHED)} for task, line in rows.items()}
    columns = list(dict.fromkeys(key for facts in rows.values() for key in facts if key not in HIDDEN))
    columns += ["errors of tolerance"] * (part == "smoke") + ["failed"] * (part == "files")
    lines = [[part, *columns]]
    for task, facts in rows.items():
        cells = {key: f"{value:.1f}" if isinstance(value, float) else f"{value}" for key, value in facts.items()}
        cells["errors of tolerance"] = ", ".join(f"{name}: {x:.2f}" for name, x in facts.get("errors", {}).items())
        cells["failed"] = report.some(facts.get("failed", []))
        lines.append([task, *(cells.get(column, "") for column in columns)])
    return report.table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.measure.first", description=__doc__)
    parser.add_argument("lines", type=Path)
    lines: Path = parser.parse_args().lines
    lines.with_suffix(".json").write_text(report.compact(session(records(lines))))
    lines.with_suffix(".md").write_text(page(lines))
    print(f"bench.measure.first: wrote {lines.with_suffix('.md')}")


if __name__ == "__main__":
    main()
