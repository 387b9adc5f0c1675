"""`FusedDropout` and `FusedRNNDropout`, which compute the penalty in the pass of a dropout, and keep it until `take()`.

`DropoutWithPenalty` is all of them except for the mask; attached modules accept any dropout that is derived from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastreg.call.arguments import check_coefficient, check_probability, check_tensor, time_axis_of
from fastreg.call.dropout import Drop, drop_and_penalize
from fastreg.call.private import current
from fastreg.call.problem import ARTAR, Coefficient, Options, Penalty, TimeAxis, is_on, moved
from fastreg.call.steps import GivenSteps, given_steps
from fastreg.call.torch_state import level_of_caller, untraced

UNTAKEN = (
    "the penalty of the last forward in training is discarded, as it was not taken: add the penalty of take() to the "
    "loss after each forward, or attach() the module to a regularizer, or use another dropout"
)
WITHOUT_GRADIENT = (
    "the penalty has no gradient, because the forward ran without gradients: for activation checkpointing pass "
    "use_reentrant=False, otherwise run the forward outside torch.no_grad()"
)
REPLICATED = (
    "DataParallel runs a replica on each device, and the penalty of a replica is lost. Use "
    "DistributedDataParallel. Or set alpha and beta of this module to 0, let the model return (decoded, raw, dropped), "
    "which DataParallel gathers, and pass them to RNNRegularizer.on_loss_begin"
)


class Request(NamedTuple):
    """Say which penalty a forward computes.

    Attributes:
        coefficients: alpha and beta.
        time_axis: the axis of time of raw.
        valid: a mask of the time steps that count, as for `fused_ar_tar`, or `None`.
        starts: a mask of the time steps at which a segment starts, as for `fused_ar_tar`, or `None`.
    """

    coefficients: Sequence[Coefficient]
    time_axis: TimeAxis
    valid: Tensor | None = None
    starts: Tensor | None = None

    def steps(self) -> GivenSteps | None:
        """Return the time steps that count, or `None` if all do."""
        return given_steps(None, self.valid, self.starts)

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of valid steps and of starts, by their names, where there is one."""
        return {name: x for name, x in (("valid", self.valid), ("starts", self.starts)) if x is not None}

    def is_on(self) -> bool:
        """Return whether any term is in the penalty."""
        return any(map(is_on, self.coefficients))


class Formed(NamedTuple):
    """Hold the penalty of a forward.

    Attributes:
        penalty: the penalty and its terms.
        grad_enabled: whether gradients were enabled.
        request: what the forward has computed.
    """

    penalty: Penalty
    grad_enabled: bool
    request: Request

    def has_gradient(self) -> bool:
        """Return whether the penalty may have a gradient."""
        return self.grad_enabled and self.request.is_on()


