"""The picture of the README: time and memory that each way of adding the penalty adds to a training step."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from bench.measure.machine import ROOT
from bench.measure.results import Case

FILE = ROOT / "docs" / "steps.svg"
CASES = {  # the label of a case, and its title
    "8 elementwise layers, (4, 256, 256)": "8 layers of tanh(x * weight), 4 x 256 x 256",
    "LSTM, (16, 35, 60)": "LSTM, 16 x 35 x 60",
}
WAYS = "eager", "compiled", "fused_ar_tar", "attach", "FusedRNNDropout"
COLORS = {"eager": "#9aa5b1", "compiled": "#6b7785"}  # of the formulas; fastreg has OURS
OURS = "#1f6feb"


def shares(case: Case) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the added time and peak memory of each way, in percent of the step without the penalty, with its error."""
    without, ways = case.ways["no penalty"], [way for way in WAYS if way in case.ways]
    time = {way: tuple(100 * x / without["median"] for x in case.added(way)) for way in ways}
    memory = {way: (100 * (case.ways[way]["peak_bytes"] / without["peak_bytes"] - 1), 0.0) for way in ways}
    return {"time": time, "memory": memory}


def draw(cases: list[Case], about: str, clock: str) -> None:
    """Draw the bars, unless the file has been drawn of the same data."""
    shown = json.dumps([about, *map(shares, cases)])
    data = f"data {hashlib.sha256(shown.encode()).hexdigest()[:12]}"
    if FILE.exists() and data in FILE.read_text():
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"svg.hashsalt": "steps", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    with plt.rc_context(style):
        shared: dict[str, Any] = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
        figure, axes = plt.subplots(2, len(cases), figsize=(8, 4.2), **shared)
        for column, case in enumerate(cases):
            for row, (what, bars) in enumerate(shares(case).items()):
                ax, ways = axes[row][column], list(bars)
                values, errors = zip(*bars.values(), strict=True)
                colors = [COLORS.get(way, OURS) for way in ways]
                labels = [f"{way} formula" if way in COLORS else way for way in ways]
                drawn = ax.barh(labels, values, xerr=errors if row == 0 else None, color=colors)
                ax.bar_label(drawn, [f"{round(value) + 0:+d}%" for value in values], padding=3)
                ax.margins(x=0.2)
                ax.axvline(0, color="black", linewidth=0.8)
                ax.spines[["top", "right"]].set_visible(False)
                ax.set_xlabel(f"added {clock if what == 'time' else 'peak memory'}, % of the step")
                ax.set_title(CASES[case.label] if row == 0 else "", fontsize=10)
        axes[0][0].invert_yaxis()
        figure.savefig(FILE, metadata={"Date": None, "Description": data})
        plt.close(figure)
