"""`RNNRegularizer.attach`: which runs the hooks capture, in which layouts, and which of them belong to a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from fastreg import fused_ar_tar
from tests.language_model import (
    BATCH,
    HIDDEN,
    TIME,
    Fused,
    Model,
    Stack,
    assert_same,
    attached,
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
            module(input=raw)
            torch.testing.assert_close(penalty_of(reg), formula(raw, factor * raw, 1))


@pytest.mark.parametrize("how", ["packed", "data", "padded"])
def test_packed_sequences(how: str) -> None:
    model = seeded(Model)
    packed = pack_padded_sequence(torch.randn(BATCH, TIME, HIDDEN), torch.tensor([7, 4, 2]), batch_first=True)
    reg = regularizer()
    handle = reg.attach(model.rnn, model.dropout)
    raw, _ = model.rnn(packed)
    assert isinstance(raw, PackedSequence)
    if how == "padded":
        model.dropout(pad_packed_sequence(raw)[0])
        with pytest.raises(RuntimeError, match=r"did not get the output of the LSTM: .*packing, padding"):
            penalty_of(reg)
    elif how == "data":
        dropped = model.dropout(raw.data)
        (captured,) = handle.activations(torch.zeros(()))
        assert torch.equal(captured.raw.data, raw.data)
        assert isinstance(captured.dropped, PackedSequence)
        assert torch.equal(captured.dropped.data, dropped)
        assert torch.equal(captured.dropped.batch_sizes, raw.batch_sizes)
        assert penalty_of(reg) == fused_ar_tar(raw, captured.dropped, reg.alpha, reg.beta)
    else:
        reg = regularizer()
        handle = reg.attach(model.rnn.train())
        raw, _ = model.rnn(packed)
        (captured,) = handle.activations(torch.zeros(()))
        assert torch.equal(captured.raw.data, raw.data)
        assert captured.dropped is captured.raw
        assert penalty_of(reg) == fused_ar_tar(raw, raw, reg.alpha, reg.beta)
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
    assert [ref() is not None for ref in alive] == [False, False, False, True]
    attached_regularizer.clear()
    assert alive[-1]() is None


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
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
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
        model(tokens())
        assert penalty_of(reg) > 0
        model(tokens())
    assert not handle.runs
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
def test_a_dropout_without_gradients_is_refused() -> None:
    model = seeded(Model)
    reg = attached(model)
    raw, _ = model.rnn(torch.randn(BATCH, TIME, HIDDEN))
    with torch.no_grad():
        model.dropout(raw)
    with pytest.raises(RuntimeError, match="the LSTM or its dropout ran without gradients"):
        reg.on_backward_begin(raw.mean())


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
