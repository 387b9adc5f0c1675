"""Padded and packed sequences, against a loop over the sequences in float64."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.backends import backend_for
from fastreg.kernels.view import Operand, Sums, Values, View
from fastreg.problem import ARTAR
from tests.conftest import INTERPRETED, skip_on_formula
from tests.samples import BF16, DOUBLE, FLOAT, HALF, contiguous, every_other, sliced, transposed

ALPHA, BETA = 2.0, 3.0
BATCHES = {  # lengths, and the time steps there are
    "some": ([5, 0, 9, 1, 2, 9], 9),
    "full": ([7, 7, 7], 7),
    "none": ([0, 0], 4),
    "one step": ([1, 0, 1], 1),
    "one row": ([3], 5),
    "several runs": ([70, 17, 20, 21, 40], 70),  # a run has 20 steps
    "many": ([n % 7 for n in range(70)], 6),
}
by_batch = pytest.mark.parametrize("batch", BATCHES)


def truth(raw: Tensor, dropped: Tensor, lengths: list[int], reduction: str = "mean") -> ARTAR:
    """Of `(batch, time, hidden)` tensors, one sequence after the other."""
    sequences = [(r[:n].double(), d[:n].double()) for r, d, n in zip(raw, dropped, lengths, strict=True)]
    squares = sum((d.square().sum() for _, d in sequences), torch.zeros(()))
    changes = sum((r.diff(dim=0).square().sum() for r, _ in sequences), torch.zeros(()))
    elements = sum(d.numel() for _, d in sequences)
    pairs = sum(max(len(r) - 1, 0) * r.shape[1] for r, _ in sequences)
    ar, tar = (squares / max(elements, 1), changes / max(pairs, 1)) if reduction == "mean" else (squares, changes)
    return ARTAR(ALPHA * ar + BETA * tar, ar, tar)


def padded(batch: str, hidden: int, *dtypes: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[int]]:
    """`(batch, time, hidden)` tensors, with NaN and inf behind each sequence."""
    lengths, time = BATCHES[batch]
    tensors = [torch.randn(len(lengths), time, hidden, device=device).to(dtype) for dtype in dtypes]
    for x in tensors:
        for i, n in enumerate(lengths):
            x[i, n:] = torch.nan
            x[i, n + 1 :] = torch.inf
    return tensors, lengths


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def assert_terms(got: ARTAR, want: ARTAR, dtype: torch.dtype) -> None:
    unit = torch.finfo(torch.promote_types(dtype, FLOAT)).eps
    for name, x, y in zip(ARTAR._fields, got, want, strict=True):
        torch.testing.assert_close(x.double().cpu(), y.cpu(), rtol=8 * unit, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_gradient(got: Tensor | None, want: Tensor | None, lengths: list[int] | None = None) -> None:
    assert got is not None
    assert want is not None
    unit = torch.finfo(got.dtype).eps * (2 if INTERPRETED and got.dtype == BF16 else 1)
    # Where the parts of a gradient cancel, the rest has the rounding error of the parts.
    part = 8 * torch.finfo(torch.promote_types(got.dtype, FLOAT)).eps * want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=2 * unit, atol=part)
    for x, n in zip(got, lengths or [], strict=False):
        assert (x[n:] == 0).all()  # exactly


LAYOUTS: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "batch first": (True, contiguous),
    "time first": (False, contiguous),
    "transposed": (True, transposed),
    "sliced": (True, sliced),
    "copied": (False, every_other),
}


@by_batch
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BF16, HALF), (DOUBLE, FLOAT)], ids=str)
def test_lengths(batch: str, layout: str, dtypes: tuple[torch.dtype, torch.dtype], device: str, poison: None) -> None:
    if layout not in ("batch first", "time first") and dtypes != (FLOAT, FLOAT):
        pytest.skip("strides do not depend on the dtype")
    (raw, dropped), lengths = padded(batch, 12, *dtypes, device=device)
    batch_first, lay = LAYOUTS[layout]
    x, y = (lay(v if batch_first else v.transpose(0, 1)).requires_grad_() for v in (raw, dropped))
    got = fused_ar_tar(
        x, y, ALPHA, BETA, batch_first=batch_first, lengths=torch.tensor(lengths, device=device), return_terms=True
    )
    wanted = exact(raw), exact(dropped)
    want = truth(*wanted, lengths)
    widest = DOUBLE if DOUBLE in dtypes else FLOAT
    assert got.penalty.dtype == widest
    assert_terms(got, want, widest)
    (got.penalty * 100).backward()
    (want.penalty * 100).backward()
    for leaf, expected in zip((x, y), wanted, strict=True):
        grad = leaf.grad if batch_first or leaf.grad is None else leaf.grad.transpose(0, 1)
        assert_gradient(grad, expected.grad.nan_to_num(0, 0, 0), lengths)  # pyright: ignore[reportOptionalMemberAccess]


def test_one_row_of_memory_for_all(device: str) -> None:
    row, lengths = torch.randn(1, 1, 12, device=device), torch.tensor([7, 0, 2])
    got, want = (fused_ar_tar(x, x, ALPHA, BETA, lengths=lengths) for x in (row.expand(3, 7, 12), row.repeat(3, 7, 1)))
    torch.testing.assert_close(got, want)


@by_batch
def test_raw_is_dropped(batch: str, device: str, poison: None) -> None:
    (raw,), lengths = padded(batch, 12, FLOAT, device=device)
    raw.requires_grad_()
    got = fused_ar_tar(raw, raw, ALPHA, BETA, lengths=torch.tensor(lengths), return_terms=True)
    wanted = exact(raw)
    want = truth(wanted, wanted, lengths)
    assert_terms(got, want, FLOAT)
    got.penalty.backward()
    want.penalty.backward()
    assert_gradient(raw.grad, wanted.grad.nan_to_num(0, 0, 0), lengths)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_integers_with_any_stride(kind: torch.dtype, device: str) -> None:
    (raw, dropped), lengths = torch.randn(2, 6, 9, 12, device=device), BATCHES["some"][0]
    table = torch.tensor([[1, n] for n in lengths], dtype=kind, device=device)
    for given, want in ((table[:, 1], lengths), (table[:1, 0].expand(len(lengths)), [1] * len(lengths))):
        got = fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=given, return_terms=True)
        assert_terms(got, truth(raw, dropped, want), FLOAT)


def test_more_sequences_than_are_added_at_once(device: str) -> None:
    raw, dropped = (torch.randn(1100, 3, 1, device=device) for _ in range(2))
    lengths = [n % 4 for n in range(1100)]
    got = fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=torch.tensor(lengths), return_terms=True)
    assert_terms(got, truth(raw, dropped, lengths), FLOAT)


def test_one_sequence_and_sums_and_layers(device: str) -> None:
    (raw, dropped), lengths = padded("one row", 12, FLOAT, FLOAT, device=device)
    want = truth(raw, dropped, lengths, "sum")
    options: Any = {"lengths": torch.tensor(lengths), "reduction": "sum", "return_terms": True}
    assert_terms(fused_ar_tar(raw[0], dropped[0], ALPHA, BETA, **options), want, FLOAT)
    twice = fused_ar_tar([raw, raw], [dropped, dropped], ALPHA, BETA, **options)
    assert_terms(twice, ARTAR(*(2 * x for x in want)), FLOAT)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.0), (0.0, 3.0)])
def test_one_term(alpha: float, beta: float, device: str) -> None:
    (raw, dropped), lengths = padded("some", 12, FLOAT, FLOAT, device=device)
    for x in (raw, dropped):
        x.requires_grad_()
    used = raw if beta else None, dropped if alpha else None
    got = fused_ar_tar(*used, alpha, beta, lengths=torch.tensor(lengths))
    wanted = exact(raw), exact(dropped)
    terms = truth(*wanted, lengths)
    want = alpha * terms.ar + beta * terms.tar
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    got.backward()
    want.backward()
    one = 0 if beta else 1
    assert_gradient((raw, dropped)[one].grad, wanted[one].grad.nan_to_num(0, 0, 0), lengths)  # pyright: ignore[reportOptionalMemberAccess]


def test_a_gradient_of_inf_leaves_padding_at_0(device: str) -> None:
    (raw, dropped), lengths = padded("some", 12, FLOAT, FLOAT, device=device)
    for x in (raw, dropped):
        x.requires_grad_()
    alone = raw.detach().nan_to_num(7.0, 7.0).requires_grad_()
    counts, mask = torch.tensor(lengths), torch.full((len(lengths), 1, 12), 2.0, device=device)
    (fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=counts) * torch.inf).backward()
    (fused_dropout_ar_tar(alone, 0.5, ALPHA, BETA, mask=mask, lengths=counts)[1] * torch.inf).backward()
    for x in (raw, dropped, alone):
        assert x.grad is not None
        assert not x.grad[0, 0].isfinite().any()
        for grad, n in zip(x.grad, lengths, strict=True):
            assert (grad[n:] == 0).all()


def test_a_gradient_past_float32_is_inf(device: str) -> None:
    (raw,), lengths = padded("full", 12, FLOAT, device=device)
    for options in ({}, {"lengths": torch.tensor(lengths)}):
        x = raw.clone().requires_grad_()
        (fused_ar_tar(x, x, ALPHA, BETA, reduction="sum", **options) * 3e38).backward()
        assert x.grad is not None
        assert not x.grad.isfinite().any()


def test_lengths_changed_before_the_backward_raise(device: str) -> None:
    skip_on_formula(device)
    (raw,), lengths = padded("some", 12, FLOAT, device=device)
    counts = torch.tensor(lengths, device=device)
    got = fused_ar_tar(raw.requires_grad_(), raw, ALPHA, BETA, lengths=counts)
    counts[0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got.backward()


def test_a_gradient_of_inf_leaves_padding_at_0_in_a_graph(device: str) -> None:
    raw, dropped = (torch.randn(3, 7, 12, device=device, requires_grad=True) for _ in range(2))
    got = fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=torch.tensor([7, 0, 2])) * torch.inf
    for x in torch.autograd.grad(got, (raw, dropped), create_graph=True):
        assert not x[0, 0].isfinite().any()
        assert not x[1].any()
        assert not x[2, 2:].any()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_large_upstream_gradients_are_divided_first(dropout: bool, create_graph: bool, device: str) -> None:
    """1e38 times `2 * alpha` is more than float32 holds; over the count of elements it is not."""
    x = torch.full((2, 5, 8), 1e-30, device=device, requires_grad=True)
    grad = torch.tensor(1e38, device=device)
    gradients = []
    for lengths in (None, torch.tensor([5, 5])):
        if dropout:
            _, penalty = fused_dropout_ar_tar(x, 0.5, 40.0, 40.0, mask=torch.ones_like(x[:, :1]), lengths=lengths)
        else:
            penalty = fused_ar_tar(x, x, 40.0, 40.0, lengths=lengths)
        gradients += torch.autograd.grad(penalty, x, grad, create_graph=create_graph)
    torch.testing.assert_close(gradients[0], torch.full_like(x, 1e38 * (1e-30 * (80 / 80))))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_batch_sizes_that_change_in_shared_memory(device: str) -> None:
    """NumPy's writes raise no version: the checked values count."""
    numpy = pytest.importorskip("numpy")
    sizes = numpy.array([3, 2, 1])
    rows = torch.randn(6, 4, device=device, requires_grad=True)
    packed = PackedSequence(rows, torch.from_numpy(sizes))
    (want,) = torch.autograd.grad(fused_ar_tar(packed, None, 0.0, 1.0), rows, torch.tensor(5.0, device=device))
    torch.autograd.grad(fused_ar_tar(packed, None, 0.0, 1.0), rows, torch.tensor(7.0, device=device))
    got = fused_ar_tar(packed, None, 0.0, 1.0)  # expects 7, so that the backward reads the sizes
    sizes[:] = 10**8
    (gradient,) = torch.autograd.grad(got, rows, torch.tensor(5.0, device=device))
    assert torch.equal(gradient, want)


