"""`fastreg.fastai1` in real fastai v1 learners: one process for each release runs `fastai1_train.py`."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("release", ["1.0.61", *(pytest.param(old, marks=more) for old in ("1.0.42", "1.0.36"))])
def test_release(release: str, tmp_path: Path) -> None:
    quiet = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
    python("-m", "pytest", *quiet, "tests/adapters/fastai1_train.py", **environment_with(release, tmp_path))
