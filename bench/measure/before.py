"""The packages that are measured: fastreg and, after `bash bench/before.sh COMMIT`, the fastreg of another commit."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

import fastreg
from bench.measure.timing import DEVICE

VARIATIONAL, ELEMENTWISE = "variational", "elementwise"  # kinds of dropout
FUSED = {VARIATIONAL: "FusedRNNDropout", ELEMENTWISE: "FusedDropout"}
BEFORE = " before"  # at the end of the name of a way by the other package
PACKAGES: dict[str, Any] = {"": fastreg}  # by the ends of their ways' names
if find_spec("fastreg_before"):
    PACKAGES[BEFORE] = importlib.import_module("fastreg_before")


def refuse_formula() -> None:
    """Raise a ValueError if CPU tensors are measured, and a package runs the formula, as its kernels are not built."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for package in PACKAGES.values():
            package.fused_ar_tar(torch.ones(1, 2, 1), None, 0.0, 1.0)
    why = [text for text in map(str, (x.message for x in caught)) if "runs the plain formula on CPUs" in text]
    if why and DEVICE == "cpu":
        build = f"{sys.executable} setup.py --quiet build_ext"
        raise ValueError(f"{why[0]}\nBenchmarks need C++ kernels that were built from today's sources:\n    {build}")


def both(ways: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return the ways that call this fastreg, by their names, and those that call the other one, if there is one."""
    return {name + end: way for end, package in PACKAGES.items() for name, way in ways(package).items()}


def adapter(package: Any, framework: str) -> Any:
    """Import the adapter of a package for a framework."""
    return importlib.import_module(f"{package.__name__}.{framework}")


def fused_dropout(package: Any, kind: str, *options: float) -> Any:
    """Make a fused dropout of a kind; a way by an earlier commit, which lacks that class, gets no row."""
    return getattr(package, FUSED[kind])(*options)
