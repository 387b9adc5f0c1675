"""`with_penalty`: every backward through its view adds the gradient of a penalty, as if the loss contained it."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_sequence
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from fastreg import ARTAR, fused_ar_tar, fused_dropout_ar_tar, with_penalty
from tests import language_model as lm
from tests.language_model import ALPHA, BETA, HIDDEN
from tests.samples import BF16, DOUBLE, FLOAT, HALF, Decorated

X, LEAF = torch.randn(3, 4), torch.tensor(2.0, requires_grad=True)


def number(dtype: torch.dtype = FLOAT) -> Tensor:
    """Return a leaf, whose gradient is that of `x + 0`."""
    return torch.tensor(2.0, dtype=dtype, requires_grad=True)


def passed(raw: Tensor, dropped: Tensor, scale: Any = 1.0) -> Tensor:
    return with_penalty(dropped, fused_ar_tar(raw, dropped, ALPHA, BETA), scale)


def fused(raw: Tensor, scale: Any = 1.0) -> Tensor:
    return with_penalty(*fused_dropout_ar_tar(raw, 0.4, ALPHA, BETA), scale)


def gradients(loss: Tensor, module: nn.Module, **options: Any) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [*module.parameters()], **options)]


def accumulated(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    """Return what a backward accumulates; `torch.autograd.grad` refuses reentrant checkpoints."""
    module.zero_grad()
    loss.backward()
    return [x.grad for x in module.parameters()]


# What a backward adds


@pytest.mark.parametrize(
    "scale", [1, 0.0, 0.3, torch.tensor(0.3), torch.tensor(3.0, dtype=DOUBLE), torch.tensor(4).half()]
)
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BF16, FLOAT), (FLOAT, DOUBLE), (HALF, BF16)], ids=str)
def test_a_view_and_the_gradient_of_the_penalty(dtypes: Any, needs: bool, scale: Any) -> None:
    x, leaf = X.clone().to(dtypes[0]).requires_grad_(needs), number(dtypes[1])
    y = with_penalty(x, leaf + 0, scale)
    assert y is not x
    assert y._base is x
    assert torch.equal(y, x)
    (2 * y).sum().backward()
    assert not needs or (x.grad == 2).all()  # pyright: ignore[reportOptionalMemberAccess]
    assert leaf.grad == (scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=DOUBLE)).to(dtypes[1])


@pytest.mark.parametrize("needs", [True, False])
def test_a_scale_is_copied_in_the_forward(needs: bool) -> None:
    leaf, scale = number(), torch.tensor(3.0)
    y = with_penalty(X.clone().requires_grad_(needs), leaf + 0, scale)
    scale.fill_(7)
    y.sum().backward()
    assert leaf.grad == 3


@pytest.mark.parametrize(("how", "times"), [("two losses", 2), ("retain_graph", 2), ("their sum", 1), ("another", 0)])
def test_each_backward_through_the_view_adds_it(how: str, times: int) -> None:
    x, leaf = X.clone().requires_grad_(), number()
    y = with_penalty(x, leaf * 1, 0.5)
    one, other = y.sum(), y.sin().sum()
    if how == "their sum":
        (one + other).backward()
    elif how == "another":
        x.sum().backward()
    else:
        one.backward(retain_graph=True)
        (one if how == "retain_graph" else other).backward()
    assert (0 if leaf.grad is None else leaf.grad) == 0.5 * times


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, nullcontext])
def test_x_itself_where_there_is_no_gradient_to_add(around: Any, needs: bool) -> None:
    x, penalty = X.clone().requires_grad_(needs), LEAF * 1
    with around():
        assert with_penalty(x, penalty.detach() if around is nullcontext else penalty, 2.0) is x


def test_several_penalties_and_views() -> None:
    leaves = number(), number()
    y = with_penalty(with_penalty(X, leaves[0] * 1), leaves[1] * 1, 3.0)
    (y.view(-1)[:2].sum() + y.detach().sum()).backward()
    assert [x.grad for x in leaves] == [1, 3]


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("of", ["sum", "square"])
def test_second_derivatives(of: str, scale: Any) -> None:
    """A loss with the norm of its gradient, as WGAN-GP has it: the first gradient contains the penalty's."""
    rnn, results = lm.gru().double(), []
    raw, dropped = lm.run(rnn, nn.Dropout(0.4), lm.inputs().double())
    for plain in (True, False):
        y = dropped if plain else passed(raw, dropped, scale)
        loss = y.sum() if of == "sum" else y.square().sum()
        total = loss + 0.5 * lm.formula(raw, dropped, 1) if plain else loss
        first = torch.autograd.grad(total, [raw, *rnn.parameters()], create_graph=True)
        norm = sum((x.square().sum() for x in first), torch.zeros((), dtype=DOUBLE))
        results.append((first, gradients(total + norm, rnn, retain_graph=True)))
    torch.testing.assert_close(*results)


