"""The recipes of docs/recipes.md: values and gradients against formulas."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastreg import fused_ar_tar
from tests.conftest import ROOT, skip_without
from tests.project.test_docs import run, snippets

pytestmark = pytest.mark.main

PAGE = ROOT / "docs" / "recipes.md"
Loss = Callable[[Tensor], Tensor]


def recipe(name: str) -> Any:
    """Run the snippet of the page that defines a function, and return the function."""
    (code,) = [snippet for snippet in snippets(PAGE) if f"def {name}(" in snippet]
    return run(code, PAGE)[name]


def check(ours: Loss, theirs: Loss, *shape: int) -> None:
    """Compare the value and the gradient with respect to a random tensor."""
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    got, want = ours(x), theirs(x)
    assert want > 0
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(3 * value, x) for value in (got, want)))


def squares(x: Tensor, valid: Any = None, starts: Any = None, n: int = 1) -> Tensor:
    """Square the differences of order n of (batch, time, ...) whose steps all count, where only the first may start."""
    parts = [(row, slice(t, t + n + 1)) for row in range(len(x)) for t in range(x.shape[1] - n)]
    if valid is not None:
        parts = [(row, steps) for row, steps in parts if valid[row, steps].all()]
    if starts is not None:
        parts = [(row, steps) for row, steps in parts if not starts[row, steps][1:].any()]
    return torch.cat([x[part].diff(n=n, dim=0).square() for part in parts])


PREFIX = torch.arange(9) < torch.tensor([6, 9, 2])[:, None]
DRAWN = torch.rand(3, 12, generator=torch.Generator().manual_seed(4))
VALID, STARTS = DRAWN < 0.7, DRAWN < 0.25


@pytest.mark.parametrize("mask", [None, PREFIX])
def test_reconstruction_and_velocity(mask: Any) -> None:
    """In the loss of DiffPoseTalk a change counts if its second step counts."""
    function, target, counts = recipe("reconstruction_and_velocity"), torch.randn(3, 9, 6), PREFIX | (mask is None)

    def diffposetalk(pred: Tensor) -> Tensor:
        velocity = F.mse_loss(target.diff(dim=1), pred.diff(dim=1), reduction="none")[counts[:, 1:]].mean()
        return 2.0 * F.mse_loss(target, pred, reduction="none")[counts].mean() + 5.0 * velocity

    check(lambda pred: function(pred, target, 2.0, 5.0, mask), diffposetalk, 3, 9, 6)


def test_curvature() -> None:
    function = recipe("curvature")

    def diffposetalk(vertices: Tensor) -> Tensor:
        moves = vertices.diff(dim=1)
        return F.mse_loss(moves[:, 1:], moves[:, :-1], reduction="none")[PREFIX[:, 2:]].mean()

    check(lambda x: function(x.flatten(2), 1.0, valid=PREFIX), diffposetalk, 3, 9, 4, 3)
    check(lambda h: function(h, 6), lambda h: h.diff(n=2, dim=1).square().sum(-1).mean(), 3, 9, 6)
    check(lambda x: function(x, 1.0, VALID, STARTS), lambda x: squares(x, VALID, STARTS, n=2).mean(), 3, 12, 6)


def test_action_smoothness() -> None:
    function = recipe("action_smoothness")
    episodes = STARTS.T.float()
    check(
        lambda x: function(x.transpose(0, 1), episodes, 2.0), lambda x: 2 * squares(x, starts=STARTS).mean(), 3, 12, 5
    )


# By words of a row, for activations that are not (batch, time, features).
SHAPES = {"`(time, batch": (8, 3, 5), "`(channels, ": (4, 9, 7), "`(batch, channels, time, ": (2, 3, 5, 4, 3)}


def rows() -> list[list[str]]:
    """Return the rows of the table: a loss, its formula, and the line of code that computes the same."""
    lines = re.findall(r"^\| (.*fused_ar_tar\(.*`) \|$", PAGE.read_text(), re.MULTILINE)
    assert lines
    return [[cell.strip("`") for cell in line.split(" | ")] for line in lines]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].split(",")[0])
def test_a_line_of_the_table_equals_the_formula(row: list[str]) -> None:
    what, formula, line = row
    shape = next((shape for words, shape in SHAPES.items() if words in what), (3, 9, 6))
    names = {"F": F, "fused_ar_tar": fused_ar_tar, "valid": PREFIX, "w": torch.arange(1.0, 7)}
    check(lambda x: eval(line, names | {"x": x}), lambda x: eval(formula, names | {"x": x}), *shape)


@pytest.mark.parametrize("shape", [(5, 8), (5, 6, 8)], ids=str)
def test_activity_of_modules_by_name(shape: tuple[int, ...]) -> None:
    names = recipe("activity_regularizer").__globals__
    model, gru = torch.nn.Sequential(torch.nn.Linear(8, 7), torch.nn.ReLU()), torch.nn.GRU(7, 4)
    model.append(gru)
    x = torch.randn(shape)
    found = names["activity_regularizer"](model, {"1": 0.5, "2": 2.0})
    loss = model(x)[0].sum()
    plain, hidden = loss.detach(), model[1](model[0](x)).detach()
    for regularizer in found:
        loss = regularizer.on_backward_begin(loss)
    want = plain + 0.5 * hidden.square().mean() + 2.0 * gru(hidden)[0].square().mean()
    torch.testing.assert_close(loss, want)
    with pytest.raises(AttributeError, match="missing"):
        names["activity_regularizer"](model, {"missing": 0.5})


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
def test_hubert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the mask of frames with the model's own, and the logged terms with the formula."""
    skip_without("transformers")
    monkeypatch.chdir(tmp_path)
    names = recipe("frames").__globals__
    model, trainer = names["model"], names["trainer"]
    kept: list[Tensor] = []
    masks: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, options: dict[str, Tensor], output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    def keep_mask(module: torch.nn.Module, args: Any, options: dict[str, Tensor]) -> None:
        masks.append(options["attention_mask"])

    model.get_submodule(names["last"]).register_forward_hook(keep, with_kwargs=True)
    model.register_forward_pre_hook(keep_mask, with_kwargs=True)
    trainer.train()
    assert len(kept) == len(masks) == 2
    for x, samples, entry in zip(kept, masks, trainer.state.log_history[-3:], strict=False):
        mask = names["frames"]({"attention_mask": samples})
        torch.testing.assert_close(mask, model._get_feature_vector_attention_mask(x.shape[1], samples))
        assert 0 < mask.sum() < mask.numel()
        assert entry["ar"] == pytest.approx(x[mask].square().mean().item(), rel=1e-5)
        assert entry["tar"] == pytest.approx(squares(x, mask).mean().item(), rel=1e-5)
    options = {"rnn": "hubert.feature_projection", "valid": names["frames"], "train_dataset": names["data"]}
    projection = names["RegularizedTrainer"](model, names["args"], alpha=1.0, beta=0.0, **options)
    with pytest.raises(RuntimeError, match="modified inplace"):
        projection.train()


