"""Find out whether AR and TAR help: train the demo's AWD-LSTM with neither, each and both, over several seeds.

`python -m bench.study.run` adds each finished training as a line to bench/results/study.jsonl. Trainings that the file
has are not repeated. Then it renders the page beside that file, and the part in README.md. The whole study takes less
than two hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from itertools import product

from bench.measure.report import write
from bench.study.report import COMMITTED, PENALTIES, load, pages
from bench.study.training import Job, train_all

SEEDS = [*range(1, 9)]


def main() -> None:
    argparse.ArgumentParser(prog="bench.study.run", description=__doc__).parse_args()
    known = {((run.alpha, run.beta), run.seed): run for run in load()}
    jobs = [Job(coefficients, seed) for seed, coefficients in product(SEEDS, PENALTIES.values())]
    settings = jobs[0].settings()
    if any(run.settings != settings for run in known.values()):
        raise ValueError(f"{COMMITTED} has trainings of other settings: remove it, and all are trained anew")
    for run, _ in train_all(job for job in jobs if (job.coefficients, job.seed) not in known):
        with COMMITTED.open("a") as lines:
            lines.write(json.dumps(asdict(run)) + "\n")
        perplexity = math.exp(run.test_loss)
        print(f"alpha {run.alpha:g}, beta {run.beta:g}, seed {run.seed}: test perplexity {perplexity:.2f}", flush=True)
    write(pages())


if __name__ == "__main__":
    main()
