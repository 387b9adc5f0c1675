"""Compact results, and tables of them in README and docs: `python -m bench.measure.report [JSON]`.

It compacts the JSON of pytest-benchmark into bench/results/DEVICE.json, one file for each machine, without the rounds.
From the latest machine it renders the speed of a call and a few training steps between the markers in README.md, and
tables between the markers in docs/performance.md. No figure is typed: tests/project/test_bench_report.py fails when a
page disagrees with a result. `pytest-benchmark compare` prints all rows of a result.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.cases import BOTH
from bench.measure.machine import ALLOCATORS, DEFAULT, KEPT, ROOT, commit_name, file_name
from bench.measure.steps import BY_HAND, COMPILED, STEP, WITHOUT

RESULTS = ROOT / "bench" / "results"
FIRST = RESULTS / "first"  # the results of `bench/on_gpu.sh first`
BEGIN, END = "<!-- from bench/results by python -m bench.measure.report -->\n", "<!-- end -->\n"
BEGIN_CALLS = "<!-- calls, from bench/results by python -m bench.measure.report -->\n"
SETTING = " ".join(f"{name}={value}" for name, value in ALLOCATORS[KEPT].items())
CHEAP = "8 elementwise layers, (4, 256, 256)"
STEPS = (  # these steps, and the calls below, are in docs/performance.md
    *("AWD-LSTM, (64, 70, 400)", "AWD-LSTM, (20, 70, 400)", "8 minGRU layers, (4, 256, 256)"),  # on a GPU, on a CPU
    *("LSTM, (16, 35, 60)", CHEAP, "LSTM, (8, 10, 16)"),
)
HEADLINE = {"LSTM, (16, 35, 60)": "LSTM, 16x35x60", CHEAP: "8 times `tanh(x * weight)`, 4x256x256"}  # in the README
CALLS = (
    *("(20, 70, 96), float32", "(64, 70, 400), float32", "(64, 70, 400), bfloat16"),
    *("(32, 512, 1024), float32", "(32, 512, 1024), bfloat16"),
)
LARGE = "(128, 512, 1024), bfloat16"  # the call whose figures on a GPU are in the README first
PEERS = "compiled", "eager"  # in this order in all tables
SHAPE = "(batch, time, hidden), dtype"
# If times are normal, this times the interquartile range over the root of the count is a median's standard error.
ERROR = math.sqrt(math.pi / 2) / 1.349
MOST_NAMES = 5  # that a sentence names of tests or cases
STEP_PEERS = {  # peer -> heading of its column, which a table has if the result has the peer
    WITHOUT: "without",
    "compiled": "compiled formula",
    "eager": "formula",
    "fused_ar_tar": "`fused_ar_tar`",
    BY_HAND: "hooks by hand",
    "attach": "`attach`",
    "FusedRNNDropout": "`FusedRNNDropout`",
}
ADDED, PEAK = "added_seconds", "peak_bytes"
CALLING = list(STEP_PEERS)[3:]  # the peers that call fastreg
NEEDED = {  # pass -> the peers of a case that a table shows
    BOTH: {*PEERS, "fastreg"},
    STEP: {WITHOUT, *PEERS, "attach"},
    COMPILED: {WITHOUT, "eager", "fused_ar_tar"},
}
# A compact result keeps these statistics of pytest-benchmark: the columns of its tables.
COLUMNS = "min", "max", "mean", "stddev", "rounds", "median", "iqr", "outliers", "ops", "iterations"


class Figure(NamedTuple):
    """A median and its standard error."""

    median: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether the median can be told from 0."""
        return abs(self.median) > 2 * self.error

    def over(self, other: Figure) -> str:
        """Render the ratio of two figures, if both can be told from 0."""
        return f"{self.median / other.median:.2f}x" if self.is_clear and other.is_clear else "-"


