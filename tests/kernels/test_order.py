"""Many launches on a GPU give the bits of the first one, beside another kernel that fills the GPU."""

from __future__ import annotations

import pytest
import torch

from fastreg import fused_ar_tar
from tests.conftest import BF16, FLOAT, gpu, skip_without

skip_without("triton")

from fastreg.kernels import tiling  # noqa: E402

BITS = {FLOAT: torch.int32, BF16: torch.int16}
CALLS, REPLAYS = 50, 1000  # of a graph: two launches a call make 100,000
NOISE, NOISES = 2**26, 16  # elements that another kernel writes meanwhile, and how often it does so in a replay


@gpu
@pytest.mark.parametrize("short_stretch", [16, 4])
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_results_do_not_depend_on_the_order_of_programs(
    dtype: torch.dtype, short_stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted wrong bit is noticed, because a device that computes nothing finds all values equal."""
    monkeypatch.setattr(tiling, "SHORT_STRETCH", short_stretch)
    raw, dropped = (torch.randn(64, 70, 400, device="cuda").to(dtype).requires_grad_() for _ in range(2))

    def call() -> list[torch.Tensor]:
        penalty = fused_ar_tar(raw, dropped, 2.0, 1.0)
        return [penalty.detach(), *torch.autograd.grad(penalty, (raw, dropped), torch.ones_like(penalty))]

    call()
    first = [x.clone() for x in call()]  # by the code that is launched directly
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    graph, noise = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            for x, y in zip(call(), first, strict=True):
                wrong += (x.view(BITS[x.dtype]) != y.view(BITS[y.dtype])).any()
    other = torch.zeros(NOISE, device="cuda")
    torch.cuda.synchronize()
    for _ in range(REPLAYS):
        graph.replay()
        with torch.cuda.stream(noise):
            for _ in range(NOISES):
                other.add_(1.0)
    torch.cuda.synchronize()
    assert wrong.item() == 0
    first[1].view(BITS[dtype]).view(-1)[:1] ^= 1
    graph.replay()
    assert wrong.item() == CALLS
