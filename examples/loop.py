"""Train an LSTM language model with AR and TAR in a plain loop: `python examples/loop.py`, a few seconds on a CPU.

The model learns to predict the characters of this file.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg import RNNRegularizer

BATCH, BPTT = 8, 40


class LanguageModel(nn.Module):
    """Return `(decoded, raw, dropped)`, and keep the hidden state from batch to batch, as AWD-LSTM does."""

    def __init__(self, vocabulary: int, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.decoder = nn.Linear(hidden, vocabulary)
        self.reset()

    def reset(self) -> None:
        self.state = None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw, (h, c) = self.lstm(self.embedding(ids), self.state)
        self.state = h.detach(), c.detach()
        dropped = self.dropout(raw)
        return self.decoder(dropped), raw, dropped


def main(epochs: int) -> None:
    torch.manual_seed(0)
    text = Path(__file__).read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text])
    rows = ids[: len(ids) // BATCH * BATCH].view(BATCH, -1)
    model = LanguageModel(len(characters))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regularizer = RNNRegularizer(alpha=2.0, beta=1.0, bptt=BPTT)
    for epoch in range(epochs):
        regularizer.on_epoch_begin(model)  # resets the hidden state
        log = []
        for start in range(0, rows.shape[1] - 1, BPTT):
            inputs = rows[:, :-1][:, start : start + BPTT]
            targets = rows[:, 1:][:, start : start + BPTT]
            decoded = regularizer.on_loss_begin(model(inputs))  # captures raw and dropped
            loss = F.cross_entropy(decoded.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            total = regularizer.on_backward_begin(loss)  # the loss plus the penalty
            total.backward()
            with regularizer.scaled_lr(optimizer, inputs.shape[1]):  # a shorter batch takes a smaller step
                optimizer.step()
            log.append((loss.item(), regularizer.ar.item(), regularizer.tar.item()))
        mean_loss, ar, tar = torch.tensor(log).mean(0)
        print(f"epoch {epoch}  loss {mean_loss:.3f}  ar {ar:.4f}  tar {tar:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
