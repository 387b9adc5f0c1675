"""Remarks on the installation: the folder of the imported package, and other installations beside it.

The distribution is called fastreg-rnn. An unrelated distribution called fastreg also installs a file
`fastreg/__init__.py`, which `fastreg/call/__init__.py` refuses.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def _why_first() -> str:
    """Explain why Python imports the package from its folder before any other."""
    parent = FOLDER.parent
    if parent == Path.cwd():
        return "Python looks into the current folder first"
    named = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if parent in named:
        return f"PYTHONPATH names {parent}"
    return f"{parent} comes before it in sys.path"


def remarks() -> list[str]:
    """Name the installations that the imported package hides, and a distribution that shares its folder."""
    found = []
    for hidden in metadata.distributions(name="fastreg-rnn"):
        folder = Path(str(hidden.locate_file("fastreg")))
        if (folder / "__init__.py").exists() and not folder.samefile(FOLDER):
            found.append(f"the installation in {folder} is hidden, because {_why_first()}")
    if any(metadata.distributions(name="fastreg")):
        found.append("the unrelated distribution 'fastreg' shares the name and the folder: run `pip uninstall fastreg`")
    return found
