"""Tables and plots of the measurements: `python -m bench.measure.report`.

For each bench/results/DEVICE.json it writes DEVICE.md, with every case, and a plot. From the latest machine it renders
the speed of a call and a few training steps between the markers in README.md, and three tables between the markers in
docs/performance.md. No figure is typed: tests/project/test_bench.py fails when a page disagrees with the JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.measure.cases import BOTH
from bench.measure.machine import ALLOCATORS, DEFAULT, KEPT, ROOT
from bench.measure.steps import BY_HAND, COMPILED, STEP, WITHOUT

RESULTS = ROOT / "bench" / "results"
FIRST = RESULTS / "first"  # the results of bench.measure.first on GPUs
BEGIN, END = "<!-- from bench/results by python -m bench.measure.report -->\n", "<!-- end -->\n"
BEGIN_CALLS = "<!-- calls, from bench/results by python -m bench.measure.report -->\n"
SETTING = " ".join(f"{name}={value}" for name, value in ALLOCATORS[KEPT].items())
HOW = {  # the words for each allocator, which follow a machine's name
    KEPT: f"freed memory kept for the next call by `{SETTING}`, set before Python starts",
    DEFAULT: "the system's default allocator, which fetches large temporaries anew in each call",
}
CHEAP, LARGE = "8 elementwise layers, (4, 256, 256)", "AWD-LSTM, (20, 70, 400)"
STEPS = (  # these steps, and the calls below, are in docs/performance.md
    *("AWD-LSTM, (64, 70, 400)", LARGE, "8 minGRU layers, (4, 256, 256)"),  # the first on a GPU, the second on a CPU
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
ADDED, PEAK, LEAST, OF_COPY = "added, ms", "peak, MB", "must move, MB", "of copy, %"  # headings
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
CALLING = list(STEP_PEERS)[3:]  # the peers that call fastreg
OURS = {STEP: "attach", COMPILED: "fused_ar_tar"}  # pass -> the peer that is compared with all; otherwise "fastreg"
GPU_HEAD = ["of the copy bandwidth", "launches"]
FIGURES = {  # of bench.measure.benchmarks: the name in a row, which is the heading of a column, and its unit
    "first_seconds": ("first, s", 1),
    "page_faults": ("faults", 1),
    "held_bytes": ("held, MB", 1e6),  # earlier results have "kept, MB", without gradients written ahead: not shown
    "launches": ("launches", 1),
    "peak_bytes": (PEAK, 1e6),
    "host_seconds": ("host, us", 1e-6),
    "graph_warm_seconds": ("graph warm, us", 1e-6),
    "graph_rotated_seconds": ("graph rotated, us", 1e-6),
    "forward_seconds": ("forward, us", 1e-6),
    "predicted_seconds": ("predicted backward, us", 1e-6),
    "again_seconds": ("other backward, us", 1e-6),
    "copy_warm_seconds": ("copy warm, us", 1e-6),
    "copy_rotated_seconds": ("copy rotated, us", 1e-6),
    "least_bytes": (LEAST, 1e6),
    "moved_bytes": ("moves, MB", 1e6),
    "bandwidth": ("reached, GB/s", 1e9),
    "share_of_copy": (OF_COPY, 1e-2),
}


class Measured(NamedTuple):
    """A median and its standard error."""

    median: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether the median can be told from 0."""
        return abs(self.median) > 2 * self.error

    def over(self, other: Measured) -> str:
        """Render the ratio of two figures, if both can be told from 0."""
        return f"{self.median / other.median:.2f}x" if self.is_clear and other.is_clear else "-"


