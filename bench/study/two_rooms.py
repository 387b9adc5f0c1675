"""Measure the effect of TAR on the world model of examples/two_rooms.py, with all weights chosen in the same way.

`python -m bench.study.two_rooms` adds each run as a line to bench/results/two_rooms.jsonl. Runs that the file has are
not repeated, so an interrupted experiment continues. All runs take less than an hour on one core. Then it renders the
page beside that file, and the part in README.md. No figure is typed:
tests/project/test_study.py fails when a page disagrees with the JSON lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from bench.measure.report import RESULTS, ROOT, Part, table, with_parts, write
from bench.study import report
from bench.study.report import CLEAR, average, judged
from examples import two_rooms
from examples.two_rooms import Weights

COMMITTED = RESULTS / "two_rooms.jsonl"
VICREG, BETAS = (0.03, 0.1, 0.3, 1.0), (1.0, 3.0, 10.0, 30.0)
VICREG_ALONE = (0.003, 0.01, *VICREG, 3.0, 10.0)  # without TAR: the best weights are not on the edge of this grid
# seeds of a round -> most settings of a kind that train in it
ROUNDS: dict[tuple[int, ...], int] = {(101,): 64, (102,): 12, (103, 104): 4}
CHOICE_SEEDS = tuple(chain(*ROUNDS))
FRESH_SEEDS = tuple(range(11, 21))
STEPS = 1000
COMPARISONS = {  # name -> whether there is a distractor, and the steps of the training
    "only the dot": (False, STEPS),
    "with a distractor": (True, STEPS),
    "only the dot, 150 steps": (False, 150),
}
BEGIN = "<!-- from bench/results/two_rooms.jsonl by python -m bench.study.two_rooms -->\n"
METHOD = """\
The weight of the prediction is 1. With TAR, the weights of VICReg's terms are searched from {low:g} to {high:g}, and
beta from {low_beta:g} to {high_beta:g}. Without TAR, the weights of VICReg's terms are searched from {low_alone:g} to
{high_alone:g}: this grid was extended until the weights chosen in it were not on its edge. The grid with TAR was not
extended, and the weights chosen in it are {place}.

The settings with TAR and those without it are chosen in the same way, in three rounds: all train with one seed, the
best 12 of each kind with one more, the best 4 of each kind with two more. The best of the 4 by its mean over the four
seeds is chosen. There are {with_tar} settings with TAR to choose from, and {alone} without it.

