"""Captures in the autograd graph, and the gradients that hooks add: against autograd, in steps of every kind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar
from tests import language_model as lm
from tests.conftest import INTERPRETED
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME
from tests.samples import Decorated

# The result of a module is left alone


def test_a_view_that_is_returned_stays_one() -> None:
    """Without a penalty in the step, too: a change through the view changes the output."""
    module, reg = lm.Returning(lambda hidden: (raw := 2 * hidden, raw[:, -1])), lm.regularizer()
    x, gradients = lm.inputs(), []
    for attached_to in (lm.Returning(), module):
        with reg.attach(attached_to):
            raw, last = module(x)
            last.mul_(3)
            gradients.append(torch.autograd.grad(raw.square().sum(), [*module.parameters()]))
    torch.testing.assert_close(*gradients)


@dataclass
class Partly:
    hidden: Tensor
    unset: Tensor = field(init=False)


def cyclic(hidden: Tensor) -> Any:
    result: list[Any] = [hidden]
    result.append(result)
    return result


first, last, opened = itemgetter(0), itemgetter(-1), attrgetter("hidden")
# A function that wraps raw, one that finds it again, and the `output` of `attach`.
RETURNED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], Any]] = {
    "a tuple": (lambda hidden: (hidden, {"state": hidden.sum()}), first, None),
    "a model output": (
        lambda hidden: SimpleNamespace(states=(hidden.sum(),), last_hidden_state=hidden),
        attrgetter("last_hidden_state"),
        None,
    ),
    "picked": (lambda hidden: (hidden.sum(), hidden), last, last),
    "an opaque object": (lambda hidden: SimpleNamespace(hidden=hidden), opened, opened),
    "a field that is not set": (Partly, opened, opened),
    "a list of itself": (cyclic, first, first),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_a_result_of_any_kind_stays_itself(kind: str) -> None:
    give, pick, output = RETURNED[kind]
    given = []
    module, reg = lm.Returning(lambda hidden: given.append(give(hidden)) or given[-1]), lm.regularizer()
    reg.attach(module, output=output)
    results = [module(lm.inputs(), cyclic(lm.inputs())) for _ in range(2)]
    assert [*map(id, results)] == [*map(id, given)]
    first, second = map(pick, results)
    lm.check_gradients(
        module, lm.penalty_of(reg, first, second), lm.formula(first, first, 1) + lm.formula(second, second, 1)
    )


@pytest.mark.parametrize(
    "dropout", [None, nn.Dropout(0.0), nn.Identity(), FusedRNNDropout(0.0)], ids=lambda x: type(x).__name__
)
def test_runs_go_with_their_graph(dropout: nn.Module | None) -> None:
    module, reg, alive = lm.Returning(lambda hidden: SimpleNamespace(hidden=hidden)), lm.regularizer(), []
    handle = reg.attach(module, dropout, output=opened)
    after = nn.Identity() if dropout is None else dropout
    lm.penalty_of(reg, after(module(lm.inputs()).hidden)).backward()  # the only one: a loop without any is warned of
    for _ in range(5):
        raw = module(lm.inputs()).hidden
        alive.append(weakref.ref(raw))
        if dropout is not None:
            dropout(raw).sum().backward()
        del raw
        assert len(handle.runs) == 0
    assert not any(ref() is not None for ref in alive)


# Which runs a loss depends on, and how


def test_two_runs_of_a_frozen_module_with_a_trainable_dropout() -> None:
    """Any module may be the dropout, and get raw by any name."""
    rnn, dropout, reg = lm.gru().requires_grad_(False), nn.Linear(HIDDEN, HIDDEN), lm.regularizer()
    reg.attach(rnn, dropout)
    runs = [rnn(lm.inputs())[0] for _ in range(2)]
    dropped = [dropout(input=raw) for raw in runs]
    want = torch.stack([lm.formula(r, d, 1) for r, d in zip(runs, dropped, strict=True)]).sum()
    lm.check_gradients(dropout, lm.penalty_of(reg, *dropped), want)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("dropout", [None, nn.Dropout(0.0)], ids=["no dropout", "dropout of 0"])
def test_a_loss_that_depends_on_a_run_by_its_state_alone(kind: Any, dropout: Any) -> None:
    rnn, reg, x = lm.seeded(lambda: kind(HIDDEN, HIDDEN, batch_first=True)), lm.regularizer(), lm.inputs()
    reg.attach(rnn, dropout)
    raw, state = rnn(x)
    if dropout is not None:
        dropout(raw)
    del raw
    total = reg.on_backward_begin(state[0].sum())
    raw, state = rnn.eval()(x)  # of another graph
    lm.check_gradients(rnn, total, state[0].sum() + lm.formula(raw, raw, 1))


@pytest.mark.parametrize(
    "give", [lambda hidden: (hidden.tanh(), hidden), lambda hidden: (2 * hidden).chunk(2, -1)], ids=["before", "beside"]
)
def test_a_loss_that_depends_on_the_latest_run_by_another_output(give: Callable[[Tensor], Any]) -> None:
    """Of a node before that of raw, or of the same, such as an LSTM's on a GPU: no other run holds its raw."""
    module, reg, x = lm.Returning(give), lm.regularizer(), lm.inputs()
    handle, alive = reg.attach(module), []
    for _ in range(3):
        raw, other = module(x)
        alive.append(weakref.ref(raw))
        del raw
        assert len(handle.runs) == 1
    assert [ref() is not None for ref in alive] == [False, False, True]
    total = reg.on_backward_begin(other.sum())
    raw, other = module.eval()(x)  # of another graph
    lm.check_gradients(module, total, other.sum() + lm.formula(raw, raw, 1))
    del total
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize(("layers", "reached"), [("all", 1), ("last", 2)])
def test_the_loss_depends_on_one_of_two_modules_or_one_counts(layers: Any, reached: int) -> None:
    modules, reg = nn.ModuleList([lm.Returning(), lm.Returning()]), lm.regularizer(layers=layers)
    for module in modules:
        reg.attach(module)
    raws = [module(lm.inputs()) for module in modules]
    loss, raw = torch.cat(raws[:reached]).sum(), raws[reached - 1]
    lm.check_gradients(modules, reg.on_backward_begin(loss), loss + lm.formula(raw, raw, 1))


