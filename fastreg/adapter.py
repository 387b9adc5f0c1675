"""Parts that all adapters share: `Paths`, which names modules, and `Adapter`, which takes the events of a training.

An adapter maps the events of its framework to the methods of an `Adapter`:

- a fit begins: `start`, because an earlier one may have been cut off;
- a training batch begins: `batch` gets its inputs, and `begin` attaches, in the first batch of the fit;
- a model that is not attached has returned its activations: `capture`;
- a loss is computed: `add_penalty` returns the loss with the penalty;
- the optimizer steps: `scale` sets its learning rates before the step, and `scaled.close()` restores them after it;
- the trainer writes its log: `means`;
- the fit ends: `end`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastreg.attach.activations import check_output, described
from fastreg.attach.regularizer import RNNRegularizer, ScaledRates
from fastreg.attach.source import Masks
from fastreg.call.arguments import time_axis_of
from fastreg.call.problem import TimeAxis, data_of, is_list

MaskOfBatch: TypeAlias = Callable[..., Tensor | None] | None  # a function of the inputs of a batch


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
        valid, starts: as for `attach`, but functions of the inputs of the batch: one for all RNNs, or a list with a
            function or `None` for each RNN, such as an encoder and a decoder. Without `rnn`, a mask with more time
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
    valid: MaskOfBatch | Sequence[MaskOfBatch] = None
    starts: MaskOfBatch | Sequence[MaskOfBatch] = None

    def __post_init__(self) -> None:
        time_axis_of(**self.layout())
        self.masks()

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

    def masks(self) -> list[Masks]:
        """Return the functions of a batch that say which time steps count: of each RNN, or of the model's output."""
        count = len(self.pairs()) or 1
        given: Any = self.valid, self.starts
        valid, starts = (list(x) if is_list(x) else [x] * count for x in given)
        if not len(valid) == len(starts) == count:
            words = (
                f"valid and starts: expected a function, or a list with an item for each path of rnn, {count} in all"
            )
            raise ValueError(f"{words}, got {len(valid)} and {len(starts)}")
        return [*map(Masks, valid, starts)]


NAMES, NO_LAYOUT = [x.name for x in fields(Paths)], Paths().layout()
NO_SUMS, NO_LENGTHS = (torch.zeros(()), 0), (0, 0)


def of_regularizer(name: str) -> Any:
    """Return a property of an adapter that is an attribute of its regularizer."""

    def write(adapter: Any, value: Any) -> None:
        if not hasattr(adapter, "regularizer"):
            words = "alpha and beta: expected a base class that leaves these attributes to the coefficients"
            raise AttributeError(f"{words}, got a {type(adapter).__name__} that sets {name}")
        setattr(adapter.regularizer, name, value)

    return property(lambda adapter: getattr(adapter.regularizer, name), write)


