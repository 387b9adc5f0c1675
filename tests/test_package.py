"""What importing the package gives, and what it leaves alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastreg

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ["ARTAR", "FusedRNNDropout", "RNNRegularizer", "fused_ar_tar", "fused_dropout_ar_tar"]


def test_public_names() -> None:
    assert sorted(fastreg.__all__) == PUBLIC
    assert all(hasattr(fastreg, name) for name in fastreg.__all__)
    assert fastreg.__version__
    assert fastreg.ARTAR._fields == ("penalty", "ar", "tar")


def test_the_version_is_that_of_the_distribution_and_of_the_newest_changes() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    changes = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert declared is not None
    assert changes is not None
    assert fastreg.__version__ == declared[1] == changes[1]


def test_importing_fastreg_imports_no_framework() -> None:
    frameworks = {"fastai", "lightning", "pytorch_lightning", "transformers"}
    code = f"import sys, fastreg; sys.exit(bool({frameworks} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("adapter", "command"), [("fastai", "'fastai>=2'"), ("fastai1", "'fastai<2'")])
def test_a_missing_fastai_says_how_to_install_it(adapter: str, command: str) -> None:
    code = f"import sys; sys.modules['fastai'] = None\ntry: import fastreg.{adapter}\n"
    code += "except ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"fastreg.{adapter}: ")
    assert done.stdout.endswith(f"; pip install {command}\n")


def test_the_name_kernels_is_left_to_others() -> None:
    """An unrelated distribution installs a top-level package of this name."""
    code = "import sys, fastreg, fastreg.kernels.penalty; sys.exit('kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_it_says_what_runs_here() -> None:
    done = subprocess.run([sys.executable, "-m", "fastreg"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, cpu, *_ = done.stdout.splitlines()
    assert f"fastreg {fastreg.__version__}" in first
    assert "cpu: " in cpu
    assert "self-test passed" in cpu


def test_a_wrong_result_fails_the_self_test() -> None:
    code = "import sys, fastreg.__main__ as m; m.fused_ar_tar = lambda r, d, a, b, lengths: (r.sum() + d.sum()); "
    code += "sys.exit(m.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "SELF-TEST FAILED: AssertionError" in done.stdout
