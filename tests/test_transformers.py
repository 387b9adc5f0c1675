"""`RegularizedTrainer` with real models: the weights of a `Trainer` that has the penalty written into its loss."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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

transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed: fastreg.transformers did not run"
)

from fastreg import FusedRNNDropout, carry  # noqa: E402
from fastreg.attachment import Attachment  # noqa: E402
from fastreg.transformers import RegularizedTrainer  # noqa: E402
from tests.language_model import assert_other_weights, assert_same_weights, tolerance_of_bfloat16  # noqa: E402

# transformers' own, and those of its imports
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("quick_collections"),
]
transformers.logging.set_verbosity_error()

VOCABULARY, HIDDEN, TIME, EXAMPLES = 11, 8, 7, 24
ALPHA, BETA = 2.0, 3.0
TIMEOUT = 120  # seconds, for processes that import all this anew
Examples = list[dict[str, Tensor]]


class LanguageModel(nn.Module):
    """A model of one's own, which takes no `num_items_in_batch`: its loss is a mean over the batch."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.dropout: nn.Module = nn.Dropout(p)
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        raw, _ = self.lstm(self.embedding(input_ids))
        logits = self.decoder(self.dropout(raw))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), input_ids.flatten()), "logits": logits}


def of_library(name: str, **options: Any) -> Callable[[], Any]:
    """Return a maker of a small language model of transformers."""

    def make() -> Any:
        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2}
        config = getattr(transformers, f"{name}Config")(**(sizes | options))
        return getattr(transformers, f"{name}ForCausalLM")(config)

    make.__name__ = name
    return make


mamba = of_library("Mamba", state_size=4)
mamba2 = of_library("Mamba2", num_heads=4, head_dim=4, n_groups=1, chunk_size=4, state_size=4)
rwkv = of_library("Rwkv", context_length=TIME)
blocks: dict[str, Any] = {"attention_window_size": TIME, "block_types": ["attention", "recurrent"]}
recurrent_gemma = of_library("RecurrentGemma", intermediate_size=HIDDEN, num_attention_heads=2, **blocks)
xlstm = of_library("xLSTM", hidden_size=16, num_heads=2)


PATHS: dict[Callable[[], Any], str] = {
    LanguageModel: "lstm",
    mamba: "backbone.layers.1",
    mamba2: "backbone.layers.1",
    rwkv: "rwkv.blocks.1",
    recurrent_gemma: "model.layers.1",
    xlstm: "backbone.blocks.1",
}


INSIDE = "backbone.layers.1.mixer"  # of mamba
IN_PARTS: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}


