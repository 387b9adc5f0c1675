"""The world model of examples/two_rooms.py, the choice of weights in bench/study/two_rooms.py, and its results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.measure import report
from bench.study import two_rooms
from bench.study.two_rooms import CHOICE_SEEDS, COMPARISONS, FRESH_SEEDS, Job, Run
from examples import two_rooms as example
from examples.two_rooms import Weights
from tests.project.test_study import cells

pytestmark = pytest.mark.main


def test_the_wall_stops_what_does_not_pass_the_door() -> None:
    cases = {  # position and action -> new position
        ((0.45, 0.5), (0.1, 0.0)): (0.55, 0.5),  # through the door
        ((0.45, 0.3), (0.1, 0.0)): (0.49, 0.3),  # against the wall, from either side
        ((0.55, 0.7), (-0.1, 0.05)): (0.51, 0.75),
        ((0.48, 0.39), (0.04, 0.04)): (0.52, 0.43),  # y is 0.41 at the wall
        ((0.48, 0.41), (0.04, -0.04)): (0.49, 0.37),  # and here 0.39
        ((0.2, 0.1), (0.0, 0.05)): (0.2, 0.15),
        ((0.05, 0.95), (-0.1, 0.1)): (0.02, 0.98),  # in a corner
    }
    position, action = (torch.tensor(column) for column in zip(*cases, strict=True))
    torch.testing.assert_close(example.move(position, action), torch.tensor([*cases.values()]))


def test_walks_are_what_the_actions_do() -> None:
    torch.manual_seed(0)
    positions, actions = example.walks(300)
    assert positions.shape == (300, example.TIME, 2)
    assert actions.shape == (300, example.TIME - 1, 2)
    assert actions.norm(dim=-1).max() <= 1.0001
    torch.testing.assert_close(example.move(positions[:, :-1], example.SPEED * actions), positions[:, 1:])
    rooms = positions[..., 0] < 0.5
    assert 0 < (rooms[:, 1:] != rooms[:, :-1]).float().mean() < 0.1, "a few walks pass the door"


def test_an_image_shows_the_dot_and_the_distractor() -> None:
    torch.manual_seed(0)
    place, other = torch.tensor([[[0.2, 0.6]]]), torch.tensor([[[0.8, 0.2]]])
    alone, both = (example.images(place, distractor).view(16, 16) for distractor in (None, other))
    assert divmod(int(alone.argmax()), 16) == (3, 9)  # 0.2 * 15 and 0.6 * 15
    assert alone[12, 3] < 0.4 < both[12, 3] < both[3, 9]


def test_vicreg_is_zero_for_numbers_that_vary_and_agree_in_nothing() -> None:
    apart = 2 * torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[-1.0, 1.0], [-1.0, -1.0]]])
    assert [*map(float, example.vicreg(apart))] == [0.0, 0.0]
    variance, covariance = example.vicreg(apart[..., :1].expand(2, 2, 2) / 4)
    assert (float(variance), float(covariance)) == pytest.approx((1 - (1 / 3) ** 0.5, 2 / 9 / example.LATENT), rel=1e-3)


def test_a_plot_has_a_panel_for_each_model(tmp_path: Path) -> None:
    file = tmp_path / "rooms.png"
    example.plot({name: example.WorldModel() for name in example.SETTINGS}, str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


def made_up(job: Job, success: float) -> Run:
    return Run(*job[:3], success + 0.1, success - 0.1, two_rooms.facts_of(job.steps), {"device": "a processor"})


PLAIN, TAR, CLOSE = Weights(0.1, 0.3, 0.0), Weights(1.0, 1.0, 3.0), Weights(0.3, 0.3, 10.0)


def test_settings_are_chosen_by_their_mean_and_compared_in_pairs() -> None:
    means = {PLAIN: 0.5, PLAIN._replace(beta=1.0): 0.3, TAR: 0.7, CLOSE: 0.65, TAR._replace(beta=0.0): 0.4}
    runs = [made_up(Job(weights, seed), success) for weights, success in means.items() for seed in CHOICE_SEEDS]
    runs.append(made_up(Job(Weights(1.0, 0.1, 0.0), CHOICE_SEEDS[0]), 0.89))  # with only one seed
    runs.append(made_up(Job(CLOSE, 11), 0.9))  # no seed of the choice
    settings = two_rooms.chosen(runs)
    assert [*settings.values()] == [TAR._replace(beta=0.0), TAR, PLAIN]
    for distractor, steps in COMPARISONS.values():
        for i, seed in enumerate(reversed(FRESH_SEEDS)):
            changes = {TAR: 0.1 + 0.01 * (i % 2), PLAIN: 0.0, TAR._replace(beta=0.0): -0.1}
            runs += [
                made_up(Job(weights, seed, distractor, steps), 0.5 + change - 0.2 * distractor + 0.02 * i)
                for weights, change in changes.items()
            ]
    table = two_rooms.summary(runs)
    # 0.00 to 0.18 in steps of 0.02: a standard deviation of 0.0606, and over the root of ten 0.019
    assert cells(table, "only the dot", "without TAR, weights chosen anew", "0.1, 0.3, 0") == [
        *("0.590 ± 0.019", "0.690 ± 0.019", "0.490 ± 0.019", "+0.105 ± 0.002")
    ]
    assert cells(table, "with a distractor", "without TAR")[-1] == "+0.205 ± 0.002"
    assert cells(table, "with a distractor", "with TAR")[1:] == ["0.495 ± 0.020", "0.595 ± 0.020", "0.395 ± 0.020", ""]


def test_an_interrupted_experiment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Job] = []

    def train(weights: Weights, seed: int, steps: int, distractor: bool) -> Weights:
        if len(trained) == 100 and not before:
            raise KeyboardInterrupt
        trained.append(Job(weights, seed, distractor, steps))
        return weights

    monkeypatch.setattr(example, "train", train)
    monkeypatch.setattr(
        example, "success", lambda model, _: (0.5, 0.1 + model.variance / 10 if model.beta == 0 else 0.5)
    )
    file, before = tmp_path / "rooms.jsonl", ""
    with pytest.raises(KeyboardInterrupt):
        two_rooms.run_all(file)
    before = file.read_text()
    assert before.count("\n") == 100
    two_rooms.run_all(file)
    assert file.read_text().startswith(before)
    runs = two_rooms.load(file)
    assert [run.job for run in runs] == trained
    assert len({*trained}) == len(trained) == 80 + 24 + 8 * 2 + 3 * 10 * 3


def test_what_is_committed_is_what_was_measured() -> None:
    file = two_rooms.COMMITTED
    runs = two_rooms.load(file)
    done = {run.job for run in runs}
    assert len(done) == len(runs)
    assert done == {*two_rooms.jobs(file)}, "runs are missing: run `python -m bench.study.two_rooms`"
    assert all(run.settings == two_rooms.facts_of(run.job.steps) for run in runs)
    assert two_rooms.chosen(runs) == example.SETTINGS, "the example has the weights that were chosen"
    assert file.with_suffix(".md").read_text() == two_rooms.page(runs), "run `python -m bench.study.two_rooms`"
    for page, part in two_rooms.PAGES.items():
        text = page.read_text()
        assert report.with_part(text, part(runs), two_rooms.BEGIN) == text
