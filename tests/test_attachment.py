"""`RNNRegularizer.attach`: which runs the hooks capture, in which layouts, and which of them belong to a step."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout, fused_ar_tar
from fastreg.attachment import ROOM
from tests.conftest import without
from tests.language_model import (
    ALPHA,
    BATCH,
    BETA,
    HIDDEN,
    TIME,
    Fused,
    Model,
    assert_same,
    attached,
    check_gradients,
    criterion,
    either,
    formula,
    gru,
    inputs,
    penalty_of,
    regularizer,
    seeded,
    tokens,
    train,
    with_hooks,
    written_out,
)


@either
@pytest.mark.parametrize(
    ("kind", "options", "shape", "time"),
    [
        (nn.LSTM, {}, (BATCH, TIME), 1),
        (nn.LSTM, {"batch_first": False}, (TIME, BATCH), 0),
        (nn.LSTM, {"bidirectional": True}, (BATCH, TIME), 1),
        (nn.LSTM, {}, (TIME,), 0),
        (nn.LSTM, {}, (1, TIME), 1),
        (nn.GRU, {"bidirectional": True, "batch_first": False, "num_layers": 2}, (TIME, BATCH), 0),
        (nn.RNN, {}, (BATCH, TIME), 1),
    ],
    ids=["lstm", "time_first", "bidirectional", "unbatched", "batch_of_one", "gru_of_two_layers_time_first", "rnn"],
)
def test_trains_the_weights_of_the_formula(
    kind: Any, options: dict[str, Any], shape: tuple[int, ...], time: int, device: str
) -> None:
    model, plain, without = (seeded(lambda: Model(kind, **options)).to(device) for _ in range(3))
    x = tokens(*shape, device=device)
    got = train(model, with_hooks(model, attached(model)), x)
    unlike = train(without, lambda x: criterion(without(x), x), x)
    assert_same(got, train(plain, written_out(plain, time), x), unlike)


class ByKeyword(nn.Module):
    def forward(self, *, input: Tensor) -> Tensor:
        return 2 * input


@pytest.mark.parametrize(
    "dropout", [ByKeyword(), nn.Sequential(nn.Dropout(0.0), nn.Identity())], ids=["own", "several"]
)
def test_any_module_may_be_the_dropout(dropout: nn.Module) -> None:
    rnn, reg = gru(), regularizer()
    reg.attach(rnn, dropout)
    raw, _ = rnn(inputs())
    dropped = dropout(input=raw)
    check_gradients(rnn, penalty_of(reg, dropped), formula(raw, dropped, 1))


@pytest.mark.parametrize("dropout", ["none", "of the data", "of the padded output"])
def test_packed_sequences(dropout: str) -> None:
    model, reg = seeded(Model), regularizer()
    reg.attach(model.rnn, None if dropout == "none" else model.dropout)
    packed = pack_padded_sequence(inputs(), torch.tensor([7, 4, 2]), batch_first=True)
    raw, _ = model.rnn(packed)
    assert isinstance(raw, PackedSequence)
    if dropout == "of the padded output":
        dropped = model.dropout(pad_packed_sequence(raw)[0])
        with pytest.raises(RuntimeError, match=r"did not get the output of the LSTM: .*packing, padding"):
            penalty_of(reg, dropped)
        return
    rows = raw.data if dropout == "none" else model.dropout(raw.data)
    check_gradients(model, penalty_of(reg, rows), fused_ar_tar(raw, raw._replace(data=rows), ALPHA, BETA))


# Any module, and how its output is read


class Own(nn.Module):
    """A recurrent layer without a `batch_first`; the test chooses its output."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any] = lambda raw, state: raw) -> None:
        super().__init__()
        self.weight, self.give = nn.Parameter(torch.randn(HIDDEN, HIDDEN)), give

    def forward(self, x: Tensor, valid: Tensor | None = None, starts: Tensor | None = None) -> Any:
        steps = [torch.zeros_like(x[:, 0])]
        for step in x.unbind(1):
            steps.append(torch.tanh(step + steps[-1] @ self.weight))
        self.raw = torch.stack(steps[1:], 1)
        return self.give(self.raw, steps[-1])


