"""Random sequences of training steps with `attach`: `python -m tests.sequences` plays more of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.sequences import Play

pytestmark = pytest.mark.usefixtures("dynamo")


CASES: list[Any] = [(seed, None) for seed in range(40)]  # a fifth of them compiled
CASES += [pytest.param(seed, True, marks=() if seed % 4 == 0 else pytest.mark.main) for seed in range(104, 118)]


@pytest.mark.parametrize(("seed", "compiles"), CASES)
def test_a_random_sequence_gets_the_gradients_of_plain_pytorch(seed: int, compiles: bool | None) -> None:
    play = Play(seed, compiles=compiles)
    try:
        play.play()
    finally:
        print(f"seed {seed}: {play}")  # where the test fails
    assert play.counts["compared"] > 0


def scaled(name: str) -> Callable[[Any], None]:
    return lambda play: setattr(play.reg, name, getattr(play.reg, name) * 1.001)


# Changes that make a sequence wrong, each with a seed that shows it.
WRONG: dict[str, tuple[int, Callable[[Any], None]]] = {
    "alpha": (0, scaled("alpha")),
    "beta": (0, scaled("beta")),
    "the upstream gradient": (12, lambda play: setattr(play, "scale", play.scale * 1.001)),
    "valid steps": (13, lambda play: play.masks.pop("valid", None)),
    "starts": (89, lambda play: play.masks.pop("starts", None)),
    "layers": (35, lambda play: setattr(play, "layers", "last")),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_sequence_that_is_wrong_fails(what: str) -> None:
    seed, change = WRONG[what]

    class Wrong(Play):
        def step(self) -> None:
            change(self)
            super().step()

    with pytest.raises(AssertionError, match="relative error"):
        Wrong(seed, torch.float32, False).play()
