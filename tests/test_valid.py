"""Valid steps, marked wherever they are, against a loop over the sequences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode

from fastreg import fused_ar_tar, fused_dropout_ar_tar
from fastreg.prepare import values_of
from fastreg.problem import ARTAR, Call, Problem
from tests.conftest import INTERPRETED, gpu, skip_on_formula
from tests.samples import BF16, DOUBLE, FLOAT, HALF
from tests.test_padding import ALPHA, BETA, LAYOUTS, assert_gradient, assert_terms, exact

MASKS: dict[str, list[str]] = {  # a row a sequence, x for each step that counts
    "padding on the left": ["..xxxxx", "xxxxxxx", "......x", "....xxx"],
    "padding on both sides": [".xx....", "....xx.", "xx.....", ".xxxxx."],
    "holes": ["xx.xx.x", "x.x.x.x", ".xx..xx", "x......"],
    "burn-in": [".....xxxxxxxxxxxx"] * 2,
    "nothing": ["....", "...."],
    "all": ["xxxxxxxxx"] * 3,
    "one step": ["x", ".", "x"],
    "one row": ["xx.xxx...x"],
    "several runs": ["x" * 19 + "." + "x" * 20, "." * 20 + "x" * 20, "xx." * 13 + "x"],  # a run has 20 steps
    "many": [f"{n * 2654435761 % 2**5:05b}".replace("0", ".").replace("1", "x") for n in range(20)],
}
# The interpreter takes seconds a case. Other masks run there as compiled code does, by tests.ptx.
by_mask = pytest.mark.parametrize("mask", ["holes", "several runs"] if INTERPRETED else MASKS)


def marks(mask: str, device: str = "cpu") -> Tensor:
    return torch.tensor([[c == "x" for c in row] for row in MASKS[mask]], device=device)


def truth(raw: Tensor, dropped: Tensor, valid: Tensor, reduction: str = "mean") -> ARTAR:
    """Of `(batch, time, hidden)` tensors, one step after the other."""
    squares, changes = torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    elements = pairs = 0
    for r, d, row in zip(raw.double(), dropped.double(), valid.tolist(), strict=True):
        for step, counts in enumerate(row):
            if counts:
                squares = squares + d[step].square().sum()
                elements += d.shape[1]
            if counts and step and row[step - 1]:
                changes = changes + (r[step] - r[step - 1]).square().sum()
                pairs += r.shape[1]
    if reduction == "mean":
        squares, changes = squares / max(elements, 1), changes / max(pairs, 1)
    return ARTAR(ALPHA * squares + BETA * changes, squares, changes)


def activations(valid: Tensor, hidden: int, *dtypes: torch.dtype) -> list[Tensor]:
    """`(batch, time, hidden)` tensors, with NaN and inf where steps do not count."""
    tensors = [torch.randn(*valid.shape, hidden, device=valid.device).to(dtype) for dtype in dtypes]
    nothing = torch.tensor([torch.nan, torch.inf, -torch.inf], device=valid.device).repeat(hidden)[:hidden]
    return [torch.where(valid.unsqueeze(-1), x, nothing.to(x.dtype)) for x in tensors]


@by_mask
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BF16, HALF), (DOUBLE, FLOAT)], ids=str)
def test_marked_steps(
    mask: str, layout: str, dtypes: tuple[torch.dtype, torch.dtype], device: str, poison: None
) -> None:
    if layout not in ("batch first", "time first") and dtypes != (FLOAT, FLOAT):
        pytest.skip("strides do not depend on the dtype")
    valid = marks(mask, device)
    raw, dropped = activations(valid, 12, *dtypes)
    batch_first, lay = LAYOUTS[layout]
    x, y = (lay(v if batch_first else v.transpose(0, 1)).requires_grad_() for v in (raw, dropped))
    got = fused_ar_tar(x, y, ALPHA, BETA, batch_first=batch_first, valid=valid, return_terms=True)
    wanted = exact(raw), exact(dropped)
    want = truth(*wanted, valid)
    widest = DOUBLE if DOUBLE in dtypes else FLOAT
    assert got.penalty.dtype == widest
    assert_terms(got, want, widest)
    for scale in (100, 100, 300):  # an upstream gradient that is expected, and others; small ones underflow in float16
        got = fused_ar_tar(x, y, ALPHA, BETA, batch_first=batch_first, valid=valid)
        gradients = torch.autograd.grad(got * scale, (x, y))
        if want.penalty.requires_grad:
            expected = torch.autograd.grad(want.penalty * scale, wanted, retain_graph=True, allow_unused=True)
        else:
            expected = None, None
        for gradient, exactly in zip(gradients, expected, strict=True):
            gradient = gradient if batch_first else gradient.transpose(0, 1)
            assert_gradient(gradient, torch.zeros_like(raw, dtype=DOUBLE) if exactly is None else exactly)
            assert (gradient[~valid] == 0).all()  # exactly


@by_mask
@pytest.mark.parametrize("ar_of_raw", [True, False])
@pytest.mark.parametrize("coefficients", [(ALPHA, BETA), (ALPHA, 0.0), (0.0, BETA)])
def test_terms_alone_and_sums(mask: str, ar_of_raw: bool, coefficients: tuple[float, float], device: str) -> None:
    valid = marks(mask, device)
    raw, dropped = (x.requires_grad_() for x in activations(valid, 20, FLOAT, FLOAT))
    dropped = raw if ar_of_raw else dropped
    got = fused_ar_tar(raw, dropped, *coefficients, valid=valid, reduction="sum", return_terms=True)
    wanted = exact(raw), exact(dropped)
    of = wanted[0] if ar_of_raw else wanted[1]
    want = truth(wanted[0], of, valid, "sum")
    penalty = coefficients[0] * want.ar + coefficients[1] * want.tar
    assert_terms(got, want._replace(penalty=penalty), FLOAT)
    inputs = [raw] if ar_of_raw else [raw, dropped]
    gradients = torch.autograd.grad(got.penalty, inputs, allow_unused=True)
    expected: Any = [None] * len(inputs)
    if penalty.requires_grad:
        expected = torch.autograd.grad(penalty, wanted[: len(inputs)], allow_unused=True)
    for gradient, exactly in zip(gradients, expected, strict=True):
        if gradient is not None:
            assert_gradient(gradient, torch.zeros_like(gradient, dtype=DOUBLE) if exactly is None else exactly)


@pytest.mark.parametrize("shape", [(4096, 2), (911, 9), (8193, 1)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_many_steps_are_counted(shape: tuple[int, int], fused: bool, device: str) -> None:
    """Up to 8192 steps are counted by each program of a launch, and more by a launch of their own."""
    valid = (torch.arange(shape[0] * shape[1], device=device) % 37 % 5 > 0).view(shape)
    x = torch.randn(*shape, 2, device=device, requires_grad=True)
    if fused:
        _, got = fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, mask=torch.ones_like(x), valid=valid, return_terms=True)
    else:
        got = fused_ar_tar(x, x, ALPHA, BETA, valid=valid, return_terms=True)
    wide = x.detach().double().requires_grad_()
    paired = valid[:, 1:] & valid[:, :-1]
    ar = wide[valid].square().sum() / (2 * valid.sum())
    tar = (wide[:, 1:] - wide[:, :-1])[paired].square().sum() / (2 * paired.sum()).clamp(min=1)
    assert_terms(got, ARTAR(ALPHA * ar + BETA * tar, ar, tar), FLOAT)
    (want,) = torch.autograd.grad(ALPHA * ar + BETA * tar, wide)
    (gradient,) = torch.autograd.grad(got.penalty, x)
    assert_gradient(gradient, want)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_steps_at_the_front_are_those_of_lengths_to_the_last_bit(
    dtype: torch.dtype, batch_first: bool, device: str
) -> None:
    skip_on_formula(device)
    lengths = torch.tensor([50, 0, 3, 17, 1, 33], device=device)
    valid = torch.arange(50, device=device) < lengths[:, None]
    raw, dropped = (torch.randn(6, 50, 24, device=device).to(dtype) for _ in range(2))
    x, y = ((v if batch_first else v.transpose(0, 1).contiguous()).requires_grad_() for v in (raw, dropped))
    results = []
    each: list[dict[str, Any]] = [{"lengths": lengths}, {"valid": valid}]
    for steps in each:
        got = fused_ar_tar(x, y, ALPHA, BETA, batch_first=batch_first, return_terms=True, **steps)
        kept, other = fused_dropout_ar_tar(
            x, 0.5, ALPHA, BETA, mask=(x > 0).to(dtype), batch_first=batch_first, **steps
        )
        results.append([*got, other, *torch.autograd.grad(got.penalty * 3, (x, y))])
        results[-1] += torch.autograd.grad([kept, other], x, [torch.ones_like(kept), torch.ones_like(other)])
    for with_lengths, with_marks in zip(*results, strict=True):
        assert torch.equal(with_lengths, with_marks)


@by_mask
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("full", [True, False], ids=["full mask", "locked mask"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, DOUBLE], ids=str)
def test_dropout(mask: str, full: bool, batch_first: bool, dtype: torch.dtype, device: str, poison: None) -> None:
    """An invalid step is dropped out like the others, and has the gradient of its dropped value alone."""
    valid = marks(mask, device)
    raw = torch.randn(*valid.shape, 12, device=device).to(dtype)
    kept = (torch.rand(len(raw), raw.shape[1] if full else 1, 12, device=device) > 0.5).to(dtype) * 2  # exact products
    x, keep = ((v if batch_first else v.transpose(0, 1).contiguous()) for v in (raw, kept))
    x.requires_grad_()
    dropped, got = fused_dropout_ar_tar(
        x, 0.5, ALPHA, BETA, mask=keep, batch_first=batch_first, valid=valid, return_terms=True
    )
    assert torch.equal(dropped, x * keep)
    wanted = exact(raw)
    product = wanted * kept.double()
    want = truth(wanted, product, valid)
    assert_terms(got, want, dtype)
    upstream = torch.randn_like(dropped)
    (gradient,) = torch.autograd.grad([dropped, got.penalty], x, [upstream, torch.ones_like(got.penalty)])
    outer = (upstream if batch_first else upstream.transpose(0, 1)).double()
    (expected,) = torch.autograd.grad(want.penalty + (outer * product).sum(), wanted)
    gradient = gradient if batch_first else gradient.transpose(0, 1)
    assert_gradient(gradient, expected)
    without = (outer * kept.double()).to(dtype)
    torch.testing.assert_close(gradient[~valid], without[~valid], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "lay", [lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, 1)[:, ::2]]
)
def test_any_integers_with_any_stride(kind: torch.dtype, lay: Callable[[Tensor], Tensor], device: str) -> None:
    valid = marks("holes", device)
    raw, dropped = activations(valid, 8, FLOAT, FLOAT)
    got = fused_ar_tar(raw, dropped, ALPHA, BETA, valid=lay(valid.to(kind)))
    assert torch.equal(got, fused_ar_tar(raw, dropped, ALPHA, BETA, valid=valid))


def test_one_sequence(device: str) -> None:
    valid = marks("one row", device)
    (raw,) = activations(valid, 8, FLOAT)
    want = fused_ar_tar(raw, raw, ALPHA, BETA, valid=valid)
    for given in (valid, valid[0]):
        assert torch.equal(fused_ar_tar(raw[0], raw[0], ALPHA, BETA, valid=given), want)


def test_layers(device: str) -> None:
    valid = marks("holes", device)
    layers = [activations(valid, hidden, FLOAT, FLOAT) for hidden in (8, 12)]
    raws, kept = ([x.requires_grad_() for x in xs] for xs in zip(*layers, strict=True))
    got = fused_ar_tar(raws, kept, ALPHA, BETA, valid=valid)
    want = sum(fused_ar_tar(r, d, ALPHA, BETA, valid=valid) for r, d in zip(raws, kept, strict=True))
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(p, raws + kept) for p in (got, want)), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y)


def test_a_packed_sequence_is_its_padded_form(device: str) -> None:
    """The time steps of each sequence in the middle of a batch, and packed."""
    x, lengths = torch.randn(3, 9, 8, device=device), [9, 4, 2]
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True)
    moved, valid = torch.full((3, 12, 8), torch.nan, device=device), torch.zeros(3, 12, dtype=torch.bool, device=device)
    for i, n in enumerate(lengths):
        moved[i, i + 1 : i + 1 + n], valid[i, i + 1 : i + 1 + n] = x[i, :n], True
    got = fused_ar_tar(moved, moved, ALPHA, BETA, valid=valid)
    torch.testing.assert_close(got, fused_ar_tar(packed, packed, ALPHA, BETA))


def test_more_sequences_and_steps_than_are_taken_at_once(device: str) -> None:
    valid = torch.rand(37, 701, device=device) < 0.7
    raw, dropped = (x.requires_grad_() for x in activations(valid, 3, FLOAT, FLOAT))
    got = fused_ar_tar(raw, dropped, ALPHA, BETA, valid=valid)
    wide = (torch.where(valid.unsqueeze(-1), x, 0).detach().double().requires_grad_() for x in (raw, dropped))
    x, y = wide
    both = (valid[:, 1:] & valid[:, :-1]).unsqueeze(-1)
    ar = y.square().sum() / (valid.sum() * 3)
    want = ALPHA * ar + BETA * (x.diff(dim=1) * both).square().sum() / (both.sum() * 3)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    for gradient, exactly in zip(
        torch.autograd.grad(got, (raw, dropped)), torch.autograd.grad(want, (x, y)), strict=True
    ):
        assert_gradient(gradient, exactly)


def test_a_gradient_of_inf_leaves_what_does_not_count_at_0(device: str) -> None:
    valid = marks("holes", device)
    raw, dropped = (x.requires_grad_() for x in activations(valid, 8, FLOAT, FLOAT))
    for upstream in (torch.inf, torch.nan):
        (fused_ar_tar(raw, dropped, ALPHA, BETA, valid=valid) * upstream).backward()
        for x in (raw, dropped):
            assert x.grad is not None
            assert (x.grad[~valid] == 0).all()
            assert not x.grad[valid].isfinite().all()
            x.grad = None


@pytest.mark.parametrize("dropout", [False, True])
def test_gradcheck(dropout: bool, device: str) -> None:
    valid = marks("padding on both sides", device)
    raw, other = (torch.randn(*valid.shape, 2, dtype=DOUBLE, device=device, requires_grad=True) for _ in range(2))
    mask = torch.randn_like(raw[:, :1])

    def call(x: Tensor, y: Tensor) -> Tensor:
        if not dropout:
            return fused_ar_tar(x, y, ALPHA, BETA, valid=valid)
        kept, penalty = fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, mask=mask, valid=valid)
        return penalty + (kept * y).sum()

    assert gradcheck(call, (raw, other))
    assert gradgradcheck(call, (raw, other))


def test_function_transforms(device: str) -> None:
    valid = marks("holes", device)
    raw = torch.randn(3, *valid.shape, 4, device=device)

    def call(x: Tensor, mask: Tensor) -> Tensor:
        return fused_ar_tar(x, x, ALPHA, BETA, valid=mask)

    got = torch.func.vmap(call, in_dims=(0, None))(raw, valid)
    torch.testing.assert_close(got, torch.stack([call(x, valid) for x in raw]))
    each = torch.stack([valid, ~valid, valid.flip(0)])
    got = torch.func.vmap(call)(raw, each)
    torch.testing.assert_close(got, torch.stack([call(x, v) for x, v in zip(raw, each, strict=True)]))


def test_marks_changed_before_the_backward_raise_or_do_not_matter(device: str) -> None:
    """A backward reads the marks that the forward read, or raises."""
    skip_on_formula(device)
    valid = marks("holes", device)
    raw = torch.randn(*valid.shape, 4, device=device, requires_grad=True)
    integers = valid.long()
    penalties = [fused_ar_tar(raw, raw, ALPHA, BETA, valid=given) for given in (valid.clone(), integers)]
    (want,) = torch.autograd.grad(penalties[0] * 5, raw)
    integers.zero_()
    assert torch.equal(torch.autograd.grad(penalties[1] * 5, raw)[0], want)
    penalty = fused_ar_tar(raw, raw, ALPHA, BETA, valid=valid)
    valid.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (penalty * 5).backward()


def test_marks_made_in_inference_mode(device: str) -> None:
    with torch.inference_mode():
        valid = marks("holes", device)
    raw = torch.randn(*valid.shape, 4, device=device, requires_grad=True)
    fused_ar_tar(raw, raw, ALPHA, BETA, valid=valid).backward()
    assert raw.grad is not None


RAW = torch.randn(3, 5, 4)
PACKED = pack_padded_sequence(RAW, torch.tensor([5, 2, 1]), batch_first=True)
VALID = torch.ones(3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("raw", "options", "error", "message"),
    [
        (RAW, {"valid": [[1]]}, TypeError, "valid: expected a bool or integer tensor, got list"),
        (
            RAW,
            {"valid": VALID.float()},
            TypeError,
            "valid: expected a bool or integer tensor, got one of torch.float32",
        ),
        (RAW, {"valid": VALID.t()}, ValueError, r"valid: expected shape \(3, 5\), batch and time steps, got \(5, 3\)"),
        (RAW, {"valid": VALID[0]}, ValueError, r"valid: expected shape \(3, 5\), batch and time steps, got \(5,\)"),
        (RAW, {"valid": VALID[..., None]}, ValueError, r"valid: expected shape \(3, 5\).*got \(3, 5, 1\)"),
        (
            RAW,
            {"valid": VALID, "batch_first": False},
            ValueError,
            r"valid: expected shape \(5, 3\), batch and time steps, in every layout, got \(3, 5\)",
        ),
        (RAW, {"valid": VALID * 2}, ValueError, "valid: expected 0 or 1, got 2"),
        (RAW, {"valid": -VALID.int()}, ValueError, "valid: expected 0 or 1, got -1"),
        (
            RAW,
            {"valid": VALID.to("meta")},
            ValueError,
            "valid: expected a tensor on cpu, or another device with memory",
        ),
        (RAW, {"valid": VALID.to_sparse()}, TypeError, r"valid: expected a dense \(strided\) tensor"),
        (
            RAW,
            {"valid": VALID, "lengths": torch.tensor([5, 5, 5])},
            ValueError,
            "lengths and valid: expected one of them, got both",
        ),
        (PACKED, {"valid": VALID}, ValueError, "valid: expected None, as a PackedSequence has lengths of its own"),
    ],
)
def test_bad_steps(raw: Tensor | PackedSequence, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_ar_tar(raw, raw, 2.0, 1.0, **options)
    if isinstance(raw, Tensor):
        with pytest.raises(error, match=message):
            fused_dropout_ar_tar(raw, 0.5, 2.0, 1.0, **options)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_no_sync_for_marks_on_the_device(device: str) -> None:
    valid = marks("holes", device)
    raw = torch.randn(*valid.shape, 4, device=device, requires_grad=True)
    fused_ar_tar(raw, raw, ALPHA, BETA, valid=valid).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_ar_tar(raw, raw, ALPHA, BETA, valid=valid.long()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Queue(TorchFunctionMode):
    """Stand in for a GPU: CPU tensors say that they are pinned, and copies to a device wait for `read()`."""

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

    def read(self) -> list[list[Any]]:
        return [x.tolist() for x in self.waiting]


@pytest.mark.parametrize("name", ["lengths", "valid"])
def test_a_refilled_pinned_buffer_leaves_a_queued_copy_alone_by_a_stand_in_for_a_gpu(name: str) -> None:
    given = torch.tensor([3, 1]) if name == "lengths" else marks("holes")[:2]
    before, shape = given.tolist(), (2, len(MASKS["holes"][0]), 8)
    x = torch.empty(shape, device="meta")
    call = Call(x, x, ALPHA, BETA, **{name: given})
    with Queue() as queue:
        values_of(call, Problem(ALPHA, BETA), x)
        given.zero_()
        assert queue.read() == [before]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the real kernels did not run")
@pytest.mark.parametrize("name", ["lengths", "valid"])
def test_a_refilled_pinned_buffer_leaves_a_queued_step_alone(name: str) -> None:
    x = torch.randn(4, 7, 8, device="cuda")
    given = (torch.tensor([7, 0, 3, 5]) if name == "lengths" else marks("holes")).pin_memory()
    want = fused_ar_tar(x, x, ALPHA, BETA, **{name: given.cuda()})
    torch.cuda._sleep(2**30)
    got = fused_ar_tar(x, x, ALPHA, BETA, **{name: given})
    given.zero_()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("byte", [2, 128, 255])
@pytest.mark.parametrize("by_start", [False, True], ids=["valid alone", "with starts"])
@pytest.mark.parametrize("fused", [False, True])
def test_any_byte_but_0_is_true(byte: int, by_start: bool, fused: bool, device: str) -> None:
    """A view of integers as bool, and memory from other libraries, have other bytes than 1."""
    valid, starts = torch.rand(2, 5, 41, device=device) < torch.tensor([0.7, 0.2], device=device).view(2, 1, 1)
    x = torch.randn(5, 41, 12, device=device, requires_grad=True)

    def call(*given: Tensor) -> list[Tensor]:
        options: dict[str, Any] = dict(zip(("valid", "starts"), given, strict=False))
        if fused:
            _, got = fused_dropout_ar_tar(x, 0.5, ALPHA, BETA, mask=torch.ones_like(x), return_terms=True, **options)
        else:
            got = fused_ar_tar(x, x, ALPHA, BETA, return_terms=True, **options)
        return [*got, *torch.autograd.grad(got.penalty, x)]

    masks = (valid, starts)[: 1 + by_start]
    others = [(mask.to(torch.uint8) * byte).view(torch.bool) for mask in masks]
    for got, want in zip(call(*others), call(*masks), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
