"""`attach(..., in_backward=True)`, and loops that forget the penalty: right, an error, or a warning, never silence."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from contextlib import nullcontext
from functools import partial
from time import perf_counter
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout
from tests import language_model as lm
from tests.calls import Nothing
from tests.language_model import BATCH, BETA, HIDDEN, TIME

DROPOUTS = [None, nn.Dropout(0.0), nn.Dropout(0.4), FusedRNNDropout(0.4)]
each_dropout = pytest.mark.parametrize("dropout", DROPOUTS, ids=["none", "idle", "plain", "fused"])


attached_gru: Any = partial(lm.attach_gru, in_backward=True)


def gradients(loss: Tensor, module: nn.Module, **options: Any) -> Any:
    return torch.autograd.grad(loss, [*module.parameters()], **options)


# Errors


def test_a_dropout_that_changes_its_input_in_place() -> None:
    rnn, _ = attached_gru(dropout := nn.Dropout(0.4, inplace=True))
    with pytest.raises(RuntimeError, match=r"attach: .*changed in place .*use Dropout\(inplace=False\)"):
        lm.run(rnn, dropout)


@each_dropout
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_coefficient_that_is_changed_between_forward_and_backward(name: str, dropout: Any) -> None:
    rnn, reg = attached_gru(dropout)
    setattr(reg, name, torch.tensor(1.5))
    raw, dropped = lm.run(rnn, dropout, lm.inputs())
    getattr(reg, name).zero_()
    with pytest.raises(RuntimeError, match=r"attach: a tensor alpha or beta|modified by an inplace operation"):
        (raw + dropped).sum().backward()


@each_dropout
@pytest.mark.parametrize("name", ["valid", "starts"])
def test_a_mask_that_is_changed_between_forward_and_backward(name: str, dropout: Any) -> None:
    """The steps that count are those of the forward."""
    marks, gradients = torch.ones(BATCH, TIME, dtype=torch.bool), []
    masks: Any = {name: lambda _: marks}
    rnn, _ = attached_gru(dropout, **masks)
    for change in (False, True):
        rnn.zero_grad()
        torch.manual_seed(1)
        raw, dropped = lm.run(rnn, dropout, lm.inputs())
        if change:
            marks.zero_()
        (raw + dropped).sum().backward()
        gradients.append([x.grad.clone() for x in rnn.parameters() if x.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dropout", [None, nn.Dropout(0.4)], ids=["none", "plain"])
def test_a_module_that_runs_once_a_time_step(dropout: Any) -> None:
    rnn, _ = attached_gru(dropout)
    outputs = [lm.run(rnn, dropout, step)[1] for step in lm.inputs().split(1, 1)]
    outputs[0].sum().backward()  # one run of one time step is right
    with pytest.raises(RuntimeError, match=r"GRU ran several times, over one time step each, .*stepwise=True"):
        torch.cat(outputs[1:], 1).sum().backward()


@pytest.mark.parametrize("dropout", DROPOUTS[2:], ids=["plain", "fused"])
def test_a_loss_that_depends_on_raw_alone(dropout: Any) -> None:
    rnn, _ = attached_gru(dropout)
    raw, dropped = lm.run(rnn, dropout)
    kind = type(dropout).__name__
    with pytest.raises(RuntimeError, match=f"output of the GRU, and not on that of the attached {kind}"):
        raw.sum().backward(retain_graph=True)
    rnn.zero_grad()
    (raw + dropped).sum().backward()


def test_a_loss_that_depends_on_raw_alone_without_ar() -> None:
    rnn, reg = attached_gru(dropout := nn.Dropout(0.4))
    reg.alpha, x, plain = 0.0, lm.inputs(), lm.gru()
    raw, _ = lm.run(rnn, dropout, x)
    unhooked, _ = plain(x)
    want = unhooked.sum() + BETA * unhooked.diff(dim=1).square().mean()
    torch.testing.assert_close(gradients(raw.sum(), rnn), gradients(want, plain))


@each_dropout
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_loss_that_depends_on_the_state_alone(kind: Any, dropout: Any) -> None:
    rnn, reg = kind(HIDDEN, HIDDEN, batch_first=True), lm.regularizer()
    reg.attach(rnn, dropout, in_backward=True)
    raw, state = rnn(lm.inputs())
    _ = raw if dropout is None else dropout(raw)
    state = state[0] if isinstance(state, tuple) else state
    torch.autograd.grad(state.sum(), state)  # goes no further
    with pytest.raises(RuntimeError, match=f"attach: the loss depends on the {kind.__name__} by its state alone"):
        state.sum().backward()


def test_a_regularizer_that_is_kept_by_its_module_alone() -> None:
    gotten = []
    for keeps in (True, False):
        rnn, reg = attached_gru()
        reg = reg if keeps else None
        gc.collect()
        gotten.append(gradients(lm.run(rnn, None)[0].square().sum(), rnn))
    torch.testing.assert_close(gotten[1], gotten[0])
    lost = weakref.ref(rnn)
    del rnn
    gc.collect()
    assert lost() is None


def test_a_second_backward_through_activations_that_the_first_has_freed() -> None:
    module, reg, x = nn.Identity(), lm.regularizer(), lm.inputs().requires_grad_()
    reg.attach(module, batch_first=True, in_backward=True)
    raw = module(x)
    losses = raw.sum(), (2 * raw).sum()
    losses[0].backward()
    with pytest.raises(RuntimeError, match=r"attach: an earlier backward has freed the activations.*retain_graph=True"):
        losses[1].backward()


@each_dropout
def test_second_derivatives(dropout: Any) -> None:
    rnn, _ = attached_gru(dropout)
    raw, dropped = lm.run(rnn, dropout)
    with pytest.raises(RuntimeError, match=r"in_backward does not go with second derivatives \(create_graph=True\)"):
        gradients(dropped.sum(), rnn, create_graph=True)
    del raw


# Right gradients


@pytest.mark.parametrize("scale", [True, 3.0, torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64)], ids=str)
def test_a_scale_of_the_penalty(scale: Any) -> None:
    (rnn, reg), plain, x = attached_gru(in_backward=scale), lm.gru(), lm.inputs()
    loss, (raw, _) = lm.run(rnn, None, x)[0].sum(), plain(x)
    torch.testing.assert_close(
        gradients(loss, rnn), gradients(raw.sum() + float(scale) * lm.formula(raw, raw, 1), plain)
    )
    with pytest.raises(RuntimeError, match=r"in_backward=.* adds the penalty already; leave it out"):
        reg.on_backward_begin(loss)


@each_dropout
@pytest.mark.parametrize("around", [nullcontext, torch.autograd.graph.save_on_cpu, Nothing])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, around: Any, dropout: Any) -> None:
    (rnn, reg), plain, x = attached_gru(dropout), lm.gru(), lm.inputs().requires_grad_()
    torch.manual_seed(3)
    with around():
        dropped = checkpoint(lambda x: lm.run(rnn, dropout, x)[1], x, use_reentrant=reentrant)
        got = gradients_of(dropped.square().sum(), rnn)
    torch.manual_seed(3)
    raw, dropped = lm.run(plain, dropout, x)
    torch.testing.assert_close(got, gradients_of(dropped.square().sum() + lm.formula(raw, dropped, 1), plain))
    torch.testing.assert_close([reg.ar, reg.tar], [dropped.square().mean(), raw.diff(dim=1).square().mean()])


@each_dropout
@pytest.mark.parametrize("in_backward", [True, False])
def test_activation_checkpointing_of_the_dropout_and_the_layers_behind_it(in_backward: bool, dropout: Any) -> None:
    (rnn, reg), plain = attached_gru(dropout, in_backward=in_backward), lm.gru()
    torch.manual_seed(3)
    raw, _ = rnn(lm.inputs())
    result = checkpoint(lambda raw: (raw if dropout is None else dropout(raw)).sin(), raw, use_reentrant=False)
    torch.autograd.grad(result.sum(), raw, retain_graph=True)  # recomputes, while a capture waits
    loss = result.square().sum()
    got = gradients(loss if in_backward else reg.on_backward_begin(loss), rnn)
    torch.manual_seed(3)
    raw, dropped = lm.run(plain, dropout)
    torch.testing.assert_close(got, gradients(dropped.sin().square().sum() + lm.formula(raw, dropped, 1), plain))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_terms_are_those_of_the_latest_run_and_of_no_recomputation(reentrant: bool) -> None:
    (rnn, reg), x = attached_gru(), lm.inputs().requires_grad_()
    loss = sum(checkpoint(lambda x: rnn(x)[0], k * x, use_reentrant=reentrant).sum() for k in (1, 2))
    want = [reg.ar, reg.tar]
    loss.backward()  # pyright: ignore[reportAttributeAccessIssue] # runs the first run again at last
    torch.testing.assert_close([reg.ar, reg.tar], want)


def gradients_of(loss: Tensor, module: nn.Module) -> list[Any]:
    """Return the gradients that a backward accumulates; `torch.autograd.grad` refuses reentrant checkpoints."""
    loss.backward()
    return [x.grad for x in module.parameters()]


@pytest.mark.parametrize("where", ["on_backward_begin", "take"])
@pytest.mark.parametrize("reached", ["all", "the last"])
def test_second_derivatives_of_joined_runs(reached: str, where: str) -> None:
    rnn, reg, x = (
        lm.seeded(lambda: nn.RNN(HIDDEN, HIDDEN, batch_first=True)).double(),
        lm.regularizer(),
        lm.inputs().double(),
    )
    reg.attach(rnn, stepwise=True)
    first, state = rnn(x[:, :4])
    last, _ = rnn(x[:, 4:], state)
    raw = torch.cat([first, last], 1)
    loss = (raw if reached == "all" else last).square().sum()
    taken = reg.take(loss) if where == "take" else None
    results = []
    for total in (
        reg.on_backward_begin(loss) if taken is None else loss + taken.penalty,
        loss + lm.formula(raw, raw, 1),
    ):
        slopes = gradients(total, rnn, create_graph=True)
        results.append((total, slopes, gradients(sum(g.square().sum() for g in slopes), rnn, retain_graph=True)))
    torch.testing.assert_close(*results)


@each_dropout
@pytest.mark.parametrize("stepwise", [False, True])
def test_runs_under_a_dispatch_mode(stepwise: bool, dropout: Any) -> None:
    rnn, reg = attached_gru(dropout, in_backward=False, stepwise=stepwise)
    with Nothing():
        runs = [lm.run(rnn, dropout, part) for part in lm.inputs().split(4, 1)]
    loss = torch.stack([dropped.square().sum() for _, dropped in runs]).sum()
    joined = [[torch.cat(x, 1) for x in zip(*runs, strict=True)]] if stepwise else runs
    want = loss + torch.stack([lm.formula(raw, dropped, 1) for raw, dropped in joined]).sum()
    lm.check_gradients(rnn, reg.on_backward_begin(loss), want)


@pytest.mark.parametrize(
    "transform",
    [lambda f, given: torch.func.grad(f)(given), lambda f, given: torch.func.jvp(f, (given,), (given,))],
    ids=["gradient", "tangent"],
)
def test_function_transforms(transform: Any) -> None:
    module, reg, x = nn.Linear(HIDDEN, HIDDEN), lm.regularizer(), lm.inputs()
    reg.attach(module, batch_first=True)

    def loss(hooked: bool, parameters: Any) -> Tensor:
        raw = torch.func.functional_call(module, parameters, (x,))
        return reg.on_backward_begin(raw.sum()) if hooked else raw.sum() + lm.formula(raw, raw, 1)

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    torch.testing.assert_close(*(transform(partial(loss, hooked), parameters) for hooked in (True, False)))


def test_transforms_of_which_no_hook_sees_the_derivative() -> None:
    (rnn, _reg), x = attached_gru(), lm.inputs()
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}
    call = lambda p: torch.func.functional_call(rnn, p, (x,))[0].sum()  # noqa: E731
    with pytest.raises(RuntimeError, match=r"attach: in_backward does not go with transforms of torch.func"):
        torch.func.grad(call)(parameters)
    rnn, reg = attached_gru(in_backward=False)
    with pytest.raises(RuntimeError, match=r"the GRU ran 2 times under a transform of torch.func"):
        torch.func.grad(lambda p: reg.on_backward_begin(call(p) + call(p)))(parameters)


@pytest.mark.parametrize("dropout", DROPOUTS[2:], ids=["plain", "fused"])
@pytest.mark.parametrize("in_backward", [True, False])
def test_a_dropout_that_gets_raw_twice(in_backward: bool, dropout: Any) -> None:
    rnn, _reg = attached_gru(dropout, in_backward=in_backward)
    raw, _ = lm.run(rnn, dropout)
    with torch.no_grad():
        dropout(raw)
    with pytest.raises(RuntimeError, match=r"attach: .* got the same output of the GRU twice"):
        dropout(raw)


def test_a_copy_that_shares_attributes() -> None:
    """As meta-learning makes them; the forward that Dynamo sees is that of the attached module."""
    rnn, _reg = attached_gru()
    clone = object.__new__(nn.GRU)
    vars(clone).update(vars(rnn))
    with pytest.raises(RuntimeError, match="attach: this GRU shares the attributes of the attached one"):
        clone(lm.inputs())


def test_a_forward_that_is_an_attribute_stays() -> None:
    """As wrappers of a forward make it."""
    module, reg = nn.Linear(HIDDEN, HIDDEN), lm.regularizer()
    module.forward = MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), module)
    own = module.forward
    with reg.attach(module, batch_first=True):
        raw = module(lm.inputs())
        torch.testing.assert_close(reg.on_backward_begin(raw.sum()), raw.sum() + lm.formula(raw, raw, 1))
        assert vars(copy.copy(module))["forward"] is own
    assert vars(module)["forward"] is own


def test_an_output_that_gets_no_gradient() -> None:
    rnn, _reg = attached_gru()
    x = lm.inputs().requires_grad_()
    lm.Sink.apply(x, rnn(lm.inputs())[0]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in rnn.parameters())


# A penalty that was forgotten


def backwards(rnn: nn.Module, dropout: Any, count: int = 3, of: str = "output", before: Any = None) -> list[str]:
    """Run backwards of the output, or of the state, and return the warnings; `before` gets each loss."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            raw, state = rnn(lm.inputs())
            dropped = raw if dropout is None else dropout(raw)
            loss = (dropped if of == "output" else state).sum()
            if before is not None:
                before(loss)
            loss.backward()
    found = [x for x in caught if "neither had a penalty" in str(x.message)]
    assert all(x.filename == __file__ for x in found)
    return [str(x.message) for x in found]