The table has the results of ten other seeds. A seed has the same first weights, training data and trials with all
settings, which makes pairs: the gain of TAR is the mean difference to the setting with TAR. The distractor is a fainter
dot of the same shape that no action moves. The trainings of 150 steps show whether a shorter training has the same
effect as TAR. Nothing is chosen anew for these two. ±: the standard error of the mean. A mean of at most {clear}
standard errors is not significant.
"""


class Job(NamedTuple):
    """A training to do."""

    weights: Weights
    seed: int
    distractor: bool = False
    steps: int = STEPS


@dataclass(frozen=True)
class Run:
    """One training, and the shares of its trials that succeed."""

    weights: Weights
    seed: int
    distractor: bool
    same_room: float
    other_room: float
    settings: dict[str, Any]
    machine: dict[str, str]

    @property
    def success(self) -> float:
        return (self.same_room + self.other_room) / 2

    @property
    def job(self) -> Job:
        return Job(self.weights, self.seed, self.distractor, self.settings["steps"])


def load(file: Path) -> list[Run]:
    """Read the runs of a file."""
    return [Run(**record | {"weights": Weights(*record["weights"])}) for record in report.records(file)]


def facts_of(steps: int) -> dict[str, Any]:
    """Return the facts that runs of as many steps share."""
    names = "BATCH", "TIME", "SIZE", "LATENT", "SPEED", "DOOR", "NOISE", "AHEAD", "TRIALS", "LIMIT", "CLOSE"
    planner = "HORIZON", "CANDIDATES", "BEST", "ROUNDS"
    facts = {name.lower(): getattr(two_rooms, name) for name in (*names, *planner)}
    return json.loads(json.dumps({"steps": steps} | facts))


def ranked(runs: Iterable[Run], seeds: Collection[int]) -> tuple[list[Weights], list[Weights]]:
    """Sort the settings that trained with all these seeds, those without TAR and those with it, the best first."""
    found: dict[Weights, dict[int, float]] = {}
    for run in runs:
        if run.seed in seeds:
            found.setdefault(run.weights, {})[run.seed] = run.success
    means = {weights: mean(values.values()) for weights, values in found.items() if len(values) == len(seeds)}
    best = sorted(means, key=lambda weights: (-means[weights], weights))
    return [x for x in best if not x.beta], [x for x in best if x.beta]


def chosen(runs: Iterable[Run]) -> dict[str, Weights]:
    """Return the three settings to compare."""
    (plain, *_), (tar, *_) = ranked(runs, CHOICE_SEEDS)
    return {"without TAR": tar._replace(beta=0.0), "with TAR": tar, "without TAR, weights tuned without it": plain}


def jobs(file: Path) -> Iterator[Job]:
    """Generate all runs of the experiment; the results of a round decide on the runs of the next."""
    left = [
        Weights(*weights) for weights in (*product(VICREG, VICREG, BETAS), *product(VICREG_ALONE, VICREG_ALONE, [0.0]))
    ]
    so_far: list[int] = []
    for seeds, count in ROUNDS.items():
        if so_far:
            left = [weights for kind in ranked(load(file), so_far) for weights in kind[:count]]
        for seed, weights in product(seeds, left):
            yield Job(weights, seed)
        so_far += seeds
    settings = chosen(load(file)).values()
    for (distractor, steps), seed, weights in product(COMPARISONS.values(), FRESH_SEEDS, settings):
        yield Job(weights, seed, distractor, steps)


def run_all(file: Path) -> None:
    """Do the runs that the file lacks, and append each to it."""
    done = {run.job for run in load(file)}
    facts = report.machine_facts()
    for job in jobs(file):
        if job not in done:
            done.add(job)
            model = two_rooms.train(job.weights, job.seed, job.steps, job.distractor)
            same, other = (round(share, 4) for share in two_rooms.success(model, job.distractor))
            run = Run(*job[:3], same, other, facts_of(job.steps), facts)
            report.append(run, file)
            print(f"{job}: success {run.success:.3f}", flush=True)


def compared(runs: list[Run], weights: Weights, distractor: bool, steps: int) -> list[Run]:
    """Select the runs of a setting with the fresh seeds, in the order of the seeds."""
    found = {run.job: run for run in runs}
    return [found[Job(weights, seed, distractor, steps)] for seed in FRESH_SEEDS]


def gain(ours: list[Run], others: list[Run]) -> str:
    """Render the mean difference in success of the pairs of two settings."""
    return judged([our.success - other.success for our, other in zip(ours, others, strict=True)], "+.3f")


def headline(runs: list[Run]) -> str:
    """Render the part in the README."""
    _, tar, anew = (
        {images: compared(runs, weights, *place) for images, place in COMPARISONS.items()}
        for weights in chosen(runs).values()
    )
    alone, distractor, _ = COMPARISONS
    success, without = (mean([run.success for run in found[alone]]) for found in (tar, anew))
    return (
        f"In [two rooms](examples/two_rooms.py), a world model's plans succeed in {success:.0%} of trials with TAR and "
        f"{without:.0%} without, with the other weights tuned separately: {gain(tar[alone], anew[alone])}, and beside "
        f"a distractor {gain(tar[distractor], anew[distractor])} ([table](bench/results/two_rooms.md)).\n"
    )


def summary(runs: list[Run]) -> str:
    """Render the comparison of the three settings."""
    rows = [["images", "setting", "variance, covariance, beta", "success", "same room", "other room", "gain of TAR"]]
    settings = chosen(runs)
    for images, (distractor, steps) in COMPARISONS.items():
        tar = compared(runs, settings["with TAR"], distractor, steps)
        for name, weights in settings.items():
            found = compared(runs, weights, distractor, steps)
            shares = ([getattr(run, share) for run in found] for share in ("success", "same_room", "other_room"))
            cells = [average(values, ".3f") for values in shares]
            cells.append(gain(tar, found) if weights != settings["with TAR"] else "")
            rows.append([images, name, ", ".join(f"{weight:g}" for weight in weights), *cells])
    return table(rows)


def choice_table(runs: list[Run]) -> str:
    """Render the means of the settings that trained with all seeds of the choice."""
    rows = [["variance, covariance, beta", "success"]]
    for weights in chain(*ranked(runs, CHOICE_SEEDS)):
        values = [run.success for run in runs if run.weights == weights and run.seed in CHOICE_SEEDS]
        rows.append([", ".join(f"{weight:g}" for weight in weights), average(values, ".3f")])
    return table(rows)


def method(runs: list[Run]) -> str:
    """Describe the grids, the choice and the comparison."""
    tar = chosen(runs)["with TAR"]
    edges = {VICREG[0], VICREG[-1]}
    on_edge = {tar.variance, tar.covariance} & edges or tar.beta in (BETAS[0], BETAS[-1])
    return METHOD.format(
        **{"low": VICREG[0], "high": VICREG[-1], "low_beta": BETAS[0], "high_beta": BETAS[-1]},
        **{"low_alone": VICREG_ALONE[0], "high_alone": VICREG_ALONE[-1]},
        **{"with_tar": len(VICREG) ** 2 * len(BETAS), "alone": len(VICREG_ALONE) ** 2, "clear": CLEAR},
        place="on its edge" if on_edge else "inside it",
    )


def page(runs: list[Run]) -> str:
    """Render the page beside the JSON lines."""
    parts = [
        "# Two rooms: does TAR help a world model to plan?\n",
        "Rendered from two_rooms.jsonl by `python -m bench.study.two_rooms`, which does the missing runs.\n",
        method(runs),
        summary(runs),
        report.origin(runs),
        "## The choice\n",
        "Mean success of the settings of the last round, over the four seeds of the choice:\n",
        choice_table(runs),
    ]
    return "\n".join(parts)


PARTS: list[Part] = [(ROOT / "README.md", BEGIN, headline)]


def pages(file: Path) -> dict[Path, str]:
    """Return the page beside the JSON lines, and the pages with parts."""
    runs = load(file)
    return {file.with_suffix(".md"): page(runs)} | with_parts(PARTS, runs)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="bench.study.two_rooms", description=__doc__).parse_args()
    torch.set_num_threads(1)
    run_all(COMMITTED)
    write(pages(COMMITTED))