@dataclass
class Case:
    """One case: its facts, the row of each peer, and why other peers are missing.

    A row has the seconds of the median, the interquartile range and the number of rounds, and the other figures of
    `bench.measure.benchmarks`.
    """

    info: dict[str, Any]
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        shape = f"({', '.join(map(str, self.info['shape']))})"
        if self.info["pass"] in (STEP, COMPILED):
            return f"{self.info['model']}, {shape}"
        extra = [self.info["layout"]] * (self.info["layout"] != "batch first")
        return ", ".join([shape, self.info["dtype"], *extra, *["raw is dropped"] * self.info.get("same", False)])

    def figure(self, peer: str, key: str) -> Figure:
        """Return a figure of a peer, whose row has it as a median and a spread."""
        median, spread = self.peers[peer][key]
        return Figure(median, ERROR * spread / math.sqrt(self.peers[peer]["rounds"]))


@dataclass
class Result:
    """The result of one machine."""

    name: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    cases: list[Case]

    @property
    def on_gpu(self) -> bool:
        return "copy_bandwidth" in self.machine

    def of(self, kind: str, labels: Iterable[str] = ()) -> list[Case]:
        """Return the cases of one pass that have all peers of a table, or the cases of `labels`, in that order."""
        cases = {x.label: x for x in self.cases if x.info["pass"] == kind and NEEDED[kind] <= {*x.peers}}
        return [cases[label] for label in labels or cases if label in cases]

    def parts(self) -> list[Result]:
        """Split the cases of a CPU by allocator, memory kept first; a GPU's cases stay together."""
        parts = [[case for case in self.cases if case.info.get("allocator") == allocator] for allocator in ALLOCATORS]
        return [replace(self, cases=cases) for cases in parts if cases] or [self]


def compact(found: dict[str, Any]) -> str:
    """Return the JSON of pytest-benchmark with a short line for each row, without its rounds and options.

    Numbers have five significant digits; pages show three.
    """
    found = json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    for row in found["benchmarks"]:
        row["stats"] = {key: row["stats"][key] for key in COLUMNS}
    rows = [{key: row[key] for key in ("group", "name", "stats", "extra_info")} for row in found["benchmarks"]]
    parts = [f'"{key}": {json.dumps(found[key])}' for key in ("machine_info", "commit_info", "datetime", "version")]
    for key, records in (("missing", found["missing"]), ("benchmarks", rows)):
        parts.append(f'"{key}": [\n' + ",\n".join(map(json.dumps, records)) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load(file: Path) -> Result:
    """Read a result of pytest-benchmark, compact or not."""
    return result_of(file.stem, json.loads(file.read_text()))


def result_of(name: str, found: dict[str, Any]) -> Result:
    cases: dict[str, Case] = {}
    for row in found["benchmarks"]:
        case = cases.setdefault(row["group"], Case(row["extra_info"]))
        case.peers[row["name"]] = row["extra_info"] | row["stats"]
    for lost in found["missing"]:
        cases.setdefault(lost["group"], Case(lost["extra_info"])).missing[lost["name"]] = lost["why"]
    return Result(name, found["machine_info"], found["commit_info"], found["datetime"], [*cases.values()])


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
    """Return a sentence about the peers that could not be measured, for each reason."""
    lost: dict[str, list[str]] = {}
    for case in result.cases:
        for why in dict.fromkeys(case.missing.values()):
            peers = ", ".join(peer for peer in case.missing if case.missing[peer] == why) if case.peers else "all"
            lost.setdefault(f"{peers}: {why}", []).append(f"{case.label}, {case.info['pass']}")
    return "".join(f"- Not measured, {loss}: {some(labels)}.\n" for loss, labels in lost.items())


def some(names: list[str]) -> str:
    """List the first few names, and count the others."""
    return ", ".join(names[:MOST_NAMES]) + f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)


