"""`RNNRegularizer.attach` and `torch.compile`: the numbers of the formula, also in random steps, compiled or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastreg import fused_ar_tar
from tests import language_model as lm
from tests.conftest import more
from tests.language_model import ALPHA, BETA, FUSED, PLAIN, STARTS, VALID, Attached
from tests.random_training import Play

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("dynamo")]


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        *((nn.LSTM, PLAIN), (nn.LSTM, None), (nn.GRU, FUSED), (lm.Elementwise, None)),
        pytest.param(lm.Elementwise, FUSED, marks=more),
    ],
)
def test_ten_models_of_one_class_are_compiled(kind: Any, dropout: Any) -> None:
    for _ in range(10):
        model = Attached(kind, dropout).double()
        run: Any = torch.compile(model, backend="eager")
        for _ in range(2):
            model.check(run(lm.inputs().double()))


@pytest.mark.parametrize("dropout", [None, PLAIN])
def test_a_class_that_was_compiled_before_attach_is_an_error_that_names_the_remedy(dropout: Any) -> None:
    """Dynamo does not guard on hooks."""
    model, x = Attached(lm.Elementwise, dropout), lm.inputs()
    model.handle.remove()
    run: Any = torch.compile(model, backend="eager")
    run(x)
    model.attach()
    with pytest.raises(RuntimeError, match=r"nothing was captured: .* torch\.compiler\.reset\(\)"):
        model.reg.on_backward_begin(run(x).loss)
    torch.compiler.reset()
    model.check(run(x))


@lm.either
def test_a_coefficient_that_changes_compiles_no_code_anew() -> None:
    model, counter = lm.seeded(lambda: lm.Model(lm.Elementwise)), CompileCounterWithBackend("aot_eager")
    reg, run, compilations = lm.attached(model), torch.compile(model, backend=counter), []
    for step in range(3):
        reg.alpha = ALPHA + step
        reg.on_backward_begin(lm.criterion(run(lm.tokens()), lm.tokens())).backward()
        compilations.append(counter.frame_count)
    assert 0 < compilations[0] <= compilations[1] == compilations[2]


def test_masks_count_in_compiled_code() -> None:
    model, own = Attached(nn.GRU, FUSED, valid=lambda *_: VALID, starts=lambda *_: STARTS), ~VALID
    model.begin = lambda x, _: (raw := model.rnn(x)[0], model.dropout(raw, None, own), None)
    for run in (model, torch.compile(model, backend="eager")):
        raw, dropped, _, loss = run(lm.inputs())
        want = fused_ar_tar(raw, dropped, ALPHA, BETA, valid=own, starts=STARTS)
        lm.check_gradients(model, model.reg.on_backward_begin(loss), loss + want)
        assert model.dropout.take() is None


# The seeds have all dropouts and masks, shared or not; from 100 on nets are compiled.
SEEDS: list[Any] = [0, 5, 12, 19, 26, 34, 103, pytest.param(116, marks=pytest.mark.main)]
SEEDS += [pytest.param(seed, marks=more) for seed in (*range(1, 5), 100, 115)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_steps_get_the_gradients_of_plain_pytorch(seed: int) -> None:
    play = Play(seed, compiles=seed >= 100)
    try:
        play.play()
    finally:
        print(f"seed {seed}: {play}")  # where the test fails
    assert play.counts["compared"] > 0
