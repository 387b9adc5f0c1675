"""A recurrent policy over episodes, with TAR that stops at their starts: `python examples/recurrent_policy.py`.

An episode may end at any time step, and the next episode then starts in the same sequence of the rollout. The policy
resets its state there, and TAR must not penalize the change into a start: `starts` leaves out this change, and no
other. Each episode shows a cue only at its first step. The policy is rewarded as long as it acts on the cue.

The flags here mark the first step of an episode. docs/reinforcement-learning.md says what to do with flags that mark
the last step, and with the flags of CleanRL and Stable-Baselines3.

The trainer, `update`, does not expose its loss, like the `train()` of Stable-Baselines3. So a forward hook adds the
penalty: `with_penalty` returns a view of the policy's states, and the backward through the view also differentiates the
penalty. In a training loop of your own, `RNNRegularizer.attach` is simpler. The example takes a few seconds on a CPU.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg import ARTAR, fused_ar_tar, with_penalty

CUES, HIDDEN, SEQUENCES, TIME = 3, 32, 32, 24


class ResettingGRU(nn.Module):
    """Run a GRU over a rollout, `(batch, time, features)`, from a state of zeros at each start."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(CUES + 1, HIDDEN)

    def forward(self, observations: Tensor, starts: Tensor) -> Tensor:
        state, states = observations.new_zeros(len(observations), HIDDEN), []
        for seen, first in zip(observations.unbind(1), starts.unbind(1), strict=True):
            state = self.cell(seen, state * ~first[:, None])
            states.append(state)
        return torch.stack(states, 1)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.actor, self.critic = ResettingGRU(), nn.Linear(HIDDEN, CUES), nn.Linear(HIDDEN, 1)

    def forward(self, observations: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        states = self.rnn(observations, starts)
        return self.actor(states), self.critic(states).squeeze(-1)


def rollout() -> tuple[Tensor, Tensor, Tensor]:
    """Return observations, the starts of episodes, and the cue of each step's episode."""
    starts = torch.rand(SEQUENCES, TIME) < 0.15
    starts[:, 0] = True
    episode = starts.cumsum(1) - 1
    cues = torch.randint(CUES, (SEQUENCES, TIME)).gather(1, episode)
    shown = F.one_hot(cues, CUES) * starts[..., None]
    return torch.cat([shown + 0.3 * torch.randn(SEQUENCES, TIME, CUES), starts[..., None]], -1), starts, cues


def regularize(rnn: nn.Module, alpha: float, beta: float, log: Callable[[ARTAR], None]) -> None:
    """Add AR and TAR of a module to the gradients of each backward through its output in training."""

    def add_penalty(module: nn.Module, args: tuple[Tensor, Tensor], states: Tensor) -> Tensor:
        if not module.training:
            return states
        _, starts = args
        terms = fused_ar_tar(states, states, alpha, beta, starts=starts, return_terms=True)
        log(terms)
        return with_penalty(states, terms.penalty)

    rnn.register_forward_hook(add_penalty)


def update(policy: Policy, optimizer: torch.optim.Optimizer) -> float:
    """Improve the policy by the advantages of one rollout; return the share of the cues that it missed."""
    observations, starts, cues = rollout()
    scores, values = policy(observations, starts)
    chosen = torch.distributions.Categorical(logits=scores)
    actions = chosen.sample()
    rewards = (actions == cues).float()
    advantages = rewards - values
    gain = (chosen.log_prob(actions) * advantages.detach()).mean() + 0.01 * chosen.entropy().mean()
    optimizer.zero_grad()
    (0.5 * advantages.square().mean() - gain).backward()
    optimizer.step()
    return 1 - float(rewards.mean())


def main(updates: int) -> None:
    torch.manual_seed(0)
    policy, logged = Policy(), []
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    regularize(policy.rnn, alpha=0.01, beta=0.1, log=logged.append)
    print(f"guessing misses {1 - 1 / CUES:.2f} of the cues")
    for number in range(updates):
        missed, (_, ar, tar) = update(policy, optimizer), logged.pop()
        if number % 40 == 0 or number == updates - 1:
            print(f"update {number:3}  missed {missed:.2f}  ar {ar:.4f}  tar {tar:.4f}")
    policy.eval()
    observations, starts, _ = rollout()
    states = policy.rnn(observations, starts)
    across = fused_ar_tar(states, states, 0.0, 1.0)
    within = fused_ar_tar(states, states, 0.0, 1.0, starts=starts)
    print(f"tar {within:.4f}, and {across:.4f} with changes into starts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=160)
    main(parser.parse_args().updates)