class Formula(transformers.Trainer):
    """Adds the penalty in `compute_loss`, and keeps the loss without it and the terms: one batch an optimizer step."""

    def __init__(self, *args: Any, rnn: str, dropout: str | None = None, valid: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.layers = [[self.model.get_submodule(path) for path in (rnn, dropout or rnn)]]
        self.valid, self.terms, self.losses = valid, [], []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        outputs: dict[nn.Module, Any] = {}
        with ExitStack() as hooks:
            for module in {module for layer in self.layers for module in layer}:
                hooks.enter_context(module.register_forward_hook(lambda module, _, got: outputs.update({module: got})))
            mask = None if self.valid is None else self.valid(inputs)
            loss = super().compute_loss(model, inputs, *args, **options)
        self.losses.append(loss.detach())
        for layer in self.layers:
            raw, dropped = [(x[0] if isinstance(x, tuple) else x).float() for x in map(outputs.get, layer)]
            mask = torch.ones(raw.shape[:2], dtype=torch.bool) if mask is None else mask
            ar, tar = dropped[mask].pow(2).mean(), raw.diff(dim=1)[self.pairs_of(inputs, mask)].pow(2).mean()
            self.terms.append(torch.stack([ar, tar]).detach())
            loss = loss + ALPHA * ar + BETA * tar
        return loss

    def pairs_of(self, inputs: Any, mask: Tensor) -> Tensor:
        """The changes that count, `(batch, time - 1)`."""
        return mask[:, 1:] & mask[:, :-1]


def labelled(batch: Any) -> Tensor:
    return batch["labels"] != -100


def examples(count: int = EXAMPLES) -> Examples:
    """Make sequences of different lengths, padded on the left to one length."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (count, TIME), generator=random)
    starts = torch.randint(TIME - 1, (count, 1), generator=random)
    mask = (torch.arange(TIME) >= starts).long()
    labels = ids.masked_fill(mask == 0, -100)
    return [
        {"input_ids": a, "attention_mask": b, "labels": c} for a, b, c in zip(ids * mask, mask, labels, strict=True)
    ]


def arguments_in(folder: str, **options: Any) -> Any:
    """Make `TrainingArguments` of plain gradient descent without extras."""
    plain: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    plain |= {"num_train_epochs": 1, "per_device_train_batch_size": 12, "logging_steps": 1, "save_strategy": "no"}
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return transformers.TrainingArguments(folder, **(plain | quiet | options))


@pytest.fixture
def arguments(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a maker of `TrainingArguments`, which in some releases change the environment for later ones."""
    with mock.patch.dict(os.environ):
        yield partial(arguments_in, str(tmp_path))


def made(make: Callable[[], Any]) -> Any:
    """Make a model from one seed."""
    torch.manual_seed(3)
    return make()


def trainer_of(make: Callable[[], Any], args: Any, kind: Any = RegularizedTrainer, **options: Any) -> Any:
    """Make a trainer of a model from its seed; the regularized ones and the formula get their own arguments."""
    if issubclass(kind, RegularizedTrainer):
        options = {"alpha": ALPHA, "beta": BETA} | options
    if issubclass(kind, (RegularizedTrainer, Formula)):
        options = {"rnn": PATHS.get(make)} | options
    if issubclass(kind, Formula):
        options = {"valid": labelled} | options
    return kind(**({"model": made(make), "args": args, "train_dataset": examples()} | options))


def fit(*args: Any, **options: Any) -> Any:
    """Train, and return the trainer."""
    trainer = trainer_of(*args, **options)
    trainer.train()
    assert not hooks_of(trainer)
    return trainer


def hooks_of(trainer: Any) -> list[Any]:
    modules = trainer.model.modules()
    hooks = [hook for x in modules for hook in (*x._forward_hooks.values(), *x._forward_pre_hooks.values())]
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), Attachment)]


def assert_same(trainer: Any, other: Any, **tolerance: float) -> None:
    assert_same_weights(trainer.model, other.model, **tolerance)


def assert_different(trainer: Any, other: Any) -> None:
    assert_other_weights(trainer.model, other.model)


@pytest.mark.parametrize("make", PATHS, ids=lambda make: make.__name__)
def test_the_formula_written_out_gives_the_same_weights(make: Callable[[], Any], arguments: Any) -> None:
    masked = {"valid": labelled} if make is xlstm else {}  # whose forward has no attention_mask, so it is left out
    trainer, written_out = fit(make, arguments(), **masked), fit(make, arguments(), Formula)
    assert_same(trainer, written_out)
    assert_different(trainer, fit(make, arguments(), transformers.Trainer))
    assert_different(trainer, fit(make, arguments(), valid=None))  # counts the padding


def test_coefficients_of_zero_change_nothing(arguments: Any, formed: list[Any]) -> None:
    args = arguments(**IN_PARTS, max_grad_norm=1.0)
    trainer, stock = fit(mamba, args, alpha=0.0, beta=0.0), fit(mamba, args, transformers.Trainer)
    assert_same(trainer, stock, rtol=0, atol=0)
    assert trainer.model.state_dict().keys() == stock.model.state_dict().keys()
    assert trainer.state.log_history[0]["ar"] > 0
    assert {call[2:4] for call in formed} == {(0.0, 0.0)}  # numbers, so that no term has a gradient


