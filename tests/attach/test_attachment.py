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
from operator import attrgetter, itemgetter
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.hooks import RemovableHandle

from fastreg import FusedRNNDropout, fused_ar_tar
from fastreg.attach.outputs import tensors_in
from tests import language_model as lm
from tests.attach import cp, frozen, no_grad, reentrant, steps
from tests.calls import Nothing
from tests.conftest import memory_of, skip_on_formula, without
from tests.language_model import ALPHA, BATCH, BETA, FUSED, HIDDEN, PLAIN, STARTS, TIME, VALID, Attached

LINEAR, SHAPE = nn.Linear(HIDDEN, HIDDEN), (BATCH, TIME, HIDDEN)
LSTM = partial(nn.LSTM, HIDDEN, HIDDEN, batch_first=True)
MASK: dict[str, Any] = {"valid": lambda x: VALID[0]}  # of one sequence
# A module, the options of `attach`, the shape of the input, and the axis of time.
LAYOUTS: dict[str, tuple[Callable[[], Any], dict[str, Any], tuple[int, ...], int]] = {
    "bidirectional": (partial(LSTM, bidirectional=True, num_layers=2), {}, SHAPE, 1),
    "an LSTM, time first": (partial(LSTM, batch_first=False), {}, SHAPE, 0),
    "unbatched": (LSTM, MASK, (TIME, HIDDEN), 0),
    "batch first": (lambda: LINEAR, {"batch_first": True}, SHAPE, 1),
    "time first": (lambda: LINEAR, {"batch_first": False}, SHAPE, 0),
    "a sequence, picked": (lambda: LINEAR, {"batch_first": True, "output": lambda raw: raw} | MASK, (TIME, HIDDEN), 0),
    "an axis": (lambda: LINEAR, {"time_dim": 2}, (BATCH, 2, TIME, HIDDEN), 2),
    "an axis of two": (lambda: LINEAR, {"time_dim": 1}, (BATCH, HIDDEN), 1),
    "an axis from the end": (lambda: LINEAR, {"time_dim": -3}, (TIME, 2, HIDDEN), 0),
}


@lm.each_dropout
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_a_module(name: str, dropout: Any, device: str) -> None:
    make, options, shape, axis = LAYOUTS[name]
    module, reg = make().to(device), lm.regularizer()
    layout: Any = {"batch_first": getattr(module, "batch_first", None)} | options
    layout = {name: layout.get(name) for name in ("batch_first", "time_dim")} if dropout is FUSED else {}
    after = nn.Identity() if dropout is None else dropout(0.4, **layout)
    with reg.attach(module, dropout and after, **options):
        result = module(torch.randn(shape, device=device))
        raw = result[0] if isinstance(result, tuple) else result
        dropped = after(raw)
        valid = VALID[0] if "valid" in options else None
        want = fused_ar_tar(raw, dropped, ALPHA, BETA, time_dim=axis, valid=valid)
        lm.check_gradients(module, lm.penalty_of(reg, dropped), want)


def packed(x: Tensor, *lengths: int) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=True)


@pytest.mark.parametrize(("dropout", "takes"), [(None, "rows"), (PLAIN, "rows"), (PLAIN, "packed sequences")])
def test_packed_output(dropout: Any, takes: str) -> None:
    model = Attached(nn.LSTM, dropout)
    raw, _ = model.rnn(packed(lm.inputs(), 7, 4, 2))
    if takes == "rows":
        dropped = raw._replace(data=model.dropout(raw.data))
    else:
        model.dropout.forward = lambda x: x._replace(data=2 * x.data)
        dropped = model.dropout(raw)
    loss = model.end(raw.data, dropped.data).loss
    assert type(raw) is type(dropped) is PackedSequence
    lm.check_gradients(model, model.reg.on_backward_begin(loss), loss + fused_ar_tar(raw, dropped, ALPHA, BETA))


def test_a_fused_dropout_takes_the_rows_of_a_packed_sequence_in_evaluation_alone() -> None:
    model = Attached(nn.LSTM, FUSED)
    raw, _ = model.rnn(packed(lm.inputs(), 7, 4, 2))
    with pytest.raises(TypeError, match=r"FusedRNNDropout: expected .* a tensor, got the data of a PackedSequence"):
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
    """A dictionary whose items are attributes, too, as in Transformers, without a link between them."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        vars(self).update(items)


class AttrDict(dict):
    """A dictionary that takes a missing attribute for a missing item, and raises `KeyError`."""

    __getattr__: Any = dict.__getitem__


class Closed(dict):
    """A dictionary whose items are given once."""

    def __setitem__(self, *_: Any) -> None:
        raise TypeError("closed")


class OneDict(dict):
    """A dictionary whose items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