def call_table(result: Result, labels: Iterable[str] = ()) -> str:
    """Render the time of a forward and backward, fastreg's speed over the peers, and on a GPU its other figures."""
    head = [SHAPE, f"{PEERS[0]}, ms", *PEERS[1:], "fastreg", *(f"against {peer}" for peer in PEERS)]
    rows = [[*head, *["of the copy bandwidth", "launches"] * result.on_gpu]]
    for case in result.of(BOTH, labels):
        cells = [number(1e3 * case.peers[peer]["median"]) for peer in (*PEERS, "fastreg")]
        cells += [f"{case.peers[peer]['against']:.1f}x" for peer in PEERS]
        own = case.peers["fastreg"]  # without a graph there are no figures of the GPU
        gpu = [f"{own['share_of_copy']:.0%}", f"{own['launches']}"] if "share_of_copy" in own else ["", ""]
        rows.append([case.label, *cells, *gpu * result.on_gpu])
    return table(rows)


def peers_of(result: Result, peers: Iterable[str] = STEP_PEERS) -> list[str]:
    """Return the peers that at least one training step of a result was measured with."""
    return [peer for peer in peers if any(peer in case.peers for case in result.of(STEP))]


def step_cells(case: Case, peers: Sequence[str]) -> list[str]:
    """Render the time of a step without the penalty, the first of `peers`, and the time that each other peer adds."""
    without = 1e3 * case.peers[WITHOUT]["median"]
    digits = 1 if without > 100 else 2 if without > 10 else 3
    added = [case.figure(peer, ADDED) if peer in case.peers else None for peer in peers[1:]]
    ms = [f"{1e3 * x.median:+.{digits}f}±{1e3 * x.error:.{digits}f}" if x else "" for x in added]
    return [number(without), *ms]


def peak_cells(case: Case, peers: Sequence[str]) -> list[str]:
    """Render the peak memory of a step without the penalty, and the share that each other peer adds."""
    first, *peaks = [case.peers.get(peer, {}).get(PEAK, 0) for peer in peers]
    # Adding 0 makes a positive zero of a negative one.
    return [number(first / 1e6), *(f"{round(peak / first - 1, 2) + 0:+.0%}" if peak else "" for peak in peaks)]


def step_table(result: Result, labels: Iterable[str] = ()) -> str:
    """Render the time of training steps, and the time that each way of adding the penalty adds."""
    peers = peers_of(result)
    rows = [["ms; (batch, time, hidden)", *(STEP_PEERS[peer] for peer in peers)]]
    rows += [[case.label, *step_cells(case, peers)] for case in result.of(STEP, labels)]
    return table(rows)


def peak_table(result: Result, labels: Iterable[str] = ()) -> str:
    """Render the peak memory of training steps, and the memory that each way of adding the penalty adds."""
    peers = peers_of(result)
    head = ["peak memory of a step", "without, MB", *(STEP_PEERS[peer] for peer in peers[1:])]
    cases = [case for case in result.of(STEP, labels) if PEAK in case.peers[WITHOUT]]
    return table([head, *([case.label, *peak_cells(case, peers)] for case in cases)])


def added_table(result: Result) -> str:
    """Render the time that fastreg adds over the formula's, and whole steps with `attach` over the formula's."""
    ours = peers_of(result, CALLING)
    rows = [["added, over compiled; formula", *(STEP_PEERS[peer] for peer in ours), "step, `attach` / formula"]]
    for case in result.of(STEP):
        others = [case.figure(peer, ADDED) for peer in PEERS]
        cells = ["; ".join(map(case.figure(peer, ADDED).over, others)) if peer in case.peers else "" for peer in ours]
        rows.append([case.label, *cells, f"{case.figure('attach', 'over_formula').median:.3f}x"])
    return table(rows)


