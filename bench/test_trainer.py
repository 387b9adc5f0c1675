"""Epochs of Lightning, Transformers and fastai, by each way of adding AR and TAR: `pytest bench/test_trainer.py`.

Lightning and Transformers train an LSTM with an elementwise dropout, and fastai its own AWD-LSTM.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.conftest import in_turns, name
from bench.measure import before, figures, formulas, nets, timing
from bench.measure.before import ELEMENTWISE, VARIATIONAL
from bench.measure.formulas import ALPHA, BETA
from bench.measure.results import WITHOUT
from bench.measure.timing import DEVICE
from bench.test_step import LEARNING_RATE, OWN, STEP_THREADS

pytestmark = in_turns
Shape = tuple[int, int, int]  # of raw, (batch, time, hidden)
Context = AbstractContextManager[Any]
Training = tuple[nn.Module, Callable[[Context], object]]  # a model, and a function that trains it inside a context
STEPS = {(8, 40, 64): 200, (16, 70, 200): 40}  # of a timed epoch, by the shape of raw
CHECKED = 4  # steps of an epoch whose weights are compared
ERROR = 1e-4 if DEVICE == "cpu" else 2e-2  # of the change that the penalty makes to weights; GPUs compute in TF32


class Way(NamedTuple):
    """A way of adding the penalty in a trainer."""

    penalty: Callable[..., Tensor] | None = None  # in the loss, by hand; fastai has its own callback for the formula
    adapter: Any = None  # the package whose adapter adds it
    fused: Any = None  # the package whose fused dropout replaces the user's own


FORMULA = {WITHOUT: Way(), "eager": Way(formulas.fastai)}


def of_fastai(package: Any) -> dict[str, Way]:
    return {"adapter": Way(adapter=package), "adapter with fused dropout": Way(adapter=package, fused=package)}


def by_hand(package: Any) -> dict[str, Way]:
    return {"fused_ar_tar": Way(package.fused_ar_tar), **of_fastai(package)}


BY_HAND = FORMULA | {"tight": Way(formulas.tight)} | before.both(by_hand)
WAYS = {"Lightning": BY_HAND, "Transformers": BY_HAND, "fastai": FORMULA | before.both(of_fastai)}


class Model(nn.Module):
    """A language model that returns its loss, with the penalty of a way by hand."""

    def __init__(self, way: Way, hidden: int) -> None:
        super().__init__()
        fused = way.fused and partial(before.fused_dropout, way.fused, ELEMENTWISE, nets.P, 0, 0)
        self.net, self.penalty = nets.LSTM(hidden, fused or OWN[ELEMENTWISE]), way.penalty

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        layers: nets.Activations = []
        loss = self.net((input_ids,), lambda *layer: layers.append(layer))
        return {"loss": loss + self.penalty(*layers[0], ALPHA, BETA) if self.penalty else loss}


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

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(way, shape[2])

        def training_step(self, ids: Tensor) -> Tensor:
            return self.model(ids)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), LEARNING_RATE)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, ids = Module(), torch.randint(nets.LSTM.words, (steps * shape[0], shape[1] + 1))
    data: Any = DataLoader(ids, shape[0])  # pyright: ignore[reportArgumentType]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)

    def epoch(context: Context) -> None:
        callbacks = [span(pl.Callback, "on_train_start", "on_train_end", context)]
        if way.adapter:
            ours = before.adapter(way.adapter, "lightning").ActivationRegularization
            callbacks.append(ours(ALPHA, BETA, rnn="model.net.rnn", dropout="model.net.dropout"))
        device = "gpu" if DEVICE == "cuda" else "cpu"
        trainer = pl.Trainer(max_epochs=1, accelerator=device, devices=1, callbacks=callbacks, **quiet)
        trainer.fit(module, data)

    return module, epoch


def transformers(way: Way, shape: Shape, steps: int) -> Training:
    """Train by the Trainer of Transformers, with its AdamW."""
    import transformers as hf

    make: Any = hf.Trainer
    if way.adapter:
        paths = {"rnn": "net.rnn", "dropout": "net.dropout"}
        make = partial(before.adapter(way.adapter, "transformers").RegularizedTrainer, alpha=ALPHA, beta=BETA, **paths)
    model, ids = Model(way, shape[2]), torch.randint(nets.LSTM.words, (steps * shape[0], shape[1] + 1))
    data = [{"input_ids": row} for row in ids]
    sizes = {"num_train_epochs": 1, "per_device_train_batch_size": shape[0]}
    device = {"use_cpu": DEVICE == "cpu", "dataloader_pin_memory": DEVICE == "cuda"}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": steps}

    def epoch(context: Context) -> None:
        callbacks = [span(hf.TrainerCallback, "on_train_begin", "on_train_end", context)]
        with tempfile.TemporaryDirectory() as folder:
            arguments = hf.TrainingArguments(output_dir=folder, **sizes, **device, **quiet)
            trainer = make(model, arguments, train_dataset=data, callbacks=callbacks)
            trainer.remove_callback(hf.PrinterCallback)
            trainer.train()

    return model, epoch


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

    return learn.model, epoch


MAKE = {"Lightning": lightning, "Transformers": transformers, "fastai": fastai}


def made(trainer: str, shape: Shape, way: Way, steps: int) -> Training:
    torch.manual_seed(0)
    return MAKE[trainer](way, shape, steps)


def trained(trainer: str, shape: Shape, way: Way) -> Tensor:
    """Return the weights that a way trains from one seed, as one vector."""
    model, epoch = made(trainer, shape, way, CHECKED)
    epoch(nullcontext())
    return torch.cat([x.detach().flatten() for x in model.parameters()]).double()


@functools.lru_cache(maxsize=2)
def expected(trainer: str, shape: Shape, fused: Any) -> list[Tensor]:
    """Return the weights without the penalty and by the formula, where a package's dropout draws the masks."""
    return [trained(trainer, shape, way._replace(fused=fused)) for way in FORMULA.values()]


