"""The demo's job through a real fastai v2 `Learner`: its AWD-LSTM, data and loop, with fastreg fused in."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fastai's own
    from fastai.callback.core import Callback
    from fastai.callback.progress import ProgressCallback
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.text.data import LMDataLoader
    from fastai.text.learner import language_model_learner
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.torch_core import set_seed

from bench.corpus import BPTT, Corpus
from bench.training import CLIP, EMBEDDING, HIDDEN, LAYERS, LEARNING_RATE
from fastreg import fused_ar_tar
from fastreg.fastai import fuse


class History(Callback):
    """The loss without the penalties, AR and TAR of every training step."""

    order = 100  # after the regularizer

    def before_fit(self) -> None:
        self.steps: list[Tensor] = []

    def after_loss(self) -> None:
        learn: Any = self.learn
        if learn.training:
            rnn = learn.rnn  # the callback that keeps the activations
            _, ar, tar = fused_ar_tar(rnn.raw_out.detach(), rnn.out.detach(), 1, 1, return_terms=True)
            self.steps.append(torch.stack([learn.loss.detach(), ar, tar]))


class Table(Callback):
    """Print a line for each epoch, its numbers below the names of the `Recorder`."""

    order = 60  # after the Recorder, as fastai's progress bar

    def before_fit(self) -> None:
        learn: Any = self.learn
        self.widths = [max(len(name), 10) for name in learn.recorder.metric_names]
        learn.logger = self.row
        self.row(learn.recorder.metric_names)

    def row(self, values: Iterable[Any]) -> None:
        cells = (f"{value:.6f}" if isinstance(value, float) else str(value) for value in values)
        print(*(cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True)), flush=True)


def train(corpus: Corpus, alpha: float, beta: float, epochs: int, seed: int) -> tuple[Tensor, list[float]]:
    """Train with fastai, which prints its own table, with the columns `ar` and `tar`.

    Returns:
        The loss without the penalties, AR and TAR of every step, `(steps, 3)`, and the perplexity of the validation
        text after every epoch.
    """
    set_seed(seed)
    rows = corpus.train, corpus.valid
    loaders = [LMDataLoader([x.flatten().cpu()], bs=len(x), seq_len=BPTT, device=x.device) for x in rows]
    dls: Any = DataLoaders(*loaders, device=corpus.train.device)
    dls.vocab = [str(i) for i in range(corpus.vocabulary)]
    config = {**awd_lstm_lm_config, "emb_sz": EMBEDDING, "n_hid": HIDDEN, "n_layers": LAYERS}
    learn = language_model_learner(
        dls, AWD_LSTM, config=config, drop_mult=0.3, pretrained=False, alpha=alpha, beta=beta, cbs=GradientClip(CLIP)
    )
    history = History()
    learn.add_cb(history)
    if not sys.stdout.isatty():  # fastai's progress bar, which prints its table, is for a terminal
        learn.remove_cb(ProgressCallback)
        learn.add_cb(Table())
    if alpha or beta:
        fuse(learn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(epochs, LEARNING_RATE)
    valid = learn.recorder.metric_names.index("valid_loss") - 1  # the values leave out the epoch
    return torch.stack(history.steps).cpu(), [math.exp(row[valid]) for row in learn.recorder.values]