CACHE = SimpleNamespace(keys=[torch.ones(2)])  # any object of the model
Pair = namedtuple("Pair", "raw state")
RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {  # a result with raw and a state, and `output`
    "a tuple": (lambda raw, state: (raw, (state, CACHE, state.to_sparse())), None),
    "lists": (lambda raw, state: [[raw], {"a": [state]}], lambda result: result[0][0]),
    "a named tuple": (Pair, None),
    "a dictionary": (lambda raw, state: {"a": raw, "b": state}, itemgetter("a")),
    "attributes": (lambda raw, state: AttrDict(last_hidden_state=raw, c=state), None),
    "a dictionary that is its attributes": (lambda raw, state: OneDict(a=raw, b=state), itemgetter("a")),
    "picked": (lambda raw, state: (state, raw), itemgetter(1)),
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
    raw, state = (next(x for x in tensors_in(result).values() if x.dim() == axes) for axes in (3, 1))
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


def test_a_dropout_gets_raw_from_an_opaque_object() -> None:
    model = Attached(lm.Returning(lambda raw: SimpleNamespace(raw=raw)), PLAIN, output=attrgetter("raw"))
    raw = model.rnn(lm.inputs()).raw
    model.check(model.end(raw, model.dropout(raw)))


AT_ONCE = r"Output \d of FastregAttach\w* is a view and is being modified inplace"
IN_PLACE = "modified by an inplace operation|changed in place before or by its dropout"


@lm.each_dropout
@pytest.mark.parametrize("what", [0, 1, 2], ids=["raw", "a view of it", "the input"])
def test_outputs_that_share_memory_are_not_changed_in_place(what: int, dropout: Any) -> None:
    x = lm.inputs().requires_grad_() * 1
    model = Attached(lm.Returning(lambda hidden: (raw := 2 * hidden, raw[:, -1], x)), dropout)
    result = model.rnn(x)
    with pytest.raises(RuntimeError, match=AT_ONCE if dropout is None or what > 0 else IN_PLACE):
        (result[what].mul_(2), model.dropout(result[0]))


class Counting(Attached):
    """Steps that return a loss, and the runs whose penalties belong to it.

    The random steps of `tests/random_training.py` have several runs, states, and modules that share a dropout.
    """

    def a_state_reset_in_place(self, x: Tensor) -> Any:
        first = self(x)
        first.hidden[:, 1].zero_()
        second = self(x, first.state)
        return first.hidden.square().sum() + second.loss, [first, second]

    def one_beside_a_run_that_is_taken(self, x: Tensor) -> Any:
        taken = self(x)
        self.reg.take(taken.loss)
        return taken.loss + (run := self(x)).loss, [run]

    def one_beside_a_run_of_a_removed_handle(self, x: Tensor) -> Any:
        with self.reg.attach(other := lm.gru()):
            raw, _ = other(x)
        return (run := self(x)).loss + raw.sum(), [run]

    def one_that_an_earlier_loss_missed(self, x: Tensor) -> Any:
        run = self(x)
        self.reg.on_backward_begin(self(x).loss).backward()
        return run.loss, [run]

    def one_before_a_validation(self, x: Tensor) -> Any:
        run = self(x)
        no_grad(self)(x)
        no_grad(self.dropout)(run.raw)
        self.eval()(x)
        self.train()
        return run.loss, [run]

    def one_after_clear(self, x: Tensor) -> Any:
        self.kept = self.rnn(x)[0]
        self.dropout(self.kept[:, 1:])  # is no output of the RNN
        self.reg.clear()
        return (run := self(x)).loss, [run]

    def a_frozen_one_behind_a_layer(self, x: Tensor) -> Any:
        run = frozen(self)(self.head(x))
        return run.loss + self(x).loss, [run]

    def one_with_its_dropout_in_evaluation(self, x: Tensor) -> Any:
        self.dropout.eval()
        return (run := self(x)).loss, [run]

    def one_with_later_hooks_of_others(self, x: Tensor) -> Any:
        """Replace outputs; a backward hook on a module with a dropout is an error."""
        self.rnn.register_forward_hook(lm.doubled)
        if type(self.dropout) is nn.Identity:
            self.rnn.register_full_backward_hook(lambda *_: None)
        else:
            self.dropout.register_forward_hook(lm.doubled)
        return (run := self(x.requires_grad_())).loss, [run]

    def one_with_a_checkpointed_dropout(self, x: Tensor) -> Any:
        raw, state = self.rnn(x)
        return self._recomputed(self.end(raw, cp(self.dropout, raw), state))

    def a_checkpointed_one_with_save_on_cpu_inside(self, x: Tensor) -> Any:
        def call(x: Tensor) -> Any:
            with torch.autograd.graph.save_on_cpu():
                begun = self.begin(x)
            return self.end(*begun)  # whose backward recomputes the whole

        return self._recomputed(cp(call, x))

    def _recomputed(self, run: Any) -> Any:
        """Recompute a run while it waits, and run the module without gradients, which is no reentrant checkpoint."""
        loss = run.loss + run.hidden.sum()
        torch.autograd.grad(loss, [*self.rnn.parameters()], retain_graph=True)
        no_grad(self)(lm.inputs())
        return loss, [run]


def check_counting(model: Counting, loss: Tensor, runs: Any, **tolerance: float) -> None:
    model.check(*runs, loss=loss, **tolerance)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        model.reg.on_backward_begin(loss)


@lm.each_dropout
@steps(Counting)
def test_the_runs_that_count(step: str, dropout: Any) -> None:
    for kind in (nn.LSTM, nn.GRU) if "state" in step else (nn.LSTM,):
        model = Counting(kind, dropout)
        check_counting(model, *getattr(model, step)(lm.inputs()))


@lm.each_dropout
@pytest.mark.parametrize("around", [torch.autograd.graph.save_on_cpu, Nothing, partial(torch.autocast, "cpu")])
def test_a_run_in_another_state_of_pytorch_counts(around: Any, dropout: Any) -> None:
    model = Counting(nn.LSTM, dropout)
    with around():
        run = model(lm.inputs())
    tolerance = {"rtol": 0.02, "atol": 0.002} if isinstance(around, partial) else {}  # autocast rounds each gradient
    check_counting(model, run.loss.float(), [run], **tolerance)


def test_a_module_beside_the_model_may_be_on_another_device(device: str) -> None:
    model, other = Attached(nn.LSTM, PLAIN), lm.gru().to(device)
    model.reg.attach(other)
    run, raw = model(lm.inputs()), other(lm.inputs().to(device))[0].cpu()
    model.check(run, lm.Run(raw, raw, None, raw), loss=run.loss + raw.sin().sum())


class Refused(Attached):
    """Steps that return a loss, and are refused."""

    def hooked(self, module: nn.Module, x: Tensor) -> Tensor:
        with module.register_full_backward_hook(lambda *_: None):
            return self(x).loss

    def inside_another(self, x: Tensor) -> Tensor:
        with self.reg.attach(self, batch_first=True):
            return self(x).loss

    def dual(self, x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return self(x).loss

    def quantized(self, x: Tensor) -> Tensor:
        """Pass no gradient through the dropout, as a quantizer whose codebook learns by an average."""
        with self.dropout.register_forward_hook(lambda *given: given[-1].detach()):
            return self(x).loss

    def packed_steps(self, x: Tensor) -> Any:
        return sum(self.dropout(self.rnn(packed(y, 1, 1, 1))[0].data).sum() for y in x.split(1, 1))

    def dropout_in_place(self, x: Tensor) -> Tensor:
        self.dropout.inplace = True
        return self(x).loss


LATE = "attach: the attached LSTM runs in a backward, where its penalty is lost; pass use_reentrant=False"
GAP = r"attached \w+ did not get the output of the LSTM: something lies between .* a full backward hook.*clear\(\)"
TWICE = "got the same output of the LSTM twice, and AR is defined for one dropped tensor"
SHARED = r"attach: this LSTM shares .*Use DistributedDataParallel .*remove\(\) .* attach again"
INSIDE = "of the Refused is regularized already, by an attached module inside it; attach only one of them"
TRANSFORM = r"attach: no loss can find the penalty of the attached LSTM under a transform .*fused_ar_tar"
QUANTIZED = r"attach: no loss can find the penalty, as the output of the attached \w+ needs no gradient; let"
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a reentrant checkpoint and another run": (lambda m, x: reentrant(m, x) + m(x).loss, LATE),
    "a transform": (lambda m, x: torch.func.grad(lambda y: m(y).loss)(x).sum(), TRANSFORM),
    "forward-mode AD": (Refused.dual, TRANSFORM),
    "a trace": (lambda m, x: torch.jit.trace(m, x, check_trace=False), TRANSFORM),
    "the model around": (Refused.inside_another, INSIDE),
    "packed steps": (Refused.packed_steps, "7 times"),
    "a copy that shares the hooks": (lambda m, x: copy.copy(m.rnn)(x), SHARED),
    "a replica": (lambda m, x: m.rnn._replicate_for_data_parallel()(x), SHARED),
    "dropped in place": (lambda m, x: m.head(m(x).dropped.relu_()).sum(), AT_ONCE),
}
REFUSED_WITH_A_DROPOUT: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "none of dropped": (lambda m, x: m.head(no_grad(m.dropout)(m.rnn(x)[0])).sum(), GAP),
    "a quantizer": (Refused.quantized, QUANTIZED),
    "a loss of raw": (lambda m, x: m(x).raw.sum(), "the attached LSTM ran, but the loss does not depend on its output"),
    "raw twice": (lambda m, x: m.dropout((a := m(x)).raw).sum() + a.loss, TWICE),
    "a slice": (lambda m, x: m.dropout(m.rnn(x)[0][:, 1:]).sum(), GAP),
    "no dropout": (lambda m, x: m.rnn(x)[1][0].sum(), GAP),
    "a hook on the RNN": (lambda m, x: m.hooked(m.rnn, x), GAP),
    "a hook on the dropout": (lambda m, x: m.hooked(m.dropout, x), GAP),
    "by its dropout": (Refused.dropout_in_place, IN_PLACE),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("case", "dropout"),
    [(case, dropout) for case in REFUSED for dropout in (None, PLAIN)] + [(x, PLAIN) for x in REFUSED_WITH_A_DROPOUT],
)
def test_steps_that_are_refused(case: str, dropout: Any) -> None:
    step, message = (REFUSED | REFUSED_WITH_A_DROPOUT)[case]
    model, x = Refused(nn.LSTM, dropout), lm.inputs()
    with pytest.raises(RuntimeError, match=message):
        model.reg.on_backward_begin(step(model, x)).backward()
    model.dropout.inplace = False
    if message is not GAP:  # which comes at the loss
        model.reg.clear()
    model.check(model(x))


