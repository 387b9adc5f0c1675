"""A training in Lightning that goes on by a step a call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bench.formulas import ALPHA, BETA
from bench.steps import LEARNING_RATE, Activations, Net, forget
from bench.timing import Call
from fastreg.lightning import ActivationRegularization

EPOCH = 100  # steps


class Batches(torch.utils.data.IterableDataset[Tensor]):
    """Hand out a batch when its turn has come, in a thread that trains.

    The training asks for a batch when the step before is done. It has a length, or Lightning would ask ahead.
    """

    def __init__(self, sets: Sequence[tuple[Tensor, ...]]) -> None:
        self.sets = sets
        self.number = 0
        self.begin, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[Any]:
        for _ in range(EPOCH):
            self.done.release()
            self.begin.acquire()
            yield self.sets[self.number % len(self.sets)]

    def step(self, number: int) -> tuple[Tensor, ...]:
        """Let the training make one step, and wait for it."""
        self.number = number
        self.begin.release()
        self.wait()
        return ()

    def wait(self) -> None:
        """Wait until the training asks for a batch; raise the error that it ended with."""
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def train(self, fit: Callable[[Batches], object]) -> None:
        """Train, and leave an error to the thread that waits."""
        try:
            fit(self)
        except BaseException as error:
            self.error = error
        self.done.release()


class Module(pl.LightningModule):
    """Train a model, with the penalty of `terms` written into its step; then AR and TAR are logged once an epoch."""

    def __init__(self, net: Net, terms: Callable[..., tuple[Tensor, ...]] | None) -> None:
        super().__init__()
        self.net, self.terms = net, terms

    def on_train_epoch_start(self) -> None:
        self.sums = torch.zeros(2, device=self.device)

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        if self.terms is None:
            return self.net(batch, forget)
        layers: Activations = []
        loss = self.net(batch, lambda *layer: layers.append(layer))
        penalty, ar, tar = self.terms(*layers[0])
        self.sums += torch.stack([ar, tar]).detach()
        return loss + penalty

    def on_train_epoch_end(self) -> None:
        if self.terms is not None:
            ar, tar = self.sums / EPOCH
            self.log_dict({"ar": ar, "tar": tar})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


def in_turns(
    net: Net,
    terms: Callable[..., tuple[Tensor, ...]] | None,
    sets: Sequence[tuple[Tensor, ...]],
    regularized: bool,
) -> Call:
    """Start a training in a thread of its own; each call lets it make a step.

    Args:
        net: the network in training.
        terms: of raw and dropped the penalty, AR and TAR, to be written into the step.
        sets: the batches.
        regularized: whether fastreg's callback adds the penalty.
    """
    callback = ActivationRegularization(ALPHA, BETA, rnn="net.rnn", dropout="net.dropout") if regularized else None
    silent: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    where = {"accelerator": "gpu" if sets[0][0].is_cuda else "cpu", "devices": 1, "max_epochs": -1}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(callbacks=callback, **silent, **where)
    batches = Batches(sets)

    def fit(dataset: Batches) -> None:
        loader = torch.utils.data.DataLoader(dataset, batch_size=None)
        trainer.fit(Module(net, terms), loader)

    threading.Thread(target=batches.train, args=(fit,), daemon=True).start()
    batches.wait()
    return batches.step