def test_lengths_made_in_inference_mode(device: str) -> None:
    with torch.inference_mode():
        lengths = torch.tensor([3, 1], device=device)
    x = torch.randn(2, 4, 3, device=device, requires_grad=True)
    got, want = (fused_ar_tar(x, x, ALPHA, BETA, lengths=n) for n in (lengths, torch.tensor([3, 1])))
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x), rtol=0, atol=0)


@pytest.mark.parametrize("padded", [True, False])
def test_an_infinite_mask_is_no_part_of_tar(padded: bool, device: str) -> None:
    raw = torch.randn(2, 4, 3, device=device, requires_grad=True)
    options: Any = {"lengths": torch.tensor([3, 1])} if padded else {}
    mask = torch.full((2, 1, 3), torch.inf, device=device)
    _, got = fused_dropout_ar_tar(raw, 0.5, 0, BETA, mask=mask, **options)
    (want,) = torch.autograd.grad(fused_ar_tar(raw, None, 0, BETA, **options), raw)
    torch.testing.assert_close(*torch.autograd.grad(got, raw), want)


# -- packed -----------------------------------------------------------------------------------------------------------


def pack(x: Tensor, lengths: list[int], sort: bool) -> PackedSequence:
    order = sorted(lengths, reverse=True) if sort else lengths
    rows = (
        torch.tensor(sorted(range(len(lengths)), key=lambda i: -lengths[i]), device=x.device) if sort else slice(None)
    )
    return pack_padded_sequence(x[rows], torch.tensor(order), batch_first=True, enforce_sorted=sort)


