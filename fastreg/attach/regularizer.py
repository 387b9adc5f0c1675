"""`RNNRegularizer`: captures the activations of a training step, by hand or by hooks, and adds the penalty to its loss.

`on_loss_begin` captures the activations in a model's output. After `attach`, hooks compute the penalty of each run of a
module, and the autograd graph keeps it. `take` consumes these penalties, also for `on_backward_begin`: it takes the
penalty of the captured activations, or of the runs on which the loss depends, once. If it raises an error, it drops all
captures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from fastreg.attach.activations import Capture, check_layout, check_output
from fastreg.attach.attachment import Attachment, attachments_of
from fastreg.attach.runs import take
from fastreg.attach.source import Masks, source_of
from fastreg.call.arguments import check_coefficient, check_count, check_steps, time_axis_of
from fastreg.call.private import check_attachable
from fastreg.call.problem import ARTAR, Coefficient, Penalty, TimeAxis, is_list
from fastreg.call.steps import given_steps
from fastreg.call.torch_state import level_of_caller


class RNNRegularizer:
    """Add `alpha * AR + beta * TAR` to the loss of each training step.

    If a model returns only its output, `attach` puts hooks on its modules. If it returns its activations, too, as
    AWD-LSTM and fastai's models do, `on_loss_begin` captures them. In both cases call `loss =
    regularizer.on_backward_begin(loss)` before each backward.

    Args:
        alpha: coefficient of AR, as for `fused_ar_tar`; an attribute, which a schedule may change, like `beta`. With 0
            the term is no part of the penalty, and only measured.
        beta: coefficient of TAR.
        layers: which layers `on_loss_begin` regularizes if the model returns lists with a tensor for each layer:
            `"last"`, as AWD-LSTM and fastai do, or `"all"`, as Merity et al. (2017) write it; then the penalties of all
            layers add up. `None` means `"last"`. It cannot be given together with `attach`, after which every attached
            module counts.
        bptt: the usual number of time steps, for `scaled_lr`.

    Attributes:
        ar: AR of the last training step without its coefficient, 0-dim and on the device. It is detached: no gradient
            flows through it. It is `None` before the first step, and an evaluation does not change it.
        tar: TAR of the last training step, as for ar.
        time_steps: the number of time steps of the longest run, or of the captured raw, of the last training step; 0
            before the first one.
        sequences: the number of sequences of the same run; 0 before the first one.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: an argument has the wrong value; the message names it.

    Examples:
        A model that returns only its output:

        >>> lstm, dropout = torch.nn.LSTM(8, 16, batch_first=True), torch.nn.Dropout(0.4)
        >>> regularizer = RNNRegularizer(alpha=2.0, beta=1.0)
        >>> attached = regularizer.attach(lstm, dropout)
        >>> loss = dropout(lstm(torch.randn(4, 10, 8))[0]).square().mean()
        >>> loss = regularizer.on_backward_begin(loss)
        >>> loss.backward()
        >>> bool(regularizer.ar > 0), bool(regularizer.tar > 0)
        (True, True)

        A model that returns `(decoded, raw, dropped)`:

        >>> regularizer = RNNRegularizer(alpha=2.0, beta=1.0)
        >>> decoded, raw, dropped = torch.randn(3, 4, 10, 16, requires_grad=True).unbind(0)
        >>> decoded = regularizer.on_loss_begin((decoded, raw, dropped))
        >>> loss = regularizer.on_backward_begin(decoded.square().mean())
        >>> loss.backward()
    """

    def __init__(
        self,
        alpha: Coefficient,
        beta: Coefficient,
        *,
        layers: Literal["last", "all"] | None = None,
        bptt: int | None = None,
    ) -> None:
        if layers not in ("last", "all", None):
            raise ValueError(f"layers: expected 'last', 'all' or None, got {layers!r}")
        self.alpha, self.beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)
        self.layers = layers
        self.bptt = None if bptt is None else check_count("bptt", bptt)
        self.time_steps = self.sequences = 0
        self._terms: Tensor | list[Tensor] | None = None  # AR and TAR of the last training step
        self._capture: Capture | None = None
        self._warned = set[str]()  # the warnings that were given
        self._attachments = list[Attachment]()

    @property
    def ar(self) -> Tensor | None:
        """Return AR of the last training step without its coefficient; `None` before the first step."""
        return None if self._terms is None else self._terms[0]

    @property
    def tar(self) -> Tensor | None:
        """Return TAR of the last training step without its coefficient; `None` before the first step."""
        return None if self._terms is None else self._terms[1]

    def __repr__(self) -> str:
        bptt = "" if self.bptt is None else f", bptt={self.bptt}"
        own = f"RNNRegularizer(alpha={self.alpha}, beta={self.beta}, layers={self.layers!r}{bptt})"
        return "\n  ".join([own, *map(repr, self._attachments)])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which has no captures and no attachments."""
        return self.__dict__ | {"_capture": None, "_warned": set[str](), "_attachments": []}

    def on_epoch_begin(self, model: object) -> None:
        """Call the `reset()` of the model, or of the model that it wraps, and drop any capture.

        Raises:
            TypeError: there is no `reset()` that can be called without arguments.
        """
        reset = reset_of(model)
        if reset is None:
            words = "model: expected the model, with a reset() that needs no arguments"
            raise TypeError(f"{words}, got {type(model).__name__}; leave the call out, or call clear() instead")
        self.clear()
        reset()

    def on_loss_begin(
        self,
        output: Any,
        lengths: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        batch_first: bool | None = None,
        time_dim: int | None = None,
    ) -> Any:
        """Capture `raw` and `dropped` of a model's output `(decoded, raw, dropped)`, and return `decoded`.

        A second call before `on_backward_begin` replaces the first capture. If that capture needs gradients, its
        penalty is lost, and a warning says so once. After a training step that failed, call `clear()`.

        Args:
            output: a tuple or list of three; `raw` and `dropped` are `(batch, time, hidden)`, any tensors with
                `time_dim`, a `PackedSequence`, or a list or tuple with one for each layer.
            lengths: the number of time steps of each padded sequence, as for `fused_ar_tar`.
            valid: a mask of the time steps that count, instead of lengths, as for `fused_ar_tar`.
            starts: a mask of the time steps at which a segment starts, as for `fused_ar_tar`.
            batch_first: `False` for `(time, batch, hidden)`, which an `nn.LSTM` returns by default; `None` means
                `True`. If the shape of `decoded` suggests time first, you have to pass it.
            time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: both `lengths` and `valid` are given; or `batch_first` is `None`, and the shape of `decoded`
                shows that raw may be time first, or a state.
            RuntimeError: the activations already come from attached modules.

        Warns:
            UserWarning: a capture that needs gradients is replaced; or `decoded` has no axis of the size of raw's
                batch. Each warning comes once.
        """
        time_axis = time_axis_of(batch_first, time_dim)
        check_steps(lengths, valid, starts)
        if self._attachments:
            raise RuntimeError("on_loss_begin: modules are attached; remove() their handles, or leave out this call")
        decoded, raw, dropped = check_output(output)
        if self.layers != "all" and is_list(raw):
            raw, dropped = raw[-1], dropped[-1]
        is_given = batch_first is not None or time_dim is not None
        if words := check_layout(raw, decoded, time_axis, is_given):
            self._warn_once(f"on_loss_begin: {words}")
        if self._capture is not None and self._capture.needs_gradient():
            self._warn_once(
                "on_loss_begin: the last capture is discarded, and so is its penalty, because no "
                "on_backward_begin(loss) followed it: call that in each training step, or clear() after a step that "
                "ended early"
            )
        self._capture = Capture(raw, dropped, time_axis, given_steps(lengths, valid, starts))
        return decoded

    def on_backward_begin(self, loss: Tensor) -> Tensor:
        """Return the loss plus the penalty of this step; `loss` itself is not changed.

        After `attach` the penalty is the sum over the runs on which the loss depends. Modules in evaluation add
        nothing. If there is nothing to add, `loss` itself is returned.

        Args:
            loss: the training loss, a tensor of one element.

        Raises:
            RuntimeError: nothing was captured, or the penalty would be wrong or lost; the message names the remedy.
            TypeError: `fused_ar_tar` refuses the type of a captured tensor.
            ValueError: `fused_ar_tar` refuses the shape, device or value of a captured tensor.
        """
        penalty = self.collect(loss)
        return loss if penalty is None else loss + penalty.value

    def take(self, loss: Tensor) -> ARTAR | None:
        """Return the penalty of this step by itself, once; call it instead of `on_backward_begin`.

        Args:
            loss: the training loss, a tensor of one element, which says which runs belong to this step.

        Returns:
            The penalty, and its terms, which are detached, on the device of the loss; `None` if there is nothing to
                add, because all attached modules are in evaluation, or neither they nor the loss need a gradient.
                Activations that `on_loss_begin` has captured have a penalty in evaluation, too, unless none needs a
                gradient.

        Raises:
            RuntimeError: as `on_backward_begin`.
            TypeError: as `on_backward_begin`.
            ValueError: as `on_backward_begin`.
        """
        penalty = self.collect(loss)
        return None if penalty is None else penalty.split()

    def collect(self, loss: Tensor) -> Penalty | None:
        """Return the penalty of this step as `take` does, with its terms as they were computed."""
        capture, self._capture, taken = self._capture, None, None
        try:
            if not isinstance(loss, Tensor):
                raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}; do not call item() before")
            if loss.numel() != 1:  # the penalty would be added to each element
                raise ValueError(f"loss: expected one element, got shape {tuple(loss.shape)}; call mean() before")
            if self._attachments:
                taken = take(self._attachments, loss, self._warn_once)
            elif capture is None:
                raise RuntimeError(
                    "on_backward_begin: nothing was captured; call on_loss_begin(output) before it, in every step, or "
                    "attach(rnn, dropout) once"
                )
            elif capture.needs_gradient():
                taken = capture.penalty((self.alpha, self.beta), loss.device)
        except BaseException:
            self.clear()
            raise
        if taken is None:
            return None
        penalty, (self.time_steps, self.sequences) = taken
        self._terms = penalty.terms
        return penalty

    def _warn_once(self, message: str) -> None:
        """Give a warning the first time."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=level_of_caller())

    def clear(self) -> None:
        """Drop any capture, as `on_epoch_begin` does; after a failed step this frees activations early."""
        self._capture = None
        for x in self._attachments:
            x.clear()

    def attach(
        self,
        module: nn.Module,
        dropout: nn.Module | None = None,
        *,
        output: Callable[[Any], Any] | None = None,
        batch_first: bool | None = None,
        time_dim: int | None = None,
        valid: Callable[..., Tensor | None] | None = None,
        starts: Callable[..., Tensor | None] | None = None,
    ) -> Attachment:
        """Put forward hooks on an RNN and on the dropout after it, which compute the penalty of each run.

        Call it once, instead of `on_loss_begin` in each step. Every attached module is regularized; of an `nn.LSTM`
        with several layers the last one is. `on_backward_begin` adds the penalty of each run on which the loss depends,
        once, with the coefficients of that run's forward. A loss depends on a run through the output of the dropout, or
        through raw without a dropout, or through another tensor that the module returned, such as a state. Runs in
        evaluation, runs without gradients, runs of frozen modules, and recomputations of activation checkpointing do
        not count. Attach before the model is compiled, or call `torch.compiler.reset()` after `attach`.

        The last attach wins: it takes the hooks of any earlier one off the module. If 100 backwards through the
        module's output, or losses without it, bring no gradient of a penalty of the module, because
        `on_backward_begin` was forgotten or its result is not used, a warning names the module.

        The hooks replace these tensors by views, through which a loss finds the penalty. A view must not be changed in
        place. Hooks on a view, its `retain_grad()` and its `torch.autograd.grad` see the gradient of the loss without
        the penalty's part.

        Args:
            module: any module that runs over all time steps. Its `__call__` has to run: if a wrapper calls the
                `forward` of a module inside it, as the WeightDrop of AWD-LSTM does, attach the wrapper. Raw is its
                output if that is a tensor or a `PackedSequence`, or the first element of a tuple or list, or
                `last_hidden_state`.
            dropout: any module that gets raw itself as its input, and returns a tensor. It may be used elsewhere, too.
                Without it, dropped is raw. A `FusedDropout` or `FusedRNNDropout` computes the penalty itself, with the
                coefficients of the regularizer, and takes no packed data.
            output: for any other output, a function that picks raw, which is one of the tensors in the output.
            batch_first: `False` for `(time, batch, hidden)`. It is read from the module if this has a `batch_first`, or
                contains an `nn.LSTM`, `nn.GRU` or `nn.RNN` with `batch_first=True`; otherwise it has to be given.
            time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.
            valid: a function of the module's arguments, `valid(*args, **kwargs)`, that returns the mask of valid time
                steps, as `fused_ar_tar` takes it, or `None` if all steps count. If a fused dropout is called with a
                mask, that mask takes precedence.
            starts: a function of the same arguments that returns the mask of the time steps at which a segment starts,
                or `None`.

        Returns:
            A handle whose `remove()` takes the hooks off. It is also a context manager that does this at its end.

        Raises:
            TypeError: an argument has the wrong type; in a step, the module's output shows no raw, or the dropout
                returns no tensor.
            ValueError: `batch_first` is missing, or differs from the module's; `batch_first` or `time_dim` differs from
                the fused dropout's; `layers` was given to the regularizer; in a step, raw has two axes, and may be
                a single time step, or the data of a `PackedSequence` in a fused dropout.
            RuntimeError: the module is attached with another dropout, and has not run since, or `on_loss_begin` is in
                use; in a step, the dropout gets raw twice, or the module is a shallow copy.
        """
        check_attachable()
        source = source_of(module, dropout, output, TimeAxis(batch_first, time_dim), Masks(valid, starts))
        if self.layers is not None:
            raise ValueError(f"layers: expected None with attach, where all modules count, got {self.layers!r}")
        if self._capture is not None:
            raise RuntimeError("attach: on_loss_begin captures already; use either on_loss_begin or attach")
        for x in attachments_of(source.module, self._attachments):
            dropouts = {x.source.dropout, source.dropout} - {None}
            if x.regularizer is not self:
                x.unhook()  # its regularizer misses the module at its next loss
            elif x.handles and not x.shown and len(dropouts) == 2:
                raise RuntimeError(
                    f"dropout: expected the one dropout with which the {x.names['module']} is attached already, got "
                    "another one, and the penalty of one of them would be lost; remove() the handle of the first"
                )
            else:
                x.remove()
        return Attachment(self, self._attachments, source)

    def scaled_lr(self, optimizer: Optimizer, seq_len: int) -> AbstractContextManager[None]:
        """Scale the learning rate of every group by `seq_len / bptt` in a `with` block, and restore it at the end.

        As in AWD-LSTM, a batch of fewer time steps takes a smaller step. Call schedulers outside of the block.

        Args:
            optimizer: any object with `param_groups`.
            seq_len: the number of time steps in this batch.

        Raises:
            TypeError: `optimizer` has no `param_groups`, or `seq_len` or `bptt` is no integer.
            ValueError: `seq_len` or `bptt` is not positive.
            RuntimeError: the regularizer has no `bptt`.
        """
        if self.bptt is None:
            raise RuntimeError("scaled_lr: the usual sequence length is not known; pass RNNRegularizer(..., bptt=...)")
        if not hasattr(optimizer, "param_groups"):  # wrappers of an optimizer have them, too
            raise TypeError(f"optimizer: expected an optimizer with param_groups, got {type(optimizer).__name__}")
        factor = check_count("seq_len", seq_len) / check_count("bptt", self.bptt)
        groups = [*optimizer.param_groups]

        def read() -> list[Any]:
            return [x["lr"].clone() if isinstance(x["lr"], Tensor) else x["lr"] for x in groups]

        def write(lrs: list[Any]) -> None:
            for group, lr in zip(groups, lrs, strict=True):
                if isinstance(lr, Tensor):
                    group["lr"].copy_(lr)  # a captured CUDA graph reads this tensor, which groups may share
                else:
                    group["lr"] = lr

        return ScaledRates(read, write, factor)


def reset_of(model: object) -> Callable[[], object] | None:
    """Return the `reset()` of a model, or of the model that it wraps, if it can be called without arguments.

    A `reset` that needs arguments, or is a module, is something else.
    """
    inner = getattr(model, "module", None)  # DistributedDataParallel hides the attributes of its model
    reset: Any = getattr(model, "reset", None) or getattr(inner, "reset", None)
    try:
        signature(reset).bind()
    except TypeError:  # it needs arguments, or is no function
        return None
    return None if isinstance(reset, nn.Module) else reset


class ScaledRates(AbstractContextManager[None]):
    """Scale learning rates by a factor in a `with` block, and restore them at its end.

    Args:
        read: a function that returns the learning rates.
        write: a function that sets them.
        factor: the factor.
    """

    def __init__(self, read: Callable[[], list[Any]], write: Callable[[list[Any]], Any], factor: float) -> None:
        self.read, self.write, self.factor, self.before = read, write, factor, list[Any]()

    def __enter__(self) -> None:
        self.before = self.read()
        self.write([self.factor * lr for lr in self.before])

    def __exit__(self, *_: object) -> None:
        self.write(self.before)
