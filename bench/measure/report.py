"""Tables of results in README and docs: `python -m bench.measure.report [FILE...]`.

It merges the runs of one machine, as lines, into bench/results/DEVICE.json, writes a page with all rows, and renders
tables between markers of README.md and docs/performance.md. tests/project fails when a page disagrees with a result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from bench.measure import lines, results
from bench.measure.machine import RESULTS, ROOT, commit_name, file_name
from bench.measure.results import BOTH, OURS, STEP, TRAINERS, WAYS, WITHOUT, Case, Result

MARKER, END = "<!-- {}, from bench/results by python -m bench.measure.report -->\n", "<!-- end -->\n"
# The passes of steps and of calls, and their titles.
STEPS = {STEP: "Training steps"} | {trainer: f"Steps in {trainer}" for trainer in TRAINERS}
CALLS = {BOTH: "Forward and backward", "padded": "Half padding", "dropout": "Dropout with penalty"}
SWEEP = {stretch: f"`SHORT_STRETCH` {stretch}" for stretch in ("16", "8", "4")}  # ways of a sweep
# The columns of the README: several ways are one column, which shows the fastest.
COLUMNS = {
    "formula": ["eager"],
    "two lines": ["tight"],
    "compiled": ["compiled", "compiled with dropout", "compiled step"],
    "call": ["fused_ar_tar"],
    "attach or adapter": ["attach", "adapter"],
    "fused dropout": ["fused dropout", "adapter with fused dropout"],
}
ROWS = [  # of the README, by pass and label
    *((STEP, f"LSTM, {shape}, elementwise dropout") for shape in ("(8, 40, 64)", "(16, 70, 200)", "(20, 70, 400)")),
    *((trainer, "LSTM, (16, 70, 200), elementwise dropout") for trainer in ("Lightning", "Transformers")),
    ("fastai", "AWD-LSTM, (16, 70, 200), variational dropout"),
    (STEP, "8 elementwise layers, (4, 512, 512), elementwise dropout"),
    (STEP, "8 elementwise layers, (4, 512, 512), variational dropout"),
]
MOST_NAMES = 5  # that a sentence names of tests
Part = tuple[Path, str, Callable[[Any], str]]  # a page, the marker before a part, and the renderer of the part


def number(x: float) -> str:
    """Render a number with three significant digits."""
    return f"{float(f'{x:.3g}'):g}"


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)) + "\n"


def complete(part: Result, base: str, *kinds: str) -> list[Case]:
    """Return the cases of passes whose base, with which ways are compared, was measured."""
    return [case for kind in kinds for case in part.of(kind) if base in case.ways]


def words(case: Case) -> str:
    kind = case.info["pass"]
    return case.label + f", in {kind}" * (kind in TRAINERS)


def by_way(cases: list[Case], first: str, cell: Callable[[Case, str], str], names: dict[str, str] = WAYS) -> str:
    """Render a row for each case, and a column for each way that at least one of the cases was measured with."""
    ways = [way for way in names if any(way in case.ways for case in cases)]
    rows = [[words(case), *(cell(case, way) if way in case.ways else "" for way in ways)] for case in cases]
    return table([[first, *(names[way] for way in ways)], *rows])


def added(case: Case, way: str) -> str:
    """Render what a way adds to the time of a step without a penalty and with the user's own dropout."""
    return milliseconds(case, way) if way == WITHOUT else case.over(way, WITHOUT).percent()


def milliseconds(case: Case, way: str) -> str:
    return f"{number(1e3 * case.ways[way]['median'])} ms"


def over_others(case: Case, way: str) -> str:
    """Render the time of fastreg, and its ratio to that of another way."""
    return milliseconds(case, way) if way == "fastreg" else f"{case.over('fastreg', way)}"


def added_peak(case: Case, way: str) -> str:
    first, peak = (case.ways[x].get("peak_bytes", 0) for x in (WITHOUT, way))
    if not first or not peak:
        return ""  # adding 0 makes a positive zero of a negative one
    return f"{number(first / 1e6)} MB" if way == WITHOUT else f"{round(peak / first - 1, 2) + 0:+.0%}"