PACKABLE = [name for name, (lengths, _) in BATCHES.items() if min(lengths) > 0]


@pytest.mark.parametrize("batch", PACKABLE)
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BF16, HALF), (DOUBLE, FLOAT)], ids=str)
@pytest.mark.parametrize("same", [False, True], ids=["two", "same"])
def test_packed(
    batch: str, sort: bool, dtypes: tuple[torch.dtype, torch.dtype], same: bool, device: str, poison: None
) -> None:
    (raw, dropped), lengths = padded(batch, 12, *dtypes, device=device)
    wanted = exact(raw), exact(dropped)
    want = truth(wanted[0], wanted[0 if same else 1], lengths)
    leaves = raw.requires_grad_(), dropped.requires_grad_()
    x, y = (pack(v, lengths, sort) for v in leaves)
    got = fused_ar_tar(x, x if same else y, ALPHA, BETA, return_terms=True)
    widest = DOUBLE if DOUBLE in (dtypes[:1] if same else dtypes) else FLOAT
    assert_terms(got, want, widest)
    (got.penalty * 100).backward()
    (want.penalty * 100).backward()
    for leaf, expected in list(zip(leaves, wanted, strict=True))[: 1 if same else 2]:
        assert_gradient(leaf.grad, expected.grad.nan_to_num(0, 0, 0), lengths)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("lay", [sliced, every_other], ids=lambda f: f.__name__)