@pytest.mark.filterwarnings("ignore")  # of gymnasium
def test_recurrent_ppo() -> None:
    """Compare the gradients of padded minibatches, and the logged terms, with a loss that contains the formula."""
    skip_without("sb3_contrib")
    names = recipe("regularize").__globals__
    options = {"n_steps": 64, "batch_size": 32, "n_epochs": 1, "seed": 1}
    ours, stock = (names["RecurrentPPO"](names["RegularizedPolicy"], "CartPole-v1", **options) for _ in range(2))
    names["regularize"](ours, 2.0, 1.0)
    ours.learn(64)
    stock.policy.load_state_dict(ours.policy.state_dict())
    kept: list[Tensor] = []
    stock.policy.sequence.register_forward_hook(lambda module, args, output: kept.append(output))
    padded = 0
    for data in ours.rollout_buffer.get(32):
        ours.logger.dump()  # which forgets the terms so far
        inputs = data.observations, data.actions.long().flatten(), data.lstm_states, data.episode_starts
        results = [policy.evaluate_actions(*inputs) for policy in (ours.policy, stock.policy)]
        losses = [values.mean() + log_prob.mean() for values, log_prob, _ in results]
        x = kept.pop()
        mask = (data.mask > 1e-8).view(x.shape[:2])
        padded += int((~mask).sum())
        ar, tar = x[mask].square().mean(), squares(x, mask).mean()
        logged = [ours.logger.name_to_value[f"train/{term}"] for term in ("ar", "tar")]
        assert logged == pytest.approx([ar.item(), tar.item()], rel=1e-5)
        losses[1] = losses[1] + 2.0 * ar + 1.0 * tar
        weights = [[*policy.lstm_actor.parameters()] for policy in (ours.policy, stock.policy)]
        torch.testing.assert_close(*map(torch.autograd.grad, losses, weights))
    assert padded
    ours.policy.set_training_mode(False)
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert ours.policy.sequence(x) is x, "no penalty while it collects experience"
