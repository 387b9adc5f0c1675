"""`FusedRNNDropout`: variational dropout that computes the penalty in the same pass, and keeps it until `take()`.

If a regularizer has attached the module, raw carries a `Call`, and the forward computes the penalty of this call.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.arguments import check_coefficient, check_probability, time_axis_of
from fastreg.call.dropout import Drop, drop_and_penalize
from fastreg.call.operation import coefficient
from fastreg.call.private import current
from fastreg.call.problem import ARTAR, Coefficient, Options, Penalty, TimeAxis, is_on
from fastreg.call.steps import given_steps
from fastreg.call.torch_state import level_of_caller

NO_COEFFICIENTS = (
    "there is no penalty, because the module has neither alpha nor beta, and did not get the output of an RNN that a "
    "regularizer has attached together with it. Write FusedRNNDropout(p, alpha=2.0, beta=1.0), or call "
    "regularizer.attach(rnn, dropout). For dropout without a penalty, write FusedRNNDropout(p, 0, 0)"
)
UNTAKEN = (
    "the penalty of the last forward in training is discarded, as it was not taken: add the penalty of take() to the "
    "loss after each forward, or attach() the module to a regularizer, or use another dropout"
)


@dataclass(eq=False)
class Call:
    """Describe a call of an attached module, and the penalty of its output, for the dropout that gets raw.

    Attributes:
        attachment: the attachment of the module.
        run: the run, until the dropout has got raw; `None` in a recomputation.
        coefficients: alpha and beta, on the device of raw.
        masks: the masks of valid steps and of starts, by their names, where there is one.
        time_axis: the axis of time of raw.
        version: how often raw had been changed in place.
        packed: the `PackedSequence` whose data is raw, without the data; `None` if raw is not packed.
    """

    attachment: Any
    run: Any
    coefficients: Sequence[Any]
    masks: Mapping[str, Tensor]
    time_axis: TimeAxis
    version: int
    packed: PackedSequence | None

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # raw may be saved, and loaded with `weights_only=True` where fastreg is not installed


def calls_in(raw: object) -> list[Call]:
    """Return the calls in raw, one for each attached module that has returned it."""
    return [x for x in raw.__dict__.values() if isinstance(x, Call)] if isinstance(raw, Tensor) else []


class Formed(NamedTuple):
    """Hold the penalty of a forward in training.

    Attributes:
        penalty: the penalty and its terms.
        grad_enabled: whether gradients were enabled.
        call: the call that describes the penalty; `None` if the module itself does.
    """

    penalty: Penalty
    grad_enabled: bool
    call: Call | None


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
        alpha, beta = (0.0 if x is None else x for x in (alpha, beta))
        check_coefficient("alpha", alpha)
        check_coefficient("beta", beta)
        self.p, self.alpha, self.beta = float(p), coefficient(alpha), coefficient(beta)
        time_axis = time_axis_of(batch_first, time_dim)
        self.batch_first, self.time_dim = time_axis.batch_first is not False, time_axis.time_dim
        self.ar_of = ar_of
        self.formed: Formed | None = None  # the penalty of the last forward in training
        self._warned: tuple[str, ...] = ()

    def forward(
        self,
        raw: Tensor,
        p: float | None = None,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Drop units and compute the penalty in training; return `raw` itself in evaluation.

        Args:
            raw: the RNN's output: `(batch, time, hidden)`, or `(time, batch, hidden)` with `batch_first=False`, or any
                tensor with `time_dim`. It is 0 for one sequence, `(time, hidden)`.
            p: the probability to drop a unit in this forward, as a `LockedDropout` takes it; `None` for the module's.
            valid: a mask of the time steps that count, as for `fused_ar_tar`.
            starts: a mask of the time steps at which a segment starts, as for `fused_ar_tar`.

        Warns:
            UserWarning: the penalty of the last forward was not taken; or the second forward in training
                has no coefficients, neither of the module nor of a regularizer. The module gives each warning once.
        """
        untaken, self.formed = self.formed, None
        call, is_off = self._call_of(raw), self._is_said and not (is_on(self.alpha) or is_on(self.beta))
        if call is not None:
            given = {name: mask for name, mask in (("valid", valid), ("starts", starts)) if mask is not None}
            call.masks = {**call.masks, **given}
            valid, starts = call.masks.get("valid"), call.masks.get("starts")
        elif untaken is not None and untaken.grad_enabled and not is_off and getattr(raw, "requires_grad", False):
            self._warn_once(UNTAKEN if self._has_own() else NO_COEFFICIENTS)
        if not self.training:
            return raw
        if self._is_replica and not is_off:
            raise RuntimeError(
                "FusedRNNDropout: DataParallel runs a replica on each device, and the penalty of a replica is lost. "
                "Use DistributedDataParallel. Or set alpha and beta of this module to 0, let the model return "
                "(decoded, raw, dropped), which DataParallel gathers, and pass them to RNNRegularizer.on_loss_begin"
            )
        coefficients = (self.alpha, self.beta) if call is None else call.coefficients
        batch_first, time_dim = self.time_axis() if call is None else call.time_axis
        options = Options(batch_first, time_dim, return_terms=True)
        steps, drop = given_steps(None, valid, starts), Drop(self.p if p is None else p)
        dropped, penalty = drop_and_penalize(raw, coefficients, steps, options, drop)
        # Within a backward, activation checkpointing runs the forward again; the loss already has its penalty. Compiled
        # code cannot ask for this, and need not, because torch refuses to checkpoint this module there.
        if call is not None or torch.compiler.is_compiling() or current() == -1:
            self.formed = Formed(penalty, torch.is_grad_enabled(), call)
        return dropped

    def _call_of(self, raw: Tensor) -> Call | None:
        """Return the call of the attached module that has returned raw, if this is its dropout.

        In compiled code there is none: the hooks compute the penalty, as each coefficient would compile the code again.
        """
        calls = [] if torch.compiler.is_compiling() else calls_in(raw)
        return next((call for call in calls if call.attachment.is_dropout(self)), None)

    def take_of(self, call: Call) -> Penalty | None:
        """Return the penalty that the last forward has computed for a call of an attached module, once."""
        formed, self.formed = self.formed, None
        return formed.penalty if formed is not None and formed.call is call else None

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
        formed, self.formed = self.formed, None
        if formed is None or formed.call is not None:
            return None
        if not self._has_own():
            raise RuntimeError(f"FusedRNNDropout: {NO_COEFFICIENTS}")
        if torch.is_grad_enabled() and not formed.grad_enabled:
            self._warn_once(
                "the penalty has no gradient, because the forward ran without gradients: for activation checkpointing "
                "pass use_reentrant=False, otherwise run the forward outside torch.no_grad()"
            )
        return formed.penalty.split()

    def _has_own(self) -> bool:
        """Return whether the module itself has coefficients, from the constructor or from a schedule."""
        return self._is_said or is_on(self.alpha) or is_on(self.beta)

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
        return {**self.__dict__, "formed": None, "_warned": ()}