@dataclass
class Case:
    """One case: its facts, the row of each peer from `bench.measure.run.rows`, and why other peers are missing."""

    info: dict[str, Any]
    peers: dict[str, dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def allocator(self) -> str:
        return self.info.get("allocator", DEFAULT)

    @property
    def label(self) -> str:
        shape = f"({', '.join(map(str, self.info['shape']))})"
        if self.info["pass"] in (STEP, COMPILED):
            return f"{self.info['model']}, {shape}"
        extra = [self.info["layout"]] * (self.info["layout"] != "batch first")
        return ", ".join([shape, self.info["dtype"], *extra, *["raw is dropped"] * self.info.get("same", False)])

    def losses(self) -> list[str]:
        """Say why peers are missing, once for each reason."""
        reasons: dict[str, list[str]] = {}
        for peer, why in self.missing.items():
            reasons.setdefault(why, []).append(peer)
        of = {why: ", ".join(peers) if self.peers or len(reasons) > 1 else "all" for why, peers in reasons.items()}
        return [f"lost ({peers}): {why}" for why, peers in of.items()]

    def figure(self, peer: str, key: str) -> Measured:
        """Return a figure of a peer, whose row has it as a median and a spread."""
        median, spread = self.peers[peer][key]
        return Measured(median, ERROR * spread / math.sqrt(self.peers[peer]["count"]))


@dataclass
class Result:
    """The contents of one JSON file."""

    name: str
    digest: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    cases: list[Case]
    tests: dict[str, Any] | None = None  # the record that `bench.measure.run test` wrote

    @property
    def on_gpu(self) -> bool:
        return "copy_bandwidth" in self.machine

    @property
    def allocator(self) -> str:
        """Return the allocator of the first case."""
        return self.cases[0].allocator if self.cases else DEFAULT

    def of(self, kind: str, labels: Iterable[str] = ()) -> list[Case]:
        """Return the cases of one pass that have all of their peers; or those named by `labels`, in that order."""
        return [case for case in self._named(kind, labels) if not case.missing]

    def lost(self, kind: str, labels: Iterable[str], width: int) -> list[list[str]]:
        """Return a row of a table for each case whose peers are not all measured, chosen as in `of`."""
        found = [[case.label, *case.losses()] for case in self._named(kind, labels) if case.missing]
        return [[label, "; ".join(losses), *[""] * (width - 2)] for label, *losses in found]

    def _named(self, kind: str, labels: Iterable[str]) -> list[Case]:
        cases = {case.label: case for case in self.cases if case.info["pass"] == kind}
        return [cases[label] for label in labels or cases if label in cases]

    def parts(self) -> list[Result]:
        """Split the cases of a CPU by allocator, memory kept first; a GPU's cases stay together."""
        parts = [[case for case in self.cases if case.allocator == allocator] for allocator in ALLOCATORS]
        return [replace(self, cases=cases) for cases in parts if cases] or [self]


def load(file: Path) -> Result:
    text = file.read_text()
    facts = json.loads(text)
    cases = [Case(**case) for case in facts.pop("cases")]
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    outcomes = file.parent / "tests" / file.name
    tests = json.loads(outcomes.read_text()) if outcomes.exists() else None
    facts.pop("missing", None)  # results before version 0.5 have it, always empty
    return Result(file.stem, digest, cases=cases, tests=tests, **facts)


def number(x: float) -> str:
    """Render a number with three significant digits."""
    return f"{float(f'{x:.3g}'):g}"


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)) + "\n"


def where(result: Result) -> str:
    """Name the machine, the versions and the commit in one line."""
    machine, commit = result.machine, result.commit
    dirty = " with changes" if commit.get("dirty") else ""
    parts = [f"PyTorch {machine['torch']}", f"Python {machine['python_version']}"]
    if result.on_gpu:
        parts += [f"Triton {machine['triton']}", f"a copy moves {machine['copy_bandwidth'] / 1e12:.2f} TB/s"]
    else:
        parts += [f"{machine['threads']} threads"]
    parts += [f"commit {commit['id'][:10]}{dirty}", f"source {machine['source']}"]
    return f"{machine['device']}: {', '.join(parts)}"


