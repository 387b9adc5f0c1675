"""`with_penalty`: every backward through its view adds the gradient of a penalty, as if the loss contained it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastreg import fused_ar_tar, fused_dropout_ar_tar, with_penalty
from tests import language_model as lm
from tests.conftest import BF16, DOUBLE, FLOAT, HALF
from tests.language_model import ALPHA, BETA, HIDDEN

X, LEAF = torch.randn(3, 4), torch.tensor(2.0, requires_grad=True)


def passed(raw: Tensor, dropped: Tensor, scale: Any) -> Tensor:
    return with_penalty(dropped, fused_ar_tar(raw, dropped, ALPHA, BETA), scale)


def fused(raw: Tensor, scale: Any) -> Tensor:
    return with_penalty(*fused_dropout_ar_tar(raw, 0.4, ALPHA, BETA), scale)


def accumulated(loss: Tensor, module: nn.Module) -> list[Tensor | None]:  # reentrant checkpoints refuse autograd.grad
    module.zero_grad()
    loss.backward()
    return [x.grad for x in module.parameters()]


@pytest.mark.parametrize(
    "scale", [1, 0.0, 0.3, torch.tensor(0.3), torch.tensor(3.0, dtype=DOUBLE), torch.tensor(4).half()]
)
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BF16, FLOAT), (FLOAT, DOUBLE), (HALF, BF16)], ids=str)
def test_a_view_is_returned_and_passes_the_gradient_of_the_penalty(dtypes: Any, needs: bool, scale: Any) -> None:
    x, leaf = X.clone().to(dtypes[0]).requires_grad_(needs), LEAF.detach().to(dtypes[1], copy=True).requires_grad_()
    given = scale.clone() if isinstance(scale, Tensor) else scale
    y = with_penalty(x, leaf + 0, given)
    if isinstance(given, Tensor):
        given.fill_(7)  # the forward has a copy
    assert y is not x
    assert y._base is x
    assert torch.equal(y, x)
    (2 * y).sum().backward()
    assert not needs or (x.grad == 2).all()  # pyright: ignore[reportOptionalMemberAccess]
    assert leaf.grad == (scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=DOUBLE)).to(dtypes[1])


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, nullcontext])
def test_x_itself_is_returned_where_there_is_no_gradient_to_add(around: Any, needs: bool) -> None:
    x, penalty = X.clone().requires_grad_(needs), LEAF * 1
    with around():
        assert with_penalty(x, penalty.detach() if around is nullcontext else penalty, 2.0) is x


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("of", [torch.clone, torch.square])
def test_the_norm_of_a_gradient_contains_the_gradient_of_the_penalty(of: Any, scale: Any) -> None:
    rnn, results = lm.gru().double(), []
    raw, dropped = lm.run(rnn, nn.Dropout(0.4), lm.inputs().double())
    for plain in (True, False):
        loss = of(dropped if plain else passed(raw, dropped, scale)).sum()
        total = loss + 0.5 * lm.formula(raw, dropped, 1) if plain else loss
        first = torch.autograd.grad(total, [raw, *rnn.parameters()], create_graph=True)
        norm = torch.stack([x.square().sum() for x in first]).sum()
        results.append((first, torch.autograd.grad(total + norm, [*rnn.parameters()], retain_graph=True)))
    torch.testing.assert_close(*results)


# Parts of a step that a checkpoint may run, as functions of `checkpoint`, the RNN, its input and a scale
REGIONS: dict[str, Any] = {
    "all": lambda cp, rnn, x, scale: cp(lambda x: passed(*lm.run(rnn, lm.Locked(0.4), x), scale).sin(), x),
    "all, fused": lambda cp, rnn, x, scale: cp(lambda x: fused(rnn(x)[0], scale).sin(), x),
    "behind the view": lambda cp, rnn, x, scale: cp(torch.sin, passed(*lm.run(rnn, lm.Locked(0.4), x), scale)),
}


@pytest.mark.parametrize("around", [nullcontext, torch.autograd.graph.save_on_cpu])
@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("is_reentrant", [True, False])
@pytest.mark.parametrize("region", REGIONS)
def test_activation_checkpointing_keeps_the_gradient_of_the_penalty(
    region: str, is_reentrant: bool, scale: Any, around: Any
) -> None:
    rnn, x = lm.gru(), lm.inputs().requires_grad_()
    torch.manual_seed(3)
    with around():
        y = REGIONS[region](partial(checkpoint, use_reentrant=is_reentrant), rnn, x, scale)
        got = accumulated(y.square().sum(), rnn)
    torch.manual_seed(3)
    raw, dropped = lm.run(rnn, lm.Locked(0.4), x)
    want = dropped.sin().square().sum() + 0.5 * lm.formula(raw, dropped, 1)
    torch.testing.assert_close(got, accumulated(want, rnn))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    ("call", "scale"), [(lambda raw, scale: passed(raw, raw, scale), 0.5), (fused, torch.tensor(0.5))]
)
def test_torch_compile_and_compiled_autograd_keep_the_gradients(call: Any, scale: Any) -> None:
    rnn, counter = lm.seeded(lambda: lm.Elementwise(HIDDEN, HIDDEN, True)), CompileCounterWithBackend("aot_eager")

    def run(x: Tensor) -> Tensor:
        return call(rnn(x)[0], scale).sin()

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    of_autograd = partial(compiled_autograd._enable, torch.compile(backend="eager"))
    for seed in range(2):
        results = []
        for forward, backward in ((run, nullcontext), (compiled, nullcontext), (run, of_autograd)):
            torch.manual_seed(seed)
            loss = forward(lm.inputs()).square().sum()
            first = torch.autograd.grad(loss, [*rnn.parameters()], retain_graph=True)
            with backward():
                results.append((loss, first, accumulated(loss, rnn)))
        for got in results[1:]:
            torch.testing.assert_close(got, results[0])
    assert counter.frame_count == 1
