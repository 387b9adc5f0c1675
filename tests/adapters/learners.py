"""The contract of the adapters for fastai v1 and v2; the tests of each version run it in real learners."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastreg import fused_ar_tar
from fastreg.adapter import Adapter
from tests import language_model as lm
from tests.adapters.contract import BATCHES, IDS, MASKS, PATHS, TURNED, Contract, Net, keep_in_evaluation
from tests.language_model import (
    BATCH,
    TIME,
    VOCABULARY,
    Model,
    assert_same_weights,
    criterion,
    gap,
    hooks_of,
    seeded,
    tokens,
)

ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
SCHEDULES = [(ALPHA, BETA), (ALPHA, 0.0), (0.0, BETA), (0.0, 0.0)]


def subclass(part: Any, _: Any = None) -> None:
    part.__class__ = type("Mine", (type(part),), {})


# a change of the callback or of the decoder, or `None`; the options of `fuse`; and the error
REJECTED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (None, {"rnn": "lstm"}, AttributeError, "no attribute `lstm`"),
    (lambda now, _: vars(now).update(alpha=None, beta=None), {"rnn": "0"}, TypeError, "beside rnn, got none"),
    (subclass, {}, ValueError, r"the learner has no RNN(Regularizer|Trainer) of fastai's own class"),
]


class Captures(Net):
    """Returns the tensors that fastai's callbacks capture; decoded is batch first even if the activations are not.

    Its inputs are one or several tensors, whose sum is the token ids.
    """

    captured, time_first = True, False
    flat = False  # whether decoded has rows of all sequences

    def forward(self, *inputs: Tensor) -> Any:  # pyright: ignore
        decoded, layers = self.run(torch.stack(inputs).sum(0))
        raw, dropped, _ = layers["rnn"]
        decoded = decoded.flatten(0, 1) if self.flat else decoded
        return (decoded, raw.transpose(0, 1), dropped.transpose(0, 1)) if self.time_first else (decoded, raw, dropped)


class Layers(Captures):
    """Returns the activations of two layers in lists; or its loss, with the formula for the layers that are written."""

    captured = property(lambda self: not self.written)

    def forward(self, ids: Tensor) -> Any:  # pyright: ignore
        decoded, layers = self.run(ids)
        raw, dropped, _ = zip(layers["rnn"], layers["second"], strict=True)
        if not self.written:
            return decoded, [*raw], [*dropped]
        pairs = [layers[name][:2] for name in self.written]
        terms = [torch.stack([y.pow(2).mean(), x.diff(dim=1).pow(2).mean()]) for x, y in pairs]
        self.terms += [torch.stack(terms).sum(0)] * self.training
        return {"loss": criterion(decoded, ids) + sum(lm.formula(x, y, 1) for x, y in pairs)}


class Chunks(Model):
    """Runs its RNN over chunks, the last of which has one time step."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Chunks, self).forward(part) for part in x.split(3, dim=1)], dim=1)


