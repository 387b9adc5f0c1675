"""Parts that all adapters share: `Paths`, which names modules, and `Adapter`, which takes the events of a training.

An adapter maps the events of its framework to the methods of an `Adapter`:

- a fit begins: `end`, because an earlier one may have been cut off;
- a training batch begins: `batch` gets its inputs, and `begin` attaches, in the first batch of the fit;
- a model that is not attached has returned its activations: `capture`;
- a loss is computed: `penalty_of` returns the penalty to add to it;
- the trainer writes its log: `means`;
- the fit ends: `end`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.attach.activations import check_output, described
from fastreg.attach.attachment import Attachment
from fastreg.attach.regularizer import RNNRegularizer
from fastreg.attach.source import Masks, check_callable
from fastreg.call.arguments import time_axis_of
from fastreg.call.problem import data_of, is_list
from fastreg.call.rnn_dropout import FusedRNNDropout


class Options(TypedDict, total=False):
    """Name the arguments of `Paths` for type checkers and editors; `dropout=True` is for `fuse` alone."""

    rnn: str | Sequence[str] | None
    dropout: bool | str | Sequence[str | None] | None
    output: Callable[[Any], Any] | None
    batch_first: bool | None
    time_dim: int | None
    valid: Callable[..., Tensor | None] | None
    starts: Callable[..., Tensor | None] | None


@dataclass(frozen=True)
class Paths:
    """Name the modules of a model to regularize, their layout and their masks. Every adapter takes these arguments.

    Args:
        rnn: the attribute path of an RNN in the model, such as `"encoder.lstm"`, or of any module that
            `RNNRegularizer.attach` takes; or a list of paths, whose penalties add up. Without it, which only the
            adapters of fastai allow, the model has to return `(decoded, raw, dropped)`.
        dropout: the path of the dropout that gets the output of the RNN: one path for all RNNs, or a list with a path
            or `None` for each RNN.
        output: as for `RNNRegularizer.attach`; it needs `rnn`.
        batch_first, time_dim: as for `attach`; without `rnn`, as for `RNNRegularizer.on_loss_begin`.
        valid, starts: as for `attach`, but functions of the inputs of the batch. Without `rnn`, a mask with more time
            steps than raw is cut to the last ones along its axis of time, because a text classifier returns only the
            end of a long text.

    Raises:
        TypeError: an argument has the wrong type, or needs `rnn`.
        ValueError: both `batch_first` and `time_dim` are given; there is no path in a list, or the same path twice, or
            the lists have different lengths.
    """

    rnn: str | Sequence[str] | None = None
    dropout: str | Sequence[str | None] | None = None
    output: Callable[[Any], Any] | None = None
    batch_first: bool | None = None
    time_dim: int | None = None
    valid: Callable[..., Tensor | None] | None = None
    starts: Callable[..., Tensor | None] | None = None

    def __post_init__(self) -> None:
        check_callable("output", self.output)
        time_axis_of(**self.layout())
        self.masks()
        self.pairs()

    def pairs(self) -> list[tuple[str, str | None]]:
        """Return the path of each RNN with the path of its dropout, or `None`."""
        if self.rnn is self.output is None and not self.dropout:
            return []
        rnns: Any = self.rnn if is_list(self.rnn) else [self.rnn]
        dropouts: Any = self.dropout if is_list(self.dropout) else [self.dropout] * len(rnns)
        given = [*rnns, *[x for x in dropouts if x is not None]]
        if not all(isinstance(x, str) and x for x in given):  # an empty path would be the model itself
            words = "the attribute path of a module, such as 'encoder.lstm', or a list of paths"
            raise TypeError(f"rnn and dropout: expected {words}, got {given}")
        if not 0 < len({*rnns}) == len(rnns) == len(dropouts):
            words = "rnn and dropout: expected each path of an RNN once, with a path or None for its dropout"
            raise ValueError(f"{words}, got {rnns} and {dropouts}")
        return [*zip(rnns, dropouts, strict=True)]

    def layout(self) -> dict[str, Any]:
        """Return the arguments that say which axis is time."""
        return {"batch_first": self.batch_first, "time_dim": self.time_dim}

    def masks(self) -> Masks:
        """Return the functions of a batch that say which time steps count."""
        return Masks(self.valid, self.starts)


NAMES, NO_LAYOUT = [x.name for x in fields(Paths)], Paths().layout()


def of_regularizer(name: str) -> Any:
    """Return a property of an adapter that is an attribute of its regularizer."""
    return property(lambda self: getattr(self.regularizer, name), lambda self, x: setattr(self.regularizer, name, x))


class Adapter:
    """Regularize the training of a framework; the subclasses are callbacks and trainers of frameworks.

    Attributes:
        alpha, beta, bptt, ar, tar: as for `RNNRegularizer`.
        regularizer: the regularizer.
        paths: the names of its modules.
        batch: the inputs of the batch, which the functions of masks get.
        handles: the handles of the attached modules, one for each path; there are none between fits.
        scaled: restores the learning rates that `scale` has set.
        sums: the sums of AR and of TAR, weighted by the sizes of the steps, and the sum of the sizes.
        say: a function that writes a line to the log of the framework.
    """

    alpha, beta, bptt = of_regularizer("alpha"), of_regularizer("beta"), of_regularizer("bptt")
    ar, tar = property(lambda self: self.regularizer.ar), property(lambda self: self.regularizer.tar)
    say: Callable[[str], Any] = staticmethod(print)

    def prepare(self, alpha: Any, beta: Any, options: Mapping[str, Any], bptt: int | None = None) -> None:
        """Take the arguments of an adapter, before any fit.

        Args:
            alpha: coefficient of AR, as for `RNNRegularizer`; `None` is 0, as in fastai.
            beta: coefficient of TAR, as for alpha.
            options: the arguments of `Paths`.
            bptt: as for `RNNRegularizer`.

        Raises:
            TypeError: an option is unknown, or there are paths, but no coefficients.
            TypeError, ValueError: as `Paths` and `RNNRegularizer`.
        """
        for name in {*options}.difference(NAMES):
            expected = ", ".join(get_close_matches(name, NAMES, 1) or NAMES)
            raise TypeError(f"{type(self).__name__}: expected {expected}, got an argument with the name {name!r}")
        if options.get("rnn") is not None and alpha is None and beta is None:
            raise TypeError("alpha and beta: expected coefficients beside rnn, got none; 0 leaves a term out")
        coefficients = [0.0 if x is None else x for x in (alpha, beta)]
        self.regularizer, self.paths = RNNRegularizer(*coefficients, bptt=bptt), Paths(**options)
        self.handles, self.batch, self.sums = list[Attachment](), (), torch.zeros(3)
        self._captured, self._is_said, self.scaled = (0, ""), False, ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which is attached to nothing."""
        return self.__dict__ | {"handles": [], "batch": ()}

    def modules(self, model: nn.Module) -> list[tuple[Any, Any]]:
        """Return the module at each path with its dropout, or `None`.

        Raises:
            AttributeError: a path names no module.
        """
        return [(model.get_submodule(rnn), path and model.get_submodule(path)) for rnn, path in self.paths.pairs()]

    def layout_of(self, module: nn.Module) -> dict[str, Any]:
        """Return the `batch_first` and `time_dim` of a module, as for `RNNRegularizer.attach`."""
        return self.paths.layout()

    def begin(self, model: nn.Module) -> None:
        """Attach to the modules of a model until `end`, unless they are attached.

        Raises:
            AttributeError: a path names no module.
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`.
        """
        if self.handles:
            return
        for rnn, dropout in self.modules(model):
            masks: Any = {name: self.mask_of(rnn, getattr(self.paths, name)) for name in ("valid", "starts")}
            options = self.layout_of(rnn) | masks | {"output": self.paths.output}
            self.handles.append(self.regularizer.attach(rnn, dropout, **options))

    def mask_of(self, module: nn.Module, mask: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """Return a function of a module's arguments that calls a function of masks with the batch instead."""
        return None if mask is None else lambda *_, **__: mask(*self.batch)

    def end(self) -> None:
        """Take the hooks off, free the activations, and forget the sums."""
        for handle in self.handles:
            handle.remove()
        self.regularizer.clear()
        self.handles, self.batch, self.sums = [], (), torch.zeros(3)

    def capture(self, output: Any) -> Any:
        """Capture the activations in the output of a model, `(decoded, raw, dropped)`, and return decoded.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.on_loss_begin`.
            ValueError: the sizes of the batch show that raw may be time first.
        """
        raw, layout = check_output(output)[1], self.paths.layout()
        raw, time_axis = raw[-1] if is_list(raw) else raw, time_axis_of(**layout)
        shape, batch = (*data_of(raw).shape,), (*getattr(next(iter(self.batch), None), "shape", ()),)
        if layout == NO_LAYOUT and len(shape) == 3 and shape[:1] != batch[:1] == shape[1:2]:
            words = f"as raw is {shape} and the batch {batch}"
            raise ValueError(f"batch_first: expected True or False, {words}, got None")
        time = time_axis.number() % len(shape)
        steps = len(raw.batch_sizes) if isinstance(raw, PackedSequence) else shape[time]
        masks: Any = self.paths.masks().of(*self.batch)
        axis = int(time > 0)  # of a mask: (batch, time), or (time, batch) where raw is time first
        for name, mask in masks.items():
            kept = min(mask.shape[axis], steps)
            masks[name] = mask.narrow(axis, mask.shape[axis] - kept, kept)
        decoded = self.regularizer.on_loss_begin(output, **layout, **masks)
        self._captured = steps, "" if self._is_said else f"the model's output: {described(raw, time_axis, masks)}"
        return decoded

    def scale(self, lrs: list[float], set_lrs: Callable[[list[float]], Any]) -> None:
        """Scale learning rates by `time / bptt`, for the number of time steps of raw, until `scaled` is closed.

        Args:
            lrs: the learning rates.
            set_lrs: a function that sets the learning rates of the optimizer.
        """
        steps = self.regularizer.time_steps
        if self.bptt and steps:  # a module in evaluation has no run
            self.scaled.callback(set_lrs, lrs)
            set_lrs([lr * steps / self.bptt for lr in lrs])

    def penalty_of(self, loss: Tensor, size: int = 1) -> Tensor | float:
        """Return the penalty of a training step, or 0.0 if there is nothing to add, and add up its terms.

        The first time, say which axes of the activations were taken for what.

        Args:
            loss: the loss of the step.
            size: the weight of the step in the means of the terms.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.take`.
        """
        penalty = self.regularizer.collect(loss)
        if penalty is None:
            return 0.0
        if not self._is_said:
            self._is_said = True
            shown = [f"{rnn}: {x!r}" for (rnn, _), x in zip(self.paths.pairs(), self.handles, strict=False)]
            self.say("\n".join(shown or [self._captured[1]]))
        terms: Any = penalty.terms
        sums = size * torch.cat([terms, torch.ones_like(terms[:1])]).float()
        self.sums = self.sums.to(sums.device) + sums  # of one dtype in all processes
        return penalty.value

    def means(self, reduce: Callable[[Tensor], Any]) -> dict[str, Any]:
        """Return the means of the terms since the last log, over all processes; there are none without a penalty.

        Args:
            reduce: a function that adds up the sums of all processes. Each process has to call it, even if it has added
                no penalty, because the others wait for it.
        """
        ar, tar, size = reduce(self.sums)
        self.sums = torch.zeros(3)
        return {"ar": ar / size, "tar": tar / size} if size else {}


def fuse_output_dropout(model: nn.Module, plain: type, fused: Callable[[float], FusedRNNDropout]) -> None:
    """Swap the last dropout of a language model of fastai for a fused one, unless this has been done.

    Args:
        model: the model, which has the dropout at `"1.output_dp"`.
        plain: fastai's class of this dropout; a subclass is not swapped.
        fused: a function that makes a fused dropout from a probability.

    Raises:
        ValueError: the model has no such dropout.
    """
    own: Any = getattr(getattr(model, "1", None), "output_dp", None)
    if type(own) is plain:
        model.set_submodule("1.output_dp", fused(own.p).train(own.training))
    elif not isinstance(own, FusedRNNDropout):
        words = f"the {plain.__name__} of a language model of fastai, or the path of a dropout beside rnn="
        raise ValueError(f"dropout: expected {words}, got True for a {type(model).__name__} with {type(own).__name__}")
