"""Tables of results in README and docs: `python -m bench.measure.report [FILE...]`.

It merges the runs of one machine, as JSON or lines, into bench/results/DEVICE.json, and writes a page with all rows.
Between markers it renders tables in docs/performance.md, and the picture and a table in README.md. tests/project fails
when a page disagrees with a result, and when a sentence of the README does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bench.measure import picture, results
from bench.measure.machine import RESULTS, ROOT, commit_name, file_name
from bench.measure.results import BOTH, COMPILED, FORMULAS, OURS, STEP, TRAINERS, Case, Figure, Result, geometric_mean

BEGIN, END = "<!-- from bench/results by python -m bench.measure.report -->\n", "<!-- end -->\n"
BEGIN_SUMMARY = "<!-- summary, from bench/results by python -m bench.measure.report -->\n"
BEGIN_LOSING = "<!-- rows that lose, from bench/results by python -m bench.measure.report -->\n"
WITHOUT = "no penalty"
STEPS = {STEP: "Training steps", COMPILED: "Steps compiled as a whole"}  # the pass of steps -> its title
STEPS |= {trainer: f"Steps in {trainer}" for trainer in TRAINERS}
CALLS = {  # the pass of calls -> its title
    BOTH: "Forward and backward",
    "forward": "Forward without backward",
    "changing upstream gradient": "Changing upstream gradient",
    "padded": "Half padding",
    "changes": "Squared changes",
    "dropout": "Dropout with penalty",
}
TITLES = STEPS | CALLS
# Where one uses fastreg: in steps with layers that are cheap, small or slow, in calls, and in calls behind a dropout.
OF_STEPS = CHEAP, SMALL, SLOW = "cheap layers", "small LSTM", "slow layers"
MEANS = "calls, mean", "dropout and call, mean"
USES = {  # the pass of a case and the way -> what one uses
    (BOTH, "fastreg"): "`fused_ar_tar`",
    ("dropout", "fused_ar_tar"): "`fused_ar_tar`",
    **{(STEP, way): OURS[way] for way in ("fused_ar_tar", "attach", "FusedRNNDropout")},
    ("dropout", "fastreg"): "`FusedRNNDropout`",
    **{(trainer, "adapter"): trainer for trainer in TRAINERS},
    **{(trainer, "adapter with fused dropout"): f"{trainer}, fused dropout" for trainer in TRAINERS},
}
Uses = dict[str, dict[str, list[Figure]]]
MOST_NAMES = 5  # that a sentence names of tests
Part = tuple[Path, str, Callable[[Any], str]]  # a page, the marker before a part, and the renderer of the part


def number(x: float) -> str:
    """Render a number with three significant digits."""
    return f"{float(f'{x:.3g}'):g}"


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)) + "\n"


def ratios(result: Result) -> Iterator[tuple[str, str, str, Figure]]:
    """Yield the kind, the case and the allocator of each ratio of a way that calls fastreg to the fastest formula."""
    for case, way in product(result.cases, OURS):
        if figure := case.over_fastest(way):
            kind = TITLES[case.info["pass"]] + f", {OURS[way]}" * (way != "fastreg")
            yield kind, case.label, case.info.get("allocator") or "", figure


def latest(results: list[Result]) -> Result:
    """Return the result that is summarized: the latest of a GPU, or else of a CPU."""
    return max(results, key=lambda result: (result.on_gpu, result.date))


def uses(part: Result) -> Uses:
    """Return ratios to the fastest formula by what one uses and where: a figure for each case, and a mean of calls."""
    found: Uses = {use: {} for use in USES.values()}
    for case, way in product(part.cases, OURS):
        use = USES.get((case.info["pass"], way))
        if use and (figure := case.over_fastest(way)):
            found[use].setdefault(place_of(case), []).append(figure)
    for places in found.values():
        places.update({place: [geometric_mean(places[place])] for place in MEANS if place in places})
    return {use: places for use, places in found.items() if places}


def place_of(case: Case) -> str:
    if "model" not in case.info:
        return MEANS[case.info["pass"] == "dropout"]
    if case.info["model"] == "8 elementwise layers":
        return CHEAP
    return SMALL if case.info["shape"][-1] < 100 else SLOW


def span(figures: list[Figure]) -> str:
    """Render the range of ratios, in which one that cannot be told from 1 is 1."""
    medians = [figure.median if figure.differs_from(1) else 1.0 for figure in figures]
    return "\N{EN DASH}".join(dict.fromkeys(f"{x:.2f}" for x in (min(medians), max(medians))))


def uses_table(part: Result, columns: Iterable[str], render: Callable[[list[Figure]], str]) -> str:
    """Render the ratios to the fastest formula, a row for each thing that one uses."""
    found = uses(part)
    places = [place for place in columns if any(place in row for row in found.values())]
    cells = {use: [render(row[place]) if place in row else "" for place in places] for use, row in found.items()}
    rows = [[use, *row] for use, row in cells.items() if any(row)]
    return table([[with_allocator("over the fastest formula", part.cases), *places], *rows])


def summary(results: list[Result]) -> str:
    """Render the part in docs/performance.md about what one uses."""
    each = latest(results).parts()
    return "\n".join(
        uses_table(part, (*OF_STEPS, *MEANS), lambda figures: "; ".join(map(str, figures))) for part in each
    )


def with_allocator(text: str, cases: list[Case]) -> str:
    """Append the allocator, which on a GPU is none."""
    return ", ".join(filter(None, [text, cases[0].info.get("allocator")]))


def sources(results: list[Result]) -> str:
    """Render the part in docs/performance.md that names the machine, and links to all rows."""
    links = [f"[{x.machine['device']}](../bench/results/{page_of(x).name})" for x in results]
    measured = "" if any(x.on_gpu for x in results) else "\n**No GPU has been measured yet.**\n"
    return f"{where(latest(results))}. All rows: {', '.join(links)}.\n{measured}"


def losing(results: list[Result]) -> str:
    """Render each case in which a way that calls fastreg takes longer than the fastest formula."""
    known = [*ratios(latest(results))]
    above = sorted(row for row in known if row[-1].median > 1 and row[-1].differs_from(1))
    shown = table([["", "", "", "over the fastest formula"], *([*row[:-1], f"{row[-1]}"] for row in above)])
    return f"On {latest(results).machine['device']}, {len(above)} of {len(known)} ratios are above 1:\n\n{shown}"


def speed_and_memory(results: list[Result]) -> str:
    """Draw the picture of the README, and render the table below it, and the machine."""
    result = latest(results)
    part = result.parts()[0]
    if cases := part.of(STEP, picture.MODELS):
        picture.draw(cases, with_allocator("GPU" if result.on_gpu else "CPU", cases))
    shown = "![Time and peak memory added to a step](docs/steps.svg)"
    return f"{shown}\n\n{uses_table(part, OF_STEPS, span)}\nMeasured on {result.machine['device']}.\n"


def all_rows(result: Result) -> str:
    """Render the page of one machine."""
    title = f"# Measurements on {result.machine['device']}\n"
    how = "[Performance](../../docs/performance.md#how-to-read-the-measurements) explains the tables.\n"
    return "\n".join([title, how, *tables(result)])


def page_of(result: Result) -> Path:
    return RESULTS / file_name(result.machine["device"]).replace(".json", ".md")


def tables(result: Result) -> Iterator[str]:
    """Render all rows of a result."""
    yield f"{where(result)}.\n"
    yield from filter(None, [caveats(result)])
    for part, kind in product(result.parts(), STEPS):
        if cases := [case for case in part.of(kind) if WITHOUT in case.ways]:
            yield f"## {with_allocator(STEPS[kind], cases)}\n"
            yield f"Milliseconds, {clock(result)}:\n"
            renderers = (trainer_table,) if kind in TRAINERS else (step_table, fastest_table, peak_table)
            yield from (render(cases) for render in renderers)
    for kind, title in CALLS.items():
        if cases := result.of(kind):
            yield f"## {title}\n"
            yield call_table(cases, result.on_gpu)
            if len(ways_of(cases, OURS)) > 1:
                yield from (fastest_table(part.of(kind)) for part in result.parts() if part.of(kind))
    if cases := result.of("sweep"):
        yield "## Other values of the kernels' constants\n"
        yield sweep_table(cases)


def where(result: Result) -> str:
    """Name the machine, the versions and the commit in one line."""
    machine, commit = result.machine, result.commit
    parts = [f"fastreg {commit['version']}", f"PyTorch {machine['torch']}", f"Python {machine['python_version']}"]
    if result.on_gpu:
        parts += [f"Triton {machine['triton']}", f"a copy moves {machine['copy_bandwidth'] / 1e12:.2f} TB/s"]
    else:
        parts += [f"{machine['threads']} threads"]
    return f"{machine['device']}: {', '.join(parts)}, commit {commit_name(commit)}, source {commit['source']}"


def caveats(result: Result) -> str:
    """Return a sentence about the tests without a row, for each reason."""
    tests: dict[str, list[str]] = {}
    for test, why in result.missing.items():
        tests.setdefault(why, []).append(test)
    more = {why: f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES) for why, names in tests.items()}
    named = {why: ", ".join(names[:MOST_NAMES]) for why, names in tests.items()}
    return "".join(f"- Not measured, {why}: {named[why]}{more[why]}.\n" for why in tests)


def ways_of(cases: list[Case], ways: Iterable[str]) -> list[str]:
    """Return the ways that at least one of the cases was measured with."""
    return [way for way in ways if any(way in case.ways for case in cases)]


def step_table(cases: list[Case]) -> str:
    """Render the time of steps without the penalty, and the time that each way of adding it adds."""
    ways = ways_of(cases, names := FORMULAS | OURS)
    rows = [["(batch, time, hidden)", "without", *(names[way] for way in ways)]]
    for case in cases:
        without = 1e3 * case.ways[WITHOUT]["median"]
        digits = 1 if without > 100 else 2 if without > 10 else 3
        added = [case.added(way) if way in case.ways else None for way in ways]
        ms = [f"{1e3 * x.median:+.{digits}f}±{1e3 * x.error:.{digits}f}" if x else "" for x in added]
        rows.append([case.label, number(without), *ms])
    return table(rows)


def fastest_table(cases: list[Case]) -> str:
    """Render the ratio of each way that calls fastreg to the fastest formula."""
    ways = ways_of(cases, OURS)
    rows = [[case.label, *(f"{case.over_fastest(way) or ''}" for way in ways)] for case in cases]
    return table([[with_allocator("over the fastest formula", cases), *(OURS[way] for way in ways)], *rows])


def trainer_table(cases: list[Case]) -> str:
    """Render what each way makes of a trainer's step: ratios of times, and the operators and launches that it adds."""
    counts = [what for what in ("operators", "launches") if what in cases[0].ways[WITHOUT]]
    heads = "(batch, time, hidden)", "way", "ms", "over no penalty", "over the formula"
    rows = [[*heads, *(f"adds {what}" for what in counts)]]
    for case, (way, words) in product(cases, ({WITHOUT: WITHOUT} | FORMULAS | OURS).items()):
        if found := case.ways.get(way):
            over = [f"{case.over(way, other)}" if other in found["over"] else "" for other in (WITHOUT, "eager")]
            added = [f"{found[what] - case.ways[WITHOUT][what]:+.1f}" for what in counts]
            rows.append([case.label, words, number(1e3 * found["median"]), *over, *added])
    return table(rows)