def test_packed_rows_with_strides(lay: Callable[[Tensor], Tensor], device: str, poison: None) -> None:
    (raw, dropped), lengths = padded("several runs", 12, FLOAT, FLOAT, device=device)
    packed = pack(raw, lengths, False), pack(dropped, lengths, False)
    rows = [lay(x.data).requires_grad_() for x in packed]
    got = fused_ar_tar(*(x._replace(data=d) for x, d in zip(packed, rows, strict=True)), ALPHA, BETA, return_terms=True)
    assert_terms(got, truth(raw, dropped, lengths), FLOAT)
    got.penalty.backward()
    plain = [x.data.clone().requires_grad_() for x in packed]
    fused_ar_tar(*(x._replace(data=d) for x, d in zip(packed, plain, strict=True)), ALPHA, BETA).backward()
    for x, y in zip(rows, plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_packed_with_few_bits(kind: torch.dtype, device: str) -> None:
    (raw,) = (torch.randn(40, 4, 900, device=device, requires_grad=True),)
    packed = pack(raw, [4] * 20 + [3] * 20, True)
    few = packed._replace(batch_sizes=packed.batch_sizes.to(kind))
    results = [fused_ar_tar(x, x, ALPHA, BETA) for x in (few, packed)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(x, raw, retain_graph=True)[0] for x in results))


def test_packed_sums_and_layers(device: str) -> None:
    (raw, dropped), lengths = padded("one row", 12, FLOAT, FLOAT, device=device)
    x, y = (pack(v, lengths, True) for v in (raw, dropped))
    want = truth(raw, dropped, lengths, "sum")
    got = fused_ar_tar([x, x], [y, y], ALPHA, BETA, reduction="sum", return_terms=True)
    assert_terms(got, ARTAR(*(2 * v for v in want)), FLOAT)
    for off in (fused_ar_tar(x, y, 0.0, 0.0), fused_ar_tar([x._replace(data=x.data.double())], None, 0.0, 0.0)):
        assert off == 0
        assert off.device == raw.device
    assert off.dtype == DOUBLE


def test_the_packed_output_of_an_lstm(device: str) -> None:
    lstm = torch.nn.LSTM(5, 8, batch_first=True).to(device)
    lengths = torch.tensor([4, 7, 2])
    x = torch.randn(3, 7, 5, device=device)
    packed, _ = lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    unpacked = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]
    by_rows = torch.autograd.grad(fused_ar_tar(packed, packed, ALPHA, BETA), list(lstm.parameters()), retain_graph=True)
    by_lengths = torch.autograd.grad(
        fused_ar_tar(unpacked, unpacked, ALPHA, BETA, lengths=lengths), list(lstm.parameters())
    )
    torch.testing.assert_close(by_rows, by_lengths)


