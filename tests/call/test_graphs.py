"""CUDA graphs: each replay reads the tensors again, and the host never waits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from tests.conftest import gpu

pytestmark = [gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")]
Step = Callable[[], list[Tensor]]


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
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


def tensors(*shape: int) -> tuple[Tensor, Tensor]:
    raw, dropped = torch.randn(2, *shape, device="cuda").unbind()
    return raw.requires_grad_(), dropped.requires_grad_()


def steps_of(name: str) -> dict[str, Tensor]:
    """Draw lengths for a batch of 6 and 9 time steps, or a mask; or nothing."""
    if name == "lengths":
        return {"lengths": torch.randint(0, 10, (6,), device="cuda")}
    return {} if name == "all" else {name: torch.rand(6, 9, device="cuda") < 0.7}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", ["all", "lengths", "valid", "starts"])
def test_a_graph_reads_what_has_changed(name: str, dropout: bool) -> None:
    raw, dropped = tensors(6, 9, 12)
    mask = (dropped.detach()[:, :1] > 0).float() * 2
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


def test_graphs_replay_at_once() -> None:
    pairs, grad = [tensors(64, 128, 512) for _ in range(2)], torch.ones((), device="cuda")

    def step(raw: Tensor, dropped: Tensor) -> list[Tensor]:
        got = fused_ar_tar(raw, dropped, 2.0, 1.0)
        return [got.detach(), *torch.autograd.grad(got, (raw, dropped), grad)]

    replays = [(*captured(partial(step, *pair)), torch.cuda.Stream()) for pair in pairs]
    for _ in range(20):
        with torch.no_grad():
            for x in itertools.chain(*pairs):
                x.normal_()
        torch.cuda.synchronize()
        for graph, _, stream in replays:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, results, _), pair in zip(replays, pairs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(results, step(*pair), strict=True))
