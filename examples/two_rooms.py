"""Plan a way through a door with a world model, trained without TAR and with it: `python examples/two_rooms.py`.

A dot moves in two rooms. The wall between them has a door. The world model never sees the position of the dot, only
noisy images of 16 x 16 pixels and the actions. Its encoder maps an image to a latent, a vector of 16 numbers, and its
predictor computes the latent after an action. Both learn from three losses:

- The prediction has to agree with the latents of the following images.
- VICReg's terms keep the numbers of a latent from being constant, and from being copies of each other.
- TAR keeps the latents of neighbouring steps close to each other.

Then the model plans. It gets an image of the goal, tries sequences of actions in its latents, and takes the first
action of the best sequences. A trial succeeds if the dot comes close to the goal within 50 steps. In half of the trials
the goal is in the other room.

A seed takes half a minute on one core, and less with `--steps 200`. One seed proves little: `--seeds 1 2 3` trains with
three, and prints the mean gain.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg import fused_ar_tar

BATCH, TIME, SIZE, LATENT = 32, 17, 16, 16  # sequences, images in a sequence, pixels of a side, numbers of a latent
SPEED, DOOR, NOISE = 0.1, (0.4, 0.6), 0.1  # longest way in a step, ends of the door, deviation of a pixel's noise
AHEAD = 4  # steps that the predictor learns to look ahead
HORIZON, CANDIDATES, BEST, ROUNDS = 12, 64, 8, 2  # planner: steps, sequences that it tries, and keeps, and how often
TRIALS, LIMIT, CLOSE = 200, 50, 0.08  # a trial succeeds if the dot is closer to the goal than CLOSE within LIMIT steps


class Weights(NamedTuple):
    """The weights of the losses beside the prediction, whose weight is 1."""

    variance: float
    covariance: float
    beta: float


SETTINGS = {  # the best of a grid: the first two have the weights that are best with TAR
    "without TAR": Weights(1.0, 0.3, 0.0),
    "with TAR": Weights(1.0, 0.3, 10.0),
    "without TAR, weights tuned without it": Weights(0.03, 3.0, 0.0),
}


def move(position: Tensor, action: Tensor) -> Tensor:
    """Return the positions after an action, from 0 to 1. The wall, at x = 0.5, stops a dot beside the door."""
    (x, y), (new_x, new_y) = position.unbind(-1), (position + action).clamp(0.02, 0.98).unbind(-1)
    crosses = (x < 0.5) != (new_x < 0.5)
    height = y + (0.5 - x) / torch.where(crosses, new_x - x, 1.0) * (new_y - y)  # where the path meets the wall
    stopped = crosses & ((height <= DOOR[0]) | (height >= DOOR[1]))
    return torch.stack([torch.where(stopped, torch.where(x < 0.5, 0.49, 0.51), new_x), new_y], -1)


def walks(count: int) -> tuple[Tensor, Tensor]:
    """Return positions `(count, TIME, 2)` of random walks, and the actions between them, in units of SPEED."""
    angles = torch.rand(count, 1) * 2 * math.pi + 0.5 * torch.randn(count, TIME - 1).cumsum(1)
    actions = torch.stack([angles.cos(), angles.sin()], -1) * torch.rand(count, TIME - 1, 1).sqrt()
    positions = [torch.rand(count, 2)]
    for action in actions.unbind(1):
        positions.append(move(positions[-1], SPEED * action))
    return torch.stack(positions, 1), actions


def flights(count: int, steps: int) -> Tensor:
    """Return positions `(count, steps, 2)` of dots that no action moves: they fly straight, and bounce off borders."""
    start, velocity = 2 * torch.rand(count, 1, 2), 0.8 * (torch.rand(count, 1, 2) - 0.5)
    return 1 - ((start + velocity * torch.arange(steps).view(-1, 1)) % 2 - 1).abs()


def images(position: Tensor, distractor: Tensor | None = None, noise: float = NOISE) -> Tensor:
    """Return noisy images of the dot, flattened. A distractor has the same shape, and is a little fainter."""

    def dot(position: Tensor) -> Tensor:
        near = (-((torch.linspace(0, 1, SIZE) - position.unsqueeze(-1)).mul(SIZE / 2).square())).exp()
        return (near[..., 0, :, None] * near[..., 1, None, :]).flatten(-2)

    clean = dot(position) if distractor is None else dot(position) + 0.7 * dot(distractor)
    return clean + noise * torch.randn_like(clean)


class WorldModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Linear(SIZE * SIZE, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, LATENT))
        )
        self.predictor = nn.Sequential(
            *(nn.Linear(LATENT + 2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, LATENT))
        )

    def step(self, latent: Tensor, action: Tensor) -> Tensor:
        """Predict the latent after an action."""
        return latent + self.predictor(torch.cat([latent, action], -1))


def prediction(model: WorldModel, latents: Tensor, actions: Tensor) -> Tensor:
    """Compute the error of the predictions of 1 to AHEAD steps, from every step of `(batch, time, latent)`."""
    predicted, errors = latents, []
    for ahead in range(1, AHEAD + 1):
        predicted = model.step(predicted[:, :-1], actions[:, ahead - 1 :])
        errors.append(F.mse_loss(predicted, latents[:, ahead:]))
    return torch.stack(errors).mean()


def vicreg(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Compute VICReg's terms: deviations below 1, and covariances of different numbers of the latents."""
    covariance = latents.flatten(0, 1).T.cov()
    variances = covariance.diagonal()
    return F.relu(1 - (variances + 1e-4).sqrt()).mean(), (covariance - variances.diag()).square().sum() / LATENT


