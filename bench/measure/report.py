"""Tables of results in README and docs: `python -m bench.measure.report [FILE...]`.

It merges the runs of one machine, as JSON or lines, into bench/results/DEVICE.json. Between markers it renders the
tables of docs/performance.md, and the sentences and the picture of README.md. No figure is typed: tests/project fails
when a page disagrees with a result. `pytest-benchmark compare` prints all rows of a result.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.measure import picture
from bench.measure.machine import DEFAULT, ROOT, commit_name, file_name
from bench.measure.results import (
    BOTH,
    COMPILED,
    RESULTS,
    STEP,
    Case,
    Figure,
    Result,
    compact,
    load,
    merged,
    read,
    result_of,
)

WITHOUT, PEERS = "no penalty", ("compiled", "eager")  # the peers in this order in all tables
BEGIN, END = "<!-- from bench/results by python -m bench.measure.report -->\n", "<!-- end -->\n"
BEGIN_CALLS = "<!-- calls, from bench/results by python -m bench.measure.report -->\n"
KINDS = {  # the pass of calls -> the title of its table
    BOTH: "Forward and backward",
    "forward": "A forward without a backward",
    "changing upstream gradient": "An upstream gradient that changes in each step",
    "padded": "A batch that is half padding",
    "changes": "Squared changes of a world model's representations",
    "dropout": "Variational dropout with the penalty",
}
STEPS = {  # way of a training step -> heading of its column, which a table has if the result has the way
    WITHOUT: "without",
    "compiled": "compiled formula",
    "eager": "formula",
    "fused_ar_tar": "`fused_ar_tar`",
    "hooks by hand": "hooks by hand",
    "attach": "`attach`",
    "FusedRNNDropout": "`FusedRNNDropout`",
}
CALLING = list(STEPS)[3:]  # the ways that call fastreg
OURS = ["fastreg", *CALLING]
PEAK = "peak_bytes"
MOST_NAMES = 5  # that a sentence names of tests


def number(x: float) -> str:
    """Render a number with three significant digits."""
    return f"{float(f'{x:.3g}'):g}"


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)) + "\n"


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
    return "".join(f"- Not measured, {why}: {some(names)}.\n" for why, names in tests.items())


def some(names: list[str]) -> str:
    """List the first few names, and count the others."""
    return ", ".join(names[:MOST_NAMES]) + f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)


def call_table(result: Result, kind: str) -> str:
    """Render the time of fastreg in calls of one kind, and how often that time each other way takes."""
    cases = [case for case in result.of(kind) if "fastreg" in case.ways]
    ways = list(dict.fromkeys(way for case in cases for way in case.ways if way != "fastreg"))
    gpu = ["of the copy bandwidth", "launches"] if result.on_gpu else ["allocator"]
    rows = [["(batch, time, hidden), dtype", "fastreg, ms", *ways, *gpu]]
    for case in cases:
        own = case.ways["fastreg"]
        cells = [f"{case.over(way, 'fastreg')}" if way in case.ways else "" for way in ways]
        share = [f"{own['share_of_copy']:.0%}"] if "share_of_copy" in own else [""]
        facts = [*share, f"{own.get('launches', '')}"] if result.on_gpu else [case.info["allocator"]]
        rows.append([case.label, number(1e3 * own["median"]), *cells, *facts])
    return table(rows)


def sweep_table(result: Result) -> str:
    """Render the time of forward and backward in a CUDA graph, with other values of the kernels' constants."""
    runs = "16", "8", "4"
    rows = [["us in a graph; (batch, time, hidden), dtype", "`PROGRAMS`", *(f"`SHORT_RUN` {run}" for run in runs)]]
    for case in result.of("sweep"):
        seconds = [case.ways.get(run, {}).get("graph_rotated_seconds") for run in runs]
        rows.append([case.label, f"{case.info['programs']}", *(number(1e6 * x) if x else "" for x in seconds)])
    return table(rows)


def ways_of(result: Result, ways: Iterable[str] = STEPS) -> list[str]:
    """Return the ways that at least one training step of a result was measured with."""
    return [way for way in ways if any(way in case.ways for case in result.of(STEP))]


def step_table(result: Result) -> str:
    """Render the time of steps without the penalty, and the time that each way of adding it adds."""
    ways = ways_of(result)
    rows = [["ms; (batch, time, hidden)", *(STEPS[way] for way in ways)]]
    for case in steps_of(result):
        without = 1e3 * case.ways[WITHOUT]["median"]
        digits = 1 if without > 100 else 2 if without > 10 else 3
        added = [case.added(way) if way in case.ways else None for way in ways[1:]]
        ms = [f"{1e3 * x.median:+.{digits}f}±{1e3 * x.error:.{digits}f}" if x else "" for x in added]
        rows.append([case.label, number(without), *ms])
    return table(rows)