@pytest.mark.parametrize("dropouts", [(PLAIN, PLAIN), (None, None), (FUSED, None), (None, PLAIN)])
def test_a_block_that_returns_its_input_counts_like_any_other(dropouts: Any) -> None:
    """Stochastic depth skips a block at random; the block before it is attached, too."""
    model, block = Attached(nn.LSTM, dropouts[0]), nn.Identity()
    after = dropouts[1] and dropouts[1](0.4)
    model.reg.attach(block, after, batch_first=True)
    first = model(lm.inputs())
    raw = block(first.dropped)
    dropped = after(raw) if after else raw
    model.check(first, lm.Run(raw, dropped, None, raw), loss=dropped.sin().sum())


@pytest.mark.parametrize("where", ["rnn", "dropout"])
def test_a_module_whose_class_gets_another_forward_is_refused(where: str) -> None:
    """The hooks have made its forward an attribute, which would hide the new one."""
    model = Attached(nn.GRU, PLAIN)
    module = getattr(model, where)
    module.__class__ = type("Other", (type(module),), {"forward": lambda self, *args: None})
    with pytest.raises(RuntimeError, match=r"attach: this Other shares the hooks .*; or the forward of its class was"):
        model(lm.inputs())


@pytest.mark.parametrize("dropout", [PLAIN, FUSED])
@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize(
    ("before", "change"),
    [(2.0, lambda x: 3.0), (2.0, torch.tensor), (torch.tensor(2.0), torch.clone), (torch.tensor(2.0), Tensor.abs_)],
)
def test_coefficients_are_those_of_the_forward(before: Any, change: Any, name: str, dropout: Any) -> None:
    model = Attached(nn.LSTM, dropout)
    setattr(model.reg, name, before)
    run = model(lm.inputs())
    setattr(model.reg, name, change(before))
    with pytest.raises(RuntimeError, match="alpha or beta has changed since the forward of the attached LSTM"):
        model.reg.on_backward_begin(run.loss)
    run = model(lm.inputs())
    total, value = model.reg.on_backward_begin(run.loss), getattr(model.reg, name)
    want = run.loss + lm.formula(run.raw, run.dropped, 1, **{name: float(value)})
    setattr(model.reg, name, 5.0)  # which is too late for this loss
    lm.check_gradients(model, total, want)
    if isinstance(value, Tensor):
        value.fill_(5.0)
        with pytest.raises(RuntimeError, match=f"{name}: expected the value that the forward has read, .* inplace"):
            total.backward(retain_graph=True)
        run.loss.backward()  # contains no penalty


