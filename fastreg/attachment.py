"""What a training step gives to regularize, and its capture by forward hooks on an RNN and its dropout."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import is_list
from fastreg.penalty import fused_ar_tar
from fastreg.problem import ARTAR
from fastreg.rnn_dropout import FusedRNNDropout, Waiting


class Part(NamedTuple):
    """What one call of `fused_ar_tar` regularizes, and its penalty where a `FusedRNNDropout` took it along."""

    raw: Any
    dropped: Any
    batch_first: bool
    lengths: Tensor | None = None
    taken: ARTAR | None = None
    taken_of: tuple[float, ...] = ()  # the coefficients, and the versions of the activations

    @classmethod
    def take(cls, dropout: FusedRNNDropout, waiting: Waiting | None, raw: Any, dropped: Any) -> Part:
        """The part of a dropout that put out `dropped`, with what waited in it where that is of these very tensors."""
        part = cls(raw, raw if dropout.ar_of == "raw" else dropped, dropout.batch_first)
        # A hook or a subclass may have put another tensor in the place of what went in or came out.
        if waiting is None or waiting.raw is not raw or waiting.dropped is not dropped:
            return part
        return part._replace(taken=waiting.terms, taken_of=part._state(*waiting.coefficients))

    def penalty(self, alpha: float, beta: float) -> ARTAR:
        """What was taken along, if that is still it, else formed now."""
        if self.taken is not None and self.taken_of == self._state(alpha, beta):
            return self.taken
        options: Any = {"batch_first": self.batch_first, "lengths": self.lengths, "return_terms": True}
        return fused_ar_tar(self.raw, self.dropped, alpha, beta, **options)

    def _state(self, alpha: float, beta: float) -> tuple[float, ...]:
        return alpha, beta, _data(self.raw)._version, _data(self.dropped)._version


class Owner(Protocol):
    """What an attachment needs of the regularizer that made it."""

    alpha: float
    beta: float
    _attached: list[Attachment]


@dataclass
class _Capture:
    """One run of an attached RNN."""

    raw: Any
    dropped: Any
    nodes: frozenset[Any]  # of the autograd graph, where its outputs come from
    grad_enabled: bool
    weights: int  # their version: the graph of a run before an optimizer's step is of no use
    versions: list[tuple[Tensor, int]]  # of the activations: shows a change in place
    part: Part | None = None  # from a FusedRNNDropout


class Attachment:
    """The hooks on one RNN and its dropout, until `remove()`. In a copy of the model they do nothing."""

    def __init__(self, owner: Owner, rnn: nn.LSTM | nn.GRU | nn.RNN, dropout: nn.Module | None) -> None:
        self.rnn, self.dropout = rnn, dropout
        self.captures: list[_Capture] = []
        self._owner = weakref.ref(owner, lambda _: self.clear())  # without it, nobody would empty the captures
        self._hooks = [rnn.register_forward_hook(self._after_rnn)]
        if dropout is not None:
            self._hooks.append(dropout.register_forward_hook(self._after_dropout, with_kwargs=True))
        if isinstance(dropout, FusedRNNDropout):
            self._hooks.append(dropout.register_forward_pre_hook(self._before_dropout))

    def __getstate__(self) -> dict[str, Any]:
        return {"rnn": None, "dropout": None, "captures": [], "_owner": nobody, "_hooks": []}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off, and drop what they captured."""
        for hook in self._hooks:
            hook.remove()
        self.clear()
        owner, self._owner = self._owner(), nobody
        if owner is not None:
            owner._attached.remove(self)

    def clear(self) -> None:
        """Drop what is captured."""
        self.captures.clear()
        if isinstance(self.dropout, FusedRNNDropout):
            self.dropout._waiting = self.dropout._lent = None

    def _after_rnn(self, rnn: nn.Module, _: Any, output: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # torch.compile breaks its graph here, as it must
        if self._owner() is None or in_backward or not rnn.training or torch.is_inference_mode_enabled():
            return
        raw, hidden = output
        outputs = [_data(raw), *(hidden if is_list(hidden) else [hidden])]
        capture = _Capture(
            raw=raw,
            dropped=raw if self.dropout is None else None,
            nodes=frozenset(x.grad_fn for x in outputs) - {None},
            grad_enabled=torch.is_grad_enabled(),
            weights=sum(p._version for p in rnn.parameters()),
            versions=[(outputs[0], outputs[0]._version)],
        )
        self.captures = [c for c in self.captures if c.nodes and c.weights == capture.weights] + [capture]

    def _before_dropout(self, dropout: Any, _: Any) -> None:
        owner = self._owner()
        if owner is not None and dropout.training:
            dropout._lent = owner.alpha, owner.beta

    def _after_dropout(self, dropout: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for capture in self.captures:
            raw, data = capture.raw, _data(capture.raw)
            if any(x is raw or x is data for x in (*args, *kwargs.values())):
                if not isinstance(output, (Tensor, PackedSequence)):
                    raise TypeError(
                        f"dropout: expected the attached {type(dropout).__name__} to return a tensor, got "
                        f"{type(output).__name__}"
                    )
                packed = isinstance(raw, PackedSequence) and isinstance(output, Tensor)
                capture.dropped = raw._replace(data=output) if packed else output  # pyright: ignore
                capture.versions.append((_data(output), _data(output)._version))
                capture.grad_enabled &= torch.is_grad_enabled()
                if isinstance(dropout, FusedRNNDropout):
                    waiting, dropout._waiting = dropout._waiting, None
                    if packed and waiting is not None:  # it took the rows for one sequence
                        raise TypeError(
                            "FusedRNNDropout: expected the RNN's output as a tensor, got the data of a PackedSequence, "
                            "whose rows are of several sequences; use another dropout with packed sequences"
                        )
                    capture.part = Part.take(dropout, waiting, raw, capture.dropped)

    def parts(self, loss: Tensor) -> list[Part]:
        """What this step's runs add to the loss."""
        captures = self.captures
        if len(captures) > 1 or not self.rnn.training:
            latest = captures[-1:] if self.rnn.training else []
            captures = [c for c in captures if _depends(loss, c.nodes)] or latest
        for capture in captures:
            self._check(capture, loss)
        return [c.part or Part(c.raw, c.dropped, self.rnn.batch_first) for c in captures]

    def _check(self, capture: _Capture, loss: Tensor) -> None:
        rnn = type(self.rnn).__name__
        if loss.requires_grad and not capture.grad_enabled:
            raise RuntimeError(
                f"on_backward_begin: the {rnn} or its dropout ran without gradients, so that the penalty's would "
                "be lost. For activation checkpointing pass use_reentrant=False; else run both outside torch.no_grad()"
            )
        if capture.dropped is None:
            raise RuntimeError(
                f"on_backward_begin: the attached {type(self.dropout).__name__} did not get the output of the {rnn}: "
                "something lies between them (packing, padding, a slice, another module), or the model was compiled "
                "before attach(). Attach the module that takes that very tensor, or none, or use on_loss_begin"
            )
        if any(x._version != version for x, version in capture.versions):
            raise RuntimeError(
                f"on_backward_begin: the output of the {rnn} or of its dropout was changed in place after it was "
                "captured; use Dropout(inplace=False), and no operation like relu_() on it"
            )


def nobody() -> None:
    """The owner of a copy, or of what was removed."""


def _data(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _depends(loss: Tensor, nodes: frozenset[Any]) -> bool:
    """Whether the graph of `loss` has one of the nodes; the nearest are looked at first."""
    queue: deque[Any] = deque([loss.grad_fn])
    seen: set[Any] = {None}
    while queue:
        node = queue.popleft()
        if node in nodes:
            return True
        if node not in seen:
            seen.add(node)
            queue.extend(following for following, _ in node.next_functions)
    return False
