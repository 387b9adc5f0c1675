"""`OutputDropout`: a `FusedRNNDropout` that replaces the last dropout of a fastai model.

Both fastai adapters, v1's and v2's, use this module to swap it in and out; it imports neither framework.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastreg.arguments import check_flags
from fastreg.attachment import nothing
from fastreg.capture import Captured, Mark, Run
from fastreg.dropout import carries
from fastreg.regularizer import RNNRegularizer
from fastreg.rnn_dropout import FusedRNNDropout


class OutputDropout(FusedRNNDropout):
    """Apply a model's output dropout, and have the regularizer that it is linked to capture its runs.

    The coefficients are those of the regularizer. Without a link, as in a copy or a pickle, or after the regularizer
    was freed, the module drops units as the original does.
    """

    def __init__(self, original: Any, **options: Any) -> None:
        super().__init__(original.p, **options)
        self._original = (original,)  # a tuple hides it from the model's list of modules
        self.linked: Callable[[], RNNRegularizer | None] = nothing
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        """Return the module whose place it takes, with its own p and mode."""
        (original,) = self._original
        original.p = self.p
        return original.train(self.training)

    def forward(
        self, raw: Tensor, p: float | None = None, valid: Tensor | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """Drop units of `raw` in training, as the original does from the same seed; return `raw` in evaluation."""
        regularizer = self.linked()
        if regularizer is not None:
            regularizer.capture(None)  # an earlier forward's output is out of date
        if not self.training:
            return raw
        if regularizer is None:
            original: Any = self.original
            original.p = self.p if p is None else p
            return original(raw)
        dropped = super().forward(raw, p, valid, starts)
        formed, self.formed = self.formed, None
        if type(dropped) is not type(raw):  # fastai's models keep subclasses of tensors, as the original dropout does
            dropped = dropped.as_subclass(type(raw))
        if formed is not None and carries(formed.dropped):
            captured, fused = Captured(raw), Captured(dropped)
            kept = captured if self.ar_of == "raw" else fused
            run = Run(captured, kept, None, formed.time_at, valid, starts, True, False, fused, formed.terms[1:])
            Mark(run, fused, formed.dropped)
            regularizer.capture(run)
        return dropped

    def __getstate__(self) -> dict[str, Any]:
        """Leave the link out of a copy or a pickle."""
        return super().__getstate__() | {"linked": nothing}


def link(model: nn.Module, regularizer: RNNRegularizer | None) -> None:
    """Link each `OutputDropout` of the model to the regularizer, or to none."""
    for module in model.modules():
        if isinstance(module, OutputDropout):
            module.linked = nothing if regularizer is None else weakref.ref(regularizer)


def check_learner(learn: object, kind: type) -> None:
    """Check for a learner of this kind.

    Raises:
        TypeError: it is anything else.
    """
    if not isinstance(learn, kind):
        raise TypeError(f"learn: expected a {kind.__name__}, got {type(learn).__name__}")


def check_fuse(learn: object, kind: type, dropout: object, rnn: object) -> str | None:
    """Check the learner that `fuse` gets, and its `dropout`: a flag, or with an `rnn` a path, which is returned.

    Raises:
        TypeError: `learn` is not of this kind, or `dropout` is neither.
    """
    check_learner(learn, kind)
    if rnn is None:
        check_flags(dropout=dropout)
        return None
    if isinstance(dropout, str):
        return dropout
    if dropout is not False and dropout is not None:
        raise TypeError(f"dropout: expected with rnn the path of a dropout, or False, got {dropout!r}")
    return None


def swappable(model: Any, decoders: list[Any], original: type) -> list[Any]:
    """Return the decoders whose dropout is the original, which `fuse` replaces.

    Raises:
        ValueError: no decoder has the original, and none has an `OutputDropout` already.
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