def added_count(what: str, case: Case, way: str) -> str:
    first, count = (case.ways[x][what] for x in (WITHOUT, way))
    return f"{first:.1f}" if way == WITHOUT else f"{count - first:+.1f}"


def fact(what: str, form: str, case: Case, way: str) -> str:
    return form.format(case.ways[way][what]) if what in case.ways[way] else ""


def in_brief(result: Result) -> str:
    """Render the table of the README, with the default allocator."""
    part = result.parts()[0]
    measured = {(case.info["pass"], case.label): case for case in complete(part, WITHOUT, *STEPS)}
    rows = [["(batch, time, hidden)", *COLUMNS]]
    for case in (measured[row] for row in ROWS if row in measured):
        found = [[case.over(way, WITHOUT) for way in ways if way in case.ways] for ways in COLUMNS.values()]
        rows.append([words(case), *(min(ratios).percent() if ratios else "" for ratios in found)])
    machine = f"{part.machine['device']}, PyTorch {part.machine['torch']}"
    return f"{table(rows)}\nMeasured on {with_allocator(machine, part.cases)}; {clock(part)}.\n"


def in_full(result: Result) -> str:
    """Render what each way adds to the steps in docs/performance.md, the default allocator first."""
    parts = [complete(part, WITHOUT, STEP, *TRAINERS) for part in result.parts()]
    return "\n".join(by_way(cases, with_allocator("added to a step", cases), added) for cases in parts if cases)


def memory(result: Result) -> str:
    """Render the peak memory that each way adds to a step."""
    return by_way(complete(result.parts()[0], WITHOUT, STEP), "peak memory added", added_peak)


def with_allocator(text: str, cases: list[Case]) -> str:
    return ", ".join(filter(None, [text, cases[0].info.get("allocator")]))  # a GPU has none


def sources(result: Result) -> str:
    """Render the part in docs/performance.md that names the machine, and links to the rows of all machines."""
    known = results.load()
    links = [f"[{x.machine['device']}](../bench/results/{page_of(x).name})" for x in known]
    measured = "" if any(x.on_gpu for x in known) else "\n**No GPU has been measured yet.**\n"
    return f"{where(result)}. All rows: {', '.join(links)}.\n{measured}"


def losing(result: Result) -> str:
    """Render each case in which a way that calls fastreg takes longer than the fastest formula."""
    known = []
    for case, way in product(result.cases, OURS):
        if ratio := case.over_fastest(way):
            kind = (STEPS | CALLS)[case.info["pass"]] + f", {OURS[way]}" * (way != "fastreg")
            known.append((kind, case.label, case.info.get("allocator") or "", ratio))
    above = sorted(row for row in known if row[-1].median > 1 and row[-1].differs_from(1))
    shown = table([["", "", "", "over the fastest formula"], *([*row[:-1], f"{row[-1]}"] for row in above)])
    return f"On {result.machine['device']}, {len(above)} of {len(known)} ratios are above 1:\n\n{shown}"


def page_of(result: Result) -> Path:
    return RESULTS / file_name(result.machine["device"]).replace(".json", ".md")


