"""A small AWD-LSTM, the language model that AR and TAR were proposed for, in plain PyTorch.

Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models" (2017): dropout of whole words in
the embedding, of recurrent weights, and, with one mask for all time steps, of activations.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = tuple[Tensor, Tensor]  # hidden and cell, each (1, batch, hidden)


class LockedDropout(nn.Module):
    """Variational dropout: `(batch, time, hidden)`, with one mask for all time steps of a sequence."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = x.new_ones(x.shape[0], 1, x.shape[2])
        return x * F.dropout(mask, self.p)


class EmbeddingDropout(nn.Embedding):
    """An embedding that drops whole words: `(batch, time)` ids to `(batch, time, embedding)`."""

    def __init__(self, words: int, size: int, p: float):
        super().__init__(words, size)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        kept = F.dropout(self.weight.new_ones(self.num_embeddings, 1), self.p, self.training)
        return F.embedding(input, self.weight) * F.embedding(input, kept)


class WeightDropLSTM(nn.Module):
    """A one-layer LSTM whose recurrent weights drop out, with one mask for all time steps (DropConnect)."""

    def __init__(self, input_size: int, hidden_size: int, p: float):
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.p = p

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Map `x`, `(batch, time, input)`, to the output, `(batch, time, hidden)`, and the last state."""
        if state is None:
            zeros = x.new_zeros(1, x.shape[0], self.lstm.hidden_size)
            state = zeros, zeros
        w_ih, w_hh, b_ih, b_hh = self.lstm.all_weights[0]
        weights = [w_ih, F.dropout(w_hh, self.p, self.training), b_ih, b_hh]
        with warnings.catch_warnings():  # cuDNN warns that the weights do not lie in one piece; fresh weights cannot
            warnings.filterwarnings("ignore", "RNN module weights")
            # as nn.LSTM calls it, with has_biases, num_layers, dropout, train, bidirectional, batch_first
            output, h, c = torch.lstm(x, state, weights, True, 1, 0.0, self.training, False, True)
        return output, (h, c)


class Dropouts(NamedTuple):
    """The probabilities of dropping words, recurrent weights, and units before, between and after the layers."""

    word_p: float
    input_p: float
    weight_p: float
    hidden_p: float
    output_p: float


class AWDLSTM(nn.Module):
    """A word-level language model that carries its hidden state from batch to batch until `reset()`.

    The decoder's weights are the embedding's, so the last layer is as wide as the embedding.
    """

    def __init__(self, words: int, embedding: int, hidden: int, layers: int, dropouts: Dropouts):
        super().__init__()
        sizes = [embedding, *[hidden] * (layers - 1), embedding]
        self.encoder = EmbeddingDropout(words, embedding, dropouts.word_p)
        self.rnns = nn.ModuleList(WeightDropLSTM(sizes[i], sizes[i + 1], dropouts.weight_p) for i in range(layers))
        # before every layer, and after the last
        ps = [dropouts.input_p, *[dropouts.hidden_p] * (layers - 1), dropouts.output_p]
        self.dropouts = nn.ModuleList(LockedDropout(p) for p in ps)
        self.decoder = nn.Linear(embedding, words)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.encoder.weight
        self.reset()

    def reset(self) -> None:
        """Reset the hidden state, for a batch that does not continue the last one."""
        self.states: list[State | None] = [None] * len(self.rnns)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the next words from `ids`, `(batch, time)`, which continue the batch of the last call.

        It returns their logits, `(batch, time, words)`, and the last layer's output before and after its dropout.
        """
        dropped = self.dropouts[0](self.encoder(ids))
        raw = dropped
        for i, rnn in enumerate(self.rnns):
            raw, (h, c) = rnn(dropped, self.states[i])
            self.states[i] = h.detach(), c.detach()  # the gradient stops where the batch begins
            dropped = self.dropouts[i + 1](raw)
        return self.decoder(dropped), raw, dropped