class Adapter:
    """Regularize the training of a framework; the subclasses are callbacks and trainers of frameworks.

    Attributes:
        alpha, beta, bptt, ar, tar: as for `RNNRegularizer`.
        regularizer: the regularizer.
        paths: the names of its modules.
        batch: the only input of the batch, or a list of all, where the framework does not hold them: see `inputs`.
        handles: the handles of the attached modules, one for each path, or of another hook on the model; there are none
            between fits.
        lengths: the numbers of time steps and of sequences of the longest run of this step; 0 and 0 without one.
        scaled: restores the learning rates that `scale` has set.
        sums: the sums of AR and of TAR since the last log, weighted by the sizes of the steps, on their device, and the
            sum of the sizes.
        say: a function that writes a line to the log of the framework.
    """

    alpha, beta, bptt = of_regularizer("alpha"), of_regularizer("beta"), of_regularizer("bptt")
    ar, tar = property(lambda self: self.regularizer.ar), property(lambda self: self.regularizer.tar)
    say: Callable[[str], Any] = staticmethod(print)

    def prepare(
        self, alpha: Any, beta: Any, options: Mapping[str, Any], bptt: int | None = None, layers: Any = None
    ) -> None:
        """Take the arguments of an adapter, before any fit.

        Args:
            alpha: coefficient of AR, as for `RNNRegularizer`; `None` is 0, as in fastai.
            beta: coefficient of TAR, as for alpha.
            options: the arguments of `Paths`.
            bptt: as for `RNNRegularizer`.
            layers: as for `RNNRegularizer`.

        Raises:
            TypeError: an option is unknown, or there are paths, but no coefficients.
            TypeError, ValueError: as `Paths` and `RNNRegularizer`.
        """
        if options.get("rnn") is not None and alpha is None and beta is None:
            raise TypeError("alpha and beta: expected coefficients beside rnn, got none; 0 leaves a term out")
        coefficients = [0.0 if x is None else x for x in (alpha, beta)]
        self.regularizer, self.paths = RNNRegularizer(*coefficients, layers=layers, bptt=bptt), Paths(**options)
        self.handles, self.batch, self.sums, self.scaled = list[Any](), (), NO_SUMS, ExitStack()
        self.lengths, self._captured, self._is_shown = NO_LENGTHS, "", False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which is attached to nothing."""
        return self.__dict__ | {"handles": [], "batch": (), "scaled": ExitStack()}

    def modules(self, model: nn.Module) -> list[tuple[Any, Any]]:
        """Return the module at each path with its dropout, or `None`.

        Raises:
            AttributeError: a path names no module.
        """
        return [(model.get_submodule(rnn), path and model.get_submodule(path)) for rnn, path in self.paths.pairs()]

    def layout_of(self, module: nn.Module) -> dict[str, Any]:
        """Return the `batch_first` and `time_dim` of a module, as for `RNNRegularizer.attach`."""
        return self.paths.layout()

    def start(self, model: nn.Module) -> None:
        """Forget an earlier fit, which may have been cut off, and check the paths before any training.

        Raises:
            AttributeError: a path names no module.
        """
        self.scaled.pop_all()  # this fit has set the learning rates
        self.end()
        self.modules(model)

    def begin(self, model: nn.Module) -> None:
        """Begin a step; attach to the modules of a model until `end`, unless they are attached.

        Raises:
            AttributeError: a path names no module.
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`.
        """
        self.lengths = NO_LENGTHS
        if self.handles:
            return
        # Without paths there are masks of the model's output, and nothing to attach.
        for (rnn, dropout), given in zip(self.modules(model), self.paths.masks(), strict=False):
            masks: Any = {name: self.mask_of(rnn, mask) for name, mask in vars(given).items()}
            options = self.layout_of(rnn) | masks | {"output": self.paths.output}
            self.handles.append(self.regularizer.attach(rnn, dropout, **options))

    def inputs(self) -> Sequence[Any]:
        """Return the inputs of the batch that the model gets now."""
        return self.batch if is_list(self.batch) else [self.batch]

    def mask_of(self, module: nn.Module, mask: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """Return a function of a module's arguments that calls a function of masks with the batch instead."""
        return None if mask is None else lambda *_, **__: mask(*self.inputs())

    def end(self) -> None:
        """Restore the learning rates, take the hooks off, free the activations, and forget the sums."""
        self.scaled.close()
        for handle in self.handles:
            handle.remove()
        self.regularizer.clear()
        self.handles, self.batch, self.sums = [], (), NO_SUMS

    def capture(self, output: Any) -> Any:
        """Capture the activations in the output of a model, `(decoded, raw, dropped)`, and return decoded.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.on_loss_begin`.
            ValueError: the sizes of the batch show that raw may be time first.
        """
        given, layout = check_output(output)[1], self.paths.layout()
        layers = [*given] if is_list(given) else [given]
        raw = layers[-1]
        shape, batch = (*data_of(raw).shape,), (*getattr(next(iter(self.inputs()), None), "shape", ()),)
        if layout == NO_LAYOUT and len(shape) == 3 and shape[:1] != batch[:1] == shape[1:2]:
            words = f"as raw is {shape} and the batch {batch}"
            raise ValueError(f"batch_first: expected True or False, {words}, got None")
        time_axis = time_axis_of(**layout)
        time = time_axis.number() % len(shape)
        masks: Any = self.paths.masks()[0].of(*self.inputs())
        axis = int(time > 0)  # of a mask: (batch, time), or (time, batch) where raw is time first
        for name, mask in masks.items():
            kept = min(mask.shape[axis], shape[time])
            masks[name] = mask.narrow(axis, mask.shape[axis] - kept, kept)
        decoded = self.regularizer.on_loss_begin(output, **layout, **masks)
        if not self._is_shown:
            counted = layers if self.regularizer.layers == "all" else [raw]
            self._captured = "\n".join([f"the model's output: {described(x, time_axis, masks)}" for x in counted])
        return decoded

    def time_steps(self) -> int:
        """Return the number of time steps of the batch, or of this step's raw if the batch does not begin with indices.

        Raw may be a chunk of the batch. Of indices, time is the axis that has not the size of raw's batch; it is the
        second one if both have it, or neither, or if the model runs without raw in this step.
        """
        (steps, batch), first = self.lengths, next(iter(self.inputs()), None)
        if not isinstance(first, Tensor) or first.dtype not in (torch.int32, torch.int64) or first.dim() != 2:
            return steps
        rows, columns = first.shape
        return rows if columns == batch != rows else columns

    def scale(self, read: Callable[[], list[float]], write: Callable[[list[float]], Any]) -> None:
        """Scale learning rates by `time / bptt`, for the number of time steps of the batch, until `scaled` is closed.

        Args:
            read: a function that returns the learning rates of the optimizer.
            write: a function that sets them.
        """
        if self.bptt and (steps := self.time_steps()):
            self.scaled.enter_context(ScaledRates(read, write, steps / self.bptt))

    def add_penalty(self, loss: Tensor, size: int = 0, parts: int = 1) -> Tensor:
        """Return the loss of a training step with the penalty, or the loss itself if there is nothing to add.

        The first time, say which axes of the activations were taken for what.

        Args:
            loss: the loss of the step.
            size: the weight of the step in the means of the terms; with 0 they are not summed.
            parts: the number of losses in an optimizer step, by which the penalty is divided.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.take`.
        """
        penalty = self.regularizer.collect(loss)
        if penalty is None:
            return loss
        self.lengths = self.regularizer.time_steps, self.regularizer.sequences
        if not self._is_shown:
            self._is_shown = True
            shown = [f"{rnn}: {x!r}" for (rnn, _), x in zip(self.paths.pairs(), self.handles, strict=False)]
            self.say("\n".join(shown or [self._captured]))
        if size:
            self.sums = torch.add(self.sums[0], penalty.stacked(), alpha=size), self.sums[1] + size
        return loss + (penalty.value if parts == 1 else penalty.value / parts)

    def means(self, reduce: Callable[[Tensor], Any]) -> dict[str, Any]:
        """Return the means of the terms since the last log, over all processes; there are none without a penalty.

        Args:
            reduce: a function that adds up the sums of all processes. Each process has to call it, even if it has added
                no penalty, because the others wait for it.
        """
        (terms, size), self.sums = self.sums, NO_SUMS
        sums = torch.cat([terms.expand(2), terms.new_full((1,), size)])
        ar, tar, size = reduce(sums.float())  # of one dtype in all processes
        return {"ar": ar / size, "tar": tar / size} if size else {}


def comes_first(time_axis: TimeAxis) -> bool:
    """Return whether time comes before the batch: in `(time, batch, hidden)`, in its masks and in its indices."""
    return time_axis.number() in (0, -3)