def check(trainer: str, shape: Shape, way: Way) -> None:
    """Compare the change that a way makes to the weights with that by the formula."""
    drawn_by = None if trainer == "fastai" else way.fused  # fastai's fused dropout draws the masks of its own
    without, want = expected(trainer, shape, drawn_by)
    off = ((trained(trainer, shape, way) - want).norm() / (want - without).norm()).item()
    assert off < ERROR, f"trains other weights than the formula: off by {off:.1e}"


CASES = [
    pytest.param(trainer, *rest, marks=pytest.mark.headline)
    for trainer in WAYS
    for rest in product(STEPS, WAYS[trainer])
]


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize(("trainer", "shape", "way"), CASES, ids=name)
def test_trainer(measure: Callable[..., None], trainer: str, shape: Any) -> None:
    if find_spec(trainer.lower()) is None:
        pytest.skip(f"{trainer} is not installed")

    def prepare(way: str) -> Any:
        chosen = WAYS[trainer][way]
        if way not in FORMULA:
            check(trainer, shape, chosen)
        _, epoch = made(trainer, shape, chosen, STEPS[shape])
        found: dict[str, float] = {}

        def turn() -> timing.Turn | None:
            if not found:  # the first call, which is not timed
                found.update({what: count / STEPS[shape] for what, count in figures.counts(epoch).items()})
                return None
            watch = timing.Watch()
            epoch(watch)
            return watch.turn(STEPS[shape])

        return turn, found

    model, dropout = ("AWD-LSTM", VARIATIONAL) if trainer == "fastai" else ("LSTM", ELEMENTWISE)
    about = {"pass": trainer, "model": model, "shape": shape, "dropout": dropout}
    with timing.threads(STEP_THREADS):
        measure(prepare, about, seconds=6.0, own=DEVICE == "cpu")