def test_ar_of_raw_stays_when_a_hook_of_others_replaces_dropped() -> None:
    model = Attached(nn.LSTM, partial(FusedRNNDropout, ar_of="raw"))
    model.dropout.register_forward_hook(lm.doubled)
    run = model(lm.inputs())
    model.check(run._replace(dropped=run.raw))


def test_ar_is_of_the_output_that_a_hook_of_others_has_changed_in_place() -> None:
    model = Attached(nn.LSTM, FUSED)
    model.dropout.register_forward_hook(lambda _module, _args, dropped: dropped.mul_(0.5))
    model.check(model(lm.inputs()))


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Turn the garbage collection off."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
@lm.each_dropout
@pytest.mark.parametrize("end", ["dropped", "raw only", "taken"])
def test_the_graph_of_a_run_goes_with_its_outputs(end: str, dropout: Any) -> None:
    model, x, probe = Attached(nn.LSTM, dropout), lm.inputs().requires_grad_() * 1, torch.empty(0)
    x.grad_fn.metadata["probe"], alive = probe, weakref.ref(probe)  # pyright: ignore
    if end == "raw only":
        model.rnn(x)
    else:
        run = model(x)
        if end == "taken":
            model.reg.take(run.loss)
        del run
    del x, probe
    assert alive() is None