def peak_table(cases: list[Case]) -> str:
    """Render the peak memory of steps without the penalty, and the share that each way of adding it adds."""
    ways = ways_of(cases, names := FORMULAS | OURS)
    rows = [["peak memory", "without, MB", *(names[way] for way in ways)]]
    for case in cases:
        first, *peaks = [case.ways.get(way, {}).get("peak_bytes", 0) for way in (WITHOUT, *ways)]
        if first:  # adding 0 makes a positive zero of a negative one
            more = [f"{round(peak / first - 1, 2) + 0:+.0%}" if peak else "" for peak in peaks]
            rows.append([case.label, number(first / 1e6), *more])
    return table(rows)


def call_table(cases: list[Case], on_gpu: bool) -> str:
    """Render the time of fastreg in calls of one kind, and its ratio to each other way's."""
    others = [way for way in dict.fromkeys(way for case in cases for way in case.ways) if way != "fastreg"]
    facts = ["of the copy bandwidth", "launches"] if on_gpu else ["allocator"]
    rows = [["(batch, time, hidden), dtype", "fastreg, ms", *(f"over {way}" for way in others), *facts]]
    for case in cases:
        if own := case.ways.get("fastreg"):
            cells = [f"{case.over('fastreg', way)}" if way in case.ways else "" for way in others]
            share = f"{own['share_of_copy']:.0%}" if "share_of_copy" in own else ""
            known = [share, f"{own.get('launches', '')}"] if on_gpu else [case.info["allocator"]]
            rows.append([case.label, number(1e3 * own["median"]), *cells, *known])
    return table(rows)


