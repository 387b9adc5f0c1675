"""`RNNRegularizer`: captures a training step's activations, by hand or by hooks, and adds the penalty to its loss.

`on_loss_begin` captures the activations in a model's output. After `attach`, hooks capture the runs of a module, and
the autograd graph keeps them. `take` is the one consumer, also for `on_backward_begin`: it forms the penalty of the
activations in that output, or of the runs that its loss depends on, and then drops them, also when it raises.

An attached `FusedRNNDropout` gets the coefficients of the regularizer before its forward, and its own penalty is taken,
with its graph, if these have not changed since.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from numbers import Integral
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from fastreg.arguments import check_coefficient, check_steps
from fastreg.attachment import Attachment
from fastreg.capture import Watch, search
from fastreg.carry import penalty_of_runs, total
from fastreg.penalty import fused_ar_tar
from fastreg.prepare import coefficient, place_of
from fastreg.problem import ARTAR, Coefficient, Place, is_list, rows_of
from fastreg.source import Source
from fastreg.torch_state import untraced


class Given(NamedTuple):
    """The activations in a model's output, as `fused_ar_tar` takes them.

    raw, dropped  the activations
    place         where time is
    steps         lengths, valid and starts, by their names
    """

    raw: Any
    dropped: Any
    place: Place
    steps: dict[str, Any]


class RNNRegularizer:
    """Add `alpha * AR + beta * TAR` to the loss of each training step.

    A model may return its activations with its output, as AWD-LSTM and fastai's models do: `on_loss_begin` captures
    them. Hooks capture them from any other model, which needs no change: `attach`.

    Args:
        alpha: coefficient of AR, as for `fused_ar_tar`; an attribute, which a schedule may change, like `beta`.
        beta: coefficient of TAR.
        layers: `"last"` regularizes the last layer alone, as AWD-LSTM and fastai do; `"all"` every layer, as
            Merity et al. (2017) write it: the penalties add up.
        bptt: the usual number of time steps, for `scaled_lr`.

    Attributes:
        ar: AR of the last step, 0-dim, unscaled, detached, still on the device; `None` before the first step.
        tar: TAR of the last step, as for ar.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: an argument has the wrong value; the message names it.

    Examples:
        A model that returns `(decoded, raw, dropped)`:

        >>> regularizer = RNNRegularizer(alpha=2.0, beta=1.0)
        >>> decoded, raw, dropped = torch.randn(3, 4, 10, 16, requires_grad=True).unbind(0)
        >>> decoded = regularizer.on_loss_begin((decoded, raw, dropped))
        >>> regularizer.on_backward_begin(decoded.square().mean()).backward()

        A model that returns its output alone:

        >>> lstm, dropout = torch.nn.LSTM(8, 16, batch_first=True), torch.nn.Dropout(0.4)
        >>> hooked = RNNRegularizer(alpha=2.0, beta=1.0)
        >>> attached = hooked.attach(lstm, dropout)
        >>> decoded = dropout(lstm(torch.randn(4, 10, 8))[0])
        >>> hooked.on_backward_begin(decoded.square().mean()).backward()
        >>> bool(hooked.ar > 0), bool(hooked.tar > 0)
        (True, True)
    """

    def __init__(
        self,
        alpha: Coefficient = 0.0,
        beta: Coefficient = 0.0,
        *,
        layers: Literal["last", "all"] = "last",
        bptt: int | None = None,
    ) -> None:
        if layers not in ("last", "all"):
            raise ValueError(f"layers: expected 'last' or 'all', got {layers!r}")
        check_coefficient("alpha", alpha)
        check_coefficient("beta", beta)
        self.alpha, self.beta = coefficient(alpha), coefficient(beta)
        self.layers, self.bptt = layers, None if bptt is None else _check_steps("bptt", bptt)
        self.ar: Tensor | None = None
        self.tar: Tensor | None = None
        self._given: Given | None = None
        self._attached: list[Attachment] = []
        self._sizes: tuple[int, int] | None = None  # of the last step, batch and time

    def __repr__(self) -> str:
        bptt = "" if self.bptt is None else f", bptt={self.bptt}"
        return f"RNNRegularizer(alpha={self.alpha}, beta={self.beta}, layers={self.layers!r}{bptt})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave captures and attachments out of a copy or a pickle."""
        return self.__dict__ | {"_given": None, "_attached": []}

    def on_epoch_begin(self, model: object) -> None:
        """Reset the model's hidden state, if it or the model it wraps has a `reset()`, and drop any capture."""
        self.clear()
        inner = getattr(model, "module", None)  # DistributedDataParallel hides the attributes of its model
        reset = getattr(model, "reset", None) or getattr(inner, "reset", None)
        if callable(reset):
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

        A second call before `on_backward_begin` replaces the first capture.

        Args:
            output: a tuple or list of three; `raw` and `dropped` are `(batch, time, hidden)`, `(time, hidden)`, any
                tensors with `time_dim`, a `PackedSequence`, or a list or tuple of them, one a layer.
            lengths: the number of time steps of each padded sequence, as for `fused_ar_tar`.
            valid: a mask of the time steps that count, instead of lengths, as for `fused_ar_tar`.
            starts: a mask of the time steps at which a segment starts, as for `fused_ar_tar`.
            batch_first: `False` for `(time, batch, hidden)`, as an `nn.LSTM` returns by default; `None` for
                `True`, unless the shape of `decoded` leaves that in doubt. A given layout goes before that shape.
            time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.

        Raises:
            TypeError: an argument is not as described.
            ValueError: both `lengths` and `valid` are given; or the shape of one or of `starts` shows that
                `batch_first` is wrong; or it is `None`, and that of `decoded` shows that raw may be time first.
            RuntimeError: the activations already come from attached modules.
        """
        place = place_of(batch_first, time_dim)
        check_steps(lengths, valid, starts)
        if self._attached:
            raise RuntimeError("on_loss_begin: attached modules capture already; remove() them, or leave out the call")
        if not (is_list(output) and len(output) == 3 and _are_activations(*output[1:])):
            raise TypeError(
                "on_loss_begin: expected (decoded, raw, dropped), where raw and dropped are tensors, or lists with a "
                f"tensor a layer; got {_types(output)}. Let the model return (decoded, raw, dropped), or leave it "
                "as it is and use attach(rnn, dropout) in place of on_loss_begin"
            )
        decoded, raw, dropped = output
        if self.layers == "last" and is_list(raw):
            raw, dropped = raw[-1], dropped[-1]
        if time_dim is None:
            _check_layout(batch_first, raw, decoded=decoded, lengths=lengths, valid=valid, starts=starts)
        self._given = Given(raw, dropped, place, {"lengths": lengths, "valid": valid, "starts": starts})
        return decoded

    def on_backward_begin(self, loss: Tensor) -> Tensor:
        """Return the loss plus the penalty of this step's captures, a new tensor; `loss` itself is not changed.

        No capture is held afterwards, whether or not an error is raised. Attached modules in evaluation add nothing:
        where all of them are in evaluation, `loss` itself is returned.

        Args:
            loss: the training loss, a tensor of one element.

        Raises:
            RuntimeError: nothing was captured, or the capture cannot be right; the message gives the remedy.
            TypeError: `fused_ar_tar` refuses the type of a captured tensor.
            ValueError: `fused_ar_tar` refuses the shape, device or value of a captured tensor.
        """
        return self._penalize(loss, True)[0]

    def take(self, loss: Tensor) -> ARTAR | None:
        """Return the penalty of this step's captures alone, once, instead of calling `on_backward_begin`.

        Args:
            loss: the training loss, a tensor of one element, which tells the runs of this step from others.

        Returns:
            The penalty and its terms, on the device of the loss; `None` where attached modules are in evaluation.

        Raises:
            RuntimeError: as `on_backward_begin`.
            TypeError: as `on_backward_begin`.
            ValueError: as `on_backward_begin`.
        """
        penalty, terms = self._penalize(loss, False)
        return None if terms is None else ARTAR(penalty, terms.ar, terms.tar)

    def _penalize(self, loss: Tensor, adds: bool) -> tuple[Tensor, ARTAR | None]:
        """Return the penalty, with `adds` its sum with the loss, and the terms; in evaluation the loss and `None`."""
        given, self._given = self._given, None
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:  # the penalty would be added to each
            raise ValueError(f"loss: expected one element, got shape {tuple(loss.shape)}")
        if self._attached:
            return self._by_hooks(loss, adds)
        if given is None:
            raise RuntimeError(
                "on_backward_begin: nothing was captured; call on_loss_begin(output) before it in every step, or "
                "attach(rnn, dropout) once"
            )
        raw, dropped, (batch_first, time_dim), steps = given
        options: Any = {"batch_first": batch_first, "time_dim": time_dim, "return_terms": True}
        terms = fused_ar_tar(raw, dropped, self.alpha, self.beta, **steps, **options)
        terms = ARTAR(*(x.to(loss.device) for x in terms))
        self._note(terms, rows_of(raw[-1] if is_list(raw) else raw), given.place)
        return loss + terms.penalty if adds else terms.penalty, terms

    @untraced  # no compiler may see a search of the graph
    def _by_hooks(self, loss: Tensor, adds: bool) -> tuple[Tensor, ARTAR | None]:
        """Form the penalty of attached modules; see `_penalize`."""
        attached = [x for x in self._attached if self.carries(x) and x.source.scale is None]
        if not attached:
            raise RuntimeError("on_backward_begin: attach(..., in_backward=...) adds the penalty already; leave it out")
        runs_of = {attachment: attachment.runs for attachment in attached}
        found = search(loss, [run for runs in runs_of.values() for run in runs])
        taken = {attachment: attachment.chosen(runs, found.found) for attachment, runs in runs_of.items()}
        try:
            groups = [x for attachment, runs in taken.items() for x in attachment.checked(runs, loss)]
            if not groups:
                _check_evaluation([attachment.source.module for attachment in attached])
                return loss, None
            terms, step = penalty_of_runs(groups, found, loss, (self.alpha, self.beta), attached[0].watch)
            self._note(terms, groups[-1][-1].raw.data, groups[-1][-1].place)
        finally:
            for attachment in self._attached:
                attachment.settle(taken.get(attachment, ()))
        return step.penalize(loss, terms.penalty, adds), terms

    def _note(self, terms: ARTAR, x: Tensor, place: Place) -> None:
        """Keep the terms of a step, and the sizes of its last activations."""
        _, self.ar, self.tar = terms
        self._sizes = None  # where the shape does not tell the batch
        if x.dim() == 3:
            time_dim = place.axis()
            self._sizes = x.shape[0 if time_dim % 3 else 1], x.shape[time_dim]

    def clear(self) -> None:
        """Drop any capture: `on_epoch_begin` does; after a step that failed, this frees activations early."""
        self._given = None
        for attachment in self._attached:
            attachment.clear()

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
        stepwise: bool = False,
        in_backward: bool | float | Tensor = False,
    ) -> Attachment:
        """Capture by forward hooks on an RNN and the dropout that follows it, instead of `on_loss_begin`.

        Every attached module is one layer (an `nn.LSTM` the last of its own `num_layers`), in the order of the calls of
        `attach`. A model that contains it may be compiled before or after.

        Each run that the loss of `on_backward_begin` depends on counts once. A run without a graph, as of a frozen
        module, counts if it is the latest. Where the loss depends on no run, the latest run counts if its output still
        exists. Runs in evaluation, and recomputation inside a backward (activation checkpointing), are not captured.
        The autograd graph owns the captures: freeing the graph frees them. The model's output is not replaced: the
        penalty's gradient is added to the gradient of raw and of dropped, before their other hooks run.

        Args:
            module: any module that runs over all time steps. Its `__call__` has to run: where a wrapper calls the
                `forward` of a module inside it, as the WeightDrop of AWD-LSTM does, attach the wrapper. Raw is its
                output if that is a tensor or a `PackedSequence`, the first element of a tuple or list, or
                `last_hidden_state`.
            dropout: any module that gets the very tensor raw as its input, and returns a tensor. It may be used
                elsewhere, too. Without it, dropped is raw. A `FusedRNNDropout` forms the penalty itself, with the
                coefficients of the regularizer until `remove()`, and takes no packed data.
            output: a function that picks raw from any other output of the module.
            batch_first: `False` for `(time, batch, hidden)`. Read from the module where it has a `batch_first`, or
                where it has an `nn.LSTM` or the like inside with `batch_first=True`; else it has to be given.
            time_dim: the axis of time, instead of batch_first, as for `fused_ar_tar`.
            valid: a function of the module's arguments, `valid(*args, **kwargs)`, that returns the mask of valid time
                steps, as `fused_ar_tar` takes it, or `None` where all steps count. A mask that a `FusedRNNDropout` is
                called with takes precedence.
            starts: a function of the module's arguments that returns the mask of the time steps at which a segment
                starts, or `None`; it takes the same arguments.
            stepwise: the module runs once for each time step, or for a few: the runs of a training step are joined
                along time, in the order of the calls. A cell, such as an `nn.GRUCell`, may be attached then.
            in_backward: add the penalty's gradient in every backward through the module's output, without
                `on_backward_begin`, for a trainer that does not expose its loss: `True` for an upstream gradient of 1,
                or that gradient, a number or a 0-dim tensor, such as a loss scale or 1 over the accumulation steps.
                `ar` and `tar` are those of the latest run of each such module.

        Returns:
            A handle with `remove()`; as a context manager it removes itself at the end.

        Raises:
            TypeError: an argument has the wrong type; in a step, the module's output holds no raw, the dropout returns
                no tensor, or a `FusedRNNDropout` gets packed data.
            ValueError: `batch_first` is not that of the module or of its `FusedRNNDropout`, or is missing; `time_dim`
                is not that of its `FusedRNNDropout`; `stepwise` together with `in_backward` or `time_dim`; in a step,
                raw has two axes, and may be one time step.
            RuntimeError: a module is compiled or attached already, or `on_loss_begin` is in use; in a step, the module
                is a replica of `DataParallel`.
        """
        scale: Coefficient | None = None
        if in_backward is not False:
            scale = 1.0 if in_backward is True else in_backward
            check_coefficient("in_backward", scale)
            scale = coefficient(scale)
        source = Source(module, dropout, output, batch_first, time_dim, valid, starts, stepwise, scale).checked()
        if self._given is not None:
            raise RuntimeError("attach: on_loss_begin captures already; use one or the other")
        if any(attachment.source.module is module for attachment in self._attached):
            raise RuntimeError("module: it is attached already; remove() its attachment first")
        watch = self._attached[0].watch if self._attached else Watch()
        self._attached.append(Attachment(self, source, watch))
        return self._attached[-1]

    def carries(self, attachment: Attachment) -> bool:
        """Return whether the runs of an attachment are regularized: `layers="last"` leaves out all but the last."""
        return self.layers == "all" or attachment is self._attached[-1]

    def note(self) -> None:
        """Keep the terms of the latest run of each attachment that adds its penalty in the backward."""
        terms = [x.terms for x in self._attached if x.terms is not None and self.carries(x)]
        _, self.ar, self.tar = total(terms, terms[-1].ar.device)

    def forget(self, attachment: Attachment) -> None:
        """Leave an attachment out from now on; `attachment.remove()` calls this when it has taken its hooks off."""
        self._attached.remove(attachment)

    def scaled_lr(self, optimizer: Optimizer, seq_len: int) -> AbstractContextManager[None]:
        """Scale every group's lr by `seq_len / bptt` within a `with`; restore it at the end, also after an error.

        As in AWD-LSTM, a batch of fewer time steps takes a smaller step. Step schedulers outside the `with`.

        Args:
            optimizer: any object with `param_groups`.
            seq_len: the number of time steps in this batch.

        Warns:
            UserWarning: `seq_len` is the batch size of the activations, and not their time steps.

        Raises:
            TypeError: `optimizer` has no `param_groups`, or `seq_len` or `bptt` is no integer.
            ValueError: `seq_len` or `bptt` is not positive.
            RuntimeError: the regularizer has no `bptt`.
        """
        if self.bptt is None:
            raise RuntimeError("scaled_lr: the usual sequence length is not known; pass RNNRegularizer(..., bptt=...)")
        if not hasattr(optimizer, "param_groups"):  # wrappers of an optimizer have them, too
            raise TypeError(f"optimizer: expected an optimizer with param_groups, got {type(optimizer).__name__}")
        steps = _check_steps("seq_len", seq_len)
        if self._sizes is not None and steps == self._sizes[0] != self._sizes[1]:
            warnings.warn(
                f"scaled_lr: {steps} time steps, but the last activations were taken for {self._sizes[0]} sequences of "
                f"{self._sizes[1]}: if they are (time, batch, hidden), say so by batch_first=False",
                stacklevel=2,
            )
        return _scaled_lr(optimizer, steps / _check_steps("bptt", self.bptt))


@contextmanager
def _scaled_lr(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Scale the lr of every group, and restore it."""
    before = [group["lr"] for group in optimizer.param_groups]
    # A captured CUDA graph reads the tensor, so it is changed in place; groups may share it, so each is scaled once.
    tensors = {id(lr): (lr, lr.clone()) for lr in before if isinstance(lr, Tensor)}
    try:
        for lr, _ in tensors.values():
            lr.mul_(factor)
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] *= factor
        yield
    finally:
        for lr, value in tensors.values():
            lr.copy_(value)
        for group, lr in zip(optimizer.param_groups, before, strict=False):
            group["lr"] = lr


