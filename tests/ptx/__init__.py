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
    """Send CPU tensors to the Triton kernels, inside of `executed`, the only part that knows fastreg."""
    from fastreg.backends import TRITON, cpu_tensors_by
    from fastreg.plans import forget

    assert TRITON is not None
    with cpu_tensors_by(TRITON):
        yield
    forget()  # compiled code is freed by the driver that loaded it


EXECUTOR, KERNELS = pytest.StashKey[Executor](), pytest.StashKey[list[Any]]()


def pytest_configure(config: pytest.Config) -> None:
    stack = ExitStack()
    config.stash[EXECUTOR] = stack.enter_context(executed(Executor()))
    config.stash[KERNELS] = all_kernels()
    stack.enter_context(kernels_take_cpu_tensors())
    config.add_cleanup(stack.close)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that need a GPU."""
    kept = [item for item in items if item.get_closest_marker("gpu") is None]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu") is not None])
    items[:] = kept


@pytest.fixture(autouse=True)
def ptx(request: pytest.FixtureRequest) -> None:
    """Start each test with the same schedules."""
    request.config.stash[EXECUTOR].random.seed(0)


def not_covered(run: Executor, kernels: list[Any]) -> list[str]:
    """Name the kernels that did not run, and the switches that were never on or never off."""
    missing = [kernel.__name__ for kernel in kernels if kernel.__name__ not in run.switches]
    halves = ({"True"}, {"False"}, {"None"})
    return missing + [f"{k}: {name}" for k, seen in run.switches.items() for name in seen if seen[name] in halves]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    missing = not_covered(config.stash[EXECUTOR], config.stash[KERNELS])
    if config.getoption("sample") != 1 and missing and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[EXECUTOR]
    terminalreporter.write_line(
        f"PTX: {len(run.kernels)} kernels as compiled for sm_90, {run.launches} launches, {run.programs} programs, "
        f"{run.steps / 1e6:.0f} million instructions of a warp"
    )
    if missing := not_covered(run, config.stash[KERNELS]):
        terminalreporter.write_line(f"PTX: never on, or never off: {', '.join(missing)}")