def caveats(result: Result) -> str:
    """Return a sentence about the outcome of the tests, and one about the cases that could not be measured."""
    sentences = [tests_outcome(result)] * (result.on_gpu or result.tests is not None)  # on a CPU, `make test` runs them
    reasons: dict[str, list[str]] = {}
    for case in result.cases:
        for loss in case.losses():
            reasons.setdefault(loss, []).append(f"{case.label}, {case.info['pass']}")
    sentences += [f"Not measured, {loss}: {some(labels)}." for loss, labels in reasons.items()]
    return "".join(f"- {sentence}\n" for sentence in sentences)


def some(names: list[str]) -> str:
    """List the first few names, and count the others."""
    return ", ".join(names[:MOST_NAMES]) + f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)


def tests_outcome(result: Result) -> str:
    """Describe how many tests passed, which tests failed, and the findings of compute-sanitizer."""
    if result.tests is None:
        return "The tests on this device: no outcome is recorded."
    files = result.tests["files"].values()
    failed = [name for file in files for name in file["failed"]]
    passed, skipped = (sum(file[kind] for file in files) for kind in ("passed", "skipped"))
    parts = [f"{passed} passed", f"{skipped} skipped", f"failed: {some(failed)}" if failed else "none failed"]
    parts += [f"{tool}: {verdict}" for tool, verdict in result.tests["sanitizers"].items()]
    of = "" if result.tests["source"] == result.machine["source"] else f", of source {result.tests['source']}"
    return f"The tests on this device{of}: {', '.join(parts)}."


def call_table(result: Result, labels: Iterable[str] = ()) -> str:
    """Render the time of a forward and backward, fastreg's speed over the peers, and on a GPU its other figures."""
    head = [SHAPE, f"{PEERS[0]}, ms", *PEERS[1:], "fastreg", *(f"against {peer}" for peer in PEERS)]
    rows = [[*head, *GPU_HEAD * result.on_gpu]]
    for case in result.of(BOTH, labels):
        cells = [number(case.peers[peer]["ms"][0]) for peer in (*PEERS, "fastreg")]
        cells += [f"{case.peers[peer]['against']:.1f}x" for peer in PEERS]
        own = case.peers["fastreg"]  # without a graph there are no figures of the GPU
        gpu = [f"{own[OF_COPY]:.0f}%", f"{own['launches']}"] if OF_COPY in own else ["", ""]
        rows.append([case.label, *cells, *gpu * result.on_gpu])
    return table([*rows, *result.lost(BOTH, labels, len(rows[0]))])


def measured(result: Result, peers: Iterable[str] = STEP_PEERS) -> list[str]:
    """Return the peers that at least one training step of a result was measured with."""
    return [peer for peer in peers if any(peer in case.peers for case in result.of(STEP))]


def step_cells(case: Case, peers: Sequence[str]) -> list[str]:
    """Render the time of a step without the penalty, the first of `peers`, and the time that each other peer adds."""
    without, _ = case.figure(WITHOUT, "step, ms")
    digits = 1 if without > 100 else 2 if without > 10 else 3
    added = [case.figure(peer, ADDED) if peer in case.peers else None for peer in peers[1:]]
    return [number(without), *(f"{x.median:+.{digits}f}±{x.error:.{digits}f}" if x else "" for x in added)]


def peak_cells(case: Case, peers: Sequence[str]) -> list[str]:
    """Render the peak memory of a step without the penalty, and the share that each other peer adds."""
    first, *peaks = [case.peers.get(peer, {}).get(PEAK, 0) for peer in peers]
    # Adding 0 makes a positive zero of a negative one.
    return [number(first), *(f"{round(peak / first - 1, 2) + 0:+.0%}" if peak else "" for peak in peaks)]


def step_table(result: Result, labels: Iterable[str] = ()) -> str:
    """Render the time of training steps, and the time that each way of adding the penalty adds."""
    peers = measured(result)
    rows = [["ms; (batch, time, hidden)", *(STEP_PEERS[peer] for peer in peers)]]
    rows += [[case.label, *step_cells(case, peers)] for case in result.of(STEP, labels)]
    return table([*rows, *result.lost(STEP, labels, len(rows[0]))])


