"""Run the kernels as compiled for an H100 on CPU tensors, instruction by instruction: `pytest -p tests.kernels.ptx`.

No GPU has run these kernels yet, so nothing else runs the code that Triton compiles for one. README.md lists the
faults that raise a `PTXError`.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.kernels.ptx.driver import Executor, executed

EXECUTOR = Executor()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Take CPU tensors before `tests/conftest.py` asks which cases can run here."""
    stack = ExitStack()
    stack.enter_context(executed(EXECUTOR))
    early_config.add_cleanup(stack.close)


def pytest_runtest_setup() -> None:
    """Start each test with the same schedules."""
    EXECUTOR.random.seed(0)
