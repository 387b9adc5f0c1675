"""The page with tables and a plot of bench.study.run, beside its JSON lines.

No figure is typed: tests/project/test_study.py fails when the page disagrees with the JSON lines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.measure import machine
from bench.measure.machine import RESULTS, ROOT
from bench.measure.report import Part, table, with_parts, write

COMMITTED = RESULTS / "study.jsonl"
PENALTIES = {"none": (0.0, 0.0), "AR": (2.0, 0.0), "TAR": (0.0, 1.0), "AR and TAR": (2.0, 1.0)}  # alpha and beta
COMPARED = {name: pair for name, pair in PENALTIES.items() if any(pair)}  # with training without a penalty
CLEAR = 2.4  # standard errors; if there is no difference, the mean of eight pairs exceeds them in 5% of the studies
EARLY = 6  # epochs of a short training: the demo takes less than a minute on two cores
BEGIN = "<!-- from bench/results/study.jsonl by python -m bench.study.run -->\n"
METHOD = """\
The first eight tenths of the words are the training text, the next tenth is for validation, and the last tenth is the
test text. All trainings follow one rule: when the validation loss has not fallen for {patience} epochs, the learning
rate is divided by {divisor}; after {divisions} divisions, the training ends instead. The best epoch is the one with the
lowest validation loss, and all figures are of this epoch. {capped} of the {count} trainings reached the limit of
{epochs} epochs.

Losses and perplexities are of a word, in evaluation mode, without the penalties. The gap is the loss of the validation
text minus the loss of the training text. AR and TAR are means over the epoch, in training. A seed has the same first
weights, dropout masks and sequence lengths with all penalties, which makes pairs. ±: the standard error of the mean. A
mean difference of at most {clear} standard errors is not significant.
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
    def best_epoch(self) -> int:
        """Return the epoch after which the validation loss is lowest; the first epoch is 1."""
        return self.valid_loss.index(min(self.valid_loss)) + 1

    @property
    def test(self) -> float:
        """Return the perplexity of the test text after the best epoch."""
        return math.exp(self.test_loss)

    @property
    def gap(self) -> float:
        """Return the loss of the validation text minus the loss of the training text, after the best epoch."""
        return min(self.valid_loss) - self.best_train_loss

    @property
    def share(self) -> float:
        """Return the penalty of the best epoch over the loss of the training text after it."""
        epoch = self.best_epoch - 1
        return (self.alpha * self.ar[epoch] + self.beta * self.tar[epoch]) / self.best_train_loss


Value = Callable[[Run], float]
COLUMNS: dict[str, tuple[Value, str]] = {
    "test perplexity": (lambda run: run.test, ".2f"),
    "validation perplexity": (lambda run: min(run.perplexities), ".2f"),
    "training perplexity": (lambda run: math.exp(run.best_train_loss), ".2f"),
    "gap": (lambda run: run.gap, ".3f"),
    "best epoch": (lambda run: run.best_epoch, ".1f"),
    "AR": (lambda run: run.ar[run.best_epoch - 1], ".4f"),
    "TAR": (lambda run: run.tar[run.best_epoch - 1], ".4f"),
}


class Study:
    """The runs of one file, sorted by penalty and seed."""

    def __init__(self, runs: Iterable[Run]):
        order = [*PENALTIES.values()]
        self.runs = sorted(runs, key=lambda run: (order.index(run.coefficients), run.seed))

    def of(self, coefficients: tuple[float, float]) -> list[Run]:
        return [run for run in self.runs if run.coefficients == coefficients]

    @property
    def plain(self) -> list[Run]:
        """Return the runs without a penalty."""
        return self.of(PENALTIES["none"])

    def differences(self, coefficients: tuple[float, float], value: Value = lambda run: run.test) -> list[float]:
        """Subtract, seed by seed, a value of the runs without a penalty from the value of the runs with one."""
        plain = {run.seed: value(run) for run in self.plain}
        return [value(run) - plain[run.seed] for run in self.of(coefficients) if run.seed in plain]


