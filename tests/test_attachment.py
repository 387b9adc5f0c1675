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
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from fastreg import FusedRNNDropout, fused_ar_tar
from fastreg.attachment import Hook
from tests import language_model as lm
from tests.conftest import without
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME


@lm.either
@pytest.mark.parametrize(
    ("options", "shape", "time"),
    [
        ({"bidirectional": True, "num_layers": 2}, (BATCH, TIME), 1),
        ({"bidirectional": True, "batch_first": False}, (TIME, BATCH), 0),
        ({}, (TIME,), 0),
        ({}, (1, TIME), 1),
    ],
    ids=["bidirectional", "time_first", "unbatched", "batch_of_one"],
)
def test_layouts_of_an_lstm(options: dict[str, Any], shape: tuple[int, ...], time: int, device: str) -> None:
    model, x = lm.seeded(lambda: lm.Model(**options)).to(device), lm.tokens(*shape, device=device)
    reg = lm.attached(model)
    decoded, raw, dropped = model.activations(x)
    loss = lm.criterion(decoded, x)
    lm.check_gradients(model, reg.on_backward_begin(loss), loss + lm.formula(raw, dropped, time))


@pytest.mark.parametrize("dropout", [None, nn.Dropout(0.3), FusedRNNDropout(0.3)], ids=["none", "plain", "fused"])
def test_packed_sequences(dropout: Any) -> None:
    rnn, reg = lm.attach_gru(dropout)
    packed = pack_padded_sequence(lm.inputs(), torch.tensor([7, 4, 2]), batch_first=True)
    raw, _ = rnn(packed)
    if isinstance(dropout, FusedRNNDropout):
        with pytest.raises(TypeError, match=r"FusedRNNDropout: expected .* a tensor, got the data of a PackedSequence"):
            dropout(raw.data)
        dropout.eval()  # drops nothing, and forms no penalty
        raw, _ = rnn(packed)
    rows = raw.data if dropout is None else dropout(raw.data)
    lm.check_gradients(rnn, lm.penalty_of(reg, rows), fused_ar_tar(raw, raw._replace(data=rows), ALPHA, BETA))


# Any module, and how its output is read


class OutputAlone(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)[0]


@pytest.mark.parametrize(
    ("module", "options", "shape", "axis"),
    [
        (nn.Linear(HIDDEN, HIDDEN), {"batch_first": True}, (BATCH, TIME, HIDDEN), 1),
        (nn.Linear(HIDDEN, HIDDEN), {"batch_first": False}, (BATCH, TIME, HIDDEN), 0),
        (nn.Linear(HIDDEN, HIDDEN), {"batch_first": True, "output": lambda result: result}, (TIME, HIDDEN), 0),
        (OutputAlone(HIDDEN, HIDDEN, batch_first=True), {}, (1, TIME, HIDDEN), 1),
    ],
    ids=["batch_first", "time_first", "one sequence, picked", "an LSTM's batch of one"],
)
def test_the_layout_of_any_module(module: nn.Module, options: Any, shape: tuple[int, ...], axis: int) -> None:
    reg = lm.regularizer()
    with reg.attach(module, **options):
        raw = module(torch.randn(shape))
        torch.testing.assert_close(lm.penalty_of(reg), lm.formula(raw, raw, axis))


@pytest.mark.parametrize("time_dim", [2, -2])
@pytest.mark.parametrize("kind", [None, nn.Dropout, FusedRNNDropout])
def test_any_axis_of_time(kind: Any, time_dim: int, formed: list[Any]) -> None:
    modules = nn.ModuleList(nn.Conv2d(2, 3, (1, 3), padding=(0, 1)) for _ in range(2))
    reg = lm.regularizer(layers="all")
    dropout = None if kind is None else kind(0.4, **({"time_dim": time_dim} if kind is FusedRNNDropout else {}))
    reg.attach(modules[0], dropout, time_dim=time_dim)
    reg.attach(modules[1], time_dim=time_dim)
    raw = modules[0](torch.randn(BATCH, 2, TIME, 5))
    dropped = raw if dropout is None else dropout(raw)
    more = modules[1](torch.randn(BATCH, 2, TIME + 1, 5))
    want = fused_ar_tar(raw, dropped, ALPHA, BETA, time_dim=2) + fused_ar_tar(more, more, ALPHA, BETA, time_dim=2)
    loss = dropped.mean() + more.mean()
    lm.check_gradients(modules, reg.on_backward_begin(loss), loss + want)
    assert len(formed) == (1 if kind is FusedRNNDropout else 2)  # runs of other time steps in a call of their own


