"""`RNNRegularizer.attach`: the runs that count for a loss, layouts, outputs of modules, and errors.

`test_runs.py` has the outcomes of a loss, and `test_alarms.py` the loops that lose a penalty. `test_compiled.py`
compiles attached models, and plays random steps of them.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.hooks import RemovableHandle

from fastreg import FusedRNNDropout, fused_ar_tar
from fastreg.attach.mark import tensors_in
from tests import language_model as lm
from tests.attach import cp, frozen, no_grad, steps
from tests.calls import Nothing
from tests.conftest import without
from tests.language_model import ALPHA, BATCH, BETA, FUSED, HIDDEN, PLAIN, STARTS, TIME, VALID, Attached

LINEAR, SHAPE = nn.Linear(HIDDEN, HIDDEN), (BATCH, TIME, HIDDEN)
LSTM = partial(nn.LSTM, HIDDEN, HIDDEN, batch_first=True)
MASK: dict[str, Any] = {"valid": lambda x: VALID[0]}  # of one sequence
MASKS: dict[str, Any] = {"valid": lambda x: VALID, "starts": lambda x: STARTS}
EACH, ONE, COUNTED = "no mask: every step counts", "raw (7, 6) as time 7, hidden 6", "only valid steps count"
OF_BOTH = f"valid (3, 7): {COUNTED}; starts (3, 7): changes into starts do not count"
AXIS: dict[str, Any] = {"time_dim": 2}
# The text of a handle; the module, the options of `attach`, the shape of the input, and the axis of time.
LAYOUTS: dict[str, tuple[Callable[[], Any], dict[str, Any], tuple[int, ...], int]] = {
    f"LSTM: raw (3, 7, 6) as batch 3, time 7, hidden 6; {OF_BOTH}": (LSTM, MASKS, SHAPE, 1),
    f"LSTM: {ONE}; valid (7,): {COUNTED}": (partial(LSTM, num_layers=3), MASK, (TIME, HIDDEN), 0),
    f"Linear: {ONE}; {EACH}": (lambda: LINEAR, {"batch_first": True, "output": lambda raw: raw}, (TIME, HIDDEN), 0),
    f"Linear: raw (3, 7, 6) as time 3, batch 7, hidden 6; {EACH}": (lambda: LINEAR, {"batch_first": False}, SHAPE, 0),
    f"Linear: raw (3, 6) as batch 3, time 6; {EACH}": (lambda: LINEAR, {"time_dim": 1}, (BATCH, HIDDEN), 1),
    f"Linear: raw (7, 2, 6) as time 7, batch 2, hidden 6; {EACH}": (lambda: LINEAR, {"time_dim": -3}, (7, 2, 6), 0),
    f"Linear: raw (3, 2, 7, 6) as batch 3, hidden 2, time 7, hidden 6; {EACH}": (lambda: LINEAR, AXIS, (3, 2, 7, 6), 2),
}


@lm.each_dropout
@pytest.mark.parametrize("said", LAYOUTS)
def test_the_layout_of_a_module_is_taken_and_shown(said: str, dropout: Any, device: str) -> None:
    make, options, shape, axis = LAYOUTS[said]
    module, reg, x = make().to(device), lm.regularizer(), torch.randn(shape, device=device)
    layout: Any = {"batch_first": getattr(module, "batch_first", None)} | options
    layout = {name: layout.get(name) for name in ("batch_first", "time_dim")} if dropout is FUSED else {}
    after = nn.Identity() if dropout is None else lm.dropout_of(dropout, **layout)
    handle = reg.attach(module, dropout and after, **options)
    said = said if dropout is None else said.replace(":", f" -> {dropout.__name__}:", 1)
    label, own = said.partition(":")[0], "RNNRegularizer(alpha=2.0, beta=1.0, layers=None)"
    module.eval()(x)
    assert repr(handle) == f"{label}: no run yet"
    result = module.train()(x)
    raw = result[0] if isinstance(result, tuple) else result
    dropped, masks = after(raw), {name: mask(x) for name, mask in options.items() if name in MASKS}
    want = fused_ar_tar(raw, dropped, ALPHA, BETA, time_dim=axis, **masks)
    lm.check_gradients(module, lm.penalty_of(reg, dropped), want)
    assert repr(reg) == f"{own}\n  {said}"
    handle.remove()
    assert repr(handle) == f"{label}: removed"
    assert repr(reg) == own


def packed(x: Tensor, *lengths: int) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=True)


@pytest.mark.parametrize(("dropout", "takes"), [(None, "rows"), (PLAIN, "rows"), (PLAIN, "packed sequences")])
def test_packed_output_is_penalized(dropout: Any, takes: str) -> None:
    model = Attached(nn.LSTM, dropout)
    raw, _ = model.rnn(packed(lm.inputs(), 7, 4, 2))
    if takes == "rows":
        dropped = raw._replace(data=model.dropout(raw.data))
    else:
        model.dropout.forward = lambda x: x._replace(data=2 * x.data)
        dropped = model.dropout(raw)
    loss = model.end(raw.data, dropped.data).loss
    assert type(raw) is type(dropped) is PackedSequence
    said = "raw (13, 6) as 3 packed sequences of up to 7 time steps, hidden 6; every step counts"
    assert repr(model.handle).endswith(f": {said}")
    lm.check_gradients(model, model.reg.on_backward_begin(loss), loss + fused_ar_tar(raw, dropped, ALPHA, BETA))


def test_a_fused_dropout_takes_the_rows_of_a_packed_sequence_in_evaluation_alone() -> None:
    model = Attached(nn.LSTM, FUSED)
    raw, _ = model.rnn(packed(lm.inputs(), 7, 4, 2))
    with pytest.raises(ValueError, match=r"raw: expected .*batch.*time.*hidden.*, got \(13, 6\)"):
        model.dropout(raw.data)
    dropped = raw._replace(data=model.dropout.eval()(raw.data))
    loss = dropped.data.sin().sum()
    lm.check_gradients(model, model.reg.on_backward_begin(loss), loss + fused_ar_tar(raw, dropped, ALPHA, BETA))


@pytest.mark.parametrize("masks", [{"valid": None, "starts": None}, {"valid": VALID.long(), "starts": STARTS}])
def test_masks_come_from_the_arguments_of_the_module(masks: Any) -> None:
    functions: Any = {name: lambda x, name=name, **masks: masks[name] for name in masks}
    rnn, reg = lm.Returning(), lm.regularizer()
    reg.attach(rnn, **functions)
    raw = rnn(lm.inputs(), **masks)
    lm.check_gradients(rnn, lm.penalty_of(reg, raw), fused_ar_tar(raw, raw, ALPHA, BETA, **masks))


class ModelOutput(dict):
    """A dictionary whose items are attributes, too, as in Transformers."""

    def __init__(self, **items: Any) -> None:
        for name, x in items.items():
            self[name] = x

    def __setitem__(self, name: str, x: Any) -> None:
        super().__setitem__(name, x)
        vars(self)[name] = x


class AttrDict(dict):
    """A dictionary that takes a missing attribute for a missing item, and raises `KeyError`."""

    __getattr__: Any = dict.__getitem__


class OneDict(dict):
    """A dictionary whose items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


