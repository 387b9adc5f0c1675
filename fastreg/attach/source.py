"""`Source`, which says where activations come from, and `Masks`, which says which of their time steps count.

`RNNRegularizer.attach` checks a source once. Its hooks then ask the source for raw and for the masks of time steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastreg.call.arguments import time_axis_of
from fastreg.call.problem import TimeAxis, is_list
from fastreg.call.rnn_dropout import DropoutWithPenalty

ONE_SEQUENCE = TimeAxis(None, 0)  # (time, hidden)


@dataclass(frozen=True, eq=False)
class Masks:
    """Hold the functions that return the masks of time steps.

    Attributes:
        valid: a function of the arguments of a module's forward, or of a batch, that returns the mask of valid steps,
            or `None` if all steps are valid.
        starts: a function of the same arguments that returns the mask of the steps at which segments start, or `None`.

    Raises:
        TypeError: a function is neither callable nor `None`.
    """

    valid: Callable[..., Tensor | None] | None = None
    starts: Callable[..., Tensor | None] | None = None

    def __post_init__(self) -> None:
        check_callable("valid", self.valid)
        check_callable("starts", self.starts)

    def of(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the masks of valid steps and of starts for these arguments, by their names, where there is one.

        Raises:
            Exception: a function has raised it.
        """
        masks = {name: function(*args, **kwargs) for name, function in vars(self).items() if function is not None}
        return {name: mask for name, mask in masks.items() if mask is not None}


@dataclass(frozen=True, eq=False)
class Source:
    """Hold the facts that say where raw and dropped come from, and which time steps count.

    Attributes:
        module: the module that returns raw. Of a compiled module it is the module inside, whose hooks run.
        dropout: the module that computes dropped from raw; `None` if dropped is raw.
        output: a function that picks raw from the module's output; `None` if raw is that output, its first item, or its
            `last_hidden_state`.
        time_axis: the axis of time.
        masks: the functions of the arguments of the module's forward that say which time steps count.
    """

    module: nn.Module
    dropout: nn.Module | None
    output: Callable[[Any], Any] | None
    time_axis: TimeAxis
    masks: Masks

    def raw_of(self, result: Any) -> Tensor | PackedSequence:
        """Return raw from the output of the module.

        Raises:
            TypeError, ValueError: the output does not show which tensor is raw; the message names the remedy.
        """
        if self.output is not None:
            raw = self.output(result)
        elif type(result) is Tensor:  # asking a tensor for an attribute that it lacks takes long
            raw = result
        else:
            ask: Any = dict.get if isinstance(result, dict) else getattr  # a dictionary may take it for an item
            raw = ask(result, "last_hidden_state", result)
            if is_list(raw) and not _are_layers(raw):
                raw = next(iter(raw), raw)
        if not isinstance(raw, (Tensor, PackedSequence)):
            expected, advice = "output: expected the callable to pick", ""
            if self.output is None:
                expected = f"attach: expected the {type(self.module).__name__} to return"
                advice = "; return it first in a tuple or as last_hidden_state, or pick it by attach(..., output=...)"
            raise TypeError(f"{expected} a tensor or a PackedSequence, got {type(raw).__name__}{advice}")
        is_clear = self.output is not None or self.time_axis.time_dim is not None or isinstance(self.module, nn.RNNBase)
        if not is_clear and isinstance(raw, Tensor) and raw.dim() == 2:
            name = type(self.module).__name__
            raise ValueError(
                f"attach: expected (batch, time, hidden) or (time, batch, hidden) from the {name}, got "
                f"{tuple(raw.shape)}. If this is one time step, attach the module that runs over all time steps. If "
                "these are the rows of several sequences, (batch * time, features), unflatten them in the model, and "
                "pass them through an nn.Identity, which you attach. If this is one sequence, (time, hidden), pass "
                "time_dim=0; if it is a number for each time step, (batch, time), pass time_dim=1"
            )
        return raw

    def time_axis_of_raw(self, raw: Tensor | PackedSequence) -> TimeAxis:
        """Return the axis of time of raw, which is the first if `raw_of` has accepted a tensor of two axes."""
        is_one = self.time_axis.time_dim is None and isinstance(raw, Tensor) and raw.dim() == 2
        return ONE_SEQUENCE if is_one else self.time_axis


def source_of(module: Any, dropout: Any, output: Callable[[Any], Any] | None, given: TimeAxis, masks: Masks) -> Source:
    """Check the arguments of `RNNRegularizer.attach`, and return the source that they describe.

    Args:
        module: as for `attach`.
        dropout: as for `attach`.
        output: as for `attach`.
        given: the axis of time, as the caller has given it; both are `None` to read it from the module.
        masks: the functions of masks.

    Raises:
        TypeError, ValueError: as `attach`.
    """
    check_callable("output", output)
    # torch.compile returns a module around the one whose hooks run
    module, dropout = (getattr(x, "_orig_mod", x) for x in (module, dropout))
    for argument, x, kinds in (("module", module, nn.Module), ("dropout", dropout, (nn.Module, type(None)))):
        if not isinstance(x, kinds):
            raise TypeError(f"{argument}: expected an nn.Module, got {type(x).__name__}")
    name, own, (batch_first, time_dim) = type(module).__name__, getattr(module, "batch_first", None), given
    if batch_first is None and time_dim is None:
        batch_first = own if isinstance(own, bool) else batch_first_inside(module)
    elif isinstance(own, bool) and batch_first is (not own):
        raise ValueError(f"batch_first: expected {own}, as the {name} has it, or None, got {batch_first}")
    elif isinstance(module, nn.RNNBase) and time_dim is not None:
        raise ValueError(f"time_dim: expected None, as the {name} has batch_first={own}, got {time_dim}")
    time_axis = time_axis_of(batch_first, time_dim)
    if isinstance(dropout, DropoutWithPenalty):
        kind = type(dropout).__name__
        if type(dropout).forward is not DropoutWithPenalty.forward:
            words = "a forward without changes, as the penalty is of its result; derive it from nn.Module instead"
            raise TypeError(f"dropout: expected {words}, got the forward of {kind}")
        if (its := dropout.time_axis()) != time_axis:
            raise ValueError(f"dropout: expected a {kind} with {time_axis}, as the {name} has it, got {its}")
    return Source(module, dropout, output, time_axis, masks)


def batch_first_inside(module: nn.Module) -> bool:
    """Return `batch_first` of the RNNs of PyTorch inside a module that has none.

    Raises:
        ValueError: no RNN is inside it, or one that returns `(time, batch, hidden)`.
    """
    inside = {x.batch_first: type(x).__name__ for x in module.modules() if isinstance(x, nn.RNNBase)}
    if list(inside) == [True]:
        return True
    why = f", and may return (time, batch, hidden) like the {inside[False]} inside it" if inside else ""
    raise ValueError(
        "batch_first: expected True for (batch, time, hidden), False for (time, batch, hidden), or time_dim= for any "
        f"other axis of time, as the {type(module).__name__} does not have it{why}, got None"
    )


def _are_layers(items: Sequence[Any]) -> bool:
    """Return whether items are a list of layers, whose batch and time agree, and not an output and a state."""
    sizes = [tuple(getattr(x, "shape", ()))[:2] for x in items[:2]]
    return isinstance(items, list) and len(sizes) == 2 and len(sizes[0]) == 2 and sizes[0] == sizes[1]


def check_callable(name: str, function: object) -> None:
    """Check that an argument is a function or `None`."""
    if function is not None and not callable(function):
        raise TypeError(f"{name}: expected a callable or None, got {type(function).__name__}")
