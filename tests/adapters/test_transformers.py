"""`RegularizedTrainer` with real models: the weights of a `Trainer` that has the penalty written into its loss."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import more, skip_without

skip_without("transformers")

import transformers  # noqa: E402

from fastreg import fused_ar_tar  # noqa: E402
from fastreg.transformers import RegularizedTrainer  # noqa: E402
from tests import language_model as lm  # noqa: E402
from tests.adapters.contract import COEFFICIENTS, DATA, Net, TrainerContract  # noqa: E402
from tests.language_model import ALPHA, BATCH, BETA, TIME, VOCABULARY, assert_same_weights, hooks_of  # noqa: E402

# transformers and its imports warn.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{x}Warning") for x in ("Deprecation", "Future", "User")]
pytestmark.append(pytest.mark.usefixtures("quick_collections"))

TIMEOUT = 120  # seconds, for processes that import all this anew


def mamba2() -> Any:
    """Make a small Mamba 2; for a Mamba, transformers 4 does not divide the losses of accumulated batches."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4}
    sizes |= {"num_heads": 4, "head_dim": 4, "n_groups": 1, "chunk_size": 4}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes))


LAST = "backbone.layers.1"
IN_PARTS: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}


def labelled(batch: Any) -> Tensor:
    return batch["labels"] != -100


class Formula(transformers.Trainer):
    """Adds the penalty in `compute_loss`, and keeps the loss without it and the terms: one batch an optimizer step."""

    def __init__(self, *args: Any, valid: Any = labelled, **options: Any) -> None:
        super().__init__(*args, **options)
        self.valid, self.terms, self.losses, self.raw = valid, [], [], []
        self.model.get_submodule(LAST).register_forward_hook(lambda _, __, output: self.raw.append(output))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        valid = self.valid and self.valid(inputs)  # a model may take the labels out
        loss = super().compute_loss(model, inputs, *args, **options)
        self.losses.append(loss.detach())
        raw = self.raw.pop()
        penalty, *terms = fused_ar_tar(raw, raw, ALPHA, BETA, valid=valid, return_terms=True)
        self.terms.append(torch.stack(terms))
        return loss + penalty


def examples(count: int = 24) -> list[dict[str, Tensor]]:
    """Make sequences of different lengths, padded on the left to one length."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (count, TIME), generator=random)
    mask = (torch.arange(TIME) >= torch.randint(TIME - 1, (count, 1), generator=random)).long()
    columns = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return [{name: x[i] for name, x in columns.items()} for i in range(count)]


def arguments(**options: Any) -> Any:
    """Make `TrainingArguments` of plain gradient descent without extras."""
    plain: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    plain |= {"num_train_epochs": 1, "per_device_train_batch_size": 12, "logging_steps": 1, "save_strategy": "no"}
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return transformers.TrainingArguments("out", **(plain | quiet | options))


@pytest.fixture(autouse=True)
def folder_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a folder, and put the environment back, which `TrainingArguments` of some releases change."""
    transformers.logging.set_verbosity_warning()  # which an example changes
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        yield


def trainer_of(kind: Any = RegularizedTrainer, args: Any = None, **options: Any) -> Any:
    """Make a trainer of a small Mamba2, always with the same weights; the regularized ones get their own arguments."""
    if issubclass(kind, RegularizedTrainer):
        options = COEFFICIENTS | {"rnn": LAST} | options
    defaults = {"model": lm.seeded(mamba2), "args": args or arguments(), "train_dataset": examples()}
    return kind(**(defaults | options))


def fit(*args: Any, **options: Any) -> Any:
    """Train, and return the trainer."""
    trainer = trainer_of(*args, **options)
    trainer.train()
    assert hooks_of(trainer.model) == 0
    return trainer


def assert_same(trainer: Any, other: Any, **tolerance: float) -> None:
    assert_same_weights(trainer.model, other.model, **tolerance)


def assert_different(trainer: Any, other: Any) -> None:
    lm.assert_other_weights(trainer.model, other.model)


