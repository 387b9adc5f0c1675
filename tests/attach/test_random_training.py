"""Random sequences of training steps with `attach`: `python -m tests.random_training` plays more of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import more
from tests.random_training import Play

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("dynamo")]
FIRST = 1, 5, 6, 12  # a frozen net, three layers, a quantizer, and a module without a dropout
CASES: list[Any] = [pytest.param(seed, False, marks=() if seed in FIRST else more) for seed in range(15)]
CASES += [
    pytest.param(seed, True, marks=[pytest.mark.main] * (seed % 4 > 0) + [more] * (seed > 100))
    for seed in range(100, 106)
]


@pytest.mark.parametrize(("seed", "compiles"), CASES)
def test_a_random_sequence_gets_the_gradients_of_plain_pytorch(seed: int, compiles: bool) -> None:
    play = Play(seed, compiles=compiles)
    try:
        play.play()
    finally:
        print(f"seed {seed}: {play}")  # where the test fails
    assert play.counts["compared"] > 0


@pytest.mark.parametrize("what", ["alpha", "beta", "valid", "starts", "layer"])
def test_a_sequence_whose_reference_is_wrong_fails(what: str) -> None:
    class Wrong(Play):
        def step(self) -> None:
            alpha, beta = self.coefficients
            self.coefficients = alpha * (1.001 if what == "alpha" else 1), beta * (1.001 if what == "beta" else 1)
            self.masks.pop(what, None)
            if what == "layer":
                self.by_hand.dropouts.pop(self.plain.layers[0], None)
            super().step()

    with pytest.raises(AssertionError, match="relative error"):
        Wrong(8, compiles=False).play()
