"""`Paths`: the modules of a model that an adapter attaches to, named by their attribute paths."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fastreg.attach.attachment import described
from fastreg.attach.captures import check_output
from fastreg.attach.source import Masks, batch_first_of, check_callable
from fastreg.call.arguments import time_axis_of
from fastreg.call.problem import Coefficient, axes_of, data_of, is_list
from fastreg.call.rnn_dropout import FusedRNNDropout

UNFUSED = "unfuse: this learner trains without AR and TAR now, as fastai's own callback cannot regularize its model"


@dataclass(frozen=True)
class Swap:
    """Swap a dropout of a model for a fused one while a regularizer is attached.

    Attributes:
        path: the attribute path of the dropout.
        plain: the class of the dropout.
        fused: a function that makes a fused dropout from a probability.
    """

    path: str
    plain: type[Any]
    fused: Callable[[float], FusedRNNDropout]

    def into(self, model: nn.Module, undo: ExitStack) -> FusedRNNDropout:
        """Put a fused dropout into the model, in the same mode, until a stack is closed; return the fused dropout."""
        own: Any = _module_at(model, "dropout", self.path)
        if type(own) is not self.plain:
            raise ValueError(f"dropout: expected an {self.plain.__name__} to swap, got {type(own).__name__}")
        fused = self.fused(own.p).train(own.training)
        model.set_submodule(self.path, fused)
        undo.callback(lambda: model.set_submodule(self.path, own.train(fused.training)))
        return fused


@dataclass(eq=False)
class Paths:
    """Name the modules of a model by their attribute paths.

    Attributes:
        pairs: the path of each RNN, with the path of its dropout, a `Swap` or `None`; there are none if the model
            itself returns `(decoded, raw, dropped)`.
        masks: the functions of a batch that say which time steps count.
        output, batch_first, time_dim: as for `RNNRegularizer.attach`.
        is_warned: whether `warn_of_evaluation` has warned in this fit.
        is_said: whether `capture` has said which axes it takes for what.

    Raises:
        TypeError: an option has the wrong type, or picks raw from the output of an RNN whose path is missing.
        ValueError: both `batch_first` and `time_dim` are given.
    """

    pairs: Sequence[tuple[str, str | Swap | None]] = ()
    masks: Masks = field(default_factory=Masks)
    output: Callable[[Any], Any] | None = None
    batch_first: bool | None = None
    time_dim: int | None = None
    is_warned: bool = False
    is_said: bool = False

    def __post_init__(self) -> None:
        check_callable("output", self.output)
        time_axis_of(self.batch_first, self.time_dim)
        if not self.pairs and self.output is not None:
            raise TypeError("rnn: expected a path, as output picks raw from what its module returns, got None")

    def attach(
        self,
        regularizer: Any,
        model: nn.Module,
        batch: Callable[[], Sequence[Any]],
        say: Callable[[str], Any] | None = None,
        layout: bool | None = None,
    ) -> ExitStack:
        """Attach a regularizer to all modules at the paths, until the returned stack is closed.

        If an error occurs, no module stays attached.

        Args:
            regularizer: an `RNNRegularizer`.
            model: the model.
            batch: a function that returns the inputs of the batch, which the functions of masks get.
            say: a function that is called once for each module, at the first loss, with a line that names the axes of
                raw.
            layout: the `batch_first` of a module that does not show it.

        Raises:
            TypeError, ValueError, RuntimeError: as `RNNRegularizer.attach`, or a path names no module.
        """
        with ExitStack() as attached:
            for rnn, path in self.pairs:
                if isinstance(path, Swap):
                    dropout, path = path.into(model, attached), path.path
                else:
                    dropout = None if path is None else _module_at(model, "dropout", path)
                module = _module_at(model, "rnn", rnn)
                batch_first = self.batch_first
                if batch_first is None and self.time_dim is None and layout is not None:
                    batch_first = batch_first_of(module, layout)
                options: dict[str, Any] = {"output": self.output, "batch_first": batch_first, "time_dim": self.time_dim}
                options |= vars(self.masks.of_batch(batch))
                handle = attached.enter_context(regularizer.attach(module, dropout, **options))
                handle.paths, handle.say = (rnn, path), say
            return attached.pop_all()

    def capture(self, begin: Callable[..., Any], output: Any, batch: Sequence[Any], say: Any) -> None:
        """Pass the activations in a model's output to `on_loss_begin`, with their layout and the masks of the batch.

        A mask with more time steps than raw is cut to the last ones, because a text classifier returns only the last
        steps of a long text.

        Args:
            begin: the `on_loss_begin` of a regularizer.
            output: the output of the model, `(decoded, raw, dropped)`.
            batch: the inputs of the batch, which the functions of masks get.
            say: a function that is called once, with a line that names the axes of raw, or `None`.

        Raises:
            TypeError, ValueError, RuntimeError: as `on_loss_begin`, or a function of masks has raised it.
        """
        raw, time_axis = check_output(output)[1], time_axis_of(self.batch_first, self.time_dim)
        raw = raw[-1] if is_list(raw) else raw
        axis = axes_of(data_of(raw), time_axis.number())[0]
        last = (slice(None),) * min(axis, 1) + (slice(-data_of(raw).shape[axis], None),)  # the mask's axis of time
        masks = {name: mask[last] for name, mask in self.masks.of(*batch).items() if mask is not None}
        begin(output, batch_first=self.batch_first, time_dim=self.time_dim, **masks)
        if say is not None and not self.is_said:
            self.is_said = True
            say(f"the model's output: {described(raw, time_axis, masks)}")

    def warn_of_evaluation(self, adapter: str) -> None:
        """Warn, once in a fit, that a training step has no penalty, because all modules are in evaluation.

        Args:
            adapter: the name of the adapter, which knows that this is a training step.
        """
        if not self.is_warned:
            self.is_warned = True
            paths = ", ".join(repr(rnn) for rnn, _ in self.pairs)
            words = f"{adapter}: a training step has no penalty, because all named modules are in evaluation: {paths}; "
            warnings.warn(words + "call train() on them when the fit starts", stacklevel=3)


def pairs_of(rnn: object, dropout: object) -> list[tuple[str, str | None]]:
    """Pair the attribute path of each RNN with the path of its dropout.

    Args:
        rnn: a path or a list of paths.
        dropout: a path or `None` for all RNNs, or a list with a path or `None` for each.

    Raises:
        TypeError: an item is no path.
        ValueError: there is no RNN or the same RNN twice, or the lists have different lengths.
    """
    rnns: Any = rnn if is_list(rnn) else [rnn]
    dropouts: Any = dropout if is_list(dropout) else [dropout] * len(rnns)
    for name, paths in (("dropout", [x for x in dropouts if x is not None]), ("rnn", rnns)):
        for path in paths:
            if not isinstance(path, str) or not path:  # an empty path would be the model itself
                got = "an empty one" if isinstance(path, str) else type(path).__name__
                words = "the attribute path of a module, such as 'encoder.lstm', or a list of paths"
                raise TypeError(f"{name}: expected {words}, got {got}")
    if not rnns or len({*rnns}) < len(rnns):
        raise ValueError(f"rnn: expected at least one path, and each path once, got {rnns}")
    if len(dropouts) != len(rnns):
        raise ValueError(f"dropout: expected a path or None for each of {len(rnns)} RNNs, got {len(dropouts)}")
    return list(zip(rnns, dropouts, strict=True))


def paths_of_learner(rnn: object, dropout: object, fused: dict[str, Any], masks: Masks, **options: Any) -> Paths:
    """Return the paths that a learner of fastai was given.

    Args:
        rnn: as for `pairs_of`, or `None` if the model returns `(decoded, raw, dropped)`.
        dropout: as for `pairs_of`; without `rnn`, whether to swap the last dropout of a language model.
        fused: attributes of the `Paths` that swap that dropout.
        masks: an attribute of the `Paths`.
        **options: other attributes of the `Paths`.

    Raises:
        TypeError, ValueError: as `pairs_of` and `Paths`; or a language model was given a layout.
    """
    if rnn is not None or not (dropout is None or isinstance(dropout, bool)):
        return Paths(pairs_of(rnn, None if dropout is False else dropout), masks, **options)
    paths = Paths((), masks, **options)
    if dropout and (paths.batch_first, paths.time_dim) != (None, None):
        raise TypeError("dropout: expected False beside batch_first or time_dim, as a language model has its layout")
    return replace(paths, **(fused if dropout else {}))


def coefficients_of_learner(rnn: object, *given: Coefficient | None) -> list[Coefficient]:
    """Return alpha and beta of a learner's callback, which are 0 unless they are given, as in fastai.

    Raises:
        TypeError: paths are given, but neither of the coefficients.
    """
    if rnn is not None and all(x is None for x in given):
        raise TypeError("alpha and beta: expected coefficients beside rnn, got none; 0 leaves a term out")
    return [0.0 if x is None else x for x in given]


def check_options_of_fuse(options: Collection[str]) -> None:
    """Check that `fuse` of an adapter gets no coefficients, which the learner's own callback has, and no lengths."""
    for name in {"alpha", "beta"}.intersection(options):
        raise TypeError(f"{name}: expected no coefficient in fuse; set that of the learner's callback instead")
    if "lengths" in options:
        raise TypeError("lengths: expected valid instead, a function of the batch's inputs that returns a mask")


def _module_at(model: nn.Module, kind: str, path: str) -> nn.Module:
    """Return the module at an attribute path; the error for a wrong path lists the children where the path ends."""
    module = model
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            children, at = ", ".join(repr(name) for name, _ in module.named_children()), type(module).__name__
            words = f"{kind}: {type(model).__name__} has no such module at {path!r}"
            raise ValueError(f"{words}; children of the {at}: {children or 'none'}")
        module = child
    return module
