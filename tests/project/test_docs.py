"""The README, docs/ and docstrings: snippets, recipes and examples run; `make docs` checks the links."""

from __future__ import annotations

import ast
import doctest
import re
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
from torch import Tensor
from torch.nn import functional as F

from fastreg import fused_ar_tar
from tests.adapters.test_fastai1 import environment_with
from tests.conftest import ROOT, more, python, skip_without
from tests.exact import truth
from tests.language_model import Model

pytestmark = pytest.mark.main

README = ROOT / "README.md"
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
    """Return the names that the docstrings of an adapter use, as the page of frameworks defines them.

    `plain` is a learner whose model returns only its output.
    """
    page = ROOT / "docs" / "frameworks.md"
    (code,) = [code for code in snippets(page) if framework_of(code) == framework]
    names = run(code, page)
    if framework == "fastai":
        learner = import_module("fastai.text.all")
        model = Model()
        model.lstm = model.rnn
        names["plain"] = learner.Learner(names["dls"], model, loss_func=learner.CrossEntropyLossFlat())
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
    names = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", api, re.MULTILINE)
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


def test_the_page_of_messages_quotes_the_code() -> None:
    """The page has dots for values."""
    page, files = (ROOT / "docs" / "errors-and-warnings.md").read_text(), [*(ROOT / "fastreg").rglob("*.py")]
    code = "\n".join(ast.unparse(ast.parse(file.read_text())) for file in files)  # which joins the parts of a string
    code = re.sub(r"{.*?}", "…", code)
    quotes = re.findall(r"^\|[^|]+\| `([^`\n]+)`", page, re.MULTILINE)
    assert len(quotes) > 20
    for quote in quotes:
        words = quote.split(": expected ")[-1].strip("… ")  # the name of an argument is a value
        assert words in code, quote


def test_commands_and_files_that_pages_name_exist() -> None:
    text = "\n".join(
        page.read_text() for page in [*PAGES, *ROOT.glob("bench/*.md"), *ROOT.glob(".github/workflows/*.yml")]
    )
    makefile, parts = ((ROOT / file).read_text() for file in ("Makefile", ".ci/run"))
    exist: list[tuple[str, Callable[[str], object]]] = [
        (r"(?:`|^ {4})make\s([a-z][\w-]*)", lambda target: f"\n{target}:" in makefile),
        (r"\.ci/run ([a-z]+)", lambda part: f"\n#   .ci/run {part}" in parts),
        (r"python -m ((?:bench|tests|fastreg)[\w.]*)", find_spec),
        (r"`((?:tests|bench|examples|fastreg|kernels)/[\w./]+)`", lambda file: (ROOT / file).exists()),
        (r"`((?:attach|call)/[\w./]+)`", lambda file: (ROOT / "fastreg" / file).exists()),
    ]
    for pattern, exists in exist:
        named = {*re.findall(pattern, text, re.MULTILINE)}
        assert named
        assert not [name for name in named if not exists(name)]


def test_the_patch_in_the_lab_book_applies_to_the_kernel(tmp_path: Path) -> None:
    notes, file = (ROOT / "bench" / "NOTES.md").read_text(), tmp_path / "patch"
    (patch,) = re.findall(r"^ *```diff\n(.*?)^ *```", notes, re.MULTILINE | re.DOTALL)
    file.write_text(dedent(patch))
    subprocess.run(["git", "apply", "--check", str(file)], cwd=ROOT, check=True)


def test_the_lab_book_shows_the_predicted_shares_of_a_copy() -> None:
    skip_without("triton")
    from bench.offline.roofline import COPY, DTYPES, SHAPES, share

    notes = (ROOT / "bench" / "NOTES.md").read_text()
    for shape in SHAPES:
        found = [[f"{share(shape, x, COPY[gpu][0]):.0%}" for gpu in ("H100", "H200", "B200")] for x in DTYPES]
        assert f"| {shape} | {' | '.join(map(' / '.join, found))} |" in notes


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
    pages = README, ROOT / "docs" / "functions.md", ROOT / "docs" / "masks.md"
    code = [snippet for page in pages for snippet in snippets(page) if framework_of(snippet) in (None, "lightning")]
    (tmp_path / "pages.py").write_text("\n".join([*code, CALLS]))
    (tmp_path / "fastreg").symlink_to(ROOT / "fastreg")
    python("-m", "pyright", "--pythonpath", sys.executable, "pages.py", folder=tmp_path)


RECIPES, RL = ROOT / "docs" / "recipes.md", ROOT / "docs" / "reinforcement-learning.md"
Loss = Callable[[Tensor], Tensor]
PREFIX = torch.arange(9) < torch.tensor([6, 9, 2])[:, None]
DRAWN = torch.rand(3, 12, generator=torch.Generator().manual_seed(4))
VALID, STARTS = DRAWN < 0.7, DRAWN < 0.25


def recipe(name: str, page: Path = RECIPES) -> Any:
    """Run the snippet of a page that defines a function, and return the function."""
    (code,) = [snippet for snippet in snippets(page) if f"def {name}(" in snippet]
    return run(code, page)[name]


