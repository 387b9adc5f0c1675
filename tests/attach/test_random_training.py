"""Random training steps with `attach`: `python -m tests.random_training` plays more of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import more
from tests.random_training import Play

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("dynamo")]
CASES: list[Any] = [0, 6, 12, 30, 34, 103]  # have all dropouts and masks, shared or not; from 100 on they are compiled
CASES += [pytest.param(116, marks=pytest.mark.main), *(pytest.param(x, marks=more) for x in (*range(1, 6), 100, 115))]


@pytest.mark.parametrize("seed", CASES)
def test_random_steps_get_the_gradients_of_plain_pytorch(seed: int) -> None:
    play = Play(seed, compiles=seed >= 100)
    try:
        play.play()
    finally:
        print(f"seed {seed}: {play}")  # where the test fails
    assert play.counts["compared"] > 0
