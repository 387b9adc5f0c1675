"""`OutputDropout`: a `FusedRNNDropout` in the place of the dropout that a framework's own model ends with."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.arguments import check_flags
from fastreg.attachment import Part, nobody
from fastreg.regularizer import RNNRegularizer
from fastreg.rnn_dropout import FusedRNNDropout


class OutputDropout(FusedRNNDropout):
    """Offers its penalty to the regularizer it is linked to, which takes that if the model's output is of this forward.

    Where it is not, or the coefficients have changed since, the regularizer forms the penalty itself. One that is not
    linked, as copies and pickles are not, nor any whose regularizer is gone, does what the original does.
    """

    def __init__(self, original: Any, **options: Any) -> None:
        super().__init__(original.p, **options)
        self._original = (original,)  # in a tuple, as it is no part of the model now
        self.linked: Callable[[], RNNRegularizer | None] = nobody
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        """The module whose place it takes, in the same state."""
        (original,) = self._original
        original.p = self.p
        return original.train(self.training)

    def forward(self, raw: Tensor) -> Tensor:
        """As `FusedRNNDropout`, with the coefficients of the regularizer."""
        regularizer = self.linked()
        if regularizer is not None:
            regularizer._offered = None
        if not self.training:
            return raw
        if regularizer is None or torch.is_inference_mode_enabled():
            return self.original(raw)
        self._lent = regularizer.alpha, regularizer.beta
        dropped = super().forward(raw)
        waiting, self._waiting = self._waiting, None
        if type(dropped) is not type(raw):
            dropped = dropped.as_subclass(type(raw))  # as the original's product is
        if waiting is not None:
            regularizer._offered = Part.take(self, waiting._replace(dropped=dropped), raw, dropped)
        return dropped

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"linked": nobody}


def link(model: nn.Module, regularizer: RNNRegularizer | None) -> None:
    """Link each `OutputDropout` of the model to the regularizer, or to none."""
    for module in model.modules():
        if isinstance(module, OutputDropout):
            module.linked = nobody if regularizer is None else weakref.ref(regularizer)


def check_fuse(learn: object, kind: type, **flags: object) -> None:
    """The arguments of `fuse` and `unfuse`."""
    if not isinstance(learn, kind):
        raise TypeError(f"learn: expected a {kind.__name__}, got {type(learn).__name__}")
    check_flags(**flags)


def swappable(model: Any, decoders: list[Any], original: type) -> list[Any]:
    """The decoders that `fuse` gives another dropout.

    Raises:
        ValueError: there are none, and none that have it already.
    """
    kinds = [type(decoder.output_dp) for decoder in decoders]
    if not any(kind is original or issubclass(kind, OutputDropout) for kind in kinds):
        subclasses = [kind.__name__ for kind in kinds if issubclass(kind, original)]
        what = f"{subclasses[0]} is a subclass, left alone" if subclasses else f"{type(model).__name__} has none"
        raise ValueError(
            "fuse: dropout=True takes the place of the RNNDropout of a LinearDecoder, which fastai's language models "
            f"end with; {what}, and fuse(learn) does without"
        )
    return [decoder for decoder, kind in zip(decoders, kinds, strict=True) if kind is original]
