"""The dtypes, layouts and subclass that several tests take."""

from __future__ import annotations

import torch
from torch import Tensor

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Decorated(Tensor):
    """A subclass without its own operators, as fastai has them."""


def transposed(x: Tensor) -> Tensor:
    """Swap batch and time in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)
