"""The picture of the README: time and peak memory that each way of adding the penalty adds to a training step."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from bench.measure.machine import ROOT
from bench.measure.results import FORMULAS, Case, Figure

FILE = ROOT / "docs" / "steps.svg"
MODELS = {  # the label of a case, and the words for its model
    "8 elementwise layers, (4, 256, 256), variational dropout": "Eight cheap layers, tanh(x * weight)",
    "LSTM, (16, 35, 60), variational dropout": "A small LSTM",
    "AWD-LSTM, (20, 70, 400), variational dropout": "An AWD-LSTM",
}
WAYS = {
    "eager": "formula, eager",
    "compiled": "formula, compiled",
    "compiled with dropout": "compiled with dropout",
    "fused_ar_tar": "fused_ar_tar",
    "attach": "attach",
    "FusedRNNDropout": "FusedRNNDropout",
}
GREY, BLUE = "#7f7f7f", "#2c7bf3"  # of the formulas, text and axes; of fastreg: seen on white and on dark


def shares(case: Case) -> dict[str, dict[str, Figure]]:
    """Return the time and the peak memory that each way adds, in percent of the step without the penalty."""
    without, ways = case.ways["no penalty"], [way for way in WAYS if way in case.ways]
    time = {way: Figure(*(100 * x / without["median"] for x in case.added(way))) for way in ways}
    peaks = {way: 100 * (case.ways[way]["peak_bytes"] / without["peak_bytes"] - 1) for way in ways}
    return {"time": time, "peak memory": {way: Figure(peak, 0.0) for way, peak in peaks.items()}}


def words(share: Figure) -> str:
    """Render a share, and its standard error unless that is almost 0; it says so if it cannot be told from 0."""
    percent, error = round(share.median), round(share.error)
    number = f"{percent:+d}" * bool(percent) or "0"
    number += f" ± {error}%" * bool(error) or "%"
    number += ", not significant" * (share.error > 0 and not share.differs_from(0))
    return number.replace("-", "\N{MINUS SIGN}")


def draw(cases: list[Case], setting: str) -> None:
    """Draw the bars, unless the file has been drawn of the same data."""
    shown = json.dumps([setting, *map(shares, cases)])
    data = f"data {hashlib.sha256(shown.encode()).hexdigest()[:12]}"
    if FILE.exists() and data in FILE.read_text():
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    keys = "text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"
    style: Any = {"svg.hashsalt": "steps", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    with plt.rc_context(style | dict.fromkeys(keys, GREY)):
        figure, axes = plt.subplots(len(cases), 2, figsize=(8.4, 6.6), sharex="col", sharey=True, layout="constrained")
        for row, case in zip(axes, cases, strict=True):
            for ax, (what, bars) in zip(row, shares(case).items(), strict=True):
                values, errors = zip(*bars.values(), strict=True)
                colors = [GREY if way in FORMULAS else BLUE for way in bars]
                names = [WAYS[way] for way in bars]
                ax.barh(names, values, xerr=errors if any(errors) else None, color=colors, ecolor=GREY)
                for name, share in zip(names, bars.values(), strict=True):
                    end = max(sum(share), 0)
                    ax.annotate(words(share), (end, name), (4, 0), textcoords="offset points", va="center")
                ax.axvline(0, color=GREY, linewidth=0.8)
                ax.spines[["top", "right"]].set_visible(False)
                ax.tick_params(labelbottom=True)
                ax.set_xlabel(f"{what} added, % of the step without a penalty", fontsize="small")
            batch, time, hidden = case.info["shape"]
            row[0].set_title(f"{MODELS[case.label]}: batch {batch}, time {time}, hidden {hidden}", loc="left")
        for ax in axes[0]:
            ax.set_xlim(right=1.4 * ax.get_xlim()[1])  # room for the labels
        axes[0][0].invert_yaxis()
        handles = [Patch(color=GREY, label="the formula in PyTorch"), Patch(color=BLUE, label="fastreg")]
        title = f"{setting}; lower is better"
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, title=title)
        figure.savefig(FILE, transparent=True, metadata={"Date": None, "Description": data})
        plt.close(figure)
