"""`Attachment`: captures the runs of an RNN and of the dropout that follows it by forward hooks.

The hook on the RNN starts a capture, with all that has to be known of the moment: the place of the run in the autograd
graph, and the versions of tensors, which show a later change in place. The hook on the dropout completes it with the
activations. `fastreg.regularizer` tells when captures are used and when they are dropped.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.arguments import is_list
from fastreg.problem import Coefficient
from fastreg.rnn_dropout import Activations, FusedRNNDropout, tensor_of


class Owner(Protocol):
    """Declare what an attachment needs of the regularizer that made it."""

    alpha: Coefficient
    beta: Coefficient

    def forget(self, attachment: Attachment) -> None:
        """Leave out an attachment that removes itself."""
        ...


@dataclass
class Capture:
    """Hold one run of an attached RNN.

    Attributes:
        raw: the RNN's output.
        nodes: of the autograd graph, those that the RNN's outputs come from.
        grad_enabled: whether gradients were enabled in the RNN and in its dropout.
        weights: the version of the RNN's weights; an optimizer's step raises it.
        versions: the activations, each with its version when it was captured.
        activations: what to regularize; `None` until the dropout has run.
    """

    raw: Any
    nodes: frozenset[Any]
    grad_enabled: bool
    weights: int
    versions: list[tuple[Tensor, int]]
    activations: Activations | None


class Attachment:
    """Hold the hooks on one RNN and its dropout until `remove()`. In a copy of the model they do nothing."""

    def __init__(self, owner: Owner, rnn: nn.LSTM | nn.GRU | nn.RNN, dropout: nn.Module | None) -> None:
        self.rnn, self.dropout = rnn, dropout
        self.captures: list[Capture] = []
        self._owner = weakref.ref(owner, lambda _: self.clear())  # without it, nobody would empty the captures
        self._hooks = [rnn.register_forward_hook(self._after_rnn)]
        if dropout is not None:
            self._hooks.append(dropout.register_forward_hook(self._after_dropout, with_kwargs=True))
        if isinstance(dropout, FusedRNNDropout):
            self._hooks.append(dropout.register_forward_pre_hook(self._before_dropout))

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out of a copy or a pickle: a copied model's hooks must not reach this regularizer."""
        return {"rnn": None, "dropout": None, "captures": [], "_owner": nobody, "_hooks": []}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off, and drop what they captured; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self.clear()
        owner, self._owner = self._owner(), nobody
        if owner is not None:
            owner.forget(self)

    def clear(self) -> None:
        """Drop all captures, and the penalty in a `FusedRNNDropout`."""
        self.captures.clear()
        if isinstance(self.dropout, FusedRNNDropout):
            self.dropout.clear()

    def activations(self, loss: Tensor) -> list[Activations]:
        """Return the activations of the runs that belong to the step of this loss.

        Raises:
            RuntimeError: a run has no dropped, no gradients, or was changed in place; the message says what to do.
        """
        captures = self.captures
        if len(captures) > 1 or not self.rnn.training:
            latest = captures[-1:] if self.rnn.training else []
            captures = [c for c in captures if _depends(loss, c.nodes)] or latest
        return [self._checked(capture, loss) for capture in captures]

    def _after_rnn(self, rnn: nn.Module, _: Any, output: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # torch.compile breaks its graph here, as it must
        if self._owner() is None or in_backward or not rnn.training or torch.is_inference_mode_enabled():
            return
        raw, hidden = output
        outputs = [tensor_of(raw), *(hidden if is_list(hidden) else [hidden])]
        capture = Capture(
            raw=raw,
            nodes=frozenset(x.grad_fn for x in outputs) - {None},
            grad_enabled=torch.is_grad_enabled(),
            weights=sum(p._version for p in rnn.parameters()),
            versions=[(outputs[0], outputs[0]._version)],
            activations=Activations(raw, raw, self.rnn.batch_first) if self.dropout is None else None,
        )
        # A run without a graph, or from before an optimizer's step, is not of this step: nothing can depend on it.
        self.captures = [c for c in self.captures if c.nodes and c.weights == capture.weights] + [capture]

    def _before_dropout(self, dropout: FusedRNNDropout, _: Any) -> None:
        owner = self._owner()
        if owner is not None and dropout.training:
            dropout.use_once(owner.alpha, owner.beta)

    def _after_dropout(self, dropout: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for capture in self.captures:
            raw, rows = capture.raw, tensor_of(capture.raw)
            if not any(x is raw or x is rows for x in (*args, *kwargs.values())):
                continue
            if not isinstance(output, (Tensor, PackedSequence)):
                raise TypeError(
                    f"dropout: expected the attached {type(dropout).__name__} to return a tensor, got "
                    f"{type(output).__name__}"
                )
            of_rows = isinstance(raw, PackedSequence) and isinstance(output, Tensor)
            dropped = raw._replace(data=output) if of_rows else output  # pyright: ignore
            formed = None
            if isinstance(dropout, FusedRNNDropout):
                formed = dropout.hand_over()
                if of_rows and formed is not None:
                    raise TypeError(
                        "FusedRNNDropout: expected the RNN's output as a tensor, got the data of a PackedSequence, "
                        "whose rows are of several sequences; use another dropout with packed sequences"
                    )
                if dropout.ar_of == "raw":
                    dropped = raw
            # Another hook or a subclass may have replaced the dropout's input or output: its penalty is of others then.
            capture.activations = Activations(raw, dropped, self.rnn.batch_first).or_formed(formed)
            capture.versions.append((tensor_of(output), tensor_of(output)._version))
            capture.grad_enabled &= torch.is_grad_enabled()

    def _checked(self, capture: Capture, loss: Tensor) -> Activations:
        rnn = type(self.rnn).__name__
        if loss.requires_grad and not capture.grad_enabled:
            raise RuntimeError(
                f"on_backward_begin: the {rnn} or its dropout ran without gradients, so that the penalty's would "
                "be lost. For activation checkpointing pass use_reentrant=False; else run both outside torch.no_grad()"
            )
        if capture.activations is None:
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
        return capture.activations


def nobody() -> None:
    """Return no owner, as a weak reference to one that is gone does."""


def _depends(loss: Tensor, nodes: frozenset[Any]) -> bool:
    """Return whether the graph of `loss` has one of the nodes; search the nearest first."""
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