def per_item(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Compute the loss as users of `compute_loss_func` do: divided by the tokens of all batches of the step."""
    total = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


class TestContract(TrainerContract):
    """A `Trainer` computes the mean of the losses of its batches."""

    adapter = partial(RegularizedTrainer, nn.Identity())

    def fit(self, model: Net, options: Any = None, accumulated: int = 1, fits: int = 1) -> dict[str, float]:
        steps: dict[str, Any] = {"gradient_accumulation_steps": accumulated, "logging_strategy": "epoch"}
        kind, given = (transformers.Trainer, {}) if options is None else (RegularizedTrainer, COEFFICIENTS | options)
        args = arguments(per_device_train_batch_size=BATCH, **steps)
        trainer = kind(model=model, args=args, train_dataset=DATA, **given)  # pyright: ignore[reportArgumentType]
        for _ in range(fits):
            trainer.train()
        return trainer.state.log_history[0]


def test_a_path_in_the_model_that_peft_wraps() -> None:
    class Wrapper(Net):
        def get_base_model(self) -> nn.Module:
            return nn.ModuleDict({"inside": self.second})

    model, formula, fit_one = lm.seeded(Wrapper), lm.seeded(partial(Net, "second")), TestContract().fit
    fit_one(model, {"rnn": "inside"})
    fit_one(formula)
    assert_same_weights(model, formula)


@pytest.mark.parametrize(
    ("args", "options"), [({}, {}), (IN_PARTS, {"valid": None, "compute_loss_func": per_item})], ids=["masks", "parts"]
)
def test_trains_the_weights_of_the_formula(args: dict[str, Any], options: dict[str, Any]) -> None:
    written_out = fit(Formula, **options)
    assert_same(fit(args=arguments(**args), **options), written_out)
    assert_different(written_out, fit(transformers.Trainer, compute_loss_func=options.get("compute_loss_func")))


def test_coefficients_of_zero_change_nothing() -> None:
    args, data = arguments(**IN_PARTS, max_grad_norm=1.0), examples(5)
    trainer, stock = fit(args=args, alpha=0.0, beta=0.0), fit(transformers.Trainer, args)
    assert_same(trainer, stock, rtol=0, atol=0)
    assert trainer.model.state_dict().keys() == stock.model.state_dict().keys()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(stock.evaluate(data)["eval_loss"])
    torch.testing.assert_close(*(x.predict(data, ignore_keys=["cache_params"]).predictions for x in (trainer, stock)))
    assert trainer.state.log_history[0]["ar"] > 0


def in_a_process(rank: int, folder: str) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """Train on half of each batch, together with the other process, and return the weights and the first logs."""
    torch.set_num_threads(1)
    os.chdir(folder)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(place, WORLD_SIZE="2")
    options: Any = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=TIMEOUT / 2)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", **options)
    trainers = []
    for size, steps in (6, 1), (2, 3):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainers.append(fit(args=arguments(ddp_backend="gloo", **options), valid=None))
    return [(dict(trainer.model.state_dict()), trainer.state.log_history[0]) for trainer in trainers]


@more
def test_processes_change_nothing(tmp_path: Path, monkeypatch: Any, pytestconfig: Any) -> None:
    whole = fit(valid=None)
    want = whole.state.log_history[0]
    monkeypatch.chdir(pytestconfig.rootpath)  # from where the processes import this
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports all this once, for both
    with context.Pool(1) as first, context.Pool(1) as second:
        calls = [pool.apply_async(in_a_process, (rank, str(tmp_path))) for rank, pool in enumerate((first, second))]
        for state, log in [result for call in calls for result in call.get(TIMEOUT)]:
            torch.testing.assert_close(state, dict(whole.model.state_dict()), rtol=1e-4, atol=1e-6)
            assert (log["ar"], log["tar"]) == pytest.approx((want["ar"], want["tar"]))


def test_logs() -> None:
    written_out = fit(Formula, arguments(num_train_epochs=2), valid=None)
    terms = torch.stack(written_out.terms)
    often: dict[str, Any] = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 5}
    for options in {}, IN_PARTS:
        trainer = fit(args=arguments(**often, **options), valid=None, eval_dataset=examples(5))
        logged = [x for x in trainer.state.log_history if "loss" in x]
        assert [x for x in trainer.state.log_history if "ar" in x] == logged
        got = torch.tensor([[x["ar"], x["tar"]] for x in logged])
        torch.testing.assert_close(got, torch.stack([terms[:2].mean(0), terms[2:].mean(0)]))
        losses = torch.stack(written_out.losses).view(2, 2).mean(1)
        assert [x["loss"] for x in logged] == pytest.approx(losses.tolist(), abs=1e-4)


def test_checkpoints() -> None:
    args = arguments(save_strategy="steps", save_steps=1, **IN_PARTS)
    whole, resumed = fit(args=args), trainer_of(args=args)
    resumed.train(resume_from_checkpoint="out/checkpoint-1")
    assert_same(resumed, whole, rtol=0, atol=0)


class OwnLoss(transformers.Trainer):
    """Computes another loss, without its base class."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return model(input_ids=inputs["input_ids"])["logits"].sub(1).pow(2).mean()


class OwnStep(transformers.Trainer):
    """Has a training step that calls no other."""

    def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


def both(*kinds: type) -> type:
    return type("Both", kinds, {})


@pytest.mark.parametrize("kind", [OwnLoss, OwnStep])
def test_subclasses_of_trainer_on_either_side(kind: Any) -> None:
    written_out = fit(both(Formula, kind))
    assert_same(fit(both(RegularizedTrainer, kind)), written_out)
    assert_same(fit(both(kind, RegularizedTrainer)), written_out)
    assert_different(fit(kind), written_out)


def test_models_that_the_trainer_makes() -> None:
    making: dict[str, Any] = {"model": None, "model_init": lambda: lm.seeded(mamba2)}
    assert_different(fit(**making), fit(transformers.Trainer, **making))


class Unread(list[Any]):
    """A dataset that shows no example before the loader asks for a batch, as an example may draw random numbers."""

    def __init__(self, rows: list[Any], *column_names: str) -> None:
        super().__init__(rows)
        self.column_names = column_names

    def __iter__(self) -> Any:
        raise AssertionError("an example was read")


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(examples())


NO_MASKS = [{"input_ids": x["input_ids"]} for x in examples()]
# The trainer takes the column out of a dataset of Hugging Face before an example is read.
MASKED = [Unread(examples()), Stream(), Unread(NO_MASKS, "input_ids", "attention_mask")]


@pytest.mark.parametrize("data", MASKED)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=more)])
def test_a_mask_that_the_trainer_takes_out_is_warned_of_once(data: Any, workers: int) -> None:
    args = arguments(max_steps=3, dataloader_num_workers=workers)
    with pytest.warns(UserWarning, match="padding counts in AR and TAR, .* forward of the Net does not") as seen:
        fit(args=args, model=Net(), rnn="rnn", train_dataset=data)
    assert sum("padding counts" in str(x.message) for x in seen) == 1


