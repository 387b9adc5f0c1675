"""`fastreg.fastai1` in real fastai v1 learners: `fastai1_train.py`, for each release in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RELEASES = ("1.0.36", "1.0.42", "1.0.61")
ROOT = Path(__file__).parent.parent
INSTALLED = Path(sys.prefix, "fastai1")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.Popen[str], Path]]:
    """Start the tests of all releases at the same time."""
    folder = tmp_path_factory.mktemp("fastai1")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
    started = {}
    for release in RELEASES:
        if (INSTALLED / release).is_dir():
            path = os.pathsep.join([str(INSTALLED / release), str(ROOT)])
            environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(folder)}
            options = {"env": environment, "cwd": ROOT, "text": True, "stderr": subprocess.STDOUT}
            with (folder / release).open("w") as log:
                process = subprocess.Popen([*command, "tests/fastai1_train.py"], stdout=log, **options)
            started[release] = process, folder / release
    return started


@pytest.mark.parametrize("release", RELEASES)
def test_release(release: str, processes: dict[str, tuple[subprocess.Popen[str], Path]]) -> None:
    if release not in processes:
        pytest.skip(f"fastai {release} is not installed in {INSTALLED}: run tests/frameworks.sh")
    process, log = processes[release]
    assert process.wait(300) == 0, log.read_text()[-5000:]