CACHE = SimpleNamespace(keys=[torch.ones(2)])  # any object of the model
Pair = namedtuple("Pair", "raw state")
RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {  # a result with raw and a state, and `output`
    "a tuple": (lambda raw, state: (raw, (state, CACHE, state.to_sparse())), None),
    "a list": (lambda raw, state: [raw, {"a": [state]}], None),
    "a named tuple": (Pair, None),
    "a dictionary": (lambda raw, state: {"a": state, "b": raw}, itemgetter("b")),
    "attributes": (lambda raw, state: AttrDict(last_hidden_state=raw, c=state), None),
    "a dictionary that is its attributes": (lambda raw, state: OneDict(a=raw, b=state), itemgetter("a")),
    "a model output": (lambda raw, state: ModelOutput(last_hidden_state=raw, all=(state, raw), cache=CACHE), None),
}


@pytest.mark.parametrize("by", ["raw", "state"])
@pytest.mark.parametrize("kind", RETURNED)
@pytest.mark.parametrize("dropout", [None, PLAIN])
def test_results_are_rebuilt_and_a_loss_finds_the_run_by_raw_or_a_state(dropout: Any, kind: str, by: str) -> None:
    (give, output), own = RETURNED[kind], []
    module = lm.Returning(lambda hidden: own.append(give(2 * hidden, hidden.sum((0, 1)))) or own[0])
    model = Attached(module, dropout, output=output)
    result = module(lm.inputs())
    raw, state = (next(x for x in tensors_in(result) if x.dim() == axes) for axes in (3, 1))
    run = model.end(raw, model.dropout(raw))
    model.check(run, loss=(run.dropped if by == "raw" else state).sum())
    assert type(result) is type(own[0])
    assert result is not own[0]  # which the module may keep
    if kind == "a dictionary that is its attributes":
        assert vars(result) is result
    if kind == "a model output":
        assert [*result] == [*own[0]]
        assert result.last_hidden_state is result["last_hidden_state"] is result["all"][1] is raw
        assert result.cache is result["cache"] is CACHE