@each_dropout
@pytest.mark.parametrize(
    ("misuse", "of"), [("no call", "output"), ("no call", "state"), ("a call whose result is dropped", "output")]
)
def test_a_forgotten_penalty_is_warned_of_once(misuse: str, of: str, dropout: Any) -> None:
    rnn, reg = attached_gru(dropout, in_backward=False)
    before = None if misuse == "no call" else reg.on_backward_begin
    assert backwards(rnn, dropout, 1, of, before) == []
    (message,) = backwards(rnn, dropout, 1, of, before)
    assert "second backward goes through the output of the attached GRU" in message
    assert "loss = regularizer.on_backward_begin(loss)" in message
    assert backwards(rnn, dropout, 3, of, before) == []


@each_dropout
@pytest.mark.parametrize("why", ["a backward had one", "evaluation", "without gradients", "in_backward"])
def test_no_warning_of_a_penalty_that_was_not_forgotten(why: str, dropout: Any) -> None:
    rnn, reg = attached_gru(dropout, in_backward=why == "in_backward")
    if why == "a backward had one":
        reg.on_backward_begin(lm.run(rnn, dropout)[1].sum()).backward()
    elif why == "evaluation":
        rnn.eval()
    elif why == "without gradients":
        rnn.requires_grad_(False)
        dropout = nn.Sequential(nn.Linear(HIDDEN, HIDDEN))
    assert backwards(rnn, dropout) == []


