"""Each script of examples/ as its reader would start it: it ends well, learns, and shows AR and TAR."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# script -> the framework that it needs, and what precedes a loss in its output
SCRIPTS = {
    "loop.py": (None, r"loss ([\d.]+)"),
    "custom_rnn.py": (None, r"loss ([\d.]+)"),
    "fastai_lm.py": ("fastai", r"(?m)^.*?\b\d +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+ +\d\d:\d\d"),
    "lightning_lm.py": ("lightning", r"loss ([\d.]+)"),
    "transformers_trainer.py": ("transformers", r"'loss': '?([\d.]+)"),
}


def test_every_example_is_run_and_in_the_readme() -> None:
    assert {file.name for file in (ROOT / "examples").glob("*.py")} == SCRIPTS.keys()
    readme = (ROOT / "README.md").read_text()
    assert all(f"(examples/{script})" in readme for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_learns(script: str, tmp_path: Path) -> None:
    framework, loss = SCRIPTS[script]
    if framework is not None and find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed: run tests/frameworks.sh")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "examples" / script)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout.replace("\r", "\n")
    losses = [float(number) for number in re.findall(loss, output)]
    assert len(losses) >= 3, output
    assert losses[-1] < losses[0] - 0.2
    assert re.search(r"\bar\b", output)
    assert re.search(r"\btar\b", output)
    assert not any(tmp_path.iterdir()), "an example leaves nothing behind"
