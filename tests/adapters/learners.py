"""The contract of the adapters for fastai v1 and v2; the tests of each version run it in real learners."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreg import FusedRNNDropout, fused_ar_tar
from tests.adapters.contract import BATCHES, IDS, MASKS, NO_CALLBACK, PATHS, TURNED, Contract, Net
from tests.language_model import BATCH, TIME, VOCABULARY, assert_same_weights, gap, hooks_of, regularizer, seeded

ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights
SCHEDULES = [(ALPHA, BETA), (ALPHA, 0.0), (0.0, BETA), (0.0, 0.0)]

# the part of the learner that is of a subclass, if any, the options of `fuse`, and the error
REJECTED: list[tuple[str | None, dict[str, Any], type[Exception], str]] = [
    (None, {"rnn": "lstm"}, AttributeError, "no attribute `lstm`"),
    (None, {"alpha": 3.0}, TypeError, "multiple values for argument 'alpha'"),
    (None, {"lengths": len}, TypeError, "expected rnn, dropout, .*, valid, starts, got an argument with the name 'len"),
    (None, {"dropout": "1.output_dp"}, TypeError, r"rnn and dropout: expected .* got \[None, '1\.output_dp'\]"),
    (None, {"output": len}, TypeError, r"rnn and dropout: expected .* got \[None\]"),
    ("regularizer", {}, ValueError, r"the learner has no RNN(Regularizer|Trainer) of fastai's own class"),
    ("dropout", {"dropout": True}, ValueError, "dropout: expected the RNNDropout of a language model .* with Mine"),
]


class Captures(Net):
    """Returns the tensors that fastai's callbacks capture; decoded is batch first even if the activations are not."""

    captured, time_first = True, False
    flat = False  # whether decoded has rows of all sequences

    def forward(self, input_ids: Tensor) -> Any:
        decoded, layers = self.run(input_ids)
        raw, dropped, _ = layers["rnn"]
        decoded = decoded.flatten(0, 1) if self.flat else decoded
        return (decoded, raw.transpose(0, 1), dropped.transpose(0, 1)) if self.time_first else (decoded, raw, dropped)


class Inputs(Net):
    """Takes its token ids as a sum of inputs, and returns its activations, or its loss."""

    def __init__(self, time_first: bool, captured: bool) -> None:
        super().__init__()
        self.time_first, self.captured = time_first, captured

    def forward(self, *inputs: Tensor) -> Any:  # pyright: ignore
        axes = (1, 0) if self.time_first else (0, 1)
        ids = sum(inputs, torch.zeros((), dtype=torch.long)).permute(axes)
        if not self.captured:
            return super().forward(ids)
        decoded, layers = self.run(ids)
        return tuple(x.permute(*axes, 2) for x in (decoded, *layers["rnn"][:2]))