class OutputAlone(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)[0]


@pytest.mark.parametrize(
    ("module", "options", "shape", "axis"),
    [
        (Own(), {"batch_first": True}, (BATCH, TIME, HIDDEN), 1),
        (Own(), {"batch_first": False}, (BATCH, TIME, HIDDEN), 0),
        (nn.Linear(HIDDEN, HIDDEN), {"batch_first": True, "output": lambda result: result}, (TIME, HIDDEN), 0),
        (OutputAlone(HIDDEN, HIDDEN, batch_first=True), {}, (1, TIME, HIDDEN), 1),
        (OutputAlone(HIDDEN, HIDDEN, batch_first=True), {}, (2, TIME, HIDDEN), 1),
    ],
    ids=["batch_first", "time_first", "one sequence, picked", "an LSTM's batch of one", "an LSTM's batch"],
)
def test_the_layout_of_any_module(module: nn.Module, options: Any, shape: tuple[int, ...], axis: int) -> None:
    reg = regularizer()
    with reg.attach(module, **options):
        raw = module(torch.randn(shape))
        torch.testing.assert_close(penalty_of(reg), formula(raw, raw, axis))


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


@pytest.mark.parametrize("locked", [LockedDropout(), FusedRNNDropout(batch_first=False)], ids=["plain", "fused"])
def test_a_wrapper_is_attached_instead_of_the_module_inside(locked: nn.Module) -> None:
    rnn, reg = WeightDrop(nn.LSTM(HIDDEN, HIDDEN)), regularizer()
    with reg.attach(rnn, locked, batch_first=False):
        raw, _ = rnn(torch.randn(TIME, BATCH, HIDDEN))
        dropped = locked(raw, 0.4)
        assert (dropped == 0).any()
        torch.testing.assert_close(penalty_of(reg), formula(raw, dropped, 0))
    reg.attach(rnn.module)
    rnn(torch.randn(TIME, BATCH, HIDDEN))
    with pytest.raises(RuntimeError, match=r"wrapper calls the forward\(\) of a module inside .* attach the wrapper"):
        penalty_of(reg)


def convolution() -> nn.Module:
    """Return a module whose output is `(batch, channels, time, width)`."""
    return nn.Conv2d(2, 3, (1, 3), padding=(0, 1))


@pytest.mark.parametrize("time_dim", [2, -2])
@pytest.mark.parametrize("kind", [None, nn.Dropout, FusedRNNDropout])
def test_any_axis_of_time(kind: Any, time_dim: int, formed: list[Any]) -> None:
    modules, reg = nn.ModuleList([convolution(), convolution()]), regularizer(layers="all")
    dropout = None if kind is None else kind(0.4, **({"time_dim": time_dim} if kind is FusedRNNDropout else {}))
    reg.attach(modules[0], dropout, time_dim=time_dim)
    reg.attach(modules[1], time_dim=time_dim)
    raw = modules[0](torch.randn(BATCH, 2, TIME, 5))
    dropped = raw if dropout is None else dropout(raw)
    more = modules[1](torch.randn(BATCH, 2, TIME + 1, 5))
    want = fused_ar_tar(raw, dropped, ALPHA, BETA, time_dim=2) + fused_ar_tar(more, more, ALPHA, BETA, time_dim=2)
    loss = dropped.mean() + more.mean()
    check_gradients(modules, reg.on_backward_begin(loss), loss + want)
    assert len(formed) == (1 if kind is FusedRNNDropout else 2)  # runs of other time steps in a call of their own


# Valid steps and starts of segments

VALID = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
STARTS = torch.tensor([[1, 0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]]).bool()
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "valid": {"valid": VALID},
    "integers": {"valid": VALID.long()},
    "starts": {"starts": STARTS},
    "both": {"valid": VALID, "starts": STARTS},
}


