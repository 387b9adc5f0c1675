"""The plan of all calls with one key, and the node that differentiates these calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from fastreg.call import arguments
from fastreg.call.fold import Fold, fold_of
from fastreg.call.private import apply_of, version_of
from fastreg.call.problem import Coefficient, Options, Penalty, compute_dtype, is_on
from fastreg.call.torch_state import observed, untraced
from fastreg.kernels.backend import Backend
from fastreg.kernels.view import EncodedSteps, Layout, Spec, Values, layout_of

# Raw; dropped, or for an operation that drops units, the mask or a probability; alpha and beta.
Inputs: TypeAlias = tuple[Tensor | None, Tensor | float | None, Coefficient, Coefficient]
Pair: TypeAlias = tuple[Tensor | None, Tensor | None]  # the tensors of a call: raw, and dropped, the mask or a seed
Gradients: TypeAlias = Sequence[Tensor | None]
Results: TypeAlias = tuple[Sequence[Tensor], Penalty]  # results before the penalty, and the penalty


def facts_of(values: Iterable[object]) -> list[object] | None:
    """Return, in one list, all facts of some values that a check or a plan may depend on.

    A tensor has six facts. A float has one: whether it differs from 0.

    Returns:
        The facts; `None` if they do not determine a plan, or if a tensor has no memory, such as a wrapper of vmap.
    """
    facts: list[object] = []
    try:
        for x in values:
            # The values of a negated view have the other sign in memory. Zeros, meta and empty tensors have no address.
            if type(x) is Tensor and (address := x.data_ptr()) and not x.is_neg():
                facts += x.shape, x.stride(), x.dtype, x.device, address % 16 == 0, x.requires_grad
            elif x is None or type(x) is float:
                facts.append(x if x is None else x != 0)
            else:
                return None
    except RuntimeError:  # PyTorch's: a nested tensor has no strides, and a sparse one has no address
        return None
    return facts


class Plan:
    """Hold the facts that all calls with one key share, and compute these calls; each operation is a subclass.

    The first call with a key makes the plan, which checks the arguments of this call.

    Without a backend, the plan computes calls by the formula. Otherwise `finish` prepares launches. Threads share
    plans, so a plan is complete when it is kept.

    Args:
        inputs: raw and dropped, each `None` if no term reads it, or if the operation does not take it; alpha and beta.
        options: the other arguments of the first call.
        layer: the number of the layer in a list, for messages.

    Attributes:
        is_empty: whether no term reads anything; then the plan has no other facts.
        spec: what is computed.
        shape, device: the shape and the device of the activations.
        time_dim: the axis of time, from the end, of the tensors that kernels or the formula read.
        backend: the code that runs; `None` if plain PyTorch has to see each call, or runs it.
        encode: the function that encodes lengths, valid and starts; `None` until some are checked.
        mover: the fold that moves the tensors of a call; `None` if kernels read them in place.
        fold: the fold of the tensors that kernels read.
        needs: for each tensor of a call, whether it needs a gradient.
        is_in_order: whether lanes must have the order of the tensors' axes, instead of that of memory.
        saves_all: whether nodes save all tensors of a call, or only those that need a gradient.
        facts: the facts of the tensors that its nodes save.
        is_differentiable: whether a tensor of a call needs a gradient.
        in_memory: whether a coefficient is a tensor, which may change before the backward.

    Raises:
        TypeError, ValueError: as `fused_ar_tar` and `fused_dropout_ar_tar`.
    """

    backend: Backend | None = None
    encode: Callable[[Sequence[Tensor | None]], EncodedSteps] | None = None
    fold: Fold
    mover: Fold | None = None
    needs: Sequence[bool] = ()
    is_in_order = False
    saves_all = False
    facts: Sequence[object] = ()

    def __init__(self, inputs: Inputs, options: Options, layer: int | None) -> None:
        arguments.check_options(options.reduction, return_terms=options.return_terms)
        axis, (raw, dropped, alpha, beta) = arguments.axis_of(options.batch_first, options.time_dim), inputs
        self.is_empty = raw is None and dropped is None
        if self.is_empty:
            return
        pair = arguments.check_pair(raw, dropped, options.time_dim, layer)
        arguments.check_devices((alpha, beta), pair)
        x, *_ = pair.values()
        self.spec = Spec(
            by_ar=is_on(alpha),
            by_tar=is_on(beta),
            return_terms=options.return_terms,
            ar_of_raw=raw is dropped,
            dtype=options.dtype or compute_dtype(pair.values()),
            reduction=options.reduction,
        )
        self.shape, self.device, self.time_dim = x.shape, x.device, axis % x.dim() - x.dim()

    @staticmethod
    def without_unread(
        first: Any, second: Any, alpha: Coefficient, beta: Coefficient, return_terms: bool
    ) -> Sequence[Any]:
        """Return the activations of a call, with `None` for a tensor that no term reads."""
        return first, second

    def tensors_of(self, first: Any, second: Any) -> Pair:
        """Return the tensors of a call, given its activations."""
        return first, second

    def formula(self, values: Values, tensors: Pair) -> Results:
        """Compute a call in plain PyTorch."""
        raise NotImplementedError

    def prepare(self, backend: Backend, tensors: Pair, layouts: Sequence[Layout | None]) -> None:
        """Prepare the launches of calls like this one; set `needs` and `saves_all`."""
        raise NotImplementedError

    def launch(self, values: Values, tensors: Pair) -> tuple[Tensor, ...]:
        """Launch the forward; return a tuple of results, with terms if they are wanted."""
        raise NotImplementedError

    def differentiate(self, upstream: Gradients, saved: Pair, values: Values) -> Gradients:
        """Launch the backward; return a gradient, or `None`, for each tensor of the call.

        Args:
            upstream: the upstream gradients of the results; some may be `None`.
            saved: the tensors of the call, `None` for those that are not saved.
            values: the values of the call.
        """
        raise NotImplementedError

    def finish(self, tensors: Pair, values: Values) -> None:
        """Prepare launches, for the tensors and the values of the first call, unless the formula computes the calls."""
        if self.backend is None:
            return
        is_whole = values.bits is None
        layouts = self.layouts(tensors, self.shape)
        self.fold, fits = fold_of(layouts, self.time_dim, is_whole, self.is_in_order)
        if not fits:
            self.mover, self.time_dim = self.fold, -2
            tensors = self.moved(self.mover, tensors)
            layouts = self.layouts(tensors, self.mover.sizes())
            self.fold, _ = fold_of(layouts, -2, is_whole, self.is_in_order)
        self.prepare(self.backend, tensors, layouts)
        self.is_differentiable = True in self.needs
        self.in_memory = isinstance(values.alpha, Tensor) or isinstance(values.beta, Tensor)
        self.facts = facts_of(self.saved(tensors)) or ()

    @staticmethod
    def layouts(tensors: Pair, shape: Sequence[int]) -> list[Layout | None]:
        """Return the layouts of the tensors of a call; a mask may repeat one row."""
        return [x if x is None else layout_of(x.expand(shape)) for x in tensors]

    def __call__(self, tensors: Pair, values: Values) -> Results:
        """Compute a call, and return its results."""
        mover = self.mover
        if mover is not None:
            tensors = self.moved(mover, tensors)
        if self.backend is None:
            return self.formula(values, tensors)
        results = _apply(self, values, *tensors) if self.is_differentiable else self.launch(values, tensors)
        if self.spec.return_terms:
            *others, value, terms = results
        else:
            (*others, value), terms = results, None
        return others if mover is None else [*map(mover.restored, others)], Penalty(value, terms)

    @staticmethod
    def moved(mover: Fold, tensors: Pair) -> Pair:
        """Return the tensors of a call as kernels can read them, if they cannot be read in place."""
        return mover.moved(tensors[0]), mover.moved(tensors[1])

    def saved(self, tensors: Pair) -> Sequence[Tensor | None]:
        """Return the tensors that a node saves, with `None` for others."""
        return tensors if self.saves_all else [x if need else None for x, need in zip(tensors, self.needs, strict=True)]


# ---- the node


class Node(Function):
    """Compute a call, and save the tensors that its backward reads.

    Coefficients need no saving: a node keeps them and their versions.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, values: Values, first: Tensor | None, second: Tensor | None) -> Any:
        results = plan.launch(values, (first, second))
        ctx.plan, ctx.values = plan, values
        if plan.in_memory:
            ctx.versions = versions_of(values)
        ctx.save_for_backward(*plan.saved((first, second)))
        if len(results) > 1:  # more outputs cost 3 us
            ctx.set_materialize_grads(False)  # PyTorch need not make zeros for an output without a gradient
            if plan.spec.return_terms:
                ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan, values = ctx.plan, ctx.values
        if plan.spec.return_terms:
            upstream = upstream[:-1]  # terms have no gradient
        if upstream[0] is None and upstream[-1] is None:
            return (None,) * (2 + len(plan.needs))
        saved = ctx.saved_tensors
        if plan.in_memory and upstream[-1] is not None:  # only the penalty's gradient needs coefficients
            arguments.check_unchanged(ctx.versions, versions_of(values))
        # Hooks on saved tensors, and changes of their `data`, may have changed a layout.
        facts = None if torch.is_grad_enabled() or observed() else facts_of((*saved, *upstream))
        if facts is None or facts[: len(plan.facts)] != plan.facts:
            return None, None, *differentiate_formula(plan, upstream, saved, values)
        return None, None, *plan.differentiate(upstream, saved, values)