def sweep_table(cases: list[Case]) -> str:
    """Render the time of forward and backward in a CUDA graph, with other values of the kernels' constants."""
    runs = "16", "8", "4"
    rows = [["us in a graph; (batch, time, hidden), dtype", "`PROGRAMS`", *(f"`SHORT_RUN` {run}" for run in runs)]]
    for case in cases:
        seconds = [case.ways.get(run, {}).get("graph_rotated_seconds") for run in runs]
        rows.append([case.label, f"{case.info['programs']}", *(number(1e6 * x) if x else "" for x in seconds)])
    return table(rows)


def clock(result: Result) -> str:
    """Name the clock of training steps."""
    return "wall time" if result.on_gpu else "CPU time of one thread"


PARTS: list[Part] = [
    (ROOT / "README.md", BEGIN, speed_and_memory),
    (ROOT / "docs" / "performance.md", BEGIN_SUMMARY, summary),
    (ROOT / "docs" / "performance.md", BEGIN, sources),
    (ROOT / "docs" / "performance.md", BEGIN_LOSING, losing),
]


def pages(results: list[Result]) -> dict[Path, str]:
    """Return each page that shows results, and its text."""
    return {page_of(result): all_rows(result) for result in results} | with_parts(PARTS, results)


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
    parser.add_argument("runs", nargs="*", type=Path, help="JSON or lines: together they replace the machine's result")
    options = parser.parse_args()
    if options.runs:
        found = results.merged([results.read(file) for file in options.runs])
        if options.show:
            print("\n".join(tables(results.result_of(found))))
            return
        RESULTS.joinpath(file_name(found["machine_info"]["device"])).write_text(results.compact(found))
    write(pages([results.load(file) for file in sorted(RESULTS.glob("*.json"))]))


if __name__ == "__main__":
    main()