@pytest.mark.parametrize("how", ["with the loss", "in the backward", "checkpoint", "checkpoint of the dropout"])
@pytest.mark.parametrize("kind", [nn.Dropout, FusedRNNDropout])
@pytest.mark.parametrize("given", MASKS)
def test_masks_come_from_the_arguments_of_the_module(given: str, kind: Any, how: str, formed: list[Any]) -> None:
    module, dropout, reg, x, masks = Own(), kind(0.4), regularizer(), inputs(), MASKS[given]
    functions: Any = {
        "valid": lambda x, valid=None, starts=None: valid,
        "starts": lambda x, valid=None, starts=None: starts,
    }
    functions = {name: functions[name] for name in masks or functions}
    in_backward = how == "in the backward"
    torch.manual_seed(1)
    with reg.attach(module, dropout, batch_first=True, in_backward=in_backward, **functions):
        if how == "checkpoint":
            dropped = checkpoint(lambda x: dropout(module(x, **masks)), x, use_reentrant=False)
        elif how == "checkpoint of the dropout":
            dropped = checkpoint(dropout, module(x, **masks), use_reentrant=False)
        else:
            dropped = dropout(module(x, **masks))
        assert isinstance(dropped, Tensor)
        loss = dropped.mean() if in_backward else reg.on_backward_begin(dropped.mean())
        got = torch.autograd.grad(loss, [*module.parameters()])
    torch.manual_seed(1)
    raw = module(x)
    dropped = dropout(raw)
    want = fused_ar_tar(raw, dropped, ALPHA, BETA, **masks)
    torch.testing.assert_close(got, torch.autograd.grad(dropped.mean() + want, [*module.parameters()]))
    torch.testing.assert_close(ALPHA * reg.ar + BETA * reg.tar, want.detach())  # pyright: ignore[reportOptionalOperand]
    assert len(formed) == (kind is nn.Dropout)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("given", ["attach", "dropout", "both"])
@pytest.mark.parametrize("name", ["valid", "starts"])
def test_masks_of_the_dropout_go_before_those_of_the_module(name: str, given: str, p: float, formed: list[Any]) -> None:
    rnn, dropout, reg = gru(), FusedRNNDropout(p), regularizer()
    of_module, of_dropout = torch.rand(2, BATCH, TIME) < 0.6
    functions: Any = {} if given == "dropout" else {name: lambda *_: of_module}
    reg.attach(rnn, dropout, **functions)
    by_position = (None, of_dropout) if name == "valid" else (None, None, of_dropout)
    want = {name: of_module if given == "attach" else of_dropout}
    for args, kwargs in [((), {})] if given == "attach" else [((), {name: of_dropout}), (by_position, {})]:
        raw, _ = rnn(inputs())
        dropped = dropout(raw, *args, **kwargs)
        check_gradients(rnn, penalty_of(reg, dropped), fused_ar_tar(raw, dropped, ALPHA, BETA, **want))  # pyright: ignore
    assert bool(formed) == (p == 0)


class WithoutMasks(FusedRNNDropout):
    def forward(self, raw: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(raw)


@pytest.mark.parametrize("name", ["valid", "starts"])
def test_the_terms_of_a_dropout_without_masks_are_not_taken(name: str, formed: list[Any]) -> None:
    rnn, dropout, reg = gru(), WithoutMasks(0.4), regularizer()
    masks = MASKS[name]
    reg.attach(rnn, dropout, **{name: lambda *_: masks[name]})  # pyright: ignore[reportArgumentType]
    raw, _ = rnn(inputs())
    dropped = dropout(raw)
    check_gradients(rnn, penalty_of(reg, dropped), fused_ar_tar(raw, dropped, ALPHA, BETA, **masks))
    assert len(formed) == 1


# Which runs belong to a step


@either
def test_windows_of_one_sequence_all_count() -> None:
    model, state = seeded(Model), None
    reg, loss, penalty = attached(model), torch.zeros(()), torch.zeros(())
    for window in tokens(BATCH, 3 * TIME).split(TIME, 1):
        raw, state = model.rnn(model.embedding(window), state)
        dropped = model.dropout(raw)
        loss, penalty = loss + criterion(model.decoder(dropped), window), penalty + formula(raw, dropped, 1)
    check_gradients(model, reg.on_backward_begin(loss), loss + penalty)


def test_runs_that_return_leaves_all_count() -> None:
    module, reg = nn.Identity(), regularizer()
    reg.attach(module, batch_first=True)
    first, second = (module(inputs().requires_grad_()) for _ in range(2))
    loss = (first + second).sum()
    want = loss + formula(first, first, 1) + formula(second, second, 1)
    torch.testing.assert_close(reg.on_backward_begin(loss), want)


@either
def test_a_run_without_gradients_counts_for_a_loss_without() -> None:
    model = seeded(Model)
    reg = attached(model)
    with torch.no_grad():
        decoded, raw, dropped = model.activations(tokens())
        loss = criterion(decoded, tokens())
        torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(raw, dropped, 1))
    with torch.inference_mode():
        model(tokens())
    with pytest.raises(RuntimeError, match="nothing was captured"):
        penalty_of(reg)