# -- derivatives, transforms, compilation -----------------------------------------------------------------------------


def calls(device: str, dtype: torch.dtype = DOUBLE) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Of each kind of batch a function and its inputs."""
    lengths = torch.tensor([3, 0, 4, 1], device=device)
    raw, dropped = (torch.randn(4, 4, 3, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    sizes = torch.tensor([3, 3, 2, 1])
    rows = tuple(torch.randn(9, 3, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    mask = (torch.rand(4, 1, 3, device=device) > 0.5).to(dtype) * 2

    def packed(x: Tensor, y: Tensor) -> Tensor:
        return fused_ar_tar(PackedSequence(x, sizes), PackedSequence(y, sizes), ALPHA, BETA)

    def dropout(x: Tensor) -> Tensor:
        out, got = fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, mask=mask, lengths=lengths)
        return out.sin().sum() + got

    def same(x: Tensor) -> Tensor:
        return fused_ar_tar(x, x, ALPHA, BETA, lengths=lengths)

    return {
        "lengths": (functools.partial(fused_ar_tar, alpha=ALPHA, beta=BETA, lengths=lengths), (raw, dropped)),
        "same": (same, (raw,)),
        "packed": (packed, rows),
        "dropout": (dropout, (raw,)),
    }


KINDS = ["lengths", "same", "packed", "dropout"]
by_kind = pytest.mark.parametrize("kind", KINDS)


@by_kind
def test_gradcheck(kind: str, device: str) -> None:
    call, inputs = calls(device)[kind]
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@by_kind
def test_the_gradient_is_the_same_with_a_graph(kind: str, device: str) -> None:
    call, inputs = calls(device)[kind]
    got = torch.autograd.grad(call(*inputs), inputs, create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(call(*inputs), inputs))


@by_kind
def test_function_transforms(kind: str, device: str) -> None:
    call, inputs = calls(device)[kind]
    want = torch.autograd.grad(call(*inputs), inputs)
    numbers = tuple(range(len(inputs)))
    torch.testing.assert_close(torch.func.grad(call, numbers)(*inputs), want)
    twice = torch.func.vmap(torch.func.grad(call, numbers))(*(torch.stack([x, x]) for x in inputs))
    torch.testing.assert_close(twice, tuple(torch.stack([g, g]) for g in want))


@by_kind
def test_compiles_to_one_graph(kind: str, device: str) -> None:
    call, inputs = calls(device, FLOAT)[kind]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), call(*inputs))
    got = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(call(*inputs), inputs))


@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
def test_compiled_code_takes_a_packed_sequence(sort: bool, device: str) -> None:
    (raw,), lengths = padded("several runs", 12, FLOAT, device=device)
    packed = pack(raw, lengths, sort)
    call = torch.compile(lambda x: fused_ar_tar(x, x, ALPHA, BETA), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(packed), fused_ar_tar(packed, packed, ALPHA, BETA))


def test_compiled_code_for_a_gpu_takes_lengths_on_the_cpu() -> None:
    """Fake tensors need no GPU, and dynamo cannot trace a question to the driver."""
    call = torch.compile(fused_ar_tar, fullgraph=True, backend="eager")
    with FakeTensorMode():
        x = torch.empty(3, 4, 8, device="cuda")
        assert call(x, x, ALPHA, BETA, lengths=torch.tensor([4, 2, 3])).device.type == "cuda"


def test_compiled_code_clamps_lengths(device: str) -> None:
    """It cannot look at them."""
    call = torch.compile(fused_ar_tar, fullgraph=True, backend="aot_eager")
    (raw, dropped), lengths = padded("some", 12, FLOAT, FLOAT, device=device)
    given = torch.tensor([n if 0 < n < 9 else -3 if n == 0 else 2**40 for n in lengths], device=device)
    got = call(raw, dropped, ALPHA, BETA, lengths=given, return_terms=True)
    assert_terms(got, truth(raw, dropped, lengths), FLOAT)


# -- dropout ----------------------------------------------------------------------------------------------------------


@by_batch
@pytest.mark.parametrize(
    ("dtype", "full", "batch_first"),
    [(FLOAT, False, True), (FLOAT, True, True), (FLOAT, False, False), (HALF, False, True), (DOUBLE, True, False)],
    ids=str,
)
def test_dropout(batch: str, dtype: torch.dtype, full: bool, batch_first: bool, device: str, poison: None) -> None:
    if dtype in (HALF, BF16):
        skip_on_formula(device)
    (raw,), lengths = padded(batch, 12, dtype, device=device)
    raw = raw.nan_to_num(7.0, 7.0)  # whatever is dropped is dropped everywhere
    mask = (torch.rand(len(raw), raw.shape[1] if full else 1, 12, device=device) > 0.5).to(dtype) * 2
    x, keep = (v if batch_first else v.transpose(0, 1).contiguous() for v in (raw, mask))
    x.requires_grad_()
    options: Any = {"lengths": torch.tensor(lengths), "mask": keep, "batch_first": batch_first}
    dropped, got = fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, return_terms=True, **options)
    torch.testing.assert_close(dropped, x * keep)
    wanted = exact(raw)
    product = wanted * mask.double()
    want = truth(wanted, product, lengths)
    assert_terms(got, want, dtype)
    direction = torch.randn_like(raw)
    ((dropped * (direction if batch_first else direction.transpose(0, 1))).sum() + 10 * got.penalty).backward()
    ((product * direction.double()).sum() + 10 * want.penalty).backward()
    assert x.grad is not None
    assert_gradient(x.grad if batch_first else x.grad.transpose(0, 1), wanted.grad)
    (only,) = torch.autograd.grad(fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, **options)[1], x)
    for grad, n in zip(only if batch_first else only.transpose(0, 1), lengths, strict=True):
        assert (grad[n:] == 0).all()


@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT], ids=str)
def test_a_mask_that_is_part_of_another(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 7, 12, device=device).to(dtype).requires_grad_()
    masks = (torch.rand(3, 4, 12, device=device) > 0.5).to(dtype) * 2
    gradients = []
    for mask in (masks[:, 2:3], masks[:, 2:3].contiguous()):
        results = fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, mask=mask, lengths=torch.tensor([7, 3, 5]))
        gradients += torch.autograd.grad(results, x, [torch.ones_like(y) for y in results])
    assert torch.equal(*gradients)


def test_dropout_off(device: str) -> None:
    (raw,), lengths = padded("some", 12, FLOAT, device=device)
    dropped, got = fused_dropout_ar_tar(
        raw, 0.5, ALPHA, BETA, training=False, lengths=torch.tensor(lengths), return_terms=True
    )
    assert dropped is raw
    assert_terms(got, truth(raw, raw, lengths), FLOAT)


# -- on the device ----------------------------------------------------------------------------------------------------


def test_lengths_that_cannot_be_looked_at_are_clamped(device: str) -> None:
    skip_on_formula(device)
    (raw, dropped), lengths = padded("some", 12, FLOAT, FLOAT, device=device)
    given = torch.tensor([n if 0 < n < 9 else -3 if n == 0 else 2**40 for n in lengths], device=device)
    view = View(6, 9, 12, (*(Operand(FLOAT, 9 * 12, 12),) * 2, None, None))
    sums = Sums(FLOAT, ALPHA, BETA, ar=True, tar=True, ar_of_raw=False, divisors=None)
    backend = backend_for(raw.device)
    assert backend is not None
    got = backend.penalty_forward(view, sums, raw.device)((raw, dropped, None, None), Values(given))
    assert_terms(ARTAR(got.penalty, *got.terms), truth(raw, dropped, lengths), FLOAT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the real kernels did not run")
def test_a_graph_reads_lengths_on_the_device() -> None:
    (raw, dropped), lengths = padded("some", 12, FLOAT, FLOAT, device="cuda")
    counts, other = torch.tensor(lengths, device="cuda"), [9, 9, 1, 2, 3, 4]
    raw, dropped = (x.nan_to_num(7.0, 7.0) for x in (raw, dropped))
    fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=counts, return_terms=True)
        with pytest.raises(RuntimeError, match="lengths: expected them on the GPU"):
            fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=torch.tensor(other))
    for now in (lengths, other):
        counts.copy_(torch.tensor(now))
        graph.replay()
        assert_terms(got, truth(raw, dropped, now), FLOAT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the real kernels did not run")
def test_no_sync_for_lengths_on_the_device() -> None:
    (raw, dropped), lengths = padded("some", 12, FLOAT, FLOAT, device="cuda")
    counts = torch.tensor(lengths, device="cuda")
    raw.requires_grad_()
    fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=counts).backward()
    try:
        with warnings.catch_warnings():  # it warns once, when the mode is set already
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=counts).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