def compiled_table(result: Result) -> str:
    """Render the time of each step that is compiled as a whole, and the ratio of fastreg's to the formula's."""
    rows = [["ms; (batch, time, hidden)", "without", "formula", "`fused_ar_tar`", "`fused_ar_tar` / formula"]]
    for case in result.of(COMPILED):
        times = [1e3 * case.peers[peer]["median"] for peer in (WITHOUT, "eager", "fused_ar_tar")]
        ratio = case.figure("fused_ar_tar", "over_formula")
        rows.append([case.label, *map(number, times), f"{ratio.median:.3f}±{ratio.error:.3f}x"])
    return table(rows)


def step_tables(result: Result) -> list[str]:
    """Render the tables of training steps for one allocator, with titles."""
    if not result.of(STEP):
        return []
    parts = [f"### Training steps, {clock(result)}\n", step_table(result), added_table(result)]
    parts += ["### Steps that are compiled whole\n", compiled_table(result)] if result.of(COMPILED) else []
    return [*parts, "### Peak memory\n", peak_table(result)]


def clock(result: Result) -> str:
    """Name the clock of training steps."""
    return "wall time" if result.on_gpu else "CPU time of one thread"


def speeds(result: Result, peer: str) -> list[float]:
    """Return how many times as fast as a peer fastreg is in each forward and backward."""
    return [case.peers[peer]["against"] for case in result.of(BOTH)]


def means(result: Result) -> list[str]:
    """Render the geometric mean of the speeds over each peer."""
    return [f"{statistics.geometric_mean(speeds(result, peer)):.1f}" for peer in PEERS]


def latest(results: list[Result]) -> list[Result]:
    """Return the result that the README shows, if there is any: the latest of a GPU, or else of a CPU."""
    return sorted(results, key=lambda result: (result.on_gpu, result.date))[-1:]


def not_measured(results: list[Result]) -> list[str]:
    """Return a sentence that no GPU is measured, or one for each that `bench/on_gpu.sh first` has measured."""
    first = [sentence for file in sorted(FIRST.glob("*.json")) for sentence in first_figures(load(file))]
    if first or any(result.on_gpu for result in results):
        return first
    return [
        "On a GPU: **not measured yet**; `bench/on_gpu.ipynb` measures it. The kernels are tested in Triton's "
        "interpreter and by executing their PTX.\n"
    ]


def first_figures(result: Result) -> Iterator[str]:
    """Yield a sentence with three figures from the first minutes on a GPU, if their case was not lost."""
    for case in result.of(BOTH, [LARGE]):
        compiled, eager = (f"{case.peers[peer]['against']:.1f} times" for peer in PEERS)
        copied = f"{case.peers['fastreg'].get('share_of_copy', math.nan):.0%} of the bandwidth of a copy"
        yield (
            f"On a GPU ({result.machine['device']}), forward + backward at {case.label} is {compiled} as fast as the "
            f"compiled formula and {eager} as fast as the eager one, and reaches {copied}.\n"
        )


def speed_of_calls(results: list[Result]) -> str:
    """Render a reason in the README: the speed of a call on a CPU with each allocator, and on a GPU."""
    than = "{} times as fast as the compiled formula and {} times as fast as the eager one"
    on_cpu = [result for result in results if not result.on_gpu]
    parts = []
    for result in latest(on_cpu):
        kept, default = result.parts()
        least = min(min(speeds(x.parts()[-1], "compiled")) for x in on_cpu)
        parts += [
            f"**A call costs less.** On a CPU with the {DEFAULT} it is {than.format(*means(default))}; with {KEPT}, "
            f"{' and '.join(means(kept))} times (geometric means of {len(kept.of(BOTH))} shapes, "
            f"{result.machine['device']}). The slowest shape on {len(on_cpu)} "
            f"[machines](docs/performance.md#a-call-on-each-machine) runs at {least:.2f} times the compiled formula's "
            f"speed.\n"
        ]
    on_gpu = [result for result in latest(results) if result.on_gpu and result.of(BOTH)]
    parts += [f"On a GPU ({x.machine['device']}): {than.format(*means(x))} (geometric means).\n" for x in on_gpu]
    return "\n".join([*parts, *not_measured(results)])


