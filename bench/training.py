"""The small AWD-LSTM that the demo and the study train with AR and TAR, and how they train and evaluate it."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from bench.awd_lstm import AWDLSTM, Dropouts
from bench.corpus import BATCH, BPTT, Corpus, batches
from fastreg import RNNRegularizer, fused_ar_tar

LAYERS, EMBEDDING, HIDDEN = 2, 96, 128  # units: small enough for two cores
DROPOUTS = Dropouts(word_p=0.02, input_p=0.1, weight_p=0.2, hidden_p=0.1, output_p=0.1)
LEARNING_RATE = 3e-3
CLIP = 0.25


class Training:
    """A model in training on a corpus, with AR weighed by `alpha` and TAR by `beta`.

    Weights and draws follow from `seed`. They come from torch's own generator: train one model after the other.
    """

    def __init__(self, corpus: Corpus, alpha: float, beta: float, seed: int):
        torch.manual_seed(seed)
        self.rows = corpus.train
        self.draw = random.Random(seed)
        self.model = AWDLSTM(corpus.vocabulary, EMBEDDING, HIDDEN, LAYERS, DROPOUTS).to(corpus.train.device)
        # else the layers saturate first to stand for the frequencies, and are slow to recover
        self.model.decoder.bias.data.copy_(corpus.log_frequencies())
        self.optimizer = Adam(self.model.parameters(), LEARNING_RATE)
        self.regularizer = RNNRegularizer(alpha, beta, bptt=BPTT)

    def epoch(self) -> Tensor:
        """Pass once over the text.

        Returns:
            Every step's loss without the penalties, AR and TAR: `(steps, 3)`, on the CPU.
        """
        self.model.train()
        self.regularizer.on_epoch_begin(self.model)
        return torch.stack([self.step(*batch) for batch in batches(self.rows, self.length)]).cpu()

    def length(self) -> int:
        """Draw a number of time steps, as AWD-LSTM varies it."""
        return max(5, int(self.draw.gauss(BPTT if self.draw.random() < 0.95 else BPTT / 2, 5)))

    def step(self, ids: Tensor, following: Tensor) -> Tensor:
        """Learn from words and those that follow them; give the loss without the penalties, AR and TAR."""
        output = self.model(ids)
        decoded = self.regularizer.on_loss_begin(output)
        loss = F.cross_entropy(decoded.flatten(0, 1), following.flatten())
        self.optimizer.zero_grad()
        self.regularizer.on_backward_begin(loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        with self.regularizer.scaled_lr(self.optimizer, ids.shape[1]):  # a short sequence is less to learn from
            self.optimizer.step()
        _, raw, dropped = output
        # The regularizer computes no term that is off.
        _, ar, tar = fused_ar_tar(raw.detach(), dropped.detach(), 1, 1, return_terms=True)
        return torch.stack([loss.detach(), ar, tar])


@torch.no_grad()
def evaluate(model: AWDLSTM, rows: Tensor) -> float:
    """The mean loss of a word, without dropout."""
    model.eval()
    model.reset()
    total = torch.zeros((), device=rows.device)
    for ids, following in batches(rows, lambda: BPTT):
        decoded, _, _ = model(ids)
        total += F.cross_entropy(decoded.flatten(0, 1), following.flatten(), reduction="sum")
    return total.item() / (rows.numel() - BATCH)