def steps_of(result: Result) -> list[Case]:
    return [case for case in result.of(STEP) if {WITHOUT, *PEERS} <= {*case.ways}]


def added_table(result: Result) -> str:
    """Render the time that each way of fastreg adds over the time that each formula adds."""
    ours = ways_of(result, CALLING)
    rows = [["added time, over compiled formula; formula", *(STEPS[way] for way in ours)]]
    for case in steps_of(result):
        ratios = [
            "; ".join(f"{case.added(way).over(case.added(peer))}" for peer in PEERS) if way in case.ways else ""
            for way in ours
        ]
        rows.append([case.label, *ratios])
    return table(rows)


def whole_table(result: Result) -> str:
    """Render the time of whole steps with each way of fastreg over steps with each formula."""
    ours = ways_of(result, CALLING)
    rows = [["whole step, over compiled formula; formula", *(STEPS[way] for way in ours)]]
    for case in steps_of(result):
        ratios = ["; ".join(f"{case.over(way, peer)}" for peer in PEERS) if way in case.ways else "" for way in ours]
        rows.append([case.label, *ratios])
    return table(rows)


def peak_table(result: Result) -> str:
    """Render the peak memory of steps without the penalty, and the share that each way of adding it adds."""
    ways = ways_of(result)
    rows = [["peak memory of a step", "without, MB", *(STEPS[way] for way in ways[1:])]]
    for case in steps_of(result):
        first, *peaks = [case.ways.get(way, {}).get(PEAK, 0) for way in ways]
        if first:  # adding 0 makes a positive zero of a negative one
            more = [f"{round(peak / first - 1, 2) + 0:+.0%}" if peak else "" for peak in peaks]
            rows.append([case.label, number(first / 1e6), *more])
    return table(rows)


def compiled_table(result: Result) -> str:
    """Render the time of each step that is compiled as a whole, and the ratio of fastreg's to the formula's."""
    rows = [["ms; (batch, time, hidden)", "without", "formula", "`fused_ar_tar`", "`fused_ar_tar` / formula"]]
    for case in result.of(COMPILED):
        if {WITHOUT, "eager", "fused_ar_tar"} <= {*case.ways}:
            times = [number(1e3 * case.ways[way]["median"]) for way in (WITHOUT, "eager", "fused_ar_tar")]
            ratio = case.over("fused_ar_tar", "eager")
            rows.append([case.label, *times, f"{ratio.median:.3f}±{ratio.error:.3f}"])
    return table(rows)


def clock(result: Result) -> str:
    """Name the clock of training steps."""
    return "wall time" if result.on_gpu else "CPU time of one thread"


def speeds(result: Result, peer: str) -> list[float]:
    """Return how many times as fast as a peer fastreg is in each forward and backward."""
    return [case.over(peer, "fastreg").median for case in result.of(BOTH) if {peer, "fastreg"} <= {*case.ways}]


def mean(result: Result, peer: str) -> str:
    return f"{statistics.geometric_mean(speeds(result, peer)):.1f}"


def latest(results: list[Result]) -> list[Result]:
    """Return the result that the pages show in full, if there is any: the latest of a GPU, or else of a CPU."""
    return sorted(results, key=lambda result: (result.on_gpu, result.date))[-1:]


def slowest(results: list[Result]) -> tuple[Figure, Case, str, str] | None:
    """Return the ratio, the case and both ways where fastreg is slowest against a formula, over all rows."""
    ratios = [
        (case.over(way, peer), case, way, peer)
        for result in results
        for case in result.cases
        for way, peer in ((way, peer) for way in OURS for peer in PEERS)
        if {way, peer} <= {*case.ways}
    ]
    clear = [found for found in ratios if found[0].differs_from(1)]
    return max(clear, key=lambda found: found[0].median, default=None)


def not_measured(results: list[Result]) -> list[str]:
    """Return a sentence that no GPU is measured, if none is."""
    if any(result.on_gpu for result in results):
        return []
    return [
        "**No GPU has been measured yet.** The Triton kernels are tested on the CPU: in Triton's interpreter, and, "
        "compiled for an H100, in an emulator of ours.\n"
    ]


def speed_of_calls(results: list[Result]) -> str:
    """Render the sentences in the README: the speed of a call, the slowest row, and whether a GPU was measured."""
    parts = []
    for result in latest(results):
        *_, part = result.parts()  # on a CPU the default allocator, which users have
        cases = part.of(BOTH)
        setting = "" if result.on_gpu else f" and {name_of(part)}"
        parts += [
            f"**A call costs less.** Its forward and backward take {part_of(part, 'compiled')} of the time of the "
            f"compiled formula and {part_of(part, 'eager')} of the eager one (geometric means of {len(cases)} cases "
            f"over {len({tuple(case.info['shape']) for case in cases})} shapes, {result.machine['device']}{setting})."
        ]
    if found := slowest(results):
        ratio, case, way, peer = found
        what = f"A step of {case.label}" if "model" in case.info else f"{KINDS[case.info['pass']]} at {case.label}"
        what += "" if case.info.get("allocator") is None else f", {case.info['allocator']}"
        formula = "compiled formula" if peer == "compiled" else "eager formula"
        parts += [
            f"In the slowest of [all rows](docs/performance.md#a-call) `{way}` takes {ratio} times as long as the "
            f"{formula}: {what[0].lower()}{what[1:]}."
        ]
    return "\n".join([" ".join(parts) + "\n", *not_measured(results)])


