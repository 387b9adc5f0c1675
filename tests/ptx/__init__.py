"""Run the kernels as compiled for an H100 on CPU tensors, instruction by instruction: `pytest -p tests.ptx`.

README.md lists the faults that raise a `PTXError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.ptx.driver import Executor, executed


def all_kernels() -> list[Any]:
    """Return the kernels of fastreg."""
    from fastreg.kernels import ar_tar, steps

    return [ar_tar.ar_tar_kernel, steps.steps_kernel]


@contextmanager
def kernels_take_cpu_tensors() -> Iterator[None]:
    """Send CPU tensors to the Triton kernels, inside of `executed`."""
    from fastreg.backends import TRITON, cpu_tensors_by

    assert TRITON is not None
    with cpu_tensors_by(TRITON):  # which drops all plans, as the driver frees the code that it has loaded
        yield


EXECUTOR = pytest.StashKey[Executor]()


def pytest_configure(config: pytest.Config) -> None:
    stack = ExitStack()
    config.stash[EXECUTOR] = stack.enter_context(executed(Executor()))
    stack.enter_context(kernels_take_cpu_tensors())
    config.add_cleanup(stack.close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out tests that need a GPU."""
    items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


@pytest.fixture(autouse=True)
def ptx(request: pytest.FixtureRequest) -> None:
    """Start each test with the same schedules."""
    request.config.stash[EXECUTOR].random.seed(0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[EXECUTOR]
    terminalreporter.write_line(
        f"PTX: {len(run.kernels)} kernels as compiled for sm_90, {run.launches} launches, {run.programs} programs, "
        f"{run.steps / 1e6:.0f} million instructions of a warp"
    )