# Valid steps and starts of segments

VALID = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
STARTS = torch.tensor([[1, 0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]]).bool()
MASKS: dict[str, dict[str, Any]] = {
    "none": {"valid": None, "starts": None},
    "integers": {"valid": VALID.long()},
    "both": {"valid": VALID, "starts": STARTS},
}


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", [nn.Dropout, FusedRNNDropout])
@pytest.mark.parametrize("given", MASKS)
def test_masks_come_from_the_arguments_of_the_module(
    given: str, kind: Any, checkpoints: bool, formed: list[Any]
) -> None:
    module, dropout, reg, masks = lm.Returning(), kind(0.4), lm.regularizer(), MASKS[given]
    functions: Any = {name: lambda x, name=name, **masks: masks[name] for name in masks}
    handle = reg.attach(module, dropout, **functions)
    raw = module(lm.inputs(), **masks)
    dropped: Any = checkpoint(dropout, raw, use_reentrant=False) if checkpoints else dropout(raw)
    want = dropped.mean() + fused_ar_tar(raw, dropped, ALPHA, BETA, **masks)
    lm.check_gradients(module, reg.on_backward_begin(dropped.mean()), want)
    assert not handle.runs  # not even of the recomputation
    assert len(formed) == (kind is nn.Dropout or checkpoints)  # else the dropout forms the penalty


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("given", ["attach", "dropout", "both"])
@pytest.mark.parametrize("name", ["valid", "starts"])
def test_masks_of_the_dropout_go_before_those_of_the_module(name: str, given: str, p: float, formed: list[Any]) -> None:
    of_module, of_dropout = torch.rand(2, BATCH, TIME) < 0.6
    functions: Any = {} if given == "dropout" else {name: lambda *_: of_module}
    rnn, reg = lm.attach_gru(dropout := FusedRNNDropout(0.9), **functions)
    by_position = (of_dropout,) if name == "valid" else (None, of_dropout)
    want = {name: of_module if given == "attach" else of_dropout}
    for args, kwargs in [((), {})] if given == "attach" else [((), {name: of_dropout}), (by_position, {})]:
        raw, _ = rnn(lm.inputs())
        dropped = dropout(raw, p, *args, **kwargs)
        lm.check_gradients(rnn, lm.penalty_of(reg, dropped), fused_ar_tar(raw, dropped, ALPHA, BETA, **want))  # pyright: ignore
    assert bool(formed) == (p == 0)


# Which runs belong to a step


def test_runs_that_return_leaves_all_count() -> None:
    module, reg = nn.Identity(), lm.regularizer()
    reg.attach(module, batch_first=True)
    first, second = (module(lm.inputs().requires_grad_()) for _ in range(2))
    loss, penalty = (first + second).sum(), lm.formula(first, first, 1) + lm.formula(second, second, 1)
    torch.testing.assert_close(reg.on_backward_begin(loss), loss + penalty)


@lm.either
def test_a_run_without_gradients_counts_for_a_loss_without() -> None:
    model = lm.seeded(lm.Model)
    reg = lm.attached(model)
    with torch.no_grad():
        decoded, raw, dropped = model.activations(lm.tokens())
        loss = lm.criterion(decoded, lm.tokens())
        torch.testing.assert_close(reg.on_backward_begin(loss) - loss, lm.formula(raw, dropped, 1))
    with torch.inference_mode():
        model(lm.tokens())
    with pytest.raises(RuntimeError, match="nothing was captured"):
        lm.penalty_of(reg)


# The lifetime of a capture


