"""The demo's job through a real fastai v2 `Learner`: its AWD-LSTM, data and loop, with fastreg fused in."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fastai's own
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.text.data import LMDataLoader
    from fastai.text.learner import language_model_learner
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.torch_core import set_seed

from fastreg import fused_ar_tar
from fastreg.fastai import fuse


class History(Callback):
    """The loss without the penalties, AR and TAR of every training step, and the seconds of an epoch."""

    order = 100  # after the regularizer

    def before_fit(self) -> None:
        self.steps: list[Tensor] = []
        self.step_seconds: list[float] = []

    def before_train(self) -> None:
        self.first, self.start = len(self.steps), time.perf_counter()

    def after_loss(self) -> None:
        learn: Any = self.learn
        if learn.training:
            rnn = learn.rnn  # the callback that keeps the activations
            _, ar, tar = fused_ar_tar(rnn.raw_out.detach(), rnn.out.detach(), 1, 1, return_terms=True)
            self.steps.append(torch.stack([learn.loss.detach(), ar, tar]))

    def after_train(self) -> None:
        self.step_seconds.append((time.perf_counter() - self.start) / (len(self.steps) - self.first))


def train(
    rows: tuple[Tensor, Tensor],
    vocabulary: int,
    sizes: tuple[int, int],
    bptt: int,
    coefficients: tuple[float, float],
    epochs: int,
    seed: int,
    lr: float,
    clip: float,
) -> tuple[Tensor, float]:
    """Train with fastai, which prints its own table, with the columns `ar` and `tar`.

    `rows` are ids for training and validation, `(batch, time)`; `sizes` those of embedding and hidden layer. Gives
    the loss without the penalties, AR and TAR of every step, `(steps, 3)`, and a step's seconds.
    """
    set_seed(seed)
    loaders = [LMDataLoader([x.flatten().cpu()], bs=len(x), seq_len=bptt, device=x.device) for x in rows]
    dls: Any = DataLoaders(*loaders, device=rows[0].device)
    dls.vocab = [str(i) for i in range(vocabulary)]
    config = {**awd_lstm_lm_config, "emb_sz": sizes[0], "n_hid": sizes[1], "n_layers": 2}
    alpha, beta = coefficients
    learn = language_model_learner(
        dls, AWD_LSTM, config=config, drop_mult=0.3, pretrained=False, alpha=alpha, beta=beta, cbs=GradientClip(clip)
    )
    history = History()
    learn.add_cb(history)
    if alpha or beta:
        fuse(learn)
    with warnings.catch_warnings(), nullcontext() if sys.stdout.isatty() else learn.no_bar():
        warnings.simplefilter("ignore")
        learn.fit(epochs, lr)
    return torch.stack(history.steps).cpu(), min(history.step_seconds)
