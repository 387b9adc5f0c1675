"""Tables and plots of the measurements: `python -m bench.report`.

Of each bench/results/DEVICE.json it writes DEVICE.md, every case in a table, and plots; and between the markers of
README.md it renders the training steps, between those of docs/performance.md all tables. Nothing in them is typed:
tests/test_bench.py fails when they disagree with the JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.cases import BOTH, CHANGES, CHANGING, DROPOUT, PADDED
from bench.machine import ALLOCATORS, DEFAULT, KEPT, ROOT
from bench.steps import COMPILED, STEP, WITHOUT

RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- from bench/results by python -m bench.report -->\n", "<!-- end -->\n"
SETTING = " ".join(f"{name}={value}" for name, value in ALLOCATORS[KEPT].items())
HOW = {  # the setting of each allocator, after a machine's name
    KEPT: f"freed memory kept for the next call by `{SETTING}`, set before Python starts",
    DEFAULT: "the system's default allocator, which fetches large temporaries anew in each call",
}
HEADLINE = {  # training steps in the README, and their names there: recurrent models, and last an elementwise one
    "AWD-LSTM, (20, 70, 400)": "AWD-LSTM, 20x70x400",
    "8 minGRU layers, (4, 256, 256)": "8 minGRUs, 4x256x256",
    "LSTM, (16, 35, 60)": "LSTM, 16x35x60",
    "8 elementwise layers, (4, 512, 512)": "8 times `tanh(x * weight)`, 4x512x512",
}
PEERS = "compiled", "eager"  # in the order of all tables
SHAPE = "(batch, time, hidden), dtype"
MOST_NAMES = 5  # of tests or cases in a sentence
HEADING = "### "
STEP_PEERS = {  # heading of each peer's column
    WITHOUT: "without",
    "compiled": "compiled formula",
    "eager": "formula",
    "fused_ar_tar": "`fused_ar_tar`",
    "attach": "`attach`",
    "FusedRNNDropout": "`FusedRNNDropout`",
}
OURS = list(STEP_PEERS)[3:]
GPU_HEAD = ["of the copy bandwidth", "launches"]
FIGURES = {  # of the JSON's extra_info: heading, unit, and meaning of the unit
    "first_seconds": ("first call, s", 1),
    "page_faults": ("page faults", 1),
    "kept_bytes": ("kept, MB", 1e6),
    "launches": ("launches", 1),
    "peak_bytes": ("peak, MB", 1e6),
    "host_seconds": ("host, us", 1e-6),
    "graph_warm_seconds": ("graph warm, us", 1e-6),
    "graph_rotated_seconds": ("graph rotated, us", 1e-6),
    "least_bytes": ("must move, MB", 1e6),
    "moved_bytes": ("moves, MB", 1e6),
    "bandwidth": ("reached, GB/s", 1e9),
    "share_of_copy": ("of copy, %", 1e-2),
}


@dataclass
class Case:
    """One case. Seconds a call of every peer, round by round: the peers took turns, so rounds are pairs."""

    name: str
    seconds: dict[str, list[float]]
    info: dict[str, dict[str, Any]]  # of every peer

    @property
    def kind(self) -> str:
        return self.any_info["pass"]

    @property
    def any_info(self) -> dict[str, Any]:
        return next(iter(self.info.values()))

    @property
    def allocator(self) -> str:
        return self.any_info.get("allocator") or DEFAULT

    @property
    def label(self) -> str:
        info = self.any_info
        if self.kind in (STEP, COMPILED):
            return f"{info['model']}, ({', '.join(map(str, info['shape']))})"
        extra = [info["layout"]] * (info["layout"] != "batch first") + ["raw is dropped"] * info.get("same", False)
        return ", ".join([f"({', '.join(map(str, info['shape']))})", info["dtype"], *extra])

    def milliseconds(self, peer: str) -> float:
        return 1e3 * statistics.median(self.seconds[peer])

    def times(self, *peers: str) -> list[str]:
        """Render the milliseconds of each peer."""
        return [number(self.milliseconds(peer)) for peer in peers]

    def speeds(self, *peers: str) -> list[str]:
        """Render how many times as fast as each peer fastreg is."""
        return [f"{self.times_as_fast('fastreg', peer):.1f}x" for peer in peers]

    def spread(self, peer: str) -> float:
        """The middle half of the rounds, over their median."""
        first, middle, third = statistics.quantiles(self.seconds[peer], n=4)
        return (third - first) / middle

    def step_milliseconds(self, peer: str) -> list[float]:
        """A step's time, round by round: on a CPU the process's own, which other programs do not lengthen."""
        on_gpu = self.any_info["allocator"] is None
        return [1e3 * x for x in (self.seconds[peer] if on_gpu else self.info[peer]["own_seconds"])]

    def added(self, peer: str) -> tuple[float, float]:
        """Return the time that a peer adds to a step, in ms: the mean over the rounds, and its standard error."""
        pairs = zip(self.step_milliseconds(peer), self.step_milliseconds(WITHOUT), strict=True)
        return mean_and_error([with_it - without for with_it, without in pairs])

    def times_as_fast(self, peer: str, other: str) -> float:
        """The median, over the rounds, of how many times as fast `peer` was."""
        return statistics.median(b / a for a, b in zip(self.seconds[peer], self.seconds[other], strict=True))


@dataclass
class Result:
    """The contents of one JSON file."""

    name: str
    digest: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    cases: list[Case]
    missing: dict[str, dict[str, str]]  # case -> peer -> why it is not measured
    tests: dict[str, Any] | None  # what `bench.run test` wrote

    @property
    def on_gpu(self) -> bool:
        return "copy_bandwidth" in self.machine

    @property
    def allocator(self) -> str:
        """Return the allocator of the first case."""
        return self.cases[0].allocator if self.cases else DEFAULT

    def of(self, kind: str) -> list[Case]:
        return [case for case in self.cases if case.kind == kind]

    def parts(self) -> list[Result]:
        """Split the cases of a CPU by allocator, memory kept first; those of a GPU stay together."""
        parts = [[case for case in self.cases if case.allocator == allocator] for allocator in ALLOCATORS]
        return [replace(self, cases=cases) for cases in parts if cases] or [self]


def load(file: Path) -> Result:
    text = file.read_text()
    result = json.loads(text)
    cases: dict[str, Case] = {}
    for benchmark in result["benchmarks"]:
        case = cases.setdefault(benchmark["group"], Case(benchmark["group"], {}, {}))
        info = benchmark["extra_info"]
        case.seconds[info["peer"]], case.info[info["peer"]] = benchmark["stats"]["data"], info
    missing = result.get("missing", {})
    measured = [case for case in cases.values() if case.name not in missing]
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    outcomes = file.parent / "tests" / file.name
    tests = json.loads(outcomes.read_text()) if outcomes.exists() else None
    machine, commit = result["machine_info"], result["commit_info"]
    return Result(file.stem, digest, machine, commit, measured, missing, tests)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean, and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def number(x: float) -> str:
    """Three digits that count."""
    return f"{float(f'{x:.3g}'):g}"


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)) + "\n"


def where(result: Result) -> str:
    """The machine, the versions and the commit, in a line."""
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
    """Return the outcome of the tests, and the cases that could not be measured, a sentence each."""
    sentences = [tests_outcome(result)] * (result.on_gpu or result.tests is not None)  # a CPU's are `make test`
    reasons: dict[str, list[str]] = {}
    for name, peers in result.missing.items():
        for why in dict.fromkeys(peers.values()):
            those = [peer for peer, reason in peers.items() if reason == why]
            reasons.setdefault(why, []).append(name if len(those) > 1 else f"{name} ({those[0]})")
    sentences += [f"Not measured ({why}): {some(names)}." for why, names in reasons.items()]
    return "".join(f"- {sentence}\n" for sentence in sentences)


def some(names: list[str]) -> str:
    """The first few, and how many there are beside them."""
    return ", ".join(names[:MOST_NAMES]) + f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)


def tests_outcome(result: Result) -> str:
    """Return how many tests passed and which failed on this device, and the findings of compute-sanitizer."""
    if result.tests is None:
        return "The tests on this device: no outcome is recorded."
    files = result.tests["files"].values()
    failed = [name for file in files for name in file["failed"]]
    passed, skipped = (sum(file[kind] for file in files) for kind in ("passed", "skipped"))
    parts = [f"{passed} passed", f"{skipped} skipped", f"failed: {some(failed)}" if failed else "none failed"]
    parts += [f"{tool}: {verdict}" for tool, verdict in result.tests["sanitizers"].items()]
    of = "" if result.tests["source"] == result.machine["source"] else f", of source {result.tests['source']}"
    return f"The tests on this device{of}: {', '.join(parts)}."


def case_table(result: Result, kind: str, head: list[str], cells: Callable[[Case], list[str]]) -> str:
    """Render a row for each case of a kind, with the figures of a GPU."""
    rows = [[SHAPE, *head, *GPU_HEAD * result.on_gpu]]
    for case in result.of(kind):
        own = case.info["fastreg"]  # without a graph it has no figures of a GPU
        gpu = [f"{own['share_of_copy']:.0%}", f"{own['launches']}"] if "share_of_copy" in own else ["", ""]
        rows.append([case.label, *cells(case), *gpu * result.on_gpu])
    return table(rows)


def speed_table(result: Result, kind: str = BOTH, others: Sequence[str] = PEERS) -> str:
    """Render the time of forward and backward, and the speedup over other peers."""
    head = [f"{others[0]}, ms", *others[1:], "fastreg", *(f"against {peer}" for peer in others)]
    return case_table(result, kind, head, lambda case: case.times(*others, "fastreg") + case.speeds(*others))


def dropout_table(result: Result) -> str:
    """Render the cost of the penalty beside a dropout that the model has anyway."""
    head = ["dropout alone, ms", "+ eager", "+ fused_ar_tar", "fused"]
    head += ["fused / dropout alone", "against the best compiled", "against + eager"]

    def cells(case: Case) -> list[str]:
        compiled = "compiled", "compiled fused_ar_tar", "compiled fastreg"
        best = min(compiled, key=lambda peer: case.times_as_fast("fastreg", peer))
        times = case.times("dropout alone", "eager", "fused_ar_tar", "fastreg")
        return [*times, f"{case.times_as_fast('dropout alone', 'fastreg'):.2f}x", *case.speeds(best, "eager")]

    return case_table(result, DROPOUT, head, cells)


def step_table(result: Result, names: Mapping[str, str] | None = None) -> str:
    """Render the time of each training step, and the time that each way of adding the penalty adds.

    Args:
        result: of one allocator.
        names: the models to show, by their labels, in this order; else all.
    """
    rows = [["ms; (batch, time, hidden)" if names is None else "ms; batch x time x hidden", *STEP_PEERS.values()]]
    cases = {case.label: case for case in result.of(STEP)}
    for label, name in (names or {label: label for label in cases}).items():
        if case := cases.get(label):
            without = statistics.mean(case.step_milliseconds(WITHOUT))
            digits = 1 if without > 100 else 2 if without > 10 else 3
            added = [case.added(peer) if peer in case.seconds else None for peer in list(STEP_PEERS)[1:]]
            cells = ["" if x is None else f"{x[0]:+.{digits}f}±{x[1]:.{digits}f}" for x in added]
            rows.append([name, number(without), *cells])
    return table(rows)


def added_table(result: Result) -> str:
    """Render the time that fastreg adds, over that of the formula, and the step with `attach`, where it is clear."""
    rows = [["added, over compiled; formula", *(STEP_PEERS[peer] for peer in OURS), "step, `attach` / formula"]]
    for case in result.of(STEP):
        mean, error = case.added("eager")
        if mean <= 3 * error:  # in the noise
            continue
        others = [case.added(peer)[0] for peer in PEERS]
        cells = [
            "; ".join(f"{case.added(peer)[0] / other:.2f}x" for other in others) if peer in case.seconds else ""
            for peer in OURS
        ]
        steps = zip(case.step_milliseconds("attach"), case.step_milliseconds("eager"), strict=True)
        rows.append([case.label, *cells, f"{statistics.median(a / b for a, b in steps):.3f}x"])
    return table(rows)


def peak_table(result: Result) -> str:
    """Render the peak memory of each step, and the memory that each way of adding the penalty adds."""
    rows = [["peak memory of a step", "without, MB", *list(STEP_PEERS.values())[1:]]]
    for case in result.of(STEP):
        peaks = {peer: info["peak_bytes"] for peer, info in case.info.items() if "peak_bytes" in info}
        if without := peaks.pop(WITHOUT, 0):
            cells = [f"{peaks[peer] / without - 1:+.1%}" if peer in peaks else "" for peer in list(STEP_PEERS)[1:]]
            rows.append([case.label, number(without / 1e6), *cells])
    return table(rows)


def compiled_table(result: Result) -> str:
    """Render the time of each step that is compiled whole, and its ratio with fastreg to that with the formula."""
    rows = [["ms; (batch, time, hidden)", "without", "formula", "`fused_ar_tar`", "`fused_ar_tar` / formula"]]
    for case in result.of(COMPILED):
        times = [case.step_milliseconds(peer) for peer in (WITHOUT, "eager", "fused_ar_tar")]
        ratio, error = mean_and_error([ours / other for _, other, ours in zip(*times, strict=True)])
        rows.append([case.label, *(number(statistics.mean(x)) for x in times), f"{ratio:.3f}±{error:.3f}x"])
    return table(rows)


def step_tables(result: Result) -> list[str]:
    """Render the tables of training steps for one allocator, with titles."""
    if not result.of(STEP):
        return []
    parts = [f"{HEADING}Training steps, {clock(result)}\n", step_table(result), added_table(result)]
    parts += [f"{HEADING}Steps that are compiled whole\n", compiled_table(result)] if result.of(COMPILED) else []
    return [*parts, f"{HEADING}Peak memory\n", peak_table(result)]


def clock(result: Result) -> str:
    """Name the clock of training steps."""
    return "by the clock" if result.on_gpu else "CPU time of one thread"


def against(cases: list[Case], other: str, name: str) -> str:
    """How many times as fast as a peer fastreg is, and in how many cases it is slower."""
    ratios = [case.times_as_fast("fastreg", other) for case in cases]
    slower = sum(ratio < 1 for ratio in ratios)
    mean = f"geometric mean {mean_speed(cases, other):.1f}x" + f", slower in {slower}" * (slower > 0)
    return f"{min(ratios):.1f}x to {max(ratios):.1f}x as fast as {name} ({mean})"


def by_precision(result: Result) -> dict[str, list[Case]]:
    """Return the cases of the penalty, forward and backward, in float32 and in half precision, where there are any."""
    cases: dict[str, list[Case]] = {}
    for case in result.of(BOTH):
        cases.setdefault("float32" if case.any_info["dtype"] == "float32" else "half precision", []).append(case)
    return dict(sorted(cases.items()))


def penalty_verdict(result: Result) -> str:
    """How fast the penalty is, in a sentence for float32 and one for half precision."""
    sentences = []
    for precision, cases in by_precision(result).items():
        speeds = f"{against(cases, 'compiled', 'the formula under `torch.compile`')}, "
        speeds += against(cases, "eager", "the eager formula")
        sentences.append(f"The penalty in {precision}, forward + backward, in {len(cases)} cases: {speeds}.\n")
    return "\n".join(sentences)


def brief_verdict(result: Result) -> str:
    """Return the geometric means of how fast the penalty is, in a sentence."""
    means = {x: [f"{mean_speed(cases, peer):.1f}x" for peer in PEERS] for x, cases in by_precision(result).items()}
    speeds = ", ".join(f"{precision} {' and '.join(pair)}" for precision, pair in means.items())
    return f"The penalty alone, over the compiled and eager formula, geometric means: {speeds}.\n"


def mean_speed(cases: list[Case], other: str) -> float:
    """Return how many times as fast as a peer fastreg is: the geometric mean of cases."""
    return statistics.geometric_mean(case.times_as_fast("fastreg", other) for case in cases)


def full_table(result: Result) -> str:
    """Every case and peer with all its figures."""
    figures = [key for key in FIGURES if any(key in info for case in result.cases for info in case.info.values())]
    note = f"Rendered from {result.name}.json by `python -m bench.report`. Spread: the middle half of the rounds. "
    note += "Against it: how many times as fast fastreg is, `attach` in a training step."
    parts = [f"{where(result)}\n", *filter(None, [caveats(result)]), f"{note}\n"]
    for part in result.parts():
        head = ["case", "pass", "peer", "median, ms", "spread", "against it"]
        rows = [head + [FIGURES[key][0] for key in figures]]
        for case in part.cases:
            ours = {STEP: "attach", COMPILED: "fused_ar_tar"}.get(case.kind, "fastreg")
            for peer, info in case.info.items():
                cells = [number(info[key] / FIGURES[key][1]) if key in info else "" for key in figures]
                speed = f"{case.times_as_fast(ours, peer):.2f}x"
                spread = f"{case.spread(peer):.0%}"
                rows.append([case.label, case.kind, peer, number(case.milliseconds(peer)), spread, speed, *cells])
        parts += [] if result.on_gpu else [f"With {HOW[part.allocator]}:\n"]
        parts += [table(rows)]
    return "\n".join(parts)


def in_order(results: list[Result]) -> list[Result]:
    """Those of GPUs first."""
    return sorted(results, key=lambda result: (not result.on_gpu, result.name))


def not_measured(results: list[Result]) -> list[str]:
    """A sentence for each kind of device that there is no result of."""
    on_gpu = [result.on_gpu for result in results]
    absent = {
        "On a GPU: **not measured yet**; the notebook `bench/on_gpu.ipynb` measures it.\n": not any(on_gpu),
        "On a CPU: **not measured yet**; `make bench` measures it.\n": all(on_gpu),
    }
    return [sentence for sentence, is_absent in absent.items() if is_absent]


def shown(results: list[Result]) -> list[Result]:
    """Return all GPUs, and of the CPUs the last by name, which with one maker is that of the widest vectors."""
    ordered = in_order(results)
    return [result for result in ordered if result.on_gpu or result is ordered[-1]]


def headline(results: list[Result]) -> str:
    """Render the README's part: training steps of a few models, and the speed of the penalty by itself."""
    parts = []
    for result in shown(results):
        first, *_ = result.parts()
        parts += [f"A step, and time added to it, {clock(result)}, {result.machine['device']}:\n"]
        parts += [step_table(first, HEADLINE)] if first.of(STEP) else []
        parts += [brief_verdict(first)] * bool(first.of(BOTH))
    return "\n".join([*parts, *not_measured(results)])


