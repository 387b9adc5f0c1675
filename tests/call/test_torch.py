"""Derivatives of any order, and PyTorch's compilers, transforms, autocast, subclasses, checkpoints and modes."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from fastreg import RNNRegularizer, fused_ar_tar, fused_dropout_ar_tar
from tests.calls import CALLS, Call, calls, everything, flat, from_seed, leaves, packed, total
from tests.conftest import BF16, DOUBLE, more, skip_without

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("dynamo")]
DRAWN = ("drawn", "module")  # a wrapper draws a mask for each of its tensors, and vmap in its own way
by_few = calls("pair", "mask")


def check(call: Call, plain: Call, time: int = 5, batch: int = 3, **tolerance: float) -> None:
    """Check the results and the gradients of a call against the plain one."""
    got, want = (everything(f, leaves(time, batch=batch)) for f in (call, plain))
    assert_close(got, want, **tolerance)


def others(raw: Tensor, dropped: Tensor) -> list[Any]:
    """Make several calls in one graph."""
    return [CALLS[name](raw, dropped) for name in ("same", "layers", "channels", "module")]


NAMES = ("pair", "drawn", "lengths", "drawn_lengths", "marks_time_first")
COMPILED: dict[str, Call] = {**{name: CALLS[name] for name in NAMES}, "others": others}


def in_autocast(raw: Tensor, dropped: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        raw = torch.nn.functional.linear(raw, torch.eye(8))
        return fused_dropout_ar_tar(raw, 0.4, 2.0, 1.0), fused_ar_tar(raw, dropped, 2.0, 1.0)


REG = RNNRegularizer(2.0, 1.0)


def by_a_regularizer(raw: Tensor, dropped: Tensor, reg: RNNRegularizer = REG) -> list[Any]:
    loss = reg.on_backward_begin(reg.on_loss_begin((raw.mean(), [raw * dropped, raw], [dropped, dropped])))
    return [loss, reg.ar, reg.tar]


def in_a_checkpoint(raw: Tensor, dropped: Tensor) -> Any:
    return checkpoint(lambda x, y: total(CALLS["mask"](x.tanh(), y.tanh())), raw, dropped, use_reentrant=False)


def under_vmap(raw: Tensor, dropped: Tensor) -> Any:
    return torch.func.vmap(CALLS["mask"])(torch.stack([raw, dropped]), torch.stack([dropped, raw]))


TIMES = [(3, time) for time in (70, 16, 2, 101)]
SIZES = [(3, 7), (5, 9), (2, 40), (30, 2), (4, 4)]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a compiler")


class TestCompile:
    @pytest.mark.parametrize(
        ("name", "backend", "shapes", "count"),
        [
            *[(name, "aot_eager", [*TIMES, (3, 1)], 4) for name in ("pair", "drawn")],
            ("lengths", "aot_eager", TIMES, 2),
            pytest.param("others", "aot_eager", TIMES, 3, marks=more),
            *[pytest.param(name, "aot_eager", SIZES, 2, marks=more) for name in ("drawn_lengths", "marks_time_first")],
            pytest.param("drawn", "inductor", TIMES[::3], 2, marks=[needs_compiler, more]),
        ],
        ids=str,
    )
    def test_all_sizes_take_few_compilations(
        self, name: str, backend: str, shapes: list[tuple[int, int]], count: int
    ) -> None:
        """All sizes take two; a single step takes one more, and so do two steps if all steps count."""
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(COMPILED[name], fullgraph=True, backend=counter)
        for batch, time in shapes:
            with torch._inductor.config.patch(fallback_random=True):  # otherwise it draws by another generator
                check(compiled, COMPILED[name], time, batch)
        assert counter.frame_count == count

    def test_its_graph_has_the_operators_of_the_formula_by_hand(self) -> None:
        def by_hand(raw: Tensor, dropped: Tensor) -> Tensor:
            return 2.0 * dropped.square().mean() + 1.0 * (raw[:, 1:] - raw[:, :-1]).square().mean()

        def operators(call: Call) -> Counter[Any]:
            traced = make_fx(lambda r, d: torch.autograd.grad(call(r, d), (r, d)), tracing_mode="fake")(*leaves())
            traced.graph.eliminate_dead_code()
            nodes = [node for node in traced.graph.nodes if node.op == "call_function"]
            return Counter(node.target for node in nodes if node.meta["val"].dim())

        found, wanted = operators(CALLS["pair"]), operators(by_hand)
        assert found <= wanted
        assert found[torch.ops.aten.sub.Tensor] == wanted[torch.ops.aten.sub.Tensor] > 0  # also the graph is not empty

    @pytest.mark.main
    def test_it_has_fewer_than_300_guards(self) -> None:
        """Each call of compiled code checks all guards, which takes longer than the formula's code on small tensors."""

        def call(raw: Tensor, dropped: Tensor) -> Tensor:
            return fused_ar_tar(raw, dropped, 2.0, 1.0)

        torch.compile(call, fullgraph=True, backend="eager")(*leaves())
        (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(call.__code__)
        assert 100 < str(entry.guard_manager).count("+- ") < 300

    @pytest.mark.parametrize("step", [in_autocast, by_a_regularizer, in_a_checkpoint, under_vmap])
    def test_a_step_compiles_to_one_graph(self, step: Call) -> None:
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if step is in_autocast else {}
        check(torch.compile(step, fullgraph=True, backend="aot_eager"), step, **tolerance)

    @pytest.mark.parametrize("name", COMPILED)
    def test_an_exported_program_takes_other_lengths(self, name: str) -> None:
        class Module(nn.Module):
            def forward(self, raw: Tensor, dropped: Tensor) -> Any:
                return COMPILED[name](raw, dropped)

        time, strict = {1: Dim("time", min=2, max=512)}, name in ("lengths", "drawn_lengths")
        program = export(Module(), tuple(leaves()), dynamic_shapes={"raw": time, "dropped": time}, strict=strict)
        for count in (2, 5, 70):
            check(program.module(), COMPILED[name], count)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of sizes
    @by_few
    def test_a_trace_runs_for_other_lengths(self, call: Call) -> None:
        traced: Any = torch.jit.trace(lambda *xs: call(*xs), tuple(leaves()))
        for time in (9, 1):
            check(traced, call, time)
        assert_close(total(traced(*leaves(0))), total(call(*leaves(0))))

    def test_coefficients_may_change(self) -> None:
        skip_without("numpy")
        import numpy

        compiled, x = torch.compile(lambda x, *c: fused_ar_tar(x, x, *c), backend="eager"), leaves()[0].detach()
        for alpha, beta in ((2.0, 1.0), (3.0, 2.0), (0.0, numpy.float64(1)), (numpy.int64(2), 1.0)):
            assert_close(compiled(x, alpha, beta), fused_ar_tar(x, x, float(alpha), float(beta)))

    def test_one_graph_takes_all_values_of_coefficients_in_tensors(self) -> None:
        def call(alpha: Tensor, beta: Tensor, r: Tensor, d: Tensor) -> Any:
            return CALLS["mask"](r, d, alpha, beta), CALLS["layers"](r, d, alpha, beta)

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=counter)
        alpha, beta = torch.ones(2).unbind()
        for value in (2.0, 0.5, 0.0):
            alpha.fill_(value)
            check(functools.partial(compiled, alpha, beta), functools.partial(call, alpha, beta))
        assert counter.frame_count == 1

    def test_lengths_on_the_cpu_are_traced_for_a_gpu(self) -> None:
        """Fake tensors need no GPU. Dynamo cannot trace a call of the driver."""
        call = torch.compile(fused_ar_tar, fullgraph=True, backend="eager")
        with FakeTensorMode():
            x = torch.empty(3, 4, 8, device="cuda")
            assert call(x, x, 2.0, 1.0, lengths=torch.tensor([4, 2, 3])).device.type == "cuda"

    def test_lengths_are_clamped_and_packed_rows_read(self) -> None:
        """Compiled code cannot check the values of lengths."""
        call: Any = torch.compile(fused_ar_tar, fullgraph=True, backend="aot_eager")
        r, d = leaves()
        got = call(r, d, 2.0, 1.0, lengths=torch.tensor([2**40, -3, 2]), return_terms=True)
        assert_close(got, fused_ar_tar(r, d, 2.0, 1.0, lengths=torch.tensor([5, 0, 2]), return_terms=True))
        packed = pack_padded_sequence(r.detach(), [3, 5, 4], True, enforce_sorted=False)
        assert_close(call(packed, packed, 2.0, 1.0), fused_ar_tar(packed, packed, 2.0, 1.0))


