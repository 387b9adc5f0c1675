"""The tensors in the output of a module: find them, compare their memory, and put others in their place."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from fastreg.call.torch_state import plain


def mapped(result: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return an output in which a function has replaced each tensor.

    Tuples, lists, dictionaries, packed sequences and model outputs are copied. Any other object is returned unchanged,
    and so is a sparse tensor.

    Raises:
        TypeError: a dictionary cannot be copied, or refuses new items.
    """
    kind = type(result)
    if kind is tuple or kind is list:
        return kind([mapped(x, function) for x in result])
    if isinstance(result, Tensor):
        return function(result) if result.layout is torch.strided else result
    make = getattr(kind, "_make", None) if isinstance(result, tuple) else None
    if make is not None:  # of a named tuple, such as a packed sequence
        return make([mapped(x, function) for x in result])
    if isinstance(result, dict):
        try:
            made = copy(result)
            own = vars(result) if kind.__dictoffset__ else {}
            if own is result:  # the items are the attributes, as in many an `AttrDict`
                made.__dict__ = made
            elif own:  # a model output has the items as attributes, too
                vars(made).update(mapped(own, function))
            for name, x in dict.items(result):
                made[name] = mapped(x, function)
        except Exception as error:
            raise TypeError(
                f"attach: expected a dictionary that can be copied, got a {kind.__name__} that refuses new items; let "
                "the module return a tuple, a plain dictionary or a model output"
            ) from error
        return made
    return result


def tensors_in(result: Any) -> dict[int, Tensor]:
    """Return the tensors that `mapped` would replace, by their ids."""
    tensors: dict[int, Tensor] = {}
    mapped(result, lambda x: tensors.setdefault(id(x), x))
    return tensors


def address_of(x: Tensor) -> Any:
    """Return where the memory of a tensor starts, or `None` for a subclass: any two of them may share memory."""
    if type(x) is not Tensor and type(x := plain(x)) is not Tensor:
        return None
    return x.data_ptr() - x.storage_offset() * x.itemsize  # to ask the storage takes longer