def figures(results: list[Result]) -> str:
    """The part of docs/performance.md: every table, the whole step first; one processor is unfolded."""
    parts = []
    unfolded = shown(results)
    for result in sorted(in_order(results), key=lambda result: result not in unfolded):
        text = "\n".join(device_part(result))
        device = result.machine["device"]
        parts += [f"## {device}\n\n{text}"] if result in unfolded else [folded(device, text)]
    return "\n".join([*parts, *not_measured(results)])


def device_part(result: Result) -> list[str]:
    """Render every table and plot of one device."""
    parts = [f"{where(result)}.\n", *filter(None, [caveats(result)])]
    first, *others = result.parts()
    parts += [f"With {HOW[first.allocator]}.\n"] * (not result.on_gpu) + tables(first)
    for part in others:
        text = "\n".join([f"With {HOW[part.allocator]}.\n", *tables(part)])
        parts += [folded("The same with the system's default allocator", text)]
    parts += [f"![{TITLE}](../bench/results/{result.name}-speedup.svg)\n"]
    return [*parts, f"All cases: [{result.name}.md](../bench/results/{result.name}.md).\n"]


def folded(title: str, text: str) -> str:
    """Fold a part of a page, which opens by a click; its headings become bold, and no part of a list of contents."""
    lines = [f"**{x.removeprefix(HEADING)}**" if x.startswith(HEADING) else x for x in text.split("\n")]
    body = "\n".join(lines)
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{body}\n</details>\n'