def peak_table(result: Result, labels: Iterable[str] = ()) -> str:
    """Render the peak memory of training steps, and the memory that each way of adding the penalty adds."""
    peers = measured(result)
    head = ["peak memory of a step", "without, MB", *(STEP_PEERS[peer] for peer in peers[1:])]
    cases = [case for case in result.of(STEP, labels) if PEAK in case.peers[WITHOUT]]
    lost = result.lost(STEP, labels, len(head))
    return table([head, *([case.label, *peak_cells(case, peers)] for case in cases), *lost])


def memory_verdict(case: Case) -> str:
    """Say in a sentence how much the penalty adds to the peak memory of a step."""
    _, call, formula, attached = peak_cells(case, [WITHOUT, "fused_ar_tar", "eager", "attach"])
    added = f"{call} with `fused_ar_tar`, {formula} with the formula and {attached} with `attach`"
    return f"A step of {case.label}, needs more memory than without the penalty: {added}.\n"


def added_table(result: Result) -> str:
    """Render the time that fastreg adds over the formula's, and whole steps with `attach` over the formula's."""
    ours = measured(result, CALLING)
    rows = [["added, over compiled; formula", *(STEP_PEERS[peer] for peer in ours), "step, `attach` / formula"]]
    for case in result.of(STEP):
        others = [case.figure(peer, ADDED) for peer in PEERS]
        cells = ["; ".join(map(case.figure(peer, ADDED).over, others)) if peer in case.peers else "" for peer in ours]
        rows.append([case.label, *cells, f"{case.figure('attach', 'over formula').median:.3f}x"])
    return table([*rows, *result.lost(STEP, (), len(rows[0]))])


def compiled_table(result: Result) -> str:
    """Render the time of each step that is compiled as a whole, and the ratio of fastreg's to the formula's."""
    rows = [["ms; (batch, time, hidden)", "without", "formula", "`fused_ar_tar`", "`fused_ar_tar` / formula"]]
    for case in result.of(COMPILED):
        times = [case.figure(peer, "step, ms").median for peer in (WITHOUT, "eager", "fused_ar_tar")]
        ratio = case.figure("fused_ar_tar", "over formula")
        rows.append([case.label, *map(number, times), f"{ratio.median:.3f}±{ratio.error:.3f}x"])
    return table([*rows, *result.lost(COMPILED, (), len(rows[0]))])


def step_tables(result: Result) -> list[str]:
    """Render the tables of training steps for one allocator, with titles."""
    if not result.of(STEP):
        return []
    parts = [f"### Training steps, {clock(result)}\n", step_table(result), added_table(result)]
    parts += ["### Steps that are compiled whole\n", compiled_table(result)] if result.of(COMPILED) else []
    return [*parts, "### Peak memory\n", peak_table(result)]


def clock(result: Result) -> str:
    """Name the clock of training steps."""
    return "by the clock" if result.on_gpu else "CPU time of one thread"


def call_verdict(result: Result) -> str:
    """Say in a sentence how fast the penalty is by itself."""
    speeds = []
    for precision, is_float32 in {"float32": True, "half precision": False}.items():
        if cases := [case for case in result.of(BOTH) if (case.info["dtype"] == "float32") == is_float32]:
            means = [statistics.geometric_mean(case.peers[peer]["against"] for case in cases) for peer in PEERS]
            than = "{:.1f} times as fast as the compiled formula and {:.1f} times as fast as the eager one".format(
                *means
            )
            speeds.append(f"{than} in {precision}")
    return f"A call of `fused_ar_tar` is {', and '.join(speeds)} (geometric means).\n"