@either
@pytest.mark.parametrize("failed", [False, True])
def test_evaluation_adds_nothing(failed: bool) -> None:
    model = seeded(Model)
    reg = attached(model)
    if failed:
        model(tokens())  # of a step that failed
    model.eval()
    loss = criterion(model(tokens()), tokens())
    assert reg.on_backward_begin(loss) is loss
    assert reg.ar is None


# The lifetime of a capture


@either
@pytest.mark.parametrize("loop", ["forwards without gradients", "forwards", "steps"])
def test_loops_without_the_penalty_hold_one_run_at_most(loop: str) -> None:
    """Where the optimizer leaves the versions of the weights, and the loss lives until the next one, too."""
    model, reg = seeded(Model), regularizer()
    handle, alive = reg.attach(model.rnn, model.dropout), []
    optimizer = Adam(model.parameters(), fused=True)
    for _ in range(ROOM + 6):
        with torch.set_grad_enabled(loop != "forwards without gradients"):
            decoded, raw, _ = model.activations(tokens())
        alive.append(weakref.ref(raw))
        del raw, _
        if loop == "steps":  # after which decoded keeps no raw
            loss = criterion(decoded, tokens())
            loss.backward()
            optimizer.step()
        else:
            del decoded
        assert len(handle.runs) == (loop != "forwards")
    assert [ref() is not None for ref in alive] == [False] * (ROOM + 5) + [loop == "forwards without gradients"]
    decoded, raw, dropped = model.activations(tokens())
    loss = criterion(decoded, tokens())
    check_gradients(model, reg.on_backward_begin(loss), loss + formula(raw, dropped, 1))


@pytest.mark.parametrize(
    "dropout", [nn.Dropout(0.0), nn.Identity(), FusedRNNDropout(0.0)], ids=lambda x: type(x).__name__
)
def test_steps_without_the_penalty_hold_no_run_where_nothing_is_dropped(dropout: nn.Module) -> None:
    rnn, reg = gru(), regularizer()
    attachment = reg.attach(rnn, dropout)
    for _ in range(4):
        dropout(rnn(inputs())[0]).sum().backward()
    assert len(attachment.runs) == 0


@either
def test_a_state_may_be_detached_in_place() -> None:
    """As training loops do that carry it from batch to batch."""
    model, state = seeded(Model), None
    reg = attached(model)
    for _ in range(3):
        raw, state = model.rnn(model.embedding(tokens()), state)
        dropped = model.dropout(raw)
        loss = criterion(model.decoder(dropped), tokens())
        check_gradients(model, reg.on_backward_begin(loss), loss + formula(raw, dropped, 1))
        for x in state:
            x.detach_()
        state[0].mul_(2)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives(p: float) -> None:
    model = seeded(lambda: Model(nn.RNN, p=p)).double()
    reg, second = attached(model), []
    for hooked in (True, False):
        torch.manual_seed(2)
        decoded, raw, dropped = model.activations(tokens())
        loss = criterion(decoded, tokens())
        loss = reg.on_backward_begin(loss) if hooked else loss + formula(raw, dropped, 1)
        first = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
        squares = torch.stack([x.square().sum() for x in first]).sum()
        second.append(torch.autograd.grad(squares, [*model.parameters()]))
    torch.testing.assert_close(*second)
    loss = reg.on_backward_begin(criterion(model(tokens()), tokens()))
    with pytest.raises(RuntimeError, match="second derivatives need an activation that was freed; keep"):
        torch.autograd.grad(loss, [*model.parameters()], create_graph=True)


