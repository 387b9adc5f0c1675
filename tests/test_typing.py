"""Annotations: they resolve when the code runs, and pyright takes the README's code as it stands there."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import ROOT, framework_of, snippets

ADAPTERS = {"fastreg.fastai": "fastai", "fastreg.lightning": "lightning", "fastreg.transformers": "transformers"}
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
    assert_type(fused_dropout_ar_tar(raw, 0.1, 2.0, 1.0, return_terms=wanted), tuple[Tensor, Tensor | ARTAR])
"""


def public(module: Any, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Return functions, classes and their own methods by name."""
    for name in names:
        value = getattr(module, name)
        yield name, value
        if inspect.isclass(value):
            for method, own in vars(value).items():
                if inspect.isfunction(own) and (method == "__init__" or not method.startswith("_")):
                    yield f"{name}.{method}", own


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("module", ["fastreg", *ADAPTERS])
def test_annotations_resolve_when_the_code_runs(module: str) -> None:
    if module in ADAPTERS:
        pytest.importorskip(ADAPTERS[module], reason=f"{ADAPTERS[module]} is not installed: run tests/frameworks.sh")
    owner = importlib.import_module(module)
    own = [name for name, value in vars(owner).items() if getattr(value, "__module__", None) == module]
    names = getattr(owner, "__all__", [name for name in own if not name.startswith("_")])
    functions = {name: value for name, value in public(owner, names) if not inspect.isclass(value)}
    assert functions
    for name, function in functions.items():
        assert "return" in typing.get_type_hints(function), name


@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed: make lint installs it")
def test_pyright_takes_the_code_of_the_pages(tmp_path: Path) -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "behaviour.md"):
        code = [snippet for snippet in snippets(page) if framework_of(snippet) is None]
        (tmp_path / f"{page.stem}.py").write_text("\n".join([FOUND, *code, CALLS]))
    (tmp_path / "fastreg").symlink_to(ROOT / "fastreg")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "README.py", "behaviour.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
