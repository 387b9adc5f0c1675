"""Each script and notebook of examples/, started as its reader would: it learns, and shows AR and TAR."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure.timing import threads
from examples import two_rooms
from tests.conftest import ROOT, more, skip_without

pytestmark = pytest.mark.main

# script -> the framework that it needs, and the pattern of a loss in its output
SCRIPTS = {
    **dict.fromkeys(("loop.py", "custom_rnn.py", "every_layer.py", "two_rooms.py"), (None, r"loss ([\d.]+)")),
    "recurrent_policy.py": (None, r"missed ([\d.]+)"),
    "fastai_lm.py": ("fastai", r"(?m)^.*?\b\d +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+ +\d\d:\d\d"),
    "lightning_lm.py": ("lightning", r"loss ([\d.]+)"),
    "transformers_trainer.py": ("transformers", r"'loss': '?([\d.]+)"),
}
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
    monkeypatch.setattr(sys, "argv", [script])
    with threads(1):
        if script == "two_rooms.py":  # which plans for a minute
            monkeypatch.setattr(two_rooms, "TRIALS", 10)
            two_rooms.main(["--steps", "60"])
        else:
            runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert not any(tmp_path.iterdir()), "an example leaves nothing behind"
    output = capsys.readouterr().out.replace("\r", "\n")
    losses = [float(number) for number in re.findall(loss, output)]
    assert len(losses) >= 3, output
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


def test_vicreg_is_zero_for_numbers_that_vary_and_agree_in_nothing() -> None:
    apart = 2 * torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[-1.0, 1.0], [-1.0, -1.0]]])
    assert [*map(float, two_rooms.vicreg(apart))] == [0.0, 0.0]
    variance, covariance = two_rooms.vicreg(apart[..., :1].expand(2, 2, 2) / 4)
    assert (float(variance), float(covariance)) == pytest.approx(
        (1 - (1 / 3) ** 0.5, 2 / 9 / two_rooms.LATENT), rel=1e-3
    )