def _check_steps(name: str, value: int) -> int:
    """Check a number of time steps, and return it as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a positive integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")
    return int(value)


def _are_activations(raw: Any, dropped: Any) -> bool:
    """Return whether raw and dropped are two tensors, or two lists of as many layers."""
    if is_list(raw) and is_list(dropped) and len(raw) == len(dropped) > 0:
        return all(isinstance(x, (Tensor, PackedSequence)) for x in (*raw, *dropped))
    return all(isinstance(x, (Tensor, PackedSequence)) for x in (raw, dropped))


def _types(output: Any) -> str:
    """Describe a model's output by its types, for an error."""
    if not is_list(output):
        return type(output).__name__
    kinds = [f"{type(x).__name__} of {len(x)}" if is_list(x) else type(x).__name__ for x in output]
    return f"{type(output).__name__} of {', '.join(kinds) or 'nothing'}"


def _check_evaluation(modules: list[nn.Module]) -> None:
    """Check that nothing was captured because all attached modules are in evaluation.

    Raises:
        RuntimeError: they are not.
    """
    if any(module.training for module in modules):
        names = ", ".join(dict.fromkeys(type(module).__name__ for module in modules))
        raise RuntimeError(
            f"on_backward_begin: nothing was captured, the attached {names} did not run since the last call, or only "
            "in torch.inference_mode(). In one step call it, or take(), once: the second call finds nothing. Call "
            "the module, not its forward(): where a wrapper calls the forward() of a module inside it, as WeightDrop "
            "does, attach the wrapper. A copy of a module, by deepcopy or pickle, has "
            "no hooks: attach it, too. Keep the output of the module until here: its graph keeps the capture"
        )