def train(
    weights: Weights, seed: int, steps: int, distractor: bool, told: Callable[[float, str], object] = lambda *_: None
) -> WorldModel:
    """Train a model. With one seed, all weights get the same first parameters, walks and noise."""
    torch.manual_seed(seed)
    model = WorldModel()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    positions, actions = (x.split(BATCH) for x in walks(steps * BATCH))
    others = flights(steps * BATCH, TIME).split(BATCH) if distractor else [None] * steps
    for step in range(steps):
        latents = model.encoder(images(positions[step], others[step]))
        variance, covariance = vicreg(latents)
        loss = prediction(model, latents, actions[step])
        loss = loss + weights.variance * variance + weights.covariance * covariance
        # AR is measured, but its coefficient is 0.
        terms = fused_ar_tar(latents, latents, 0.0, weights.beta, return_terms=True)
        optimizer.zero_grad()
        (loss + terms.penalty).backward()
        optimizer.step()
        scheduler.step()
        if step % max(steps // 20, 1) == 0 or step == steps - 1:
            told((step + 1) / steps, f"loss {loss:.3f}, ar {terms.ar:.3f}, tar {terms.tar:.4f}")
    return model


@torch.no_grad()
def plan(model: WorldModel, now: Tensor, goal: Tensor, actions: Tensor) -> Tensor:
    """Improve sequences of actions `(trials, HORIZON, 2)`, by the distances of the latents on their way from the goal.

    This is the cross-entropy method: draw candidates around the sequence, and take the mean of the best.
    """
    for deviation in torch.linspace(0.6, 0.4, ROUNDS):
        candidates = actions[:, None] + deviation * torch.randn(len(actions), CANDIDATES, HORIZON, 2)
        candidates[:, 0] = actions
        candidates = candidates / candidates.norm(dim=-1, keepdim=True).clamp(min=1)
        latents, cost = now[:, None].expand(-1, CANDIDATES, -1), torch.zeros(len(actions), CANDIDATES)
        for action in candidates.unbind(2):
            latents = model.step(latents, action)
            cost += (latents - goal[:, None]).square().sum(-1)
        best = cost.topk(BEST, largest=False).indices
        actions = candidates[torch.arange(len(best))[:, None], best].mean(1)
    return actions


@torch.no_grad()
def success(model: WorldModel, distractor: bool) -> tuple[float, float]:
    """Return the shares of trials that succeed where the goal is in the same room, and in the other room."""
    position, goal = torch.rand(2, TRIALS, 2).unbind()
    position[:, 0] /= 2
    goal[:, 0] /= 2
    away = torch.arange(TRIALS) % 2 == 1
    goal[away, 0] += 0.5
    others = flights(TRIALS, LIMIT + 1) if distractor else None
    wanted = model.encoder(images(goal, None if others is None else others[:, LIMIT]))
    actions, left = torch.zeros(TRIALS, HORIZON, 2), torch.arange(TRIALS)
    for step in range(LIMIT):
        now = model.encoder(images(position, None if others is None else others[:, step]))
        planned = plan(model, now[left], wanted[left], actions[left])
        position[left] = move(position[left], SPEED * planned[:, 0])
        actions[left] = F.pad(planned[:, 1:], (0, 0, 0, 1))
        left = left[(position[left] - goal[left]).norm(dim=-1) >= CLOSE]
    done = torch.ones(TRIALS).index_fill(0, left, 0.0)
    return done[~away].mean().item(), done[away].mean().item()


@torch.no_grad()
def plot(models: dict[str, WorldModel], file: str) -> None:
    """Draw how far the latent of each position is from the latent of a goal: the planner makes this distance small."""
    from matplotlib.figure import Figure

    places = torch.linspace(0.02, 0.98, 49)
    positions, goal = torch.cartesian_prod(places, places), torch.tensor([[0.8, 0.2]])
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    for axes, (name, model) in zip(figure.subplots(1, len(models), sharey=True), models.items(), strict=True):
        latents, wanted = (model.encoder(images(position, noise=0.0)) for position in (positions, goal))
        distance = (latents - wanted).norm(dim=-1).view(len(places), len(places)).T
        axes.contourf(places, places, distance, levels=12)
        axes.plot([0.5, 0.5, math.nan, 0.5, 0.5], [0.0, DOOR[0], math.nan, DOOR[1], 1.0], color="white", linewidth=4)
        axes.plot(*goal[0], "*", color="white", markersize=12)
        axes.set(title=name, aspect="equal", ylim=(0.02, 0.98), xticks=[], yticks=[])
        axes.title.set_fontsize("medium")
    figure.savefig(file, dpi=150)


def show(name: str, done: float, text: str) -> None:
    """Draw a progress bar over the one before it."""
    print(f"\r{name:38} [{'#' * round(10 * done):.<10}] {text}", end="", flush=True)


def average(values: list[float]) -> str:
    """Render a mean, and the standard error of two or more values."""
    error = f"±{stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train world models of two rooms without TAR and with it, and plan.")
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1], metavar="SEED", help="default: %(default)s")
    add("--steps", type=int, default=1000, help="of each training (default: %(default)s)")
    add("--distractor", action="store_true", help="add a second dot, which no action moves")
    add("--plot", metavar="FILE", help="draw the distances of the latents of the last seed; needs matplotlib")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    models: dict[str, WorldModel] = {}
    for seed in args.seeds:
        print(f"seed {seed}")
        for name, weights in SETTINGS.items():
            models[name] = train(weights, seed, args.steps, args.distractor, partial(show, name))
            same, other = success(models[name], args.distractor)
            print(f"\n    success {same:.2f} in the same room, {other:.2f} through the door")
            found.setdefault(name, []).append((same + other) / 2)
    plain = found[next(iter(found))]
    print("\nmean success, and its change to the first")
    for name, values in found.items():
        changes = [value - without for value, without in zip(values, plain, strict=True)]
        print(f"{name:38}  {average(values):15} {average(changes)}")
    if args.plot:
        plot(models, args.plot)


if __name__ == "__main__":
    main()
