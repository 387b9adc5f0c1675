"""The packages that are measured: fastreg of this checkout and, in a comparison of two commits, of another checkout."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import fastreg
from bench.measure.machine import ROOT
from bench.measure.timing import DEVICE

VARIATIONAL, ELEMENTWISE = "variational", "elementwise"  # kinds of dropout
FUSED = {VARIATIONAL: "FusedRNNDropout", ELEMENTWISE: "FusedDropout"}
BEFORE = " before"  # at the end of the name of a way by the other package
package: Any = None  # the other one, where `--before=CHECKOUT` was given


def load(checkout: Path) -> None:
    """Import fastreg from another checkout beside this one's.

    Raises:
        ValueError: the folder is no checkout, or its C++ kernels are not built.
    """
    global package
    if not (checkout / "fastreg" / "__init__.py").exists():
        raise ValueError(f"--before: expected a checkout of fastreg, got {checkout}")
    sys.path.insert(0, str(checkout))
    try:
        with the_others():
            package = importlib.import_module("fastreg")
            importlib.import_module("fastreg.call.backends")  # which has imported the kernels
    finally:
        sys.path.remove(str(checkout))
    refuse_formula(package, checkout)


@contextmanager
def the_others() -> Iterator[None]:
    """Import fastreg from the other checkout inside the block.

    Both packages have the same name, so `sys.modules` has the other one by this name only there. After that the names
    of its modules begin with `before`; by these names torch.compile finds the globals of their functions.
    """
    own = taken_out("fastreg")
    sys.modules.update({name.removeprefix("before."): module for name, module in taken_out("before").items()})
    try:
        yield
    finally:
        others = taken_out("fastreg")
        sys.modules.update(own)
        for name, module in others.items():
            module.__name__ = f"before.{name}"
            sys.modules[module.__name__] = module


def taken_out(first: str) -> dict[str, Any]:
    """Take the modules whose names begin with a name out of `sys.modules`, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == first]
    return {name: sys.modules.pop(name) for name in names}


def adapter(of: Any, framework: str) -> Any:
    """Return the adapter of one of the packages for a framework, which is imported only here."""
    with nullcontext() if of is fastreg else the_others():
        return importlib.import_module(f"fastreg.{framework}")


def fused_dropout(of: Any, kind: str) -> Any:
    """Return the class of the fused dropout of a kind, or None, as earlier commits lack one."""
    return getattr(of, FUSED[kind], None)


def refuse_formula(measured: Any = fastreg, checkout: Path = ROOT) -> None:
    """Raise a ValueError if CPU tensors are measured, and a package runs the formula, as its kernels are not built."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured.fused_ar_tar(torch.ones(1, 2, 1), None, 0.0, 1.0)
    why = [text for text in map(str, (x.message for x in caught)) if "runs the plain formula on CPUs" in text]
    if why and DEVICE == "cpu":
        build = f"(cd {checkout.resolve()} && {sys.executable} setup.py --quiet build_ext)"
        raise ValueError(
            f"{why[0]}\nBenchmarks need C++ kernels that were built from the sources in {checkout}:\n    {build}"
        )


def both(ways: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return the ways that call this fastreg, by their names, and those that call the other one, if there is one."""
    others = ways(package) if package else {}
    return ways(fastreg) | {name + BEFORE: way for name, way in others.items()}