@pytest.mark.usefixtures("no_collections")
def test_a_removed_handle_goes_with_the_batch_in_its_masks() -> None:
    reg, batch = lm.regularizer(), torch.ones(2, 3)
    handle, alive = reg.attach(lm.gru(), valid=lambda *_, kept=batch: kept), weakref.ref(batch)
    handle.remove()
    del handle, batch
    assert alive() is None


@pytest.mark.usefixtures("no_collections")
@lm.each_dropout
def test_no_activation_is_kept_after_the_backward_while_the_loss_lives(dropout: Any) -> None:
    model = Attached(nn.LSTM, dropout)
    run = model(lm.inputs())
    memory = [weakref.ref(x.untyped_storage()) for x in (run.raw, run.dropped)]
    total = model.reg.on_backward_begin(run.loss)
    del run
    total.backward()
    assert [x() for x in memory] == [None, None]
    assert total.grad_fn is not None


def test_a_run_forms_no_gradients_ahead() -> None:
    """They would take memory during the forwards of all other layers."""
    skip_on_formula("cpu")
    module, reg, x = nn.Identity(), lm.regularizer(), torch.randn(8, 7, 900, requires_grad=True)
    reg.attach(module, batch_first=True)
    assert memory_of(lambda: module(x), "cpu")[0] < 0.5 * x.nbytes


@lm.each_dropout
def test_a_module_has_one_regularizer_with_which_its_hooks_go(dropout: Any) -> None:
    model, regs = Attached(nn.LSTM, dropout), [lm.regularizer(), lm.regularizer()]
    message = r"module: the LSTM is attached already, .*remove\(\) its handle.*restart the kernel"
    for reg in (model.reg, regs[0]):
        with pytest.raises(RuntimeError, match=message):
            reg.attach(model.rnn)
    regs[1].attach(copy.deepcopy(model.rnn))
    with model.handle:
        model(lm.inputs())
    model.handle.remove()  # twice is once
    assert lm.hooks_of(model) == 0
    handle = regs[0].attach(model.rnn, dropout and model.dropout)
    alive = weakref.ref(model(lm.inputs()).raw)
    del reg
    regs.clear()
    assert alive() is None
    for module in (model.rnn, model.dropout):
        assert not {*vars(module)["_forward_hooks"], *vars(module)["_forward_pre_hooks"]}
        assert "forward" not in vars(module)
    model.reg.attach(model.rnn)
    handle.remove()  # is nothing by now
    assert lm.hooks_of(model) == 1


