"""Annotations: they resolve when the code runs, and pyright takes the README's code as it stands there."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_docs import ADAPTERS, ROOT, framework_of, public_names, setup_of, snippets

# Names that the pages' code uses, with the types that a user's have.
FOUND = """\
import torch
from collections.abc import Callable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Net(nn.Module):
    lstm: nn.LSTM
    dropout: nn.Dropout


raw, dropped, loss, inputs, targets, lengths, mask, embedded = [torch.zeros(3, 7, 16)] * 8
alpha, beta, epochs = 2.0, 1.0, 2
net, model = Net(), nn.Module()
loss_of: Callable[[Tensor], Tensor] = torch.mean
batches = [(inputs, targets)]
optimizer = torch.optim.SGD(model.parameters(), 0.1)
"""
CALLS = """
from fastreg import ARTAR, fused_ar_tar, fused_dropout_ar_tar
from typing_extensions import assert_type


def either(wanted: bool) -> None:
    assert_type(fused_ar_tar(raw, raw, 2.0, 1.0), Tensor)
    assert_type(fused_ar_tar(raw, raw, 2.0, 1.0, return_terms=True), ARTAR)
    assert_type(fused_ar_tar(raw, raw, 2.0, 1.0, return_terms=wanted), Tensor | ARTAR)
    assert_type(fused_dropout_ar_tar(raw, 0.1, 2.0, 1.0), tuple[Tensor, Tensor])
    assert_type(fused_dropout_ar_tar(raw, 0.1, 2.0, 1.0, return_terms=True), tuple[Tensor, ARTAR])
    either = fused_dropout_ar_tar(raw, 0.1, 2.0, 1.0, return_terms=wanted)
    assert_type(either, tuple[Tensor, ARTAR] | tuple[Tensor, Tensor])
"""


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("framework", [None, *ADAPTERS])
def test_annotations_resolve_when_the_code_runs(framework: str | None) -> None:
    """Of public functions, and of the methods of public classes."""
    module = f"fastreg.{framework}" if framework else "fastreg"
    if framework is not None:
        setup_of(framework)
    for name in public_names(module):
        value = getattr(importlib.import_module(module), name)
        own = vars(value) if inspect.isclass(value) else {name: value}
        for of, function in own.items():
            if inspect.isfunction(function) and (of == "__init__" or not of.startswith("_")):
                assert "return" in typing.get_type_hints(function), f"{name}: {of}"


@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed: make lint installs it")
def test_pyright_takes_the_code_of_the_pages(tmp_path: Path) -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "behaviour.md"):
        code = [snippet for snippet in snippets(page) if framework_of(snippet) is None]
        (tmp_path / f"{page.stem}.py").write_text("\n".join([FOUND, *code, CALLS]))
    (tmp_path / "fastreg").symlink_to(ROOT / "fastreg")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "README.py", "behaviour.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
