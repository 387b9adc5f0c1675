"""Regularize a custom RNN by hooks, with padding on the left: `python examples/custom_rnn.py`, a few seconds.

The model returns only its output, and does not know of the regularizer. The sequences are the lines of this file; the
model learns to predict their characters.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg import FusedRNNDropout, RNNRegularizer

BATCH = 16


class MinimalGatedRNN(nn.Module):
    """Run a minimal gated unit over all time steps: `(batch, time, hidden)` in and out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(2 * hidden, hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        state, outputs = torch.zeros_like(x[:, 0]), []
        for step, is_valid in zip(x.unbind(1), mask.unbind(1), strict=True):
            gate = torch.sigmoid(self.gate(torch.cat([step, state], 1))) * is_valid[:, None]  # padding keeps the state
            state = state + gate * (torch.tanh(self.new(torch.cat([step, state], 1))) - state)
            outputs.append(state)
        return torch.stack(outputs, 1)


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, hidden: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.rnn = MinimalGatedRNN(hidden)
        self.dropout = FusedRNNDropout(0.2, 0, 0)  # any dropout works; this one computes AR and TAR, too
        self.decoder = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.decoder(self.dropout(self.rnn(self.embedding(ids), mask)))


def padded_lines() -> tuple[Tensor, Tensor, int]:
    """Return the ids of all lines, padded on the left with 0, the mask of valid steps, and the vocabulary size."""
    text = Path(__file__).read_text()
    characters = sorted(set(text))  # the first is the line feed, which no line contains
    lines = [torch.tensor([characters.index(c) for c in line]) for line in text.splitlines() if len(line) > 1]
    ids = nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_side="left")
    return ids, ids != 0, len(characters)


def main(epochs: int) -> None:
    torch.manual_seed(0)
    ids, mask, vocabulary = padded_lines()
    model = LanguageModel(vocabulary)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regularizer = RNNRegularizer(alpha=2.0, beta=1.0)
    # `valid` gets the arguments of the RNN.
    regularizer.attach(model.rnn, model.dropout, batch_first=True, valid=lambda x, mask: mask)
    for epoch in range(epochs):
        for batch in torch.randperm(len(ids)).split(BATCH):
            inputs, targets, is_valid = ids[batch, :-1], ids[batch, 1:], mask[batch]
            decoded = model(inputs, is_valid[:, :-1])
            counts = is_valid[:, :-1] & is_valid[:, 1:]
            loss = F.cross_entropy(decoded[counts], targets[counts])
            optimizer.zero_grad()
            total = regularizer.on_backward_begin(loss)  # the loss plus the penalty
            total.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss:.3f}  ar {regularizer.ar:.4f}  tar {regularizer.tar:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