@lm.either
@pytest.mark.parametrize("loop", ["forwards without gradients", "forwards", "steps"])
def test_loops_without_the_penalty_hold_one_run_at_most(loop: str) -> None:
    """Where the optimizer leaves the versions of the weights, and the loss lives until the next one, too."""
    model, reg = lm.seeded(lm.Model), lm.regularizer()
    handle, alive = reg.attach(model.rnn, model.dropout), []
    lm.penalty_of(reg, model(lm.tokens())).backward()  # the only one: a loop without any is warned of
    optimizer = Adam(model.parameters(), fused=True)
    for _ in range(5):
        with torch.set_grad_enabled(loop != "forwards without gradients"):
            decoded, raw, _ = model.activations(lm.tokens())
        alive.append(weakref.ref(raw))
        del raw, _
        if loop == "steps":  # after which decoded keeps no raw
            loss = lm.criterion(decoded, lm.tokens())
            loss.backward()
            optimizer.step()
        else:
            del decoded
        assert len(handle.runs) == (loop != "forwards")
    assert [ref() is not None for ref in alive] == [False] * 4 + [loop == "forwards without gradients"]
    decoded, raw, dropped = model.activations(lm.tokens())
    loss = lm.criterion(decoded, lm.tokens())
    lm.check_gradients(model, reg.on_backward_begin(loss), loss + lm.formula(raw, dropped, 1))


def test_second_derivatives_of_activations_that_nothing_keeps() -> None:
    model = lm.seeded(lambda: lm.Model(nn.RNN))
    loss = lm.attached(model).on_backward_begin(lm.criterion(model(lm.tokens()), lm.tokens()))
    with pytest.raises(RuntimeError, match="second derivatives need an activation that was freed; keep"):
        torch.autograd.grad(loss, [*model.parameters()], create_graph=True)


# Other hooks


def doubled(_module: nn.Module, _args: Any, result: Any) -> Any:
    return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result


@lm.either
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # the embedding's, for its integers
@pytest.mark.parametrize("where", ["rnn", "dropout", "both"])
@pytest.mark.parametrize("kind", ["a later hook that replaces the output", "a full backward hook"])
def test_hooks_of_others(kind: str, where: str) -> None:
    model = lm.seeded(lm.Model)
    reg = lm.attached(model)
    for module in [model.rnn, model.dropout] if where == "both" else [getattr(model, where)]:
        if kind == "a full backward hook":
            module.register_full_backward_hook(lambda *_: None)
        else:
            module.register_forward_hook(doubled)
    decoded, raw, dropped = model.activations(lm.tokens())
    loss = lm.criterion(decoded, lm.tokens())
    lm.check_gradients(model, reg.on_backward_begin(loss), loss + lm.formula(raw, dropped, 1))


@lm.either
def test_a_backward_pre_hook_gets_the_gradient_before_the_penalty_is_added() -> None:
    model, seen = lm.seeded(lm.Model), []
    model.dropout.register_full_backward_pre_hook(lambda _, gradients: seen.append(gradients[0]))
    reg = lm.attached(model)
    for add in (torch.clone, reg.on_backward_begin):
        decoded = lm.seeded(lambda: model(lm.tokens()))
        add(lm.criterion(decoded, lm.tokens())).backward()
    torch.testing.assert_close(seen[0], seen[2])  # of dropped; the dropout is that of the embeddings, too


@lm.either
def test_hooks_go_with_their_regularizer() -> None:
    model = lm.seeded(lm.Model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    regs = [lm.attached(model) for _ in range(3)]
    assert len(model.rnn._forward_hooks) == 3
    alive = weakref.ref(model.activations(lm.tokens())[1])
    regs.clear()
    assert alive() is None
    for name, module in model.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert set(vars(module)) == before[name]
    model(lm.tokens())


@pytest.mark.parametrize("attaches", [True, False])
def test_a_replica_of_data_parallel_is_refused(attaches: bool) -> None:
    """The penalty would count in full on each device, and that of a dropout would be lost."""
    module, reg = lm.Returning() if attaches else FusedRNNDropout(0.3, ALPHA), lm.regularizer()
    if attaches:
        reg.attach(module)
    replica: Any = module._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"DataParallel runs a replica .*on_loss_begin"):
        replica(lm.inputs())
    replica.alpha = 0.0  # so that the dropout forms no penalty
    if not attaches:
        replica(lm.inputs())


# Copies and pickles


