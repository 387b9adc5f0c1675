"""Forward and backward with other values of the constants in kernels/tiling.py, on a GPU: `pytest bench/test_sweep.py`.

A way is a value of `SHORT_RUN`. The plans of calls are made anew in each call, so compare `graph_rotated_seconds`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
from torch import Tensor

from bench.conftest import in_turns, name
from bench.measure import formulas
from bench.measure.formulas import ALPHA, BETA
from bench.measure.timing import DEVICE
from bench.test_call import DTYPES, LARGE, MIDDLE, SMALL, case_of, penalty_inputs, run
from fastreg import fused_ar_tar
from fastreg.call.key import PLANS
from fastreg.kernels import tiling

pytestmark = [in_turns, pytest.mark.skipif(DEVICE == "cpu", reason="the constants are those of GPUs")]
FEW = list(product((SMALL, (20, 70, 1152)), DTYPES, [1024], [16, 8, 4]))  # programs: shorter runs make more of them
MANY = list(product((LARGE, MIDDLE), DTYPES, [1024, 792, 528], [16]))  # whole waves of programs


@pytest.mark.parametrize(("shape", "dtype", "programs", "way"), FEW + MANY, ids=name)
def test_sweep(
    measure: Callable[..., None], monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: Any, programs: int
) -> None:
    case = case_of(penalty_inputs, formulas.penalty, shape, dtype)

    def penalty(short_run: int, raw: Tensor, dropped: Tensor) -> Tensor:
        monkeypatch.setattr(tiling, "SHORT_RUN", short_run)
        monkeypatch.setattr(tiling, "PROGRAMS", programs)
        PLANS.clear()
        return fused_ar_tar(raw, dropped, ALPHA, BETA)

    run(measure, case, {way: partial(penalty, way) for way in (16, 8, 4)}, {"pass": "sweep", "programs": programs})
    PLANS.clear()
