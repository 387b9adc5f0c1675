"""`RNNRegularizer.attach`: which runs the hooks capture, in which layouts, and which of them belong to a step."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar
from tests.language_model import (
    ALPHA,
    BATCH,
    BETA,
    HIDDEN,
    TIME,
    Fused,
    Model,
    Stack,
    assert_same,
    attached,
    check_gradients,
    criterion,
    either,
    formula,
    penalty_of,
    regularizer,
    seeded,
    tokens,
    train,
)


@either
@pytest.mark.parametrize(
    ("options", "shape", "time"),
    [
        ({}, (BATCH, TIME), 1),
        ({"batch_first": False}, (TIME, BATCH), 0),
        ({"bidirectional": True}, (BATCH, TIME), 1),
        ({"bidirectional": True, "batch_first": False, "num_layers": 2}, (TIME, BATCH), 0),
        ({}, (TIME,), 0),
        ({}, (1, TIME), 1),
    ],
    ids=["batch_first", "time_first", "bidirectional", "two_layers_time_first", "unbatched", "batch_of_one"],
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hooks(kind: Any, options: dict[str, Any], shape: tuple[int, ...], time: int, device: str) -> None:
    def fresh() -> Model:
        return seeded(lambda: Model(kind, **options)).to(device)

    x = tokens(*shape, device=device)
    model = fresh()
    reg = attached(model)
    got = train(model, lambda x: reg.on_backward_begin(criterion(model(x), x)), x)

    plain = fresh()

    def written_out(x: Tensor) -> Tensor:
        decoded, raw, dropped = plain.activations(x)
        return criterion(decoded, x) + formula(raw, dropped, time)

    without = fresh()
    assert_same(got, train(plain, written_out, x), train(without, lambda x: criterion(without(x), x), x))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_without_a_dropout_dropped_is_raw(p: float) -> None:
    model = seeded(lambda: Model(p=p))
    reg = regularizer()
    reg.attach(model.rnn)
    _, raw, dropped = model.activations(tokens())
    assert (raw is dropped) == (p == 0)
    torch.testing.assert_close(penalty_of(reg), formula(raw, raw, 1))


class ByKeyword(nn.Module):
    def forward(self, *, input: Tensor) -> Tensor:
        return 2 * input


def test_any_module_may_be_the_dropout() -> None:
    rnn, dropout = nn.GRU(HIDDEN, HIDDEN, batch_first=True), ByKeyword()
    sequential = nn.Sequential(nn.Dropout(0.0), nn.Identity())
    for module, factor in ((dropout, 2), (sequential, 1)):
        reg = regularizer()
        with reg.attach(rnn, module):
            raw, _ = rnn(torch.randn(BATCH, TIME, HIDDEN))
            dropped = module(input=raw)
            torch.testing.assert_close(penalty_of(reg, dropped), formula(raw, factor * raw, 1))


@pytest.mark.parametrize("how", ["packed", "data", "padded"])
def test_packed_sequences(how: str) -> None:
    model = seeded(Model)
    packed = pack_padded_sequence(torch.randn(BATCH, TIME, HIDDEN), torch.tensor([7, 4, 2]), batch_first=True)
    reg = regularizer()
    if how != "packed":
        reg.attach(model.rnn, model.dropout)
    else:
        reg.attach(model.rnn)
    raw, _ = model.rnn(packed)
    assert isinstance(raw, PackedSequence)
    if how == "padded":
        dropped = model.dropout(pad_packed_sequence(raw)[0])
        with pytest.raises(RuntimeError, match=r"did not get the output of the LSTM: .*packing, padding"):
            penalty_of(reg, dropped)
    elif how == "data":
        dropped = model.dropout(raw.data)
        want = fused_ar_tar(raw, raw._replace(data=dropped), reg.alpha, reg.beta)
        check_gradients(model, penalty_of(reg, dropped), want)
    else:
        check_gradients(model, penalty_of(reg, raw.data), fused_ar_tar(raw, raw, reg.alpha, reg.beta))
    for layers in ("last", "all"):
        reg = regularizer(layers=layers)
        assert reg.on_loss_begin((0, [raw, raw], [raw, raw])) == 0
        count = 1 if layers == "last" else 2
        assert penalty_of(reg) == fused_ar_tar([raw] * count, [raw] * count, reg.alpha, reg.beta)


@either
def test_a_frozen_rnn_is_no_error() -> None:
    model = seeded(Model).requires_grad_(False)
    model.decoder.requires_grad_(True)
    reg = attached(model)
    decoded, raw, dropped = model.activations(tokens())
    loss = criterion(decoded, tokens())
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(raw, dropped, 1))


# Any module, and how its output is read


class Own(nn.Module):
    """A recurrent layer of one's own, without a `batch_first`; the test chooses its output."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.give = nn.Parameter(torch.randn(HIDDEN, HIDDEN)), give

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        steps = [torch.zeros_like(x[:, 0])]
        for step in x.unbind(1):
            steps.append(torch.tanh(step + steps[-1] @ self.weight))
        return self.give(torch.stack(steps[1:], 1), steps[-1])


