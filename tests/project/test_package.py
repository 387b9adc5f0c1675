"""Installations of the package, the modules that it imports, and `python -m fastreg`."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastreg
import fastreg.__main__ as main
from tests.conftest import ROOT, more, python, skip_on_formula, without


def test_the_version_is_that_of_the_distribution_and_of_the_newest_changes() -> None:
    for file, begin in {"pyproject.toml": 'version = "', "CHANGELOG.md": "## [", "CITATION.cff": "version: "}.items():
        first, *_ = re.findall(rf"^{re.escape(begin)}(\d[\d.]*\d)", (ROOT / file).read_text(), re.MULTILINE)
        assert fastreg.__version__ == first, file


@more
@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs AVX2")
def test_the_library_is_named_and_why_it_is_not_a_better_one() -> None:
    skip_on_formula("cpu")
    said = python("-m", "fastreg", ATEN_CPU_CAPABILITY="default").stdout
    assert f"library for CPUs: {ROOT}/fastreg/kernels/_cpu." in said
    assert re.search(r"; PyTorch's capability, (DEFAULT|NO AVX), has no AVX2\n", said)


CALLS = """
import sys
sys.modules["triton"] = None
import torch, warnings
from fastreg import __main__ as main, fused_ar_tar
x = torch.ones(2, 3, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    values = [fused_ar_tar(x, x, 2.0, 1.0), fused_ar_tar(x[:1], x[:1], 2.0, 1.0)]
assert values == [2, 2], values
caught = [warning for warning in caught if warning.category is UserWarning]
assert {warning.filename for warning in caught} == {"<string>"}, "the caller's line"
print([str(warning.message) for warning in caught])
assert main.main() == 0
assert not {"fastai", "lightning", "pytorch_lightning", "transformers", "kernels"} & {*sys.modules}
"""


def copied(tree: Path) -> Path:
    """Copy the source tree without its libraries."""
    for name in ("fastreg", "kernels"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


@more
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_libraries_are_built_again_after_a_change_of_their_sources_alone(tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree")
    setup, inodes = tree / "setup.py", []
    setup.write_text(setup.read_text().replace('"-O3"', '"-O0"').replace("in (3, 4)", "in ()"))  # one library, fast
    for text in ("", "", "// another version\n"):
        with (tree / "kernels" / "cpu_rows.h").open("a") as header:
            header.write(text)
        python("setup.py", "--quiet", "build_ext", folder=tree)
        (built,) = tree.glob("kernels/*.so")
        inodes.append(built.stat().st_ino)
    assert inodes[0] == inodes[1] != inodes[2]
    assert "cpu: the C++ kernels; self-test passed\n" in python("-m", "fastreg", folder=tree).stdout


def test_the_package_is_whole_and_needs_nothing_but_pytorch(tmp_path: Path) -> None:
    """Without a compiler, the first call warns. The name `kernels` stays free for an unrelated distribution."""
    tree, site = copied(tmp_path / "tree"), tmp_path / "site"
    python("setup.py", "--quiet", "build", "--build-lib", str(site), folder=tree, CC="false", CXX="false")
    modules = [x.relative_to(ROOT) for x in (*ROOT.glob("fastreg/**/*.py"), *ROOT.glob("fastreg/kernels/*.py"))]
    built = {x.relative_to(site) for x in site.rglob("*") if x.is_file()}
    assert built == {*modules, Path("fastreg", "py.typed")}, "modules, and the file that says they are typed"
    done = python("-c", CALLS, folder=tmp_path, PYTHONPATH=str(site))
    assert not done.stderr
    assert done.stdout.count("runs the plain formula on CPUs") == 1, done
    assert "--no-cache-dir --force-reinstall" in done.stdout, "pip keeps the wheel that has no kernels"
    assert "the plain formula (the kernels were not built: install" in done.stdout


RELEASES = {"fastai": "'fastai>=2'", "fastai1": "'fastai<2'", "lightning": "lightning", "transformers": "transformers"}


@pytest.mark.parametrize("adapter", RELEASES)
def test_a_missing_framework_is_named(adapter: str) -> None:
    said = rf"^fastreg\.{adapter}: .*; pip install {RELEASES[adapter]}( accelerate)?$"
    with without(f"fastreg.{adapter}", "fastai", "lightning", "pytorch_lightning", "transformers"):
        del sys.modules[f"fastreg.{adapter}"]  # it is imported anew
        with pytest.raises(ImportError, match=said):
            import_module(f"fastreg.{adapter}")


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `python -m fastreg` in this process, and return its status and its output."""
    with mock.patch.object(sys, "argv", ["fastreg"]):
        return main.main(), capsys.readouterr().out


def test_another_distribution_of_the_name_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remark = "the unrelated distribution fastreg is installed, too"
    assert remark not in report(capsys)[1]
    monkeypatch.setattr(main, "distributions", lambda name: [name] * (name == "fastreg"))
    assert remark in report(capsys)[1]


def test_a_release_has_absolute_links(tmp_path: Path) -> None:
    """PyPI shows the README without its files."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python(".ci/metadata", "https://github.com/owner/name", "v1.2", str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    for link in re.findall(r"\]\(([^)]*)\)", (ROOT / "README.md").read_text().replace("](#", "](README.md#")):
        kind = "raw" if link.endswith((".png", ".svg")) else "blob"
        assert f"({link})" in text if link.startswith("https://") else f"/name/{kind}/v1.2/{link})" in text
    assert re.findall(r"\]\((?!https://)", text) == []
    changelog = 'Changelog = "https://github.com/owner/name/blob/v1.2/CHANGELOG.md"\nPaper = '
    assert changelog in (tmp_path / "pyproject.toml").read_text()


def test_a_wrong_result_fails_the_self_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(capsys)[0] == 0
    monkeypatch.setattr(main, "fused_ar_tar", lambda raw, dropped, *_, lengths: raw.sum() + dropped.sum())
    status, said = report(capsys)
    assert status == 1
    assert "SELF-TEST FAILED: AssertionError" in said
