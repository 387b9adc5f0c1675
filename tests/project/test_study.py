"""The demo and the examples learn, and the committed pages of the study show its JSON lines."""

from __future__ import annotations

import random
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from bench.measure.timing import threads
from bench.study import demo, report, run, training
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
    monkeypatch.setattr(demo, "SEEDS", (1, 2))
    monkeypatch.setattr(training, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    demo.main(["--text", str(text), "--plot", str(tmp_path / "plot.png"), "--device", "cpu", "--epochs", "2"])
    output = capsys.readouterr().out
    rows = [[float(x) for x in line.split()] for line in re.findall(r"^ +\d.* +\d+ .*$", output, re.MULTILINE)]
    (unigram,) = re.findall(r"word frequencies alone: ([\d.]+)", output)
    for regularized, plain in zip(rows[::2], rows[1::2], strict=True):
        assert (regularized[:2], plain[:2], regularized[3], plain[3]) == ([2, 1], [0, 0], 2, 2)
        assert plain[4] < float(unigram)
        assert all(0 < small < large for small, large in zip(regularized[-2:], plain[-2:], strict=True)), "AR and TAR"
    (said,) = re.findall(r"change the test perplexity by (\S+)±", output)
    assert float(said) == pytest.approx(mean(x[5] - y[5] for x, y in zip(rows[::2], rows[1::2], strict=True)), abs=0.02)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_study_is_whole_and_its_pages_agree():
    studied = report.load()
    trained = [(run.seed, (run.alpha, run.beta)) for run in studied]
    assert sorted(trained) == sorted(product(run.SEEDS, report.PENALTIES.values()))
    assert all(run.settings == studied[0].settings for run in studied)
    for page, text in report.pages().items():
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


def test_every_example_is_run() -> None:
    assert {file.name for file in (ROOT / "examples").glob("*.*")} == {*SCRIPTS, NOTEBOOK, FASTAI1}


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