def tables(result: Result) -> list[str]:
    """Render every table for the cases of one allocator, with its title."""
    parts = step_tables(result)
    parts += [f"{HEADING}The penalty\n", speed_table(result), penalty_verdict(result)] if result.of(BOTH) else []
    parts += [f"{HEADING}The worst case\n", speed_table(result, CHANGING)] if result.of(CHANGING) else []
    parts += [f"{HEADING}Dropout and the penalty\n", dropout_table(result)] if result.of(DROPOUT) else []
    parts += (
        [f"{HEADING}Padding\n", speed_table(result, PADDED, ("without lengths", *PEERS))] if result.of(PADDED) else []
    )
    parts += [f"{HEADING}Another axis of time\n", speed_table(result, CHANGES)] if result.of(CHANGES) else []
    return parts


PAGES = {ROOT / "README.md": headline, ROOT / "docs" / "performance.md": figures}  # the text between the markers


def with_part(page: str, part: str, begin: str = BEGIN) -> str:
    """A page with `part` between the marker `begin` and the next end."""
    before, rest = page.split(begin)
    _, after = rest.split(END, 1)
    return f"{before}{begin}\n{part}\n{END}{after}"


TITLE = "AR and TAR: how many times as fast as the formula fastreg is"


def plot(result: Result) -> Figure:
    """Draw two bars for each case of the penalty in the first part of a result, from top to bottom."""
    first, *_ = result.parts()
    cases = first.of(BOTH)
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for offset, peer in zip((-0.2, 0.2), PEERS, strict=True):
        speeds = [case.times_as_fast("fastreg", peer) for case in cases]
        drawn = axes.barh([place + offset for place in range(len(cases))], speeds, 0.4, label=f"against {peer}")
        axes.bar_label(drawn, [f"{speed:.2f}" for speed in speeds], padding=2, fontsize=7)
    axes.margins(x=0.1)  # for the labels
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
    """As SVG, which names the JSON it was rendered from: its bytes depend on matplotlib, too."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastreg"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": f"JSON {digest}"})


def main() -> None:
    results = [load(file) for file in sorted(RESULTS.glob("*.json"))]
    for result in results:
        (RESULTS / f"{result.name}.md").write_text(full_table(result))
        save(plot(result), RESULTS / f"{result.name}-speedup.svg", result.digest)
    for page, part in PAGES.items():
        page.write_text(with_part(page.read_text(), part(results)))
    print(figures(results))


if __name__ == "__main__":
    main()
