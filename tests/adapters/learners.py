"""The contract of the adapters for fastai v1 and v2; the tests of each version run it in real learners."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import FusedRNNDropout
from tests.adapters.contract import MASKS, PATHS, Contract
from tests.language_model import VOCABULARY, Triple, assert_same_weights, gap, hooks_of, seeded

ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
SCHEDULES = [(ALPHA, BETA), (ALPHA, 0.0), (0.0, BETA), (0.0, 0.0)]

# the part of the learner that is of a subclass, if any, the options of `fuse`, and the error
REJECTED: list[tuple[str | None, dict[str, Any], type[Exception], str]] = [
    (None, {"rnn": "lstm"}, ValueError, r"rnn: \w+ has no such module at 'lstm'; children of the \w+: '0', '1'"),
    (None, {"alpha": 3.0}, TypeError, "alpha: expected no coefficient in fuse"),
    ("regularizer", {}, ValueError, r"the learner has no RNN(Regularizer|Trainer) of fastai's own class"),
    ("dropout", {"dropout": True}, ValueError, "to swap, got Mine"),
]


class TimeFirst(Triple):
    """The same model with its RNN time first, although decoded is not."""

    def __init__(self, p: float) -> None:
        super().__init__(p=p, batch_first=False)

    def forward(self, x: Tensor) -> Any:
        decoded, *activations = self.activations(x.t())
        return decoded.transpose(0, 1), *activations


class LearnerContract(Contract):
    """The tests that both adapters have to pass besides."""

    logs_means = False

    stock: Any  # fastai's own callback
    fused: Any  # the callback of fastreg
    fuse: Callable[..., Any]
    unfuse: Callable[..., Any]
    time = 1  # the axis of time
    stock_weights: Callable[..., Tensor]  # that fastai's own callback trains with given coefficients
    learner: Callable[[], Any]  # makes a learner of a language model, always with the same weights
    learner_of: Callable[..., Any]  # makes one of a model that returns its loss, which may be regularized
    trained: Callable[..., Tensor]  # trains a learner for an epoch with more callbacks, and returns the weights
    at_batches: Callable[..., Any]  # makes a callback that calls a function before each training batch
    cut_off: Callable[..., None]  # lets something end a fit that leaves hooks behind
    begin_anew: Callable[..., None]  # makes the optimizer anew, and checks that nothing is left
    exported: Callable[..., Any]  # exports a learner, and loads it where fastreg cannot be imported
    callbacks: Callable[..., list[Any]]

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
            now.alpha, now.beta = coefficients

        learn, kinds = self.fuse(self.learner(), dropout), set()
        own, now = learn.model[1].output_dp, self.regularizer(learn)
        stock = self.stock_weights(*coefficients)
        assert gap(self.trained(learn, self.at_batches(schedule)), stock) < 1e-5
        assert all(gap(stock, self.stock_weights(*x)) > 1e-4 for x in SCHEDULES if x != coefficients)
        assert now.ar > 0 <= now.tar  # the last batch of fastai v2 has one time step
        assert {issubclass(kind, FusedRNNDropout) for kind in kinds} == {dropout}
        assert learn.model[1].output_dp is own
        assert hooks_of(learn.model) == 0

    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("what", ["fit", "validate"])
    def test_no_activations_are_held(self, what: str, dropout: bool) -> None:
        def record(_module: Any, _inputs: Any, output: Any) -> None:
            layers = [x if isinstance(x, (list, tuple)) else [x] for x in output[1:]]
            alive.extend(weakref.ref(x) for given in layers for x in given)

        learn, alive = self.fuse(self.learner(), dropout), []
        learn.model[1].register_forward_hook(record)
        learn.fit(1) if what == "fit" else learn.validate()
        gc.collect()
        assert alive
        assert not any(ref() is not None for ref in alive)

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
        assert hooks_of(learn.model) == 0

    def test_fuse_and_unfuse_swap_in_place(self) -> None:
        learn = self.learner()
        # with the arguments of the last call
        assert self.fuse(self.fuse(learn, valid=lambda x: x < 0), dropout=True) is learn
        now = self.regularizer(learn)
        assert (type(now), now.alpha, now.beta) == (self.fused, ALPHA, BETA)
        with pytest.raises(AttributeError, match="expected one of its attributes, such as alpha or beta, got 'aplha'"):
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

    @pytest.mark.parametrize("name", ["valid", "starts"])
    def test_masks_of_the_batch(self, name: str) -> None:
        masks: Any = {name: lambda x: (x % 3 != 0).transpose(0, self.time - 1)}  # (batch, time)
        weights = self.trained(self.fuse(self.learner(), **masks))
        assert gap(weights, self.trained(self.fuse(self.learner(), dropout=True, **masks))) < 1e-5
        assert gap(weights, self.stock_weights()) > 1e-4

    def test_activations_that_may_be_time_first(self, capsys: pytest.CaptureFixture[str]) -> None:
        models = [seeded(partial(kind, 0.0)) for kind in (lambda p: Triple(p=p), TimeFirst)]
        for model, layout in zip(models, (True, False), strict=True):
            self.fit(model, {"batch_first": layout} | MASKS, fits=2)
        assert_same_weights(*models)
        said = "the model's output: raw (7, 3, 6) as time 7, batch 3, hidden 6; valid (3, 7): only valid steps count; s"
        assert capsys.readouterr().out.count(said) == 1
        error = pytest.raises(ValueError, match=r"batch_first: expected True or False, as raw is .* got None")
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
