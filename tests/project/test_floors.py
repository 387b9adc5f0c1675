"""The floors of the package, which CONTRIBUTING.md begins with: an import only goes down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.main
FLOORS = ["fastreg.kernels", "fastreg.call", "fastreg.attach", "fastreg"]  # from the ground to the adapters
FILES = sorted(file.relative_to(ROOT) for folder in ("fastreg", "kernels") for file in (ROOT / folder).rglob("*.py"))


def floor(name: str) -> int:
    """Return the floor of a module, or of a name in it."""
    return next(i for i, package in enumerate(FLOORS) if f"{name}.".startswith(f"{package}."))


def imports_that_go_up(module: str, code: str) -> list[str]:
    """List the imports of a module from a higher floor, also those in functions and for annotations."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] in ("fastreg", "") and floor(name) > floor(module)]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_an_import_only_goes_down(file: Path) -> None:
    parts = file.with_suffix("").parts
    module = ".".join(parts if parts[0] == "fastreg" else ("fastreg", *parts))
    assert not imports_that_go_up(module, (ROOT / file).read_text())


@pytest.mark.parametrize(
    "code",
    [
        "from fastreg.attach.mark import mark",
        "from fastreg import fused_ar_tar",
        "import fastreg",
        "def call():\n    import fastreg.lightning",
        "if TYPE_CHECKING:\n    from fastreg.attach import step",
    ],
)
def test_an_import_that_goes_up_is_found(code: str) -> None:
    assert len(imports_that_go_up("fastreg.call.operation", code)) == 1
