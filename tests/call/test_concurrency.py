"""Several threads at once, and a capture by a CUDA graph."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.arguments import check_not_captured
from tests.conftest import PLANS, compiled, gpu

THREADS, TIMEOUT = 8, 60
pytestmark = [pytest.mark.slow, compiled]  # Triton's interpreter is for one thread


def step(raw: Tensor, dropped: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Return values and gradients of both functions."""
    raw, dropped = raw.detach().requires_grad_(), dropped.detach().requires_grad_()
    terms = fused_ar_tar(raw, dropped, 2.0, 1.0, return_terms=True)
    kept, other = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, mask=dropped.detach())
    gradients = torch.autograd.grad(scale * (terms.penalty + other) + kept.sum(), (raw, dropped))
    return [x.detach() for x in (*terms, kept, other, *gradients)]


@pytest.mark.parametrize(
    ("device", "streams"),
    [("cpu", False), pytest.param("cuda", False, marks=gpu), pytest.param("cuda", True, marks=gpu)],
    ids=["cpu", "one_stream", "a_stream_each"],
)
def test_threads_at_once_are_exact(device: str, streams: bool) -> None:
    """Two threads also make the same plan at once, and have different upstream gradients."""
    inputs = [torch.randn(2, 16, 70 + i // 2, 200, device=device).unbind() for i in range(THREADS)]
    want = [step(*xs, 1 + i % 2) for i, xs in enumerate(inputs)]
    if device == "cuda":
        torch.cuda.synchronize()
    PLANS.clear()
    together = threading.Barrier(THREADS, timeout=TIMEOUT)

    def work(i: int) -> list[list[Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream()) if streams else nullcontext():
            together.wait()
            results = []
            for turn in range(20):
                results.append(step(*inputs[i], 1 + i % 2))
                if turn % 2:
                    PLANS.clear()
            if device == "cuda":
                torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(THREADS) as pool:
        for expected, results in zip(want, pool.map(work, range(THREADS)), strict=True):
            for result in results:
                assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


def test_host_tensors_are_refused_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="lengths: expected a tensor on the GPU during CUDA-graph capture"):
        check_not_captured("lengths", torch.device("cuda"))
