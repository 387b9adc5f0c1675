"""The study, end to end on a small text; its figures on made-up runs; the committed page against the rendered one."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import product
from pathlib import Path

import pytest

from bench.measure import report
from bench.study import report as study_report
from bench.study import run as study
from bench.study.report import COEFFICIENTS, Run, Study
from tests.conftest import more

pytestmark = pytest.mark.main


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