@pytest.mark.parametrize("kept", [False, True])
def test_runs_whose_dropped_the_loss_does_not_depend_on(kept: bool) -> None:
    model = seeded(Model)
    reg = attached(model)
    raws = [model.rnn(inputs())[0] for _ in range(2)]
    dropped = [model.dropout(raw) for raw in raws]
    loss = raws[0].sum() + raws[1].sum()
    if kept:
        want = loss + formula(raws[0], dropped[0], 1) + formula(raws[1], dropped[1], 1)
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
    model, calls = seeded(Model), []
    reg, note = attached(model), lambda module, *_: calls.append(module)
    if where == "global":
        hook = nn.modules.module.register_module_full_backward_hook(note)
    else:
        hook = getattr(model, where).register_full_backward_hook(note)
    try:
        decoded, raw, dropped = model.activations(tokens())
        loss = criterion(decoded, tokens())
        check_gradients(model, reg.on_backward_begin(loss), loss + formula(raw, dropped, 1))
    finally:
        hook.remove()
    assert model.rnn in calls or where == "dropout"


@either
@pytest.mark.parametrize("where", ["rnn", "dropout", "both"])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_later_hooks_may_replace_the_output(where: str, with_dropout: bool) -> None:
    model, reg = seeded(Model), regularizer()
    reg.attach(model.rnn, model.dropout if with_dropout else None)
    if where != "dropout":
        model.rnn.register_forward_hook(lambda _m, _i, result: (result[0] * 2, result[1]))
    if where != "rnn":
        model.dropout.register_forward_hook(lambda _m, _i, result: result * 3)
    decoded, raw, dropped = model.activations(tokens())
    loss = criterion(decoded, tokens())
    want = loss + formula(raw, dropped if with_dropout else raw, 1)
    check_gradients(model, reg.on_backward_begin(loss), want)


