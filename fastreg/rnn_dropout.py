"""`FusedRNNDropout`: variational dropout that forms the penalty in its own pass and keeps it until somebody takes it.

A training loop takes the terms alone, by `take()`. A regularizer takes them with the activations they were formed of,
by `hand_over()`, and so can tell whether they are still those of its step: see `fastreg.regularizer`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import check_coefficient, check_flags, check_probability
from fastreg.dropout import drop_and_penalize
from fastreg.penalty import fused_ar_tar
from fastreg.prepare import coefficient, plain
from fastreg.problem import ARTAR, Call, Coefficient, is_list, is_on


@dataclass(frozen=True, eq=False)  # no NamedTuple: torch 2.11 fails to compile an attached dropout that makes one
class Activations:
    """Hold what one call of `fused_ar_tar` takes, and its result where a dropout has formed it already.

    Attributes:
        raw, dropped: as `fused_ar_tar` takes them; one object where AR is of raw.
        batch_first, lengths, valid: as `fused_ar_tar` takes them.
        terms: the result, or `None`.
        coefficients: alpha and beta, which `terms` was formed with.
        versions: those of tensors when `terms` was formed; a change in place raises a tensor's version.
    """

    raw: Any
    dropped: Any
    batch_first: bool
    lengths: Tensor | None = None
    valid: Tensor | None = None
    terms: ARTAR | None = None
    coefficients: tuple[Coefficient, Coefficient] | None = None
    versions: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Return how many sequences of how many time steps there are; `None` where the shape does not tell."""
        shape = tensor_of(self.raw[-1] if is_list(self.raw) else self.raw).shape
        if len(shape) != 3:
            return None
        return (shape[0], shape[1]) if self.batch_first else (shape[1], shape[0])

    def with_versions(self) -> Activations:
        """Return these activations with the versions that their tensors have now."""
        return replace(self, versions=self._versions_now())

    def or_formed(self, formed: Activations | None) -> Activations:
        """Return `formed`, which spares a pass, if it is of these very tensors; else these activations."""
        if (
            formed is not None
            and formed.raw is self.raw
            and formed.dropped is self.dropped
            and formed.batch_first == self.batch_first
            and formed.lengths is self.lengths
            and formed.valid is self.valid
        ):
            return formed
        return self

    def penalty(self, alpha: Coefficient, beta: Coefficient) -> ARTAR:
        """Return the terms if they are of these coefficients and of unchanged tensors; else form the penalty now.

        Raises:
            TypeError, ValueError: as `fused_ar_tar`.
        """
        if self.terms is not None and self._with(alpha, beta) and self.versions == self._versions_now():
            return self.terms
        steps: Any = {"batch_first": self.batch_first, "lengths": self.lengths, "valid": self.valid}
        return fused_ar_tar(self.raw, self.dropped, alpha, beta, return_terms=True, **steps)

    def _with(self, *coefficients: Coefficient) -> bool:
        """Tell whether the terms were formed with these coefficients: the same tensors, or equal numbers."""
        pairs = zip(self.coefficients or (), coefficients, strict=True)
        return all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in pairs)

    def _versions_now(self) -> tuple[int, ...]:
        tensors = [tensor_of(self.raw), tensor_of(self.dropped), self.valid, *(self.coefficients or ())]
        return tuple(x._version for x in tensors if isinstance(x, Tensor) and not x.is_inference())


@dataclass(frozen=True, eq=False)
class Formed:
    """Hold what a forward has formed.

    Attributes:
        activations: with their penalty.
        terms: the penalty.
        own: whether the coefficients are the module's own, so that it is its user who takes the penalty.
        grad_enabled: whether gradients were enabled.
    """

    activations: Activations
    terms: ARTAR
    own: bool
    grad_enabled: bool


