"""Tables and plots from what was measured: `python -m bench.report`.

Of each bench/results/DEVICE.json it writes DEVICE.md, every case in a table, and plots; and it renders the README's
part between its markers. Nothing in them is typed: tests/test_bench.py fails when they disagree with the JSON.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- from bench/results by python -m bench.report -->\n", "<!-- end -->\n"
STEP = "training step"
BOTH = "forward + backward"
CPU_TARGETS = {"float32": 2.5, "bfloat16": 4.0}  # times the speed of the eager formula, forward + backward
FIGURES = {  # of the JSON's extra_info: heading, unit, and what the unit is
    "kept_bytes": ("kept, MB", 1e6),
    "launches": ("launches", 1),
    "peak_bytes": ("peak, MB", 1e6),
    "host_seconds": ("host, us", 1e-6),
    "graph_warm_seconds": ("graph warm, us", 1e-6),
    "graph_rotated_seconds": ("graph rotated, us", 1e-6),
    "bytes_moved": ("must move, MB", 1e6),
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
    def label(self) -> str:
        info = self.any_info
        if self.kind == STEP:
            return self.name
        extra = [info["layout"]] * (info["layout"] != "batch first") + ["raw is dropped"] * info["same"]
        return ", ".join([f"({', '.join(map(str, info['shape']))})", info["dtype"], *extra])

    def milliseconds(self, peer: str) -> float:
        return 1e3 * statistics.median(self.seconds[peer])

    def spread(self, peer: str) -> float:
        """The middle half of the rounds, over their median."""
        first, middle, third = statistics.quantiles(self.seconds[peer], n=4)
        return (third - first) / middle

    def times_as_fast(self, peer: str, other: str) -> float:
        """The median, over the rounds, of how many times as fast `peer` was."""
        return statistics.median(b / a for a, b in zip(self.seconds[peer], self.seconds[other], strict=True))


@dataclass
class Result:
    """What one JSON file of pytest-benchmark says."""

    name: str
    digest: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    cases: list[Case]

    @property
    def on_gpu(self) -> bool:
        return "copy_bandwidth" in self.machine

    def of(self, kind: str) -> list[Case]:
        return [case for case in self.cases if case.kind == kind]


def load(file: Path) -> Result:
    text = file.read_text()
    result = json.loads(text)
    seconds: dict[str, dict[str, list[float]]] = {}
    info: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in result["benchmarks"]:
        peer = benchmark["extra_info"]["peer"]
        seconds.setdefault(benchmark["group"], {})[peer] = benchmark["stats"]["data"]
        info.setdefault(benchmark["group"], {})[peer] = benchmark["extra_info"]
    complete = [name for name, peers in seconds.items() if {"eager", "fastreg", "compiled"} <= peers.keys()]
    cases = [Case(name, seconds[name], info[name]) for name in complete]
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Result(file.stem, digest, result["machine_info"], result["commit_info"], cases)


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
        parts += [f"{machine['threads']} threads", "the system's allocator"]
    parts += [f"commit {commit['id'][:10]}{dirty}", f"source {machine['source']}"]
    return f"{machine['device']}: {', '.join(parts)}"


def penalty_table(result: Result) -> str:
    """Forward and backward: what a user saves."""
    head = ["shape and dtype", "eager, ms", "compiled, ms", "fastreg, ms", "against eager", "against compiled"]
    rows = [head + (["of the copy bandwidth", "launches"] if result.on_gpu else [])]
    for case in result.of(BOTH):
        row = [case.label, *(number(case.milliseconds(peer)) for peer in ("eager", "compiled", "fastreg"))]
        row += [f"{case.times_as_fast('fastreg', other):.1f}x" for other in ("eager", "compiled")]
        if result.on_gpu:
            own = case.info["fastreg"]
            row += [f"{own['share_of_copy']:.0%}", f"{own['launches']}"]
        rows.append(row)
    return table(rows)


def step_table(result: Result) -> str:
    """A training step by every peer, and what the penalty adds to the step without it."""
    rows = [["a training step", "ms", "against the eager formula"]]
    for case in result.of(STEP):
        for peer in case.seconds:
            speed = "" if peer == "eager" else f"{case.times_as_fast(peer, 'eager'):.2f}x"
            rows.append([peer, number(case.milliseconds(peer)), speed])
    return table(rows)


def lowest(result: Result) -> str:
    """Whether the targets for a CPU are met, as a sentence."""
    parts = []
    for dtype, target in CPU_TARGETS.items():
        speeds = [c.times_as_fast("fastreg", "eager") for c in result.of(BOTH) if c.any_info["dtype"] == dtype]
        if speeds:
            verdict = "met" if min(speeds) >= target else "not met everywhere"
            parts.append(f"{dtype} {min(speeds):.1f}x to {max(speeds):.1f}x (target {target:g}x: {verdict})")
    return f"Forward + backward against the eager formula: {'; '.join(parts)}.\n"


def full_table(result: Result) -> str:
    """Every case and peer with all its figures."""
    figures = [key for key in FIGURES if any(key in info for case in result.cases for info in case.info.values())]
    rows = [
        ["case", "pass", "peer", "median, ms", "spread", "fastreg against it", *(FIGURES[key][0] for key in figures)]
    ]
    for case in result.cases:
        for peer, info in case.info.items():
            cells = [number(info[key] / FIGURES[key][1]) if key in info else "" for key in figures]
            speed = f"{case.times_as_fast('fastreg', peer):.2f}x"
            spread = f"{case.spread(peer):.0%}"
            rows.append([case.label, case.kind, peer, number(case.milliseconds(peer)), spread, speed, *cells])
    note = f"Rendered from {result.name}.json by `python -m bench.report`. Spread: the middle half of the rounds."
    return f"{where(result)}\n\n{note}\n\n{table(rows)}"


def readme_part(results: list[Result]) -> str:
    """What stands between the README's markers."""
    parts = []
    for result in sorted(results, key=lambda result: (not result.on_gpu, result.name)):
        parts += [f"{where(result)}.\n", penalty_table(result)]
        parts += [] if result.on_gpu else [lowest(result)]
        parts += [step_table(result)] if result.of(STEP) else []
        pictures = [f"![{alt}](bench/results/{result.name}-{kind}.svg)" for kind, alt in plots(result)]
        parts += ["\n".join(pictures) + "\n", f"All cases: [{result.name}.md](bench/results/{result.name}.md).\n"]
    if not any(result.on_gpu for result in results):
        parts += ["On a GPU: **not measured yet**, none was at hand; `bench/on_gpu.sh` measures it.\n"]
    if all(result.on_gpu for result in results):
        parts += ["On a CPU: **not measured yet**; `make bench` measures it.\n"]
    return "\n".join(parts)