@either
def test_hooks_go_with_their_regularizer() -> None:
    model = seeded(Model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    regs = [attached(model) for _ in range(3)]
    handles = [reg.attach(model.decoder, batch_first=True) for reg in regs]
    assert len(model.rnn._forward_hooks) == 3
    model(tokens())
    regs.clear()
    for name, module in model.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert set(vars(module)) == before[name]
    model(tokens())
    assert not any(handle.runs for handle in handles)
    with torch.no_grad():  # hooks would not let it be scripted
        x = torch.randn(2, HIDDEN)
        assert torch.equal(torch.jit.script(model.decoder)(x), model.decoder(x))


def test_a_replica_of_data_parallel_is_refused() -> None:
    """Which runs on each device, so that each penalty would count in full."""
    module, reg = Own(), regularizer()
    reg.attach(module, batch_first=True)
    replica = module._replicate_for_data_parallel()
    replica.weight = module.weight.detach()
    with pytest.raises(RuntimeError, match=r"attach: DataParallel runs a replica of the attached Own .* on_loss_begin"):
        replica(inputs())
    replica.eval()(inputs())


# Copies and pickles


def test_a_saved_model_loads_without_fastreg(tmp_path: Path) -> None:
    rnn, dropout = nn.LSTM(4, 5, batch_first=True), nn.Dropout(0.3)
    regs = [regularizer(), regularizer()]
    for reg in regs:
        reg.attach(rnn, dropout)
    dropout(rnn(torch.zeros(2, 3, 4))[0])
    for model in (nn.Sequential(rnn), rnn):
        torch.save(model, tmp_path / "model")
        with without("fastreg"):
            loaded = torch.load(tmp_path / "model", weights_only=False)
            assert loaded(torch.zeros(2, 3, 4))[0].shape == (2, 3, 5)
        for module in loaded.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_hooks_with_kwargs
            assert not module._forward_pre_hooks_with_kwargs
            assert "__getstate__" not in vars(module)
    assert len(rnn._forward_hooks) == 2


def double(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return 2 * output


class OwnState(OutputAlone):
    """Pickles itself in a way of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mark": 3}


@pytest.mark.parametrize("kind", [OutputAlone, OwnState])
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_keep_the_hooks_of_others(duplicate: Callable[[Any], Any], kind: type[OutputAlone]) -> None:
    rnn, reg, x = kind(4, 5, batch_first=True), regularizer(), torch.randn(2, 3, 4)
    rnn.register_forward_hook(double)
    handle = reg.attach(rnn)
    twin = duplicate(rnn)
    assert [*twin._forward_hooks.values()] == [double]
    with torch.no_grad():
        torch.testing.assert_close(twin(x), 2 * twin.forward(x))
        assert not handle.runs
        assert torch.equal(twin(x), rnn(x))
    assert twin.state_dict().keys() == rnn.state_dict().keys()
    assert (getattr(twin, "mark", None) == 3) == (kind is OwnState)


class OwnCopy(OutputAlone):
    """Copies itself in a way of its own, hooks and all."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        made = memo[id(self)] = object.__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


def test_copied_hooks_do_nothing() -> None:
    rnn, reg, x = OwnCopy(4, 5, batch_first=True), regularizer(), torch.ones(2, 3, 4)
    handle = reg.attach(rnn)
    twin = copy.deepcopy(rnn)
    assert torch.equal(twin(x), twin.forward(x))
    assert not handle.runs
    with torch.no_grad():
        twin.weight_ih_l0.zero_()
    again = pickle.loads(pickle.dumps(twin))
    assert not again._forward_hooks
    assert torch.equal(again.weight_ih_l0, twin.weight_ih_l0)
    twin_reg = regularizer()
    twin_reg.attach(twin)
    raw = twin(x)
    torch.testing.assert_close(penalty_of(twin_reg), formula(raw, raw, 1))


# Checkpointing and compilation


@either
def test_checkpointing() -> None:
    model, plain = seeded(Model), seeded(Model)
    reg = attached(model)

    def checkpointed(x: Tensor) -> Tensor:
        return reg.on_backward_begin(criterion(checkpoint(model, x, use_reentrant=False), x))

    assert_same(train(model, checkpointed, tokens()), train(plain, written_out(plain), tokens()))
    with pytest.raises(RuntimeError, match="nothing was captured"):  # not even by the recomputation
        penalty_of(reg)


@either
def test_reentrant_checkpointing_is_refused() -> None:
    model, reg = seeded(Model), regularizer()
    handle = reg.attach(model.rnn, model.dropout, valid=lambda *_: VALID)

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
    torch.testing.assert_close(penalty_of(reg), fused_ar_tar(raw, dropped, ALPHA, BETA, valid=VALID))


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    yield torch._dynamo.config
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "backend", "allow_rnn"), [(Model, "eager", False), (Fused, "aot_eager", True)])
def test_attached_before_compilation(kind: type[Model], backend: str, allow_rnn: bool, dynamo: Any) -> None:
    model, plain = seeded(lambda: kind(p=0)), seeded(lambda: kind(p=0))
    reg = attached(model)
    with dynamo.patch(allow_rnn=allow_rnn):
        compiled: Any = torch.compile(model, backend=backend)
        got = train(model, with_hooks(compiled, reg), tokens(), steps=2)
    assert_same(got, train(plain, written_out(plain), tokens(), steps=2))