def full_table(result: Result) -> str:
    """Render the tables of training steps, and all figures of every case and peer."""
    columns = [heading for heading, _ in FIGURES.values()]
    columns = [x for x in columns if any(x in case.info | row for case in result.cases for row in case.peers.values())]
    note = (
        f"Rendered from {result.name}.json by `python -m bench.measure.report`. Spread: the middle half of the rounds. "
    )
    note += "Against it: how many times as fast fastreg is, `attach` in a training step. "
    note += "±: the standard error of a median, which is 0.93 times the spread over the root of the number of rounds. "
    note += "A ratio is - where one of its figures is less than twice its error."
    parts = [f"{where(result)}\n", *filter(None, [caveats(result)]), f"{note}\n"]
    for part in result.parts():
        rows = [["case", "pass", "peer", "median, ms", "spread", "against it", *columns]]
        for case in part.cases:
            for peer, row in case.peers.items():
                median, spread = row["ms"]
                against = f"{row['against']:.2f}x" if "against" in row else ""
                times = [number(median), f"{spread / median:.0%}", against]
                cells = [number(facts[x]) if x in facts else "" for facts in [case.info | row] for x in columns]
                rows.append([case.label, case.info["pass"], peer, *times, *cells])
            rows += [[case.label, case.info["pass"], loss, *[""] * (len(rows[0]) - 3)] for loss in case.losses()]
        setting = [f"## {part.allocator.capitalize()}\n", f"Measured with {HOW[part.allocator]}.\n"]
        parts += [] if result.on_gpu else setting
        parts += [*step_tables(part), "### All cases\n", table(rows)]
    return "\n".join([*parts, f"![{TITLE}]({result.name}-speedup.svg)\n"])


def latest(results: list[Result]) -> list[Result]:
    """Return the result that the README shows, if there is any: the latest of a GPU, or else of a CPU."""
    return sorted(results, key=lambda result: (result.on_gpu, result.date))[-1:]


def not_measured(results: list[Result]) -> list[str]:
    """Return a sentence for each kind of device without a result, or with the figures of the first minutes on a GPU."""
    on_gpu = [result.on_gpu for result in results]
    first = [sentence for file in sorted(FIRST.glob("*.json")) for sentence in first_figures(load(file))]
    unseen = not any(on_gpu) and not first
    absent = {
        "On a GPU: **not measured yet**, as no GPU has run the kernels. They are tested on a CPU, in Triton's "
        "interpreter and by executing the PTX compiled for an H100; `bench/on_gpu.ipynb` measures them.\n": unseen,
        "On a CPU: **not measured yet**; `make bench` measures it.\n": all(on_gpu),
    }
    return [*first, *(sentence for sentence, is_absent in absent.items() if is_absent)]


def first_figures(result: Result) -> Iterator[str]:
    """Yield a sentence with three figures from the first minutes on a GPU, if their case was not lost."""
    for case in result.of(BOTH, [LARGE]):
        compiled, eager = (f"{case.peers[peer]['against']:.1f} times" for peer in PEERS)
        copied = f"{case.peers['fastreg'].get(OF_COPY, math.nan):.0f}% of the bandwidth of a copy"
        yield (
            f"On a GPU ({result.machine['device']}), forward + backward at {case.label} is {compiled} as fast as the "
            f"compiled formula and {eager} as fast as the eager one, and reaches {copied}.\n"
        )


def speed_of_calls(results: list[Result]) -> str:
    """Render a reason in the README: the speed of a call on a CPU with the default allocator, and on a GPU."""
    parts = []
    for result in latest([result for result in results if not result.on_gpu]):
        *_, last = result.parts()  # the default allocator
        compiled, eager = ([case.peers[peer]["against"] for case in last.of(BOTH)] for peer in PEERS)
        than = (
            f"{statistics.geometric_mean(compiled):.1f} times ({min(compiled):.1f} to {max(compiled):.1f}) as fast as "
        )
        than += f"the compiled formula and {statistics.geometric_mean(eager):.1f} times as fast as the eager one"
        shapes = f"over {len(compiled)} shapes and dtypes, with the {last.allocator} on {result.machine['device']}"
        parts += [f"**A call costs less.** Forward and backward on a CPU are {than} (geometric means {shapes}).\n"]
    parts += [f"On a GPU: {call_verdict(result)}" for result in latest(results) if result.on_gpu]
    return "\n".join([*parts, *not_measured(results)])


