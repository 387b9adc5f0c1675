"""Epochs of Lightning, Transformers and fastai, by each way of adding AR and TAR: `pytest bench/test_trainer.py`.

A turn is an epoch of 40 steps, from the first step to the end of the epoch, without the set-up of the fit. Lightning
and Transformers train an LSTM with an elementwise dropout, and fastai its own AWD-LSTM. Before a way is timed, the
weights that it trains are compared with those by the formula.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.conftest import in_turns, name
from bench.measure import before, figures, formulas, nets, timing
from bench.measure.formulas import ALPHA, BETA
from bench.measure.nets import Activations
from bench.measure.timing import DEVICE
from bench.test_step import LEARNING_RATE, STEP_THREADS, WITHOUT

pytestmark = in_turns
Measure = Callable[..., None]
Shape = tuple[int, int, int]  # of raw, (batch, time, hidden)
Context = AbstractContextManager[Any]
SHAPES = [(8, 40, 64), (16, 70, 200)]
STEPS, CHECKED = 40, 4  # of an epoch that is timed, and of one that is checked
ERROR = 1e-4 if DEVICE == "cpu" else 2e-2  # of the change that the penalty makes to weights; GPUs compute in TF32
ACCELERATOR = "gpu" if DEVICE == "cuda" else "cpu"


class Way(NamedTuple):
    """A way of adding the penalty in a trainer."""

    penalty: Callable[..., Tensor] | None = None  # in the loss, by hand; in fastai the formula is its own callback's
    adapter: Any = None  # the package whose adapter adds it
    fused: bool = False  # whether the adapter also replaces the dropout


FORMULA = {WITHOUT: Way(), "eager": Way(formulas.fastai)}
CALLED = FORMULA | before.both(lambda of: {"fused_ar_tar": Way(of.fused_ar_tar), "adapter": Way(adapter=of)})
FUSED = before.both(lambda of: {"adapter": Way(adapter=of), "adapter with fused dropout": Way(adapter=of, fused=True)})
WAYS = {"Lightning": CALLED, "Transformers": CALLED, "fastai": FORMULA | FUSED}  # the ways that are compared


class Model(nn.Module):
    """A language model that returns its loss without the penalty, and the activations."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nets.LSTM(hidden, partial(nn.Dropout, nets.P))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        layers: Activations = []
        loss = self.net((input_ids,), lambda *layer: layers.append(layer))
        return {"loss": loss, "raw": layers[0][0], "dropped": layers[0][1]}


PATHS = {"rnn": "net.rnn", "dropout": "net.dropout"}


def with_penalty(output: dict[str, Tensor], way: Way) -> Tensor:
    """Return the loss with the penalty of a way by hand."""
    loss, raw, dropped = output.values()
    return loss + way.penalty(raw, dropped, ALPHA, BETA) if way.penalty else loss


def texts(shape: Shape, steps: int) -> Tensor:
    """Return the ids of words of an epoch, a row for each sequence."""
    return torch.randint(nets.LSTM.words, (steps * shape[0], shape[1] + 1))


class Training(NamedTuple):
    """A model, and a function that trains it for an epoch: inside a context, but for the set-up."""

    model: nn.Module
    epoch: Callable[[Context], object]


def span(base: Any, begin: str, end: str, context: Context) -> Any:
    """Make a callback that enters a context at one event, and leaves it at another one."""

    def enter(*_: Any, **__: Any) -> None:
        context.__enter__()

    def leave(*_: Any, **__: Any) -> None:
        context.__exit__(None, None, None)

    return type("Span", (base,), {begin: enter, end: leave})()


def lightning(way: Way, shape: Shape, steps: int) -> Training:
    """Train by Lightning, with SGD."""
    import lightning as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = Model(shape[2])
    data: Any = texts(shape, steps)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, ids: Tensor) -> Tensor:
            return with_penalty(self.model(ids), way)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), LEARNING_RATE)

    module = Module()

    def epoch(context: Context) -> None:
        callbacks = [span(pl.Callback, "on_train_start", "on_train_end", context)]
        if way.adapter:
            ours, paths = before.adapter(way.adapter, "lightning"), {x: f"model.{path}" for x, path in PATHS.items()}
            callbacks.append(ours.ActivationRegularization(ALPHA, BETA, **paths))
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
        trainer = pl.Trainer(max_epochs=1, accelerator=ACCELERATOR, devices=1, callbacks=callbacks, **quiet)
        trainer.fit(module, DataLoader(data, shape[0]))

    return Training(module, epoch)


