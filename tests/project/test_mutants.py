"""The list of mutants, whose tests `make mutants` runs."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, Mutant

pytestmark = pytest.mark.main


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_still_applies(mutant: Mutant) -> None:
    source = mutant.source()
    if mutant.file.endswith(".py"):
        compile(source, mutant.file, "exec")


def test_no_mutant_is_there_twice() -> None:
    assert len({(m.file, m.where, m.old, m.new) for m in MUTANTS}) == len({*map(str, MUTANTS)}) == len(MUTANTS)