class Closed(tuple):
    """A tuple with another constructor."""

    def __new__(cls, raw: Tensor, state: Tensor) -> Any:
        return super().__new__(cls, (raw, state))


def test_an_object_that_cannot_be_rebuilt_passes_unchanged() -> None:
    model = Attached(lm.Returning(lambda raw: Closed(raw, raw.sum(1))), PLAIN)
    raw, state = model.rnn(lm.inputs())
    model.check(model.end(raw, model.dropout(raw)))
    with pytest.raises(RuntimeError, match="nothing was captured"):
        model.reg.on_backward_begin(state.sum())


AT_ONCE = r"Output \d of FastregAttach\w* is a view and is being modified inplace"
GAP = r"attached \w+ did not get the output of the LSTM: something lies between .* a full backward hook.*clear\(\)"
CHANGED = r"did not get the output of the .*, or it was changed in place, as by Dropout\(inplace=True\)"
IN_PLACE = f"modified by an inplace operation|{CHANGED}"


@lm.each_dropout
@pytest.mark.parametrize("what", [0, 1], ids=["raw", "a view of it"])
def test_outputs_that_share_memory_are_not_changed_in_place(what: int, dropout: Any) -> None:
    model = Attached(lm.Returning(lambda hidden: (raw := 2 * hidden, raw[:, -1])), dropout)
    result = model.rnn(lm.inputs())
    with pytest.raises(RuntimeError, match=AT_ONCE if dropout is None or what > 0 else IN_PLACE):
        (result[what].mul_(2), model.reg.on_backward_begin(model.dropout(result[0]).sum()).backward())


@lm.each_dropout
def test_an_argument_that_a_module_returns_may_be_changed_in_place(dropout: Any) -> None:
    x = lm.inputs().requires_grad_()
    z, want = x * 1, lm.inputs()
    model = Attached(lm.Returning(lambda hidden: (2 * hidden, z)), dropout)
    _, same = model.rnn(x, memory=z)
    same.mul_(3)
    torch.testing.assert_close(torch.autograd.grad((z * want).sum(), x)[0], 3 * want)


