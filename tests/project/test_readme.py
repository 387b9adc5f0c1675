"""The README: its length, and each figure that bench/results does not have, computed anew."""

from __future__ import annotations

import re

import pytest
import torch

from fastreg import fused_ar_tar
from tests.conftest import ROOT, python
from tests.project.test_docs import run, snippets

pytestmark = pytest.mark.main

README, PADDING = ROOT / "README.md", ROOT / "docs" / "getting-started.md"
TEXT = README.read_text()


def test_the_readme_has_at_most_950_words() -> None:
    seen = re.sub(r"<!--.*?-->", "", TEXT, flags=re.DOTALL)
    assert len([word for word in seen.split() if re.search(r"\w", word)]) <= 950


def test_the_usual_mean_depends_on_the_padding_and_the_fused_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [code for code in snippets(PADDING) if "padded to" in code]
    run(code, PADDING)
    output = capsys.readouterr().out
    found = re.findall(r"padded to +(\d+): TAR by .mean\(\) ([\d.]+), by fastreg ([\d.]+)", output)
    (table,) = re.findall(r"^\| TAR of one batch.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    head, _, usual, fused = [re.findall(r"\| ([\d.]+)(?= )", line) for line in table.splitlines() if line]
    assert [head, usual, fused] == [list(column) for column in zip(*found, strict=True)]
    assert len({*usual}) == len(usual) > len({*fused}) == 1


def test_a_single_time_step_has_no_changes() -> None:
    raw = torch.randn(4, 1, 8)
    assert torch.isnan((raw[:, 1:] - raw[:, :-1]).pow(2).mean())
    assert fused_ar_tar(raw, None, 0.0, 1.0) == 0


def test_random_calls_give_the_numbers_of_the_formula() -> None:
    ((command, calls),) = re.findall(r"`python (-m tests.random_calls [^`]*)`[^.]*? compares (\d+) random calls", TEXT)
    output = python(*command.split()).stdout
    assert re.findall(r" 0 wrong: .*'calls': (\d+)", output) == [calls]


def test_the_table_shows_the_limit_of_attach_on_small_lstms() -> None:
    assert "On small LSTMs `attach` costs more than the eager formula" in TEXT
    head, row = (re.findall(rf"^\| {x}.*\|$", TEXT, re.MULTILINE)[0].split("|") for x in ("batch x time", "LSTM"))
    added = dict(zip((x.strip(" `") for x in head), (x.split("±")[0] for x in row), strict=True))
    assert float(added["attach"]) > float(added["formula"])
