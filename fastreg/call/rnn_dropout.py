"""`FusedRNNDropout`: variational dropout that computes the penalty in the same pass, and keeps it until `take()`.

If the module is attached to a regularizer, the hooks pass masks and a `Loan` to its forward. The loan has the
regularizer's coefficients and the axis of time, and the forward puts the penalty into the loan instead of keeping it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastreg.call.arguments import check_coefficient, check_probability, time_axis_of
from fastreg.call.dropout import Drop, drop_and_penalize
from fastreg.call.operation import coefficient
from fastreg.call.private import current, version_of
from fastreg.call.problem import ARTAR, Coefficient, Options, TimeAxis, is_on
from fastreg.call.steps import given_steps
from fastreg.call.torch_state import level_of_caller

NO_COEFFICIENTS = (
    "there is no penalty, because the module has neither alpha nor beta, and did not get the output of an RNN that a "
    "regularizer has attached together with it. Write FusedRNNDropout(p, alpha=2.0, beta=1.0), or call "
    "regularizer.attach(rnn, dropout). For dropout without a penalty, write FusedRNNDropout(p, 0, 0)"
)


@dataclass(eq=False)
class Loan:
    """Lend coefficients and the axis of time for one forward, and hold the penalty that the forward computes with them.

    Attributes:
        alpha: the coefficient of AR.
        beta: the coefficient of TAR.
        time_axis: the axis of time.
        terms: the penalty and its terms; `None` in evaluation and in compiled code.
        dropped: the output from which the penalty was computed.
        version: how often this output had been changed in place.
    """

    alpha: Coefficient
    beta: Coefficient
    time_axis: TimeAxis
    terms: ARTAR | None = None
    dropped: Tensor | None = None
    version: int = 0


class FusedRNNDropout(nn.Module):
    """Apply variational dropout, and compute AR and TAR in the same pass.

    Use it instead of fastai's `RNNDropout` or a `LockedDropout`. Until `take()`, the module keeps the penalty of its
    last forward in training, and the input and output of that forward. State dicts, copies and pickles do not contain
    them. Under activation checkpointing pass `use_reentrant=False`. A reentrant checkpoint would run the forward
    without gradients, and then the penalty would have no gradient.

    Args:
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, as for `fused_ar_tar`; an attribute, which a schedule may change, like `beta`. If both
            are `None`, they come from the regularizer that attaches the module; if only one is, it is 0.
        beta: coefficient of TAR, as for alpha.
        batch_first: `False` for `(time, batch, hidden)`; `None` means `True`.
        time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.
        ar_of: the tensor whose mean square is AR: `"dropped"`, as in Merity et al. and fastai v2, or `"raw"`, as in
            fastai v1.

    Raises:
        TypeError: an argument has the wrong type; the message names it. A forward raises as `fused_dropout_ar_tar`.
        ValueError: an argument has the wrong value; the message names it.

    Examples:
        >>> rnn, dropout = torch.nn.GRU(8, 16, batch_first=True), FusedRNNDropout(0.4, alpha=2.0, beta=1.0)
        >>> raw, _ = rnn(torch.randn(4, 10, 8))
        >>> dropped = dropout(raw)
        >>> loss = dropped.square().mean()  # the loss of a model
        >>> if (terms := dropout.take()) is not None:  # there is none in evaluation
        ...     loss = loss + terms.penalty
        >>> loss.backward()
    """

    _is_replica = False  # DataParallel sets it on its replicas

    def __init__(
        self,
        p: float = 0.5,
        alpha: Coefficient | None = None,
        beta: Coefficient | None = None,
        *,
        batch_first: bool | None = None,
        time_dim: int | None = None,
        ar_of: Literal["dropped", "raw"] = "dropped",
    ) -> None:
        super().__init__()
        if ar_of not in ("dropped", "raw"):
            raise ValueError(f"ar_of: expected 'dropped' or 'raw', got {ar_of!r}")
        check_probability(p)
        self._is_said = not (alpha is None and beta is None)  # whether a coefficient was given
        self._ran_without = False  # whether a forward in training had neither coefficients nor a loan
        alpha, beta = (0.0 if x is None else x for x in (alpha, beta))
        check_coefficient("alpha", alpha)
        check_coefficient("beta", beta)
        self.p, self.alpha, self.beta = float(p), coefficient(alpha), coefficient(beta)
        time_axis = time_axis_of(batch_first, time_dim)
        self.batch_first, self.time_dim = time_axis.batch_first is not False, time_axis.time_dim
        self.ar_of = ar_of
        self.formed: tuple[ARTAR, bool] | None = None  # the last penalty, and whether gradients were enabled
        self._warned: tuple[str, ...] = ()

    def forward(
        self,
        raw: Tensor,
        p: float | None = None,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        loan: Loan | None = None,
    ) -> Tensor:
        """Drop units and compute the penalty in training; return `raw` itself in evaluation.

        Args:
            raw: the RNN's output: `(batch, time, hidden)`, or `(time, batch, hidden)` with `batch_first=False`, or any
                tensor with `time_dim`. It is 0 for one sequence, `(time, hidden)`.
            p: the probability to drop a unit in this forward, as a `LockedDropout` takes it; `None` for the module's.
            valid: a mask of the time steps that count, as for `fused_ar_tar`.
            starts: a mask of the time steps at which a segment starts, as for `fused_ar_tar`.
            loan: the coefficients of a regularizer to which the module is attached; only hooks pass it.

        Warns:
            UserWarning: the penalty of the last forward was not taken; or the second forward in training
                has no coefficients, neither of the module nor of a regularizer. The module gives each warning once.
        """
        untaken, self.formed = self.formed, None
        is_on_itself = is_on(self.alpha) or is_on(self.beta)
        if is_on_itself and untaken is not None and untaken[0].penalty.requires_grad:
            self._warn_once(
                "the penalty of the last forward in training is discarded, as it was not taken: add the penalty of "
                "take() to the loss after each forward, or attach() the module to a regularizer, or use another dropout"
            )
        if not self.training:
            return raw
        if (is_on_itself or not self._is_said) and self._is_replica:
            raise RuntimeError(
                "FusedRNNDropout: DataParallel runs a replica on each device, and the penalty of a replica is lost. "
                "Use DistributedDataParallel. Or set alpha and beta of this module to 0, let the model return "
                "(decoded, raw, dropped), which DataParallel gathers, and pass them to RNNRegularizer.on_loss_begin"
            )
        if not torch.compiler.is_compiling():
            if not (is_on_itself or self._is_said or NO_COEFFICIENTS in self._warned):
                self._note(loan)
        elif loan is not None:  # the hooks compute the penalty, as each coefficient would compile the code again
            loan = Loan(0.0, 0.0, loan.time_axis)
        lender, time_axis = (self, self.time_axis()) if loan is None else (loan, loan.time_axis)
        coefficients, steps = (lender.alpha, lender.beta), given_steps(None, valid, starts)
        batch_first, time_dim = time_axis
        options = Options(batch_first, time_dim, measured=True, ar_of_raw=self.ar_of == "raw")
        dropped, formed = drop_and_penalize(raw, coefficients, steps, options, Drop(self.p if p is None else p))
        # Within a backward, activation checkpointing runs the forward again; the loss already has its penalty. Compiled
        # code cannot ask for this, and need not, because torch refuses to checkpoint this module there.
        if loan is not None:
            loan.terms, loan.dropped, loan.version = formed, dropped, version_of(dropped)
        elif torch.compiler.is_compiling() or current() == -1:
            self.formed = formed, torch.is_grad_enabled()
        return dropped

    def time_axis(self) -> TimeAxis:
        """Return the axis of time."""
        return TimeAxis(self.batch_first) if self.time_dim is None else TimeAxis(None, self.time_dim)

    def take(self) -> ARTAR | None:
        """Return the penalty of the last forward, once.

        Returns:
            The penalty, and its terms, which are detached. `None` if the last forward was in evaluation, or if its
                penalty went to a regularizer, or to an earlier `take()`.

        Raises:
            RuntimeError: the last forward had no coefficients.

        Warns:
            UserWarning: the forward ran without gradients, and now gradients are enabled; the module warns once.
        """
        (terms, grad_enabled), self.formed = self.formed or (None, True), None
        if terms is not None and not self._has_own():
            raise RuntimeError(f"FusedRNNDropout: {NO_COEFFICIENTS}")
        if torch.is_grad_enabled() and not grad_enabled:
            self._warn_once(
                "the penalty has no gradient, because the forward ran without gradients: for activation checkpointing "
                "pass use_reentrant=False, otherwise run the forward outside torch.no_grad()"
            )
        return terms

    def _has_own(self) -> bool:
        """Return whether the module itself has coefficients, from the constructor or from a schedule."""
        return self._is_said or is_on(self.alpha) or is_on(self.beta)

    def _note(self, loan: Loan | None) -> None:
        """Warn of a second forward in training without coefficients, unless a regularizer has lent some before."""
        if loan is not None:
            self._warned = (*self._warned, NO_COEFFICIENTS)  # it need not be given any more
        elif torch.is_grad_enabled() and current() == -1:
            if self._ran_without:
                self._warn_once(NO_COEFFICIENTS)
            self._ran_without = True

    def _warn_once(self, message: str) -> None:
        """Give a warning the first time; compiled code gives none."""
        if message not in self._warned and not torch.compiler.is_compiling():
            self._warned = (*self._warned, message)
            warnings.warn(f"FusedRNNDropout: {message}", stacklevel=level_of_caller())

    def extra_repr(self) -> str:
        """Describe the module's arguments for `print(module)`."""
        extra = [] if self.time_axis() == TimeAxis() else [str(self.time_axis())]
        extra += [] if self.ar_of == "dropped" else [f"ar_of={self.ar_of!r}"]
        coefficients = [f"alpha={self.alpha}, beta={self.beta}"] if self._has_own() else []
        return ", ".join([f"p={self.p:g}", *coefficients, *extra])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the penalty of the last forward out of a copy or a pickle."""
        return {**self.__dict__, "formed": None, "_warned": (), "_ran_without": False}
