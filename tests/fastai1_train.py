"""Train with the fastai v1 on the path, and save the results of the adapter: `fastai1_train.py RESULTS`.

fastai v1 dates from 2018 to 2020; the parts of Python, NumPy and other packages that it expects are put in
place first.
"""

from __future__ import annotations

import collections
import collections.abc
import gc
import os
import sys
import tempfile
import types
import warnings
import weakref
from itertools import pairwise
from typing import Any

import numpy as np

warnings.simplefilter("ignore")
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # load_learner unpickles a whole model


def stub(name: str, **attributes: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)


stub("pkg_resources", require=lambda *_: None)
stub("pynvml")
stub("spacy", load=None, blank=None)
stub("spacy.symbols", ORTH=65)
for kind in (int, float, object):
    setattr(np, kind.__name__, kind)
for kind in ("Iterable", "Iterator", "Sequence", "Mapping", "MutableMapping", "Collection", "Sized", "Callable"):
    setattr(collections, kind, getattr(collections.abc, kind))
array = np.array


def ragged(x: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return array(x, *args, **kwargs)
    except ValueError:
        result = np.empty(len(x), dtype=object)
        result[:] = x
        return result


np.array = ragged

import torch  # noqa: E402
from fastai import __version__ as release  # noqa: E402
from fastai.basic_train import Learner  # noqa: E402
from fastai.callback import Callback, CallbackHandler  # noqa: E402
from fastai.callbacks.fp16 import MixedPrecision  # noqa: E402
from fastai.callbacks.rnn import RNNTrainer as Stock  # noqa: E402
from fastai.text import TextLMDataBunch, Vocab, language_model_learner  # noqa: E402

from fastreg import FusedRNNDropout, regularizer  # noqa: E402
from fastreg.fastai1 import RNNTrainer, fuse, unfuse  # noqa: E402

torch.set_num_threads(1)
OLD = release in ("1.0.36", "1.0.42")
TIME = 0 if release == "1.0.36" else 1
ALPHA, BETA = 40.0, 30.0  # large enough to show in the weights


class Written(RNNTrainer):
    """The formula written out, where the stock callback does not compute it."""

    _order = -5

    def on_loss_begin(self, last_output: Any, **_: Any) -> Any:
        self.captured = last_output[1][-1], last_output[2][-1]
        return last_output[0] if OLD else {"last_output": last_output[0]}

    def on_backward_begin(self, last_loss: torch.Tensor, **_: Any) -> Any:
        raw, dropped = self.captured
        steps = raw.unbind(TIME)
        changes = torch.stack([b - a for a, b in pairwise(steps)])
        loss = last_loss + self.alpha * dropped.pow(2).mean() + self.beta * changes.pow(2).mean()
        return loss if OLD else {"last_loss": loss}


def learner(alpha: float = ALPHA, beta: float = BETA) -> Any:
    random = np.random.RandomState(0)
    ids = [random.randint(2, 40, size) for size in random.randint(30, 60, 40)]
    words = Vocab(["xxunk", "xxpad", *map(str, range(2, 40))])
    torch.manual_seed(0)
    np.random.seed(0)
    data = TextLMDataBunch.from_ids(
        tempfile.mkdtemp(), vocab=words, train_ids=ids[:30], valid_ids=ids[30:], bs=8, bptt=16
    )
    if OLD:
        return language_model_learner(data, bptt=16, emb_sz=32, nh=48, nl=2, alpha=alpha, beta=beta)
    from fastai.text import AWD_LSTM, awd_lstm_lm_config

    config = {**awd_lstm_lm_config, "emb_sz": 32, "n_hid": 48, "n_layers": 2}
    return language_model_learner(data, AWD_LSTM, config=config, pretrained=False, alpha=alpha, beta=beta)


def scaled(learn: Any) -> Any:
    """With the loss scale of mixed precision, its callback coming first, but a float32 model, to compare closely."""
    learn.callbacks.insert(0, MixedPrecision(learn, 64.0, **({} if OLD else {"dynamic": False})))
    return learn


def with_trainer(trainer: type[RNNTrainer], bptt: int, adjust: bool) -> Any:
    learn = learner()
    learn.callbacks = [cb for cb in learn.callbacks if not isinstance(cb, Stock)]
    learn.callbacks.append(trainer(learn, bptt, ALPHA, BETA, adjust))
    return learn


def trained(learn: Any) -> torch.Tensor:
    torch.manual_seed(1)
    np.random.seed(1)
    learn.fit(2, 5e-3)
    return torch.cat([p.detach().float().flatten() for p in learn.model.parameters()])


def message(function: Any, *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Spy(Callback):
    """Record the lr of each optimizer step, and the arguments of the callbacks."""

    def __init__(self, learn: Any) -> None:
        self.learn, self.lengths, self.stepped, self.decays, self.between, self.outputs = learn, [], [], [], [], []
        self.fails = False

    def on_batch_begin(self, train: bool, last_input: Any, **_: Any) -> None:
        if train:
            self.lengths.append(last_input.shape[TIME])
            self.between.append([group["lr"] for group in self.learn.opt.opt.param_groups])

    def on_loss_begin(self, last_output: Any, **_: Any) -> None:
        self.outputs.append(isinstance(last_output, torch.Tensor))

    def on_backward_begin(self, last_loss: torch.Tensor, **_: Any) -> None:
        if not self.stepped:
            step = self.learn.opt.opt.step
            self.learn.opt.opt.step = lambda *args: self.step(step, *args)

    def step(self, step: Any, *args: Any) -> None:
        self.stepped.append([group["lr"] for group in self.learn.opt.opt.param_groups])
        self.decays.append(list(self.learn.opt._lr))
        if self.fails:
            raise ArithmeticError("the step failed")
        step(*args)


def held(dropout: bool) -> dict[str, int]:
    """Activations alive after a fit, after one that failed in each place, and after a validation."""
    counts = {}
    for what in ("fit", "loss", "step", "validate"):
        learn, alive, failing = fuse(learner(), dropout), [], []
        learn.model[0].register_forward_hook(lambda _m, _i, out, alive=alive: alive.extend(map(weakref.ref, out[0])))
        criterion = learn.loss_func
        if what == "loss":
            learn.loss_func = lambda *args, failing=failing: failing[0]
        if what == "validate":
            learn.validate()
        else:
            spy = Spy(learn)
            spy.fails = what == "step"
            message(lambda learn=learn, spy=spy: learn.fit(1, callbacks=[spy]))
        learn.loss_func = criterion
        gc.collect()
        counts[what] = sum(ref() is not None for ref in alive) if alive else -1
    return counts


def adjusted(fails: bool = False) -> dict[str, Any]:
    """A fit at three lrs with `adjust`."""
    learn = with_trainer(RNNTrainer, 20, adjust=True)
    spy = Spy(learn)
    spy.fails = fails
    error = message(lambda: learn.fit(1, slice(1e-4, 1e-2), callbacks=[spy]))
    after = [group["lr"] for group in learn.opt.opt.param_groups]
    return {**{k: getattr(spy, k) for k in ("lengths", "stepped", "decays", "between")}, "after": after, "error": error}


def plain_model(reset: bool) -> str:
    learn = fuse(learner())
    learn.model = torch.nn.Sequential(learn.model[0].encoder, learn.model[1].decoder)
    if reset:
        learn.model.reset = lambda: None
    return message(learn.fit, 1)


class Alone(torch.nn.Module):
    """A language model that returns its output alone, and has no `reset()`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = torch.nn.Embedding(40, 16), torch.nn.Linear(16, 40)
        self.rnn, self.dropout = torch.nn.LSTM(16, 16, batch_first=TIME == 1), torch.nn.Dropout(0.3)

    def activations(self, x: torch.Tensor) -> Any:
        raw, _ = self.rnn(self.embedding(x))
        dropped = self.dropout(raw)
        return self.decoder(dropped).flatten(0, 1), [raw], [dropped]

    def forward(self, x: torch.Tensor) -> Any:
        return self.activations(x)[0]


class Together(Alone):
    """The same model as fastai's callback wants it."""

    def reset(self) -> None: ...

    def forward(self, x: torch.Tensor) -> Any:
        return self.activations(x)


def by_path() -> dict[str, Any]:
    """Train models of one's own, by the formula, by the paths of modules, and with valid steps."""

    def own(kind: Any, trainer: Any, *args: Any, **options: Any) -> Any:
        of = learner()  # whose batches are always the same
        torch.manual_seed(4)
        made = Learner(of.data, kind(), loss_func=of.loss_func)
        made.callbacks.append(trainer(made, *args, **options))
        return made

    def marks(x: torch.Tensor) -> torch.Tensor:
        return (x % 3 != 0).transpose(0, TIME - 1)  # (batch, time)

    def starts(x: torch.Tensor) -> torch.Tensor:
        return (x % 4 == 1).transpose(0, TIME - 1)

    paths: dict[str, Any] = {"rnn": "rnn", "dropout": "dropout"}
    ours: Any = (RNNTrainer, 16, ALPHA, BETA, False)
    adjust = {"adjust": False} if release == "1.0.36" else {}
    stock = own(Alone, Stock, *([16] if OLD else []), alpha=ALPHA, beta=BETA, **adjust)
    plain = own(Alone, *ours, **paths)
    found = {
        "written": trained(own(Together, Written, 16, ALPHA, BETA, False)),
        "by path": trained(plain),
        "fused": trained(fuse(stock, "dropout", rnn="rnn")),
        "off": trained(own(Alone, RNNTrainer, 16, adjust=False, **paths)),
        "valid": trained(own(Together, *ours, valid=marks)),
        "valid by path": trained(own(Alone, *ours, valid=marks, **paths)),
        "starts": trained(own(Together, *ours, starts=starts)),
        "starts by path": trained(own(Alone, *ours, starts=starts, **paths)),
        "hooks": sum(len(module._forward_hooks) for module in plain.model.modules()),
        "kept": plain.callbacks[-1].batch,
        "no module": message(fuse, own(Alone, RNNTrainer, 16), "dropout", rnn="lstm"),
        "no rnn": message(fuse, own(Alone, RNNTrainer, 16), "dropout"),
    }
    if hasattr(plain, "purge"):
        plain.purge()
        found["purged"] = trained(plain).isfinite().all().item(), plain.callbacks[-1].paths.rnns
    return found


def named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def without_fastreg(function: Any, *args: Any) -> Any:
    """Call it where fastreg cannot be imported."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "fastreg"}
    sys.modules.update(dict.fromkeys(ours))
    try:
        return function(*args)
    finally:
        sys.modules.update(ours)


def exported() -> dict[str, Any]:
    learn = fuse(learner(), dropout=True)
    trainer = next(cb for cb in learn.callbacks if isinstance(cb, RNNTrainer))
    trainer.on_loss_begin((torch.ones(2, 2, 2),) * 3)
    if not hasattr(trainer, "get_state"):
        return {}
    found = {"state": trainer.get_state()}
    learn.fit(1)
    tokens = torch.randint(2, 40, (4, 6))
    for name in ["learner", "purged"][: 1 if OLD else 2]:
        if name == "purged":
            learn.purge()
        fused = list(learn.callbacks), learn.model[1].output_dp, learn.rnn_trainer
        learn.export(name)
        now = list(learn.callbacks), learn.model[1].output_dp, learn.rnn_trainer
        found[name, "kept"] = now == fused
        found[name, "fused"] = [named(type(learn.callbacks[0])), named(type(learn.model[1].output_dp).__mro__[1])]
        if OLD:  # whose load_learner knows no language models
            state = without_fastreg(torch.load, learn.path / name)
            model, kind, kept = state["model"], *next(iter(state["cb_state"].items()))
            alpha, beta = kept["alpha"], kept["beta"]
        else:
            from fastai.basic_train import load_learner

            again = without_fastreg(load_learner, learn.path, name)
            model, kind = again.model, type(again.rnn_trainer)
            alpha, beta = again.rnn_trainer.alpha, again.rnn_trainer.beta
        found[name] = named(kind), named(type(model[1].output_dp)), alpha, beta
        model.reset()
        learn.model.reset()
        found[name, "same"] = bool((model.eval()(tokens)[0] == learn.model.eval()(tokens)[0]).all())
    if not OLD:
        learn.export("gone", destroy=True)
        found["destroyed"] = type(learn).__name__
    return found


class Off(Callback):
    """A schedule that ends at 0."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_batch_begin(self, **_: Any) -> None:
        self.trainer.alpha = self.trainer.beta = 0.0


class Twice(Callback):
    """Runs the model again, between its run and the loss."""

    _order = -9

    def __init__(self, learn: Any) -> None:
        self.learn = learn

    def on_loss_begin(self, train: bool, last_input: torch.Tensor, **_: Any) -> None:
        if train:
            generator = torch.get_rng_state()
            hidden = self.learn.model[0].hidden
            self.learn.model(last_input)
            self.learn.model[0].hidden = hidden
            torch.set_rng_state(generator)


def fused_dropout() -> dict[str, Any]:
    formed, form = [], regularizer.fused_ar_tar

    def counted(*args: Any, **options: Any) -> Any:
        formed.append(None)
        return form(*args, **options)

    regularizer.fused_ar_tar = counted
    learn, expected = learner(), learner()
    callback, dropout, old = type(learn.callbacks[0]), learn.model[1].output_dp, dict(vars(learn.callbacks[0]))
    fused = fuse(fuse(learn), dropout=True)
    module = fused.model[1].output_dp
    found: dict[str, Any] = {"idempotent": fuse(fused, dropout=True).model[1].output_dp is module}
    found["kind"] = isinstance(module, FusedRNNDropout), module.ar_of, module.batch_first
    found["weights"], found["formed"] = trained(fused), len(formed)
    found["terms"] = [float(x) for x in (fused.callbacks[-1].regularizer.ar, fused.callbacks[-1].regularizer.tar)]
    x = torch.ones(2, 3, 32)
    found["evaluation"] = module.eval()(x) is x
    found["unfused"] = unfuse(fused) is fused and unfuse(fused) is fused
    found["back"] = type(fused.callbacks[0]) is callback and fused.model[1].output_dp is dropout
    found["attributes"] = (
        "export" in vars(fused),
        getattr(fused, "rnn_trainer", None) is getattr(expected, "rnn_trainer", None)
        or fused.rnn_trainer is fused.callbacks[0],
    )
    now = dict(vars(fused.callbacks[0]))
    found["coefficients"] = all(now[name] == old[name] for name in ("alpha", "beta", "bptt", "adjust") if name in old)
    again = unfuse(fuse(learner(), dropout=True))
    found["trained again"], found["expected again"] = trained(again), trained(expected)
    off = fuse(learner(), dropout=True)
    torch.manual_seed(1)
    np.random.seed(1)
    off.fit(2, 5e-3, callbacks=[Off(off.callbacks[-1])])
    found["off"] = torch.cat([p.detach().flatten() for p in off.model.parameters()])
    twice = fuse(learner(), dropout=True)
    twice.callbacks.append(Twice(twice))
    formed.clear()
    found["twice"], found["twice formed"] = trained(twice), len(formed)
    regularizer.fused_ar_tar = form
    return found


def results() -> dict[str, Any]:
    fused, spied = fuse(learner()), fuse(learner())
    place = [type(cb).__name__ for cb in learner().callbacks], [type(cb).__name__ for cb in fused.callbacks]
    trainers = fused.callbacks[:]
    spy = Spy(spied)
    spied.fit(1, callbacks=[spy])
    last = fused.callbacks[-1]
    found = {
        "release": release,
        "dicts": hasattr(CallbackHandler, "_call_and_update"),
        "stock": trained(learner()),
        "stock fused": trained(fuse(learner())),
        "written": trained(with_trainer(Written, 16, adjust=False)),
        "fused": trained(fused),
        "alpha only": trained(learner(beta=0.0)),
        "beta only": trained(fuse(learner(alpha=0.0))),
        "off": trained(learner(alpha=0.0, beta=0.0)),
        "terms": (float(last.regularizer.ar), float(last.regularizer.tar)),
        "place": place,
        "idempotent": all(a is b for a, b in zip(trainers, fuse(fused).callbacks, strict=True)),
        "attribute": getattr(fused, "rnn_trainer", last) is last,
        "given": {"bptt": last.bptt, "alpha": last.alpha, "beta": last.beta, "adjust": last.adjust},
        "outputs": spy.outputs,
        "not adjusted": {tuple(lrs) for lrs in spy.stepped} == {tuple(spy.between[0])},
        "adjusted": adjusted(),
        "adjusted, failed": adjusted(fails=True),
        "held": [held(dropout=False), held(dropout=True)],
        "fused dropout": fused_dropout(),
        "exported": exported(),
        "paths": by_path(),
        "no reset": plain_model(reset=False),
        "plain output": plain_model(reset=True),
        "no bptt": message(RNNTrainer, fused, None),
    }
    two = fuse(learner())
    two.callbacks.append(RNNTrainer(two, 16))
    found["two trainers"] = message(two.fit, 1)
    nothing = learner()
    nothing.callbacks = []
    found["no trainer"] = message(fuse, nothing)
    other = learner()
    other.model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    found["no dropout"] = message(fuse, other, True), type(other.callbacks[-1]) is Stock
    sub, class_of = learner(), type("Mine", (Stock,), {})
    sub.callbacks[-1].__class__ = class_of
    found["subclass"] = message(fuse, sub)
    other = learner()
    other.model[1].output_dp.__class__ = type("Dropped", (type(other.model[1].output_dp),), {})
    found["subclass of the dropout"] = message(fuse, other, True)
    found["types"] = [message(f, None, *more) for f, *more in ((fuse,), (unfuse,), (RNNTrainer, 16))]
    found["types"] += [message(fuse, learner(), 0.5)]
    bad = learner()
    bad.model[1].output_dp.p = 1.0
    found["nothing swapped"] = message(fuse, bad, True), type(bad.callbacks[-1]) is Stock
    if release != "1.0.36":  # which halves the token ids, too
        found["written, scaled"] = trained(scaled(with_trainer(Written, 16, adjust=False)))
        found["fused, scaled"] = trained(scaled(fuse(learner())))
    return found


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])