def test_a_saved_model_loads_without_fastreg(tmp_path: Path) -> None:
    rnn, dropout = nn.LSTM(4, 5, batch_first=True), nn.Dropout(0.3)
    regs = [lm.regularizer(), lm.regularizer()]
    for reg in regs:
        reg.attach(rnn, dropout)
    dropout(rnn(torch.zeros(2, 3, 4))[0])
    for model in (nn.Sequential(rnn), rnn):
        torch.save(model, tmp_path / "model")
        with without("fastreg"):
            loaded = torch.load(tmp_path / "model", weights_only=False)
            assert loaded(torch.zeros(2, 3, 4))[0].shape == (2, 3, 5)
    assert len(rnn._forward_hooks) == 2


def test_a_hook_on_a_loaded_model_gets_an_id_of_its_own(tmp_path: Path) -> None:
    """In a new process, whose ids start anew."""
    rnn, reg = nn.LSTM(4, 5, batch_first=True), lm.regularizer()
    handle, before = reg.attach(rnn), RemovableHandle.next_id
    torch.save(rnn, tmp_path / "model")
    RemovableHandle.next_id = next(iter(rnn._forward_hooks))
    try:
        loaded, seen = torch.load(tmp_path / "model", weights_only=False), []
        loaded.register_forward_hook(lambda *args: seen.append(len(args)))
    finally:
        RemovableHandle.next_id = before
    loaded(torch.zeros(2, 3, 4))
    assert seen == [3]
    handle.remove()


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_attributes(module: Any) -> Any:
    """Copy a module as a `__deepcopy__` of its own would."""
    twin = object.__new__(type(module))
    vars(twin).update(copy.deepcopy(vars(module), {id(module): twin}))
    return twin


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, by_attributes])
def test_copies_keep_the_hooks_of_others(duplicate: Callable[[Any], Any]) -> None:
    rnn, reg, x = OutputAlone(4, 5, batch_first=True), lm.regularizer(), torch.randn(2, 3, 4)
    rnn.register_forward_hook(doubled)
    handle = reg.attach(rnn)
    twin = duplicate(rnn)
    assert not any(isinstance(x, Hook) for x in twin._forward_hooks.values())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), 2 * twin.forward(x))
        assert not handle.runs
        assert torch.equal(twin(x), rnn(x))
        twin.weight_ih_l0.zero_()
    assert torch.equal(pickled(twin)(x), twin(x))
    assert twin.state_dict().keys() == rnn.state_dict().keys()
    of_twin = lm.regularizer()
    of_twin.attach(twin)
    raw = twin(x)
    torch.testing.assert_close(lm.penalty_of(of_twin, raw), lm.formula(raw, raw, 1))


# Checkpointing and compilation


@lm.either
def test_reentrant_checkpointing_is_refused() -> None:
    model, reg = lm.seeded(lm.Model), lm.regularizer()
    handle = reg.attach(model.rnn, model.dropout, valid=lambda *_: VALID)

    def rest(embedded: Tensor) -> Tensor:
        return model.decoder(model.dropout(model.rnn(embedded)[0]))

    def decoded() -> Tensor:
        return checkpoint(rest, model.embedding(lm.tokens()), use_reentrant=True)

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reg.on_backward_begin(lm.criterion(decoded(), lm.tokens()))
    loss = lm.criterion(decoded(), lm.tokens())
    reg.clear()
    _, raw, dropped = model.activations(lm.tokens())
    loss.backward()  # recomputes, while a capture waits
    assert len(handle.runs) == 1
    torch.testing.assert_close(lm.penalty_of(reg), fused_ar_tar(raw, dropped, ALPHA, BETA, valid=VALID))


def test_modules_that_are_compiled_already_are_refused(dynamo: Any) -> None:
    model = lm.seeded(lm.Model)
    with pytest.raises(RuntimeError, match=r"module: .*compiled already; attach\(\) it before torch.compile"):
        lm.regularizer().attach(torch.compile(model.rnn, backend="eager"))  # pyright: ignore[reportArgumentType]
    model.dropout.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"dropout: .*compiled already"):
        lm.regularizer().attach(model.rnn, model.dropout)
    assert not model.rnn._forward_hooks


# Handles and misuse


@lm.either
def test_handles() -> None:
    model, reg = lm.seeded(lm.Model), lm.regularizer()
    with reg.attach(model.rnn, model.dropout) as handle:
        _decoded = model(lm.tokens())
        assert handle.runs
    assert not handle.runs
    assert not model.rnn._forward_hooks
    assert not model.dropout._forward_hooks
    handle.remove()  # twice is once
    output = model.activations(lm.tokens())
    reg.on_loss_begin(output)  # which attached modules would refuse
    torch.testing.assert_close(lm.penalty_of(reg), lm.formula(*output[1:], time=1))


