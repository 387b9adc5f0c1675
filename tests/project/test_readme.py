"""The README: the output of its snippets, and each figure that bench/results does not have, computed anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastreg import fused_ar_tar
from tests.conftest import ROOT, python
from tests.project.test_docs import run, snippets

pytestmark = pytest.mark.main

README, PADDING = ROOT / "README.md", ROOT / "docs" / "getting-started.md"
TEXT = README.read_text()
Penalty = Callable[[Tensor], Tensor]


def tar(raw: Tensor) -> Tensor:
    """Compute TAR as the README writes it."""
    return (raw[:, 1:] - raw[:, :-1]).pow(2).mean()


def padded(capsys: pytest.CaptureFixture[str]) -> tuple[Tensor, str]:
    """Run the snippet that pads one batch to more and more steps; return the batch, and the output."""
    (code,) = [code for code in snippets(PADDING) if "padded to" in code]
    states = run(code, PADDING)["states"]
    return states, capsys.readouterr().out


def gradient(penalty: Penalty, raw: Tensor) -> Tensor:
    leaf = raw.clone().requires_grad_()
    (found,) = torch.autograd.grad(penalty(leaf), leaf)
    return found.double()


def test_at_most_900_words_answer_whether_to_use_it() -> None:
    seen = re.sub(r"<!--.*?-->", "", TEXT, flags=re.DOTALL)
    assert len([word for word in seen.split() if re.search(r"\w", word)]) <= 900


def test_the_snippets_print_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"^```python\n(.*?)^```\n\n {4}(.*?)\n$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(shown) == sum("print(" in code for code in snippets(README)) == 2
    for code, output in shown:
        run(code, README)
        assert capsys.readouterr().out.splitlines() == [line.strip() for line in output.splitlines()]


def test_the_usual_mean_depends_on_the_padding_and_the_fused_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    _, output = padded(capsys)
    found = re.findall(r"padded to +(\d+): TAR by .mean\(\) ([\d.]+), by fastreg ([\d.]+)", output)
    (table,) = re.findall(r"^\| TAR of one batch.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    head, _, usual, fused = [re.findall(r"\| ([\d.]+)(?= )", line) for line in table.splitlines() if line]
    assert [head, usual, fused] == [list(column) for column in zip(*found, strict=True)]
    assert len({*usual}) == len(usual) > len({*fused}) == 1


def test_in_bfloat16_the_usual_gradient_is_off_by_more_than_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    raw = padded(capsys)[0].bfloat16()
    want = gradient(tar, raw.double())
    off = {}
    for name, found in {
        "usual": gradient(tar, raw),
        "fused": gradient(partial(fused_ar_tar, dropped=None, alpha=0.0, beta=1.0), raw),
        "rounding": want.bfloat16().double(),
    }.items():
        off[name] = f"{(found - want).norm() / want.norm():.2%}"
    assert off["fused"] == off["rounding"]
    sentence = f"off by {off['usual']}, and fastreg's by {off['fused']}, as much as rounding the exact one"
    assert sentence in TEXT.replace("\n", " ")


def test_a_single_time_step_has_no_changes() -> None:
    raw = torch.randn(4, 1, 8)
    assert torch.isnan(tar(raw))
    assert fused_ar_tar(raw, None, 0.0, 1.0) == 0
    assert "the usual lines are NaN; fastreg's TAR is 0" in TEXT


def test_random_calls_give_the_numbers_of_the_formula() -> None:
    ((command, calls),) = re.findall(r"`python (-m tests.random_calls [^`]*)`[^.]*? compares (\d+) calls", TEXT)
    output = python(*command.split()).stdout
    assert re.findall(r" 0 wrong: .*'calls': (\d+)", output) == [calls]
    assert "gradients included: 0 wrong" in TEXT