def test_modules_that_are_compiled_already_are_refused(dynamo: Any) -> None:
    model = seeded(Model)
    with dynamo.patch(allow_rnn=True):  # without it, torch leaves RNNs uncompiled
        compiled = torch.compile(model, backend="eager")
        compiled(tokens())
        reg = regularizer()
        with reg.attach(model.rnn, model.dropout):
            loss = criterion(compiled(tokens()), tokens())
            with pytest.raises(RuntimeError, match=r"attach\(\) before torch.compile"):
                reg.on_backward_begin(loss)
    with pytest.raises(RuntimeError, match=r"module: .*compiled already; attach\(\) it before torch.compile"):
        regularizer().attach(torch.compile(model.rnn, backend="eager"))  # pyright: ignore[reportArgumentType]
    model.dropout.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"dropout: .*compiled already"):
        regularizer().attach(model.rnn, model.dropout)
    assert not model.rnn._forward_hooks


# Handles and misuse


@either
def test_handles() -> None:
    model, reg = seeded(Model), regularizer()
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
    reg.on_loss_begin(output)  # which attached modules would refuse
    torch.testing.assert_close(penalty_of(reg), formula(*output[1:], time=1))
    with pytest.raises(KeyError), reg.attach(model.rnn):
        raise KeyError
    assert not model.rnn._forward_hooks


LSTM, GRU, FUSED, OTHER = nn.LSTM(1, 1), nn.GRU(1, 1, batch_first=True), FusedRNNDropout(), FusedRNNDropout(time_dim=1)
SCRIPT = "expected a module that takes hooks, got a ScriptModule; let an nn.Module call it"
REJECTED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "module": ("lstm", {}, TypeError, "module: expected an nn.Module, got str"),
    "cell": (nn.LSTMCell(1, 1), {}, TypeError, "module: expected one that runs over all time steps, got LSTMCell"),
    "script": (torch.jit.script(nn.Linear(1, 1)), {}, TypeError, f"module: {SCRIPT}"),
    "dropout": (LSTM, {"dropout": 0.5}, TypeError, "dropout: expected an nn.Module, got float"),
    "script of a dropout": (LSTM, {"dropout": torch.jit.script(nn.Dropout())}, TypeError, f"dropout: {SCRIPT}"),
    "batch_first": (Own(), {"batch_first": 1}, TypeError, "batch_first: expected True or False, got 1"),
    "no layout": (Own(), {}, ValueError, "batch_first: expected True .* as the Own does not have it, got None"),
    "layout inside": (WeightDrop(LSTM), {}, ValueError, "expected True .* like the LSTM inside it, got None"),
    "other layout": (LSTM, {"batch_first": True}, ValueError, "batch_first: .* False, as the LSTM has it, or None"),
    "two axes": (Own(), {"time_dim": 2, "batch_first": True}, ValueError, "batch_first and time_dim: expected one of"),
    "time_dim": (Own(), {"time_dim": "2"}, TypeError, "time_dim: expected an int"),
    "stepwise axis": (Own(), {"time_dim": 2, "stepwise": True}, ValueError, "time_dim: expected None with stepwise"),
    "stepwise": (GRU, {"stepwise": 1}, TypeError, "stepwise: expected True or False, got 1"),
    "stepwise backward": (GRU, {"stepwise": True, "in_backward": True}, ValueError, "stepwise: .* with in_backward"),
    "in_backward": (GRU, {"in_backward": "1"}, TypeError, "in_backward: expected a real number, got str"),
    "negative": (GRU, {"in_backward": -1}, ValueError, "in_backward: .* finite number of at least 0, got -1"),
    "starts": (GRU, {"starts": 3}, TypeError, "starts: expected a callable or None, got int"),
    "fused": (LSTM, {"dropout": FUSED}, ValueError, "with batch_first=False, as the LSTM has it, got batch_first=True"),
    "fused axis": (GRU, {"dropout": OTHER}, ValueError, "with batch_first=True, as the GRU has it, got time_dim=1"),
    "fused layout": (Own(), {"time_dim": 1, "dropout": FUSED}, ValueError, "with time_dim=1, got batch_first=True"),
    "fused axes": (Own(), {"time_dim": 2, "dropout": OTHER}, ValueError, "with time_dim=2, got time_dim=1"),
}