@calls(but=DRAWN)
def test_a_wrapper_computes_on_its_tensor(call: Call) -> None:
    halves = [leaves(), leaves(6)]
    halves[1] = [x.detach()[:, :5].contiguous().requires_grad_() for x in halves[1]]
    wrapped = [TwoTensor(*(x.detach() for x in pair)).requires_grad_() for pair in zip(*halves, strict=True)]
    got = everything(call, wrapped)
    assert all(type(x) is TwoTensor for x in got)
    for part, xs in zip("ab", halves, strict=True):
        assert_close([getattr(x, part) for x in got], everything(call, xs))


@calls()
def test_tensors_without_data_get_results_of_the_same_shapes(call: Call) -> None:
    with FakeTensorMode() as mode:
        fake = everything(call, [mode.from_tensor(x) for x in leaves()])
    for got in (fake, everything(call, leaves(device="meta"))):
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in everything(call, leaves())]


def differentiable(call: Call) -> Call:
    """Return the results that have a gradient, from one seed."""
    return lambda *xs: tuple(x for x in flat(from_seed(call, [*xs])) if x.requires_grad)


@calls()
def test_gradients_of_any_order_are_right(call: Call, device: str) -> None:
    xs = leaves(4, DOUBLE, device)
    assert gradcheck(differentiable(call), xs, fast_mode=True)
    assert gradgradcheck(differentiable(call), xs, fast_mode=True)
    # A gradient with a graph that is wrong would be so consistently, which is no matter to gradgradcheck.
    results = differentiable(call)(*xs)
    grads = [torch.randn_like(x) if x.dim() else torch.full_like(x, 1000) for x in results]
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    for of in (slice(None), slice(-1, None)):  # the last one is the penalty
        both = [torch.autograd.grad(results[of], xs, grads[of], create_graph=x, **options) for x in (True, False)]
        assert_close(*both)


