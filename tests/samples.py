"""The samples that the tests cross with their checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Decorated(Tensor):
    """A subclass without its own operators, as fastai has them."""


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def transposed(x: Tensor) -> Tensor:
    """Swap batch and time in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x


def sliced(x: Tensor) -> Tensor:
    """Return part of a wider hidden axis, at an odd address."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def every_other(x: Tensor) -> Tensor:
    """Return every other element of the hidden axis, so that no view has a contiguous inner axis."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def hidden_first(x: Tensor) -> Tensor:
    """Make the hidden axis the slowest in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def expanded(x: Tensor) -> Tensor:
    """Repeat one sequence without copying it."""
    return x[:1].expand_as(x)


LAYOUTS = {f.__name__: f for f in (contiguous, transposed, sliced, every_other, hidden_first, expanded)}


@dataclass(frozen=True)
class Sample:
    """Describe a call of `fused_ar_tar`; the tensors have this shape, whatever `batch_first` is."""

    shape: tuple[int, ...] = (3, 7, 12)
    batch_first: bool = True
    dtypes: tuple[torch.dtype, torch.dtype] = (FLOAT, FLOAT)
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    same: bool = False
    alpha: float = 2.0
    beta: float = 1.0
    reduction: str = "mean"

    def __str__(self) -> str:
        others = [f"{x.name}={getattr(self, x.name)}" for x in fields(self) if getattr(self, x.name) != x.default]
        return " ".join(others).replace("torch.", "") or "default"

    @property
    def options(self) -> dict[str, Any]:
        axis = {"batch_first": self.batch_first} if len(self.shape) == 3 else {"time_dim": 0}
        return axis | {"reduction": self.reduction}

    def leaves(self, device: str) -> list[Tensor]:
        """Return raw and dropped as leaves that require gradients; they are one tensor if `same` is true."""
        generator, made = torch.Generator().manual_seed(len(str(self))), []
        for dtype, layout in zip(self.dtypes, self.layouts, strict=True):
            values = torch.randn(self.shape, generator=generator, dtype=DOUBLE).to(dtype).to(device)
            made.append(LAYOUTS[layout](values).detach().requires_grad_())
        return made[:1] * 2 if self.same else made


def _samples() -> Iterator[Sample]:
    odd_sizes = [(2, 37, 201), (1, 5, 3), (2, 1, 7), (1, 1, 1), (4, 9, 1), (2, 2, 16), (5, 3), (1, 8), (1, 150, 2)]
    for shape in [*odd_sizes, (0, 5, 8), (3, 0, 8), (3, 5, 0), (0, 4)]:
        yield from (Sample(shape), Sample(shape, same=True, batch_first=False))
    for dtype in (HALF, BF16, DOUBLE):
        yield from (Sample((2, 19, 136), dtypes=(dtype, dtype), same=same) for same in (False, True))
    for dtypes in ((HALF, FLOAT), (BF16, HALF), (FLOAT, DOUBLE), (DOUBLE, BF16)):
        yield Sample(dtypes=dtypes)
    for layout in ("transposed", "sliced", "every_other", "hidden_first", "expanded"):
        yield from (Sample(layouts=(layout, layout), batch_first=batch_first) for batch_first in (True, False))
        yield Sample(layouts=(layout, layout), same=True)
        yield Sample(layouts=("contiguous", layout), dtypes=(BF16, FLOAT))
    for alpha, beta in ((0.0, 1.0), (2.0, 0.0), (1e-4, 3.0), (2.0, 1e6)):
        yield Sample(alpha=alpha, beta=beta)
        yield Sample(alpha=alpha, beta=beta, same=True, batch_first=False)
    yield from (Sample(reduction="sum"), Sample((4, 1, 6), reduction="sum", same=True))


SAMPLES = list(dict.fromkeys(_samples()))
