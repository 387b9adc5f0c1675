"""The page with tables and a plot of bench.study.run, beside its JSON lines.

No figure is typed: tests/project/test_study.py fails when the page disagrees with the JSON lines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.measure.report import RESULTS, ROOT, table

COMMITTED = RESULTS / "study.jsonl"
COEFFICIENTS = (0.0, 0.0), (2.0, 0.0), (0.0, 1.0), (2.0, 1.0)  # alpha and beta, first the baseline
BASELINE = COEFFICIENTS[0]
BEGIN = "<!-- from bench/results/study.jsonl by python -m bench.study.run -->\n"
METHOD = """\
Losses and perplexities are of a word and leave the penalties out. The gap is validation minus training, both after the
last epoch and in evaluation mode. AR and TAR are the last epoch's means, in training. A seed has the same first
weights, dropout masks and sequence lengths with all coefficients, which makes pairs. ±: the standard error of the mean.
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
        return [math.exp(loss) for loss in self.valid_loss]

    @property
    def best_epoch(self) -> int:
        """Return the epoch after which the validation loss is lowest; the first epoch is 1."""
        return self.valid_loss.index(min(self.valid_loss)) + 1

    @property
    def best(self) -> float:
        """Return the validation perplexity after the best epoch."""
        return min(self.perplexities)

    @property
    def test(self) -> float:
        """Return the perplexity of the test text after the best epoch."""
        return math.exp(self.test_loss)


class Study:
    """The runs of one file, sorted by coefficients and seed."""

    def __init__(self, runs: Iterable[Run]):
        self.runs = sorted(runs, key=lambda run: (COEFFICIENTS.index(run.coefficients), run.seed))

    def of(self, coefficients: tuple[float, float]) -> list[Run]:
        return [run for run in self.runs if run.coefficients == coefficients]

    @property
    def trained(self) -> list[tuple[float, float]]:
        """Return the coefficients of the runs."""
        return [coefficients for coefficients in COEFFICIENTS if self.of(coefficients)]

    def pairs(self, coefficients: tuple[float, float]) -> list[tuple[Run, Run]]:
        """Pair the runs with these coefficients with the runs without regularization of the same seeds."""
        plain = {run.seed: run for run in self.of(BASELINE)}
        return [(run, plain[run.seed]) for run in self.of(coefficients) if run.seed in plain]


def load(file: Path) -> Study:
    """Read a study's JSON lines."""
    return Study(Run(**json.loads(line)) for line in (file.read_text().splitlines() if file.exists() else []))


def label(coefficients: tuple[float, float]) -> str:
    return "({:g}, {:g})".format(*coefficients)


def average(values: list[float], form: str) -> str:
    """Render the mean and, for two or more values, its standard error."""
    if len(values) < 2:
        return f"{mean(values):{form}}"
    return f"{mean(values):{form}} ± {stdev(values) / math.sqrt(len(values)):{form.removeprefix('+')}}"


COLUMNS: dict[str, tuple[Callable[[Run], float], str]] = {
    "validation perplexity, end": (lambda run: run.final, ".2f"),
    "best": (lambda run: run.best, ".2f"),
    "best epoch": (lambda run: run.perplexities.index(run.best) + 1, ".1f"),
    "training perplexity, end": (lambda run: run.final_train, ".2f"),
    "gap in perplexity": (lambda run: run.final - run.final_train, ".2f"),
    "gap in loss": (lambda run: run.valid_loss[-1] - run.final_train_loss, ".3f"),
    "AR": (lambda run: run.ar[-1], ".4f"),
    "TAR": (lambda run: run.tar[-1], ".4f"),
}


def averages_table(study: Study) -> str:
    rows = [["(alpha, beta)", "seeds", *COLUMNS]]
    for coefficients in study.trained:
        runs = study.of(coefficients)
        cells = [average([value(run) for run in runs], form) for value, form in COLUMNS.values()]
        rows.append([label(coefficients), str(len(runs)), *cells])
    return table(rows)