@calls(but=DRAWN)
def test_function_transforms_differentiate_calls(call: Call, device: str) -> None:
    """The derivatives along a direction and the curvature in it equal the derivatives by two backwards."""
    xs, others = leaves(4, DOUBLE, device), [x.flip(0) for x in leaves(4, DOUBLE, device)]
    points, directions = (tuple(x.detach() for x in pair) for pair in (xs, others))

    def loss(*xs: Any) -> Any:
        return torch.stack([x.sin().sum() for x in flat(from_seed(call, [*xs]))]).prod()

    def along(xs: Any) -> Any:
        return sum((x * direction).sum() for x, direction in zip(xs, directions, strict=True))

    options: Any = {"allow_unused": True, "materialize_grads": True, "create_graph": True}
    want, of_others = (torch.autograd.grad(loss(*pair), pair, **options) for pair in (xs, others))
    gradients = torch.func.grad(loss, (0, 1))
    assert_close(gradients(*points), want)
    both = [torch.stack(pair) for pair in zip(points, directions, strict=True)]
    assert_close(torch.func.vmap(gradients)(*both), tuple(map(torch.stack, zip(want, of_others, strict=True))))
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, points, directions)
        assert_close(forward_ad.unpack_dual(loss(*duals)).tangent, along(want))
    curvature = torch.func.jvp(gradients, points, directions)[1]
    assert_close(curvature, torch.autograd.grad(along(want), xs, allow_unused=True, materialize_grads=True))


def test_vmap_takes_marks(device: str) -> None:
    raw, marks = torch.randn(3, 4, 7, 2, device=device), torch.rand(3, 4, 7, device=device) < 0.7
    got = torch.func.vmap(lambda x, valid: fused_ar_tar(x, x, 2.0, 1.0, valid=valid))(raw, marks)
    want = [fused_ar_tar(x, x, 2.0, 1.0, valid=valid) for x, valid in zip(raw, marks, strict=True)]
    assert_close(got, torch.stack(want))


@calls("pair", "packed")
def test_one_backward_takes_batched_gradients(call: Call, device: str) -> None:
    """PyTorch transforms the backward by vmap, whose wrappers have no memory that kernels could read."""
    xs, upstream = leaves(device=device), torch.randn(4, device=device)
    got = call(*xs)
    alone = [torch.autograd.grad(got, xs, x, retain_graph=True) for x in upstream]
    want = tuple(map(torch.stack, zip(*alone, strict=True)))
    assert_close(torch.autograd.grad(got, xs, upstream, is_grads_batched=True, retain_graph=True), want)


def test_a_full_graph_of_an_attached_model_says_why_it_breaks() -> None:
    model = nn.Linear(4, 4)
    with RNNRegularizer(2.0, 1.0).attach(model, batch_first=True), pytest.raises(Unsupported) as raised:
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 3, 4))
    assert "the hooks of an attached module" in str(raised.value)
    assert "Compile without fullgraph=True, or call fused_ar_tar" in str(raised.value)


def test_compiled_autograd_gives_the_same_gradients() -> None:
    """Nodes keep steps, orders and coefficients beside the saved tensors."""

    def call(raw: Tensor, dropped: Tensor, values: Tensor) -> Tensor:
        of_padded = fused_ar_tar(raw, dropped, values[1].double(), 1.0, lengths=values)
        return of_padded + fused_ar_tar(packed(raw, values.tolist()), packed(dropped, values.tolist()), 2.0, 1.0)

    for values in (torch.tensor([4, 3, 1]), torch.tensor([4, 2, 2])):
        xs = leaves()
        want = torch.autograd.grad(call(*xs, values), xs)
        with compiled_autograd._enable(torch.compile(backend="eager")):
            call(*xs, values).backward()
        assert_close([x.grad for x in xs], [*want])
