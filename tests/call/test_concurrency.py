"""Several threads at once, and CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.call.arguments import check_not_captured
from tests.conftest import PLANS, compiled, gpu

THREADS, TIMEOUT = 8, 60
pytestmark = [
    pytest.mark.slow,
    compiled,  # Triton's interpreter is for one thread
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]


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


# Each replay of a CUDA graph reads the tensors again, and the host never waits.


def captured(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Capture a step, in which the host must not wait for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, step()


def steps_of(name: str) -> dict[str, Tensor]:
    """Draw lengths for a batch of 6 and 9 time steps, or a mask; or nothing."""
    if name == "lengths":
        return {"lengths": torch.randint(0, 10, (6,), device="cuda")}
    return {} if name == "all" else {name: torch.rand(6, 9, device="cuda") < 0.7}


@gpu
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", ["all", "lengths", "valid", "starts"])
def test_a_graph_reads_what_has_changed(name: str, dropout: bool) -> None:
    raw, dropped = torch.randn(2, 6, 9, 12, device="cuda").unbind()
    mask = (dropped[:, :1] > 0).float() * 2
    raw.requires_grad_()
    alpha, beta, scale = torch.ones(3, device="cuda").unbind()
    options: Any = steps_of(name)

    def step() -> list[Tensor]:
        if dropout:
            got = fused_dropout_ar_tar(raw, 0.5, alpha, beta, mask=mask, return_terms=True, **options)[1]
        else:
            got = fused_ar_tar(raw, dropped, alpha, beta, return_terms=True, **options)
        return [x.detach() for x in (*got, *torch.autograd.grad(got.penalty, raw, scale))]

    graph, got = captured(step)
    for values in ((2.0, 1.0, 1.0), (0.5, 3.0, 1024.0), (0.5, 3.0, 1024.0), (0.0, 1.0, 512.0), (1.0, 0.0, 512.0)):
        with torch.no_grad():
            for x, value in zip((alpha, beta, scale), values, strict=True):
                x.fill_(value)
            raw.normal_()
            for given, x in steps_of(name).items():
                options[given].copy_(x)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip([x.clone() for x in got], step(), strict=True))


@gpu
def test_graphs_replay_at_once() -> None:
    pairs = torch.randn(2, 2, 64, 128, 512, device="cuda")
    replays = [(*captured(partial(step, *pair)), torch.cuda.Stream()) for pair in pairs]
    for _ in range(20):
        pairs.normal_()
        torch.cuda.synchronize()
        for graph, _, stream in replays:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, results, _), pair in zip(replays, pairs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(results, step(*pair), strict=True))