def differences(pairs: list[tuple[Run, Run]], value: Callable[[Run], float]) -> list[float]:
    return [value(run) - value(plain) for run, plain in pairs]


ENDS: dict[str, Callable[[Run], float]] = {"end": lambda run: run.final, "best": lambda run: run.best}


def after(study: Study, coefficients: tuple[float, float], epoch: int) -> str:
    """Render the change of the validation perplexity after an epoch; empty without a pair of runs."""
    values = differences(study.pairs(coefficients), lambda run: run.perplexities[epoch - 1])
    return f"{average(values, '+.2f')}, lower in {lower(values)} seeds" if values else ""


def lower(values: list[float]) -> str:
    return f"{sum(x < 0 for x in values)} of {len(values)}"


def paired_table(study: Study) -> str:
    """Render the difference of each seed to its training without regularization."""
    seeds = sorted({run.seed for run in study.of(BASELINE)})
    rows = [["(alpha, beta)", "perplexity", *(f"seed {seed}" for seed in seeds), "mean", "lower in"]]
    for coefficients in study.trained[1:]:
        pairs = study.pairs(coefficients)
        for name, value in ENDS.items() if pairs else ():
            values = differences(pairs, value)
            of_seed = {run.seed: f"{x:+.2f}" for (run, _), x in zip(pairs, values, strict=True)}
            cells = [*(of_seed.get(seed, "") for seed in seeds), average(values, "+.2f"), lower(values)]
            rows.append([label(coefficients), name, *cells])
    return table(rows)


def runs_table(study: Study) -> str:
    rows = [["(alpha, beta)", "seed", *COLUMNS]]
    for run in study.runs:
        cells = [f"{value(run):{form}}".removesuffix(".0") for value, form in COLUMNS.values()]
        rows.append([label(run.coefficients), str(run.seed), *cells])
    return table(rows)


def summary(study: Study) -> str:
    """Render the result after the last epoch: a sentence and a table."""
    plain = study.of(BASELINE)
    if not plain:
        return "No training without regularization: nothing to compare with.\n"
    rows = [["penalty", "alpha", "beta", "change of the perplexity", "seeds that improve"]]
    for alpha, beta in study.trained[1:]:
        values = differences(study.pairs((alpha, beta)), lambda run: run.final)
        if values:
            name = " and ".join(term for term, x in (("AR", alpha), ("TAR", beta)) if x)
            rows.append([name, f"{alpha:g}", f"{beta:g}", average(values, "+.2f"), lower(values)])
    return (
        f"A small AWD-LSTM, trained on {plain[0].settings['words']:,} words, ends at a validation perplexity of "
        f"{average([run.final for run in plain], '.2f')} without a penalty. The table has the change that each penalty "
        f"makes, as a mean over the seeds with its standard error.\n\n{table(rows)}"
    )


def headline(study: Study) -> str:
    """Render the result for the README in one paragraph, with the model, the text and the open question."""
    plain = study.of(BASELINE)
    settings = plain[0].settings
    changes = {}
    for coefficients in study.trained[1:]:
        values = differences(study.pairs(coefficients), lambda run: run.final)
        changes[coefficients] = average(values, "+.2f")
    still = all(run.best == run.final for run in plain)
    ending = " The baseline was still improving: longer training may leave less." if still else ""
    of = f"{settings['layers']} layers of up to {settings['hidden']} units"
    text = f"{settings['words']:,} words of the King James text for {settings['epochs']} epochs"
    return (
        f"**Perplexity fell in a small study.** An AWD-LSTM ({of}), trained on {text}, ends at a validation "
        f"perplexity of {average([run.final for run in plain], '.2f')}. TAR with `alpha=0, beta=1` changes it by "
        f"{changes[0.0, 1.0]}, AR with `alpha=2, beta=0` by {changes[2.0, 0.0]}, and both by {changes[2.0, 1.0]}: "
        f"means over pairs of trainings with the same seed, ± the standard error.{ending}\n"
    )