@pytest.mark.parametrize("argument", REJECTED)
def test_attach_rejects(argument: str) -> None:
    module, options, error, message = REJECTED[argument]
    with pytest.raises(error, match=message):
        regularizer().attach(module, **options)
    assert not getattr(module, "_forward_hooks", None)
    assert not getattr(options.get("dropout"), "_forward_pre_hooks", None)


@pytest.mark.parametrize(
    ("give", "options", "error", "message"),
    [
        (lambda raw, state: None, {}, TypeError, r"expected the Own to return a tensor .* got NoneType, .*output="),
        (lambda raw, state: ([raw], 0), {}, TypeError, r"expected the Own to return a tensor .* got list, .*output="),
        (lambda raw, state: raw, {"output": str}, TypeError, "output: .* callable to pick a tensor .* got str"),
        (lambda raw, state: state, {}, ValueError, r"from the Own, got \(3, 6\)\. If that is one time step, attach"),
        (lambda raw, state: raw, {"valid": lambda x: 1}, TypeError, "valid: expected the callable .* None, got int"),
        (lambda raw, state: raw, {"starts": lambda x: [0]}, TypeError, "starts: expected the callable .*, got list"),
        (lambda raw, state: raw, {"valid": lambda x: VALID.t()}, ValueError, "valid: expected"),
        (
            lambda raw, state: raw,
            {"batch_first": None, "time_dim": 4},
            ValueError,
            r"time_dim: expected an axis of raw, .*, from -3 to 2, got 4",
        ),
    ],
    ids=["nothing", "a list inside", "picked", "one time step", "valid", "starts", "shape of valid", "time_dim"],
)
def test_a_step_rejects(give: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    module, reg = Own(give), regularizer()
    reg.attach(module, **({"batch_first": True} | options))
    with pytest.raises(error, match=message):
        penalty_of(reg, module(inputs()))


def test_a_dropout_that_returns_no_tensor_is_refused() -> None:
    rnn, dropout, reg = gru(), nn.LSTM(HIDDEN, HIDDEN), regularizer()
    reg.attach(rnn, dropout)
    with pytest.raises(TypeError, match="dropout: expected the attached LSTM to return a tensor, got tuple"):
        dropout(rnn(inputs())[0])


@either
@pytest.mark.parametrize("between", [lambda x: x[:, 1:], torch.relu, lambda x: x.transpose(0, 1)])
def test_a_dropout_that_did_not_get_the_output_is_refused(between: Callable[[Tensor], Tensor]) -> None:
    model = seeded(Model)
    reg = attached(model)
    loss = model.dropout(between(model.rnn(inputs())[0])).mean()
    with pytest.raises(RuntimeError, match=r"attached \w*Dropout did not get the output of the LSTM: something lies"):
        reg.on_backward_begin(loss)
    assert not isinstance(model.dropout, FusedRNNDropout) or model.dropout.take() is None


@either
@pytest.mark.parametrize("without", ["rnn", "dropout", "both"])
def test_a_run_without_gradients_is_refused(without: str) -> None:
    model = seeded(Model)
    reg = attached(model)
    with torch.set_grad_enabled(without == "dropout"):
        raw, _ = model.rnn(inputs())
    with torch.set_grad_enabled(without == "rnn"):
        model.dropout(raw)
    with pytest.raises(RuntimeError, match="the LSTM or its dropout ran without gradients"):
        reg.on_backward_begin(model.decoder.weight.mean())


@pytest.mark.parametrize(
    ("changed", "kind"), [("raw", Model), ("dropped", Model), ("dropped", Fused)], ids=["raw", "dropped", "fused"]
)
def test_changes_in_place_are_refused(changed: str, kind: type[Model]) -> None:
    model = seeded(kind)
    reg = attached(model)
    if changed == "raw":
        model.dropout.inplace = True
    _, _, dropped = model.activations(tokens())
    if changed == "dropped":
        dropped.relu_()
    with pytest.raises(RuntimeError, match="changed in place"):
        penalty_of(reg)