def test_a_forward_that_a_wrapper_has_made_an_attribute_stays() -> None:
    module, reg = nn.Linear(HIDDEN, HIDDEN), lm.regularizer()
    module.forward = MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), module)
    own = module.forward
    with reg.attach(module, batch_first=True):
        raw = module(lm.inputs())
        torch.testing.assert_close(reg.on_backward_begin(raw.sum()), raw.sum() + lm.formula(raw, raw, 1))
        assert vars(copy.copy(module))["forward"] is own
    assert vars(module)["forward"] is own


@pytest.mark.filterwarnings("ignore::UserWarning")
@lm.each_dropout
def test_an_attached_model_is_exported_in_training(dropout: Any) -> None:
    class Model(Attached):
        def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x).loss

    model = Model(nn.LSTM, dropout)
    torch.export.export(model, (lm.inputs(),), strict=False)
    model.check(Attached.forward(model, lm.inputs()))


@pytest.mark.parametrize("dropout", [PLAIN, FUSED])
def test_hooks_that_are_registered_anew_without_keywords_are_an_error_in_training(dropout: Any) -> None:
    """`torch.ao` does this with the modules that it puts in place of others, and runs them in evaluation."""
    model, x = Attached(nn.GRU, dropout), lm.inputs()
    for module in (model.rnn, model.dropout):
        twin = nn.Identity()
        for hook in module._forward_pre_hooks.values():
            twin.register_forward_pre_hook(hook)
        for hook in module._forward_hooks.values():
            twin.register_forward_hook(hook)
        with pytest.raises(RuntimeError, match="attach: this Identity shares the hooks"):
            twin(x)
        twin.eval()(x)
        with pytest.raises(RuntimeError, match=f"attach: this {type(module).__name__} shares .* its own weights"):
            copy.copy(module.eval())(x)
        model.train().handle.remove()
        twin.train()(x)
        lm.regularizer().attach(twin, batch_first=True)
        model.attach_anew()


@lm.each_dropout
def test_a_saved_model_loads_without_fastreg(dropout: Any, tmp_path: Path) -> None:
    """A hook on the loaded model, in a new process, whose ids of hooks start anew, gets an id that is free."""
    rnn, reg, seen = nn.LSTM(4, 5, batch_first=True), lm.regularizer(), []
    reg.attach(rnn, dropout and dropout(0.3))
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


def test_raw_is_saved_and_copied_without_what_its_dropout_needs(tmp_path: Path) -> None:
    raw, after, reg = nn.Parameter(torch.randn(SHAPE)), nn.Dropout(0.4), lm.regularizer()
    reg.attach(module := nn.Identity(), after, batch_first=True)
    module(raw)
    torch.save(raw, tmp_path / "raw")
    for twin in (torch.load(tmp_path / "raw", weights_only=True), copy.deepcopy(raw)):
        assert torch.equal(twin, raw)
        after(twin)  # is not the dropout of the run
    torch.testing.assert_close(lm.penalty_of(reg, dropped := after(raw)), lm.formula(raw, dropped, 1))
    module(raw)  # is raw in the next step, too


class Derived(FusedRNNDropout):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