class Counting(Attached):
    """Steps that return a loss, and the run whose penalty belongs to it.

    The random steps of `tests/random_training.py` have several runs, states, and modules that share a dropout.
    """

    def one_that_an_earlier_loss_missed(self, x: Tensor) -> Any:
        run = self(x)
        self.reg.on_backward_begin(self(x).loss).backward()
        return run.loss, run

    def one_beside_a_run_that_is_taken(self, x: Tensor) -> Any:
        taken = self(x)
        self.reg.take(taken.loss)
        return taken.loss + (run := self(x)).loss, run

    def one_before_a_validation(self, x: Tensor) -> Any:
        run = self(x)
        no_grad(self)(x)
        no_grad(self.dropout)(run.raw)
        self.eval()(x)
        self.train()
        return run.loss, run

    def a_frozen_one_behind_a_layer(self, x: Tensor) -> Any:
        run = frozen(self)(self.head(x))
        return run.loss + self(x).loss, run

    def one_with_its_dropout_in_evaluation(self, x: Tensor) -> Any:
        self.dropout.eval()
        return (run := self(x)).loss, run

    def one_with_a_checkpointed_dropout_that_a_backward_recomputes_while_it_waits(self, x: Tensor) -> Any:
        raw, state = self.rnn(x)
        run = self.end(raw, cp(self.dropout, raw), state)
        loss = run.loss + state[0].sum()
        torch.autograd.grad(loss, [*self.rnn.parameters()], retain_graph=True)
        no_grad(self)(x)  # which is no reentrant checkpoint
        return loss, run


def check_counting(model: Counting, loss: Tensor, run: Any, **tolerance: float) -> None:
    model.check(run, loss=loss, **tolerance)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        model.reg.on_backward_begin(loss)


@lm.each_dropout
@steps(Counting)
def test_a_loss_takes_the_runs_that_count(step: str, dropout: Any) -> None:
    model = Counting(nn.LSTM, dropout)
    check_counting(model, *getattr(model, step)(lm.inputs()))


@lm.each_dropout
@pytest.mark.parametrize("around", [torch.autograd.graph.save_on_cpu, Nothing, partial(torch.autocast, "cpu")])
def test_a_run_in_another_state_of_pytorch_counts(around: Any, dropout: Any) -> None:
    model = Counting(nn.LSTM, dropout)
    with around():
        run = model(lm.inputs())
    tolerance = {"rtol": 0.02, "atol": 0.002} if isinstance(around, partial) else {}  # autocast rounds each gradient
    check_counting(model, run.loss.float(), run, **tolerance)


def test_a_module_beside_the_model_may_be_on_another_device(device: str) -> None:
    model, other = Attached(nn.LSTM, PLAIN), lm.gru().to(device)
    model.reg.attach(other)
    run, raw = model(lm.inputs()), other(lm.inputs().to(device))[0].cpu()
    model.check(run, lm.Run(raw, raw, None, raw), loss=run.loss + raw.sin().sum())


def packed_steps(m: Attached, x: Tensor) -> Any:
    return sum(m.dropout(m.rnn(packed(y, 1, 1, 1))[0].data).sum() for y in x.split(1, 1))


def dropout_in_place(m: Attached, x: Tensor) -> Tensor:
    m.dropout.inplace = True
    return m(x).loss