def transformers(way: Way, shape: Shape, steps: int) -> Training:
    """Train by the Trainer of Transformers, with its AdamW."""
    import transformers as hf

    model, data = Model(shape[2]), [{"input_ids": row} for row in texts(shape, steps)]

    class ByHand(hf.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return with_penalty(model(**inputs), way)

    make: Any = ByHand if way.penalty else hf.Trainer
    if way.adapter:
        make = partial(before.adapter(way.adapter, "transformers").RegularizedTrainer, alpha=ALPHA, beta=BETA, **PATHS)

    def epoch(context: Context) -> None:
        callbacks = [span(hf.TrainerCallback, "on_train_begin", "on_train_end", context)]
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": steps}
            device = {"use_cpu": DEVICE == "cpu", "dataloader_pin_memory": DEVICE == "cuda"}
            sizes = {"num_train_epochs": 1, "per_device_train_batch_size": shape[0]}
            arguments = hf.TrainingArguments(output_dir=folder, **sizes, **device, **quiet)
            trainer = make(model, arguments, train_dataset=data, callbacks=callbacks)
            trainer.remove_callback(hf.PrinterCallback)
            trainer.train()

    return Training(model, epoch)


def fastai(way: Way, shape: Shape, steps: int) -> Training:
    """Train an AWD-LSTM of one layer by fastai, with its Adam; the validation is one batch."""
    from fastai.text import all as fa

    batch, time, hidden = shape
    ids = [torch.randint(nets.LSTM.words, (batch * time * count + 1,)) for count in (steps, 1)]
    data: Any = fa.DataLoaders(
        *(fa.LMDataLoader([x], bs=batch, seq_len=time) for x in ids), device=torch.device(DEVICE)
    )
    data.vocab = [*range(nets.LSTM.words)]
    config = {**fa.awd_lstm_lm_config, "emb_sz": hidden, "n_layers": 1}
    alpha, beta = (ALPHA, BETA) if way.penalty or way.adapter else (0.0, 0.0)
    learn: Any = fa.language_model_learner(data, fa.AWD_LSTM, config=config, pretrained=False, alpha=alpha, beta=beta)
    if way.adapter:
        before.adapter(way.adapter, "fastai").fuse(learn, **{"dropout": True} if way.fused else {})

    def epoch(context: Context) -> None:
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, LEARNING_RATE, cbs=span(fa.Callback, "before_train", "after_train", context))

    return Training(learn.model, epoch)


MAKE = {"Lightning": lightning, "Transformers": transformers, "fastai": fastai}


def made(trainer: str, shape: Shape, way: str, steps: int) -> Training:
    torch.manual_seed(0)
    return MAKE[trainer](WAYS[trainer][way], shape, steps)


@functools.lru_cache(maxsize=2)  # those without the penalty and by the formula
def trained(trainer: str, shape: Shape, way: str) -> Tensor:
    """Return the weights that a way trains from one seed, as one vector."""
    training = made(trainer, shape, way, CHECKED)
    training.epoch(nullcontext())
    return torch.cat([x.detach().flatten() for x in training.model.parameters()]).double()


def check(trainer: str, shape: Shape, way: str) -> None:
    """Compare the change that a way makes to the weights with that by the formula."""
    without, want = (trained(trainer, shape, formula) for formula in FORMULA)
    off = ((trained.__wrapped__(trainer, shape, way) - want).norm() / (want - without).norm()).item()
    assert off < ERROR, f"trains other weights than the formula: off by {off:.1e}"


def case(trainer: str, shape: Shape, way: str) -> Any:
    absent = find_spec(trainer.lower()) is None
    return pytest.param(trainer, shape, way, marks=pytest.mark.skipif(absent, reason=f"{trainer} is not installed"))


CASES = [case(trainer, shape, way) for trainer in WAYS for shape in SHAPES for way in WAYS[trainer]]


@pytest.mark.parametrize(("trainer", "shape", "way"), CASES, ids=name)
@pytest.mark.filterwarnings("ignore")  # the frameworks' own
def test_trainer(measure: Measure, trainer: str, shape: Any) -> None:
    def prepare(way: str) -> Any:
        if way not in FORMULA:
            check(trainer, shape, way)
        training = made(trainer, shape, way, STEPS)

        def turn() -> timing.Turn:
            watch = timing.Watch()
            training.epoch(watch)
            return watch.turn(STEPS)

        return turn, {what: count / STEPS for what, count in figures.counts(training.epoch).items()}

    dropout = "variational" if trainer == "fastai" else "elementwise"
    model = "AWD-LSTM" if trainer == "fastai" else "LSTM"
    about = {"pass": trainer, "model": model, "shape": shape, "dropout": dropout}
    with timing.threads(STEP_THREADS):
        measure(prepare, about, seconds=6.0, own=DEVICE == "cpu")