class Passing(nn.GRU):
    """Returns its input beside its output."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)[0], input


def test_a_loss_does_not_depend_on_a_run_by_its_input() -> None:
    module, reg, before = Passing(HIDDEN, HIDDEN, batch_first=True), lm.regularizer(), nn.Linear(HIDDEN, HIDDEN)
    reg.attach(module)
    first, second = (module(before(lm.inputs())) for _ in range(2))
    loss = first[1].sum() + second[0].sum()
    lm.check_gradients(module, reg.on_backward_begin(loss), loss + lm.formula(second[0], second[0], 1))


def test_a_coefficient_of_0_leaves_infinity_out() -> None:
    module, dropout, reg = nn.Linear(HIDDEN, HIDDEN), FusedRNNDropout(0.5), RNNRegularizer(torch.tensor(0.0), 0.0)
    reg.attach(module, dropout, batch_first=True)
    with torch.no_grad():
        module.weight.fill_(torch.inf)
    loss = dropout(module(lm.inputs().abs())).nan_to_num(0, 0, 0).sum()
    assert reg.on_backward_begin(loss) == 0
    assert reg.ar is not None
    assert not reg.ar.isfinite()


def one_run() -> tuple[nn.Module, RNNRegularizer, Tensor, Tensor]:
    """Return an attached module, its regularizer, raw, and a loss."""
    module, reg = lm.attach_gru()
    raw, _ = lm.run(module, None)
    return module, reg, raw, raw.square().sum()


@pytest.mark.parametrize("kind", [nn.Dropout, FusedRNNDropout])
@pytest.mark.parametrize("result", [Tensor, Decorated, "the penalty alone"])
def test_a_result_may_be_changed_in_place(result: Any, kind: Any) -> None:
    module, reg = lm.attach_gru(dropout := kind(0.4))
    raw, dropped = lm.run(module, dropout)
    loss, penalty = dropped.square().sum(), lm.formula(raw, dropped, 1)
    got: Any = reg.on_backward_begin(loss.as_subclass(result)) if isinstance(result, type) else reg.take(loss)
    if isinstance(result, type):
        got /= 2
        assert type(got) is result
        lm.check_gradients(module, got, (loss + penalty) / 2)
    else:
        got.penalty.div_(2)
        lm.check_gradients(module, loss + got.penalty, loss + penalty / 2)


@pytest.mark.parametrize("where", ["the loss", "the penalty"])
def test_a_hook_that_changes_its_gradient_in_place(where: str) -> None:
    """The upstream gradient of the penalty does not change."""
    module, reg, raw, loss = one_run()
    terms = None if where == "the loss" else reg.take(loss)
    total = reg.on_backward_begin(loss) if terms is None else terms.penalty + loss
    want = 3 * loss + lm.formula(raw, raw, 1)
    gradients = torch.autograd.grad(want, [*module.parameters()], retain_graph=True)
    loss.register_hook(lambda gradient: (gradient.mul_(3), None)[1])
    torch.testing.assert_close(torch.autograd.grad(total, [*module.parameters()]), gradients)


def test_a_backward_within_another_of_the_same_loss() -> None:
    module, reg, raw, loss = one_run()
    total, parameters, inner = reg.on_backward_begin(loss), [*module.parameters()], []
    want = torch.autograd.grad(loss + lm.formula(raw, raw, 1), parameters, retain_graph=True)

    def once(_: Tensor) -> None:
        if not inner:
            inner.append(None)
            inner[0] = torch.autograd.grad(total, parameters, retain_graph=True)

    loss.register_hook(once)
    torch.testing.assert_close(torch.autograd.grad(total, parameters, retain_graph=True), want)
    torch.testing.assert_close(inner[0], want)


def test_a_backward_that_makes_a_graph_frees_the_other() -> None:
    (module, reg, raw, loss), probe = one_run(), torch.empty(0)
    node: Any = raw.grad_fn
    node.metadata["probe"], alive = probe, weakref.ref(probe)
    total = reg.on_backward_begin(loss)
    torch.autograd.grad(total.exp(), [*module.parameters()], create_graph=True)
    del raw, node, loss, total, probe
    assert alive() is None


def test_a_backward_that_failed_leaves_nothing_armed() -> None:
    module, reg, _, loss = one_run()
    total, parameters = reg.on_backward_begin(loss), [*module.parameters()]
    want = torch.autograd.grad(loss, parameters, retain_graph=True)
    with pytest.raises(ZeroDivisionError), loss.register_hook(lambda _: 1 / 0):
        total.backward(retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), want)


def test_gradients_that_a_backward_did_not_add_are_freed() -> None:
    _, reg, _, loss = one_run()
    total, alive = reg.on_backward_begin(loss), []
    for _ in range(3):
        torch.autograd.grad(total, loss, retain_graph=True)  # which does not reach raw
        alive.append(sum(type(x) is Tensor for x in gc.get_objects()))
    assert alive[1] == alive[2]


def test_hooks_of_others_see_the_whole_gradient() -> None:
    """As if autograd had added the penalty's: those of the module itself, which come first, too."""

    def clipped(raw: Tensor) -> Tensor:
        raw.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return raw

    module, reg = lm.Returning(clipped), lm.regularizer()
    reg.attach(module)
    raw = module(lm.inputs())
    raw.retain_grad()
    seen = []
    for loss in (reg.on_backward_begin(raw.sum()), raw.sum() + lm.formula(raw, raw, 1)):
        module.zero_grad()
        raw.grad = None
        loss.backward(retain_graph=True)
        seen.append([raw.grad, *(x.grad.clone() for x in module.parameters() if x.grad is not None)])
    torch.testing.assert_close(*seen)
    torch.testing.assert_close(seen[0][0].abs().max(), torch.tensor(0.01))


