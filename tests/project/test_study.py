"""Demo and studies on small data, their rules, and the agreement of the committed pages with the JSON lines."""

from __future__ import annotations

import hashlib
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import exp
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from torch import nn

from bench.study import demo, report, run, training, two_rooms
from bench.study.awd_lstm import AWDLSTM, Dropouts
from bench.study.report import PENALTIES, Run
from examples import two_rooms as example

pytestmark = pytest.mark.main


def test_the_demo_trains_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """In the text every word tells much about the next."""
    draw, nouns, text = random.Random(0), ["dog", "cat", "sun", "sea"], tmp_path / "text.txt"
    sentences = [f"The {draw.choice(nouns)} saw the {draw.choice(nouns)}, and was glad." for _ in range(720)]
    text.write_text("\n".join(sentences), encoding="utf-8")
    monkeypatch.setattr(training, "LEARNING_RATE", 0.01)  # there are few steps to learn in
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # where the demo has processes
    files = ["--text", str(text), "--plot", str(tmp_path / "plot.png")]
    demo.main([*files, "--device", "cpu", "--epochs", "2", "--alpha", "2", "--beta", "1"])
    output = capsys.readouterr().out
    rows = [[float(x) for x in line.split()] for line in re.findall(r"^ +\d.* +\d+ .*$", output, re.MULTILINE)]
    (*_, regularized), (*_, plain) = ([row for row in rows if row[:2] == pair] for pair in ([2, 1], [0, 0]))
    (unigram,) = re.findall(r"word frequencies alone: ([\d.]+)", output)
    assert regularized[2] == plain[2] == 2
    assert plain[4] < float(unigram)
    assert all(0 < small < large for small, large in zip(regularized[5:], plain[5:], strict=True)), "AR and TAR"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_hidden_state_is_carried_and_reset():
    ids, model = torch.randint(11, (3, 8)), AWDLSTM(11, 4, 6, 2, Dropouts(0.0, 0.0, 0.0, 0.0, 0.0))
    whole, _, _ = model(ids)
    model.reset()
    first, second = (model(part)[0] for part in (ids[:, :5], ids[:, 5:]))
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    second.sum().backward()  # by itself: the first part's graph is not reached


def test_a_training_ends_when_its_validation_loss_stops_falling():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 64.0)
    stopping, rates = training.EarlyStopping(model, optimizer), []
    for epoch, loss in enumerate([5.0, 4.0, 4.5, 4.0, 3.0, *[3.5] * 3, *[3.0] * 3, 3.1, 3.0, 2.0, *[2.5] * 9]):
        model.weight.data.fill_(epoch)
        if stopping.ends(loss):
            break
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [64.0] * 7 + [16.0] * 3 + [4.0] * 6, "no fall for three epochs, twice; the third time it ends"
    stopping.restore()
    assert model.weight.item() == 13, "the weights of the best epoch"


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def made_up(job: run.Job) -> Run:
        return Run(*job.coefficients, job.seed, [3.0], [4.0], [0.1], [0.2], 2.5, 3.5, job.settings(), {})

    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(run, "train", made_up)
    file = tmp_path / "study.jsonl"
    run.run_all(file)
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[5:]))
    run.run_all(file)
    assert file.read_text().startswith("".join(whole[5:]))
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(whole)
    monkeypatch.setattr(training, "PATIENCE", 4)
    with pytest.raises(ValueError, match="trainings of other settings"):
        run.run_all(file)


def test_a_difference_counts_if_it_is_clear_of_its_standard_error():
    verdicts = [report.verdict(values) for values in ([2.3, 4.9], [-1.0, -2.43], [-1.0, -2.41], [-5.0])]
    assert verdicts == ["higher", "not significant", "lower", "not significant"]


def test_the_share_of_a_penalty_is_taken_at_the_best_epoch():
    run_with_both = Run(2.0, 1.0, 1, [3.0, 2.0], [5.0, 4.0], [0.9, 0.1], [0.9, 0.2], 2.5, 3.5, {}, {})
    assert run_with_both.share == pytest.approx((2 * 0.1 + 0.2) / 2.5)


def test_the_pages_show_means_that_are_computed_by_hand():
    """From the JSON lines, without the code that renders them."""
    records = [json.loads(line) for line in report.COMMITTED.read_text().splitlines()]
    plain, tar = (
        {x["seed"]: exp(x["test_loss"]) for x in records if (x["alpha"], x["beta"]) == (0, b)} for b in (0, 1)
    )
    apart = [tar[seed] - plain[seed] for seed in plain]
    error, lower = stdev(apart) / len(apart) ** 0.5, sum(x < 0 for x in apart)
    row = f"| TAR | 0 | 1 | {mean(apart):+.2f}±{error:.2f} | {lower} of {len(apart)} seeds | lower |"
    assert row in report.COMMITTED.with_suffix(".md").read_text()
    assert f"| none | {len(plain)} | {mean(plain.values()):.2f}±" in report.COMMITTED.with_suffix(".md").read_text()
    records = [json.loads(line) for line in two_rooms.COMMITTED.read_text().splitlines()]
    weights = example.SETTINGS["with TAR"]
    fresh = [x for x in records if x["weights"] == [*weights] and x["seed"] in two_rooms.FRESH_SEEDS]
    found = [x for x in fresh if not x["distractor"] and x["settings"]["steps"] == two_rooms.STEPS]
    success = mean((x["same_room"] + x["other_room"]) / 2 for x in found)
    row = f"| only the dot | with TAR | {', '.join(f'{x:g}' for x in weights)} | {success:.3f}±"
    assert row in two_rooms.COMMITTED.with_suffix(".md").read_text()


def test_the_committed_studies_are_whole_and_their_pages_agree():
    file, rooms = report.COMMITTED, two_rooms.load(two_rooms.COMMITTED)
    studied = report.load(file).runs
    assert [(run.coefficients, run.seed) for run in studied] == [*product(PENALTIES.values(), run.SEEDS)]
    assert all(run.settings == studied[0].settings for run in studied)
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:16] in file.with_suffix(".svg").read_text()
    done = [run.job for run in rooms]
    assert sorted(done) == sorted({*two_rooms.jobs(two_rooms.COMMITTED)}), "run `python -m bench.study.two_rooms`"
    assert all(run.settings == two_rooms.facts_of(run.job.steps) for run in rooms)
    assert two_rooms.chosen(rooms) == example.SETTINGS, "the example has the weights that were chosen"
    *_, alone = example.SETTINGS.values()
    assert {*alone[:2]} <= {*two_rooms.VICREG_ALONE[1:-1]}, "the best weights without TAR are on the edge of the grid"
    for page, text in [*report.pages(file).items(), *two_rooms.pages(two_rooms.COMMITTED).items()]:
        assert page.read_text() == text, "run `python -m bench.study.run` or `python -m bench.study.two_rooms`"