def headline(results: list[Result]) -> str:
    """Render the table in the README: the time of two training steps, and the peak memory of the second."""
    parts = []
    for result in latest(results):
        first, *_ = result.parts()
        peers = [peer for peer in measured(first) if peer != BY_HAND]
        rows = [["batch x time x hidden", *(STEP_PEERS[peer] for peer in peers)]]
        rows += [[f"{HEADLINE[case.label]}: ms", *step_cells(case, peers)] for case in first.of(STEP, HEADLINE)]
        peaks = [case for case in first.of(STEP, [CHEAP]) if PEAK in case.peers[WITHOUT]]
        rows += [["its peak memory: MB", *peak_cells(case, peers)] for case in peaks]
        what = f"Time ({clock(result)}) and memory that the penalty adds to a step, on {result.machine['device']}."
        parts += [f"{what}\n", table(rows)] if first.of(STEP, HEADLINE) else []
    return "\n".join(parts)


def figures(results: list[Result]) -> str:
    """Render the part in docs/performance.md: a step, its peak memory and a call on one machine."""
    parts = []
    for result in latest(results):
        first, *_ = result.parts()
        parts += [f"{where(result)}.\n", *filter(None, [caveats(result)])]
        parts += [f"Measured with {HOW[first.allocator]}.\n"] * (not result.on_gpu)
        if first.of(STEP):
            parts += [f"### A training step\n\nMilliseconds, {clock(result)}:\n", step_table(first, STEPS)]
            parts += ["### Peak memory\n", peak_table(first, STEPS), *map(memory_verdict, first.of(STEP, [CHEAP]))]
        parts += ["### A call\n", call_table(first, CALLS)]
        parts += [call_verdict(first)] * bool(first.of(BOTH))
    links = [f"[{result.machine['device']}](../bench/results/{result.name}.md)" for result in results]
    return "\n".join([*parts, f"All cases of each machine: {', '.join(links)}.\n", *not_measured(results)])


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


TITLE = "AR and TAR: how many times as fast as the formula fastreg is"


def plot(result: Result) -> Figure:
    """Draw two bars for each case of the penalty in the first part of a result."""
    first, *_ = result.parts()
    cases = first.of(BOTH)
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for offset, peer in zip((-0.2, 0.2), PEERS, strict=True):
        speeds = [case.peers[peer]["against"] for case in cases]
        drawn = axes.barh([place + offset for place in range(len(cases))], speeds, 0.4, label=f"against {peer}")
        axes.bar_label(drawn, [f"{speed:.2f}" for speed in speeds], padding=2, fontsize=7)
    axes.margins(x=0.1)  # room for the labels
    axes.set_yticks(range(len(cases)), [case.label for case in cases])
    axes.set_ylabel(SHAPE)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    machine = result.machine["device"] if result.on_gpu else f"{result.machine['device']}, {first.allocator}"
    axes.set_xlabel(f"times, forward + backward\n{machine}")
    figure.suptitle(TITLE, fontsize="medium")
    figure.legend(loc="outside lower right", ncols=2, fontsize=8)
    return figure


def save(figure: Figure, file: Path, digest: str) -> None:
    """Save a plot as SVG with the digest of its JSON, as the bytes of an SVG depend on matplotlib, too."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastreg"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": f"JSON {digest}"})


def main() -> None:
    results = [load(file) for file in sorted(RESULTS.glob("*.json"))]
    for result in results:
        (RESULTS / f"{result.name}.md").write_text(full_table(result))
        save(plot(result), RESULTS / f"{result.name}-speedup.svg", result.digest)
    for page, begin, part in PAGES:
        page.write_text(with_part(page.read_text(), part(results), begin))
    print(figures(results))


if __name__ == "__main__":
    main()
