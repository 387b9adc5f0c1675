"""TAR on every layer of a stack of minGRUs, against overfitting: `python examples/every_layer.py`, seconds on a CPU.

A minGRU (Feng et al., "Were RNNs All We Needed?", 2024) has no loop over time: its states are a scan over gates that
depend only on the input, as in Mamba. No layer knows of the regularizer. The model learns to predict the characters of
this file: it trains on the first four fifths, and the rest is for validation. It soon knows so little text by heart,
and then the validation loss rises. With TAR this loss gets lower and rises later. `--seed` trains from other weights.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg import FusedRNNDropout, RNNRegularizer

LAYERS, HIDDEN, BATCH, TIME = 3, 64, 8, 60


class MinGRU(nn.Module):
    """Compute `h[t] = (1 - z[t]) * h[t - 1] + z[t] * v[t]` for all time steps at once: `(batch, time, hidden)`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, new = self.gate(x), self.new(x)
        log_kept = -F.softplus(gate).cumsum(1)  # the sum of log(1 - z)
        log_new = -F.softplus(-gate) + torch.where(new >= 0, (new.relu() + 0.5).log(), -F.softplus(-new))
        return (log_kept + (log_new - log_kept).logcumsumexp(1)).exp()


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, HIDDEN)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(LAYERS))
        self.rnns = nn.ModuleList(MinGRU(HIDDEN) for _ in range(LAYERS))
        self.dropouts = nn.ModuleList(FusedRNNDropout(0.1, 0, 0) for _ in range(LAYERS))  # any dropout will do
        self.decoder = nn.Linear(HIDDEN, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for norm, rnn, dropout in zip(self.norms, self.rnns, self.dropouts, strict=True):
            x = x + dropout(rnn(norm(x)))
        return self.decoder(x)


def train(alpha: float, beta: float, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    text = Path(__file__).read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text])
    rows = ids[: len(ids) // BATCH * BATCH].view(BATCH, -1)
    rows, valid = rows.tensor_split([rows.shape[1] * 4 // 5], 1)
    model = LanguageModel(len(characters))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regularizer = RNNRegularizer(alpha, beta)
    for rnn, dropout in zip(model.rnns, model.dropouts, strict=True):
        regularizer.attach(rnn, dropout, batch_first=True)  # every attached module counts
    print(f"alpha {alpha:g}, beta {beta:g}: ar and tar of {LAYERS} layers, added up")
    for epoch in range(epochs):
        model.train()
        for start in range(0, rows.shape[1] - 1, TIME):
            inputs = rows[:, :-1][:, start : start + TIME]
            targets = rows[:, 1:][:, start : start + TIME]
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            total = regularizer.on_backward_begin(loss)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            valid_loss = F.cross_entropy(model(valid[:, :-1]).flatten(0, 1), valid[:, 1:].flatten())
        figures = f"ar {regularizer.ar:.4f}  tar {regularizer.tar:.4f}"
        print(f"epoch {epoch:2}  loss {loss:.3f}  valid {valid_loss:.3f}  {figures}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(0.0, 0.0, options.epochs, options.seed)  # ar and tar are measured, and weigh nothing
    train(0.0, 0.3, options.epochs, options.seed)