def test_a_backward_of_the_first_gradient_goes_through_the_view_only_where_it_depends_on_it() -> None:
    leaf, x = number(), X.clone().requires_grad_()
    y = with_penalty(x, leaf.square(), 0.5)
    (first,) = torch.autograd.grad((y.sum()), leaf, create_graph=True)
    assert first == 0.5 * 2 * 2
    first.backward()
    assert leaf.grad == 0.5 * 2
    assert x.grad is None


def test_loss_scales_and_accumulation() -> None:
    """`scale` is what the trainer multiplies its loss by: that of a GradScaler, and 1 over the number of batches."""
    rnn, plain, scaler = lm.gru(), lm.gru(), torch.amp.GradScaler("cpu", init_scale=8.0)  # pyright: ignore
    optimizer, inputs = torch.optim.SGD(rnn.parameters(), 0.1), [lm.inputs(), lm.inputs()]
    for x in inputs:
        raw, _ = rnn(x)
        scaler.scale(passed(raw, raw, scaler.scale(torch.tensor(0.5))).square().sum() / 2).backward()
        raw, _ = plain(x)
        ((raw.square().sum() + lm.formula(raw, raw, 1)) / 2).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(*([x.grad for x in module.parameters()] for module in (rnn, plain)))


def test_the_graph_of_the_penalty_lives_as_long_as_the_view() -> None:
    """There is no reference cycle: without a garbage collection nothing stays."""
    for forwards in (True, False):
        x, kept = X.clone().requires_grad_(), (X * LEAF)
        ref, y = weakref.ref(kept), with_penalty(x, kept.sin().sum())
        if not forwards:
            y.sum().backward()
        del kept, y
        assert ref() is None


# In hooks, under the states of PyTorch