TWICE = "got one output of the LSTM twice, and AR is of one dropped tensor; use fused_ar_tar"
SHARED = r"attach: this LSTM shares .*Use DistributedDataParallel .*remove\(\) the attachment"
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {  # steps that return a loss
    "packed steps": (packed_steps, "7 times"),
    "a copy that shares the hooks": (lambda m, x: copy.copy(m.rnn)(x), SHARED),
    "a replica": (lambda m, x: m.rnn._replicate_for_data_parallel()(x), SHARED),
    "dropped in place": (lambda m, x: m.head(m(x).dropped.relu_()).sum(), AT_ONCE),
    "none of dropped": (lambda m, x: m.head(no_grad(m.dropout)(raw := m.rnn(x)[0])).sum() + 0 * raw.sum(), GAP),
    "a loss of raw": (lambda m, x: m.rnn(x)[0].sum(), GAP),
    "raw twice": (lambda m, x: m.dropout((a := m(x)).raw).sum() + a.loss, TWICE),
    "a slice": (lambda m, x: m.dropout(m.rnn(x)[0][:, 1:]).sum(), GAP),
    "by its dropout": (dropout_in_place, CHANGED),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_steps_are_refused(case: str) -> None:
    (step, message), model, x = REFUSED[case], Attached(nn.LSTM, PLAIN), lm.inputs()
    with pytest.raises(RuntimeError, match=message):
        model.reg.on_backward_begin(step(model, x)).backward()
    model.dropout.inplace = False
    model.check(model(x))


@pytest.mark.parametrize("kind", [nn.LSTM, lm.Elementwise])  # raw of the LSTM is a view
@pytest.mark.parametrize("dropout", [PLAIN, FUSED])
def test_raw_that_was_changed_without_gradients_is_refused(dropout: Any, kind: Any) -> None:
    model = Attached(kind, dropout)
    raw, state = model.rnn(lm.inputs())  # which owns the run, where the change takes raw's node away
    no_grad(raw.mul_)(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        model.reg.on_backward_begin(model.dropout(raw).sum())
    del state
    model.check(model(lm.inputs()))


@pytest.mark.parametrize("given", ["raw", "dropped"])
@pytest.mark.parametrize("dropouts", [(PLAIN, PLAIN), (FUSED, FUSED), (None, None), (FUSED, None), (None, PLAIN)])
def test_a_block_that_returns_its_input_counts_like_any_other(dropouts: Any, given: str) -> None:
    """Stochastic depth skips a block at random; the block before it is attached, too."""
    model, block = Attached(nn.LSTM, dropouts[0]), nn.Identity()
    after = dropouts[1] and lm.dropout_of(dropouts[1])
    model.reg.attach(block, after, batch_first=True)
    first = model(lm.inputs())
    raw = block(getattr(first, given))
    dropped = after(raw) if after else raw
    loss = dropped.sin().sum() + (first.loss if given == "raw" else 0.0)
    model.check(first, lm.Run(raw, dropped, None, raw), loss=loss)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:FusedRNNDropout")
@lm.each_dropout
def test_a_module_adds_nothing_inside_a_transform(dropout: Any) -> None:
    model, x = Attached(nn.LSTM, dropout), lm.inputs()
    torch.jit.trace(model, x, check_trace=False)
    with forward_ad.dual_level():
        model(x)
    torch.func.grad(lambda y: model(y).loss)(x)
    model.check(model(x))


@lm.each_dropout
@pytest.mark.parametrize("of", [float, torch.tensor])
def test_coefficients_are_those_of_the_forward(of: Any, dropout: Any) -> None:
    model = Attached(nn.LSTM, dropout)
    model.reg.alpha, model.reg.beta = of(ALPHA), of(BETA)
    run = model(lm.inputs())
    model.reg.alpha, model.reg.beta = of(5.0), of(0.0)
    model.check(run)


@lm.each_dropout
def test_coefficients_are_moved_to_the_device_of_raw(dropout: Any) -> None:
    """The meta device stands for a GPU."""
    model = Attached(nn.GRU, dropout).to("meta")
    model.reg.alpha, model.reg.beta = torch.tensor(ALPHA), torch.tensor(BETA)
    terms: Any = model.reg.take(model(lm.inputs().to("meta")).loss)
    assert [x.device.type for x in terms] == ["meta"] * 3


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Turn the garbage collection off."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
@lm.each_dropout
@pytest.mark.parametrize("end", ["dropped", "raw only", "taken", "after the backward"])
def test_the_activations_of_a_run_go_with_its_outputs_or_the_backward(end: str, dropout: Any) -> None:
    model: Any = Attached(nn.LSTM, dropout)
    run: Any = (model.rnn if end == "raw only" else model)(lm.inputs())  # a tuple that begins with raw
    memory, loss = [weakref.ref(x.untyped_storage()) for x in tensors_in(run[:2])], None
    if end == "taken":
        model.reg.take(run.loss)
    if end == "after the backward":
        loss = model.reg.on_backward_begin(run.loss)
        loss.backward()
    del run
    assert [x() for x in memory if x() is not None] == []
    assert loss is None or loss.grad_fn is not None  # the loss lives


@lm.each_dropout
@pytest.mark.parametrize("by", ["the same regularizer", "another one"])
def test_the_last_attachment_wins(by: str, dropout: Any) -> None:
    """A cell of a notebook runs again, a fit was interrupted, or a trainer attaches in each fit."""
    model = Attached(nn.LSTM, dropout)
    for _ in range(3):
        model.reg = model.reg if by == "the same regularizer" else lm.regularizer()
        model.handle = model.reg.attach(model.rnn, dropout and model.dropout)
        for _ in range(2):
            model.check(model(lm.inputs()))
        assert lm.hooks_of(model) == 1 + (dropout is not None)
        assert repr(model.reg).count("LSTM") == 1
    with model.handle:
        model(lm.inputs())
    assert lm.hooks_of(model) == 0
    model.handle.remove()  # twice is once


@lm.each_dropout
def test_a_regularizer_whose_module_another_one_has_attached_is_told_at_its_next_loss(dropout: Any) -> None:
    model, other, thief = Attached(nn.LSTM, dropout), lm.gru(), lm.regularizer()
    own, take_over = model.reg, partial(thief.attach, model.rnn, dropout and model.dropout)
    own.attach(other)
    model(lm.inputs())
    take_over()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"another regularizer has attached the LSTM; remove.*attach the "):
            own.on_backward_begin(other(lm.inputs())[0].sum())
    handle = model.attach()
    model.check(model(lm.inputs()))
    take_over()
    handle.remove()
    raw, _ = other(lm.inputs())
    lm.check_gradients(other, lm.penalty_of(own, raw), lm.formula(raw, raw, 1))
    model.reg = thief
    model.check(model(lm.inputs()))


def test_two_dropouts_of_one_module_are_an_error_until_it_has_run() -> None:
    model, second = Attached(nn.LSTM, PLAIN), nn.Dropout(0.1)
    with pytest.raises(RuntimeError, match="dropout: expected the one dropout with which the LSTM is attached already"):
        model.reg.attach(model.rnn, second)
    model.attach()
    model.reg.attach(model.rnn)
    model.attach()
    model.check(model(lm.inputs()))
    model.reg.attach(model.rnn, second)
    lm.regularizer().attach(model.rnn)
    model.attach()  # as the attachment with the second dropout is no longer there
    model.check(model(lm.inputs()))


@lm.each_dropout
def test_a_compiled_module_is_attached_through_the_module_inside(dropout: Any) -> None:
    model = Attached(nn.LSTM, dropout)
    model.rnn = torch.compile(model.rnn, backend="eager")
    if dropout is not None:
        model.dropout = torch.compile(model.dropout, backend="eager")
    handle = model.reg.attach(model.rnn, dropout and model.dropout)
    assert repr(handle).startswith("LSTM -> " if dropout else "LSTM: ")
    for _ in range(2):
        model.check(model(lm.inputs()))


@lm.each_dropout
def test_a_saved_model_loads_without_fastreg(dropout: Any, tmp_path: Path) -> None:
    """A hook on the loaded model, in a new process, whose ids of hooks start anew, gets an id that is free."""
    rnn, reg, seen = nn.LSTM(4, 5, batch_first=True), lm.regularizer(), []
    reg.attach(rnn, dropout and lm.dropout_of(dropout))
    rnn(torch.zeros(2, 3, 4))
    before = RemovableHandle.next_id
    for model in (nn.Sequential(rnn), rnn):
        torch.save(model, tmp_path / "model")
        RemovableHandle.next_id = next(iter(rnn._forward_hooks))
        with without("fastreg"):
            loaded = lm.pickled(copy.deepcopy(torch.load(tmp_path / "model", weights_only=False)))
            (loaded if model is rnn else loaded[0]).register_forward_hook(lambda *args: seen.append(len(args)))
            assert loaded(torch.zeros(2, 3, 4))[0].shape == (2, 3, 5)
    RemovableHandle.next_id = max(before, RemovableHandle.next_id)
    assert seen == [3, 3]
    assert lm.hooks_of(rnn) == 1


@lm.each_dropout
def test_a_parameter_that_a_module_returns_is_raw(dropout: Any) -> None:
    given, model = nn.Parameter(torch.randn(SHAPE)), Attached(nn.Identity(), dropout, batch_first=True)
    for _ in range(2):
        raw = model.rnn(given)
        dropped = model.dropout(raw)
        got, want = lm.penalty_of(model.reg, dropped), lm.formula(raw, dropped, 1)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, given, retain_graph=True) for x in (got, want)))


