"""`RNNRegularizer`, `attach` and `with_penalty`, and steps that several of their tests take."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.language_model import Attached

cp: Any = partial(checkpoint, use_reentrant=False)
no_grad: Any = torch.no_grad()


def frozen(m: Any) -> Any:
    m.rnn.requires_grad_(False)
    return m


def reentrant(m: Attached, x: Tensor) -> Any:
    """Return the loss of a run in a reentrant checkpoint, whose forward has no gradients."""
    return checkpoint(lambda y: m(y).loss, x.clone().requires_grad_(), use_reentrant=True)


def steps(of: type) -> Any:
    """Run a test with the name of each step that a class has as a method."""
    return pytest.mark.parametrize("step", [name for name in vars(of) if not name.startswith("_")])
