"""Which files the import of fastreg has found. An import of a package that is mixed up with another one is an error.

The distribution is called fastreg-rnn. An unrelated one called fastreg installs a file `fastreg/__init__.py`, too.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import fastreg

FOLDER = Path(__file__).parent

if getattr(fastreg, "__distribution__", None) != "fastreg-rnn":
    raise ImportError(
        f"{FOLDER / '__init__.py'} is not the file of fastreg-rnn: the unrelated distribution 'fastreg' has replaced "
        "it. Run `pip uninstall fastreg fastreg-rnn`, and install fastreg-rnn again"
    )


def remarks() -> list[str]:
    """Name the installations that the imported package hides, and a distribution that shares its folder."""
    found = []
    for hidden in metadata.distributions(name="fastreg-rnn"):
        folder = Path(str(hidden.locate_file("fastreg")))
        if (folder / "__init__.py").exists() and not folder.samefile(FOLDER):
            found.append(f"the installation in {folder} is hidden, as Python looks into the current folder first")
    if any(metadata.distributions(name="fastreg")):
        found.append("the unrelated distribution 'fastreg' shares the name and the folder: run `pip uninstall fastreg`")
    return found