def check(ours: Loss, theirs: Loss, *shape: int) -> None:
    """Compare the value and the gradient with respect to a random tensor."""
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    got, want = ours(x), theirs(x)
    assert want > 0
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(3 * value, x) for value in (got, want)))


def test_curvature_equals_second_differences() -> None:
    """In the loss of DiffPoseTalk only the last of three steps has to count."""
    function, may_follow = recipe("curvature"), VALID[:, 1:] & ~STARTS[:, 1:]
    counts = VALID[:, :-2] & may_follow[:, :-1] & may_follow[:, 1:]
    check(lambda x: function(x, 1.0, PREFIX), lambda x: x.diff(n=2, dim=1)[PREFIX[:, 2:]].square().mean(), 3, 9, 12)
    check(lambda h: function(h, 6), lambda h: h.diff(n=2, dim=1).square().sum(-1).mean(), 3, 9, 6)
    check(lambda x: function(x, 1.0, VALID, STARTS), lambda x: x.diff(n=2, dim=1)[counts].square().mean(), 3, 12, 6)


# By words of a row, for activations that are not (batch, time, features).
SHAPES = {"`(time, batch": (8, 3, 5), "`(channels, ": (4, 9, 7), "`(batch, channels, time, ": (2, 3, 5, 4, 3)}


def rows() -> list[list[str]]:
    """Return the rows of the table: a loss, its formula, and the line of code that computes the same."""
    lines = re.findall(r"^\| (.*fused_ar_tar\(.*`) \|$", RECIPES.read_text(), re.MULTILINE)
    assert lines
    return [[cell.strip("`") for cell in line.split(" | ")] for line in lines]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].split(",")[0])
def test_a_line_of_the_table_equals_the_formula(row: list[str]) -> None:
    what, formula, line = row
    shape = next((shape for words, shape in SHAPES.items() if words in what), (3, 9, 6))
    names = {"F": F, "fused_ar_tar": fused_ar_tar, "valid": PREFIX, "w": torch.arange(1.0, 7)}
    check(lambda x: eval(line, names | {"x": x}), lambda x: eval(formula, names | {"x": x}), *shape)


@pytest.mark.parametrize("shape", [(5, 8), (5, 6, 8)], ids=str)
def test_activity_of_named_modules_is_penalized(shape: tuple[int, ...]) -> None:
    function, gru = recipe("activity_regularizer"), torch.nn.GRU(7, 4)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 7), torch.nn.ReLU(), gru), torch.randn(shape)
    found = function(model, {"1": 0.5, "2": 2.0})
    loss = model(x)[0].sum()
    hidden = model[:2](x).detach()
    want = loss.detach() + 0.5 * hidden.square().mean() + 2.0 * gru(hidden)[0].square().mean()
    for regularizer in found:
        loss = regularizer.on_backward_begin(loss)
    torch.testing.assert_close(loss, want)


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
def test_the_recipe_for_hubert_masks_the_frames_that_the_model_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("transformers")
    monkeypatch.chdir(tmp_path)
    frames, samples = recipe("frames"), (torch.arange(800) < torch.tensor([[401], [777], [800]])).long()
    mask = frames({"attention_mask": samples})
    want = frames.__globals__["model"]._get_feature_vector_attention_mask(mask.shape[1], samples)
    torch.testing.assert_close(mask, want)
    assert 0 < mask.sum() < mask.numel()


@pytest.mark.filterwarnings("ignore")  # of gymnasium
def test_the_recipe_for_recurrent_ppo_masks_its_padding() -> None:
    """Compare the gradient that the hook adds in padded minibatches with the formula's."""
    skip_without("sb3_contrib")
    names = recipe("regularize", RL).__globals__
    options = {"n_steps": 64, "batch_size": 32, "n_epochs": 1, "seed": 1}
    ppo = names["RecurrentPPO"](names["RegularizedPolicy"], "CartPole-v1", **options)
    names["regularize"](ppo, 2.0, 1.0)
    ppo.learn(64)
    kept, padded = list[Any](), 0
    ppo.policy.sequence.register_forward_hook(lambda module, args, output: kept.append((*args, output)))
    for data in ppo.rollout_buffer.get(32):
        inputs = data.observations, data.actions.long().flatten(), data.lstm_states, data.episode_starts
        values, log_prob, _ = ppo.policy.evaluate_actions(*inputs)
        x, output = kept.pop()
        mask = (data.mask > 1e-8).view(x.shape[:2])
        padded += int((~mask).sum())
        got, plain = torch.autograd.grad(values.mean() + log_prob.mean(), [x, output], retain_graph=True)
        torch.testing.assert_close(got, plain + torch.autograd.grad(truth(x, x, 2.0, 1.0, valid=mask).penalty, x)[0])
    assert padded
    ppo.policy.set_training_mode(False)
    assert ppo.policy.sequence(x) is x, "no penalty while it collects experience"
