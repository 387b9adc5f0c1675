"""PyTorch without a private name, or without a Triton that can be imported: calls run the formula after one warning."""

from __future__ import annotations

import operator
import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastreg.call import backends, torch_state
from tests.conftest import ROOT, python

pytestmark = pytest.mark.slow

WITHOUT_PRIVATE_NAMES = """
import operator, os, sys, torch, torch._dynamo, traceback, warnings

attrgetter = operator.attrgetter


def check(name):
    def get(other):
        if other == name:
            raise AttributeError(name)
        return attrgetter(other)

    operator.attrgetter = get
    from fastreg import FusedRNNDropout, RNNRegularizer, __main__ as main, fused_ar_tar, fused_dropout_ar_tar

    x, y = (torch.ones(2, 3, 4).requires_grad_() for _ in range(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        total = fused_ar_tar(x, x, 2.0, 1.0, lengths=torch.tensor([3, 1]))
        total = total + fused_ar_tar(x[:1], x[:1], 2.0, 1.0) + fused_dropout_ar_tar(x, 0.5, 0.0, 1.0)[1]
        module, regularizer = torch.nn.Identity(), RNNRegularizer(2.0, 1.0)
        regularizer.attach(module, batch_first=True)
        loss = regularizer.on_backward_begin(module(y * 1).sum() * 0)
        (total + loss).backward()
    assert total.detach() == 4 and loss.detach() == 2, (total, loss)
    assert torch.equal(y.grad, torch.full_like(y, 4 / 24)), y.grad
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(said) == 1 and f"lacks torch.{name}," in said[0], said
    sys.argv = ["fastreg"]
    assert main.main() == 0


for name in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            check(name)
            print("right without", name, flush=True)
        except Exception:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_future_pytorch_without_a_private_name_runs_the_formula() -> None:
    """Each name is missing in its own process, which warns once; `python -m fastreg` names it."""
    with mock.patch("operator.attrgetter", wraps=operator.attrgetter) as asked:
        runpy.run_path(torch_state.__file__)
    names = [name for (name,), _ in asked.call_args_list]
    done = python("-c", WITHOUT_PRIVATE_NAMES, *names, OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    assert re.findall(r"^right without (.*)$", done.stdout, re.MULTILINE) == names != [], done.stderr
    for name in names:
        assert f"the plain formula (torch {torch.__version__} lacks torch.{name}, so" in done.stdout


def test_a_broken_triton_is_named(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so: undefined symbol')\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = python("-m", "fastreg", folder=tmp_path, PYTHONPATH=path, TRITON_INTERPRET="0")
    why = "Triton cannot be used (OSError: libtriton.so: undefined symbol); in a clone: pip install '.[gpu]'\n"
    assert why in done.stdout
    assert "self-test passed" in done.stdout
    ask = "import torch\nfrom fastreg.call.backends import backend_for\n" + "backend_for(torch.device('cuda'))\n" * 2
    said = python("-c", ask, folder=tmp_path, PYTHONPATH=path, TRITON_INTERPRET="0").stderr
    assert said.count(f"UserWarning: fastreg runs the plain formula on GPUs: {why.strip()}") == 1


def test_a_triton_that_is_installed_is_used() -> None:
    """Otherwise an error in the kernels would leave their tests out."""
    assert backends.TRITON is not None or find_spec("triton") is None
