"""Annotations: pyright takes the code of the pages as it stands there, and knows the types of results."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT, python
from tests.project.test_docs import framework_of, snippets

pytestmark = pytest.mark.main

CALLS = """
from fastreg import ARTAR, fused_ar_tar, fused_dropout_ar_tar
from torch import Tensor, ones
from typing_extensions import assert_type


def either(wanted: bool) -> None:
    raw = ones(3, 7, 16)
    assert_type(fused_ar_tar(raw, raw, 2.0, 1.0), Tensor)
    assert_type(fused_ar_tar(raw, raw, 2.0, 1.0, return_terms=True), ARTAR)
    assert_type(fused_ar_tar(raw, raw, 2.0, 1.0, return_terms=wanted), Tensor | ARTAR)
    assert_type(fused_dropout_ar_tar(raw, 0.1, 2.0, 1.0), tuple[Tensor, Tensor])
    assert_type(fused_dropout_ar_tar(raw, 0.1, 2.0, 1.0, return_terms=True), tuple[Tensor, ARTAR])
    either = fused_dropout_ar_tar(raw, 0.1, 2.0, 1.0, return_terms=wanted)
    assert_type(either, tuple[Tensor, ARTAR] | tuple[Tensor, Tensor])
"""


@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed: make lint installs it")
def test_pyright_takes_the_code_of_the_pages(tmp_path: Path) -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "behaviour.md"):
        code = [snippet for snippet in snippets(page) if framework_of(snippet) is None]
        (tmp_path / f"{page.stem}.py").write_text("\n".join([*code, CALLS]))
    (tmp_path / "fastreg").symlink_to(ROOT / "fastreg")
    python("-m", "pyright", "--pythonpath", sys.executable, "README.py", "behaviour.py", folder=tmp_path)
