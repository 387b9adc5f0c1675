"""`RegularizedTrainer`: the weights of a `Trainer` whose model has the penalty written into its loss."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import more, skip_without

skip_without("transformers")

import transformers  # noqa: E402

from fastreg.transformers import RegularizedTrainer, collated  # noqa: E402
from tests import language_model as lm  # noqa: E402
from tests.adapters.contract import COEFFICIENTS, DATA, IDS, PATHS, Contract, Net, turned, valid  # noqa: E402
from tests.language_model import ALPHA, BATCH, BETA, assert_same_weights, hooks_of  # noqa: E402

# transformers and its imports warn.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{x}Warning") for x in ("Deprecation", "Future", "User")]
pytestmark.append(pytest.mark.usefixtures("quick_collections"))

IN_PARTS: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
MASKED = [{"input_ids": row, "attention_mask": (row != 3).long(), "labels": row} for row in IDS]


class Masked(Net):
    """Takes all columns of `MASKED`."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids)


@pytest.fixture(autouse=True)
def folder_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a folder, and put the environment back, which `TrainingArguments` of some releases change."""
    transformers.logging.set_verbosity_warning()  # which an example changes
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        yield


def trainer_of(model: Any, kind: Any = RegularizedTrainer, args: Any = None, data: Any = DATA, **options: Any) -> Any:
    """Make a trainer of plain gradient descent without extras; the regularized ones get further arguments."""
    plain: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    plain |= {"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "logging_steps": 1, "save_strategy": "no"}
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    if issubclass(kind, RegularizedTrainer):
        options = COEFFICIENTS | PATHS | options
    made = transformers.TrainingArguments("out", **(plain | quiet | (args or {})))
    return kind(model=model, args=made, train_dataset=data, **options)


def fit(*args: Any, fits: int = 1, **options: Any) -> Any:
    """Train, and return the trainer."""
    trainer = trainer_of(*args, **options)
    for _ in range(fits):
        trainer.train()
    assert hooks_of(trainer.model) == 0
    return trainer


class TestContract(Contract):
    """A `Trainer` computes the mean of the losses of its batches."""

    def train(self, model: Any, options: Any, accumulated: int, fits: int, rounded: bool, cbs: Any) -> dict[str, Any]:
        args = {"gradient_accumulation_steps": accumulated, "logging_strategy": "epoch", "bf16": rounded}
        if options is None:
            return fit(model, transformers.Trainer, args, fits=fits, callbacks=[*cbs]).state.log_history[0]
        return fit(model, args=args, fits=fits, **({"dropout": None} | options)).state.log_history[0]


class Wrapper(Net):
    """Hides a model, as PEFT does."""

    def get_base_model(self) -> nn.Module:
        return nn.ModuleDict({"inside": self.second})


def per_item(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Weight the loss as users of `compute_loss_func` do: by the tokens of all batches of the step."""
    return outputs["loss"] * labels.numel() / num_items_in_batch


