"""The contract of the adapters for fastai v1 and v2; the tests of each version run it in real learners."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import FusedRNNDropout
from tests.adapters.contract import MASKS, PATHS, Contract, Net
from tests.language_model import VOCABULARY, assert_same_weights, gap, hooks_of, seeded

ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
SCHEDULES = [(ALPHA, BETA), (ALPHA, 0.0), (0.0, BETA), (0.0, 0.0)]

# the part of the learner that is of a subclass, if any, the options of `fuse`, and the error
REJECTED: list[tuple[str | None, dict[str, Any], type[Exception], str]] = [
    (None, {"rnn": "lstm"}, ValueError, r"rnn: \w+ has no such module at 'lstm'"),
    (None, {"alpha": 3.0}, TypeError, "alpha: expected no coefficient in fuse"),
    ("regularizer", {}, ValueError, r"the learner has no RNN(Regularizer|Trainer) of fastai's own class"),
    ("dropout", {"dropout": True}, ValueError, "dropout: .* to swap, got Mine"),
]


class Captures(Net):
    """Returns what fastai's callbacks capture; decoded is batch first even if the activations are not."""

    time_first = False

    def forward(self, input_ids: Tensor) -> Any:
        decoded, layers = self.run(input_ids)
        raw, dropped, _ = layers["rnn"]
        return (decoded, raw.transpose(0, 1), dropped.transpose(0, 1)) if self.time_first else (decoded, raw, dropped)


def recorded(learn: Any) -> list[Any]:
    """Return a list that gets weak references to the activations of each call of a language model."""

    def record(_module: Any, _inputs: Any, output: Any) -> None:
        for layers in output[1:]:
            alive.extend(map(weakref.ref, layers if isinstance(layers, (list, tuple)) else [layers]))

    alive: list[Any] = []
    learn.model[1].register_forward_hook(record)
    return alive


def assert_freed(alive: list[Any]) -> None:
    gc.collect()
    assert alive
    assert not any(ref() is not None for ref in alive)


