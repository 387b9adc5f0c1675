"""The models whose training steps are measured; none computes a penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.measure.timing import DEVICE
from bench.study.awd_lstm import AWDLSTM, Dropouts

Activations = list[tuple[Tensor, Tensor]]  # raw and dropped of each regularized layer
Batch = tuple[Tensor, ...]
Keep = Callable[[Tensor, Tensor], object]
MakeDropout = Callable[[], nn.Module]
P = 0.1  # of the dropouts whose outputs are regularized


class Net(nn.Module):
    """A model that returns the loss of a batch, `net(batch, keep)`: a language model, unless it says otherwise.

    It is made of the hidden size of its regularized layers and of a function that makes their dropouts. It calls `keep`
    with raw and dropped of each regularized layer.
    """

    pairs: Sequence[tuple[nn.Module, nn.Module]]  # the RNN and the dropout of each regularized layer, for `attach`
    words = 50  # the vocabulary

    def batch(self, shape: tuple[int, ...]) -> Batch:
        """Return a random batch for raw of this shape, `(batch, time, hidden)`."""
        return (torch.randint(self.words, (shape[0], shape[1] + 1), device=DEVICE),)


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

    def __init__(self, layer: Callable[[int], nn.Module], hidden: int, dropout: MakeDropout):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(self.LAYERS))
        self.rnns = nn.ModuleList(layer(hidden) for _ in range(self.LAYERS))
        self.dropouts = nn.ModuleList(dropout() for _ in range(self.LAYERS))
        self.pairs = list(zip(self.rnns, self.dropouts, strict=True))

    def batch(self, shape: tuple[int, ...]) -> Batch:
        return torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)

    def forward(self, batch: Batch, keep: Keep) -> Tensor:
        x, target = batch
        for norm, rnn, dropout in zip(self.norms, self.rnns, self.dropouts, strict=True):
            raw = rnn(norm(x))
            dropped = dropout(raw)
            keep(raw, dropped)
            x = x + dropped
        return F.mse_loss(x, target)


class LSTM(Net):
    """A language model of one LSTM."""

    def __init__(self, hidden: int, dropout: MakeDropout):
        super().__init__()
        self.embedding = nn.Embedding(self.words, hidden)
        self.rnn = nn.LSTM(hidden, hidden, batch_first=True)
        self.dropout = dropout()
        self.decoder = nn.Linear(hidden, self.words)
        self.pairs = [(self.rnn, self.dropout)]

    def forward(self, batch: Batch, keep: Keep) -> Tensor:
        (text,) = batch
        raw, _ = self.rnn(self.embedding(text[:, :-1]))
        dropped = self.dropout(raw)
        keep(raw, dropped)
        return F.cross_entropy(self.decoder(dropped).flatten(0, 1), text[:, 1:].flatten())


class AWDLSTMNet(Net):
    """An AWD-LSTM, whose last layer is regularized.

    On a GPU it has the sizes of Merity et al. for the Penn Treebank; on a CPU such a step takes seconds.
    """

    words, hidden, layers = (10000, 1152, 3) if DEVICE == "cuda" else (2000, 400, 2)

    def __init__(self, embedding: int, dropout: MakeDropout):
        super().__init__()
        ps = Dropouts(word_p=0.1, input_p=0.3, weight_p=0.5, hidden_p=0.25, output_p=P)
        self.model = AWDLSTM(self.words, embedding, self.hidden, self.layers, ps)
        self.model.dropouts[-1] = dropout()
        self.pairs = [(self.model.rnns[-1], self.model.dropouts[-1])]

    def forward(self, batch: Batch, keep: Keep) -> Tensor:
        (text,) = batch
        decoded, raw, dropped = self.model(text[:, :-1])
        keep(raw, dropped)
        return F.cross_entropy(decoded.flatten(0, 1), text[:, 1:].flatten())
