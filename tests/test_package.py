"""The import of the package: its names, and the modules that it does not import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastreg
import fastreg.__main__ as main
from fastreg import backends
from fastreg.installation import remarks
from fastreg.kernels import cpu
from tests.conftest import import_without, skip_on_formula, without

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ["ARTAR", "FusedRNNDropout", "RNNRegularizer", "fused_ar_tar", "fused_dropout_ar_tar"]


def test_public_names() -> None:
    assert sorted(fastreg.__all__) == PUBLIC
    assert all(hasattr(fastreg, name) for name in fastreg.__all__)
    assert fastreg.ARTAR._fields == ("penalty", "ar", "tar")


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("pyproject.toml", r'^version = "(.*)"$'),
        ("CHANGELOG.md", r"^## \[(\d.*?)\]"),
        ("CITATION.cff", "^version: (.*)$"),
    ],
)
def test_the_version_is_that_of_the_distribution_and_of_the_newest_changes(file: str, version: str) -> None:
    first, *_ = re.findall(version, (ROOT / file).read_text(), re.MULTILINE)
    assert fastreg.__version__ == first


BUILT = shutil.ignore_patterns("__pycache__", "*.so", "build")


def python(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, which it imports from first, and then from `PYTHONPATH`."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree in which nothing has been built."""
    folder = tmp_path_factory.mktemp("tree") / "clone"
    folder.mkdir()
    for name in ("fastreg", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=BUILT)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    setup = folder / "setup.py"
    # one library, for all processors
    for slow, fast in ('"-O3"', '"-O0"'), ("for level in (3, 4)", "for level in ()"):
        assert setup.read_text().count(slow) == 1
        setup.write_text(setup.read_text().replace(slow, fast))
    return folder


QUICKLY = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
PIP = ["-m", "pip", "install", *QUICKLY, ".", "--target"]
BUILD = ["setup.py", "--quiet", "build", "--build-lib"]  # in a third of the time


