"""The encoding of the time steps that count, and its copy to a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastreg import fused_ar_tar
from fastreg.call.backends import backend_for
from fastreg.call.reference import encoded
from tests.call.test_padding import ALPHA, BETA, by_both, given, marks
from tests.conftest import skip_on_formula

pytestmark = pytest.mark.numbers


class Queue(TorchFunctionMode):
    """Stand in for a GPU: all tensors are pinned, and copies to a device are read only at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function is Tensor.is_pinned:
            return True
        options.pop("pin_memory", None)
        if function is Tensor.to and options.get("non_blocking"):
            self.waiting.append(args[0])
        return function(*args, **options)


@by_both
def test_a_refilled_pinned_buffer_leaves_a_queued_copy_alone_by_a_stand_in_for_a_gpu(steps: str) -> None:
    ((name, argument),) = given(steps).items()
    before, x = argument.tolist(), torch.empty(*marks(steps).shape, 8, device="meta")
    with Queue() as queue:
        fused_ar_tar(x, x, ALPHA, BETA, **{name: argument})
        argument.zero_()
    assert [x.tolist() for x in queue.waiting] == [before]


@pytest.mark.parametrize("given", ["lengths valid starts", "lengths", "valid", "starts", "valid starts"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 5), (3, 70), (911, 9), (2, 4099)], ids=str)
def test_backends_encode_as_the_formula_and_clamp_lengths(shape: tuple[int, int], given: str, device: str) -> None:
    skip_on_formula(device)
    backend: Any = backend_for(torch.device(device))
    lengths = torch.randint(-2, shape[1] + 3, shape[:1], device=device) if "lengths" in given else None
    if lengths is not None:
        lengths[-1] = 2**40
    valid = torch.rand(shape, device=device) < 0.7 if "valid" in given else None
    starts = torch.rand(shape, device=device) < 0.2 if "starts" in given else None
    got = backend.encoder(shape, torch.device(device))(lengths, valid, starts)
    want = encoded(shape, lengths, valid, starts)
    torch.testing.assert_close([*got], [*want], rtol=0, atol=0)
