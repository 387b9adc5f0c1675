"""The first nine minutes on a GPU, by `bash bench/on_gpu.sh first`, and the tests of `bash bench/on_gpu.sh test`.

Each function is a part, with a share of the seconds. The time that it leaves goes to the next part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import pytest

from bench.measure import gpu_tasks, gpu_tests
from bench.measure.groups import CLOCK, HEADLINE, row_of_each_peer
from bench.measure.worker import NOT_REACHED, Lost, Worker

COMPILERS, TESTERS = 4, 6  # processes at a time
Do = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def compiled() -> None:
    """Compile the kernels of the tasks into Triton's cache on disk, several at a time."""

    def one(setting: gpu_tasks.Setting) -> None:
        worker = Worker()
        with suppress(Lost):  # the task that needs the kernel says why
            worker.do(gpu_tasks.compile_, setting, limit=45)
        worker.stop()

    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(one, gpu_tasks.compile_settings()))


@pytest.mark.part(75)
@pytest.mark.parametrize("setting", gpu_tasks.smoke_settings(), ids=str)
def test_smoke(compiled: None, do: Do, setting: gpu_tasks.Setting) -> None:
    assert do(gpu_tasks.smoke, setting, limit=25)["verdict"] == "right"


@pytest.mark.part(170)
@pytest.mark.benchmark(timer=CLOCK)
@row_of_each_peer(HEADLINE)
def test_headline(row: Callable[[], None]) -> None:
    row()


@pytest.mark.part(100)
@pytest.mark.parametrize("setting", gpu_tasks.sweep_settings(), ids=str)
def test_sweep(do: Do, setting: gpu_tasks.Setting) -> None:
    do(gpu_tasks.sweep, setting, limit=20)


@pytest.mark.part(40)
@pytest.mark.parametrize("setting", gpu_tasks.order_settings(), ids=str)
def test_order(do: Do, setting: gpu_tasks.Setting) -> None:
    assert do(gpu_tasks.order, setting, limit=30)["verdict"] == "right"


@pytest.mark.part(30)
@pytest.mark.parametrize("task", [gpu_tasks.clocks, gpu_tasks.ncu], ids=["clocks", "ncu"])
def test_device(do: Do, task: Any) -> None:
    do(task, limit=30)


@pytest.fixture(scope="session")
def outcomes(session: Any, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """Run the files of tests that are selected, several at a time, and the large one after all others."""
    collected: Any = request.session.items
    items = [item for item in collected if item.originalname == "test_files"]
    names = [item.callspec.params["name"] for item in items]
    workers = {name: Worker() for name in names}
    running: dict[str, Future[dict[str, Any]]] = {}

    def one(name: str) -> dict[str, Any]:
        if name == gpu_tests.LARGE:
            wait([others for other, others in running.items() if other != name])
        seconds = session.seconds_left(items[0]) - gpu_tests.GRACE
        if seconds < 0:
            raise Lost(NOT_REACHED)
        found = workers[name].do(gpu_tests.run_file, name, seconds, limit=seconds + gpu_tests.GRACE)
        workers[name].stop()
        return found

    with ThreadPoolExecutor(max(1, min(TESTERS, (os.cpu_count() or 1) // 2))) as pool:
        running |= {name: pool.submit(one, name) for name in names}
        yield running
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers.values():  # after an interrupt some are running
            worker.stop()


@pytest.mark.part(110)
@pytest.mark.parametrize("name", gpu_tests.TESTS)
def test_files(outcomes: dict[str, Future[dict[str, Any]]], name: str, tell: Do) -> None:
    assert not tell(outcomes[name].result())["failed"]


@pytest.mark.part(70)
@pytest.mark.skipif(gpu_tests.sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", gpu_tests.SANITIZERS)
def test_sanitizers(do: Do, tool: str) -> None:
    assert do(gpu_tests.sanitize, tool, limit=75)["status"] == 0