def _check_layout(batch_first: bool | None, raw: Any, **others: Any) -> None:
    """Check that nothing beside raw has the shape that it would have in the other layout alone.

    Args:
        batch_first: the layout of raw; `None` for batch first by default.
        raw: the activations of a layer, or of several.
        others: `decoded`, which counts where `batch_first` is `None` alone, `lengths`, `valid` and `starts`.

    Raises:
        ValueError: something has.
    """
    first = raw[0] if is_list(raw) else raw
    if not isinstance(first, Tensor) or first.is_nested or first.dim() != 3:
        return
    batch, time = first.shape[:2] if batch_first is not False else first.shape[1::-1]
    if batch == time:
        return
    for name, x in others.items():
        shape, expected = tuple(getattr(x, "shape", ())), str(batch_first is False)
        if name == "lengths":
            wrong = shape == (time,)
        elif name in ("valid", "starts"):
            wrong = shape == (time, batch)
        else:
            # A row a sequence, as a classifier gives it, unless all time steps have one; or the scores of each time
            # step: (time, batch, classes), as a CTC loss takes them, or (batch, classes, time), as cross_entropy does.
            rows = len(shape) == 2 and shape[0] == time and batch != 1
            scores = len(shape) == 3 and (time, batch) in (shape[:2], shape[::2])
            wrong, expected = batch_first is None and (rows or scores), "True or False"
        if wrong:
            given = f"as raw is {tuple(first.shape)} and {name} {shape}, got {batch_first}"
            raise ValueError(f"batch_first: expected {expected}, {given}")