class LearnerContract(Contract):
    """The tests that both adapters have to pass besides."""

    logs_means = False

    stock: Any  # fastai's own callback
    fused: Any  # the callback of fastreg
    fuse: Callable[..., Any]
    unfuse: Callable[..., Any]
    time = 1  # the axis of time
    learner: Callable[..., Any]  # makes a learner of a language model, always with the same weights
    learner_of: Callable[..., Any]  # makes one of a model that returns its loss, which may be regularized
    trained: Callable[..., Tensor]  # trains a learner for an epoch with more callbacks, and returns the weights
    at_batches: Callable[..., Any]  # makes a callback that calls a function before each training batch
    cut_off: Callable[..., None]  # lets something end a fit that leaves hooks behind
    begin_anew: Callable[..., None]  # makes the optimizer anew, and checks that nothing is left
    exported: Callable[..., Any]  # exports a learner, and loads it where fastreg cannot be imported
    callbacks: Callable[..., list[Any]]

    @classmethod
    @cache
    def stock_weights(cls, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
        """Return the weights that fastai's own callback trains."""
        return cls.trained(cls.learner(alpha, beta))

    def regularizers(self, learn: Any) -> list[Any]:
        return [cb for cb in self.callbacks(learn) if isinstance(cb, (self.stock, self.fused))]

    def regularizer(self, learn: Any) -> Any:
        """Return the one regularizer of a learner."""
        (found,) = self.regularizers(learn)
        return found

    def fit(self, model: Any, options: Any = None, accumulated: int = 1, fits: int = 1) -> dict[str, Any]:
        learn = self.learner_of(model, options is not None, accumulated)
        if options is not None:
            self.fuse(learn, **options)
        torch.manual_seed(0)
        for _ in range(fits):
            learn.fit(1, 0.5)
        return {} if options is None else vars(self.regularizer(learn))

    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("coefficients", SCHEDULES)
    def test_a_schedule_trains_the_stock_weights(self, coefficients: tuple[float, float], dropout: bool) -> None:
        def schedule() -> None:
            kinds.add(type(learn.model[1].output_dp))
            terms.append((now.ar, now.tar))
            now.alpha, now.beta = coefficients

        learn, kinds, terms = self.fuse(self.learner(), dropout), set(), []
        own, now = learn.model[1].output_dp, self.regularizer(learn)
        stock = self.stock_weights(*coefficients)
        assert gap(self.trained(learn, self.at_batches(schedule)), stock) < 1e-5
        assert all(gap(stock, self.stock_weights(*x)) > 1e-4 for x in SCHEDULES if x != coefficients)
        before, *others = terms
        assert before == (None, None)
        assert all(ar > 0 and tar > 0 for ar, tar in others)  # all but those of the last batch, of one step in fastai 2
        assert now.ar > 0
        assert {issubclass(kind, FusedRNNDropout) for kind in kinds} == {dropout}
        assert learn.model[1].output_dp is own

    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("what", ["fit", "validate"])
    def test_no_activations_are_held(self, what: str, dropout: bool) -> None:
        learn = self.fuse(self.learner(), dropout)
        alive = recorded(learn)
        learn.fit(1) if what == "fit" else learn.validate()
        assert_freed(alive)

    @pytest.mark.parametrize("then", ["the next fit", "fuse", "unfuse"])
    def test_a_fit_after_one_that_was_cut_off(self, then: str) -> None:
        learn, other = self.fuse(self.learner(), dropout=True), self.learner()
        own = learn.model[1].output_dp
        for one in (learn, other):
            self.cut_off(one)
        assert hooks_of(learn.model) > 0
        if then != "the next fit":
            self.fuse(learn, dropout=True) if then == "fuse" else self.unfuse(learn)
            assert hooks_of(learn.model) == 0
            assert learn.model[1].output_dp is own
        learn.model.load_state_dict(other.model.state_dict())
        for one in (learn, other):
            self.begin_anew(one)
        assert gap(self.trained(learn), self.trained(other)) < 1e-5

    def test_fuse_and_unfuse_swap_in_place(self) -> None:
        learn = self.learner()
        # with the arguments of the last call
        assert self.fuse(self.fuse(learn, valid=lambda x: x < 0), dropout=True) is learn
        now = self.regularizer(learn)
        assert (type(now), now.alpha, now.beta) == (self.fused, ALPHA, BETA)
        with pytest.raises(AttributeError, match="'aplha'"):
            now.aplha = 3.0
        assert gap(self.trained(learn), self.stock_weights()) < 1e-5
        now.alpha = 3.0
        assert self.unfuse(self.unfuse(learn)) is learn
        now = self.regularizer(learn)
        assert (type(now), now.alpha, now.beta) == (self.stock, 3.0, BETA)
        assert gap(self.trained(self.unfuse(self.fuse(self.learner()))), self.stock_weights()) == 0

    def test_exports_load_without_fastreg(self) -> None:
        learn = self.fuse(self.learner(), dropout=True)
        self.trained(learn)
        again = self.exported(learn)
        now = self.regularizer(again)
        assert (type(now), now.alpha, now.beta) == (self.stock, ALPHA, BETA)
        assert type(again.model[1].output_dp).__name__ == "RNNDropout"
        assert type(self.regularizer(learn)) is self.fused
        assert hooks_of(again.model) == 0
        tokens = torch.randint(2, VOCABULARY, (4, 6))
        for one in (again.model, learn.model):
            one.eval().reset()
        assert torch.equal(again.model(tokens)[0], learn.model(tokens)[0])

    def test_captured_activations_batch_first_and_time_first(self, capsys: pytest.CaptureFixture[str]) -> None:
        formula, models = self.net("rnn", masks=MASKS), [seeded(Captures), seeded(Captures)]
        self.fit(formula, fits=2)
        models[1].time_first = True
        for model in models:
            masks = {name: lambda x, of=of: of(x).t() for name, of in MASKS.items()} if model.time_first else MASKS
            now = self.fit(model, {"batch_first": not model.time_first} | masks, fits=2)
            assert_same_weights(model, formula)
            torch.testing.assert_close(torch.stack([now["ar"], now["tar"]]), formula.terms[-1])
        said = "the model's output: raw (7, 3, 6) as time 7, batch 3, hidden 6; valid (7, 3): only valid steps count; s"
        assert capsys.readouterr().out.count(said) == 1
        error = pytest.raises(ValueError, match="batch_first: expected True or False")
        with error if self.time else nullcontext():  # the models of old releases are time first
            self.fit(models[1], {})

    def test_unfuse_leaves_a_model_that_returns_only_its_output_without_a_regularizer(self) -> None:
        learn = self.fuse(self.learner_of(self.net()), **PATHS)
        with pytest.warns(UserWarning, match="unfuse: this learner trains without AR and TAR now"):
            self.unfuse(learn)
        assert self.regularizers(learn) == []

    @pytest.mark.parametrize(("subclassed", "options", "error", "message"), REJECTED)
    def test_fuse_rejects_and_swaps_nothing(self, subclassed: Any, options: Any, error: Any, message: str) -> None:
        learn = self.learner()
        if subclassed:
            part = self.regularizer(learn) if subclassed == "regularizer" else learn.model[1].output_dp
            part.__class__ = type("Mine", (type(part),), {})
        parts = [*self.callbacks(learn), *learn.model.modules()]
        with pytest.raises(error, match=message):
            self.fuse(learn, **options)
        assert all(a is b for a, b in zip([*self.callbacks(learn), *learn.model.modules()], parts, strict=True))
        assert hooks_of(learn.model) == 0

    def test_only_a_learner_is_fused(self) -> None:
        for call in (self.fuse, self.unfuse):
            with pytest.raises(TypeError, match="learn: expected a Learner, got int"):
                call(0)