GRU, AXIS, TIME_FIRST = nn.GRU(1, 1, batch_first=True), FusedRNNDropout(time_dim=1), nn.LSTM(1, 1)
REJECTED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "module": ("lstm", {}, TypeError, "module: expected an nn.Module, got str"),
    "cell": (nn.LSTMCell(1, 1), {}, TypeError, "module: expected a module that runs .*LSTMCell, .*stack its outputs"),
    "script": (torch.jit.ScriptModule(), {}, TypeError, "module: expected a module of Python, got ScriptModule;"),
    "list": (nn.ModuleList([GRU]), {}, TypeError, "module: expected a module that is called itself, got ModuleList"),
    "compiled": (torch.compile(GRU), {}, RuntimeError, "module: .*compiled already; attach.* it before"),
    "dropout": (GRU, {"dropout": 0.5}, TypeError, "dropout: expected an nn.Module, got float"),
    **{
        f"swapped, {x.__name__}": (x(), {"dropout": GRU}, TypeError, f"the GRU before the {x.__name__}, got them in")
        for x in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    },
    "swapped, ours": (FUSED(), {"dropout": GRU}, TypeError, "expected the GRU before the FusedRNNDropout"),
    "derived": (GRU, {"dropout": Derived()}, TypeError, "dropout: expected the forward of FusedRNNDropout.* Derived"),
    "batch_first": (LINEAR, {"batch_first": 1}, TypeError, "batch_first: expected True or False, got 1"),
    "no layout": (LINEAR, {}, ValueError, "batch_first: expected True .* as the Linear does not have it, got None"),
    "layout inside": (nn.Sequential(TIME_FIRST), {}, ValueError, "expected True .* like the LSTM inside it, got None"),
    "other axis": (TIME_FIRST, {"time_dim": 1}, ValueError, "time_dim: expected None, as the LSTM .*=False, got 1"),
    "other layout": (TIME_FIRST, {"batch_first": True}, ValueError, "batch_first: .* False, as the LSTM has it, or"),
    "two axes": (LINEAR, {"time_dim": 2, "batch_first": True}, ValueError, "batch_first and time_dim: expected one of"),
    "fused": (TIME_FIRST, {"dropout": FUSED()}, ValueError, "with batch_first=False, as the LSTM .* got batch_first=T"),
    "fused axis": (LINEAR, {"time_dim": 2, "dropout": AXIS}, ValueError, "with time_dim=2.*, got time_dim=1"),
}


@pytest.mark.parametrize("argument", REJECTED)
def test_attach_rejects(argument: str) -> None:
    module, options, error, message = REJECTED[argument]
    with pytest.raises(error, match=message):
        lm.regularizer().attach(module, **options)
    assert not getattr(module, "_forward_hooks", None)
    assert not getattr(options.get("dropout"), "_forward_pre_hooks", None)


NO_PLACE = r"attach: expected raw as a tensor in tuples.*got a {}, in which raw cannot be replaced. A function"
CLOSED, OPAQUE = lambda raw: Closed(a=raw), lambda raw: SimpleNamespace(raw=raw)
WRONG = r"expected the Returning to return a tensor .* got {}; .*output="
GIVEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "give None": ({"give": lambda raw: None}, TypeError, WRONG.format("NoneType")),
    "give a list": ({"give": lambda raw: ([raw], 0)}, TypeError, WRONG.format("list")),
    "give a dictionary with attributes": ({"give": lambda raw: AttrDict(raw=raw)}, TypeError, WRONG.format("AttrDict")),
    "give nested": ({"give": torch.nested.as_nested_tensor}, TypeError, "raw: expected a dense .* got nested"),
    "give two axes": ({"give": lambda raw: raw[:, 0]}, ValueError, r"got \(3, 6\).* unflatten.*time_dim=0.*time_dim="),
    "give an opaque object": ({"give": OPAQUE, "output": attrgetter("raw")}, TypeError, NO_PLACE.format("SimpleNam.*")),
    "give more than raw": ({"output": lambda result: result[:, 1:]}, TypeError, NO_PLACE.format("Tensor")),
    "give closed": ({"give": CLOSED, "output": itemgetter("a")}, TypeError, "got a Closed that refuses new"),
    "output": ({"output": str}, TypeError, "output: .* callable to pick a tensor .* got str"),
    "valid that raises": ({"valid": lambda: 1}, TypeError, "takes 0 positional arguments but 1 was given"),
    "the shape of valid": ({"valid": lambda x: VALID.t()}, ValueError, "valid: expected"),
    "time_dim": ({"time_dim": 4}, ValueError, r"time_dim: expected an axis of raw, .*, from -3 to 2, got 4"),
    "dropout": ({"dropout": lm.gru()}, TypeError, "dropout: expected .* the attached GRU, got tuple"),
    "the shape of dropped": ({"dropout": nn.Flatten()}, ValueError, "dropped: expected the shape of raw"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", GIVEN)
def test_a_step_rejects(what: str) -> None:
    (options, error, message), reg = GIVEN[what], lm.regularizer()
    module = lm.Returning(options.get("give", lambda raw: raw))
    reg.attach(module, **{name: x for name, x in options.items() if name != "give"})
    with pytest.raises(error, match=message):
        (options.get("dropout") or nn.Identity())(module(lm.inputs()))
