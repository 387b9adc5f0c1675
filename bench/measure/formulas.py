"""Dropout, AR and TAR as users write them, the baselines of the measurements."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ALPHA, BETA = 2.0, 1.0  # the coefficients of AWD-LSTM


def widened(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it has that dtype, as references have."""
    return x if x.dtype == torch.float64 else x.float()


def fastai(raw: Tensor, dropped: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute what `RNNRegularizer.after_loss` of fastai 2.8 adds to the loss, from `(batch, time, hidden)`."""
    ar = alpha * widened(dropped).pow(2).mean() if alpha else 0.0
    tar = beta * widened(raw[:, 1:] - raw[:, :-1]).pow(2).mean() if beta and len(raw) > 1 else 0.0
    return torch.as_tensor(ar + tar)


def tight(raw: Tensor, dropped: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute the penalty by the two functions of PyTorch that make the fewest temporaries."""
    ar = torch.linalg.vector_norm(dropped, dtype=torch.float32).square() / dropped.numel()
    return alpha * ar + beta * F.mse_loss(raw[:, 1:], raw[:, :-1])


def padded(raw: Tensor, dropped: Tensor, lengths: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute fastai's penalty with a mask that leaves out the padding of each sequence, `(batch, time, hidden)`."""
    there = (torch.arange(raw.shape[1], device=raw.device) < lengths.unsqueeze(-1)).unsqueeze(-1)
    hidden = raw.shape[-1]
    ar = (widened(dropped).pow(2) * there).sum() / (there.sum() * hidden)
    changes = widened(raw[:, 1:] - raw[:, :-1])
    tar = (changes.pow(2) * there[:, 1:]).sum() / (there[:, 1:].sum() * hidden)
    return alpha * ar + beta * tar


def two_line_dropout(x: Tensor, p: float) -> Tensor:
    """Drop elements like `nn.Dropout`, by 16 random bits each, which PyTorch draws four at a time on a CPU."""
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return x * (bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(65536 * p) - 32768) * (1 / (1 - p))