class Derived(FusedRNNDropout):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


GRU, TIME_FIRST, ON_1 = nn.GRU(1, 1, batch_first=True), nn.LSTM(1, 1), FUSED(0.4, 0, 0, time_dim=1)
REJECTED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "module": ("lstm", {}, TypeError, "module: expected an nn.Module, got str"),
    "dropout": (GRU, {"dropout": 0.5}, TypeError, "dropout: expected an nn.Module, got float"),
    "derived": (GRU, {"dropout": Derived(0.4, 0, 0)}, TypeError, "expected a forward without changes, .* Derived"),
    "no layout": (LINEAR, {}, ValueError, "batch_first: expected True .* as the Linear does not have it, got None"),
    "layout inside": (nn.Sequential(TIME_FIRST), {}, ValueError, "expected True .* like the LSTM inside it, got None"),
    "other axis": (TIME_FIRST, {"time_dim": 1}, ValueError, "time_dim: expected None, as the LSTM .*=False, got 1"),
    "other layout": (TIME_FIRST, {"batch_first": True}, ValueError, "batch_first: .* False, as the LSTM has it, or"),
    "fused": (TIME_FIRST, {"dropout": FUSED(0.4, 0, 0)}, ValueError, "with batch_first=False, .* got batch_first=True"),
    "fused axis": (LINEAR, {"dropout": ON_1} | AXIS, ValueError, "with time_dim=2.*, got time_dim=1"),
}