ROWS = [((ids,), -ids) for ids in IDS]  # the inputs, and the target


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
    learner: Callable[..., Any]  # makes a learner of a language model, always with the same weights
    learner_of: Callable[..., Any]  # makes one of a model that returns its loss, which may be regularized
    lrs_of_steps: Callable[..., list[float]]  # trains a learner, and returns its rates in steps, and afterwards
    trained: Callable[..., Tensor]  # trains a learner for an epoch with more callbacks, and returns the weights
    at_batches: Callable[..., Any]  # makes a callback that calls a function before each training batch
    cut_off: Callable[..., None]  # lets something end a fit that leaves hooks behind
    begin_anew: Callable[..., None]  # makes the optimizer anew, and checks that nothing is left
    exported: Callable[..., Any]  # exports a learner, and loads it
    callbacks: Callable[..., list[Any]]

    @classmethod
    @cache
    def stock_weights(cls, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
        """Return the weights that fastai's own callback trains."""
        return cls.trained(cls.learner(alpha, beta))

    def regularizer(self, learn: Any) -> Any:
        """Return the one regularizer of a learner."""
        (found,) = [cb for cb in self.callbacks(learn) if isinstance(cb, (self.stock, self.fused))]
        return found

    def fit(
        self, model: Any, options: Any = None, accumulated: int = 1, fits: int = 1, rounded: bool = False
    ) -> dict[str, Any]:
        learn = self.learner_of(model, options is not None, accumulated)
        if options is not None:
            self.fuse(learn, **options)
        torch.manual_seed(0)
        for _ in range(fits):
            learn.fit(1, 0.5)
        return {} if options is None else {x: getattr(self.regularizer(learn), x) for x in ("ar", "tar")}

    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("coefficients", SCHEDULES)
    def test_a_schedule_trains_the_stock_weights(self, coefficients: tuple[float, float], dropout: bool) -> None:
        def schedule() -> None:
            terms.append((now.ar, now.tar))
            now.alpha, now.beta = coefficients

        learn, terms = self.fuse(self.learner(), dropout=dropout), []
        now, stock = self.regularizer(learn), self.stock_weights(*coefficients)
        assert gap(self.trained(learn, self.at_batches(schedule)), stock) < 1e-5
        assert all(gap(stock, self.stock_weights(*x)) > 1e-4 for x in SCHEDULES if x != coefficients)
        before, *others = terms
        assert before == (None, None)
        assert all(ar > 0 and tar > 0 for ar, tar in others)  # without the last batch, which has one step in fastai 2
        assert now.ar > 0

    def test_a_dropout_is_swapped_once_for_all_fits(self) -> None:
        learn = self.learner()
        learn.model.eval()
        own = learn.model[1].output_dp
        fused = self.fuse(learn, dropout=True).model[1].output_dp
        assert isinstance(fused, FusedRNNDropout)
        assert (fused.p, fused.training) == (own.p, False)
        self.trained(learn)
        assert self.fuse(learn, dropout=True).model[1].output_dp is fused
        self.callbacks(learn).remove(self.regularizer(learn))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # it has no penalty then
            for _ in range(2):
                fused.train()(torch.ones(2, 3, 4, requires_grad=True))

    @pytest.mark.parametrize("inputs", [1, 2])
    @pytest.mark.parametrize("captured", [False, True])
    @pytest.mark.parametrize("time_first", [False, True])
    def test_the_lr_follows_the_time_steps_of_raw(self, time_first: bool, captured: bool, inputs: int) -> None:
        ids = torch.stack(IDS).view(BATCHES, BATCH, TIME)
        ids = ids.transpose(1, 2).flatten(0, 1) if time_first else ids.flatten(0, 1)
        rows = [((x,) if inputs == 1 else (x - x // 2, x // 2), -x) for x in ids]
        learn = self.learner_of(Inputs(time_first, captured), rows=rows, size=TIME if time_first else BATCH)
        options = {} if captured else {"rnn": "turned" if time_first else "second"}
        now = self.regularizer(self.fuse(learn, batch_first=not time_first, **options))
        now.bptt = 2 * TIME
        if hasattr(now, "adjust"):
            now.adjust = True
        *scaled, after = self.lrs_of_steps(learn, 0.5)
        assert scaled == [0.25] * BATCHES
        assert after == 0.5

    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("what", ["fit", "validate"])
    def test_no_activations_are_held(self, what: str, dropout: bool) -> None:
        learn = self.fuse(self.learner(), dropout=dropout)
        alive = recorded(learn)
        learn.fit(1) if what == "fit" else learn.validate()
        assert_freed(alive)

    @pytest.mark.parametrize("then", ["the next fit", "fuse"])
    def test_a_fit_after_one_that_was_cut_off(self, then: str) -> None:
        learn, other = self.fuse(self.learner(), dropout=True), self.learner()
        for one in (learn, other):
            self.cut_off(one)
        assert hooks_of(learn.model) > 0
        if then == "fuse":
            self.fuse(learn, dropout=True)
            assert hooks_of(learn.model) == 0
        learn.model.load_state_dict(other.model.state_dict())
        for one in (learn, other):
            self.begin_anew(one)
        assert gap(self.trained(learn), self.trained(other)) < 1e-5

    def test_fuse_swaps_in_place(self) -> None:
        learn = self.learner()
        # with the arguments of the last call
        assert self.fuse(self.fuse(learn, valid=lambda x: x < 0), dropout=True) is learn
        now = self.regularizer(learn)
        assert (type(now), now.alpha, now.beta) == (self.fused, ALPHA, BETA)
        assert gap(self.trained(learn), self.stock_weights()) < 1e-5

    def test_exports_regularize_again_after_fuse(self) -> None:
        learn = self.fuse(self.learner(), dropout=True)
        self.trained(learn)
        again = self.exported(learn)
        now = self.regularizer(self.fuse(again, dropout=True))
        assert (type(now), now.alpha, now.beta) == (self.fused, ALPHA, BETA)
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

    @pytest.mark.parametrize("layout", [{}, {"batch_first": False}, {"time_dim": 0}])
    def test_captures_of_no_time_steps_and_of_fewer_than_the_mask(self, layout: dict[str, Any]) -> None:
        for steps in (0, 3):
            learn = self.fuse(self.learner(), valid=lambda x: x != 1, **layout)
            now, raw = self.regularizer(learn), torch.rand(2, steps, 4, requires_grad=True)
            ids = torch.tensor([[2, 1, 1, 2, 1], [2, 2, 1, 1, 2]])
            valid = (ids != 1)[:, 5 - steps :]
            if layout:
                ids, raw, valid = ids.T, raw.transpose(0, 1), valid.T
            now.batch = [ids]
            now.capture((torch.zeros(2, steps, 9), raw, raw))
            want = fused_ar_tar(raw, raw, ALPHA, BETA, valid=valid, **layout)
            torch.testing.assert_close(now.regularizer.on_backward_begin(torch.zeros(())), want)

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
        with pytest.raises(TypeError, match="learn: expected a Learner, got int"):
            self.fuse(0)

    def test_a_model_without_the_dropout_of_a_language_model(self) -> None:
        with pytest.raises(ValueError, match=r"the path of a dropout beside rnn=, got True for a Net with NoneType$"):
            self.fuse(self.learner_of(self.net()), dropout=True)

    def test_coefficients_beside_paths(self) -> None:
        learn = self.learner_of(self.net())
        now = self.regularizer(learn)
        now.alpha = now.beta = None
        with pytest.raises(TypeError, match="alpha and beta: expected coefficients beside rnn, got none"):
            self.fuse(learn, **PATHS)

    def test_a_regularizer_that_is_no_callback(self) -> None:
        with pytest.raises(AttributeError, match=NO_CALLBACK):
            self.trained(self.learner(), regularizer())
