"""A Triton that cannot be imported: calls run the formula after one warning."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastreg.call import backends
from tests.conftest import ROOT, python

pytestmark = pytest.mark.slow


def test_a_broken_triton_is_named(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so: undefined symbol')\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    ask = "from fastreg import __main__\nimport torch\nfrom fastreg.call.backends import backend_for\n"
    ask += "backend_for(torch.device('cuda'))\n" * 2 + "__main__.main()"
    done = python("-c", ask, folder=tmp_path, PYTHONPATH=path, TRITON_INTERPRET="0")
    why = "Triton cannot be used (OSError: libtriton.so: undefined symbol); in a clone: pip install '.[gpu]'\n"
    assert why in done.stdout
    assert "self-test passed" in done.stdout
    assert done.stderr.count(f"UserWarning: fastreg runs the plain formula on GPUs: {why.strip()}") == 1


def test_a_triton_that_is_installed_is_used() -> None:
    """Otherwise an error in the kernels would leave their tests out."""
    assert backends.TRITON is not None or find_spec("triton") is None
