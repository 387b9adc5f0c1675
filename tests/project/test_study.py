"""The demo and the examples learn; the study follows its rules, and the committed pages show its JSON lines."""

from __future__ import annotations

import hashlib
import json
import random
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import exp
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import nn

from bench.measure.timing import threads
from bench.study import demo, report, run, training
from bench.study.awd_lstm import AWDLSTM, Dropouts
from bench.study.report import PENALTIES, Run
from examples import two_rooms as example
from tests.conftest import ROOT, more, skip_without

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
    values = [3.0], [4.0], [0.1], [0.2], 2.5, 3.5
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(run, "train", lambda job: Run(*job.coefficients, job.seed, *values, job.settings(), {}))
    file = tmp_path / "study.jsonl"
    run.run_all(file)
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[5:]))
    run.run_all(file)
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(whole)
    monkeypatch.setattr(training, "PATIENCE", 4)
    with pytest.raises(ValueError, match="trainings of other settings"):
        run.run_all(file)


def test_a_difference_counts_if_it_is_clear_of_its_standard_error():
    verdicts = [report.verdict(values) for values in ([2.3, 4.9], [-1.0, -2.43], [-1.0, -2.41], [-5.0])]
    assert verdicts == ["higher", "not significant", "lower", "not significant"]


def test_the_pages_show_means_that_are_computed_by_hand():
    """From the JSON lines, without the code that renders them."""
    page = report.COMMITTED.with_suffix(".md").read_text()
    records = [json.loads(line) for line in report.COMMITTED.read_text().splitlines()]
    plain, tar = (
        {x["seed"]: exp(x["test_loss"]) for x in records if (x["alpha"], x["beta"]) == (0, b)} for b in (0, 1)
    )
    apart = [tar[seed] - plain[seed] for seed in plain]
    error, lower = stdev(apart) / len(apart) ** 0.5, sum(x < 0 for x in apart)
    row = f"| TAR | 0 | 1 | {mean(apart):+.2f}±{error:.2f} | {lower} of {len(apart)} seeds | lower |"
    assert row in page
    assert f"| none | {len(plain)} | {mean(plain.values()):.2f}±" in page
    both = [x | {"best": x["valid_loss"].index(min(x["valid_loss"]))} for x in records if x["alpha"] and x["beta"]]
    shares = [(2 * x["ar"][x["best"]] + x["tar"][x["best"]]) / x["best_train_loss"] for x in both]
    assert f"{mean(shares):.1%} with AR and TAR" in page


def test_the_committed_study_is_whole_and_its_pages_agree():
    file = report.COMMITTED
    studied = report.load(file).runs
    assert [(run.coefficients, run.seed) for run in studied] == [*product(PENALTIES.values(), run.SEEDS)]
    assert all(run.settings == studied[0].settings for run in studied)
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:16] in file.with_suffix(".svg").read_text()
    for page, text in report.pages(file).items():
        assert page.read_text() == text, "run `python -m bench.study.run`"


# script -> the framework that it needs, and the pattern of a loss in its output
SCRIPTS = {
    **dict.fromkeys(("loop.py", "custom_rnn.py", "every_layer.py", "two_rooms.py"), (None, r"loss ([\d.]+)")),
    "recurrent_policy.py": (None, r"missed ([\d.]+)"),
    "fastai_lm.py": ("fastai", r"(?m)^.*?\b\d +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+ +\d\d:\d\d"),
    "lightning_lm.py": ("lightning", r"loss ([\d.]+)"),
    "transformers_trainer.py": ("transformers", r"'loss': '?([\d.]+)"),
}
TOLD = "loop.py", "custom_rnn.py"  # how many epochs to train
NOTEBOOK = "fastai_lm.ipynb"
FASTAI1 = "fastai1.py"  # tests/adapters/test_fastai1.py runs it, in another process


def test_every_example_is_run_and_on_a_page_and_on_the_site() -> None:
    files = {file.name for file in (ROOT / "examples").iterdir() if file.is_file()}
    assert files == {*SCRIPTS, NOTEBOOK, FASTAI1}
    pages = "".join(page.read_text() for page in ROOT.glob("docs/*.md"))
    assert all(f"(../examples/{file})" in pages for file in files)
    site = (ROOT / "mkdocs.yml").read_text()
    assert all(f": examples/{file.removesuffix('.py')}.md\n" in site for file in [*SCRIPTS, FASTAI1])


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("script", [pytest.param(x, marks=[more] * (x == "every_layer.py")) for x in SCRIPTS])
def test_an_example_learns(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    framework, loss = SCRIPTS[script]
    if framework is not None:
        skip_without(framework)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [script, *["--epochs", "8"] * (script in TOLD)])
    with threads(1):
        if script == "two_rooms.py":  # which plans for a minute
            monkeypatch.setattr(example, "TRIALS", 10)
            example.main(["--steps", "60"])
        else:
            runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert not any(tmp_path.iterdir()), "an example leaves nothing behind"
    output = capsys.readouterr().out.replace("\r", "\n")
    losses = [float(number) for number in re.findall(loss, output)]
    assert len(losses) == 8 if script in TOLD else len(losses) >= 3, output
    assert losses[-1] < losses[0] - 0.2
    assert {"ar", "tar"} <= {*re.findall(r"\w+", output)}
    tars = re.findall(r"\btar\W+([\d.]+\d)", output) or re.findall(r"([\d.]+) +\d\d:\d\d", output)  # fastai's column
    assert float(tars[-1]) > 0, "the last batch has changes"


def kinds_of_outputs(cell: Any) -> list[list[str]]:
    return [[output.output_type, *sorted(output.get("data", {}))] for output in cell.outputs]


@more
def test_the_notebook_runs_and_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    skip_without("fastai", "bible", "nbclient")
    import nbformat
    from nbclient import NotebookClient

    for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own shows plots
    notebook = nbformat.read(ROOT / "examples" / NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    committed = [kinds_of_outputs(cell) for cell in code]
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert committed == [kinds_of_outputs(cell) for cell in code], "run the notebook, and commit it with its outputs"
    assert "image/png" in committed[-1][-1], "the last cell plots"
