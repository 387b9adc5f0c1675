"""The small AWD-LSTM of the demo and the study, and its training and evaluation with AR and TAR."""

from __future__ import annotations

import copy
import math
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from bench.study.awd_lstm import AWDLSTM, Dropouts
from bench.study.corpus import BATCH, BPTT, Corpus, batches
from fastreg import RNNRegularizer, fused_ar_tar

LAYERS, EMBEDDING, HIDDEN = 2, 96, 128  # small enough for two cores
DROPOUTS = Dropouts(word_p=0.02, input_p=0.1, weight_p=0.2, hidden_p=0.1, output_p=0.1)
LEARNING_RATE = 5e-3
CLIP = 0.25
PATIENCE = 3  # epochs without a lower validation loss, before the learning rate is divided
DIVISOR, DIVISIONS = 4, 2


class EarlyStopping:
    """Keep the weights of the epoch with the lowest validation loss; PAGE in report.py describes the rule."""

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model, self.optimizer = model, optimizer
        self.lowest, self.waited, self.divisions = math.inf, 0, 0
        self.weights: dict[str, Tensor] = {}

    def ends(self, valid_loss: float) -> bool:
        """Take the validation loss after an epoch, and return whether the training ends."""
        self.waited += 1
        if valid_loss < self.lowest:
            self.lowest, self.waited = valid_loss, 0
            self.weights = copy.deepcopy(self.model.state_dict())
        elif self.waited == PATIENCE:
            if self.divisions == DIVISIONS:
                return True
            self.waited, self.divisions = 0, self.divisions + 1
            for group in self.optimizer.param_groups:
                group["lr"] /= DIVISOR
        return False

    def restore(self) -> None:
        """Load the weights of the best epoch into the model."""
        self.model.load_state_dict(self.weights)


class Training:
    """A model in training; `seed` sets torch's global generator, so train one model after the other."""

    def __init__(self, corpus: Corpus, alpha: float, beta: float, seed: int):
        torch.manual_seed(seed)
        self.corpus = corpus
        self.draw = random.Random(seed)
        self.model = AWDLSTM(corpus.vocabulary, EMBEDDING, HIDDEN, LAYERS, DROPOUTS).to(corpus.train.device)
        # without this the layers first saturate to express the word frequencies, and recover slowly
        self.model.decoder.bias.data.copy_(corpus.log_frequencies())
        self.optimizer = Adam(self.model.parameters(), LEARNING_RATE)
        self.stopping = EarlyStopping(self.model, self.optimizer)
        self.regularizer = RNNRegularizer(alpha, beta, bptt=BPTT)

    def epoch(self) -> Tensor:
        """Train on the whole text once; return loss without penalties, AR and TAR of each step, `(steps, 3)`."""
        self.model.train()
        self.regularizer.on_epoch_begin(self.model)
        return torch.stack([self.step(*batch) for batch in batches(self.corpus.train, self.length)]).cpu()

    def length(self) -> int:
        """Draw a number of time steps, as AWD-LSTM varies it."""
        return max(5, int(self.draw.gauss(BPTT if self.draw.random() < 0.95 else BPTT / 2, 5)))

    def step(self, ids: Tensor, following: Tensor) -> Tensor:
        """Train on words and the words that follow them; return the loss without the penalties, AR and TAR."""
        output = self.model(ids)
        decoded = self.regularizer.on_loss_begin(output)
        loss = F.cross_entropy(decoded.flatten(0, 1), following.flatten())
        self.optimizer.zero_grad()
        self.regularizer.on_backward_begin(loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        with self.regularizer.scaled_lr(self.optimizer, ids.shape[1]):  # a short sequence deserves a smaller step
            self.optimizer.step()
        _, raw, dropped = output
        # The regularizer does not compute a term whose coefficient is 0.
        _, ar, tar = fused_ar_tar(raw.detach(), dropped.detach(), 1, 1, return_terms=True)
        return torch.stack([loss.detach(), ar, tar])


@torch.no_grad()
def evaluate(model: AWDLSTM, rows: Tensor) -> float:
    """Compute the mean loss over the words of a text, without dropout."""
    model.eval()
    model.reset()
    total = torch.zeros((), device=rows.device)
    for ids, following in batches(rows, lambda: BPTT):
        decoded, _, _ = model(ids)
        total += F.cross_entropy(decoded.flatten(0, 1), following.flatten(), reduction="sum")
    return total.item() / (rows.numel() - BATCH)