class DropoutWithPenalty(nn.Module):
    """Compute the penalty in the forward of a dropout, and keep it until `take()`; a subclass says what is dropped.

    Args:
        p, alpha, beta, batch_first, time_dim: as for `FusedRNNDropout`.

    Attributes:
        locked: whether a unit is dropped at all time steps, or each element by itself.
        formed: the penalty of the last forward in training, until it is taken.

    Raises:
        TypeError, ValueError: as `FusedRNNDropout`.
    """

    locked: ClassVar[bool]
    _is_replica = False  # DataParallel sets it on its replicas

    def __init__(
        self,
        p: float,
        alpha: Coefficient,
        beta: Coefficient,
        *,
        batch_first: bool | None = None,
        time_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_probability(p)
        self.p, self.alpha, self.beta = float(p), check_coefficient("alpha", alpha), check_coefficient("beta", beta)
        self.batch_first, self.time_dim = time_axis_of(batch_first, time_dim)
        self.formed: Formed | None = None
        self._warned: tuple[str, ...] = ()

    def forward(
        self,
        raw: Tensor,
        p: float | None = None,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        *,
        request: Request | None = None,
    ) -> Tensor:
        """Drop units and compute the penalty in training; return `raw` itself in evaluation.

        Args:
            raw: the RNN's output: `(batch, time, hidden)`, or `(time, batch, hidden)` with `batch_first=False`, or any
                tensor with `time_dim`. It is 0 for one sequence, `(time, hidden)`.
            p: the probability to drop a unit in this forward, as a `LockedDropout` takes it; `None` for the module's.
            valid: a mask of the time steps that count, as for `fused_ar_tar`.
            starts: a mask of the time steps at which a segment starts, as for `fused_ar_tar`.
            request: the penalty that a regularizer wants, in evaluation, too, with its coefficients, axis of time and
                masks, if there are no others above; `None` for the module's coefficients and axis.

        Warns:
            UserWarning: the penalty of the last forward was not taken; the module warns once.
        """
        untaken, self.formed = self.formed, None
        if untaken is not None and getattr(raw, "requires_grad", False) and untaken.has_gradient():
            self._warn_once(UNTAKEN)
        if request is None:
            own = Request((self.alpha, self.beta), self.time_axis(), valid, starts)
            return self.form(raw, p, own) if self.training else raw
        valid, starts = request.valid if valid is None else valid, request.starts if starts is None else starts
        # Each step may have other coefficients, for which a compiler would compile the forward anew.
        return self.form_outside(raw, p, Request(request.coefficients, request.time_axis, valid, starts))

    def form(self, raw: Tensor, p: float | None, request: Request) -> Tensor:
        """Return dropped, and keep the penalty."""
        if self._is_replica and request.is_on():
            raise RuntimeError(f"{type(self).__name__}: {REPLICATED}")
        request = request._replace(coefficients=moved(request.coefficients, check_tensor("raw", raw).device))
        drop = Drop(self.p if p is None else p, training=self.training, locked=self.locked)
        options = Options(*request.time_axis, return_terms=True)
        dropped, penalty = drop_and_penalize(raw, request.coefficients, request.steps(), options, drop)
        # Within a backward, activation checkpointing runs the forward again; the loss already has its penalty. Compiled
        # code cannot ask for this, and need not, because torch refuses to checkpoint this module there.
        if torch.compiler.is_compiling() or current() == -1:
            self.formed = Formed(penalty, torch.is_grad_enabled(), request)
        return dropped

    form_outside = untraced(form)

    def time_axis(self) -> TimeAxis:
        """Return the axis of time."""
        return TimeAxis(self.batch_first, self.time_dim)

    def take(self) -> ARTAR | None:
        """Return the penalty of the last forward, once.

        Returns:
            The penalty, and its terms, which are detached. `None` if the last forward was in evaluation, or if its
                penalty went to a regularizer, or to an earlier `take()`.

        Warns:
            UserWarning: the forward ran without gradients, and now gradients are enabled; the module warns once.
        """
        formed = self.collect()
        if formed is None:
            return None
        if torch.is_grad_enabled() and not formed.grad_enabled:
            self._warn_once(WITHOUT_GRADIENT)
        return formed.penalty.split()

    def collect(self) -> Formed | None:
        """Return the penalty of the last forward as `take` does, with what it was computed of."""
        formed, self.formed = self.formed, None
        return formed

    def _warn_once(self, message: str) -> None:
        """Give a warning the first time; compiled code gives none."""
        if message not in self._warned and not torch.compiler.is_compiling():
            self._warned = (*self._warned, message)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=level_of_caller())

    def extra_repr(self) -> str:
        """Describe the module's arguments for `print(module)`."""
        extra = [] if self.time_axis() == TimeAxis() else [str(self.time_axis())]
        return ", ".join([f"p={self.p:g}", f"alpha={self.alpha}", f"beta={self.beta}", *extra])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the penalty of the last forward out of a copy or a pickle."""
        return {**self.__dict__, "formed": None, "_warned": ()}


class FusedRNNDropout(DropoutWithPenalty):
    """Apply variational dropout, and compute AR and TAR in the same pass.

    Use it instead of fastai's `RNNDropout` or a `LockedDropout`. Until `take()`, the module keeps the penalty of its
    last forward in training, and the input and output of that forward. State dicts, copies and pickles do not contain
    them. Under activation checkpointing pass `use_reentrant=False`. A reentrant checkpoint would run the forward
    without gradients, and then the penalty would have no gradient.

    Args:
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, as for `fused_ar_tar`; an attribute, which a schedule may change, like `beta`. A
            module that a regularizer attaches gets the regularizer's coefficients instead: pass 0 for both.
        beta: coefficient of TAR, as for alpha.
        batch_first: `False` for `(time, batch, hidden)`; `None` means `True`.
        time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.

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

    locked = True


class FusedDropout(DropoutWithPenalty):
    """Drop each element by itself, as `torch.nn.Dropout` does, and compute AR and TAR in the same pass.

    Use it instead of the `torch.nn.Dropout` behind an RNN. `FusedRNNDropout` describes its arguments, its penalty and
    its errors, and `fused_dropout_ar_tar` with `locked=False` describes its mask.

    Args:
        p: the probability to drop an element, from 0 to below 1.
        alpha: coefficient of AR, as for `FusedRNNDropout`.
        beta: coefficient of TAR, as for alpha.
        batch_first: `False` for `(time, batch, hidden)`; `None` means `True`.
        time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.

    Raises:
        TypeError: an argument has the wrong type; the message names it. A forward raises as `fused_dropout_ar_tar`.
        ValueError: an argument has the wrong value; the message names it.

    Examples:
        >>> rnn, dropout = torch.nn.LSTM(8, 16, batch_first=True), FusedDropout(0.4, alpha=2.0, beta=1.0)
        >>> raw, _ = rnn(torch.randn(4, 10, 8))
        >>> dropped = dropout(raw)
        >>> loss = dropped.square().mean()  # the loss of a model
        >>> if (terms := dropout.take()) is not None:  # there is none in evaluation
        ...     loss = loss + terms.penalty
        >>> loss.backward()
    """

    locked = False
