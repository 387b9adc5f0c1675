"""The models whose training steps are measured; none computes a penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.study.awd_lstm import AWDLSTM

Activations = list[tuple[Tensor, Tensor]]  # raw and dropped of each regularized layer
WORDS = 50  # the vocabulary of small models
LEARNING_RATE = 0.01


class Net(nn.Module):
    """A model that returns the loss of a batch: `net(batch, keep)`.

    It calls `keep` with raw and dropped of each regularized layer.

    Attributes:
        pairs: the RNN and the dropout of each regularized layer, for `attach`.
    """

    pairs: Sequence[tuple[nn.Module, nn.Module | None]]


class MinGRU(nn.Module):
    """A minimal GRU over `(batch, time, hidden)`, computed by a parallel scan of logarithms.

    Feng et al., "Were RNNs All We Needed?" (2024), appendix B.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.gate_and_new = nn.Linear(hidden, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, new = self.gate_and_new(x).chunk(2, -1)
        decays = (-F.softplus(gate)).cumsum(1)
        new = torch.where(new >= 0, (F.relu(new) + 0.5).log(), -F.softplus(-new))
        return (decays + (new - F.softplus(-gate) - decays).logcumsumexp(1)).exp()


class Tanh(nn.Module):
    """An elementwise layer, which is much faster than a recurrent one."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.weight)


class Stack(Net):
    """Eight residual layers that learn to predict a sequence; each of them is regularized."""

    LAYERS = 8

    def __init__(self, hidden: int, layer: Callable[[int], nn.Module], dropout: Callable[[], nn.Module]):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(self.LAYERS))
        self.rnns = nn.ModuleList(layer(hidden) for _ in range(self.LAYERS))
        self.dropouts = nn.ModuleList(dropout() for _ in range(self.LAYERS))
        self.pairs = list(zip(self.rnns, self.dropouts, strict=True))

    def forward(self, batch: tuple[Tensor, Tensor], keep: Callable[[Tensor, Tensor], object]) -> Tensor:
        x, target = batch
        for norm, rnn, dropout in zip(self.norms, self.rnns, self.dropouts, strict=True):
            raw = rnn(norm(x))
            dropped = dropout(raw)
            keep(raw, dropped)
            x = x + dropped
        return F.mse_loss(x, target)


class LSTM(Net):
    """A language model of one LSTM."""

    def __init__(self, hidden: int, dropout: Callable[[], nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, hidden)
        self.rnn = nn.LSTM(hidden, hidden, batch_first=True)
        self.dropout = dropout()
        self.decoder = nn.Linear(hidden, WORDS)
        self.pairs = [(self.rnn, self.dropout)]

    def forward(self, batch: tuple[Tensor], keep: Callable[[Tensor, Tensor], object]) -> Tensor:
        (text,) = batch
        raw, _ = self.rnn(self.embedding(text[:, :-1]))
        dropped = self.dropout(raw)
        keep(raw, dropped)
        return F.cross_entropy(self.decoder(dropped).flatten(0, 1), text[:, 1:].flatten())


class AWDLSTMNet(Net):
    """An AWD-LSTM, whose last layer is regularized."""

    def __init__(self, model: AWDLSTM, dropout: Callable[[], nn.Module]):
        super().__init__()
        model.dropouts[-1] = dropout()
        self.model, self.pairs = model, [(model.rnns[-1], model.dropouts[-1])]

    def forward(self, batch: tuple[Tensor], keep: Callable[[Tensor, Tensor], object]) -> Tensor:
        (text,) = batch
        decoded, raw, dropped = self.model(text[:, :-1])
        keep(raw, dropped)
        return F.cross_entropy(decoded.flatten(0, 1), text[:, 1:].flatten())


class MambaNet(Net):
    """Hugging Face's Mamba. The output of its first block is regularized, as raw and as dropped."""

    def __init__(self, hidden: int):
        super().__init__()
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(vocab_size=WORDS, hidden_size=hidden, num_hidden_layers=2, state_size=8)
        self.model: Any = MambaForCausalLM(config)
        block = self.model.backbone.layers[0]
        block.register_forward_hook(lambda module, args, output: self.keep(output, output))
        self.pairs = [(block, None)]

    def forward(self, batch: tuple[Tensor], keep: Callable[[Tensor, Tensor], object]) -> Tensor:
        (text,) = batch
        self.keep = keep
        return self.model(text, labels=text, use_cache=False).loss


def forget(raw: Tensor, dropped: Tensor) -> None:
    """Ignore the activations."""


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of all steps."""
    return torch.optim.SGD(net.parameters(), LEARNING_RATE)