@lm.either
@pytest.mark.parametrize("in_backward", [False, True])
def test_no_activation_is_kept_after_the_backward(in_backward: bool) -> None:
    """Also while the loss is."""
    model = lm.seeded(lm.Model)
    reg = lm.attached(model, in_backward=in_backward)
    decoded, raw, dropped = model.activations(lm.tokens())
    memory = [weakref.ref(x.untyped_storage()) for x in (raw, dropped)]
    loss = lm.criterion(decoded, lm.tokens())
    loss = loss if in_backward else reg.on_backward_begin(loss)
    del raw, dropped
    loss.backward()
    if INTERPRETED:  # Triton's interpreter leaves reference cycles
        gc.collect()
    assert [x() for x in memory] == [None, None]
    assert loss.grad_fn is not None


def test_a_gradient_that_is_none_is_an_error() -> None:
    _, reg, raw, _ = one_run()
    total = reg.on_backward_begin(lm.Sink.apply(raw.detach().requires_grad_(), raw).sum())
    with pytest.raises(RuntimeError, match="a tensor that the loss depends on got no gradient"):
        total.backward()


# One time step a run


def test_masks_of_a_cell() -> None:
    cell, reg = lm.seeded(lambda: nn.LSTMCell(HIDDEN, HIDDEN)), lm.regularizer()
    marks = torch.rand(TIME, BATCH) < 0.7
    starts = torch.rand(TIME, BATCH) < 0.3
    some = lambda *_: None if len(raws) == 2 else starts[len(raws)]  # noqa: E731 - no start where there are none
    reg.attach(cell, stepwise=True, valid=lambda *_: marks[len(raws)], starts=some)
    state, raws = None, []
    for step in lm.inputs().unbind(1):
        state = cell(step, state)
        raws.append(state[0])
    loss, raw = torch.stack(raws).mean(), torch.stack(raws, 1)
    starts[2] = False
    want = loss + fused_ar_tar(raw, raw, ALPHA, BETA, valid=marks.t(), starts=starts.t())
    lm.check_gradients(cell, reg.on_backward_begin(loss), want)


