"""The tests themselves: the two parts of them, and the list of mutants, whose tests `make mutants` runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastreg
from tests.mutants import MUTANTS, TESTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_still_applies(mutant: Mutant) -> None:
    source = mutant.source()
    if mutant.file.endswith(".py"):
        compile(source, mutant.file, "exec")
    assert mutant.file in TESTS


def test_no_mutant_is_there_twice() -> None:
    assert len({(m.file, m.where, m.old, m.new) for m in MUTANTS}) == len({*map(str, MUTANTS)}) == len(MUTANTS)


# The tests of internals, which may change with the structure. All others use the public names alone.
INTERNALS = {
    *("compiled", "concurrency", "cpu", "kernels", "package", "plans", "source", "steps", "view"),
}
PUBLIC_MODULES = {"fastai", "fastai1", "lightning", "transformers"}
IMPORTED = re.compile(r"""^ *from fastreg import ([\w, ]+)|\bfastreg\.(\w+)(?=[\w.]* import|[\w.]*")""", re.M)


def test_only_tests_of_internals_import_them() -> None:
    found = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for names, module in IMPORTED.findall(file.read_text()):
            private = {*names.replace(" ", "").split(",")} - {*fastreg.__all__} if names else {module} - PUBLIC_MODULES
            if private:
                found.add(file.stem.removeprefix("test_"))
    assert found == INTERNALS