def machines_table(results: list[Result]) -> str:
    """Render the speed of a call on each machine, with each allocator, and the version that was measured."""
    rows = [["machine", "fastreg", "allocator", *(f"against {peer}: mean, least" for peer in PEERS)]]
    for result in results:
        for part in result.parts():
            setting = part.cases[0].info.get("allocator", "")
            cells = [f"{x}x, {min(speeds(part, peer)):.2f}x" for x, peer in zip(means(part), PEERS, strict=True)]
            rows.append([result.machine["device"], result.commit["version"], setting, *cells])
    return table(rows)


def headline(results: list[Result]) -> str:
    """Render the table in the README: the time of two training steps, and the peak memory of the second."""
    parts = []
    for result in latest(results):
        first, *_ = result.parts()
        peers = [peer for peer in peers_of(first) if peer != BY_HAND]
        rows = [["batch x time x hidden", *(STEP_PEERS[peer] for peer in peers)]]
        rows += [[f"{HEADLINE[case.label]}: ms", *step_cells(case, peers)] for case in first.of(STEP, HEADLINE)]
        peaks = [case for case in first.of(STEP, [CHEAP]) if PEAK in case.peers[WITHOUT]]
        rows += [["its peak memory: MB", *peak_cells(case, peers)] for case in peaks]
        setting = "" if result.on_gpu else f", {first.cases[0].info['allocator']}"
        what = f"Added to a step: {clock(result)} and memory ({result.machine['device']}{setting})."
        parts += [f"{what}\n", table(rows)] if first.of(STEP, HEADLINE) else []
    return "\n".join(parts)


def figures(results: list[Result]) -> str:
    """Render the part in docs/performance.md: a step, its peak memory and a call on one machine."""
    parts = []
    for result in latest(results):
        first, *_ = result.parts()
        parts += [f"{where(result)}.\n", *filter(None, [caveats(result)])]
        kept = f"Measured with freed memory kept for the next call by `{SETTING}`, set before Python starts.\n"
        parts += [kept] * (first.cases[0].info.get("allocator") == KEPT)
        if first.of(STEP):
            parts += [f"### A training step\n\nMilliseconds, {clock(result)}:\n", step_table(first, STEPS)]
            parts += ["Ratios of these times, and of whole steps:\n", added_table(first)]
            parts += ["Steps that are compiled as a whole:\n", compiled_table(first)] if first.of(COMPILED) else []
            parts += ["### Peak memory\n", peak_table(first, STEPS)]
        parts += ["### A call\n", call_table(first, CALLS)]
    parts += ["### A call on each machine\n", machines_table([x for x in results if x.of(BOTH)])]
    return "\n".join([*parts, *not_measured(results)])


PAGES = [  # a page, the marker before a part of it, and the renderer of the part
    (ROOT / "README.md", BEGIN_CALLS, speed_of_calls),
    (ROOT / "README.md", BEGIN, headline),
    (ROOT / "docs" / "performance.md", BEGIN, figures),
]


def with_part(page: str, part: str, begin: str = BEGIN) -> str:
    """Return a page with `part` between the marker `begin` and the next end."""
    before, rest = page.split(begin)
    _, after = rest.split(END, 1)
    return f"{before}{begin}\n{part}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.measure.report", description=__doc__)
    parser.add_argument("json", nargs="?", type=Path, help="of pytest-benchmark: it replaces the result of its machine")
    options = parser.parse_args()
    if options.json:
        found = json.loads(options.json.read_text())
        (RESULTS / file_name(found["machine_info"]["device"])).write_text(compact(found))
    results = [load(file) for file in sorted(RESULTS.glob("*.json"))]
    for page, begin, part in PAGES:
        page.write_text(with_part(page.read_text(), part(results), begin))
    print(figures(results))


if __name__ == "__main__":
    main()