@pytest.mark.parametrize("argument", REJECTED)
def test_attach_names_what_was_expected(argument: str) -> None:
    module, options, error, message = REJECTED[argument]
    with pytest.raises(error, match=message):
        lm.regularizer().attach(module, **options)
    assert not getattr(module, "_forward_hooks", None)


WRONG = r"^attach: expected the Returning to return a tensor or a PackedSequence, got {}; .* output="
GIVEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "give a dictionary with attributes": ({"give": lambda raw: AttrDict(raw=raw)}, TypeError, WRONG.format("AttrDict")),
    "give nested": ({"give": torch.nested.as_nested_tensor}, TypeError, "raw: expected a dense .* got nested"),
    "give two axes": ({"give": lambda raw: raw[:, 0]}, ValueError, r"got \(3, 6\).* unflatten.*time_dim=0.*time_dim="),
    "give layers": ({"give": lambda raw: [raw, 2 * raw]}, TypeError, WRONG.format("list")),
    "output": ({"output": str}, TypeError, "output: .* callable to pick a tensor .* got str"),
    "dropout": ({"dropout": lm.gru()}, TypeError, "dropout: expected .* the attached GRU, got tuple"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", GIVEN)
def test_a_step_names_what_was_expected_of_a_module(what: str) -> None:
    options, error, message = GIVEN[what]
    module = lm.Returning(options.get("give", lambda raw: raw))
    lm.regularizer().attach(module, **{name: x for name, x in options.items() if name != "give"})
    with pytest.raises(error, match=message):
        (options.get("dropout") or nn.Identity())(module(lm.inputs()))