def install(clone: Path, folder: Path, command: list[str], cc: str, cxx: str) -> tuple[Path, Path]:
    """Copy the clone into a folder, and install it there with these compilers; return the copy and the installation."""
    shutil.copytree(clone, folder / "clone", symlinks=True)
    done = python(*command, str(folder / "site"), folder=folder / "clone", CC=cc, CXX=cxx)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "clone", folder / "site"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_an_installation_runs_anywhere(clone: Path, tmp_path: Path) -> None:
    """And leaves its libraries in the clone, too, from which Python imports the package there."""
    clone, site = install(clone, tmp_path, PIP, "gcc", "g++")
    done = python("-m", "fastreg", folder=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0
    assert f"imported from {site / 'fastreg'}\n" in done.stdout, done
    assert "the C++ kernels; self-test passed" in done.stdout
    assert not done.stderr  # such as PyTorch's remark on NumPy
    folders = clone / "kernels", site / "fastreg" / "kernels"
    of_clone, of_site = ({file.name for file in folder.glob("*.so")} for folder in folders)
    assert of_clone == of_site


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Copy the libraries with their sources to a folder, from which this process loads the best one anew."""
    skip_on_formula("cpu")
    for file in (file for pattern in ("_cpu*", "cpu*") for file in (ROOT / "kernels").glob(pattern)):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu.library.cache_clear()


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs AVX2")
@pytest.mark.parametrize(
    ("capability", "library", "why"),
    [
        ("AVX512", "_cpu_v4", "processors with AVX-512"),
        ("AVX2", "_cpu_v3", "by PyTorch's capability AVX2 this is none of the processors with AVX-512"),
        ("DEFAULT", "_cpu", "by PyTorch's capability DEFAULT this is none of the processors with AVX2"),
    ],
)
def test_the_level_is_named(
    capability: str, library: str, why: str, libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason for which it is not a better one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if cpu.processor_level() < 4 and capability != "DEFAULT":
        library, why = "_cpu_v3", "this is none of the processors with AVX-512"
    assert cpu.library().path.name.startswith(f"{library}.")
    assert cpu.description().startswith(f"{libraries}/{library}.")
    assert cpu.description().endswith(why)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512")
def test_a_level_that_was_not_built_is_named(libraries: Path) -> None:
    for file in libraries.glob("_cpu_v4.*"):
        file.unlink()
    assert cpu.library().path.name.startswith("_cpu_v3.")
    assert cpu.description().endswith("no library for processors with AVX-512 was built from these sources")


def test_a_library_of_other_sources_is_not_loaded(libraries: Path) -> None:
    with (libraries / "cpu_rows.h").open("a") as file:
        file.write("// changed\n")
    with pytest.raises(OSError, match="built from another version of the source: install fastreg-rnn again"):
        cpu.library()


HIDE_TRITON = """
import importlib.util as util, sys
find, sys.modules["triton"] = util.find_spec, None
util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
"""
CALLS = """
import sys, torch, warnings
from fastreg import __main__ as main, fused_ar_tar
from fastreg.backends import TRITON
x = torch.ones(2, 3, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    values = [fused_ar_tar(x, x, 2.0, 1.0), fused_ar_tar(x[:1], x[:1], 2.0, 1.0)]
assert values == [2, 2], values
assert TRITON is None
print([str(warning.message) for warning in caught if warning.category is UserWarning])
assert main.main() == 0
assert not {"fastai", "lightning", "pytorch_lightning", "transformers", "kernels"} & {*sys.modules}
"""


def test_nothing_but_pytorch_is_needed(clone: Path, tmp_path: Path) -> None:
    """Without a compiler, the first call warns. Nor is the name `kernels` taken, of an unrelated distribution."""
    _, site = install(clone, tmp_path, BUILD, "false", "false")
    (site / "sitecustomize.py").write_text(HIDE_TRITON)
    done = python("-c", CALLS, folder=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done
    assert not done.stderr
    assert done.stdout.count("runs the plain formula on CPUs") == 1, done
    assert "where there is a C++ compiler" in done.stdout
    assert "the plain formula (the kernels were not built: install" in done.stdout


RELEASES = {"fastai": "'fastai>=2'", "fastai1": "'fastai<2'", "lightning": "lightning", "transformers": "transformers"}


@pytest.mark.parametrize("adapter", RELEASES)
def test_a_missing_framework_is_named(adapter: str) -> None:
    with pytest.raises(ImportError, match=rf"^fastreg\.{adapter}: .*; pip install {RELEASES[adapter]}( accelerate)?$"):
        import_without(f"fastreg.{adapter}", "fastai", "lightning", "pytorch_lightning", "transformers")


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no Clang")
def test_clang_brings_no_second_openmp_runtime(clone: Path, tmp_path: Path) -> None:
    _, site = install(clone, tmp_path, BUILD, "clang", "clang++")
    (library,) = site.glob("fastreg/kernels/*.so")
    assert b"libomp" not in library.read_bytes()
    done = python("-m", "fastreg", folder=tmp_path, PYTHONPATH=str(site))
    assert "one thread, as its compiler has no GNU OpenMP\n" in done.stdout, done
    assert "the C++ kernels; self-test passed" in done.stdout


@pytest.mark.parametrize("name", ["penalty", "regularizer", "fastai", "transformers", "__main__"])
def test_a_package_that_is_mixed_up_with_another_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distribution called fastreg has been installed after ours."""
    shutil.copytree(ROOT / "fastreg", tmp_path / "fastreg")
    (tmp_path / "fastreg" / "__init__.py").write_text("def ols(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = f"{re.escape(str(tmp_path))}.* is not the file of fastreg-rnn.*pip uninstall fastreg fastreg-rnn"
    with without("fastreg"):
        for module in [module for module in sys.modules if module.split(".")[0] == "fastreg"]:
            del sys.modules[module]
        with pytest.raises(ImportError, match=message):
            import_module(f"fastreg.{name}")


def test_hidden_installations_and_another_distribution_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fastreg", "fastreg-rnn"):
        information = tmp_path / f"{name.replace('-', '_')}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (tmp_path / "fastreg").mkdir()
    (tmp_path / "fastreg" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert f"the installation in {tmp_path / 'fastreg'} is hidden" in remarks()[0]
    assert "the unrelated distribution 'fastreg' shares the name" in remarks()[-1]


def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `python -m fastreg` in this process; return its status and its output."""
    monkeypatch.setattr(sys, "argv", ["fastreg"])
    return main.main(), capsys.readouterr().out


@pytest.mark.parametrize("name", ["triton", "triton-xpu", "pytorch-triton-rocm"])
def test_triton_by_any_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def version(asked: str) -> str:
        if asked == name:
            return "3.7"
        raise PackageNotFoundError(asked)

    monkeypatch.setattr(main, "version", version)
    assert main.triton() == f"{name} 3.7"


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    """It has all files of the repository, and the link by which a source tree imports its kernels."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is no repository")
    for name in listed.stdout.splitlines():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name, follow_symlinks=False)
    done = python("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path), folder=tmp_path / "tree")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    assert members["fastreg/kernels"].linkname == "../kernels"
    assert {*listed.stdout.splitlines()} <= {*members}


def test_it_says_what_runs_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = report(monkeypatch, capsys)
    assert status == 0, output
    first, place, *rest = output.splitlines()
    assert f"fastreg {fastreg.__version__}" in first
    assert place.startswith(f"imported from {ROOT / 'fastreg'}")
    (line,) = (line for line in rest if line.startswith("cpu: "))
    assert "self-test passed" in line


def test_a_wrong_result_fails_the_self_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "fused_ar_tar", lambda raw, dropped, *_, lengths: raw.sum() + dropped.sum())
    status, output = report(monkeypatch, capsys)
    assert status == 1
    assert "SELF-TEST FAILED: AssertionError" in output


@pytest.mark.skipif(backends.TRITON is None, reason="Triton is not installed")
@pytest.mark.parametrize("has_fp64", [True, False])
def test_an_intel_gpu_without_float64_runs_the_formula(has_fp64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Arc; a stand-in for its properties."""
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(has_fp64=has_fp64))
    device = torch.device("xpu", 7 + has_fp64)  # no test asks for it again
    assert (backends.backend_for(device) is not None) == has_fp64
    assert "float64" in backends.why_formula(device)