class ModelOutput(dict):
    """The output of a library's model: fields by name, one the last layer's output."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self["last_hidden_state"]


@dataclass(frozen=True)
class Fields:
    states: list[Tensor]


GIVES: dict[str, tuple[Any, Any, Callable[[Any], Tensor]]] = {
    "tensor": (lambda raw, state: raw, None, lambda result: result),
    "tuple": (lambda raw, state: (raw, {"state": state}), None, lambda result: result[0]),
    "list": (lambda raw, state: [raw, state], None, lambda result: result[0]),
    "model output": (
        lambda raw, state: ModelOutput(states=(state,), last_hidden_state=raw),
        None,
        lambda result: result["last_hidden_state"],
    ),
    "picked": (
        lambda raw, state: (state, Fields([state, raw])),
        lambda result: result[1].states[-1],
        lambda result: result[1].states[-1],
    ),
}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("give", GIVES)
def test_raw_is_read_from_what_any_module_returns(give: str, p: float) -> None:
    returned, output, raw_of = GIVES[give]
    module, plain = seeded(lambda: Own(returned)), seeded(lambda: Own(returned))
    dropout, x = nn.Dropout(p), torch.randn(BATCH, TIME, HIDDEN)
    reg = regularizer()
    reg.attach(module, dropout, output=output, batch_first=True)

    def captured(x: Tensor) -> Tensor:
        return reg.on_backward_begin(dropout(raw_of(module(x))).mean())

    def written_out(x: Tensor) -> Tensor:
        raw = raw_of(plain(x))
        dropped = dropout(raw)
        return dropped.mean() + formula(raw, dropped, 1)

    assert_same(train(module, captured, x), train(plain, written_out, x))


class OutputAlone(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)[0]


@pytest.mark.parametrize("batch", [1, 2, BATCH])
def test_an_lstm_that_returns_its_output_alone_keeps_its_batch(batch: int) -> None:
    rnn, reg = OutputAlone(HIDDEN, HIDDEN, batch_first=True), regularizer()
    reg.attach(rnn)
    raw = rnn(torch.randn(batch, TIME, HIDDEN))
    torch.testing.assert_close(penalty_of(reg), formula(raw, raw, 1))


class WeightDrop(nn.Module):
    """Calls the inner module's `forward`, as AWD-LSTM's does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module.forward(*args)


class LockedDropout(nn.Module):
    """Drops by a probability that comes with the call."""

    def forward(self, x: Tensor, p: float) -> Tensor:
        return x * (torch.rand_like(x[:1]) > p) / (1 - p)


@pytest.mark.parametrize("fused", [False, True])
def test_a_wrapper_is_attached_in_the_place_of_what_it_wraps(fused: bool) -> None:
    rnn = WeightDrop(nn.LSTM(HIDDEN, HIDDEN))
    locked = FusedRNNDropout(batch_first=False) if fused else LockedDropout()
    reg = regularizer()
    with reg.attach(rnn, locked, batch_first=False):
        raw, _ = rnn(torch.randn(TIME, BATCH, HIDDEN))
        dropped = locked(raw, 0.4)
        assert (dropped == 0).any()
        torch.testing.assert_close(penalty_of(reg), formula(raw, dropped, 0))
    reg.attach(rnn.module)
    rnn(torch.randn(TIME, BATCH, HIDDEN))
    with pytest.raises(RuntimeError, match=r"wrapper calls the forward\(\) of a module inside .* attach the wrapper"):
        penalty_of(reg)


def test_the_layout_is_the_modules_or_the_arguments() -> None:
    time_first = nn.LSTM(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match="batch_first: expected False, as the LSTM has it, or None, got True"):
        regularizer().attach(time_first, batch_first=True)
    with pytest.raises(ValueError, match=r"batch_first: expected True for .* like the LSTM inside it, got None"):
        regularizer().attach(WeightDrop(time_first))
    with pytest.raises(TypeError, match="batch_first: expected True or False, got 1"):
        regularizer().attach(Own(GIVES["tensor"][0]), batch_first=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"batch_first: expected True for .* as the Own does not have it, got None"):
        regularizer().attach(Own(GIVES["tensor"][0]))
    assert not time_first._forward_hooks
    own = Own(GIVES["tensor"][0])
    for batch_first in (True, False):
        reg = regularizer()
        with reg.attach(own, batch_first=batch_first):
            raw = own(torch.randn(BATCH, TIME, HIDDEN))
            torch.testing.assert_close(penalty_of(reg), formula(raw, raw, int(batch_first)))