@pytest.mark.parametrize("where", ["rnn", "dropout"])
@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@lm.either
def test_a_hook_of_another_may_remove_the_handle(register: str, where: str) -> None:
    """PyTorch still calls the other hooks of that forward."""
    model, reg = lm.seeded(lm.Model), lm.regularizer()
    handle = reg.attach(model.rnn, model.dropout)
    getattr(getattr(model, where), register)(lambda *_: handle.remove(), prepend=True)
    decoded = model(lm.tokens())
    with pytest.raises(RuntimeError, match="nothing was captured"):
        reg.on_backward_begin(lm.criterion(decoded, lm.tokens()))


LSTM, GRU, LINEAR = nn.LSTM(1, 1), nn.GRU(1, 1, batch_first=True), nn.Linear(1, 1)
FUSED, OTHER = FusedRNNDropout(), FusedRNNDropout(time_dim=1)
REJECTED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "module": ("lstm", {}, TypeError, "module: expected an nn.Module, got str"),
    "cell": (nn.LSTMCell(1, 1), {}, TypeError, "module: expected one that runs over all time steps, got LSTMCell"),
    "script": (torch.jit.script(LINEAR), {}, TypeError, "module: expected .* takes hooks, got a ScriptModule"),
    "dropout": (LSTM, {"dropout": 0.5}, TypeError, "dropout: expected an nn.Module, got float"),
    "batch_first": (LINEAR, {"batch_first": 1}, TypeError, "batch_first: expected True or False, got 1"),
    "no layout": (LINEAR, {}, ValueError, "batch_first: expected True .* as the Linear does not have it, got None"),
    "layout inside": (nn.Sequential(LSTM), {}, ValueError, "expected True .* like the LSTM inside it, got None"),
    "other layout": (LSTM, {"batch_first": True}, ValueError, "batch_first: .* False, as the LSTM has it, or None"),
    "two axes": (LINEAR, {"time_dim": 2, "batch_first": True}, ValueError, "batch_first and time_dim: expected one of"),
    "stepwise axis": (LINEAR, {"time_dim": 2, "stepwise": True}, ValueError, "time_dim: expected None with stepwise"),
    "stepwise": (GRU, {"stepwise": 1}, TypeError, "stepwise: expected True or False, got 1"),
    "stepwise backward": (GRU, {"stepwise": True, "in_backward": True}, ValueError, "stepwise: .* with in_backward"),
    "in_backward": (GRU, {"in_backward": -1}, ValueError, "in_backward: .* finite number of at least 0, got -1"),
    "starts": (GRU, {"starts": 3}, TypeError, "starts: expected a callable or None, got int"),
    "fused": (LSTM, {"dropout": FUSED}, ValueError, "with batch_first=False, as the LSTM has it, got batch_first=True"),
    "fused axis": (LINEAR, {"time_dim": 2, "dropout": OTHER}, ValueError, "with time_dim=2, got time_dim=1"),
}


@pytest.mark.parametrize("argument", REJECTED)
def test_attach_rejects(argument: str) -> None:
    module, options, error, message = REJECTED[argument]
    with pytest.raises(error, match=message):
        lm.regularizer().attach(module, **options)
    assert not getattr(module, "_forward_hooks", None)
    assert not getattr(options.get("dropout"), "_forward_pre_hooks", None)