@pytest.mark.parametrize("counts", [[3, 2], [1, 2, 3]])  # those of the second add up to the steps of three equal runs
@pytest.mark.parametrize("name", ["valid", "starts"])
def test_runs_of_several_steps_of_which_some_have_no_marks(counts: list[int], name: str) -> None:
    marks = torch.tensor([[True, False]]).expand(BATCH, 2)
    some: Any = {name: lambda x: marks if x.shape[1] == 2 else None}
    rnn, reg = lm.attach_gru(stepwise=True, **some)
    raws = [rnn(torch.randn(BATCH, count, HIDDEN))[0] for count in counts]
    joined = [marks if n == 2 else torch.full((BATCH, n), name == "valid") for n in counts]
    raw, given = torch.cat(raws, 1), {name: torch.cat(joined, 1)}
    want = raw.mean() + fused_ar_tar(raw, raw, ALPHA, BETA, **given)  # pyright: ignore[reportCallIssue, reportArgumentType]
    lm.check_gradients(rnn, reg.on_backward_begin(raw.mean()), want)


def test_a_loss_that_is_kept_holds_nothing_of_joined_runs() -> None:
    rnn, reg = lm.attach_gru(stepwise=True)
    total = reg.on_backward_begin(torch.cat([rnn(lm.inputs())[0] for _ in range(2)], 1).mean())
    total.backward()
    gc.collect()
    held = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (BATCH, 2 * TIME, HIDDEN)]
    assert held == []


@pytest.mark.parametrize("name", ["valid", "starts"])
def test_marks_of_another_run_are_an_error(name: str) -> None:
    """Although their steps add up to those of all runs."""
    marks: Any = {name: lambda x: torch.ones(BATCH, 5 - x.shape[1], dtype=torch.bool)}
    rnn, reg = lm.attach_gru(stepwise=True, **marks)
    raws = [rnn(torch.randn(BATCH, count, HIDDEN))[0] for count in (2, 3)]
    with pytest.raises(ValueError, match=rf"{name}: expected shape .*, 2\), batch and time steps of the run, got"):
        reg.on_backward_begin(torch.cat(raws, 1).mean())