def versions_of(values: Values) -> Sequence[int]:
    """Return how often each coefficient in memory had been changed in place."""
    return [version_of(x) if isinstance(x, Tensor) else 0 for x in (values.alpha, values.beta)]


_apply = apply_of(Node)


@untraced  # Dynamo may compile the frame of a backward, and AOTAutograd cannot differentiate in it
def differentiate_formula(plan: Plan, upstream: Gradients, saved: Any, values: Values) -> Gradients:
    """Differentiate the formula, so that its gradients can be differentiated again.

    The formula runs in the dtype of the penalty, and each gradient is rounded once.

    Args:
        plan: the plan of the call.
        upstream: the upstream gradients of the results; some may be `None`.
        saved: the tensors of the call.
        values: the values of the call.
    """
    again, dtype = torch.is_grad_enabled(), plan.spec.dtype
    tensors = [*zip(saved, plan.needs, strict=True)]
    with torch.enable_grad():
        inputs: Any = [
            (x if x.requires_grad else x.detach().requires_grad_()).to(dtype).view_as(x) if need else x
            for x, need in tensors
        ]
        others, penalty = plan.formula(values, inputs)
        wanted = [x for x, need in zip(inputs, plan.needs, strict=True) if need]
        pairs = zip((*others, penalty.value), upstream, strict=True)
        pairs = [(x, grad.to(x.dtype)) for x, grad in pairs if grad is not None and x.requires_grad]
        found = map(torch.zeros_like, wanted)
        if pairs:
            results, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(results, wanted, grads, create_graph=again))
    return [next(found).to(x.dtype) if need else None for x, need in tensors]
