"""Demo and study on a small text, the parts of their AWD-LSTM, and the figures of made-up and committed runs."""

from __future__ import annotations

import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch

from bench.measure import report, timing
from bench.study import demo, training, two_rooms
from bench.study import report as study_report
from bench.study import run as study
from bench.study.awd_lstm import AWDLSTM, Dropouts
from bench.study.corpus import batches
from bench.study.report import COEFFICIENTS, Run, Study
from bench.study.two_rooms import CHOICE_SEEDS, COMPARISONS, FRESH_SEEDS, Job
from examples import two_rooms as example
from examples.two_rooms import Weights
from tests.conftest import more

pytestmark = pytest.mark.main


def test_the_demo_trains_end_to_end(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(training, "LEARNING_RATE", 0.01)  # there are few steps to learn in
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # where the demo has processes
    files = ["--text", str(text), "--plot", str(tmp_path / "plot.png")]
    with timing.threads(1):
        demo.main([*files, "--device", "cpu", "--epochs", "3", "--alpha", "2", "--beta", "1"])
    output = capsys.readouterr().out
    lines = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ .*$", output.split(demo.HEADER)[1], re.MULTILINE)
    rows = [[float(x) for x in line.split()] for line in lines]
    regularized, plain = ([row[2:] for row in rows if row[:2] == pair] for pair in ([2, 1], [0, 0]))
    for table in regularized, plain:
        epochs, losses, perplexities, *_ = zip(*table, strict=True)
        assert epochs == (1, 2, 3)
        assert all([*x] == sorted({*x}, reverse=True) for x in (losses, perplexities))
    unigram = re.search(r"word frequencies alone: ([\d.]+)", output)
    assert unigram is not None
    assert plain[-1][2] < float(unigram[1])
    assert 0 < regularized[-1][3] < plain[-1][3]
    assert 0 < regularized[-1][4] < plain[-1][4]
    ends = f"validation perplexity after epoch 3: {regularized[-1][2]:.2f} regularized, {plain[-1][2]:.2f} not"
    assert ends in output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_the_unit_whose_changes_are_the_median_without_regularization():
    lists = {"train_loss": [3.0], "valid_loss": [3.0], "ar": [0.1], "tar": [0.2]}
    rest = {"final_train_loss": 3.0, "seconds": 1.0, "settings": {}, "machine": {}}
    runs = [Run(0.0, beta, 1, **lists, **rest) for beta in (1.0, 0.0)]
    jumps = torch.tensor([4.0, 0.5, 1.0, 3.0, -2.0])  # of the five units, in each second step
    plain = torch.arange(6).remainder(2)[:, None] * jumps * torch.ones(2, 1, 1)
    regularized = torch.rand(2, 6, 5)  # other changes, which do not count
    panel = demo.plot(runs, [regularized, plain], Study([])).axes[-1]
    assert "unit 4 " in panel.get_title()
    shown = [torch.tensor(line.get_ydata()) for line in panel.get_lines()]
    torch.testing.assert_close(shown, [regularized[0, :, 4], plain[0, :, 4]])


def test_batches_cover_the_text_in_order():
    rows, lengths = torch.arange(2 * 30).view(2, 30), iter([7, 5, 9, 20])
    pairs = list(batches(rows, lambda: next(lengths)))
    assert torch.equal(torch.cat([ids for ids, _ in pairs], 1), rows[:, :-1])
    assert torch.equal(torch.cat([following for _, following in pairs], 1), rows[:, 1:])


def test_the_hidden_state_is_carried_and_reset():
    ids, model = torch.randint(11, (3, 8)), AWDLSTM(11, 4, 6, 2, Dropouts(0.0, 0.0, 0.0, 0.0, 0.0))
    whole, _, _ = model(ids)
    model.reset()
    first, _, _ = model(ids[:, :5])
    second, _, _ = model(ids[:, 5:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    second.sum().backward()  # by itself: the first part's graph is not reached


@more
def test_a_study_trains_every_setting_and_renders_it(text: Path, tmp_path: Path) -> None:
    results = tmp_path / "small.jsonl"
    options = ["--seeds", "1", "--workers", "1", "--words", "7000", "--epochs", "2"]
    assert study.main(["--text", str(text), "--results", str(results), *options]) == 0
    study_of_one = study_report.load(results)
    assert [run.coefficients for run in study_of_one.runs] == list(COEFFICIENTS)
    for run in study_of_one.runs:
        assert len(run.train_loss) == len(run.valid_loss) == len(run.ar) == len(run.tar) == 2
        assert all(0 < value < 10 for value in (*run.train_loss, *run.valid_loss, run.final_train_loss))
    plain, ar, tar, both = study_of_one.runs
    assert max(ar.ar[-1], both.ar[-1]) < plain.ar[-1], "AR keeps activations small"
    assert tar.tar[-1] < plain.tar[-1], "TAR keeps them slow"
    assert study_report.page(study_of_one, "small") == results.with_suffix(".md").read_text()
    first, _, third, _ = results.read_text().splitlines(keepends=True)
    results.write_text(first + third)
    study.main(["--text", str(text), "--results", str(results), *options])  # goes on
    assert results.read_text().startswith(first + third)
    assert [run.valid_loss for run in study_report.load(results).runs] == [run.valid_loss for run in study_of_one.runs]
    with pytest.raises(ValueError, match=r"other settings \(epochs is 2 there, 3 now\): name another file"):
        study.main(["--text", str(text), "--results", str(results), *options[:-1], "3"])


def made_up(coefficients: tuple[float, float], seed: int, perplexities: list[float]) -> Run:
    """Return a run with these validation perplexities, with a training perplexity of 10 after the last epoch."""
    losses = [math.log(perplexity) for perplexity in perplexities]
    epochs = len(losses)
    figures = {"train_loss": [3.0] * epochs, "ar": [0.1] * epochs, "tar": [0.2] * epochs, "seconds": 60.0}
    facts = {"settings": {"words": 90}, "machine": {"device": "a processor"}}
    return Run(*coefficients, seed, valid_loss=losses, final_train_loss=math.log(10), **figures, **facts)


PLAIN, BOTH = (0.0, 0.0), (2.0, 1.0)
MADE_UP = Study(
    [
        made_up(BOTH, 2, [25.0, 22.0, 26.0]),
        made_up(BOTH, 1, [40.0, 28.0, 24.0]),
        made_up(PLAIN, 1, [40.0, 30.0, 30.0]),
        made_up(PLAIN, 2, [25.0, 20.0, 22.0]),
        made_up(PLAIN, 3, [33.0, 28.0, 29.0]),
    ]
)


def cells(table: str, *start: str) -> list[str]:
    """Return the cells of the only row that begins with `start`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (row,) = [row for row in rows if row[: len(start)] == list(start)]
    return row[len(start) :]


def test_means_and_differences_of_pairs_have_standard_errors() -> None:
    table = study_report.averages_table(MADE_UP)
    # ends 30, 22 and 29: a standard deviation of 4.359, and over the root of three 2.52
    assert cells(table, "(0, 0)", "3")[:3] == ["27.00 ± 2.52", "26.00 ± 3.06", "2.0 ± 0.0"]
    # at their best 24 in the third epoch and 22 in the second; 15 above training on average
    assert cells(table, "(2, 1)", "2") == [
        *("25.00 ± 1.00", "23.00 ± 1.00", "2.5 ± 0.5", "10.00 ± 0.00", "15.00 ± 1.00", "0.915 ± 0.040"),
        *("0.1000 ± 0.0000", "0.2000 ± 0.0000"),
    ]
    table = study_report.paired_table(MADE_UP)
    assert cells(table, "(2, 1)", "end") == ["-6.00", "+4.00", "", "-1.00 ± 5.00", "1 of 2"]
    assert cells(table, "(2, 1)", "best") == ["-6.00", "+2.00", "", "-2.00 ± 4.00", "1 of 2"]
    summary = study_report.summary(MADE_UP)
    assert "ends at a validation perplexity of 27.00 ± 2.52 without a penalty" in summary
    assert cells(summary, "AR and TAR", "2", "1") == ["-1.00 ± 5.00", "1 of 2"]


def test_what_is_committed_is_what_was_studied() -> None:
    file = study_report.COMMITTED
    studied = study_report.load(file)
    assert {(run.coefficients, run.seed) for run in studied.runs} == {*product(COEFFICIENTS, study.SEEDS)}
    assert len({json.dumps(run.settings) for run in studied.runs}) == 1
    assert file.with_suffix(".md").read_text() == study_report.page(studied, file.stem), (
        "run `python -m bench.study.run`"
    )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert f"JSON {digest}" in file.with_suffix(".svg").read_text(), "run `python -m bench.study.run`"
    for page, part in study_report.PAGES.items():
        text = page.read_text()
        assert report.with_part(text, part(studied), study_report.BEGIN) == text


def planned(job: Job, success: float) -> two_rooms.Run:
    return two_rooms.Run(
        *job[:3], success + 0.1, success - 0.1, two_rooms.facts_of(job.steps), {"device": "a processor"}
    )


STRAIGHT, TAR, CLOSE = Weights(0.1, 0.3, 0.0), Weights(1.0, 1.0, 3.0), Weights(0.3, 0.3, 10.0)


def test_settings_are_chosen_by_their_mean_and_compared_in_pairs() -> None:
    means = {STRAIGHT: 0.5, STRAIGHT._replace(beta=1.0): 0.3, TAR: 0.7, CLOSE: 0.65, TAR._replace(beta=0.0): 0.4}
    runs = [planned(Job(weights, seed), success) for weights, success in means.items() for seed in CHOICE_SEEDS]
    runs.append(planned(Job(Weights(1.0, 0.1, 0.0), CHOICE_SEEDS[0]), 0.89))  # with only one seed
    runs.append(planned(Job(CLOSE, 11), 0.9))  # no seed of the choice
    settings = two_rooms.chosen(runs)
    assert [*settings.values()] == [TAR._replace(beta=0.0), TAR, STRAIGHT]
    for distractor, steps in COMPARISONS.values():
        for i, seed in enumerate(reversed(FRESH_SEEDS)):
            changes = {TAR: 0.1 + 0.01 * (i % 2), STRAIGHT: 0.0, TAR._replace(beta=0.0): -0.1}
            runs += [
                planned(Job(weights, seed, distractor, steps), 0.5 + change - 0.2 * distractor + 0.02 * i)
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


def test_what_is_committed_is_what_was_measured_in_two_rooms() -> None:
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
