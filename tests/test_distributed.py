"""More than one process, or device: the gradients are those of the formula written out.

Two processes on the CPU make up the group; each test runs a function of this file in both.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar, fused_dropout_ar_tar, with_penalty
from tests.conftest import gpu, more
from tests.exact import check_dropout, check_penalty
from tests.language_model import VOCABULARY, Model, criterion, formula

TIMEOUT = 60  # seconds, for whatever waits: a group that hangs fails


def start(rank: int, meeting: str) -> None:
    """Initialize a process."""
    torch.set_num_threads(1)
    options: Any = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=TIMEOUT / 2)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", **options)


@pytest.fixture(scope="module")
def in_both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Call a function in both processes; a failure in one of them fails the test."""
    spawn, meeting = multiprocessing.get_context("spawn"), str(tmp_path_factory.mktemp("group") / "meeting")
    with spawn.Pool(1) as first, spawn.Pool(1) as second:

        def both(function: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
            calls = [p.apply_async(function, a) for p, a in zip((first, second), arguments, strict=True)]
            for one in calls:
                one.wait(TIMEOUT)
            for one in calls:
                one.get(0)

        both(start, (0, meeting), (1, meeting))
        yield lambda function, *arguments: both(function, arguments, arguments)


class LanguageModel(Model):
    """Returns raw and dropped, too, and counts its resets; its RNN may add a penalty of raw in each backward."""

    resets = 0

    def forward(self, x: Tensor) -> Any:
        return self.activations(x)

    def add(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Be a hook on the RNN."""
        raw, state = output
        return with_penalty(raw, fused_ar_tar(raw, raw, 2.0, 1.0)), state

    def reset(self) -> None:
        self.resets += 1


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DDP": DistributedDataParallel,
    "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "FSDP2": lambda model: [fully_shard(module, mesh=mesh()) for module in (*model.children(), model)][-1],
}


def train(how: str, penalty_by: str) -> None:
    """Three steps on half of each batch, and the same with the formula written out: the weights are the same."""
    torch.manual_seed(0)
    model, plain = LanguageModel(), LanguageModel()
    plain.load_state_dict(model.state_dict())
    regularizer = RNNRegularizer(2.0, 1.0)
    if penalty_by == "attach":
        regularizer.attach(model.rnn, model.dropout)
    elif penalty_by == "with_penalty":
        model.rnn.register_forward_hook(model.add)
    outer, plain_outer = WRAPPERS[how](model), WRAPPERS[how](plain)
    regularizer.on_epoch_begin(outer)
    assert_close(model.resets, 1)
    optimizers = [torch.optim.SGD(x.parameters(), 0.5) for x in (outer, plain_outer)]
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for step in range(3):
        tokens = torch.randint(VOCABULARY, (4, 8))[half]
        torch.manual_seed(step)
        output = outer(tokens)
        if penalty_by == "on_loss_begin":
            regularizer.on_loss_begin(output)
        loss = criterion(output[0], tokens)
        if penalty_by == "hand":
            loss = loss + fused_ar_tar(*output[1:], 2.0, 1.0)
        elif penalty_by != "with_penalty":
            loss = regularizer.on_backward_begin(loss)
        loss.backward()
        torch.manual_seed(step)
        decoded, raw, dropped = plain_outer(tokens)
        penalized = raw if penalty_by == "with_penalty" else dropped
        (criterion(decoded, tokens) + formula(raw, penalized, time=1)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(weights(outer, how), weights(plain_outer, how))


def weights(outer: nn.Module, how: str) -> list[Tensor]:
    """All parameters, whole."""
    with FullyShardedDataParallel.summon_full_params(outer) if how == "FSDP1" else nullcontext():
        return [x.full_tensor() if isinstance(x, DTensor) else x.detach().clone() for x in outer.parameters()]


@pytest.mark.parametrize("penalty_by", ["hand", "on_loss_begin", "attach", "with_penalty"])
@pytest.mark.parametrize("how", ["DDP", pytest.param("FSDP1", marks=more), "FSDP2"])
def test_data_parallelism_trains_as_with_the_formula(how: str, penalty_by: str, in_both: Callable[..., None]) -> None:
    in_both(train, how, penalty_by)


def full(x: Any) -> Tensor:
    assert isinstance(x, DTensor)
    return x.full_tensor()


@functools.cache
def mesh() -> DeviceMesh:
    """One for all tests: AOTAutograd does not compile the backward of a DTensor on a second one like it."""
    return init_device_mesh("cpu", (2,))


def check_dtensors(placement: Any, batch_first: bool) -> None:
    """Sizes that do not divide by two, so that the ranks' means are not those of the whole."""
    torch.manual_seed(0)
    tensors = torch.randn(2, 5, 7, 3).unbind()
    plain, spread = (
        [split(x.clone()).requires_grad_() for x in tensors]
        for split in (lambda x: x, lambda x: distribute_tensor(x, mesh(), [placement]))
    )
    options: Any = {"batch_first": batch_first, "return_terms": True}
    want, got = (fused_ar_tar(*xs, 2.0, 1.0, **options) for xs in (plain, spread))
    assert_close([full(x) for x in got], list(want))
    gradients = torch.autograd.grad(got.penalty, spread)
    assert_close([full(x) for x in gradients], list(torch.autograd.grad(want.penalty, plain)))

    mask = torch.empty_like(tensors[0]).bernoulli_(0.5) * 2
    masks = mask, distribute_tensor(mask, mesh(), [placement])
    (dropped, want), (spread_dropped, got) = (
        fused_dropout_ar_tar(xs[0], 0.5, 2.0, 1.0, mask=m, **options)
        for xs, m in zip((plain, spread), masks, strict=True)
    )
    assert_close([full(x) for x in (spread_dropped, *got)], [dropped, *want])
    (gradient,) = torch.autograd.grad(spread_dropped.sum() + got.penalty, spread[:1])
    assert_close(full(gradient), *torch.autograd.grad(dropped.sum() + want.penalty, plain[:1]))

    def call(x: Any) -> Any:
        return fused_ar_tar(x, x, 2.0, 1.0, batch_first=batch_first)

    want, got = call(plain[0]), torch.compile(call, fullgraph=True, backend="aot_eager")(spread[0])
    assert_close(full(got), want)
    assert_close(full(*torch.autograd.grad(got, spread[:1])), *torch.autograd.grad(want, plain[:1]))

    # A mask that is drawn is one mask, in whatever pieces.
    module = FusedRNNDropout(0.5, 2.0, 1.0, batch_first=batch_first)
    dropped, terms = full(module(spread[0])), module.take()
    assert terms is not None
    keep = (dropped != 0).movedim(1 if batch_first else 0, 0)
    assert_close(keep, keep[:1].expand_as(keep))
    assert_close(full(terms.penalty), fused_ar_tar(plain[0], dropped, 2.0, 1.0, batch_first=batch_first))


@pytest.mark.parametrize(
    ("placement", "batch_first"),
    [
        *[(Shard(0), True), (Shard(1), False)],
        *(pytest.param(*x, marks=more) for x in [(Shard(1), True), (Shard(2), True), (Replicate(), True)]),
        pytest.param(Shard(0), False, marks=more),
    ],
    ids=str,
)
def test_dtensors_have_the_mean_of_the_whole(placement: Any, batch_first: bool, in_both: Callable[..., None]) -> None:
    in_both(check_dtensors, placement, batch_first)


@pytest.mark.parametrize("device", [pytest.param("cuda:1", marks=gpu)])
@pytest.mark.gpus
def test_tensors_on_another_gpu_are_worked_on_there(device: str) -> None:
    raw, dropped, mask = torch.randn(3, 3, 7, 12, device=device).unbind()
    with torch.cuda.device(0):
        check_penalty(raw.requires_grad_(), dropped.requires_grad_(), 2.0, 1.0)
        check_dropout(raw, mask[:, :1], 2.0, 1.0)
        results = fused_ar_tar(raw, dropped, 2.0, 1.0), *fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0)
    assert all(x.device == raw.device for x in (*results, *torch.autograd.grad(results[0], (raw, dropped))))
