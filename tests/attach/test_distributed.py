"""More than one process, or device: training and values are the same as with the formula.

Two processes on the CPU make up the group, and each test runs a function of this file in both.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

from fastreg import FusedRNNDropout, fused_ar_tar, fused_dropout_ar_tar, with_penalty
from tests.conftest import gpu, more
from tests.exact import check_dropout, check_penalty
from tests.language_model import VOCABULARY, Triple, attached, criterion, formula, regularizer

pytestmark = pytest.mark.slow

TIMEOUT = 60  # seconds, for whatever waits: a group that hangs fails


def start(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    options: Any = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=TIMEOUT / 2)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", **options)


@pytest.fixture(scope="module")
def in_both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Call a function in both processes; a failure in one of them fails the test."""
    spawn, meeting = multiprocessing.get_context("spawn"), str(tmp_path_factory.mktemp("group") / "meeting")
    with spawn.Pool(2) as pool:

        def both(function: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
            # No process takes both calls, as each call waits for the other in the group.
            pool.starmap_async(function, arguments, chunksize=1).get(TIMEOUT)

        both(start, (0, meeting), (1, meeting))
        yield lambda function, *arguments: both(function, arguments, arguments)


def sharded(model: Any) -> Any:
    for module in (*model.children(), model):
        fully_shard(module, mesh=mesh())
    return model


def train(wrap: Any) -> None:
    """Train on half of each batch by fastreg and by the formula, and compare the weights."""
    torch.manual_seed(0)
    model, plain = Triple(), Triple()
    plain.load_state_dict(model.state_dict())
    reg, both = attached(model), [wrap(model), wrap(plain)]
    optimizers = [torch.optim.SGD(x.parameters(), 0.5) for x in both]
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for step in range(3):
        tokens = torch.randint(VOCABULARY, (4, 8))[half]
        for outer, optimizer in zip(both, optimizers, strict=True):
            torch.manual_seed(step)
            decoded, raw, dropped = outer(tokens)
            loss = criterion(decoded, tokens)
            total = loss + formula(raw, dropped, time=1) if outer is both[1] else reg.on_backward_begin(loss)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
    got, want = ([x.full_tensor() if isinstance(x, DTensor) else x for x in outer.parameters()] for outer in both)
    assert_close(got, want)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, sharded])
def test_data_parallelism_trains_as_with_the_formula(wrap: Any, in_both: Callable[..., None]) -> None:
    in_both(train, wrap)


@cache
def mesh() -> DeviceMesh:
    """Return one mesh for all tests: AOTAutograd does not compile the backward of a DTensor on a second one like it."""
    return init_device_mesh("cpu", (2,))


def check_dtensors(placement: Any, batch_first: bool) -> None:
    """Compare with one process, for sizes that do not divide by two: the ranks' means are not the mean of the whole."""
    torch.manual_seed(0)
    tensors = torch.randn(2, 5, 7, 3).unbind()
    mask = torch.empty_like(tensors[0]).bernoulli_(0.5) * 2
    options: Any = {"batch_first": batch_first, "return_terms": True}

    def same(x: Any) -> Any:
        return fused_ar_tar(x, x, 2.0, 1.0, batch_first=batch_first)

    spread: Any = partial(distribute_tensor, device_mesh=mesh(), placements=[placement])
    results, compiled = [], torch.compile(same, fullgraph=True, backend="aot_eager")
    for split, of_one in ((torch.clone, same), (spread, compiled)):
        raw, dropped = (split(x).requires_grad_() for x in tensors)
        penalty = fused_ar_tar(raw, dropped, 2.0, 1.0, **options)
        by_mask, terms = fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, mask=split(mask), **options)
        one, reg, module = of_one(raw), regularizer(), nn.Identity()
        reg.attach(module, batch_first=batch_first)
        output, state = module((2 * raw, raw.sum(1)))
        loss = reg.on_backward_begin(output.sin().sum() + state.sum())
        views = [with_penalty(dropped + 0, same(dropped), scale) for scale in (0.5, torch.tensor(0.25))]
        total = penalty.penalty + by_mask.sum() + 2 * terms.penalty + 3 * one + loss + sum(x.sum() for x in views)
        results.append([*penalty, by_mask, *terms, one, loss, *torch.autograd.grad(total, (raw, dropped))])
    assert_close([x.full_tensor() for x in results[1]], results[0])

    rows: Any = distribute_tensor(tensors[0][0], mesh(), [Shard(0)])
    for x, given in (
        (spread(tensors[0]), {"lengths": torch.tensor([1])}),
        (PackedSequence(rows, torch.tensor([4, 3])), {}),
    ):
        with pytest.raises(TypeError, match=r"^raw and dropped: expected no DTensor with .* pass x\.to_local\(\)"):
            fused_ar_tar(x, x, 2.0, 1.0, **given)

    # A mask that is drawn is one mask, in whatever pieces.
    module: Any = FusedRNNDropout(0.5, 2.0, 1.0, batch_first=batch_first)
    dropped, terms = module(spread(tensors[0])).full_tensor(), module.take()
    keep = (dropped != 0).movedim(1 if batch_first else 0, 0)
    assert_close(keep, keep[:1].expand_as(keep))
    assert_close(terms.penalty.full_tensor(), fused_ar_tar(tensors[0], dropped, 2.0, 1.0, batch_first=batch_first))


@pytest.mark.parametrize(
    ("placement", "batch_first"),
    [(Shard(0), True), (Shard(1), False), *(pytest.param(x, True, marks=more) for x in (Shard(1), Shard(2)))],
    ids=str,
)
def test_dtensors_have_the_mean_of_the_whole(placement: Any, batch_first: bool, in_both: Callable[..., None]) -> None:
    in_both(check_dtensors, placement, batch_first)


@gpu
@pytest.mark.gpus
def test_tensors_on_another_gpu_are_worked_on_there() -> None:
    raw, dropped, mask = torch.randn(3, 3, 7, 12, device="cuda:1").unbind()
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):  # which have their own plans of one size
            check_penalty(*(x.detach().to(device).requires_grad_() for x in (raw, dropped)))
            check_dropout(raw.detach().to(device).requires_grad_(), mask[:, :1].to(device))
        raw, dropped = raw.requires_grad_(), dropped.requires_grad_()
        results = fused_ar_tar(raw, dropped, 2.0, 1.0), *fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0)
    assert all(x.device == raw.device for x in (*results, *torch.autograd.grad(results[0], (raw, dropped))))