def test_runs_of_which_some_have_a_dropout_that_drops_nothing() -> None:
    """AR and TAR are of one tensor there."""
    cell, dropout, reg = lm.seeded(lambda: nn.GRUCell(HIDDEN, HIDDEN)), nn.Dropout(0.5), lm.regularizer()
    reg.attach(cell, dropout, stepwise=True)
    state, raws, kept = None, [], []
    for i, step in enumerate(lm.inputs().unbind(1)):
        state = cell(step, state)
        raws.append(state)
        kept.append(dropout.train(i % 2 == 0)(state))
    loss = torch.stack(kept).mean()
    want = loss + fused_ar_tar(torch.stack(raws, 1), torch.stack(kept, 1), ALPHA, BETA)
    lm.check_gradients(cell, reg.on_backward_begin(loss), want)


# Transforms of PyTorch, and layers of other dtypes


def test_fused_dropouts_of_layers_of_two_dtypes() -> None:
    reg, loss, penalty = lm.regularizer(layers="all"), torch.zeros(()), torch.zeros(())
    xs = [lm.inputs().requires_grad_(), lm.inputs().double().requires_grad_()]
    for x in xs:
        module, dropout = nn.Identity(), FusedRNNDropout(0.5)
        reg.attach(module, dropout, batch_first=True)
        dropped = dropout(module(x))
        loss, penalty = loss + dropped.sum(), penalty + lm.formula(x, dropped, 1)
    want = torch.autograd.grad(loss + penalty, xs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(reg.on_backward_begin(loss), xs), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_autograd() -> None:  # which fails on PyTorch's own RNNs
    modules, reg = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2)), lm.regularizer(layers="all")
    loss = penalty = torch.zeros(())
    for module, dropout in zip(modules, (nn.Dropout(0.3), FusedRNNDropout(0.3)), strict=True):
        reg.attach(module, dropout, batch_first=True)
        raw = module(lm.inputs())
        dropped = dropout(raw)
        loss, penalty = loss + dropped.sin().mean(), penalty + lm.formula(raw, dropped, 1)
    want = torch.autograd.grad(loss + penalty, [*modules.parameters()], retain_graph=True)
    total = reg.on_backward_begin(loss)
    torch._dynamo.reset()
    from torch._dynamo import compiled_autograd

    with compiled_autograd._enable(torch.compile(backend="eager")):
        total.backward()
    torch._dynamo.reset()
    torch.testing.assert_close([x.grad for x in modules.parameters()], [*want])


@pytest.mark.parametrize("dropout", [None, nn.Dropout(0.3), FusedRNNDropout(0.3)], ids=["none", "plain", "fused"])
@pytest.mark.parametrize("change", ["layout", "dtype"])
@pytest.mark.parametrize("marked", [False, True])
def test_saved_tensors_that_a_hook_changes(marked: bool, change: str, dropout: nn.Module | None) -> None:
    """Kernels read another layout as that of the forward; another dtype is an error."""
    valid = torch.arange(TIME) < torch.arange(1, BATCH + 1).unsqueeze(-1) if marked else None
    module, reg = lm.attach_gru(dropout, valid=lambda *_: valid)

    def changed(x: Tensor) -> Tensor:
        if change == "layout":
            return x.mT.contiguous().mT if x.dim() > 1 else x
        return x.double()

    for hook in (lambda x: x, changed):  # the second step has the plans of the first
        raw, _ = module(lm.inputs())
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, hook):
            after = raw if dropout is None else dropout(raw)
            loss = after.square().sum()
            got = reg.on_backward_begin(loss)
        if hook is changed and change == "dtype":
            with pytest.raises(RuntimeError, match=r": expected the dtype of the forward, .* got torch\.float64"):
                got.backward()
        else:
            lm.check_gradients(module, got, loss + fused_ar_tar(raw, after, ALPHA, BETA, valid=valid))