def with_part(readme: str, part: str) -> str:
    """The README with `part` between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def plots(result: Result) -> list[tuple[str, str]]:
    """Kind and description of every plot of a result."""
    roofline = ("roofline", "Bandwidth reached against the size of the inputs, beside a copy's")
    return [("speedup", "How many times as fast as its peers fastreg is, by shape"), *[roofline] * result.on_gpu]


def speedup_plot(result: Result) -> Figure:
    cases = result.of(BOTH)[::-1]
    figure = Figure(figsize=(8, 1 + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for offset, other in ((0.2, "eager"), (-0.2, "compiled")):
        speeds = [case.times_as_fast("fastreg", other) for case in cases]
        bars = axes.barh([i + offset for i in range(len(cases))], speeds, 0.4, label=f"against {other}")
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(range(len(cases)), [case.label for case in cases])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times as fast, forward + backward\n{result.machine['device']}")
    axes.legend(loc="lower right")
    return figure


def roofline_plot(result: Result) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind, marker in ((BOTH, "o"), ("forward", "^")):
        for peer in ("fastreg", "compiled", "eager"):
            cases = sorted(result.of(kind), key=lambda case: case.any_info["bytes_moved"])
            passes = 3 if kind == BOTH else 1
            sizes = [case.any_info["bytes_moved"] / passes / 1e6 for case in cases]
            reached = [case.info[peer]["bandwidth"] / 1e12 for case in cases]
            axes.plot(sizes, reached, marker, alpha=0.7, label=f"{peer}, {kind}")
    axes.axhline(result.machine["copy_bandwidth"] / 1e12, color="black", linewidth=0.8, label="copy, measured")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"inputs, MB\n{result.machine['device']}")
    axes.set_ylabel("bytes that must move over time, TB/s")
    axes.legend(fontsize=8)
    return figure


def save(figure: Figure, file: Path, digest: str) -> None:
    """As SVG, which names the JSON it was rendered from: its bytes depend on matplotlib, too."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastreg"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": f"JSON {digest}"})


def main() -> None:
    results = [load(file) for file in sorted(RESULTS.glob("*.json"))]
    for result in results:
        (RESULTS / f"{result.name}.md").write_text(full_table(result))
        save(speedup_plot(result), RESULTS / f"{result.name}-speedup.svg", result.digest)
        if result.on_gpu:
            save(roofline_plot(result), RESULTS / f"{result.name}-roofline.svg", result.digest)
    part = readme_part(results)
    README.write_text(with_part(README.read_text(), part))
    print(part)


if __name__ == "__main__":
    main()