IN_ITEMS: dict[str, Any] = {"args": IN_PARTS, "compute_loss_func": per_item}
NAMED: dict[str, Any] = {"rnn": "turned", "dropout": None}
TURNED: Any = Masked(), Masked("turned", masks={"valid": turned(valid)}), {"data": MASKED}
# the two models, the options of both trainers, and the options of the regularized one
CASES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "the attention mask": (Masked(), Masked("rnn", masks={"valid": valid}), {"data": MASKED}, {}),
    "the attention mask of one of two modules": (
        Masked(),
        Masked("rnn", "second", masks={"rnn": {"valid": valid}, "second": {}}),
        {"data": MASKED},
        {"rnn": ["rnn", "second"], "dropout": ["dropout", None], "valid": [True, None]},
    ),
    "the attention mask of a module that is time first": (*TURNED, {"batch_first": False} | NAMED),
    "the attention mask of a module whose axis of time is the third from the end": (*TURNED, {"time_dim": -3} | NAMED),
    "a model that PEFT wraps": (Wrapper(), Net("second"), {}, {"rnn": "inside", "dropout": None}),
    "batch first unless it is said": (Net(), Net("decoder"), {}, {"rnn": "decoder", "dropout": None}),
    "a loss divided by the user": (Masked(), Masked("rnn"), {"data": MASKED} | IN_ITEMS, {"valid": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_the_weights_of_the_formula(case: str) -> None:
    model, formula, options, own = CASES[case]
    for one in (model, formula):
        one.load_state_dict(lm.seeded(Net).state_dict())
    assert_same_weights(fit(model, **options, **own).model, fit(formula, transformers.Trainer, **options).model)


def test_models_that_a_trainer_makes_train_the_weights_of_the_formula_also_if_another_one_gets_them() -> None:
    class Make(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            trainer_of(model)  # which sets the seed

    made = fit(None, model_init=lambda: lm.seeded(Net), callbacks=[Make()])
    formula = fit(None, transformers.Trainer, model_init=lambda: lm.seeded(Net, "rnn"), callbacks=[Make()])
    assert_same_weights(made.model, formula.model)


def test_logs_the_means_of_the_terms_since_the_last_log() -> None:
    """Another process has its own sums of AR, of TAR and of batches."""
    args: dict[str, Any] = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1} | IN_PARTS
    formula = fit(lm.seeded(Net, "rnn"), transformers.Trainer, args, eval_dataset=DATA[:3])
    sums = torch.stack(formula.model.terms).view(3, 2 * BATCH, 2).sum(1)
    trainer, others = trainer_of(lm.seeded(Net), args=args, eval_dataset=DATA[:3]), torch.tensor([6.0, 3.0, 2.0])
    trainer.accelerator.reduce = lambda x, reduction: x + others if reduction == "sum" else None
    trainer.train()
    means = (sums + others[:2]) / (2 * BATCH + others[2])
    logged = [x for x in trainer.state.log_history if "loss" in x]
    assert [x for x in trainer.state.log_history if "ar" in x] == logged
    torch.testing.assert_close(torch.tensor([[x["ar"], x["tar"]] for x in logged]), means)
    losses = torch.tensor([x["loss"] for one in (trainer, formula) for x in one.state.log_history if "loss" in x])
    penalties = sums / (2 * BATCH) @ torch.tensor([ALPHA, BETA])  # which only the loss of the formula contains
    torch.testing.assert_close(losses[:3] + penalties, losses[3:], rtol=0, atol=2e-4)  # they are rounded


class OwnStep(transformers.Trainer):
    """Has a training step that calls no other."""

    def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


def both(*kinds: type) -> type:
    return type("Both", kinds, {})


@pytest.mark.parametrize("kinds", [(RegularizedTrainer, OwnStep), (OwnStep, RegularizedTrainer)])
def test_subclasses_of_trainer_may_stand_on_either_side(kinds: Any) -> None:
    assert_same_weights(fit(lm.seeded(Net), both(*kinds)).model, fit(lm.seeded(Net, "rnn"), OwnStep).model)


class Unread(list[Any]):
    """A dataset that shows no example before the loader asks for a batch, as an example may draw random numbers."""

    def __iter__(self) -> Any:
        raise AssertionError("an example was read")


class Columns(list[Any]):
    """A dataset with columns, as Hugging Face has it. The trainer takes one out before an example is read."""

    column_names = "input_ids", "attention_mask"


@pytest.mark.parametrize(
    ("model", "data", "options", "count"),
    [
        (Net(), Unread(MASKED), {}, 1),
        (Net(), Columns(DATA), {}, 1),
        (Net(), DATA, {}, 0),
        (Net(), MASKED, {"valid": valid}, 0),
        (Masked(), MASKED, {}, 0),
    ],
)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=more)])
def test_a_mask_that_the_trainer_takes_out_and_no_other_is_warned_of_once(
    model: Any, data: Any, options: Any, count: int, workers: int
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(model, args={"max_steps": 3, "dataloader_num_workers": workers}, data=data, **options)
    messages = [str(x.message) for x in seen if "padding counts in AR and TAR" in str(x.message)]
    assert [f"forward of the {type(model).__name__} does not take it" in x for x in messages] == [True] * count


@pytest.mark.parametrize(("examples", "is_masked"), [([DATA[0], MASKED[1]], True), (DATA[:2], False)])
def test_the_mask_of_any_example_of_a_batch_is_noted(examples: Any, is_masked: bool) -> None:
    noted = torch.tensor(False)
    assert collated(len, noted, examples) == 2
    assert noted == is_masked


def test_a_layout_that_a_module_does_not_show_is_asked_for() -> None:
    model = Net()
    model.turned = nn.Sequential(nn.GRU(6, 6))
    with pytest.raises(ValueError, match=r"batch_first: .* may return \(time, batch, hidden\) like the GRU inside"):
        fit(model, rnn="turned", dropout=None)


def test_an_attention_mask_that_does_not_fit_the_module_is_named() -> None:
    """As where a batch has samples, and the layers of the model have frames of them."""
    longer = [{"input_ids": row, "attention_mask": torch.ones(20, dtype=torch.bool)} for row in IDS]
    with pytest.raises(ValueError, match=r"^valid: .* \(3, 20\)\. This is the attention_mask .* pass valid=, a"):
        fit(Masked(), data=longer)
    with pytest.raises(ValueError, match=r"^valid: .* \(3, 20\)$"):
        fit(Masked(), data=longer, valid=lambda batch: batch["attention_mask"])
    with pytest.raises(ValueError, match=r"^starts: .* < lengths\[:, None\]$"):
        fit(Masked(), data=MASKED, starts=lambda batch: batch["input_ids"][:, 0])


def test_an_error_of_the_model_that_names_its_own_mask_gets_no_explanation() -> None:
    class Strict(Masked):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
            raise ValueError("valid: this model takes none")

    with pytest.raises(ValueError, match=r"^valid: this model takes none$"):
        fit(Strict(), data=MASKED)


def test_coefficients_and_the_path_of_an_rnn_are_required() -> None:
    with pytest.raises(TypeError, match=r"missing 3 required keyword-only arguments: 'alpha', 'beta', and 'rnn'$"):
        RegularizedTrainer(Net())  # pyright: ignore[reportCallIssue]


def test_another_base_class_must_not_set_a_coefficient() -> None:
    class OwnBeta(transformers.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.beta = 0.1  # as a DPOTrainer

    with pytest.raises(AttributeError, match=r"^alpha and beta: .* got a Both that sets beta$"):
        trainer_of(Net(), both(RegularizedTrainer, OwnBeta))


def test_an_argument_of_the_base_class_may_have_nearly_the_name_of_one_of_the_adapter() -> None:
    class Own(transformers.Trainer):
        def __init__(self, *args: Any, outputs: str = "", **kwargs: Any) -> None:
            super().__init__(*args, **{x: kwargs[x] for x in ("model", "args", "train_dataset")})
            self.given = outputs

    assert trainer_of(Net(), both(RegularizedTrainer, Own), outputs="here").given == "here"
    for name, base in (("drop_out", Own), ("outputs", transformers.Trainer)):
        with pytest.raises(TypeError, match=f"got an unexpected keyword argument '{name}'$"):
            trainer_of(Net(), both(RegularizedTrainer, base), **{name: "dropout"})