# A run that the loss does not reach


def chain(x: Tensor, length: int = 20000) -> Tensor:
    for _ in range(length):
        x = x + 0
    return x.sum()


@pytest.mark.parametrize("count", [1, 5])
def test_a_run_that_no_loss_reaches_makes_one_search_of_the_whole_graph(count: int) -> None:
    module, reg = nn.Linear(HIDDEN, HIDDEN), lm.regularizer()
    reg.attach(module, batch_first=True)
    stale = [module(chain(lm.inputs()) + lm.inputs()) for _ in range(count)]
    times = []
    for _ in range(6):
        x = lm.inputs().requires_grad_()
        loss = module(x + chain(x)).sum()
        start = perf_counter()
        reg.on_backward_begin(loss)
        times.append(perf_counter() - start)
    assert min(times[1:]) < times[0] / 4
    total = reg.on_backward_begin(sum(x.sum() for x in stale))  # pyright: ignore[reportArgumentType]
    want = sum((x.sum() + lm.formula(x, x, 1) for x in stale), torch.zeros(()))
    torch.testing.assert_close(total, want)


@pytest.mark.parametrize("adds", [True, False])
def test_a_loss_beside_later_runs_that_reaches_a_run_that_another_has_missed(adds: bool) -> None:
    """A search does not wait for such a run: it is found or an error, also where all found runs have no gradient."""
    module, reg = nn.Linear(HIDDEN, HIDDEN), lm.regularizer()
    reg.attach(module, batch_first=True)
    missed = module(lm.inputs())
    reg.on_backward_begin(module(lm.inputs()).sum())
    later = module(lm.inputs())
    loss = later.sum() + chain(missed, 20)
    taken = None if adds else reg.take(loss)
    total = reg.on_backward_begin(loss) if taken is None else loss + taken.penalty
    with pytest.raises(RuntimeError, match="depends on a run of the Linear that an earlier loss did not depend on"):
        total.backward(retain_graph=True)
    (later.sum() + chain(missed, 20)).backward()  # of a loss without a penalty


