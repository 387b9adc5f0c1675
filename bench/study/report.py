"""The page of bench.study.run beside its JSON lines, and its sentence in README.md.

No figure is typed: tests/project/test_study.py fails when a page disagrees with the JSON lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.measure.machine import RESULTS, ROOT
from bench.measure.report import Part, table, with_parts, write

COMMITTED = RESULTS / "study.jsonl"
PENALTIES = {"none": (0.0, 0.0), "AR": (2.0, 0.0), "TAR": (0.0, 1.0), "AR and TAR": (2.0, 1.0)}  # alpha and beta
CLEAR = 3  # standard errors: less is no difference
BEGIN = "<!-- from bench/results/study.jsonl by python -m bench.study.run -->\n"
PAGE = """\
# Do AR and TAR help?

Rendered from study.jsonl by `python -m bench.study.run`, which trains what is missing there: a small AWD-LSTM on
{words:,} words of the King James text, with each of {seeds} seeds. The difference is to the training without a penalty
that has the same seed, and so the same first weights, dropout masks and sequence lengths. ±: the standard error of the
mean over seeds; a difference of less than {clear} of them is no difference.

{table}
The first eight tenths of the words are the training text, the next tenth is for validation, and the last tenth is the
test text. When the validation loss has not fallen for {patience} epochs, the learning rate is divided by {divisor};
after {divisions} divisions, the training ends instead. All figures are of the epoch with the lowest validation loss, in
evaluation mode and without penalties. The gap is the loss of the validation text minus that of the training text, in
nats a word. The penalty is relative to the loss of the training text.

Settings: {settings}. Trained on: {machine}.
"""


@dataclass(frozen=True)
class Run:
    """One training. Losses are means over the words, in nats and without penalties; lists have an item an epoch."""

    alpha: float
    beta: float
    seed: int
    train_loss: list[float]  # during the epoch, in training mode
    valid_loss: list[float]  # after the epoch, in evaluation mode
    ar: list[float]
    tar: list[float]
    best_train_loss: float  # of the training text, after the best epoch, in evaluation mode
    test_loss: float  # of the test text, after the best epoch
    settings: dict[str, Any]  # which all runs of a study share
    machine: dict[str, str]

    @property
    def coefficients(self) -> tuple[float, float]:
        return self.alpha, self.beta

    @property
    def perplexities(self) -> list[float]:
        """Return the validation perplexity after each epoch."""
        return [math.exp(loss) for loss in self.valid_loss]

    @property
    def test(self) -> float:
        """Return the perplexity of the test text after the best epoch."""
        return math.exp(self.test_loss)

    @property
    def penalty(self) -> float:
        """Return the penalty of the best epoch in percent of the loss of the training text after it."""
        best = self.valid_loss.index(min(self.valid_loss))
        return 100 * (self.alpha * self.ar[best] + self.beta * self.tar[best]) / self.best_train_loss


COLUMNS: dict[str, tuple[Callable[[Run], float], str]] = {
    "test perplexity": (lambda run: run.test, ".2f"),
    "validation perplexity": (lambda run: min(run.perplexities), ".2f"),
    "training perplexity": (lambda run: math.exp(run.best_train_loss), ".2f"),
    "gap": (lambda run: min(run.valid_loss) - run.best_train_loss, ".3f"),
    "penalty, %": (lambda run: run.penalty, ".1f"),
}


def append(run: Run, file: Path) -> None:
    """Add a training to a file; an interrupted study goes on behind those that its file has."""
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(run)) + "\n")


def load(file: Path) -> list[Run]:
    """Read a study's JSON lines, a training each, and sort them by seed."""
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted((Run(**json.loads(line)) for line in lines), key=lambda run: run.seed)


def average(values: list[float], form: str) -> str:
    """Render the mean and its standard error."""
    return f"{mean(values):{form}}±{stdev(values) / math.sqrt(len(values)):{form.removeprefix('+')}}"


def difference(runs: list[Run], coefficients: tuple[float, float]) -> str:
    """Render what a penalty changes in the test perplexity, and say if that is no difference."""
    plain = {run.seed: run.test for run in runs if not any(run.coefficients)}
    values = [run.test - plain[run.seed] for run in runs if run.coefficients == coefficients]
    lost = abs(mean(values)) < CLEAR * stdev(values) / math.sqrt(len(values))
    return average(values, "+.2f") + " (no difference seen)" * lost


def page(runs: list[Run]) -> str:
    """Render the page beside the JSON lines."""
    rows = [["penalty", "alpha", "beta", "difference in test perplexity", *COLUMNS]]
    for name, pair in PENALTIES.items():
        own = [run for run in runs if run.coefficients == pair]
        cells = [average([value(run) for run in own], form) for value, form in COLUMNS.values()]
        rows.append([name, *(f"{x:g}" for x in pair), difference(runs, pair) if any(pair) else "", *cells])
    facts, machine = runs[0].settings, runs[0].machine
    listed, named = (", ".join(f"{name} {value}" for name, value in words.items()) for words in (facts, machine))
    seeds = len({run.seed for run in runs})
    return PAGE.format(
        **facts | {"seeds": seeds, "clear": CLEAR, "table": table(rows), "settings": listed, "machine": named}
    )


def headline(runs: list[Run]) -> str:
    """Render the part in the README."""
    plain = average([run.test for run in runs if not any(run.coefficients)], ".2f")
    ar, tar, both = (difference(runs, pair) for pair in PENALTIES.values() if any(pair))
    return (
        f"On {runs[0].settings['words']:,} words of the King James text, the test perplexity of a small AWD-LSTM is "
        f"{plain}; AR changes it by {ar}, TAR by {tar}, and both by {both} "
        f"([study](bench/results/study.md), {len({run.seed for run in runs})} seeds).\n"
    )


PARTS: list[Part] = [(ROOT / "README.md", BEGIN, headline)]


def pages(file: Path) -> dict[Path, str]:
    """Return the page beside the JSON lines, and the pages with parts."""
    return {file.with_suffix(".md"): page(load(file))} | with_parts(PARTS, load(file))


def render(file: Path) -> None:
    write(pages(file))