def part_of(result: Result, peer: str) -> str:
    """Render the time of fastreg as a share of a peer's, in percent."""
    return f"{1 / statistics.geometric_mean(speeds(result, peer)):.0%}"


def name_of(part: Result) -> str:
    """Name the allocator of the cases."""
    allocator = part.cases[0].info["allocator"]
    return "the " + allocator if allocator == DEFAULT else allocator


def steps_picture(results: list[Result]) -> str:
    """Draw the picture of the README, and render the line that shows it, with a text for those who cannot see it."""
    for result in latest(results):
        part = result.parts()[0]
        if cases := part.of(STEP, picture.CASES):
            setting = "" if result.on_gpu else f", {part.cases[0].info['allocator']}"
            versions = f"fastreg {result.commit['version']}, PyTorch {result.machine['torch']}"
            about = f"{result.machine['device']}{setting}, {versions}"
            picture.draw(cases, about, clock(result))
            shown = f"![{picture.text(cases)}](docs/{picture.FILE.name})"
            return f"{shown}\n\nMeasured on: {about}. The lines at the ends of bars are standard errors.\n"
    return ""


def machines_table(results: list[Result]) -> str:
    """Render the speed of forward and backward on each machine, with each allocator."""
    rows = [["machine", "fastreg", "allocator", *(f"{peer}: mean, least" for peer in PEERS)]]
    for result in results:
        for part in result.parts():
            setting = part.cases[0].info.get("allocator") or ""
            cells = [f"{mean(part, peer)}, {min(speeds(part, peer)):.2f}" for peer in PEERS]
            rows.append([result.machine["device"], result.commit["version"], setting, *cells])
    return table(rows)


def figures(results: list[Result]) -> str:
    """Render the part in docs/performance.md: all rows of the latest result, and one row of each machine."""
    parts = [part for result in latest(results) for part in tables(result)]
    return "\n".join(
        [*parts, "### Each machine\n", machines_table([x for x in results if x.of(BOTH)]), *not_measured(results)]
    )


def tables(result: Result) -> Iterator[str]:
    """Render all rows of a result."""
    yield f"{where(result)}.\n"
    yield from filter(None, [caveats(result)])
    for part in result.parts():
        setting = "" if result.on_gpu else f" with {name_of(part)}"
        if steps_of(part):
            yield f"### Training steps{setting}\n\nMilliseconds, {clock(result)}:\n"
            yield step_table(part)
            yield added_table(part)
            yield whole_table(part)
            yield peak_table(part)
        if part.of(COMPILED):
            yield "Steps that are compiled as a whole:\n"
            yield compiled_table(part)
    yield "### A call\n"
    for kind, title in KINDS.items():
        if result.of(kind):
            yield f"{title}:\n"
            yield call_table(result, kind)
    if result.of("sweep"):
        yield "Other values of the kernels' constants:\n"
        yield sweep_table(result)


PAGES = [  # a page, the marker before a part, and the renderer of the part
    (ROOT / "README.md", BEGIN_CALLS, speed_of_calls),
    (ROOT / "README.md", BEGIN, steps_picture),
    (ROOT / "docs" / "performance.md", BEGIN, figures),
]


def with_part(page: str, part: str, begin: str = BEGIN) -> str:
    """Return a page with `part` between the marker `begin` and the next end."""
    before, rest = page.split(begin)
    _, after = rest.split(END, 1)
    return f"{before}{begin}\n{part}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.measure.report", description=__doc__)
    parser.add_argument("--show", action="store_true", help="only print the tables of the runs, and change no file")
    parser.add_argument("runs", nargs="*", type=Path, help="JSON or lines: together they replace the machine's result")
    options = parser.parse_args()
    if options.runs:
        found = merged([read(file) for file in options.runs])
        if options.show:
            print("\n".join(tables(result_of(found))))
            return
        RESULTS.joinpath(file_name(found["machine_info"]["device"])).write_text(compact(found))
    results = [load(file) for file in sorted(RESULTS.glob("*.json"))]
    for page, begin, part in PAGES:
        page.write_text(with_part(page.read_text(), part(results), begin))
    print(figures(results))


if __name__ == "__main__":
    main()