def test_no_mask_is_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model=Net(), rnn="rnn", valid=lambda batch: batch["input_ids"] != 0)
        fit(model=Net(), rnn="rnn", valid=None)
        fit(model=Net(), rnn="rnn", train_dataset=NO_MASKS)
        fit()


@pytest.mark.parametrize("error", [None, KeyError])
def test_a_schedule_of_the_coefficients_and_an_error(error: Any) -> None:
    """The trainer keeps the coefficients that the schedule has set, and leaves nothing behind."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            trainer.alpha = trainer.beta = 0.0
            trainer.compute_loss_func = error and mock.Mock(side_effect=error)

    trainer = trainer_of(args=arguments(**IN_PARTS), callbacks=[Stop()])
    backward = trainer.accelerator.backward
    with pytest.raises(error) if error else nullcontext():
        trainer.train()
    assert hooks_of(trainer.model) == 0
    assert trainer.accelerator.backward == backward
    assert trainer.regularizer.alpha == trainer.regularizer.beta == 0
    assert_different(trainer, fit())


def test_a_loss_that_never_passes_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnStep, "training_step", lambda *_: torch.zeros(()))
    with pytest.raises(RuntimeError, match=r"did not go through accelerator\.backward"):
        fit(both(OwnStep, RegularizedTrainer))


def test_errors_when_it_is_made() -> None:
    class OwnBeta(transformers.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.beta = 0.1  # as a DPOTrainer

    with pytest.raises(ValueError, match="rnn: Mamba2ForCausalLM has no such module at 'lstm'"):
        trainer_of(rnn="lstm")
    with pytest.raises(AttributeError, match="regularizer"):
        trainer_of(both(RegularizedTrainer, OwnBeta))
