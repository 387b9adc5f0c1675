"""Random sequences of training steps with `attach`: `python -m tests.sequences` plays more of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import more
from tests.sequences import Play

pytestmark = pytest.mark.usefixtures("dynamo")


CASES: list[Any] = [pytest.param(seed, False, marks=() if seed < 4 else more) for seed in range(15)]
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


def scale(play: Any, alpha: float, beta: float) -> None:
    play.coefficients = play.coefficients[0] * alpha, play.coefficients[1] * beta


# Changes of the reference that make a sequence wrong, each with a seed that shows it.
WRONG: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "alpha": (1, lambda play: scale(play, 1.001, 1.0)),
    "beta": (1, lambda play: scale(play, 1.0, 1.001)),
    "valid steps": (8, lambda play: play.by_hand.masks.pop("valid", None)),
    "starts": (8, lambda play: play.by_hand.masks.pop("starts", None)),
    "layers": (0, lambda play: play.by_hand.dropouts.pop(play.plain.layers[0], None)),
    "states": (1, lambda play: setattr(play.by_hand, "marks_states", False)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_sequence_that_is_wrong_fails(what: str) -> None:
    seed, change = WRONG[what]

    class Wrong(Play):
        def event(self, event: Callable[[], Any]) -> None:
            change(self)
            super().event(event)

    with pytest.raises(AssertionError, match=r"relative error|no error"):
        Wrong(seed, torch.float32, False).play()
