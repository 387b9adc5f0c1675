"""Train a GRU language model in PyTorch Lightning with AR and TAR: `python examples/lightning_lm.py`, a few seconds.

The model learns to predict the characters of this file.
"""

import argparse
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastreg.lightning import ActivationRegularization

BATCH, STEPS = 8, 40


class LanguageModel(LightningModule):
    """Predict the next character, and log the loss. The module does not know of the regularizer."""

    def __init__(self, vocabulary: int, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.decoder = nn.Linear(hidden, vocabulary)

    def training_step(self, ids: Tensor) -> Tensor:
        raw, _ = self.gru(self.embedding(ids[:, :-1]))
        decoded = self.decoder(self.dropout(raw))
        loss = F.cross_entropy(decoded.flatten(0, 1), ids[:, 1:].flatten())
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(ids))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        print(f"epoch {self.current_epoch}  loss {metrics['loss']:.3f}", flush=True)


def main(epochs: int) -> None:
    seed_everything(0, verbose=False)
    text = Path(__file__).read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text])
    data = DataLoader(ids.unfold(0, STEPS + 1, STEPS), batch_size=BATCH, shuffle=True)
    regularization = ActivationRegularization(alpha=2.0, beta=1.0, rnn="gru", dropout="dropout")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[regularization], **quiet)
    trainer.fit(LanguageModel(len(characters)), data)
    print(f"ar {trainer.callback_metrics['ar']:.4f}  tar {trainer.callback_metrics['tar']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
