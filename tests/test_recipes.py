"""The recipes of docs/recipes.md, and of docs/migration.md for a hidden loss: values and gradients against formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastreg import fused_ar_tar
from tests.conftest import skip_without
from tests.test_docs import ROOT, snippets

PAGE = ROOT / "docs" / "recipes.md"
Loss = Callable[..., Tensor]


def recipe(name: str, page: Path = PAGE) -> Any:
    """Run the snippet of a page that defines a function, and return the function."""
    (code,) = [snippet for snippet in snippets(page) if f"def {name}(" in snippet]
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    return names[name]


def check(ours: Loss, theirs: Loss, *shape: int) -> None:
    """Compare the value and the gradient with respect to a random tensor."""
    torch.manual_seed(1)
    x = torch.randn(shape)
    results = []
    for loss in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        results.append((value.detach(), *torch.autograd.grad(3 * value, leaf)))
    assert results[1][0] > 0
    torch.testing.assert_close(results[0], results[1])


def prefix_mask(batch: int, time: int) -> Tensor:
    """Rows that end after some, all and two steps."""
    return torch.arange(time) < torch.tensor([time - 3, time, 2])[:batch, None]


def diffposetalk(pred: Tensor, target: Tensor, w_mse: float, w_velocity: float, mask: Tensor) -> Tensor:
    """`compute_loss` of DiffPoseTalk: a change counts where its second step does."""
    vertices = F.mse_loss(target, pred, reduction="none")[mask].mean()
    moves = [x[:, 1:] - x[:, :-1] for x in (target, pred)]
    return w_mse * vertices + w_velocity * F.mse_loss(*moves, reduction="none")[mask[:, 1:]].mean()


def test_reconstruction_and_velocity() -> None:
    ours, target, mask = recipe("reconstruction_and_velocity"), torch.randn(3, 9, 6), prefix_mask(3, 9)
    for given, counts in ({}, torch.ones_like(mask)), ({"valid": mask}, mask):
        theirs: Loss = lambda pred, counts=counts: diffposetalk(pred, target, 2.0, 5.0, counts)  # noqa: E731
        check(lambda pred, given=given: ours(pred, target, 2.0, 5.0, **given), theirs, 3, 9, 6)


def test_a_mask_of_the_second_step_alone() -> None:
    """A mask that begins late: `valid=mask` leaves out the change into its first step."""
    target, mask = torch.randn(3, 9, 6), torch.arange(9).expand(3, 9) >= torch.tensor([[4], [1], [0]])
    masked, plain = recipe("masked_by_second_step"), recipe("reconstruction_and_velocity")
    theirs: Loss = lambda pred: diffposetalk(pred, target, 2.0, 5.0, mask)  # noqa: E731
    check(lambda pred: masked(pred, target, 2.0, 5.0, mask), theirs, 3, 9, 6)
    with pytest.raises(AssertionError):
        check(lambda pred: plain(pred, target, 2.0, 5.0, valid=mask), theirs, 3, 9, 6)


@pytest.mark.parametrize("mask", [None, (torch.rand(2, 12, generator=torch.manual_seed(0)) > 0.3).float()])
def test_smoothness_of_joints(mask: Tensor | None) -> None:
    def slahmr(joints: Tensor) -> Tensor:
        loss = (joints[:, 1:] - joints[:, :-1]) ** 2
        if mask is not None:
            both = mask.bool()
            loss = loss[both[:, 1:] & both[:, :-1]]
        return 0.5 * loss.sum()

    ours = recipe("smoothness_of_joints")
    check(lambda joints: ours(joints, mask), slahmr, 2, 12, 5, 3)
    if mask is not None:
        with pytest.raises(TypeError, match="valid"):
            fused_ar_tar(torch.randn(2, 12, 3), None, 0.0, 1.0, valid=mask)


def test_total_variation() -> None:
    def nerfstudio(plane: Tensor) -> Tensor:
        _, h, w = plane.shape
        along_w = torch.square(plane[..., :, 1:] - plane[..., :, : w - 1]).mean()
        return torch.square(plane[..., 1:, :] - plane[..., : h - 1, :]).mean() + along_w

    def tensorf(planes: Tensor) -> Tensor:
        batch, _, h, w = planes.shape
        counts = planes[:, :, 1:, :].numel() // batch, planes[:, :, :, 1:].numel() // batch
        along_h = torch.pow(planes[:, :, 1:, :] - planes[:, :, : h - 1, :], 2).sum()
        along_w = torch.pow(planes[:, :, :, 1:] - planes[:, :, :, : w - 1], 2).sum()
        return 2 * (along_h / counts[0] + along_w / counts[1]) / batch

    ours = recipe("total_variation")
    check(ours, nerfstudio, 4, 9, 7)
    check(lambda planes: 2 * ours(planes), tensorf, 2, 4, 9, 7)


def test_world_models() -> None:
    ours = recipe("temporal_similarity")
    check(lambda z: ours(z, 0), lambda z: (z[1:] - z[:-1]).pow(2).mean(), 8, 3, 5)  # eb_jepa
    check(lambda z: ours(z, 2), lambda z: (z[:, :, 1:] - z[:, :, :-1]).pow(2).mean(), 2, 4, 8, 3, 3)  # its videos
    check(lambda z: ours(z, 1), lambda z: F.mse_loss(z[:, :-1], z[:, 1:]), 3, 8, 5)  # stable-worldmodel


def test_second_differences() -> None:
    def k_planes(plane: Tensor) -> Tensor:
        h = plane.shape[-2]
        first = plane[..., 1:, :] - plane[..., : h - 1, :]
        return torch.square(first[..., 1:, :] - first[..., : h - 2, :]).mean()

    ours = recipe("curvature")
    assert "`fused_ar_tar(plane.diff(dim=-2), None, 0.0, 1.0, time_dim=-2)`" in PAGE.read_text()
    check(lambda plane: fused_ar_tar(plane.diff(dim=-2), None, 0.0, 1.0, time_dim=-2), k_planes, 4, 9, 7)
    mask = prefix_mask(3, 9)

    def diffposetalk_smooth(vertices: Tensor) -> Tensor:
        moves = vertices[:, 1:] - vertices[:, :-1]
        return F.mse_loss(moves[:, 1:], moves[:, :-1], reduction="none")[mask[:, 2:]].mean()

    check(lambda vertices: ours(vertices.flatten(2), 1.0, valid=mask), diffposetalk_smooth, 3, 9, 4, 3)
    check(lambda h: ours(h, h.shape[-1]), lambda h: h.diff(n=2, dim=1).square().sum(-1).mean(), 3, 9, 6)  # MotorNet


@pytest.mark.parametrize("valid", [None, torch.rand(4, 15, generator=torch.manual_seed(2)) > 0.2])
def test_second_differences_within_segments(valid: Tensor | None) -> None:
    """Three steps count together where all do, and where the last two are no starts."""
    starts = torch.rand(4, 15, generator=torch.manual_seed(3)) < 0.2

    def by_triples(x: Tensor) -> Tensor:
        triples = [
            x[row, t + 2] - 2 * x[row, t + 1] + x[row, t]
            for row in range(4)
            for t in range(13)
            if not starts[row, t + 1 : t + 3].any() and (valid is None or valid[row, t : t + 3].all())
        ]
        return torch.stack(triples).square().mean()

    check(lambda x: recipe("curvature")(x, 1.0, valid=valid, starts=starts), by_triples, 4, 15, 6)


def test_trajectories_of_torchrl() -> None:
    is_init = torch.rand(3, 12, 1, generator=torch.manual_seed(4)) < 0.25
    ours = recipe("penalty_of_trajectories")

    def by_trajectories(x: Tensor) -> Tensor:
        bounds = [[0, *is_init[row, 1:, 0].nonzero().flatten().add(1).tolist(), 12] for row in range(3)]
        parts = [x[row, a:b] for row in range(3) for a, b in zip(bounds[row], bounds[row][1:], strict=False)]
        changes = torch.cat([part[1:] - part[:-1] for part in parts])
        return 2.0 * x.square().mean() + 0.5 * changes.square().mean()

    check(lambda x: ours({"embed": x, "is_init": is_init}, 2.0, 0.5), by_trajectories, 3, 12, 5)


def test_cells_and_policies_step_by_step() -> None:
    starts = torch.rand(3, 12, generator=torch.manual_seed(5)) < 0.25
    ours = recipe("penalty_of_steps")

    def within_episodes(x: Tensor) -> Tensor:
        changes = (x[:, 1:] - x[:, :-1])[~starts[:, 1:]]
        return 0.5 * x.square().mean() + 2.0 * changes.square().mean()

    check(lambda x: ours(x.unbind(1), 0.5, 2.0, starts), within_episodes, 3, 12, 5)
    check(lambda x: ours(x.unbind(1), 0.0, 2.0), lambda x: 2.0 * x.diff(dim=1).square().mean(), 3, 12, 5)


def terms_of(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """AR and TAR of the steps that a mask, `(sequences, time)`, counts."""
    changes = (x[:, 1:] - x[:, :-1])[mask[:, 1:] & mask[:, :-1]]
    return x[mask].square().mean(), changes.square().mean()


@pytest.mark.filterwarnings("ignore")  # of gymnasium
@pytest.mark.parametrize(
    ("page", "name"),
    [(PAGE, "regularize"), (ROOT / "docs" / "migration.md", "regularize_policy")],
    ids=["mask", "plain"],
)
def test_recurrent_ppo(page: Path, name: str) -> None:
    """The gradients of padded minibatches and the logged terms, beside a loss that contains the formula."""
    skip_without("sb3_contrib")
    names = recipe(name, page).__globals__
    options = {"n_steps": 64, "batch_size": 32, "n_epochs": 1, "seed": 1}
    ours, stock = (names["RecurrentPPO"](names["RegularizedPolicy"], "CartPole-v1", **options) for _ in range(2))
    names[name](ours, 2.0, 1.0)
    ours.learn(64)
    stock.policy.load_state_dict(ours.policy.state_dict())
    kept: list[Tensor] = []
    stock.policy.sequence.register_forward_hook(lambda module, args, output: kept.append(output))
    padded = 0
    for data in ours.rollout_buffer.get(32):
        gradients = []
        ours.logger.dump()  # which forgets the terms so far
        for policy in (ours.policy, stock.policy):
            actions = data.actions.long().flatten()
            inputs = data.observations, actions, data.lstm_states, data.episode_starts
            values, log_prob, _ = policy.evaluate_actions(*inputs)
            loss = values.mean() + log_prob.mean()
            if policy is stock.policy:
                x = kept.pop()
                mask = (data.mask > 1e-8).view(x.shape[:2])
                padded += int((~mask).sum())
                ar, tar = terms_of(x, mask if name == "regularize" else torch.ones_like(mask))
                loss = loss + 2.0 * ar + 1.0 * tar
                logged = [ours.logger.name_to_value[f"train/{term}"] for term in ("ar", "tar")]
                assert logged == pytest.approx([float(ar), float(tar)], rel=1e-5)
            policy.zero_grad()
            loss.backward()
            gradients.append([weight.grad.clone() for weight in policy.lstm_actor.parameters()])
        torch.testing.assert_close(gradients[0], gradients[1])
    assert padded


@pytest.mark.filterwarnings("ignore")  # of gymnasium
def test_recurrent_ppo_adds_no_penalty_where_it_collects_experience() -> None:
    skip_without("sb3_contrib")
    names = recipe("regularize").__globals__
    ppo = names["RecurrentPPO"](names["RegularizedPolicy"], "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, seed=1)
    names["regularize"](ppo, 2.0, 1.0)
    ppo.policy.set_training_mode(False)
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert ppo.policy.sequence(x) is x