def per_item(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Compute the loss as users of `compute_loss_func` do: divided by the tokens of all batches of the step."""
    total = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize(
    ("make", "loss", "count", "masked"),
    [
        (mamba2, None, 24, True),
        (recurrent_gemma, None, 19, True),
        (LanguageModel, per_item, 19, True),
        (LanguageModel, per_item, 22, False),  # whose batches count by their examples
        (LanguageModel, None, 20, True),  # whose own loss wants batches of one size
    ],
    ids=["equal batches", "rest of another size", "loss of the caller", "no mask", "loss of each batch"],
)
def test_accumulation_changes_nothing(
    make: Callable[[], Any], loss: Any, count: int, masked: bool, arguments: Any
) -> None:
    accepts = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(made(make).forward).parameters.values())
    assert accepts == (make is not LanguageModel)
    data = [x if masked else {"input_ids": x["input_ids"], "labels": x["labels"]} for x in examples(count)]
    options = {"train_dataset": data, "compute_loss_func": loss}
    whole = fit(make, arguments(), **options)
    assert_same(fit(make, arguments(**IN_PARTS), **options), whole)
    assert_same(fit(make, arguments(), Formula, valid=labelled if masked else None, **options), whole)


@pytest.mark.parametrize("valid", [labelled, None], ids=["valid", "no valid"])
def test_starts_are_left_out_of_shares(valid: Any, arguments: Any) -> None:
    """The pairs of neighbours that a batch is weighted by are those of its own segments."""

    def starts(batch: Any) -> Tensor:
        return batch["input_ids"] % 3 == 0

    class Segments(Formula):
        def pairs_of(self, inputs: Any, mask: Tensor) -> Tensor:
            return super().pairs_of(inputs, mask) & ~starts(inputs)[:, 1:]

    whole = fit(mamba2, arguments(), valid=valid, starts=starts)
    assert_same(fit(mamba2, arguments(**IN_PARTS), valid=valid, starts=starts), whole)
    assert_same(fit(mamba2, arguments(), Segments, valid=valid), whole)


def in_a_process(rank: int, folder: str) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """Train on half of each batch, together with the other process, and return the weights and the first logs."""
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(place, WORLD_SIZE="2")
    options: Any = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=TIMEOUT / 2)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", **options)
    trainers = []
    for size, steps in (6, 1), (2, 3):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainers.append(fit(mamba2, arguments_in(folder, ddp_backend="gloo", **options)))
    return [(dict(trainer.model.state_dict()), trainer.state.log_history[0]) for trainer in trainers]


def test_processes_change_nothing(arguments: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports all this once, for both
    with context.Pool(1) as first, context.Pool(1) as second:
        calls = [pool.apply_async(in_a_process, (rank, str(tmp_path))) for rank, pool in enumerate((first, second))]
        whole = fit(mamba2, arguments())
        want = whole.state.log_history[0]
        for state, log in [result for call in calls for result in call.get(TIMEOUT)]:
            torch.testing.assert_close(state, dict(whole.model.state_dict()), rtol=1e-4, atol=1e-6)
            assert (log["ar"], log["tar"]) == pytest.approx((want["ar"], want["tar"]))


def test_logs(arguments: Any) -> None:
    written_out = fit(mamba2, arguments(num_train_epochs=2), Formula)
    terms = torch.stack(written_out.terms)
    often: dict[str, Any] = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 5}
    for options in {}, IN_PARTS:
        trainer = fit(mamba2, arguments(**often, **options), eval_dataset=examples(5))
        logged = [x for x in trainer.state.log_history if "loss" in x]
        assert [x for x in trainer.state.log_history if "ar" in x] == logged
        got = torch.tensor([[x["ar"], x["tar"]] for x in logged])
        torch.testing.assert_close(got, torch.stack([terms[:2].mean(0), terms[2:].mean(0)]))
        losses = torch.stack(written_out.losses).view(2, 2).mean(1)
        assert [x["loss"] for x in logged] == pytest.approx(losses.tolist(), abs=1e-4)


def test_evaluation_and_prediction_stay_as_they_are(arguments: Any) -> None:
    trainer, stock = fit(LanguageModel, arguments()), trainer_of(LanguageModel, arguments(), transformers.Trainer)
    stock.model.load_state_dict(trainer.model.state_dict())
    data = examples(5)
    assert trainer.evaluate(data)["eval_loss"] == stock.evaluate(data)["eval_loss"]
    assert (trainer.predict(data).predictions == stock.predict(data).predictions).all()


@pytest.mark.parametrize("rnn", [PATHS[mamba], INSIDE], ids=["the block", "inside"])
def test_gradient_checkpointing(rnn: str, arguments: Any) -> None:
    checkpointed = arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(fit(mamba, checkpointed, rnn=rnn), fit(mamba, arguments(), Formula, rnn=rnn))


def test_bfloat16(arguments: Any) -> None:
    trainer, written_out = fit(mamba, arguments(bf16=True)), fit(mamba, arguments(bf16=True), Formula)
    assert_same(trainer, written_out, **tolerance_of_bfloat16(written_out.model, made(mamba)))


class Cell(nn.Module):
    """Runs over time in code that is compiled, as PyTorch's own RNNs are not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.linear(x).cumsum(1).tanh(), None


class CellModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.lstm: nn.Module = Cell()


def test_a_compiled_model(arguments: Any) -> None:
    torch._dynamo.reset()
    once, twice = (fit(CellModel, arguments(), Formula, rnn="lstm") for _ in range(2))
    twice.train()
    compiled = arguments(torch_compile=True, torch_compile_backend="aot_eager")
    fit(CellModel, compiled, transformers.Trainer)  # whose code for the same modules runs no hooks
    trainer = fit(CellModel, compiled, rnn="lstm")
    assert_same(trainer, once)
    trainer.train()  # attached again
    assert_same(trainer, twice)
    torch._dynamo.reset()


def test_checkpoints(arguments: Any, tmp_path: Path) -> None:
    args = arguments(save_strategy="steps", save_steps=1, **IN_PARTS)
    whole, resumed = fit(mamba, args), trainer_of(mamba, args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(resumed, whole, rtol=0, atol=0)
    stock = transformers.MambaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_same_weights(stock, whole.model, rtol=0, atol=0)


class OwnLoss(transformers.Trainer):
    """Computes a loss of its own, without its base class."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return model(input_ids=inputs["input_ids"])["logits"].sub(1).pow(2).mean()


def test_subclasses_of_trainer_on_either_side(arguments: Any) -> None:
    class Behind(RegularizedTrainer, OwnLoss): ...

    class InFront(OwnLoss, RegularizedTrainer): ...

    class Written(Formula, OwnLoss): ...

    written_out = fit(LanguageModel, arguments(), Written)
    assert_same(fit(LanguageModel, arguments(), Behind), written_out)
    assert_same(fit(LanguageModel, arguments(), InFront), written_out)
    assert_different(fit(LanguageModel, arguments(), OwnLoss), written_out)


def test_models_that_the_trainer_makes(arguments: Any) -> None:
    making: dict[str, Any] = {"model": None, "model_init": lambda: made(mamba)}
    trainer = trainer_of(mamba, arguments(), **making)
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert not hooks_of(trainer)
    assert_different(trainer, fit(mamba, arguments(), transformers.Trainer, **making))


def test_models_that_peft_wraps(arguments: Any) -> None:
    class Wrapper(LanguageModel):
        """Has the model inside, under another path, as `PeftModel` has it."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.base_model = LanguageModel()

        def get_base_model(self) -> nn.Module:
            return self.base_model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            return self.base_model(input_ids, attention_mask, labels)

    trainer = fit(Wrapper, arguments(), rnn="lstm")
    assert_same(trainer, fit(LanguageModel, arguments(), Formula))


class FusedModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = FusedRNNDropout(0.3)


@pytest.mark.parametrize("valid", [labelled, None], ids=["valid", "no valid"])
@pytest.mark.parametrize("make", [lambda: LanguageModel(0.3), FusedModel], ids=["plain", "fused"])
def test_dropout(make: Callable[[], Any], valid: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"rnn": "lstm", "dropout": "dropout", "valid": valid}
    if make is FusedModel:
        monkeypatch.setattr(carry, "penalty_of", None)  # the dropout alone forms terms
    trainer = fit(make, arguments(), **options)
    assert_same(trainer, fit(make, arguments(), Formula, **options))
    if make is FusedModel:
        fit(make, arguments(**IN_PARTS), **options)
        assert (trainer.model.dropout.alpha, trainer.model.dropout.beta) == (0, 0)  # its own, again


def test_several_layers(arguments: Any) -> None:
    class Both(Formula):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.layers += [[self.model.get_submodule(first)] * 2]

    first = "backbone.layers.0"
    assert_same(fit(mamba, arguments(), rnn=[first, PATHS[mamba]]), fit(mamba, arguments(), Both))
    last = fit(mamba, arguments(), rnn=[first, PATHS[mamba]], layers="last")
    assert_same(last, fit(mamba, arguments(), Formula))


def test_a_mask_that_the_trainer_takes_out_is_warned_of(arguments: Any) -> None:
    with pytest.warns(UserWarning, match=r"padding counts in AR and TAR, as the forward of xLSTMForCausalLM takes no"):
        fit(xlstm, arguments())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(xlstm, arguments(), valid=labelled)
        fit(xlstm, arguments(), valid=None)
        fit(LanguageModel, arguments())


def test_modules_in_evaluation_add_nothing(arguments: Any) -> None:
    class Frozen(LanguageModel):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.lstm.eval()
            return self

    trainer = fit(Frozen, arguments(), rnn="lstm")
    assert_same(trainer, fit(LanguageModel, arguments(), transformers.Trainer), rtol=0, atol=0)
    assert all("ar" not in x for x in trainer.state.log_history)


def test_a_schedule_of_the_coefficients(arguments: Any) -> None:
    class Off(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.regularizer.alpha = trainer.regularizer.beta = 0.0

    trainer = trainer_of(mamba, arguments(**IN_PARTS), callbacks=[Off()])
    trainer.train()
    first = fit(mamba, arguments(max_steps=1))
    assert_different(trainer, first)
    assert trainer.regularizer.alpha == 0


def test_the_model_is_left_as_it_was_after_an_error(arguments: Any) -> None:
    class Fails(OwnLoss):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            super().compute_loss(*args, **options)
            raise KeyError("in a step")

    class Regularized(RegularizedTrainer, Fails): ...

    trainer = trainer_of(LanguageModel, arguments(), Regularized)
    with pytest.raises(KeyError, match="in a step"):
        trainer.train()
    assert not hooks_of(trainer)
    assert "backward" not in vars(trainer.accelerator)
    assert trainer.regularizer.alpha == ALPHA


def test_a_step_by_hand(arguments: Any) -> None:
    trainer, written_out = fit(mamba, arguments(**IN_PARTS, max_steps=1)), trainer_of(mamba, arguments(), Formula)
    written_out.model.load_state_dict(trainer.model.state_dict())
    batch = transformers.default_data_collator(examples(12))
    for one in trainer, written_out:
        one.current_gradient_accumulation_steps = 1
        one.training_step(one.model, dict(batch))
    assert not hooks_of(trainer)
    torch.testing.assert_close(*([x.grad for x in one.model.parameters()] for one in (trainer, written_out)))


def test_batches_fetched_in_another_way_count_alike(arguments: Any) -> None:
    class Other(RegularizedTrainer):
        get_batch_samples = transformers.Trainer.get_batch_samples

    trainer = fit(LanguageModel, arguments(**IN_PARTS), Other, valid=None)
    assert_same(trainer, fit(LanguageModel, arguments(), Formula, valid=None))


def test_a_loss_that_never_passes_accelerate_is_refused(arguments: Any) -> None:
    class Own(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    class Regularized(RegularizedTrainer, Own): ...

    with pytest.raises(RuntimeError, match=r"did not go through accelerator\.backward"):
        fit(LanguageModel, arguments(), Regularized)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rnn": "layers.1"}, ValueError, r"rnn: MambaForCausalLM has no .* 'layers\.1'; .*'backbone\.layers\.1'"),
        ({"rnn": 3}, TypeError, "rnn: expected an attribute path, or a list of them, got int"),
        ({"layers": "first"}, ValueError, "layers: expected 'last' or 'all'"),
        ({"alpha": -1.0}, ValueError, "alpha"),
        ({"valid": "attention_mask"}, TypeError, "valid: expected a function of the batch, or None, got str"),
        ({"valid": lambda batch: 3}, TypeError, "valid: expected the function to return a tensor or None, got int"),
        ({"valid": lambda batch: torch.ones(2)}, ValueError, r"valid: expected \(batch, time\), got shape \(2,\)"),
        ({"valid": lambda batch: torch.ones(2, 2).bool()}, ValueError, r"valid: expected shape \(12, 7\)"),
    ],
)
def test_rejects_arguments(options: Any, error: Any, message: str, arguments: Any) -> None:
    with pytest.raises(error, match=message):
        fit(mamba, arguments(), **options)


def test_masks_for_some_batches_of_a_step_are_refused(arguments: Any) -> None:
    calls: list[Any] = []

    def sometimes(batch: Any) -> Tensor | None:
        calls.append(batch)
        return None if len(calls) == 2 else labelled(batch)

    with pytest.raises(ValueError, match=r"valid: expected a mask for each batch .* got 2 for 3 batches"):
        fit(LanguageModel, arguments(**IN_PARTS), valid=sometimes)