def append(run: Run, file: Path) -> None:
    """Add a training to a file; an interrupted study goes on behind those that its file has."""
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(run)) + "\n")


def machine_facts() -> dict[str, Any]:
    """Describe the machine and the code; trainings are on the processor, even if there is a GPU."""
    return machine.facts() | {"device": machine.processor_name(), "source": machine.source()}


def load(file: Path) -> Study:
    """Read a study's JSON lines, a training each."""
    lines = file.read_text().splitlines() if file.exists() else []
    return Study(Run(**json.loads(line)) for line in lines)


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean; without a second value it is unknown, and infinite."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def average(values: list[float], form: str) -> str:
    """Render the mean and, for two or more values, its standard error."""
    error = f"±{standard_error(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{error}"


def verdict(values: list[float]) -> str:
    """Say whether differences are below 0 or above it, in the mean."""
    if abs(mean(values)) <= CLEAR * standard_error(values):
        return "not significant"
    return "lower" if mean(values) < 0 else "higher"


def judged(values: list[float], form: str) -> str:
    """Render the mean of differences and its standard error, and say if it is not significant."""
    unclear = verdict(values) == "not significant"
    return average(values, form) + " (not significant)" * unclear


def summary(study: Study) -> str:
    """Render the test perplexities: a sentence and a table."""
    rows = [["penalty", "alpha", "beta", "difference in test perplexity", "lower in", "verdict"]]
    for name, pair in COMPARED.items():
        values = study.differences(pair)
        lower = f"{sum(x < 0 for x in values)} of {len(values)} seeds"
        rows.append([name, *(f"{x:g}" for x in pair), average(values, "+.2f"), lower, verdict(values)])
    return (
        "A small AWD-LSTM, trained without a penalty until its validation loss stops falling, has a test perplexity of "
        f"{average([run.test for run in study.plain], '.2f')}. The table has the difference that each penalty makes: "
        f"the mean over pairs of trainings with the same seed, ± its standard error.\n\n{table(rows)}"
    )


def headline(study: Study) -> str:
    """Render the part in the README."""
    ar, tar, both = (judged(study.differences(pair), "+.2f") for pair in COMPARED.values())
    words, seeds = study.runs[0].settings["words"], len(study.plain)
    return (
        f"On {words:,} words of the King James text, the test perplexity of a small AWD-LSTM is "
        f"{average([run.test for run in study.plain], '.2f')}; AR changes it by {ar}, TAR by {tar}, and both by {both} "
        f"([study](bench/results/study.md), {seeds} seeds).\n"
    )


def gaps(study: Study) -> str:
    """Describe the effect of TAR on the gap between training and validation, and on a short training."""
    tar = PENALTIES["TAR"]
    losses: tuple[Value, ...] = (lambda run: run.best_train_loss, lambda run: min(run.valid_loss), lambda run: run.gap)
    train, valid, gap = (
        f"from {mean(map(value, study.plain)):.2f} to {mean(map(value, study.of(tar))):.2f}" for value in losses
    )
    epoch = min(EARLY, *(len(run.valid_loss) for run in study.runs))
    soon = study.differences(tar, lambda run: run.perplexities[epoch - 1])
    late = study.differences(tar, lambda run: min(run.perplexities))
    wider = judged(study.differences(tar, losses[-1]), "+.3f")
    return (
        f"At the best epochs TAR changes the loss of the training text {train}, the loss of the validation text "
        f"{valid}, and the gap between them {gap}: {wider}. TAR changes the validation perplexity by "
        f"{judged(soon, '+.2f')} after {epoch} epochs, and by {judged(late, '+.2f')} at the best epochs.\n"
    )