class Frames(Model):
    """Runs its RNN over frames of two samples."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.dropout(self.rnn(x.unflatten(1, (TIME, 2)).repeat(1, 1, 3))[0]))


class Fewer(Net):
    """Leaves the first token of a text out."""

    text_axis = 1

    def forward(self, ids: Tensor) -> Any:  # pyright: ignore
        return super().forward(ids.narrow(self.text_axis, 1, ids.shape[self.text_axis] - 1))


class FewerTimeFirst(Fewer):
    text_axis = 0


ROWS = [((ids,), -ids) for ids in IDS]  # the inputs, and the target
# the model, its inputs, and the options of `fuse`; seven time steps count
TIME_FIRST = [((x,), -x) for x in tokens(BATCHES * TIME, BATCH)]
SUMS = [((x - x // 2, x // 2), -x) for (x,), _ in TIME_FIRST]
SAMPLES = [((torch.rand(2 * TIME),), -ids) for ids in IDS]
LENGTHS: list[tuple[Any, Any, dict[str, Any]]] = [
    (Net, ROWS, {"rnn": "rnn"}),
    (Net, TIME_FIRST, {"rnn": ["decoder", "turned"], "batch_first": False}),  # the second one has fewer
    (Net, ROWS, {"rnn": "turned", "batch_first": False}),  # the model turns the batch
    (Captures, [((x - x // 2, x // 2), -x) for x in IDS], {}),
    (Captures, SUMS, {"batch_first": False}),
    (Chunks, ROWS, PATHS),
    (Frames, SAMPLES, PATHS),
    (Fewer, ROWS, {"rnn": "turned", "batch_first": False}),
    (Fewer, ROWS, {"rnn": "rnn"}),
    (FewerTimeFirst, TIME_FIRST, {"rnn": "decoder", "batch_first": False}),
]


def assert_holds_no_activations_after(do: Callable[[], object], learn: Any) -> None:
    """Do something, and check that no activations are left of the calls of a language model."""

    def record(_module: Any, _inputs: Any, output: Any) -> None:
        alive.extend(map(weakref.ref, tree_leaves(output[1:])))

    def check(model: Any, _inputs: Any) -> None:
        assert not model.training or not any(ref() is not None for ref in alive)

    alive: list[Any] = []
    learn.model.register_forward_pre_hook(check)  # of a step, which must not hold those of the step before
    learn.model[1].register_forward_hook(record)
    do()
    gc.collect()
    assert alive
    assert not any(ref() is not None for ref in alive)


class LearnerContract(Contract):
    """The tests that both adapters have to pass besides."""

    logs_means = False

    adapter: str  # the name of its class, and of fastai's own
    fuse: Callable[..., Any]
    learner: Callable[..., Any]  # makes a learner of a language model, always with the same weights
    learner_of: Callable[..., Any]  # makes one of a model that returns its loss, which may be regularized
    lrs_of_steps: Callable[..., list[float]]  # trains a learner, and returns its rates in steps, and afterwards
    trained: Callable[..., Tensor]  # trains a learner for an epoch with more callbacks, and returns the weights
    on: Callable[..., Any]  # makes a callback that calls a function at an event
    at_batches: Callable[..., Any]  # makes a callback that calls a function before each training batch
    cut_off: Callable[..., None]  # lets something end a fit within an optimizer step, so that the callback is not told
    rolled: Callable[..., Any]  # makes a callback that rolls each batch after the regularizer has seen it
    exported: Callable[..., Any]  # exports a learner, and loads it
    callbacks: Callable[..., list[Any]]

    @classmethod
    @cache
    def stock_weights(cls, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
        """Return the weights that fastai's own callback trains."""
        return cls.trained(cls.learner(alpha, beta))

    def rounded(self, begin: str, end: str, order: int) -> list[Any]:
        """Return callbacks that run what is between two events in bfloat16, as mixed precision does on a GPU."""
        autocast: Any = torch.autocast("cpu", torch.bfloat16)

        def leave(*_: Any, **__: Any) -> None:
            autocast.__exit__(None, None, None)

        return [self.on(begin, lambda *_, **__: autocast.__enter__() and None, order), self.on(end, leave, order)]

    def regularizer(self, learn: Any) -> Any:
        """Return the one regularizer of a learner, fastai's or ours, which has the same name."""
        (found,) = [cb for cb in self.callbacks(learn) if type(cb).__name__ == self.adapter]
        return found

    def train(self, model: Any, options: Any, accumulated: int, fits: int, rounded: bool, cbs: Any) -> dict[str, Any]:
        learn = self.learner_of(model, options is not None, accumulated)
        if options is not None:
            self.fuse(learn, **options)
        torch.manual_seed(0)
        for _ in range(fits):
            learn.fit(1, 0.5, None, cbs)
        return {} if options is None else {x: getattr(self.regularizer(learn), x) for x in ("ar", "tar")}

    @pytest.fixture(params=[{}])
    def options(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        """Return options of `fuse`."""
        return request.param

    @pytest.mark.parametrize("coefficients", SCHEDULES)
    def test_a_schedule_trains_the_stock_weights(self, coefficients: tuple[float, float], options: Any) -> None:
        def schedule() -> None:
            terms.append((now.ar, now.tar))
            now.alpha, now.beta = coefficients

        learn, terms = self.fuse(self.learner(), **options), []
        now, stock = self.regularizer(learn), self.stock_weights(*coefficients)
        assert gap(self.trained(learn, self.at_batches(schedule)), stock) < 1e-5
        assert all(gap(stock, self.stock_weights(*x)) > 1e-4 for x in SCHEDULES if x != coefficients)
        before, *others = terms
        assert before == (None, None)
        assert all(ar > 0 and tar > 0 for ar, tar in others)  # without the last batch, which has one step in fastai 2
        assert now.ar > 0

    @pytest.mark.parametrize(("kind", "rows", "options"), LENGTHS)
    def test_the_lr_follows_the_length_of_indices_and_otherwise_raw(self, kind: Any, rows: Any, options: Any) -> None:
        learn = self.fuse(self.learner_of(kind(), rows=rows), **options)
        now = self.regularizer(learn)
        now.bptt, now.adjust = 2 * TIME, True  # which only fastai 1 has to be told
        assert self.lrs_of_steps(learn, 0.5) == [0.25] * BATCHES + [0.5]
        self.cut_off(learn)
        assert self.lrs_of_steps(learn, 2.0) == [1.0] * BATCHES + [2.0]

    @pytest.mark.parametrize(("kind", "rows", "without"), [(Net, ROWS, 0.25), (Frames, SAMPLES, 0.5)])
    def test_a_step_without_a_run_has_the_lr_of_its_own_indices_or_is_not_scaled(
        self, kind: Any, rows: Any, without: float
    ) -> None:
        learn = self.fuse(self.learner_of(kind(), rows=rows), **PATHS)
        now = self.regularizer(learn)
        now.bptt, now.adjust = 2 * TIME, True
        assert self.lrs_of_steps(learn, 0.5) == [0.25] * BATCHES + [0.5]
        keep_in_evaluation(learn.model)
        assert self.lrs_of_steps(learn, 0.5) == [without] * BATCHES + [0.5]

    def test_masks_are_of_the_inputs_that_the_model_gets(self) -> None:
        model, formula, without = seeded(Captures), self.net("rnn", masks=MASKS), self.net("rnn", masks=MASKS)
        self.fit(model, MASKS, cbs=[self.rolled()])
        self.fit(formula, cbs=[self.rolled()])
        self.fit(without)
        assert_same_weights(model, formula)
        lm.assert_other_weights(without, formula)

    @pytest.mark.parametrize("what", ["fit", "validate"])
    def test_no_activations_are_held(self, what: str, options: Any) -> None:
        learn = self.fuse(self.learner(), **options)
        assert_holds_no_activations_after(partial(learn.fit, 1) if what == "fit" else learn.validate, learn)

    @pytest.mark.parametrize("then", ["the next fit", "fuse", "another model"])
    def test_a_fit_after_one_that_was_cut_off_trains_the_stock_weights(self, then: str, options: Any) -> None:
        none = (lambda x: x < 0) if then == "fuse" else None  # of the steps count before, as the last arguments count
        learn, other = self.fuse(self.learner(), **options, valid=none), self.learner()
        for one in (learn, other):
            self.cut_off(one)
        if then == "fuse":
            assert self.fuse(learn, **options) is learn
            assert hooks_of(learn.model) == 0
            with pytest.raises(TypeError, match="learn: expected a Learner, got int"):
                self.fuse(0)
        learn.model.load_state_dict(other.model.state_dict())
        for one in (learn, other):
            one.model.zero_grad()
            if then == "another model":
                new = self.learner() if one is other else self.fuse(self.learner(), **options)
                one.model, one.opt = new.model, None
                one.layer_groups = getattr(new, "layer_groups", None)  # fastai 1 makes the optimizer of these layers
        assert gap(self.trained(learn), self.trained(other)) < 1e-5

    def test_exports_regularize_again_after_fuse(self, options: Any) -> None:
        learn = self.fuse(self.learner(), **options)
        self.trained(learn)
        again = self.exported(learn)
        now = self.regularizer(self.fuse(again, **options))
        assert (isinstance(now, Adapter), now.alpha, now.beta) == (True, ALPHA, BETA)
        assert isinstance(self.regularizer(learn), Adapter)
        assert hooks_of(again.model) == 0
        tokens = torch.randint(2, VOCABULARY, (4, 6))
        for one in (again.model, learn.model):
            one.eval().reset()
        assert torch.equal(again.model(tokens)[0], learn.model(tokens)[0])

    def test_captured_activations_are_batch_first_or_time_first(self, capsys: pytest.CaptureFixture[str]) -> None:
        formula, models = self.net("rnn", masks=MASKS), [seeded(Captures), seeded(Captures)]
        self.fit(formula, fits=2)
        models[1].time_first = True
        for model in models:
            masks = TURNED if model.time_first else MASKS
            now = self.fit(model, {"batch_first": not model.time_first} | masks, fits=2)
            assert_same_weights(model, formula)
            torch.testing.assert_close(torch.stack([now["ar"], now["tar"]]), formula.terms[-1])
        said = "the model's output: raw (7, 3, 6) as time 7, batch 3, hidden 6; valid (7, 3): only valid steps count; s"
        assert capsys.readouterr().out.count(said) == 1
        for flat in (False, True):  # the batch shows it, also where decoded does not
            models[1].flat = flat
            with pytest.raises(ValueError, match=r"batch_first: .* raw is \(7, 3, 6\) and the batch \(3, 7\), got N"):
                self.fit(models[1], {})

    @pytest.mark.parametrize(("layers", "written"), [("all", ["rnn", "second"]), ("last", ["second"])])
    def test_the_layers_of_captured_lists_train_the_weights_of_the_formula(
        self, layers: Any, written: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        model, formula = seeded(Layers), seeded(Layers, *written)
        now = self.fit(model, {"layers": layers}, fits=2)
        self.fit(formula, fits=2)
        assert_same_weights(model, formula)
        torch.testing.assert_close(torch.stack([now["ar"], now["tar"]]), formula.terms[-1])
        assert hooks_of(model) == 0
        assert capsys.readouterr().out.count("the model's output: raw (3, 7, 6)") == len(written)

    @pytest.mark.parametrize("options", [{"layers": "first"}, {"layers": "all"} | PATHS])
    def test_layers_name_some_of_the_lists_that_a_model_returns(self, options: Any) -> None:
        words = "'last', 'all' or None, got 'first'|None with attach, .*, got 'all'"
        with pytest.raises(ValueError, match=f"layers: expected ({words})$"):
            self.fit(self.net(), options)

    @pytest.mark.parametrize("layout", [{}, {"time_dim": 0}])
    def test_captures_may_have_no_time_steps_or_fewer_than_the_mask(self, layout: dict[str, Any]) -> None:
        for steps in (0, 3):
            learn = self.fuse(self.learner(), valid=lambda x: x != 1, **layout)
            now, raw = self.regularizer(learn), torch.rand(2, steps, 4, requires_grad=True)
            ids = torch.tensor([[2, 1, 1, 2, 1], [2, 2, 1, 1, 2]])
            valid = (ids != 1)[:, 5 - steps :]
            if layout:
                ids, raw, valid = ids.T, raw.transpose(0, 1), valid.T
            now.batch = learn.xb = [ids]  # version 2 asks the learner
            now.capture((torch.zeros(2, steps, 9), raw, raw))
            want = fused_ar_tar(raw, raw, ALPHA, BETA, valid=valid, **layout)
            torch.testing.assert_close(now.regularizer.on_backward_begin(torch.zeros(())), want)

    @pytest.mark.parametrize(("change", "options", "error", "message"), REJECTED)
    def test_fuse_rejects_and_swaps_nothing(self, change: Any, options: Any, error: Any, message: str) -> None:
        learn = self.learner()
        if change:
            change(self.regularizer(learn), learn.model[1])
        parts = [*self.callbacks(learn), *learn.model.modules()]
        with pytest.raises(error, match=message):
            self.fuse(learn, **options)
        assert all(a is b for a, b in zip([*self.callbacks(learn), *learn.model.modules()], parts, strict=True))
        assert hooks_of(learn.model) == 0
