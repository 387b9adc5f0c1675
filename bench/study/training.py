"""Trainings of the demo and the study: a small AWD-LSTM with AR and TAR, until it stops improving."""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bench.measure import machine
from bench.study.awd_lstm import AWDLSTM, Dropouts
from bench.study.corpus import BATCH, BPTT, Corpus, batches, build_corpus, read_text
from fastreg import RNNRegularizer, fused_ar_tar

WORDS = 60_000  # few, so that there is something to regularize
SHOWN = 60  # words of the validation text for which a training returns the activations
LAYERS, EMBEDDING, HIDDEN = 2, 96, 128  # small enough for two cores
DROPOUTS = Dropouts(word_p=0.02, input_p=0.1, weight_p=0.2, hidden_p=0.1, output_p=0.1)
LEARNING_RATE = 5e-3
CLIP = 0.25
PATIENCE = 3  # epochs without a lower validation loss, before the learning rate is divided
DIVISOR, DIVISIONS = 4, 2
EPOCHS = 80  # at most


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

    def penalty(self) -> float:
        """Return the penalty of the best epoch in percent of the loss of the training text after it."""
        best = self.valid_loss.index(min(self.valid_loss))
        return 100 * (self.alpha * self.ar[best] + self.beta * self.tar[best]) / self.best_train_loss


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
        digest = hashlib.sha256(read_text(self.text).encode()).hexdigest()[:12]
        facts = {"text": digest, "words": WORDS, "epochs": self.epochs, "batch": BATCH, "bptt": BPTT}
        model = {"layers": LAYERS, "embedding": EMBEDDING, "hidden": HIDDEN}
        optimizer = {"Adam lr": LEARNING_RATE, "clip": CLIP}
        schedule = {"patience": PATIENCE, "divisor": DIVISOR, "divisions": DIVISIONS}
        return facts | model | DROPOUTS._asdict() | optimizer | schedule


class Training:
    """A model in training; `seed` sets torch's global generator, so train one model after the other."""

    def __init__(self, corpus: Corpus, alpha: float, beta: float, seed: int):
        torch.manual_seed(seed)
        self.corpus = corpus
        self.draw = random.Random(seed)
        self.model = AWDLSTM(corpus.vocabulary, EMBEDDING, HIDDEN, LAYERS, DROPOUTS).to(corpus.train.device)
        # without this the layers first saturate to express the word frequencies, and recover slowly
        self.model.decoder.bias.data.copy_(corpus.log_frequencies())
        self.optimizer = Adam(self.model.parameters(), LEARNING_RATE)
        self.regularizer = RNNRegularizer(alpha, beta, bptt=BPTT)

    def epoch(self) -> Tensor:
        """Train on the whole text once; return loss without penalties, AR and TAR of each step, `(steps, 3)`."""
        self.model.train()
        self.regularizer.on_epoch_begin(self.model)
        return torch.stack([self.step(*batch) for batch in batches(self.corpus.train, self.length)]).cpu()

    def length(self) -> int:
        """Draw a number of time steps, as AWD-LSTM varies it."""
        return max(5, int(self.draw.gauss(BPTT if self.draw.random() < 0.95 else BPTT / 2, 5)))

    def step(self, ids: Tensor, following: Tensor) -> Tensor:
        """Train on words and the words that follow them; return the loss without the penalties, AR and TAR."""
        output = self.model(ids)
        decoded = self.regularizer.on_loss_begin(output)
        loss = F.cross_entropy(decoded.flatten(0, 1), following.flatten())
        self.optimizer.zero_grad()
        self.regularizer.on_backward_begin(loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        with self.regularizer.scaled_lr(self.optimizer, ids.shape[1]):  # a short sequence deserves a smaller step
            self.optimizer.step()
        _, raw, dropped = output
        # The regularizer does not compute a term whose coefficient is 0.
        _, ar, tar = fused_ar_tar(raw.detach(), dropped.detach(), 1, 1, return_terms=True)
        return torch.stack([loss.detach(), ar, tar])


@torch.no_grad()
def evaluate(model: AWDLSTM, rows: Tensor) -> float:
    """Compute the mean loss over the words of a text, without dropout."""
    model.eval()
    model.reset()
    total = torch.zeros((), device=rows.device)
    for ids, following in batches(rows, lambda: BPTT):
        decoded, _, _ = model(ids)
        total += F.cross_entropy(decoded.flatten(0, 1), following.flatten(), reduction="sum")
    return total.item() / (rows.numel() - BATCH)


def train(job: Job) -> tuple[Run, list[Any]]:
    """Train one model until it stops improving.

    Returns:
        The training, and the last layer's output before dropout for SHOWN words, `(batch, time, hidden)`, as lists: a
            tensor would reach the other process by memory that this process owns.
    """
    corpus = build_corpus(read_text(job.text), WORDS, torch.device(job.device))
    trained = Training(corpus, *job.coefficients, job.seed)
    # PAGE in report.py describes this schedule; the division after the last one ends the training.
    schedule = ReduceLROnPlateau(trained.optimizer, factor=1 / DIVISOR, patience=PATIENCE - 1, threshold=0)
    epochs: list[tuple[float, ...]] = []
    weights: dict[str, Tensor] = {}
    while len(epochs) < job.epochs and schedule.get_last_lr()[0] > LEARNING_RATE / DIVISOR ** (DIVISIONS + 1):
        epochs.append((*trained.epoch().mean(0).tolist(), evaluate(trained.model, corpus.valid)))
        if epochs[-1][-1] < schedule.best:
            weights = copy.deepcopy(trained.model.state_dict())
        schedule.step(epochs[-1][-1])
    trained.model.load_state_dict(weights)
    train_loss, ar, tar, valid_loss = ([round(x, 6) for x in column] for column in zip(*epochs, strict=True))
    best, test = (round(evaluate(trained.model, text), 6) for text in (corpus.train, corpus.test))
    # Trainings of the study are on the processor, even if there is a GPU.
    facts = machine.facts() | {"device": machine.processor_name(), "source": machine.source()}
    facts |= {"commit": machine.commit_name(machine.commit_facts())}
    run = Run(*job.coefficients, job.seed, train_loss, valid_loss, ar, tar, best, test, job.settings(), facts)
    trained.model.reset()
    with torch.no_grad():
        return run, trained.model(corpus.valid[:, :SHOWN])[1].tolist()


def train_all(jobs: Iterable[Job]) -> Iterator[tuple[Run, list[Any]]]:
    """Train each model in a process of one thread. Workers are not forked: GNU OpenMP hangs in a fork after its use."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(train, jobs)