def add_hook(module: nn.Module, terms: list[Any] | None = None, scale: Any = 1.0) -> Any:
    """Regularize an RNN by a plain forward hook, as the recipe for trainers that hide their loss does."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return None
        raw, state = output
        penalty, ar, tar = fused_ar_tar(raw, raw, ALPHA, BETA, return_terms=True)
        if terms is not None:
            terms[:] = [ar, tar]
        return with_penalty(raw, penalty, scale), state

    return module.register_forward_hook(hook)


def test_a_forward_hook_that_asks_whether_its_module_is_in_training() -> None:
    rnn, plain, terms, x = lm.gru(), lm.gru(), [], lm.inputs()
    handle, (raw, _) = add_hook(rnn, terms), plain(x)
    want = raw.sin().sum() + lm.formula(raw, raw, 1)
    got = gradients(rnn(x)[0].sin().sum(), rnn)
    torch.testing.assert_close(got, gradients(want, plain, retain_graph=True))
    torch.testing.assert_close(terms, [raw.square().mean(), raw.diff(dim=1).square().mean()])
    terms.clear()
    want = gradients(raw.sum(), plain)
    torch.testing.assert_close(gradients(rnn.eval()(x)[0].sum(), rnn), want)
    assert terms == []
    handle.remove()
    torch.testing.assert_close(gradients(rnn.train()(x)[0].sum(), rnn), want)


@pytest.mark.parametrize("around", [nullcontext, torch.autograd.graph.save_on_cpu])
@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["inside", "inside, fused", "before", "dropout"])
def test_activation_checkpointing(where: str, reentrant: bool, scale: Any, around: Any) -> None:
    """Of the whole, of what comes after the view, and of the dropout with what comes after it."""
    rnn, x = lm.gru(), lm.inputs().requires_grad_()
    run = partial(checkpoint, use_reentrant=reentrant)
    results = []
    for checkpoints in (True, False):
        torch.manual_seed(3)
        with around():
            if not checkpoints:
                raw, dropped = lm.run(rnn, lm.Locked(0.4), x)
                loss = dropped.sin().square().sum() + 0.5 * lm.formula(raw, dropped, 1)
            elif where == "inside":
                loss = run(lambda x: passed(*lm.run(rnn, lm.Locked(0.4), x), scale).sin(), x).square().sum()
            elif where == "inside, fused":
                loss = run(lambda x: fused(rnn(x)[0], scale).sin(), x).square().sum()
            elif where == "before":
                loss = run(torch.sin, passed(*lm.run(rnn, lm.Locked(0.4), x), scale)).square().sum()
            else:
                loss = run(lambda raw: passed(raw, lm.Locked(0.4)(raw), scale).sin(), rnn(x)[0]).square().sum()
            results.append(accumulated(loss, rnn))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    ("call", "scale"),
    [(lambda raw, scale: passed(raw, raw, scale), 0.5), (fused, torch.tensor(0.5))],
    ids=["pair", "fused"],
)
def test_compiled_autograd(call: Any, scale: Any) -> None:  # which fails on PyTorch's own RNNs
    from torch._dynamo import compiled_autograd

    linear = nn.Linear(HIDDEN, HIDDEN)
    for _ in range(2):
        loss = call(linear(lm.inputs()), scale).sin().sum()
        want = gradients(loss, linear, retain_graph=True)
        linear.zero_grad()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        torch.testing.assert_close([x.grad for x in linear.parameters()], want)


class Gated(nn.Module):
    """A recurrent module that PyTorch compiles without a break, and the loss of it."""

    def __init__(self, where: str, scale: Any) -> None:
        super().__init__()
        self.rnn, self.where, self.scale = lm.Elementwise(HIDDEN, HIDDEN, True), where, scale
        if where == "hook":
            add_hook(self.rnn, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        raw, _ = self.rnn(x)
        if self.where in ("pair", "evaluation"):
            raw = passed(raw, raw, self.scale)
        elif self.where == "fused":
            raw = fused(raw, self.scale)
        return raw.sin()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("where", "scale"),
    [("pair", 0.5), ("pair", torch.tensor(0.5)), ("hook", torch.tensor(0.5)), ("fused", 1.0), ("evaluation", 0.5)],
    ids=["number", "tensor", "hook", "fused", "evaluation"],
)
def test_torch_compile(where: str, backend: str, scale: Any) -> None:
    model, counter = lm.seeded(lambda: Gated(where, scale)), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if where == "evaluation":
        with torch.no_grad():
            compiled(lm.inputs())
    counter.clear()
    for seed in range(3):
        results = []
        for run in (compiled, model):
            torch.manual_seed(seed)
            loss = run(lm.inputs()).square().sum()
            results.append((loss, gradients(loss, model, retain_graph=True), accumulated(loss, model)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1
    raw, _ = model.rnn(x := lm.inputs())  # and the two are not wrong alike
    if where == "hook":
        raw = raw._base
    if where != "fused":
        want = raw.sin().square().sum() + float(scale) * lm.formula(raw, raw, 1)
        torch.testing.assert_close(gradients(compiled(x).square().sum(), model), gradients(want, model))


def test_autocast() -> None:
    linear, x = nn.Linear(HIDDEN, HIDDEN), lm.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        raw = linear(x)
        loss, want = passed(raw, raw).float().sum(), raw.float().sum() + fused_ar_tar(raw, raw, ALPHA, BETA)
    assert raw.dtype == BF16
    torch.testing.assert_close(*(gradients(x, linear, retain_graph=True) for x in (loss, want)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "made",
    [lambda: nn.Parameter(X.clone()), lambda: X.as_subclass(Decorated), lambda: TwoTensor(X, X.clone())],
    ids=["parameter", "decorated", "dispatching"],
)
def test_subclasses_of_tensors(made: Any) -> None:
    x, leaf = made(), number()
    y = with_penalty(x, leaf * 1, 3.0)
    assert type(y) is (Tensor if type(x) is nn.Parameter else type(x))
    y.sum().backward()
    assert leaf.grad == 3
    leaf = number()
    with_penalty(X, (leaf * 1).as_subclass(Decorated), 3.0).sum().backward()
    assert leaf.grad == 3


# Misuse


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("of", ["view", "x"])
def test_a_change_in_place_is_an_error_of_pytorch(of: str, needs: bool) -> None:
    x = X.clone().requires_grad_(needs) * 1
    y = with_penalty(x, LEAF * 1)

    def change() -> None:
        (y if of == "view" else x).mul_(2)
        y.sum().backward()

    with pytest.raises(RuntimeError, match=r"is a view and .* modified inplace"):
        change()


def test_a_second_backward_without_retain_graph_is_an_error_of_pytorch() -> None:
    y = with_penalty(X, LEAF.square())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sin().sum().backward()


ONES = torch.ones(2)
NUMBER = "scale: expected a number or a 0-dim floating-point tensor, got"
REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: (1.0, LEAF), TypeError, "x: expected a tensor, got float"),
    (lambda: ((X, X), LEAF), TypeError, "x: expected a tensor, got tuple .*pass the output"),
    (lambda: (pack_sequence([X]), LEAF), TypeError, "x: expected a tensor, got a PackedSequence"),
    (lambda: (X.to_sparse(), LEAF), TypeError, "x: expected a dense .*tensor, got torch.sparse_coo"),
    (lambda: (torch.nested.nested_tensor([X]), LEAF), TypeError, "x: .* got nested"),
    (lambda: (torch.arange(3), LEAF), TypeError, "x: expected a floating-point tensor, got torch.int64"),
    (lambda: (X, 1.0), TypeError, "penalty: expected a tensor, got float"),
    (lambda: (X, ARTAR(LEAF, LEAF, LEAF)), TypeError, "penalty: expected a tensor, got ARTAR"),
    (lambda: (X, ONES[:1]), ValueError, r"penalty: expected a 0-dim tensor, got shape \(1,\)"),
    (lambda: (X, LEAF, None), TypeError, "scale: expected a real number, got NoneType"),
    (lambda: (X, LEAF, -1), ValueError, "scale: expected a finite number of at least 0, got -1"),
    (lambda: (X, LEAF, float("nan")), ValueError, "scale: expected a finite number of at least 0, got nan"),
    (lambda: (X, LEAF, ONES[0] / 0), ValueError, "scale: expected a finite number of at least 0, got inf"),
    (lambda: (X, LEAF, ONES), ValueError, rf"{NUMBER} torch.float32 \(2,\)"),
    (lambda: (X, LEAF, torch.tensor(1)), ValueError, rf"{NUMBER} torch.int64 \(\)"),
    (lambda: (X, LEAF, LEAF), ValueError, "scale: .*gradient"),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("around", [nullcontext, torch.no_grad])
@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_bad_arguments(make: Any, error: type[Exception], message: str, around: Any) -> None:
    """They are errors without gradients, too."""
    arguments = make()
    with around(), pytest.raises(error, match=message):
        with_penalty(*arguments)
