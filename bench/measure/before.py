"""The fastreg of another checkout, in this process: the way "before" of a comparison of two commits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

fastreg: Any = None  # the package of the other checkout, where `--before=CHECKOUT` was given


def load(checkout: Path) -> None:
    """Import fastreg from another checkout, whose C++ kernels are built, beside this one's.

    Both packages have the same name, so `sys.modules` has the other one only during its import.
    """
    global fastreg
    own = taken_out()
    sys.path.insert(0, str(checkout))
    try:
        fastreg = importlib.import_module("fastreg")
        importlib.import_module("fastreg.call.backends")  # which has imported the kernels
        if checkout.resolve() not in Path(fastreg.__file__).resolve().parents:
            raise FileNotFoundError(f"--before: expected a checkout of fastreg, got {checkout}")
    finally:
        sys.path.remove(str(checkout))
        taken_out()
        sys.modules.update(own)


def taken_out() -> dict[str, Any]:
    """Take the modules of fastreg out of `sys.modules`, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "fastreg"]
    return {name: sys.modules.pop(name) for name in names}
