"""Each script and notebook of examples/, started as its reader would: it learns, and shows AR and TAR."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
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


def test_every_example_is_run_and_on_a_page_and_on_the_site() -> None:
    files = {file.name for file in (ROOT / "examples").iterdir() if file.is_file()}
    assert files == {*SCRIPTS, NOTEBOOK}
    pages = "".join(page.read_text() for page in ROOT.glob("docs/*.md"))
    assert all(f"(../examples/{file})" in pages for file in files)
    site = (ROOT / "mkdocs.yml").read_text()
    assert all(f": examples/{file.removesuffix('.py')}.md\n" in site for file in SCRIPTS)


Start = Callable[..., tuple[list[float], str]]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Return a function that runs a script in a folder, and returns the losses that it shows, and all of its output."""

    def run(script: str, *options: str) -> tuple[list[float], str]:
        framework, loss = SCRIPTS[script]
        if framework is not None:
            skip_without(framework)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", [script, *options])
        with threads(1):
            if script == "two_rooms.py":  # which plans for a minute
                monkeypatch.setattr(two_rooms, "TRIALS", 10)
                two_rooms.main(["--steps", "60"])
            else:
                runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        assert not any(tmp_path.iterdir()), "an example leaves nothing behind"
        output = capsys.readouterr().out.replace("\r", "\n")
        return [float(number) for number in re.findall(loss, output)], output

    return run


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("script", [pytest.param(x, marks=[more] * (x == "every_layer.py")) for x in SCRIPTS])
def test_an_example_learns(script: str, started: Start) -> None:
    losses, output = started(script)
    assert len(losses) >= 3, output
    assert losses[-1] < losses[0] - 0.2
    assert {"ar", "tar"} <= {*re.findall(r"\w+", output)}
    tars = re.findall(r"\btar\W+([\d.]+\d)", output) or re.findall(r"([\d.]+) +\d\d:\d\d", output)  # fastai's column
    assert float(tars[-1]) > 0, "the last batch has changes"


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "two_rooms.py"])
def test_an_example_ends_after_as_many_steps_as_it_is_told(script: str, started: Start) -> None:
    losses, _ = started(script, "--updates" if script == "recurrent_policy.py" else "--epochs", "1")
    assert len(losses) == (2 if script == "every_layer.py" else 1)  # with TAR and without


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
    torch.testing.assert_close(two_rooms.move(position, action), torch.tensor([*cases.values()]))


def test_walks_are_what_the_actions_do() -> None:
    torch.manual_seed(0)
    positions, actions = two_rooms.walks(300)
    assert positions.shape == (300, two_rooms.TIME, 2)
    assert actions.shape == (300, two_rooms.TIME - 1, 2)
    assert actions.norm(dim=-1).max() <= 1.0001
    torch.testing.assert_close(two_rooms.move(positions[:, :-1], two_rooms.SPEED * actions), positions[:, 1:])
    rooms = positions[..., 0] < 0.5
    assert 0 < (rooms[:, 1:] != rooms[:, :-1]).float().mean() < 0.1, "a few walks pass the door"


def test_an_image_shows_the_dot_and_the_distractor() -> None:
    torch.manual_seed(0)
    place, other = torch.tensor([[[0.2, 0.6]]]), torch.tensor([[[0.8, 0.2]]])
    alone, both = (two_rooms.images(place, distractor).view(16, 16) for distractor in (None, other))
    assert divmod(int(alone.argmax()), 16) == (3, 9)  # 0.2 * 15 and 0.6 * 15
    assert alone[12, 3] < 0.4 < both[12, 3] < both[3, 9]


def test_vicreg_is_zero_for_numbers_that_vary_and_agree_in_nothing() -> None:
    apart = 2 * torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[-1.0, 1.0], [-1.0, -1.0]]])
    assert [*map(float, two_rooms.vicreg(apart))] == [0.0, 0.0]
    variance, covariance = two_rooms.vicreg(apart[..., :1].expand(2, 2, 2) / 4)
    assert (float(variance), float(covariance)) == pytest.approx(
        (1 - (1 / 3) ** 0.5, 2 / 9 / two_rooms.LATENT), rel=1e-3
    )


def test_a_plot_has_a_panel_for_each_model(tmp_path: Path) -> None:
    file = tmp_path / "rooms.png"
    two_rooms.plot({name: two_rooms.WorldModel() for name in two_rooms.SETTINGS}, str(file))
    assert file.read_bytes().startswith(b"\x89PNG")