def tables(result: Result) -> Iterator[str]:
    """Render the page of one machine, with all rows."""
    yield f"# Measurements on {result.machine['device']}\n"
    yield "[Performance](../../docs/performance.md#how-to-read-the-measurements) explains the tables.\n"
    yield f"{where(result)}.\n"
    if result.missing:
        yield "".join(caveats(result.missing))
    for part, kind in product(result.parts(), STEPS):
        if cases := complete(part, WITHOUT, kind):
            yield f"## {with_allocator(STEPS[kind], cases)}\n"
            yield f"In percent, {clock(result)}:\n"
            yield by_way(cases, "added to a step", added)
            yield by_way(cases, with_allocator("over the fastest formula", cases), over_fastest, OURS)
            yield by_way(cases, "peak memory added", added_peak) if kind not in TRAINERS else ""
            counts = [what for what in ("operators", "launches") if what in cases[0].ways[WITHOUT]]
            yield from (by_way(cases, f"{what} added", partial(added_count, what)) for what in counts)
    for part, kind in product(result.parts(), CALLS):
        if cases := complete(part, "fastreg", kind):
            yield f"## {with_allocator(CALLS[kind], cases)}\n"
            yield by_way(cases, "the time of fastreg, over that of", over_others)
            yield by_way(cases, with_allocator("over the fastest formula", cases), over_fastest, OURS)
            if result.on_gpu:
                yield by_way(cases, "of the copy bandwidth", partial(fact, "share_of_copy", "{:.0%}"))
                yield by_way(cases, "launches", partial(fact, "launches", "{}"))
    if cases := result.of("sweep"):
        yield "## Other values of the kernels' constants\n"
        yield by_way(cases, "us in a graph", partial(fact, "us_in_a_graph", "{:.3g}"), SWEEP)


def where(result: Result) -> str:
    """Name the machine, the versions and the commit in one line."""
    machine, commit = result.machine, result.commit
    parts = [f"fastreg {commit['version']}", f"PyTorch {machine['torch']}", f"Python {machine['python_version']}"]
    if result.on_gpu:
        parts += [f"Triton {machine['triton']}", f"a copy moves {machine['copy_bandwidth'] / 1e12:.2f} TB/s"]
    else:
        parts += [f"{machine['threads']} threads"]
    return f"{machine['device']}: {', '.join(parts)}, commit {commit_name(commit)}, source {commit['source']}"


def caveats(missing: dict[str, str]) -> Iterator[str]:
    """Render a line about the tests without a row, for each reason."""
    for why in dict.fromkeys(missing.values()):
        names = [test for test, reason in missing.items() if reason == why]
        more = f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)
        yield f"- Not measured, {why}: {', '.join(names[:MOST_NAMES])}{more}.\n"


def over_fastest(case: Case, way: str) -> str:
    """Render the ratio of a way that calls fastreg to the fastest formula."""
    return f"{case.over_fastest(way) or ''}"


def clock(result: Result) -> str:
    """Name the clock of training steps."""
    return "wall time" if result.on_gpu else "CPU time of one thread"


PERFORMANCE = {"added": in_full, "memory": memory, "sources": sources, "losing": losing}
PARTS: list[Part] = [
    (ROOT / "README.md", MARKER.format("added"), in_brief),
    *((ROOT / "docs" / "performance.md", MARKER.format(name), part) for name, part in PERFORMANCE.items()),
]


def pages() -> dict[Path, str]:
    """Return each page that shows results, and its text. README and docs show the latest of a GPU, or else of a CPU."""
    known = results.load()
    shown = max(known, key=lambda result: (result.on_gpu, result.date))
    return {page_of(result): "\n".join(tables(result)) for result in known} | with_parts(PARTS, shown)


def with_parts(parts: list[Part], shown: Any) -> dict[Path, str]:
    """Return pages, each with its parts between their markers and the next end."""
    texts = {page: page.read_text() for page, _, _ in parts}
    for page, begin, part in parts:
        before, rest = texts[page].split(begin)
        texts[page] = f"{before}{begin}\n{part(shown)}\n{END}{rest.split(END, 1)[1]}"
    return texts


def write(texts: dict[Path, str]) -> None:
    for page, text in texts.items():
        page.write_text(text)
        print(f"wrote {page.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.measure.report", description=__doc__)
    parser.add_argument("--show", action="store_true", help="only print the tables of the runs, and change no file")
    parser.add_argument("runs", nargs="*", type=Path, help="lines: together they replace the machine's result")
    options = parser.parse_args()
    if options.runs:
        found = results.merged([lines.read(file) for file in options.runs])
        if options.show:
            print("\n".join(tables(results.result_of(found))))
            return
        RESULTS.joinpath(file_name(found["machine_info"]["device"])).write_text(results.compact(found))
    write(pages())


if __name__ == "__main__":
    main()