@pytest.mark.parametrize(
    ("give", "options", "error", "message"),
    [
        (lambda raw: None, {}, TypeError, r"expected the Returning to return a tensor .* got NoneType, .*output="),
        (lambda raw: ([raw], 0), {}, TypeError, r"expected the Returning to return a tensor .* got list, .*output="),
        (lambda raw: raw, {"output": str}, TypeError, "output: .* callable to pick a tensor .* got str"),
        (lambda raw: raw[:, 0], {}, ValueError, r"from the Returning, got \(3, 6\)\. If that is one time step, attach"),
        (pack_sequence, {"stepwise": True}, TypeError, "a tensor with stepwise=True, got PackedSequence"),
        (lambda raw: raw[:, 0], {"stepwise": True, "dropout": FUSED}, TypeError, "another dropout with stepwise"),
        (lambda raw: raw, {"valid": lambda x: 1}, TypeError, "valid: expected the callable .* None, got int"),
        (lambda raw: raw, {"starts": lambda x: [0]}, TypeError, "starts: expected the callable .*, got list"),
        (lambda raw: raw, {"valid": lambda x: VALID.t()}, ValueError, "valid: expected"),
        (lambda raw: raw, {"time_dim": 4}, ValueError, r"time_dim: expected an axis of raw, .*, from -3 to 2, got 4"),
        (
            lambda raw: raw,
            {"dropout": lm.gru()},
            TypeError,
            "dropout: expected the attached GRU to return .* got tuple",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_a_step_rejects(give: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    module, reg = lm.Returning(give), lm.regularizer()
    reg.attach(module, **options)
    with pytest.raises(error, match=message):
        lm.penalty_of(reg, (options.get("dropout") or nn.Identity())(module(lm.inputs())))


OTHER_INPUT = r"attached \w*Dropout did not get the output of the LSTM: something lies"
NO_GRADIENTS = "the LSTM or its dropout ran without gradients"
IN_PLACE = "changed in place|modified by an inplace operation"  # by PyTorch, where it sees the change first
FREED = r"the loss does not depend on the output of the attached \w*Dropout, which was freed"
ONE_STEP = r"LSTM ran 2 times, over one time step each, .* attach\(\.\.\., stepwise=True"
# Functions of a model and its input, which return a tensor that the loss depends on, and the errors.
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a slice": (lambda model, x: model.dropout(model.rnn(x)[0][:, 1:]), OTHER_INPUT),
    "a function": (lambda model, x: model.dropout(model.rnn(x)[0].relu()), OTHER_INPUT),
    "another layout": (lambda model, x: model.dropout(model.rnn(x)[0].transpose(0, 1)), OTHER_INPUT),
    "no gradients": (lambda model, x: torch.no_grad()(lambda: model.dropout(model.rnn(x)[0]))(), NO_GRADIENTS),
    "none of raw": (lambda model, x: model.dropout(torch.no_grad()(model.rnn)(x)[0]), NO_GRADIENTS),
    "none of dropped": (lambda model, x: torch.no_grad()(model.dropout)(model.rnn(x)[0]), NO_GRADIENTS),
    "raw in place": (lambda model, x: model.dropout(raw := model.rnn(x)[0]) + raw.mul_(2), IN_PLACE),
    "dropped in place": (lambda model, x: model.dropout(model.rnn(x)[0]).relu_(), IN_PLACE),
    "freed": (lambda model, x: (raw := model.rnn(x)[0], model.dropout(raw))[0], FREED),
    "one step a run": (lambda model, x: model.rnn(x[:, :1])[0] + model.dropout(model.rnn(x[:, :1])[0]), ONE_STEP),
}


ALWAYS = [(case, True) for case, (_, message) in REFUSED.items() if message in (OTHER_INPUT, IN_PLACE)]


@lm.either
@pytest.mark.parametrize(("case", "in_backward"), [*((case, False) for case in REFUSED), *ALWAYS])
def test_steps_that_are_refused(case: str, in_backward: bool) -> None:
    run, message = REFUSED[case]
    model = lm.seeded(lm.Model)
    reg = lm.attached(model, in_backward=in_backward)
    loss = run(model, lm.inputs()).sum()
    add: Any = Tensor.backward if in_backward else reg.on_backward_begin
    with pytest.raises(RuntimeError, match=message):
        add(loss if loss.requires_grad else model.decoder.weight.sum())
    assert not isinstance(model.dropout, FusedRNNDropout) or model.dropout.take() is None


@lm.either
@pytest.mark.parametrize("in_backward", [False, True])
def test_one_sequence_that_the_dropout_gets_in_the_other_layout(in_backward: bool) -> None:
    """It is the same memory."""
    model = lm.seeded(lm.Model)
    reg = lm.attached(model, in_backward=in_backward)
    raw, _ = model.rnn(lm.inputs()[:1])
    with pytest.raises(ValueError, match="dropped: expected the shape of raw"):
        reg.on_backward_begin(model.dropout(raw.transpose(0, 1)).sum())