class FusedRNNDropout(nn.Module):
    """Apply variational dropout, and form AR and TAR in the same pass.

    It takes the place of fastai's `RNNDropout` or a `LockedDropout`. The penalty of the last forward in training stays
    in the module until `take()`, with the forward's input and output. It is part of neither the state dict nor a copy
    or pickle of the module. Under activation checkpointing use `use_reentrant=False`: a reentrant one runs the forward
    without gradients, and the penalty has none.

    Args:
        p: the probability to drop a unit, from 0 to below 1.
        alpha: coefficient of AR, as for `fused_ar_tar`; an attribute, which a schedule may change, like `beta`.
        beta: coefficient of TAR.
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
        alpha: Coefficient = 0.0,
        beta: Coefficient = 0.0,
        *,
        batch_first: bool = True,
        ar_of: Literal["dropped", "raw"] = "dropped",
    ) -> None:
        super().__init__()
        if ar_of not in ("dropped", "raw"):
            raise ValueError(f"ar_of: expected 'dropped' or 'raw', got {ar_of!r}")
        check_probability(p)
        check_coefficient("alpha", alpha)
        check_coefficient("beta", beta)
        check_flags(batch_first=batch_first)
        self.p, self.alpha, self.beta = float(p), coefficient(alpha), coefficient(beta)
        self.batch_first, self.ar_of = batch_first, ar_of
        self._formed: Formed | None = None
        self._next: tuple[Coefficient, Coefficient, Tensor | None] | None = None
        self._warned: tuple[str, ...] = ()

    def forward(self, raw: Tensor, p: float | None = None, valid: Tensor | None = None) -> Tensor:
        """Drop units in training, and form the penalty; in evaluation return `raw` itself.

        Args:
            raw: the RNN's output: `(batch, time, hidden)`, or `(time, batch, hidden)` with `batch_first=False`, or
                `(time, hidden)` for one sequence.
            p: the probability to drop a unit in this forward, as a `LockedDropout` takes it; `None` for the module's.
            valid: which time steps count, as for `fused_ar_tar`.

        Warns:
            UserWarning: nobody took the penalty of the last forward; once.
        """
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            if self.training:
                raise RuntimeError(
                    "FusedRNNDropout: TorchScript cannot form a penalty; call eval(), or do not script it"
                )
            return raw
        else:  # which TorchScript does not compile
            return self._drop(raw, p, valid)

    def _drop(self, raw: Tensor, p: float | None, valid: Tensor | None) -> Tensor:
        """Run the forward outside of TorchScript."""
        alpha, beta, steps = self._next or (self.alpha, self.beta, None)
        untaken, own = self._formed, self._next is None
        self.clear()
        if not self.training:
            return raw
        if untaken is not None and untaken.own and untaken.terms.penalty.requires_grad:
            self._warn_once(
                "the penalty of the last forward in training is dropped, as nobody took it: add the penalty of take() "
                "to the loss after each forward, or attach() the module to a regularizer; where nothing is to be "
                "regularized, use another dropout"
            )
        if own and getattr(self, "_is_replica", False) and (is_on(alpha) or is_on(beta)):
            raise RuntimeError(
                "FusedRNNDropout: DataParallel runs a replica on each device, whose penalty nobody can take. Use "
                "DistributedDataParallel; or let the model return (decoded, raw, dropped), which DataParallel gathers, "
                "for RNNRegularizer.on_loss_begin, with alpha and beta of this module 0"
            )
        valid = steps if valid is None else valid
        ar_of_raw = self.ar_of == "raw"
        call = Call(
            *(plain(raw), None, plain(alpha), plain(beta), None, plain(valid)),
            *(self.batch_first, "mean", True, ar_of_raw),
        )
        dropped, penalty, terms = drop_and_penalize(call, self.p if p is None else p)
        dropped = raw if dropped is None else dropped
        # Inside a backward, activation checkpointing runs the forward again, whose penalty the loss has already. Code
        # compiled by torch.compile cannot ask, and need not: torch refuses to checkpoint this module there.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            squared = raw if ar_of_raw else dropped
            formed, coefficients = ARTAR(penalty, *(terms or ())), (alpha, beta)
            activations = Activations(raw, squared, self.batch_first, None, valid, formed, coefficients)
            self._formed = Formed(activations, formed, own, torch.is_grad_enabled())
        return dropped

    def take(self) -> ARTAR | None:
        """Return the penalty of the last forward, once; `None` if there is none or that was in evaluation.

        Warns:
            UserWarning: the forward ran without gradients, and now they are enabled; once.
        """
        formed, self._formed = self._formed, None
        if formed is None:
            return None
        if torch.is_grad_enabled() and not formed.grad_enabled:
            self._warn_once(
                "the penalty has no gradient, as the forward ran without: for activation checkpointing pass "
                "use_reentrant=False, else run the forward outside torch.no_grad()"
            )
        return formed.terms

    def hand_over(self) -> Activations | None:
        """Return the activations of the last forward with their penalty, once, where `take()` returns the penalty.

        Call it right after the forward: what is changed in place from then on is noticed.
        """
        formed, self._formed = self._formed, None
        return None if formed is None else formed.activations.with_versions()

    def use_once(self, alpha: Coefficient, beta: Coefficient, valid: Tensor | None = None) -> None:
        """Form the penalty of the next forward, and of no other, with these coefficients and valid steps.

        The forward raises what is wrong with them. Valid steps that it gets itself go before these.
        """
        self._next = alpha, beta, valid

    def clear(self) -> None:
        """Drop the penalty of the last forward, and what `use_once` was told."""
        self._formed = self._next = None

    def _warn_once(self, message: str) -> None:
        """Warn of something for the first time, in code that is not compiled."""
        if message not in self._warned and not torch.compiler.is_compiling():
            self._warned = (*self._warned, message)  # of any kind: 0.2.0 pickled a frozenset
            warnings.warn(f"FusedRNNDropout: {message}", stacklevel=3)

    def extra_repr(self) -> str:
        """Describe the module's arguments for `print(module)`."""
        extra = [] if self.batch_first else ["batch_first=False"]
        extra += [] if self.ar_of == "dropped" else [f"ar_of={self.ar_of!r}"]
        alpha, beta = ("a tensor" if isinstance(x, Tensor) else f"{x:g}" for x in (self.alpha, self.beta))
        return ", ".join([f"p={self.p:g}, alpha={alpha}, beta={beta}", *extra])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the penalty of the last forward out of a copy or a pickle."""
        return {**self.__dict__, "_formed": None, "_next": None}


def tensor_of(x: Tensor | PackedSequence) -> Tensor:
    """Return the tensor itself, or the rows of a `PackedSequence`."""
    return x.data if isinstance(x, PackedSequence) else x