def sizes(study: Study) -> str:
    """Compare the penalties with the loss, as a reader does who looks for coefficients."""
    shares = [f"{mean(run.share for run in study.of(pair)):.1%} with {name}" for name, pair in COMPARED.items()]
    listed = f"{', '.join(shares[:-1])} and {shares[-1]}"
    return f"Relative to the loss of the training text at the best epochs, the penalty is {listed}.\n"


def findings(study: Study) -> str:
    """Compare the losses with each other, and with the penalties."""
    return f"{gaps(study)}\n{sizes(study)}"


def averages_table(study: Study) -> str:
    """Render the means over the seeds for each penalty."""
    rows = [["penalty", "seeds", *COLUMNS]]
    for name, pair in PENALTIES.items():
        runs = study.of(pair)
        cells = [average([value(run) for run in runs], form) for value, form in COLUMNS.values()]
        rows.append([name, str(len(runs)), *cells])
    return table(rows)


def method(study: Study) -> str:
    """Describe the trainings, their settings and their machines."""
    settings = study.runs[0].settings
    capped = sum(len(run.valid_loss) == settings["epochs"] for run in study.runs)
    how = METHOD.format(**settings, capped=capped or "None", count=len(study.runs), clear=CLEAR)
    listed = ", ".join(f"{name} {value}" for name, value in settings.items())
    machines = {tuple(run.machine.items()): None for run in study.runs}
    places = "".join(f"- {', '.join(f'{name} {value}' for name, value in machine)}\n" for machine in machines)
    return f"{how}\nSettings: {listed}.\n\nTrained on:\n\n{places}"


def page(study: Study, name: str) -> str:
    """Render the page; `name` is the name of the study's files, without their ending."""
    parts = [
        "# Do AR and TAR help?\n",
        f"Rendered from {name}.jsonl by `python -m bench.study.run`, which trains what is missing there.\n",
        summary(study),
        findings(study),
        method(study),
        averages_table(study),
        f"![Validation perplexity by epoch, and the differences in test perplexity]({name}.svg)\n",
    ]
    return "\n".join(parts)


def plot(study: Study) -> Figure:
    """Plot the validation perplexity by epoch up to the best epoch, and the differences in test perplexity."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    above, below = figure.subplots(2, 1)
    for i, (name, pair) in enumerate(PENALTIES.items()):
        for j, run in enumerate(study.of(pair)):
            values, best = run.perplexities, run.best_epoch
            above.plot(range(1, best + 1), values[:best], color=f"C{i}", alpha=0.5, linewidth=0.7)
            above.plot(best, values[best - 1], "o", color=f"C{i}", markersize=5, label=None if j else name)
        if name in COMPARED:
            values = study.differences(pair)
            below.plot([name] * len(values), values, "o", color=f"C{i}", alpha=0.5, markersize=5)
            below.errorbar(
                [name], [mean(values)], [standard_error(values)], fmt="_", color="black", capsize=6, markersize=20
            )
    best = min(min(run.perplexities) for run in study.runs)
    above.set_ylim(0.95 * best, 1.6 * best)  # otherwise the first epochs flatten the rest
    above.set(xlabel="epoch; the dot is the best one", ylabel="validation perplexity")
    above.legend(title="penalty")
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylabel("difference in test perplexity\nto the same seed without a penalty")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


PARTS: list[Part] = [(ROOT / "README.md", BEGIN, headline)]


def pages(file: Path) -> dict[Path, str]:
    """Return the page beside the JSON lines, and the pages with parts."""
    study = load(file)
    return {file.with_suffix(".md"): page(study, file.stem)} | with_parts(PARTS, study)


def render(file: Path) -> None:
    """Write the pages and the plot."""
    write(pages(file))
    # With the digest of the lines, as the bytes of an SVG depend on matplotlib, too.
    about = {"Date": None, "Description": f"JSON {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastreg"}):
        plot(load(file)).savefig(file.with_suffix(".svg"), format="svg", metadata=about)
