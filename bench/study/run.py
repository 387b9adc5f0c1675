"""Find out whether AR and TAR help: train the demo's AWD-LSTM with neither, each and both, over several seeds.

`python -m bench.study.run` adds each finished training as a line to bench/results/study.jsonl. Trainings that the file
has are not repeated, so an interrupted study continues. Then it renders the page beside that file, and the part in
README.md. The whole study takes less than two hours on two cores.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine
from bench.study import report, training
from bench.study.corpus import BATCH, BPTT, build_corpus, read_text
from bench.study.report import COMMITTED, PENALTIES, Run, load

WORDS = 60_000  # few, so that there is something to regularize
EPOCHS = 80  # at most
SEEDS = [*range(1, 9)]


@functools.cache
def digest(text: Path | None) -> str:
    """Identify a text by a digest. The text is read once for all runs."""
    return hashlib.sha256(read_text(text).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """A training to come."""

    coefficients: tuple[float, float]
    seed: int
    epochs: int = EPOCHS
    text: Path | None = None  # a file, or the King James text
    device: str = "cpu"

    def settings(self) -> dict[str, Any]:
        """Return the facts that determine a training, beside its coefficients and its seed."""
        facts = {"text": digest(self.text), "words": WORDS, "epochs": self.epochs, "batch": BATCH, "bptt": BPTT}
        model = {"layers": training.LAYERS, "embedding": training.EMBEDDING, "hidden": training.HIDDEN}
        optimizer = {"Adam lr": training.LEARNING_RATE, "clip": training.CLIP}
        schedule = {"patience": training.PATIENCE, "divisor": training.DIVISOR, "divisions": training.DIVISIONS}
        return facts | model | training.DROPOUTS._asdict() | optimizer | schedule


def machine_facts() -> dict[str, Any]:
    """Describe the machine and the code; trainings are on the processor, even if there is a GPU."""
    facts = machine.facts() | {"device": machine.processor_name(), "source": machine.source()}
    return facts | {"commit": machine.commit_name(machine.commit_facts())}


def train(job: Job) -> Run:
    return train_model(job)[0]


def train_model(job: Job) -> tuple[Run, training.Training]:
    """Train one model until it stops improving; return it, too, with the weights of its best epoch."""
    corpus = build_corpus(read_text(job.text), WORDS, torch.device(job.device))
    trained = training.Training(corpus, *job.coefficients, job.seed)
    epochs: list[tuple[float, ...]] = []
    for _ in range(job.epochs):
        epochs.append((*trained.epoch().mean(0).tolist(), training.evaluate(trained.model, corpus.valid)))
        if trained.stopping.ends(epochs[-1][-1]):
            break
    trained.stopping.restore()
    train_loss, ar, tar, valid_loss = ([round(x, 6) for x in column] for column in zip(*epochs, strict=True))
    run = Run(
        *job.coefficients,
        job.seed,
        train_loss,
        valid_loss,
        ar,
        tar,
        best_train_loss=round(training.evaluate(trained.model, corpus.train), 6),
        test_loss=round(training.evaluate(trained.model, corpus.test), 6),
        settings=job.settings(),
        machine=machine_facts(),
    )
    return run, trained


def run_all(file: Path) -> None:
    """Do the trainings that the file lacks, each in a process of one thread, and append each to it."""
    runs = load(file)
    jobs = [Job(coefficients, seed) for seed in SEEDS for coefficients in PENALTIES.values()]
    if any(run.settings != jobs[0].settings() for run in runs):
        raise ValueError(f"{file} has trainings of other settings: remove it, and all are trained anew")
    done = {(run.coefficients, run.seed) for run in runs}
    # Workers are not forked: GNU OpenMP hangs in the forks of a process that has used it.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(train, job) for job in jobs if (job.coefficients, job.seed) not in done]
        try:
            for i, run in enumerate((future.result() for future in as_completed(futures)), start=1):
                report.append(run, file)
                what = f"alpha {run.alpha:g}, beta {run.beta:g}, seed {run.seed}: test perplexity {run.test:.2f}"
                print(f"{i} of {len(futures)}: {what}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    argparse.ArgumentParser(prog="bench.study.run", description=__doc__).parse_args()
    run_all(COMMITTED)
    report.render(COMMITTED)