def test_a_loss_that_reaches_a_run_that_another_has_missed_by_its_state_alone() -> None:
    """Also in a later step, by a missed run that the search happens to find."""
    module, reg = lm.gru(), lm.regularizer()
    reg.attach(module)
    reg.on_backward_begin(module(lm.inputs())[0].sum()).backward()
    _missed, state = module(lm.inputs())
    found, _ = module(lm.inputs(), state)
    reg.on_backward_begin(module(lm.inputs())[0].sum()).backward()
    later, _ = module(lm.inputs())
    loss = found.sum() + later.sin().sin().sin().sum()
    with pytest.raises(RuntimeError, match="that an earlier loss did not depend on"):
        reg.on_backward_begin(loss).backward()


def test_a_search_leaves_the_runs_of_another_regularizer_alone() -> None:
    """The loss of the one depends on both outputs, and that of the other on none of its own."""
    rnns, one, other = nn.ModuleList([lm.gru(), lm.gru()]), lm.regularizer(), lm.regularizer()
    one.attach(rnns[0])
    other.attach(rnns[1])
    a, b = (rnn(lm.inputs())[0] for rnn in rnns)
    want = (a + b).sum() + a.sum() + lm.formula(a, a, 1) + lm.formula(b, b, 1)
    lm.check_gradients(rnns, one.on_backward_begin((a + b).sum()) + other.on_backward_begin(a.sum()), want)
