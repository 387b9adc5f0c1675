"""A training in Lightning that makes one step for each call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bench.measure.formulas import ALPHA, BETA
from bench.measure.nets import Activations, Net, forget, sgd
from bench.measure.timing import Call
from fastreg.lightning import ActivationRegularization

EPOCH = 100  # steps
Terms = Callable[..., tuple[Tensor, ...]]  # computes the penalty, AR and TAR from raw and dropped


class Batches(torch.utils.data.IterableDataset[Any]):
    """Hand out the batches of `todo` to a training that runs in another thread.

    The training asks for a batch when the step before is done. This class has a length, because without one Lightning
    asks for a batch ahead.

    Attributes:
        todo: the batches to come.
        done: an item for each request, or the error that ended the training.
    """

    def __init__(self) -> None:
        self.todo: SimpleQueue[Any] = SimpleQueue()
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[Any]:
        for _ in range(EPOCH):
            self.done.put(None)
            yield self.todo.get()

    def wait(self) -> None:
        """Wait until the training asks for a batch; raise the error that ended it, if one did."""
        if error := self.done.get():
            raise error


class Module(pl.LightningModule):
    """Train a model with the penalty of `terms` in its step, and log AR and TAR once an epoch."""

    def __init__(self, net: Net, terms: Terms | None) -> None:
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
        return sgd(self)


def in_turns(net: Net, terms: Terms | None, sets: Sequence[tuple[Tensor, ...]], regularized: bool) -> Call:
    """Start a training in another thread, and return a function that lets it make one step.

    Args:
        net: the model.
        terms: the penalty of the step, if the step computes it.
        sets: the batches.
        regularized: whether fastreg's callback adds the penalty.
    """
    callback = ActivationRegularization(ALPHA, BETA, rnn="net.rnn", dropout="net.dropout") if regularized else None
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    silent: dict[str, Any] = dict.fromkeys(options, False)
    where = {"accelerator": "gpu" if sets[0][0].is_cuda else "cpu", "devices": 1, "max_epochs": -1}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(callbacks=callback, **silent, **where)
    batches = Batches()

    def train() -> None:
        try:
            trainer.fit(Module(net, terms), torch.utils.data.DataLoader(batches, batch_size=None))
        except BaseException as error:  # the waiting thread raises it
            batches.done.put(error)

    threading.Thread(target=train, daemon=True).start()
    batches.wait()

    def call(i: int) -> tuple[Tensor, ...]:
        batches.todo.put(sets[i % len(sets)])
        batches.wait()
        return ()

    return call
