"""`fastreg.fastai1` in real fastai v1 learners: one process for each release runs `fastai1_train.py`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, more, python

pytestmark = pytest.mark.main

INSTALLED = Path(sys.prefix, "fastai1")


def environment_with(release: str, home: Path) -> dict[str, Any]:
    """Return the variables of a process that imports this release of fastai, or skip the test."""
    if not (INSTALLED / release).is_dir():
        pytest.skip(f"fastai {release} is not installed in {INSTALLED}: run tests/frameworks.sh")
    path = os.pathsep.join([str(INSTALLED / release), str(ROOT)])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(home)}


@pytest.mark.parametrize("release", ["1.0.61", pytest.param("1.0.42", marks=more)])
def test_a_release_of_fastai_1_passes_its_tests(release: str, tmp_path: Path) -> None:
    quiet = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
    python("-m", "pytest", *quiet, "tests/adapters/fastai1_train.py", **environment_with(release, tmp_path))


def test_the_example_learns(tmp_path: Path) -> None:
    shown = python("examples/fastai1.py", **environment_with("1.0.61", tmp_path)).stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)  ar [\d.]*[1-9]\d*  tar [\d.]+", shown)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2
