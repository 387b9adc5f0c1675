"""The README, docs/ and docstrings: snippets run, figures are right, commands exist; `make docs` checks the links."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any, get_type_hints

import pytest
import torch

import fastreg
from fastreg import fused_ar_tar
from tests.adapters.test_fastai1 import environment_with
from tests.conftest import ROOT, more, python, skip_without
from tests.language_model import BATCH, HIDDEN, TIME

pytestmark = pytest.mark.main

README = ROOT / "README.md"
README_TEXT = README.read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "NOTES.md"])
V1 = "fastai1"  # It runs in another process, because its package has the name of fastai.


def snippets_and_outputs(page: Path) -> list[tuple[str, str]]:
    """Return the snippets of a page, each with the output that the page shows behind it, if any."""
    return re.findall(r"^```python\n(.*?)^```\n(?:\n((?: {4}[^\n]*\n)+))?", page.read_text(), re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[str]:
    return [code for code, _ in snippets_and_outputs(page)]


def framework_of(snippet: str) -> str | None:
    """Return the framework that a snippet imports, or whose adapter it imports, if any."""
    found = re.search(
        r"fastreg\.(fastai|lightning|transformers)\b|import (fastai1)|from (sb3_contrib|accelerate)", snippet
    )
    return found and found[found.lastindex or 0]


def run(snippet: str, page: Path) -> dict[str, Any]:
    """Run a snippet as its reader pastes it, and return its names."""
    names = {"__name__": "__main__"}
    exec(compile(snippet, str(page), "exec"), names)
    return names


def setup_of(framework: str) -> dict[str, Any]:
    """Return the names that the docstrings of an adapter use, as the page of frameworks defines them."""
    page = ROOT / "docs" / "frameworks.md"
    names, *others = [run(code, page) for code in snippets(page) if framework_of(code) == framework]
    for other in others:
        if "RNNRegularizer" in other:  # a learner of a plain model
            names["plain"] = other["learn"].remove_cb(other["RNNRegularizer"])
    return names


SNIPPETS = [
    pytest.param((page, snippet, dedent(output)), id=f"{page.name}-{number}")
    for page in PAGES
    for number, (snippet, output) in enumerate(snippets_and_outputs(page))
    if framework_of(snippet) != V1
]


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("example", SNIPPETS)
def test_a_snippet_runs_alone_and_prints_what_the_page_shows(
    example: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, snippet, output = example
    if (framework := framework_of(snippet)) is not None:
        skip_without(framework)
    monkeypatch.chdir(tmp_path)
    run(snippet, page)
    assert capsys.readouterr().out == output or not output


class Checker(doctest.OutputChecker):
    """Accept any output where an example shows none: the progress of a fit, a learner that is returned."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def check_examples(module: str, setup: Callable[[], dict[str, Any]]) -> None:
    """Run the docstring of each name in docs/api.md, with names that it may use in addition to the module's."""
    api, owner = (ROOT / "docs" / "api.md").read_text(), import_module(module)
    names = re.findall(rf"^### `{re.escape(module)}\.(\w+)`$", api, re.MULTILINE)
    assert names
    assert set(names) == set(getattr(owner, "__all__", names))
    for name in names:
        value, found = getattr(owner, name), {"torch": torch} | setup() | vars(owner)
        get_type_hints(value.__init__ if isinstance(value, type) else value)  # annotations resolve when the code runs
        tests = doctest.DocTestFinder(recurse=False).find(value, f"{module}.{name}", globs=found)
        assert any(test.examples for test in tests), f"{module}.{name} has no example"
        assert not any(doctest.DocTestRunner(Checker()).run(test).failed for test in tests), name


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("framework", [None, "fastai", "lightning", "transformers"])
def test_examples_of_docstrings_run(framework: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if framework is None:
        check_examples("fastreg", dict)
    else:
        skip_without(framework)
        check_examples(f"fastreg.{framework}", lambda: setup_of(framework) | {framework: import_module(framework)})


@more
def test_snippets_and_examples_of_docstrings_of_fastai_1_run(tmp_path: Path) -> None:
    """They run in another process, where `learner()` makes a small learner of fastai v1."""
    environment = environment_with("1.0.61", tmp_path)
    code = [snippet for page in PAGES for snippet in snippets(page) if framework_of(snippet) == V1]
    assert code
    program = (
        "from tests.adapters.fastai1_train import learner\n"
        "from tests.project.test_docs import check_examples\n"
        + "".join(f"exec({snippet!r}, {{'__name__': '__main__'}})\n" for snippet in code)
        + "check_examples('fastreg.fastai1', lambda: {'learn1': learner()})\n"
    )
    python("-c", program, folder=tmp_path, **environment)


def test_the_readme_replaces_the_formula_by_its_equal() -> None:
    first, *_ = snippets(README)
    torch.manual_seed(0)
    names = run(first, README)
    (formula,) = re.findall(r"^# instead of (.*)$", first, re.MULTILINE)
    penalty = eval(formula, names)
    assert penalty > 0.01
    torch.testing.assert_close(names["loss"], names["dropped"].abs().mean() + penalty)
    assert names["lstm"].weight_hh_l0.grad is not None


def luminance(color: str) -> float:
    """Compute the relative luminance of a color, `#rrggbb`, as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117", "#1e2129"])  # GitHub's pages, and the site's dark one
def test_the_picture_is_readable_on_a_white_page_and_on_a_dark_one(page: str) -> None:
    picture = (ROOT / "docs" / "steps.svg").read_text()
    colors = {*re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", picture)}
    assert len(colors) == 2
    assert re.search(r'id="patch_1">\s*<path [^>]*?style="fill: none"', picture), "the background is transparent"
    for color in colors:
        darker, lighter = sorted([luminance(color), luminance(page)])
        assert (lighter + 0.05) / (darker + 0.05) >= 4, (color, page)


def test_the_usual_mean_depends_on_the_padding_and_the_fused_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "getting-started.md"
    (code,) = [code for code in snippets(page) if "padded to" in code]
    run(code, page)
    output = capsys.readouterr().out
    found = re.findall(r"padded to +(\d+): TAR by .mean\(\) ([\d.]+), by fastreg ([\d.]+)", output)
    (table,) = re.findall(r"^\| TAR of one batch.*?\n\n", README_TEXT, re.MULTILINE | re.DOTALL)
    head, _, usual, fused = [re.findall(r"\| ([\d.]+)(?= )", line) for line in table.splitlines() if line]
    assert [head, usual, fused] == [list(column) for column in zip(*found, strict=True)]
    assert len({*usual}) == len(usual) > len({*fused}) == 1


@more
def test_random_calls_give_the_numbers_of_the_formula() -> None:
    ((command, calls),) = re.findall(
        r"`python (-m tests.random_calls [^`]*)` compares (\d+) random calls", (ROOT / "CONTRIBUTING.md").read_text()
    )
    output = python(*command.split()).stdout
    assert re.findall(r" 0 wrong: .*'calls': (\d+)", output) == [calls]


def test_the_api_page_shows_the_docstrings_of_the_code() -> None:
    of_code, api = runpy.run_path(str(ROOT / "docs" / "api.py")), (ROOT / "docs" / "api.md").read_text()
    assert of_code["render"](api) == api, "run `python docs/api.py`"
    for name in fastreg.__all__:
        value, section = getattr(fastreg, name), api.split(f"### `fastreg.{name}`\n")[1].split("\n### ")[0]
        parameters = {*inspect.signature(value).parameters} - {"loan"}  # which only hooks pass
        assert all(re.search(rf"^.*\b{parameter}: .+$", section, re.MULTILINE) for parameter in parameters), name
        assert " ".join(inspect.getdoc(value).partition("\n\n")[0].split()) in section


def literals() -> list[str]:
    """Return the strings in the code of the package, with dots for values."""
    nodes = [node for file in (ROOT / "fastreg").rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    strings = [
        x.values if isinstance(x, ast.JoinedStr) else [x] for x in nodes if isinstance(x, (ast.JoinedStr, ast.Constant))
    ]
    texts = ["".join([str(x.value) if isinstance(x, ast.Constant) else "…" for x in parts]) for parts in strings]
    return [re.sub(r"{.*?}", "…", text) for text in texts]


def test_the_page_of_messages_quotes_the_code() -> None:
    page, found = (ROOT / "docs" / "messages.md").read_text(), literals()
    quotes = re.findall(r"^\|[^|]+\| `([^`\n]+)`", page, re.MULTILINE)
    assert len(quotes) > 20
    for quote in quotes:
        words = quote.split(": expected ")[-1].strip("… ")  # the name of an argument is a value
        assert any(words in text for text in found), quote


def test_each_row_of_the_conventions_converts_its_coefficient() -> None:
    page = (ROOT / "docs" / "coefficients.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `(w \*[^|]*)` \| `([^|`]*)`(.*) \|$", page, re.MULTILINE)
    assert rows
    torch.manual_seed(0)
    x = torch.randn(BATCH, TIME, HIDDEN, dtype=torch.float64)
    names = {"x": x, "w": 3.0, "dt": 0.1, "hidden": HIDDEN, "time": TIME}
    for term, formula, remark in rows:
        coefficient = eval(formula, names)
        alpha, beta = (0.0, coefficient) if "diff" in term else (coefficient, 0.0)
        reduction = "sum" if 'reduction="sum"' in remark else "mean"
        penalty = fused_ar_tar(x, x, alpha, beta, reduction=reduction)
        torch.testing.assert_close(penalty, eval(term, names), msg=term)


def test_commands_and_files_that_pages_name_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make\s([a-z][\w-]*)", text, re.MULTILINE))
    assert {"test", "docs"} <= named <= targets
    modules = set(re.findall(r"python -m ((?:bench|tests|fastreg)[\w.]*)", text))
    assert "fastreg" in modules
    assert not [module for module in modules if find_spec(module) is None]
    files = set(re.findall(r"`((?:tests|bench|examples|fastreg|kernels|attach|call)/[\w./]+)`", text))
    assert "tests/conftest.py" in files
    assert not [file for file in files if not ((ROOT / file).exists() or (ROOT / "fastreg" / file).exists())]
    text += "\n".join(file.read_text() for file in (*ROOT.glob("bench/*.md"), *ROOT.glob(".github/workflows/*.yml")))
    parts = set(re.findall(r"^#   \.ci/run (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert {"tests", "wheel"} <= set(re.findall(r"\.ci/run ([a-z]+)", text)) <= parts


def test_the_patch_in_the_lab_book_applies_to_the_kernel(tmp_path: Path) -> None:
    notes, file = (ROOT / "bench" / "NOTES.md").read_text(), tmp_path / "patch"
    (patch,) = re.findall(r"^ *```diff\n(.*?)^ *```", notes, re.MULTILINE | re.DOTALL)
    file.write_text(dedent(patch))
    subprocess.run(["git", "apply", "--check", str(file)], cwd=ROOT, check=True)


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
    pages = README, ROOT / "docs" / "calls.md", ROOT / "docs" / "masks.md"
    for page in pages:
        code = [snippet for snippet in snippets(page) if framework_of(snippet) is None]
        (tmp_path / f"{page.stem}.py").write_text("\n".join([*code, CALLS]))
    (tmp_path / "fastreg").symlink_to(ROOT / "fastreg")
    files = [f"{page.stem}.py" for page in pages]
    python("-m", "pyright", "--pythonpath", sys.executable, *files, folder=tmp_path)