@pytest.mark.parametrize(
    ("give", "options", "error", "message"),
    [
        (lambda raw, state: None, {}, TypeError, r"expected the Own to return a tensor .* got NoneType, .*output="),
        (
            lambda raw, state: ([raw], state),
            {},
            TypeError,
            r"expected the Own to return a tensor .* got list, .*output=",
        ),
        (
            lambda raw, state: raw,
            {"output": str},
            TypeError,
            "output: expected the callable to pick a tensor .* got str",
        ),
        (lambda raw, state: state, {}, ValueError, r"from the Own, got \(3, 6\)\. If that is one time step, attach"),
        (lambda raw, state: raw, {"valid": lambda x: 1}, TypeError, "valid: expected the callable .* None, got int"),
    ],
)
def test_outputs_that_raw_cannot_be_read_from(
    give: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    module = Own(give)
    reg = regularizer()
    reg.attach(module, batch_first=True, **options)
    with pytest.raises(error, match=message):
        module(torch.randn(BATCH, TIME, HIDDEN))


def test_one_sequence_of_a_module_of_ones_own_is_asked_for() -> None:
    module, reg = nn.Linear(HIDDEN, HIDDEN), regularizer()
    reg.attach(module, output=lambda result: result, batch_first=True)
    raw = module(torch.randn(TIME, HIDDEN))
    torch.testing.assert_close(penalty_of(reg), formula(raw, raw, 0))


@pytest.mark.parametrize("kind", [nn.Dropout, FusedRNNDropout])
def test_valid_steps_come_from_what_the_module_is_called_with(kind: Any, formed: list[Any]) -> None:
    module, dropout, reg = Own(GIVES["tensor"][0]), kind(0.4), regularizer()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    reg.attach(module, dropout, batch_first=True, valid=lambda x, attention_mask=None: attention_mask)
    for marks in (mask, mask.bool(), None):
        raw = module(torch.randn(BATCH, TIME, HIDDEN), attention_mask=marks)
        dropped = dropout(raw)
        want = fused_ar_tar(raw, dropped, ALPHA, BETA, valid=marks)
        torch.testing.assert_close(penalty_of(reg, dropped), want)
        assert want != formula(raw, dropped, 1) or marks is None
    assert len(formed) == (0 if kind is FusedRNNDropout else 3)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", [nn.Dropout, FusedRNNDropout])
def test_starts_come_from_what_the_module_is_called_with(kind: Any, in_backward: bool, formed: list[Any]) -> None:
    module, dropout, reg = Own(GIVES["tensor"][0]), kind(0.4), regularizer()
    starts, mask = torch.rand(2, BATCH, TIME) < 0.3
    options: Any = {"starts": lambda x, attention_mask=None: starts, "valid": lambda x, attention_mask=None: mask}
    x, parameters = torch.randn(BATCH, TIME, HIDDEN), [*module.parameters()]

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        raw = module(x)
        return raw, dropout(raw)

    for given in ({"starts": options["starts"]}, options):
        with reg.attach(module, dropout, batch_first=True, in_backward=in_backward, **given):
            _, dropped = run()
            loss = dropped.mean() if in_backward else reg.on_backward_begin(dropped.mean())
            got = torch.autograd.grad(loss, parameters)
        raw, dropped = run()
        if isinstance(dropout, FusedRNNDropout):
            dropout.take()
        want = fused_ar_tar(raw, dropped, ALPHA, BETA, starts=starts, valid=mask if "valid" in given else None)
        torch.testing.assert_close(got, torch.autograd.grad(dropped.mean() + want, parameters))
        torch.testing.assert_close(ALPHA * reg.ar + BETA * reg.tar, want.detach())  # pyright: ignore[reportOptionalOperand]
    assert len(formed) == (0 if kind is FusedRNNDropout else 2)


def test_starts_that_a_dropout_gets_itself_count(formed: list[Any]) -> None:
    rnn, dropout, reg = nn.GRU(HIDDEN, HIDDEN, batch_first=True), FusedRNNDropout(0.4), regularizer()
    starts, others = torch.rand(2, BATCH, TIME) < 0.3
    reg.attach(rnn, dropout, starts=lambda *_: others)
    for args, kwargs in (((), {"starts": starts}), ((None, None, starts), {})):
        raw, _ = rnn(torch.randn(BATCH, TIME, HIDDEN))
        dropped = dropout(raw, *args, **kwargs)
        torch.testing.assert_close(penalty_of(reg, dropped), fused_ar_tar(raw, dropped, ALPHA, BETA, starts=starts))
    assert not formed


class Plain(FusedRNNDropout):
    """Takes no masks."""

    def forward(self, raw: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(raw)


@pytest.mark.parametrize("name", ["valid", "starts"])
def test_terms_of_a_dropout_without_masks_are_not_those_of_the_run(name: str, formed: list[Any]) -> None:
    rnn, dropout, reg = nn.GRU(HIDDEN, HIDDEN, batch_first=True), Plain(0.4), regularizer()
    marks = torch.rand(BATCH, TIME) < 0.5
    masks: dict[str, Any] = {name: lambda *_: marks}
    reg.attach(rnn, dropout, **masks)
    raw, _ = rnn(torch.randn(BATCH, TIME, HIDDEN))
    dropped = dropout(raw)
    torch.testing.assert_close(
        penalty_of(reg, dropped),
        fused_ar_tar(raw, dropped, ALPHA, BETA, **{name: marks}),  # pyright: ignore
    )
    assert len(formed) == 1


class Convolution(nn.Module):
    """Gives `(batch, channels, time, width)`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 3, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("time_dim", [2, -2])
@pytest.mark.parametrize("kind", [None, nn.Dropout, FusedRNNDropout])
def test_any_axis_of_time(kind: Any, time_dim: int, formed: list[Any]) -> None:
    module, reg = Convolution(), regularizer(layers="all")
    other = Convolution()
    dropout = None if kind is None else kind(0.4, **({"time_dim": time_dim} if kind is FusedRNNDropout else {}))
    reg.attach(module, dropout, time_dim=time_dim)
    reg.attach(other, time_dim=time_dim)
    raw = module(torch.randn(BATCH, 2, TIME, 5))
    dropped = raw if dropout is None else dropout(raw)
    more = other(torch.randn(BATCH, 2, TIME + 1, 5))
    want = fused_ar_tar(raw, dropped, ALPHA, BETA, time_dim=2) + fused_ar_tar(more, more, ALPHA, BETA, time_dim=2)
    parameters = [*module.parameters(), *other.parameters()]
    loss = dropped.mean() + more.mean()
    expected = torch.autograd.grad(loss + want, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(reg.on_backward_begin(loss), parameters), expected)
    assert len(formed) == (1 if kind is FusedRNNDropout else 2)  # runs of other time steps in a call of their own


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"time_dim": 2, "batch_first": True}, ValueError, "batch_first and time_dim: expected one of them, got both"),
        ({"time_dim": "2"}, TypeError, "time_dim: expected an int"),
        ({"time_dim": 2, "stepwise": True}, ValueError, "time_dim: expected None with stepwise"),
        ({"time_dim": 2, "dropout": FusedRNNDropout(0.4)}, ValueError, ".*with time_dim=2, got batch_first=True"),
        ({"time_dim": 1, "dropout": FusedRNNDropout(0.4)}, ValueError, ".*with time_dim=1, got batch_first=True"),
        ({"time_dim": 2, "dropout": FusedRNNDropout(0.4, time_dim=1)}, ValueError, ".*with time_dim=2, got time_dim=1"),
        (
            {"batch_first": True, "dropout": FusedRNNDropout(time_dim=1)},
            ValueError,
            ".*batch_first=True, .* time_dim=1",
        ),
        ({"batch_first": True, "starts": 3}, TypeError, "starts: expected a callable or None, got int"),
    ],
)
def test_axes_that_do_not_fit_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        regularizer().attach(Convolution(), **options)


def test_an_axis_that_is_not_there_is_refused() -> None:
    module, reg = Convolution(), regularizer()
    reg.attach(module, time_dim=4)
    with pytest.raises(ValueError, match=r"time_dim: expected an axis of raw, .*, from -4 to 3, got 4"):
        reg.on_backward_begin(module(torch.randn(BATCH, 2, TIME, 5)).mean())


def test_starts_that_are_no_tensor_are_refused() -> None:
    module, reg = Own(GIVES["tensor"][0]), regularizer()
    reg.attach(module, batch_first=True, starts=lambda *_, **__: [0])
    with pytest.raises(TypeError, match="starts: expected the callable to return a tensor or None, got list"):
        module(torch.randn(BATCH, TIME, HIDDEN))


def test_valid_steps_of_another_shape_are_refused() -> None:
    module, reg = Own(GIVES["tensor"][0]), regularizer()
    reg.attach(module, batch_first=True, valid=lambda x, attention_mask: attention_mask)
    raw = module(torch.randn(BATCH, TIME, HIDDEN), attention_mask=torch.ones(TIME, BATCH, dtype=torch.bool))
    with pytest.raises(ValueError, match="valid: expected"):
        penalty_of(reg, raw)


def test_valid_steps_that_a_dropout_gets_itself_count() -> None:
    rnn, dropout, reg = nn.GRU(HIDDEN, HIDDEN, batch_first=True), FusedRNNDropout(0.4), regularizer()
    reg.attach(rnn, dropout)
    mask = torch.rand(BATCH, TIME) < 0.7
    raw, _ = rnn(torch.randn(BATCH, TIME, HIDDEN))
    dropped = dropout(raw, valid=mask)
    torch.testing.assert_close(penalty_of(reg), fused_ar_tar(raw, dropped, ALPHA, BETA, valid=mask))


# Which runs belong to a step


@either
def test_every_run_of_a_step_counts() -> None:
    model = seeded(lambda: Model(p=0.5))
    reg = attached(model)
    first, second = model.activations(tokens()), model.activations(tokens().flip(1))
    loss = criterion(first[0], tokens()) + criterion(second[0], tokens())
    want = formula(*first[1:], time=1) + formula(*second[1:], time=1)
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, want)


@either
def test_two_runs_before_their_dropouts() -> None:
    model = seeded(Model)
    reg = attached(model)
    all_raw = [model.rnn(torch.randn(BATCH, TIME, HIDDEN))[0] for _ in range(2)]
    all_dropped = [model.dropout(raw) for raw in all_raw]
    loss = all_dropped[0].mean() + all_dropped[1].mean()
    want = sum(formula(raw, dropped, 1) for raw, dropped in zip(all_raw, all_dropped, strict=True))
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, want)


@pytest.mark.parametrize("run", [0, 1])
def test_a_loss_depends_on_a_run_by_any_of_its_inputs(run: int) -> None:
    rnn = seeded(lambda: nn.LSTM(HIDDEN, HIDDEN, batch_first=True))
    reg = regularizer()
    reg.attach(rnn)
    runs = [rnn(torch.randn(BATCH, TIME, HIDDEN))[0] for _ in range(2)]
    loss = torch.ones((), requires_grad=True) - runs[run].mean()
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(runs[run], runs[run], 1))


def test_runs_that_the_loss_sees_by_their_last_state_alone_count() -> None:
    rnn = seeded(lambda: nn.LSTM(HIDDEN, HIDDEN, batch_first=True))
    reg = regularizer()
    reg.attach(rnn)
    runs = [rnn(torch.randn(BATCH, TIME, HIDDEN)) for _ in range(2)]
    loss = (runs[0][1][0] - runs[1][1][0]).pow(2).mean()
    want = sum(formula(raw, raw, 1) for raw, _ in runs)
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, want)


@either
def test_runs_without_gradients() -> None:
    model = seeded(Model)
    reg = attached(model)
    decoded, raw, dropped = model.activations(tokens())
    with torch.no_grad():
        model(tokens())
    loss = criterion(decoded, tokens())
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(raw, dropped, 1))

    with torch.no_grad():
        decoded, raw, dropped = model.activations(tokens())
        loss = criterion(decoded, tokens())
        torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(raw, dropped, 1))
        decoded = model(tokens())
    with pytest.raises(RuntimeError, match="ran without gradients"):
        reg.on_backward_begin(torch.zeros((), requires_grad=True))
    with torch.inference_mode():
        model(tokens())
    with pytest.raises(RuntimeError, match="nothing was captured"):
        penalty_of(reg)


@either
def test_a_failed_step_is_not_seen_in_evaluation() -> None:
    model = seeded(Model)
    reg = attached(model)
    model(tokens())
    model.eval()
    loss = criterion(model(tokens()), tokens())
    assert reg.on_backward_begin(loss) is loss


@either
def test_evaluation_adds_nothing() -> None:
    model = seeded(Model).eval()
    reg = attached(model)
    loss = criterion(model(tokens()), tokens())
    assert reg.on_backward_begin(loss) is loss
    assert reg.ar is None
    model.train()
    decoded, raw, dropped = model.activations(tokens())
    model.eval()
    model(tokens())  # another run, as for targets, between a run and its backward
    loss = criterion(decoded, tokens())
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(raw, dropped, 1))


@either
def test_layers_in_evaluation_add_nothing() -> None:
    model = seeded(Stack)
    reg = regularizer(layers="all")
    for rnn, dropout in zip(model.rnns, model.dropouts, strict=True):
        reg.attach(rnn, dropout)
    model.rnns[2].eval()
    _, all_raw, all_dropped = model(tokens())
    want = formula(all_raw[0], all_dropped[0], 1) + formula(all_raw[1], all_dropped[1], 1)
    torch.testing.assert_close(penalty_of(reg), want)
    reg.layers = "last"
    model(tokens())
    assert penalty_of(reg) == 0


def test_an_rnn_in_evaluation_among_others_is_no_excuse() -> None:
    model, reg = seeded(Stack), regularizer(layers="all")
    for rnn, dropout in zip(model.rnns, model.dropouts, strict=True):
        reg.attach(rnn, dropout)
    model.rnns[2].eval()
    with pytest.raises(RuntimeError, match="nothing was captured"):
        penalty_of(reg)


@either
@pytest.mark.parametrize("gradients", [False, True])
def test_loops_without_the_penalty_do_not_pile_up_activations(gradients: bool) -> None:
    model = seeded(Model)
    attached_regularizer = attached(model)
    optimizer = Adam(model.parameters())
    alive: list[weakref.ref[Tensor]] = []
    for _ in range(4):
        with torch.set_grad_enabled(gradients):
            decoded, raw, _ = model.activations(tokens())
        alive.append(weakref.ref(raw))
        del raw
        if gradients:
            optimizer.zero_grad()
            criterion(decoded, tokens()).backward()
            optimizer.step()
    gc.collect()
    assert [ref() is not None for ref in alive] == [False, False, False, not gradients]  # decoded keeps no raw
    attached_regularizer.clear()
    assert alive[-1]() is None


# The lifetime of a capture


@either
@pytest.mark.parametrize("gradients", [False, True])
def test_forwards_that_nothing_follows_hold_one_run_at_most(gradients: bool) -> None:
    model = seeded(Model)
    reg = regularizer()
    handle = reg.attach(model.rnn, model.dropout)
    alive: list[weakref.ref[Tensor]] = []
    for _ in range(100):
        with torch.set_grad_enabled(gradients):
            raw = model.activations(tokens())[1]
        alive.append(weakref.ref(raw))
        del raw
        assert len(handle.runs) == (0 if gradients else 1)
    assert [ref() is not None for ref in alive[:-1]] == [False] * 99
    decoded, raw, dropped = model.activations(tokens())
    loss = criterion(decoded, tokens())
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(raw, dropped, 1))


@either
def test_a_penalty_from_a_later_epoch_on() -> None:
    """The optimizer leaves no trace in the versions of the weights, and the loss lives until the next one."""
    model, plain = seeded(Model), seeded(Model)
    reg = regularizer()
    handle = reg.attach(model.rnn, model.dropout)
    counts: list[int] = []
    for one in (model, plain):
        torch.manual_seed(2)
        optimizer = Adam(one.parameters(), fused=True)
        for epoch in range(8):
            decoded, raw, dropped = one.activations(tokens())
            loss = criterion(decoded, tokens())
            if epoch >= 5:
                loss = reg.on_backward_begin(loss) if one is model else loss + formula(raw, dropped, 1)
            counts.append(len(handle.runs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            del decoded, raw, dropped
    assert max(counts) <= 2
    assert_same([*model.parameters()], [*plain.parameters()])


@either
def test_windows_of_one_sequence_in_a_step() -> None:
    model, reg = seeded(lambda: Model(nn.GRU)), regularizer()
    reg.attach(model.rnn, model.dropout)
    state, losses, want = None, [], torch.zeros(())
    for window in tokens(BATCH, 3 * TIME).split(TIME, 1):
        raw, state = model.rnn(model.embedding(window), state)
        dropped = model.dropout(raw)
        losses.append(criterion(model.decoder(dropped), window))
        want = want + formula(raw, dropped, 1)
    loss = torch.stack(losses).sum()
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, want)


@either
def test_a_capture_goes_when_its_graph_does() -> None:
    model, reg = seeded(Model), regularizer()
    handle = reg.attach(model.rnn, model.dropout)
    losses = [criterion(model(tokens()), tokens()) for _ in range(3)]
    assert len(handle.runs) == 3
    del losses[0]
    assert len(handle.runs) == 2
    losses.clear()
    assert len(handle.runs) == 0


@either
def test_a_state_may_be_cut_off_in_place() -> None:
    """As training loops do that carry it from batch to batch."""
    model, plain = seeded(Model), seeded(Model)
    reg = attached(model)
    for one in (model, plain):
        torch.manual_seed(2)
        optimizer, state = SGD(one.parameters(), lr=0.5), None
        for _ in range(3):
            raw, state = one.rnn(one.embedding(tokens()), state)
            dropped = one.dropout(raw)
            loss = criterion(one.decoder(dropped), tokens())
            loss = reg.on_backward_begin(loss) if one is model else loss + formula(raw, dropped, 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for x in state:
                x.detach_()
            state[0].mul_(2)
    assert_same([*model.parameters()], [*plain.parameters()])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives_of_an_attached_model(p: float) -> None:
    model, plain = (seeded(lambda: Model(nn.RNN, p=p)).double() for _ in range(2))
    reg, second = attached(model), []
    for one in (model, plain):
        torch.manual_seed(2)
        decoded, raw, dropped = one.activations(tokens())
        loss = criterion(decoded, tokens())
        loss = reg.on_backward_begin(loss) if one is model else loss + formula(raw, dropped, 1)
        first = torch.autograd.grad(loss, [*one.parameters()], create_graph=True)
        squares = torch.stack([x.square().sum() for x in first]).sum()
        second.append(torch.autograd.grad(squares, [*one.parameters()]))
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives_without_the_activations_are_an_error(p: float) -> None:
    model = seeded(lambda: Model(nn.RNN, p=p)).double()
    reg = attached(model)
    loss = reg.on_backward_begin(criterion(model(tokens()), tokens()))
    with pytest.raises(RuntimeError, match="second derivatives need an activation that was freed; keep"):
        torch.autograd.grad(loss, [*model.parameters()], create_graph=True)


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_whose_dropped_the_loss_does_not_depend_on(kept: bool) -> None:
    model = seeded(Model)
    reg = attached(model)
    runs = [model.rnn(torch.randn(BATCH, TIME, HIDDEN))[0] for _ in range(2)]
    dropped = [model.dropout(raw) for raw in runs]
    loss = runs[0].sum() + runs[1].sum()
    if kept:
        want = sum(formula(r, d, 1) for r, d in zip(runs, dropped, strict=True)) + loss
        check_gradients(model, reg.on_backward_begin(loss), want)
        return
    dropped.clear()
    with pytest.raises(RuntimeError, match="the loss does not depend on the output of the attached Dropout, which was"):
        reg.on_backward_begin(loss)


# Other hooks


@either
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # the embedding's, for its integers
@pytest.mark.parametrize("where", ["rnn", "dropout", "global"])
def test_full_backward_hooks(where: str) -> None:
    model, plain = seeded(Model), seeded(Model)
    reg = attached(model)
    calls: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        calls.append(module)

    if where == "global":
        hooks = [nn.modules.module.register_module_full_backward_hook(note)]
    else:
        hooks = [getattr(one, where).register_full_backward_hook(note) for one in (model, plain)]

    def captured(x: Tensor) -> Tensor:
        return reg.on_backward_begin(criterion(model(x), x))

    def written_out(x: Tensor) -> Tensor:
        decoded, raw, dropped = plain.activations(x)
        return criterion(decoded, x) + formula(raw, dropped, 1)

    try:
        assert_same(train(model, captured, tokens()), train(plain, written_out, tokens()))
    finally:
        for hook in hooks:
            hook.remove()
    assert model.rnn in calls or where == "dropout"


@either
@pytest.mark.parametrize("where", ["rnn", "dropout", "both"])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_hooks_that_come_later_and_replace_an_output(where: str, with_dropout: bool) -> None:
    model, reg = seeded(Model), regularizer()
    reg.attach(model.rnn, model.dropout if with_dropout else None)
    if where != "dropout":
        model.rnn.register_forward_hook(lambda _m, _i, result: (result[0] * 2, result[1]))
    if where != "rnn":
        model.dropout.register_forward_hook(lambda _m, _i, result: result * 3)
    decoded, raw, dropped = model.activations(tokens())
    loss = criterion(decoded, tokens())
    want = formula(raw, dropped if with_dropout else raw, 1)
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, want)


@either
@pytest.mark.parametrize("count", [1, 100])
def test_hooks_go_with_their_regularizer(count: int) -> None:
    model = seeded(Model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    regs = [attached(model) for _ in range(count)]
    handles = [reg.attach(model.decoder, batch_first=True) for reg in regs]
    assert len(model.rnn._forward_hooks) == count
    model(tokens())
    regs.clear()
    gc.collect()
    for name, module in model.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert set(vars(module)) == before[name]
    assert not any(handle.runs for handle in handles)
    with torch.no_grad():
        x = torch.randn(2, HIDDEN)
        assert torch.equal(
            torch.jit.script(model.decoder)(x), model.decoder(x)
        )  # which hooks would not let be scripted


def test_a_replica_of_data_parallel_is_refused() -> None:
    """Which runs on each device, so that each penalty would count in full."""
    module, reg = Own(GIVES["tensor"][0]), regularizer()
    reg.attach(module, batch_first=True)
    replica = module._replicate_for_data_parallel()
    replica.weight = module.weight.detach()
    with pytest.raises(RuntimeError, match=r"attach: DataParallel runs a replica of the attached Own .* on_loss_begin"):
        replica(torch.randn(BATCH, TIME, HIDDEN))
    replica.eval()(torch.randn(BATCH, TIME, HIDDEN))


# Copies and pickles


LOAD = """
import sys, torch
sys.modules["fastreg"] = None  # an import fails
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    model = torch.load(name, weights_only=False)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name
        assert not module._forward_hooks_with_kwargs and not module._forward_pre_hooks_with_kwargs, name
        assert "__getstate__" not in vars(module), name
    print(tuple(model(torch.zeros(2, 3, 4))[0].shape))
"""


def test_a_saved_model_loads_without_fastreg(tmp_path: Path) -> None:
    rnn, dropout = nn.LSTM(4, 5, batch_first=True), nn.Dropout(0.3)
    regs = [regularizer(), regularizer()]
    for reg in regs:
        reg.attach(rnn, dropout)
    dropout(rnn(torch.zeros(2, 3, 4))[0])
    for name, what in (("model", nn.Sequential(rnn)), ("module", rnn)):
        torch.save(what, tmp_path / name)
    paths = [str(tmp_path / name) for name in ("model", "module")]
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["(2, 3, 5)", "(2, 3, 5)"]
    assert len(rnn._forward_hooks) == 2


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_keep_the_hooks_of_others(duplicate: Callable[[Any], Any]) -> None:
    rnn = OutputAlone(4, 5, batch_first=True)
    rnn.register_forward_hook(double)
    reg = regularizer()
    handle = reg.attach(rnn)
    twin = duplicate(rnn)
    assert [*twin._forward_hooks.values()] == [double]
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), 2 * twin.forward(x))
        assert not handle.runs
        assert torch.equal(twin(x), rnn(x))
    assert twin.state_dict().keys() == rnn.state_dict().keys()


def double(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return 2 * output


class OwnState(OutputAlone):
    """Pickles itself in a way of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mark": 3}


class OwnCopy(OutputAlone):
    """Copies itself in a way of its own, hooks and all."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        made = memo[id(self)] = object.__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


def test_hooks_that_are_copied_do_nothing() -> None:
    rnn, reg = OwnCopy(4, 5, batch_first=True), regularizer()
    handle = reg.attach(rnn)
    twin = copy.deepcopy(rnn)
    assert torch.equal(twin(torch.ones(2, 3, 4)), twin.forward(torch.ones(2, 3, 4)))
    assert not handle.runs
    with torch.no_grad():
        twin.weight_ih_l0.zero_()
    again = pickle.loads(pickle.dumps(twin))
    assert not again._forward_hooks
    assert torch.equal(again.weight_ih_l0, twin.weight_ih_l0)
    twin_reg = regularizer()
    twin_reg.attach(twin)
    raw = twin(torch.ones(2, 3, 4))
    torch.testing.assert_close(penalty_of(twin_reg), formula(raw, raw, 1))


def test_modules_with_a_state_of_their_own_are_copied_with_it() -> None:
    rnn, reg = OwnState(4, 5), regularizer()
    reg.attach(rnn)
    twin = copy.deepcopy(rnn)
    assert twin.mark == 3
    assert not twin._forward_hooks


# Checkpointing and compilation


@either
def test_checkpointing() -> None:
    model, plain = seeded(Model), seeded(Model)
    reg = attached(model)

    def checkpointed(x: Tensor) -> Tensor:
        return reg.on_backward_begin(criterion(checkpoint(model, x, use_reentrant=False), x))

    def written_out(x: Tensor) -> Tensor:
        decoded, raw, dropped = plain.activations(x)
        return criterion(decoded, x) + formula(raw, dropped, 1)

    assert_same(train(model, checkpointed, tokens()), train(plain, written_out, tokens()))
    with pytest.raises(RuntimeError, match="nothing was captured"):  # not even by the recomputation
        penalty_of(reg)


@pytest.mark.parametrize("part", ["both", "dropout"])
@pytest.mark.parametrize("names", [["valid"], ["starts"], ["valid", "starts"]])
def test_checkpointing_of_a_fused_dropout_that_gets_marks(part: str, names: list[str]) -> None:
    module, dropout, reg = seeded(lambda: nn.GRU(HIDDEN, HIDDEN, batch_first=True)), FusedRNNDropout(0.4), regularizer()
    marks = {name: torch.rand(BATCH, TIME) < 0.6 for name in names}
    functions: Any = {name: lambda *_, given=given: given for name, given in marks.items()}
    x, parameters = torch.randn(BATCH, TIME, HIDDEN), [*module.parameters()]
    with reg.attach(module, dropout, **functions):
        torch.manual_seed(1)
        if part == "both":
            dropped = checkpoint(lambda x: dropout(module(x)[0]), x, use_reentrant=False)
        else:
            dropped = checkpoint(dropout, module(x)[0], use_reentrant=False)
        got = torch.autograd.grad(reg.on_backward_begin(dropped.mean()), parameters)
    torch.manual_seed(1)
    raw, _ = module(x)
    dropped = dropout(raw)
    assert dropout.take() is not None
    want = dropped.mean() + fused_ar_tar(raw, dropped, ALPHA, BETA, **marks)
    torch.testing.assert_close(got, torch.autograd.grad(want, parameters))


@either
def test_reentrant_checkpointing_is_refused() -> None:
    model = seeded(Model)
    reg = regularizer()
    handle = reg.attach(model.rnn, model.dropout)

    def rest(embedded: Tensor) -> Tensor:
        return model.decoder(model.dropout(model.rnn(embedded)[0]))

    def decoded() -> Tensor:
        return checkpoint(rest, model.embedding(tokens()), use_reentrant=True)

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reg.on_backward_begin(criterion(decoded(), tokens()))
    loss = criterion(decoded(), tokens())
    reg.clear()
    _, raw, dropped = model.activations(tokens())
    loss.backward()  # recomputes, while a capture waits
    assert len(handle.runs) == 1
    torch.testing.assert_close(penalty_of(reg), formula(raw, dropped, 1))


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    yield torch._dynamo.config
    torch._dynamo.reset()


@either
@pytest.mark.parametrize("allow_rnn", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attached_before_compilation(backend: str, allow_rnn: bool, dynamo: Any) -> None:
    model, plain = seeded(lambda: Model(p=0)), seeded(lambda: Model(p=0))
    reg = attached(model)

    def written_out(x: Tensor) -> Tensor:
        decoded, raw, dropped = plain.activations(x)
        return criterion(decoded, x) + formula(raw, dropped, 1)

    with dynamo.patch(allow_rnn=allow_rnn):
        compiled = torch.compile(model, backend=backend)
        got = train(model, lambda x: reg.on_backward_begin(criterion(compiled(x), x)), tokens())
    assert_same(got, train(plain, written_out, tokens()))


def test_attached_after_a_compiled_run(dynamo: Any) -> None:
    model = seeded(Model)
    with dynamo.patch(allow_rnn=True):  # without it, torch leaves RNNs uncompiled
        compiled = torch.compile(model, backend="eager")
        compiled(tokens())
        reg = attached(model)
        loss = criterion(compiled(tokens()), tokens())
        with pytest.raises(RuntimeError, match=r"attach\(\) before torch.compile"):
            reg.on_backward_begin(loss)


def test_compiled_modules_are_refused() -> None:
    model = seeded(Model)
    with pytest.raises(RuntimeError, match=r"module: .*compiled already; attach\(\) it before torch.compile"):
        regularizer().attach(torch.compile(model.rnn, backend="eager"))  # pyright: ignore[reportArgumentType]
    model.dropout.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"dropout: .*compiled already"):
        regularizer().attach(model.rnn, model.dropout)
    assert not model.rnn._forward_hooks


# Handles and misuse


@either
def test_handles() -> None:
    model = seeded(Model)
    reg = regularizer()
    with reg.attach(model.rnn, model.dropout) as handle:
        assert penalty_of(reg, model(tokens())) > 0
        decoded = model(tokens())
        assert handle.runs
    assert not handle.runs
    del decoded
    assert not model.rnn._forward_hooks
    assert not model.dropout._forward_hooks
    handle.remove()  # twice is once
    output = model.activations(tokens())
    reg.on_loss_begin(output)  # and is free for the other way
    torch.testing.assert_close(penalty_of(reg), formula(*output[1:], time=1))
    with pytest.raises(KeyError), reg.attach(model.rnn):
        raise KeyError
    assert not model.rnn._forward_hooks


@either
def test_a_forgotten_regularizer_captures_nothing() -> None:
    model = seeded(Model)
    attachment = regularizer().attach(model.rnn, model.dropout)
    gc.collect()
    model(tokens())
    assert not attachment.runs


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((nn.LSTMCell(1, 1), None), "module: expected one that runs over all time steps, got LSTMCell"),
        (("lstm", None), "module: expected an nn.Module, got str"),
        ((nn.LSTM(1, 1), 0.5), "dropout: expected an nn.Module, got float"),
        ((torch.jit.script(nn.Linear(1, 1)), None), "module: .* got a ScriptModule; let an nn.Module call it"),
        ((nn.LSTM(1, 1), torch.jit.script(nn.Dropout())), "dropout: .* got a ScriptModule"),
    ],
)
def test_modules_refused(modules: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        regularizer().attach(*modules)


def test_a_dropout_that_returns_no_tensor_is_refused() -> None:
    model = nn.Sequential(nn.LSTM(1, 4), nn.Identity(), nn.LSTM(4, 4))
    reg = regularizer()
    reg.attach(model[0], model[2])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="dropout: expected the attached LSTM to return a tensor, got tuple"):
        model[2](model[0](torch.zeros(2, 3, 1))[0])


@pytest.mark.parametrize("between", [lambda x: x[:, 1:], torch.relu, lambda x: x.transpose(0, 1)])
def test_a_dropout_that_did_not_get_the_output(between: Callable[[Tensor], Tensor]) -> None:
    model = seeded(Model)
    reg = attached(model)
    raw, _ = model.rnn(torch.randn(BATCH, TIME, HIDDEN))
    loss = model.dropout(between(raw)).mean()
    with pytest.raises(RuntimeError, match=r"attached Dropout did not get the output of the LSTM: something lies"):
        reg.on_backward_begin(loss)


@either
@pytest.mark.parametrize("without", ["rnn", "dropout"])
def test_a_run_of_either_without_gradients_is_refused(without: str) -> None:
    model = seeded(Model)
    reg = attached(model)
    with torch.set_grad_enabled(without != "rnn"):
        raw, _ = model.rnn(torch.randn(BATCH, TIME, HIDDEN))
    with torch.set_grad_enabled(without != "dropout"):
        model.dropout(raw)
    with pytest.raises(RuntimeError, match="the LSTM or its dropout ran without gradients"):
        reg.on_backward_begin(model.decoder.weight.mean())


@pytest.mark.parametrize(("dropped_in_place", "kind"), [(False, Model), (True, Model), (True, Fused)])
def test_changes_in_place_are_refused(dropped_in_place: bool, kind: type[Model]) -> None:
    model = seeded(kind)
    reg = attached(model)
    if not dropped_in_place:
        model.dropout.inplace = True
    _, _, dropped = model.activations(tokens())
    if dropped_in_place:
        dropped.relu_()
    with pytest.raises(RuntimeError, match="changed in place"):
        penalty_of(reg)


@pytest.mark.parametrize(
    "dropout", [nn.Dropout(0.0), nn.Identity(), FusedRNNDropout(0.0)], ids=lambda x: type(x).__name__
)
def test_steps_without_a_penalty_leave_no_run_where_nothing_is_dropped(dropout: nn.Module) -> None:
    rnn = nn.GRU(5, 6, batch_first=True)
    regularizer = RNNRegularizer(2.0, 1.0)
    attachment = regularizer.attach(rnn, dropout)
    for _ in range(4):
        dropout(rnn(torch.randn(2, 3, 5))[0]).sum().backward()
    assert len(attachment.runs) == 0


class Answer:
    """An opaque object, which hides its tensor from attach."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.rnn(x)[0])


def test_runs_that_return_an_opaque_object_all_count() -> None:
    model, regularizer = Answering(), RNNRegularizer(2.0, 1.0)
    regularizer.attach(model, output=lambda answer: answer.hidden)
    first, second = model(torch.randn(2, 3, 4)).hidden, model(torch.randn(2, 3, 4)).hidden
    got = regularizer.on_backward_begin((first + second).sum())
    want = (first + second).sum() + sum(fused_ar_tar(x, x, 2.0, 1.0) for x in (first, second))
    torch.testing.assert_close(got, want)


def test_runs_that_return_leaves_all_count() -> None:
    module, regularizer = nn.Identity(), RNNRegularizer(2.0, 1.0)
    regularizer.attach(module, batch_first=True)
    leaves = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    first, second = map(module, leaves)
    got = regularizer.on_backward_begin((first + second).sum())
    torch.testing.assert_close(got, (first + second).sum() + sum(fused_ar_tar(x, x, 2.0, 1.0) for x in leaves))


class Pair(tuple[Tensor, Tensor]):
    """A tuple that is made of its items one by one, and has something of its own."""

    extra: str

    def __new__(cls, first: Tensor, second: Tensor) -> Pair:
        new = super().__new__(cls, (first, second))
        new.extra = "kept"
        return new


def test_a_tuple_of_a_kind_of_its_own_stays_one() -> None:
    class Pairing(Answering):
        def forward(self, x: Tensor) -> Any:
            return Pair(*self.rnn(x))

    model = Pairing()
    regularizer = RNNRegularizer(2.0, 1.0)
    regularizer.attach(model)
    pair = model(torch.randn(2, 3, 4))
    assert type(pair) is Pair
    assert pair.extra == "kept"
    assert pair[0].requires_grad
