"""The page of bench.study.run beside its JSON lines, and its sentence in README.md: no figure is typed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from bench.measure.machine import RESULTS, ROOT
from bench.measure.report import table, with_parts
from bench.study.training import Run

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
COLUMNS: dict[str, tuple[Callable[[Run], float], str]] = {
    "test perplexity": (lambda run: math.exp(run.test_loss), ".2f"),
    "validation perplexity": (lambda run: math.exp(min(run.valid_loss)), ".2f"),
    "training perplexity": (lambda run: math.exp(run.best_train_loss), ".2f"),
    "gap": (lambda run: min(run.valid_loss) - run.best_train_loss, ".3f"),
    "penalty, %": (Run.penalty, ".1f"),
}


def load() -> list[Run]:
    """Read the study's JSON lines, a training each, and sort them by seed."""
    lines = COMMITTED.read_text().splitlines() if COMMITTED.exists() else []
    return sorted((Run(**json.loads(line)) for line in lines), key=lambda run: run.seed)


def average(values: list[float], form: str) -> str:
    """Render the mean and its standard error."""
    return f"{mean(values):{form}}±{stdev(values) / math.sqrt(len(values)):{form.removeprefix('+')}}"


def difference(runs: list[Run], pair: tuple[float, float]) -> str:
    """Render what a penalty changes in the test perplexity, and say if that is no difference."""
    plain, own = ({x.seed: math.exp(x.test_loss) for x in runs if (x.alpha, x.beta) == y} for y in ((0, 0), pair))
    values = [own[seed] - plain[seed] for seed in own]
    lost = abs(mean(values)) < CLEAR * stdev(values) / math.sqrt(len(values))
    return average(values, "+.2f") + " (no difference seen)" * lost


def page(runs: list[Run]) -> str:
    """Render the page beside the JSON lines."""
    rows = [["penalty", "alpha", "beta", "difference in test perplexity", *COLUMNS]]
    for name, pair in PENALTIES.items():
        own = [run for run in runs if (run.alpha, run.beta) == pair]
        cells = [average([value(run) for run in own], form) for value, form in COLUMNS.values()]
        rows.append([name, *(f"{x:g}" for x in pair), difference(runs, pair) if any(pair) else "", *cells])
    facts = runs[0].settings
    listed, named = (", ".join(f"{name} {x}" for name, x in words.items()) for words in (facts, runs[0].machine))
    about = {"table": table(rows), "seeds": len({run.seed for run in runs}), "clear": CLEAR}
    return PAGE.format(**facts | about | {"settings": listed, "machine": named})


def headline(runs: list[Run]) -> str:
    """Render the part in the README."""
    plain = average([math.exp(run.test_loss) for run in runs if not run.alpha and not run.beta], ".2f")
    ar, tar, both = (difference(runs, pair) for pair in PENALTIES.values() if any(pair))
    return (
        f"On {runs[0].settings['words']:,} words of the King James text, the test perplexity of a small AWD-LSTM is "
        f"{plain}; AR changes it by {ar}, TAR by {tar}, and both by {both} "
        f"([study](bench/results/study.md), {len({run.seed for run in runs})} seeds).\n"
    )


def pages() -> dict[Path, str]:
    """Return the page beside the JSON lines, and the README, with their texts."""
    runs = load()
    return {COMMITTED.with_suffix(".md"): page(runs)} | with_parts([(ROOT / "README.md", BEGIN, headline)], runs)
