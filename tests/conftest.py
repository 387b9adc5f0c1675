"""Where the tests run, and what they run in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastreg import cpu, dropout, penalty

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the real kernels did not run"),
]


def pytest_report_header() -> str:
    path = "the blocked PyTorch path" if penalty.RUNNERS["cpu"] is penalty.cpu else "the Triton kernels, interpreted"
    return f"fastreg: CPU tensors take {path}; GPU: {'yes' if torch.cuda.is_available() else 'none'}"


@pytest.fixture(autouse=True)
def seed() -> None:
    """What fails fails again, alone, too."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill memory from `torch.empty` and `empty_like` with NaN, so that an element nobody wrote shows."""
    monkeypatch.setattr(cpu, "_idle", cpu.Idle())
    empty_like = penalty.empty_like
    for module in (penalty, dropout):
        monkeypatch.setattr(module, "empty_like", lambda x: empty_like(x).fill_(torch.nan))
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)
