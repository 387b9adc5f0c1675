"""`FusedRNNDropout`: variational dropout as a module, with the penalty."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastreg.arguments import check_coefficient, check_flags, check_probability, check_problem, check_tensor
from fastreg.dropout import dropout_and_penalty
from fastreg.penalty import penalty_of
from fastreg.problem import ARTAR, Layer


class Waiting(NamedTuple):
    """The penalty of a forward, and what it was formed of."""

    terms: ARTAR
    raw: Tensor
    dropped: Tensor
    coefficients: tuple[float, float]


class FusedRNNDropout(nn.Module):
    """Variational dropout that takes AR and TAR along, in the place of fastai's `RNNDropout` or a `LockedDropout`.

    The penalty of the last forward in training waits in the module until `take()`, with its input and output. It is
    part of neither the state dict nor a copy or pickle of the module. Under activation checkpointing use
    `use_reentrant=False`: a reentrant one runs the forward without gradients, and the penalty has none.

    Args:
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, finite and not negative.
        beta: coefficient of TAR, finite and not negative.
        batch_first: `False` for `(time, batch, hidden)`.
        ar_of: what AR is the mean square of: `"dropped"`, as Merity et al. and fastai v2 have it, or `"raw"`, as
            fastai v1 has it.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. In a forward, as
            `fused_dropout_ar_tar`.
    """

    def __init__(
        self,
        p: float = 0.5,
        alpha: float = 0.0,
        beta: float = 0.0,
        *,
        batch_first: bool = True,
        ar_of: Literal["dropped", "raw"] = "dropped",
    ) -> None:
        super().__init__()
        if ar_of not in ("dropped", "raw"):
            raise ValueError(f"ar_of: expected 'dropped' or 'raw', got {ar_of!r}")
        self.p = check_probability(p)
        self.alpha, self.beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)
        check_flags(batch_first=batch_first)
        self.batch_first, self.ar_of = batch_first, ar_of
        self._waiting: Waiting | None = None
        self._lent: tuple[float, float] | None = None  # coefficients of a regularizer, for one forward

    def forward(self, raw: Tensor) -> Tensor:
        """Drop units of `raw`, `(batch, time, hidden)`, in training; give `raw` itself in evaluation."""
        coefficients = self._lent or (self.alpha, self.beta)
        self._waiting = self._lent = None
        if not self.training:
            return raw
        problem = check_problem(*coefficients, self.batch_first)._replace(ar_of_raw=self.ar_of == "raw")
        layer = Layer(check_tensor("raw", raw), None)
        if self.p > 0:
            dropped, terms = dropout_and_penalty(layer, self.p, problem, return_terms=True)
        else:
            dropped, terms = raw, penalty_of(layer._replace(dropped=raw), problem, return_terms=True)
        # Inside a backward checkpointing recomputes. torch.compile cannot ask, and refuses to checkpoint this module.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._waiting = Waiting(ARTAR(*terms), raw, dropped, coefficients)
        return dropped

    def take(self) -> ARTAR | None:
        """Hand out the penalty of the last forward, once; `None` if there is none or that was in evaluation."""
        waiting, self._waiting = self._waiting, None
        return None if waiting is None else waiting.terms

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        extra = [] if self.batch_first else ["batch_first=False"]
        extra += [] if self.ar_of == "dropped" else [f"ar_of={self.ar_of!r}"]
        return ", ".join([f"p={self.p:g}, alpha={self.alpha:g}, beta={self.beta:g}", *extra])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": None, "_lent": None}