def gap(study: Study) -> str:
    """Compare the losses of training and validation with TAR and without it."""
    plain, tar = (
        [mean(values) for values in zip(*((run.final_train_loss, run.valid_loss[-1]) for run in runs), strict=True)]
        for runs in (study.of(BASELINE), study.of((0.0, 1.0)))
    )
    train, valid = (f"from {before:.2f} to {after:.2f}" for before, after in zip(plain, tar, strict=True))
    return (
        f"TAR changes the loss of the training text {train}, the loss of the validation text {valid}, and the gap "
        f"between them from {plain[1] - plain[0]:.2f} to {tar[1] - tar[0]:.2f}.\n"
    )


def where(study: Study) -> str:
    """Describe the settings and the machine of the trainings."""
    settings = study.runs[0].settings
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    machines = {tuple(run.machine.items()): None for run in study.runs}
    places = "".join(f"- {', '.join(f'{name} {value}' for name, value in machine)}\n" for machine in machines)
    return f"Settings: {text}.\n\nTrained on:\n\n{places}"


def page(study: Study, name: str) -> str:
    """Render the page; `name` is the name of the study's files, without their ending."""
    parts = [
        "# Do AR and TAR help?\n",
        f"Rendered from {name}.jsonl by `python -m bench.study.run`, which trains what is missing there.\n",
        summary(study),
        where(study),
        METHOD,
        averages_table(study),
        "Differences in validation perplexity to the training without regularization of the same seed:\n",
        paired_table(study),
        f"![Validation perplexity by epoch, and its difference to training without regularization]({name}.svg)\n",
        "## All runs\n",
        runs_table(study),
    ]
    return "\n".join(parts)


def plot(study: Study) -> Figure:
    """Plot the validation perplexity by epoch, its mean over the seeds, and the mean of the paired differences."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for i, coefficients in enumerate(study.trained):
        runs, color = study.of(coefficients), f"C{i}"
        epochs = range(1, len(runs[0].valid_loss) + 1)
        curves = np.array([run.perplexities for run in runs])
        above.plot(epochs, curves.T, color=color, alpha=0.25, linewidth=0.7)
        above.plot(epochs, curves.mean(0), color=color, label=label(coefficients))
        pairs = study.pairs(coefficients) if coefficients != BASELINE else []
        gains = np.array([np.subtract(run.perplexities, plain.perplexities) for run, plain in pairs])
        if pairs:
            below.plot(epochs, gains.mean(0), color=color)
        if len(pairs) > 1:
            error = gains.std(0, ddof=1) / math.sqrt(len(pairs))
            low, high = gains.mean(0) - error, gains.mean(0) + error
            below.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    best = min(run.best for run in study.runs)
    above.set_ylim(0.95 * best, 1.6 * best)  # otherwise the first epochs flatten the rest
    above.set_ylabel("validation perplexity")
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylabel("difference to (0, 0) of the same seed,\nmean and standard error")
    below.set_xlabel("epoch")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.legend(*above.get_legend_handles_labels(), title="(alpha, beta)", loc="outside upper center", ncols=4)
    return figure


def findings(study: Study) -> str:
    """Render the part in docs/coefficients.md."""
    return f"{summary(study)}\n{gap(study)}"


PAGES = {ROOT / "README.md": headline, ROOT / "docs" / "coefficients.md": findings}  # page -> its part after BEGIN


def render(file: Path) -> None:
    """Write the page and the plot beside the JSON lines."""
    study = load(file)
    file.with_suffix(".md").write_text(page(study, file.stem))
    # With the digest of the lines, as the bytes of an SVG depend on matplotlib, too.
    about = {"Date": None, "Description": f"JSON {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastreg"}):
        plot(study).savefig(file.with_suffix(".svg"), format="svg", metadata=about)
