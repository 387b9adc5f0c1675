"""Find out whether AR and TAR help: train the demo's AWD-LSTM with neither, each and both, over several seeds.

`python -m bench.study.run` adds each finished training as a line to bench/results/study.jsonl. Trainings that the file
has are not repeated, so an interrupted study continues. Then it renders the page and the plot beside that file. The
whole study takes less than two hours on two cores.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine
from bench.study import report, training
from bench.study.corpus import BATCH, BPTT, build_corpus, read_text
from bench.study.report import COMMITTED, PENALTIES, Run, Study, load, summary

WORDS = 60_000  # few, so that there is something to regularize
EPOCHS = 80  # at most
SEEDS = [*range(1, 9)]


@functools.cache
def digest(text: Path | None) -> str:
    """Identify a text by a digest. The text is read once for all runs."""
    return hashlib.sha256(read_text(text).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Setting:
    """Settings of all trainings of a study; `text` is a file, or `None` for the King James text."""

    text: Path | None
    words: int
    epochs: int

    def facts(self) -> dict[str, Any]:
        """Return the facts that determine a training, beside its coefficients and its seed."""
        facts = {"text": digest(self.text), "words": self.words, "epochs": self.epochs, "batch": BATCH, "bptt": BPTT}
        model = {"layers": training.LAYERS, "embedding": training.EMBEDDING, "hidden": training.HIDDEN}
        optimizer = {"Adam lr": training.LEARNING_RATE, "clip": training.CLIP}
        schedule = {"patience": training.PATIENCE, "divisor": training.DIVISOR, "divisions": training.DIVISIONS}
        return facts | model | training.DROPOUTS._asdict() | optimizer | schedule

    def begins(self, run: Run) -> bool:
        """Return whether a run's first epochs are a training of this setting."""
        return self.epochs <= run.settings["epochs"] and self.facts() | {"epochs": 0} == run.settings | {"epochs": 0}


@dataclass(frozen=True)
class Job:
    """A training to come."""

    setting: Setting
    coefficients: tuple[float, float]
    seed: int
    device: str = "cpu"


def train(job: Job) -> Run:
    return train_model(job)[0]


def train_model(job: Job, told: Callable[..., object] = lambda *_: None) -> tuple[Run, training.Training]:
    """Train one model until it stops improving; return it, too, with the weights of its best epoch.

    After each epoch `told` gets the job, the epoch's number, and its loss, AR, TAR and validation loss.
    """
    setting, (alpha, beta) = job.setting, job.coefficients
    corpus = build_corpus(read_text(setting.text), setting.words, torch.device(job.device))
    trained = training.Training(corpus, alpha, beta, job.seed)
    epochs: list[tuple[float, ...]] = []
    for epoch in range(1, setting.epochs + 1):
        epochs.append((*trained.epoch().mean(0).tolist(), training.evaluate(trained.model, corpus.valid)))
        told(job, epoch, *epochs[-1])
        if trained.stopping.ends(epochs[-1][-1]):
            break
    trained.stopping.restore()
    train_loss, ar, tar, valid_loss = ([round(x, 6) for x in column] for column in zip(*epochs, strict=True))
    run = Run(
        alpha,
        beta,
        job.seed,
        train_loss,
        valid_loss,
        ar,
        tar,
        best_train_loss=round(training.evaluate(trained.model, corpus.train), 6),
        test_loss=round(training.evaluate(trained.model, corpus.test), 6),
        settings=setting.facts(),
        machine=report.machine_facts() | {"commit": machine.commit_name(machine.commit_facts())},
    )
    return run, trained


def missing(study: Study, setting: Setting, seeds: list[int]) -> list[Job]:
    """List the trainings that are missing, seed by seed; raise `ValueError` if the others had another setting."""
    facts = setting.facts()
    for run in study.runs:
        other = [name for name in facts | run.settings if facts.get(name) != run.settings.get(name)]
        if other:
            differ = ", ".join(f"{name} is {run.settings.get(name)} there, {facts.get(name)} now" for name in other)
            raise ValueError(f"the results hold trainings of other settings ({differ}): name another file by --results")
    done = {(run.coefficients, run.seed) for run in study.runs}
    jobs = [Job(setting, coefficients, seed) for seed in seeds for coefficients in PENALTIES.values()]
    return [job for job in jobs if (job.coefficients, job.seed) not in done]


def train_all(jobs: list[Job], file: Path, workers: int) -> None:
    """Train in processes of one thread each, append each result to `file`, and print how much time is left."""
    start = time.monotonic()
    # Workers are not forked: GNU OpenMP hangs in the forks of a process that has used it.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        futures = [pool.submit(train, job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                run = future.result()
                report.append(run, file)
                left = (time.monotonic() - start) / done * (len(jobs) - done)
                print(
                    f"{done:3} of {len(jobs)}: alpha {run.alpha:g}, beta {run.beta:g}, seed {run.seed}: best epoch "
                    f"{run.best_epoch}, test perplexity {run.test:.2f}; about {left / 60:.0f} min left",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(arguments: list[str] | None = None) -> int:
    """Train the missing runs, and render the page."""
    description = "Train with AR, with TAR, with both and without, over seeds."
    parser = argparse.ArgumentParser(prog="bench.study.run", description=description)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="default: %(default)s")
    add("--words", type=int, default=WORDS, help="of the text, the first (default: %(default)s)")
    add("--epochs", type=int, default=EPOCHS, help="passes over the text (default: %(default)s)")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: the King James text)")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, help="trainings at a time (default: a core each, %(default)s)")
    add("--results", type=Path, default=COMMITTED, metavar="FILE", help="JSON lines to add to (default: %(default)s)")
    args = parser.parse_args(arguments)
    setting = Setting(args.text, args.words, args.epochs)
    file: Path = args.results.resolve()
    study = load(file)
    jobs = missing(study, setting, list(dict.fromkeys(args.seeds)))
    print(
        f"{len(study.runs)} trainings are in {file}, {len(jobs)} are to be done, {args.workers} at a time", flush=True
    )
    try:
        train_all(jobs, file, args.workers)
    except KeyboardInterrupt:
        print("bench.study.run: interrupted: what is finished is kept, and the same command goes on from there")
        return 130
    report.render(file)
    study = load(file)
    print(f"\n{summary(study)}\nwrote {file.with_suffix('.md')} and {file.with_suffix('.svg')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
