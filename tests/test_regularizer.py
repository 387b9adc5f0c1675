"""`RNNRegularizer` in loops written by hand, against the formula written out; what it captures, and what it lets go."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from fastreg import FusedRNNDropout, attachment, fused_ar_tar
from fastreg.output_dropout import OutputDropout, link
from fastreg.regularizer import RNNRegularizer
from tests.samples import BF16, DOUBLE, FLOAT

VOCABULARY, HIDDEN, BATCH, TIME = 11, 6, 3, 7
ALPHA, BETA = 2.0, 1.0


def formula(raw: Tensor, dropped: Tensor, time: int) -> Tensor:
    return ALPHA * dropped.pow(2).mean() + BETA * raw.diff(dim=time).pow(2).mean()


class Model(nn.Module):
    """A language model that knows nothing of fastreg. One dropout serves embeddings and output, as is common."""

    kind_of_dropout: Any = nn.Dropout

    def __init__(self, kind: Any = nn.LSTM, p: float = 0.3, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.rnn: Any = kind(HIDDEN, HIDDEN, **({"batch_first": True} | options))
        self.dropout = dropout_like(self.kind_of_dropout, p, self.rnn)
        width = HIDDEN * (2 if self.rnn.bidirectional else 1)
        self.decoder = nn.Linear(self.rnn.proj_size or width, VOCABULARY)

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw, _ = self.rnn(self.dropout(self.embedding(x)))
        dropped = self.dropout(raw)
        return self.decoder(dropped), raw, dropped

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(x)[0]


class Fused(Model):
    kind_of_dropout = FusedRNNDropout


class Stack(nn.Module):
    """Layers of modules of their own, each with its dropout, as AWD-LSTM has them; gives the lists of layers."""

    kind_of_dropout: Any = nn.Dropout

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.rnns = nn.ModuleList(nn.GRU(HIDDEN, HIDDEN, batch_first=True) for _ in range(3))
        self.dropouts = nn.ModuleList(dropout_like(self.kind_of_dropout, 0.3, rnn) for rnn in self.rnns)
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        dropped, raws, droppeds = self.embedding(x), [], []
        for rnn, dropout in zip(self.rnns, self.dropouts, strict=True):
            raw, _ = rnn(dropped)
            dropped = dropout(raw)
            raws.append(raw)
            droppeds.append(dropped)
        return self.decoder(dropped), raws, droppeds


def dropout_like(kind: Any, p: float, rnn: Any) -> nn.Module:
    return kind(p, **({"batch_first": rnn.batch_first} if kind is FusedRNNDropout else {}))


@pytest.fixture(params=[nn.Dropout, FusedRNNDropout])
def either_dropout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models with a plain dropout, and with one that takes the penalty along; alone it adds nothing."""
    monkeypatch.setattr(Model, "kind_of_dropout", request.param)
    monkeypatch.setattr(Stack, "kind_of_dropout", request.param)


either = pytest.mark.usefixtures("either_dropout")


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def tokens(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(VOCABULARY, shape or (BATCH, TIME), generator=torch.Generator().manual_seed(1)).to(device)


def criterion(decoded: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(decoded.flatten(0, -2), x.flatten())


def train(model: nn.Module, loss_of: Callable[[Tensor], Tensor], x: Tensor, steps: int = 4) -> list[Tensor]:
    """The weights after a few steps; dropout draws the same masks in every run."""
    torch.manual_seed(2)
    optimizer = SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(x).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def assert_same(got: list[Tensor], want: list[Tensor], unlike: list[Tensor] | None = None) -> None:
    """The same weights to rounding, where those without the penalty are not."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if unlike is not None:
        assert max((a - b).abs().max().item() for a, b in zip(want, unlike, strict=True)) > 1e-3


def regularizer(**options: Any) -> RNNRegularizer:
    return RNNRegularizer(ALPHA, BETA, **options)


def attached(model: Model, **options: Any) -> RNNRegularizer:
    made = regularizer(**options)
    made.attach(model.rnn, model.dropout)
    return made


def penalty_of(reg: RNNRegularizer) -> Tensor:
    """The penalty of what is captured now."""
    return reg.on_backward_begin(torch.zeros(()))


# The right weights


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


@pytest.mark.parametrize("kind", [tuple, list])
def test_output(kind: type) -> None:
    model, plain = seeded(Model), seeded(Model)
    reg = regularizer()

    def captured(x: Tensor) -> Tensor:
        decoded = reg.on_loss_begin(kind(model.activations(x)))
        return reg.on_backward_begin(criterion(decoded, x))

    def written_out(x: Tensor) -> Tensor:
        decoded, raw, dropped = plain.activations(x)
        return criterion(decoded, x) + formula(raw, dropped, 1)

    assert_same(train(model, captured, tokens()), train(plain, written_out, tokens()))


@either
@pytest.mark.parametrize("by_hooks", [False, True])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_layers(layers: Any, by_hooks: bool) -> None:
    model, plain, without = seeded(Stack), seeded(Stack), seeded(Stack)
    reg = regularizer(layers=layers)
    if by_hooks:
        for rnn, dropout in zip(model.rnns, model.dropouts, strict=True):
            reg.attach(rnn, dropout)

    def captured(x: Tensor) -> Tensor:
        output = model(x)
        decoded = output[0] if by_hooks else reg.on_loss_begin(output)
        return reg.on_backward_begin(criterion(decoded, x))

    def written_out(x: Tensor) -> Tensor:
        decoded, raws, droppeds = plain(x)
        first = -1 if layers == "last" else 0
        return criterion(decoded, x) + sum(
            formula(r, d, 1) for r, d in zip(raws[first:], droppeds[first:], strict=True)
        )

    got = train(model, captured, tokens())
    unlike = train(without, lambda x: criterion(without(x)[0], x), tokens())
    assert_same(got, train(plain, written_out, tokens()), unlike)


@either
@pytest.mark.parametrize("by_hooks", [False, True])
def test_loss_and_terms(by_hooks: bool) -> None:
    model = seeded(Model)
    reg = attached(model) if by_hooks else regularizer()
    assert reg.ar is None
    assert reg.tar is None
    output = model.activations(tokens())
    decoded, raw, dropped = output
    if not by_hooks:
        assert reg.on_loss_begin(output) is decoded
    loss = criterion(decoded, tokens())
    before = loss.item()
    total = reg.on_backward_begin(loss)
    assert total is not loss
    assert loss.item() == before
    assert isinstance(reg.ar, Tensor)
    assert isinstance(reg.tar, Tensor)
    torch.testing.assert_close(reg.ar, dropped.detach().pow(2).mean())
    torch.testing.assert_close(reg.tar, raw.detach().diff(dim=1).pow(2).mean())
    torch.testing.assert_close(total.detach(), before + ALPHA * reg.ar + BETA * reg.tar)
    assert not reg.ar.requires_grad
    assert not reg.tar.requires_grad


def test_coefficients_may_change() -> None:
    reg = RNNRegularizer()
    raw = torch.ones(2, 3, 4)
    reg.on_loss_begin((raw, raw, 2 * raw))
    assert penalty_of(reg) == 0
    assert reg.ar == 0
    reg.alpha = 0.5
    reg.on_loss_begin((raw, raw, 2 * raw))
    assert penalty_of(reg) == 0.5 * 4
    assert reg.ar == 4


@pytest.mark.parametrize(("loss", "raw", "total"), [(BF16, BF16, FLOAT), (FLOAT, BF16, FLOAT), (FLOAT, DOUBLE, DOUBLE)])
def test_dtypes(loss: torch.dtype, raw: torch.dtype, total: torch.dtype) -> None:
    reg = regularizer()
    x = torch.ones(2, 3, 4, dtype=raw)
    reg.on_loss_begin((x, x, x))
    assert reg.on_backward_begin(torch.ones((), dtype=loss)).dtype == total


# What belongs to a step


@either
def test_every_run_of_a_step_counts() -> None:
    model = seeded(lambda: Model(p=0.5))
    reg = attached(model)
    first, second = model.activations(tokens()), model.activations(tokens().flip(1))
    loss = criterion(first[0], tokens()) + criterion(second[0], tokens())
    want = formula(*first[1:], time=1) + formula(*second[1:], time=1)
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, want)


def test_runs_that_the_loss_sees_by_their_last_state_alone_count() -> None:
    rnn = seeded(lambda: nn.LSTM(HIDDEN, HIDDEN, batch_first=True))
    reg = regularizer()
    reg.attach(rnn)
    runs = [rnn(torch.randn(BATCH, TIME, HIDDEN)) for _ in range(2)]
    loss = (runs[0][1][0] - runs[1][1][0]).pow(2).mean()
    want = sum(formula(raw, raw, 1) for raw, _ in runs)
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, want)


@either
@pytest.mark.parametrize("by_hooks", [False, True])
def test_a_step_that_failed_leaves_nothing_behind(by_hooks: bool) -> None:
    model = seeded(Model)
    reg = attached(model) if by_hooks else regularizer()

    def step(x: Tensor, fail: bool) -> None:
        decoded, raw, dropped = output = model.activations(x)
        if not by_hooks:
            reg.on_loss_begin(output)
        loss = criterion(decoded, x)
        if fail:
            raise KeyError("between capture and backward")
        torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(raw, dropped, 1))

    for _ in range(2):
        with pytest.raises(KeyError):
            step(tokens(), fail=True)
    step(tokens().flip(1), fail=False)


@either
def test_a_failed_step_is_not_seen_in_evaluation() -> None:
    model = seeded(Model)
    reg = attached(model)
    model(tokens())
    model.eval()
    loss = criterion(model(tokens()), tokens())
    assert reg.on_backward_begin(loss) is loss


def test_clear_and_on_epoch_begin_drop_captures() -> None:
    model = seeded(Model)
    for reg in (attached(model), regularizer()):
        for drop in (reg.clear, lambda reg=reg: reg.on_epoch_begin(model)):
            output = model.activations(tokens())
            if not reg._attached:
                reg.on_loss_begin(output)
            drop()
            with pytest.raises(RuntimeError, match="nothing was captured"):
                penalty_of(reg)


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
    _, raws, droppeds = model(tokens())
    want = formula(raws[0], droppeds[0], 1) + formula(raws[1], droppeds[1], 1)
    torch.testing.assert_close(penalty_of(reg), want)
    reg.layers = "last"
    model(tokens())
    assert penalty_of(reg) == 0


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
def test_a_frozen_rnn_is_no_error() -> None:
    model = seeded(Model).requires_grad_(False)
    model.decoder.requires_grad_(True)
    reg = attached(model)
    decoded, raw, dropped = model.activations(tokens())
    loss = criterion(decoded, tokens())
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(raw, dropped, 1))


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


@either
@pytest.mark.parametrize("by_hooks", [False, True])
@pytest.mark.parametrize("fails", [None, "alpha", "loss"])
def test_nothing_is_held_after_the_loss(by_hooks: bool, fails: str | None) -> None:
    model = seeded(Model)
    reg = attached(model) if by_hooks else regularizer()
    output = model.activations(tokens())
    if not by_hooks:
        reg.on_loss_begin(output)
    refs = [weakref.ref(x) for x in output[1:]]
    loss = criterion(output[0], tokens())
    if isinstance(model.dropout, FusedRNNDropout) and not by_hooks:
        model.dropout.take()  # it waits: nobody knows of it
    if fails:
        reg.alpha = -1.0 if fails == "alpha" else ALPHA
        with pytest.raises(ValueError, match=fails):
            reg.on_backward_begin(loss if fails == "alpha" else loss.expand(2))
    else:
        reg.on_backward_begin(loss).backward()
    del output, loss
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    reg.alpha = ALPHA
    with pytest.raises(RuntimeError, match="nothing was captured"):
        penalty_of(reg)


@either
def test_a_forgotten_regularizer_captures_nothing() -> None:
    model = seeded(Model)
    attachment = regularizer().attach(model.rnn, model.dropout)
    gc.collect()
    model(tokens())
    assert attachment.captures == []


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
    reg = attached(model)

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
    assert len(reg._attached[0].captures) == 1
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
    with pytest.raises(RuntimeError, match=r"rnn: .*compiled already; attach\(\) it before torch.compile"):
        regularizer().attach(torch.compile(model.rnn, backend="eager"))  # pyright: ignore[reportArgumentType]
    model.dropout.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"dropout: .*compiled already"):
        regularizer().attach(model.rnn, model.dropout)
    assert not model.rnn._forward_hooks


# The dropout


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


@pytest.mark.parametrize("between", [lambda x: x[:, 1:], torch.relu, lambda x: x.transpose(0, 1)])
def test_a_dropout_that_did_not_get_the_output(between: Callable[[Tensor], Tensor]) -> None:
    model = seeded(Model)
    reg = attached(model)
    raw, _ = model.rnn(torch.randn(BATCH, TIME, HIDDEN))
    loss = model.dropout(between(raw)).mean()
    with pytest.raises(RuntimeError, match=r"attached Dropout did not get the output of the LSTM: something lies"):
        reg.on_backward_begin(loss)


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


@pytest.mark.parametrize("how", ["packed", "data", "padded"])
def test_packed_sequences(how: str) -> None:
    model = seeded(Model)
    packed = pack_padded_sequence(torch.randn(BATCH, TIME, HIDDEN), torch.tensor([7, 4, 2]), batch_first=True)
    reg = attached(model)
    raw, _ = model.rnn(packed)
    assert isinstance(raw, PackedSequence)
    if how == "padded":
        model.dropout(pad_packed_sequence(raw)[0])
        with pytest.raises(RuntimeError, match=r"did not get the output of the LSTM: .*packing, padding"):
            penalty_of(reg)
    elif how == "data":
        dropped = model.dropout(raw.data)
        (part,) = reg._attached[0].parts(torch.zeros(()))
        assert part.raw is raw
        assert isinstance(part.dropped, PackedSequence)
        assert part.dropped.data is dropped
        assert torch.equal(part.dropped.batch_sizes, raw.batch_sizes)
        assert penalty_of(reg) == fused_ar_tar(raw, part.dropped, reg.alpha, reg.beta)
    else:
        reg = regularizer()
        reg.attach(model.rnn.train())
        raw, _ = model.rnn(packed)
        (part,) = reg._attached[0].parts(torch.zeros(()))
        assert part.raw is raw
        assert part.dropped is raw
        assert penalty_of(reg) == fused_ar_tar(raw, raw, reg.alpha, reg.beta)
    for layers in ("last", "all"):
        reg = regularizer(layers=layers)
        assert reg.on_loss_begin((0, [raw, raw], [raw, raw])) == 0
        assert reg._given is not None
        assert reg._given.raw is raw if layers == "last" else len(reg._given.raw) == 2


def test_lengths_of_a_padded_batch() -> None:
    raw, dropped = (torch.randn(BATCH, TIME, HIDDEN, requires_grad=True) for _ in range(2))
    reg, lengths = regularizer(), torch.tensor([7, 4, 2])
    reg.on_loss_begin((0, [raw], [dropped]), lengths)
    assert penalty_of(reg) == fused_ar_tar(raw, dropped, reg.alpha, reg.beta, lengths=lengths)
    reg.on_loss_begin((0, raw, dropped), lengths=lengths + 1)
    with pytest.raises(ValueError, match="lengths: expected from 0 to the 7 time steps there are, got 8"):
        penalty_of(reg)


# A dropout that takes the penalty along


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The penalties that are formed apart from the dropout."""
    calls: list[Any] = []
    form = attachment.fused_ar_tar
    monkeypatch.setattr(
        attachment, "fused_ar_tar", lambda *args, **options: (calls.append(args), form(*args, **options))[1]
    )
    return calls


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("ar_of", ["dropped", "raw"])
def test_the_penalty_of_the_dropout_is_taken(batch_first: bool, ar_of: Any, formed: list[Any]) -> None:
    model = seeded(lambda: Fused(batch_first=batch_first))
    model.dropout.ar_of = ar_of
    reg = attached(model)
    _, raw, dropped = model.activations(tokens())
    want = formula(raw, dropped if ar_of == "dropped" else raw, int(batch_first))
    torch.testing.assert_close(penalty_of(reg), want)
    assert formed == []
    assert model.dropout.take() is None  # once


def test_the_dropout_follows_the_coefficients(formed: list[Any]) -> None:
    model = seeded(Fused)
    model.dropout.alpha, model.dropout.beta = 0.25, 0.5
    reg = regularizer()
    with reg.attach(model.rnn, model.dropout):
        for alpha, beta in ((0.0, 3.0), (3.0, 0.0), (0.0, 0.0)):
            reg.alpha, reg.beta = alpha, beta
            _, raw, dropped = model.activations(tokens())
            want = alpha * dropped.pow(2).mean() + beta * raw.diff(dim=1).pow(2).mean()
            torch.testing.assert_close(penalty_of(reg), want)
            assert [bool(reg.ar), bool(reg.tar)] == [alpha > 0, beta > 0]
        assert formed == []
        _, raw, dropped = model.activations(tokens())
        reg.alpha, reg.beta = ALPHA, BETA  # after the forward: the penalty is of these all the same
        torch.testing.assert_close(penalty_of(reg), formula(raw, dropped, 1))
        assert len(formed) == 1
    assert (model.dropout.alpha, model.dropout.beta) == (0.25, 0.5)
    _, raw, dropped = model.activations(tokens())
    torch.testing.assert_close(
        model.dropout.take().penalty, 0.25 * dropped.pow(2).mean() + 0.5 * raw.diff(dim=1).pow(2).mean()
    )


def test_a_dropout_that_layers_share(formed: list[Any]) -> None:
    rnns = seeded(lambda: [nn.GRU(HIDDEN, HIDDEN, batch_first=True) for _ in range(2)])
    dropout = FusedRNNDropout(0.3, 0.25, 0.5)
    reg = regularizer(layers="all")
    handles = [reg.attach(rnns[0], dropout)]
    dropout(rnns[0](torch.randn(BATCH, TIME, HIDDEN))[0])
    reg.clear()
    handles.append(reg.attach(rnns[1], dropout))
    raws = [rnns[0](torch.randn(BATCH, TIME, HIDDEN))[0]]
    droppeds = [dropout(raws[0])]
    raws.append(rnns[1](droppeds[0])[0])
    droppeds.append(dropout(raws[1]))
    want = sum(formula(raw, dropped, 1) for raw, dropped in zip(raws, droppeds, strict=True))
    torch.testing.assert_close(penalty_of(reg), want)
    assert formed == []
    for handle in handles:
        handle.remove()
    assert (dropout.alpha, dropout.beta) == (0.25, 0.5)
    dropout.alpha = 4.0
    handles[1].remove()  # twice is once
    assert dropout.alpha == 4


def test_two_regularizers_of_one_dropout() -> None:
    """Each adds its own penalty, though the dropout forms but one."""
    model = seeded(Fused)
    one, other = attached(model), RNNRegularizer(3.0, 5.0)
    other.attach(model.rnn, model.dropout)
    _, raw, dropped = model.activations(tokens())
    torch.testing.assert_close(penalty_of(one), formula(raw, dropped, 1))
    torch.testing.assert_close(penalty_of(other), 3 * dropped.pow(2).mean() + 5 * raw.diff(dim=1).pow(2).mean())


class Changed(FusedRNNDropout):
    """Whose output is not what the dropout itself put out, or its input not what the RNN did."""

    changed = "output"

    def forward(self, raw: Tensor) -> Tensor:
        return super().forward(raw) * 1.5 if self.changed == "output" else super().forward(raw * 1.5)


@pytest.mark.parametrize("how", ["hook", "output", "input"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_only_the_penalty_of_the_very_output_is_taken(how: str, batch_first: bool) -> None:
    model = seeded(lambda: Fused(batch_first=batch_first))
    if how == "hook":
        model.dropout.register_forward_hook(lambda _m, _i, output: output * 2)
    else:
        model.dropout = Changed(0.3, batch_first=batch_first)
        model.dropout.changed = how
    reg = attached(model)
    _, raw, dropped = model.activations(tokens())
    torch.testing.assert_close(penalty_of(reg), formula(raw, dropped, int(batch_first)))
    assert model.dropout.take() is None


def test_an_attached_dropout_keeps_its_own_coefficients() -> None:
    model = seeded(Fused)
    model.dropout.alpha, model.dropout.beta = 0.25, 0.5
    one, other = regularizer(), RNNRegularizer(3.0, 5.0)
    handles = [reg.attach(model.rnn, model.dropout) for reg in (one, other)]

    def own(dropout: FusedRNNDropout) -> bool:
        """Whether a forward without hooks is of its own coefficients."""
        raw = torch.randn(BATCH, TIME, HIDDEN)
        dropped = dropout.forward(raw)
        want = 0.25 * dropped.pow(2).mean() + 0.5 * raw.diff(dim=1).pow(2).mean()
        taken = dropout.take()
        return taken is not None and torch.isclose(taken.penalty, want).item() is True

    def fail(*_: Any) -> None:
        raise KeyError

    model(tokens())
    assert own(copy.deepcopy(model.dropout))
    assert own(pickle.loads(pickle.dumps(model.dropout)))
    assert own(model.dropout)
    hook = model.dropout.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(tokens())
    hook.remove()
    assert own(copy.deepcopy(model.dropout))
    for handle in handles:
        handle.remove()
        model(tokens())
        assert (model.dropout.alpha, model.dropout.beta) == (0.25, 0.5)
    assert own(model.dropout)


def test_a_forgotten_regularizer_leaves_the_dropout_as_it_was() -> None:
    model = seeded(Fused)
    model.dropout.alpha = 0.25
    reg = attached(model)
    alive = weakref.ref(model.activations(tokens())[1])
    model.dropout(torch.randn(BATCH, TIME, HIDDEN))  # used for something else last
    del reg
    gc.collect()
    assert model.dropout.alpha == 0.25
    assert model.dropout.take() is None
    assert alive() is None


@pytest.mark.parametrize("off", ["evaluation", "p"])
def test_a_fused_dropout_that_drops_nothing(off: str) -> None:
    model = seeded(Fused)
    reg = attached(model)
    if off == "p":
        model.dropout.p = 0.0
    else:
        model.dropout.eval()
    _, raw, dropped = model.activations(tokens())
    assert dropped is raw
    torch.testing.assert_close(penalty_of(reg), formula(raw, raw, 1))


def test_nothing_waits_in_the_dropout_after_a_step_that_failed() -> None:
    model = seeded(Fused)
    reg = attached(model)
    raw, _ = model.rnn(torch.randn(BATCH, TIME, HIDDEN))
    loss = model.dropout(raw[:, 1:]).mean()
    with pytest.raises(RuntimeError, match="attached FusedRNNDropout did not get the output of the LSTM"):
        reg.on_backward_begin(loss)
    assert model.dropout.take() is None


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_layouts_must_agree(batch_first: bool) -> None:
    rnn, dropout = nn.GRU(HIDDEN, HIDDEN, batch_first=batch_first), FusedRNNDropout(batch_first=not batch_first)
    message = f"dropout: expected .* batch_first={batch_first}, as the GRU has it, got batch_first={not batch_first}"
    with pytest.raises(ValueError, match=message):
        regularizer().attach(rnn, dropout)
    assert not rnn._forward_hooks
    assert not dropout._forward_pre_hooks


@either
def test_a_dropout_without_gradients_is_refused() -> None:
    model = seeded(Model)
    reg = attached(model)
    raw, _ = model.rnn(torch.randn(BATCH, TIME, HIDDEN))
    with torch.no_grad():
        model.dropout(raw)
    with pytest.raises(RuntimeError, match="the LSTM or its dropout ran without gradients"):
        reg.on_backward_begin(raw.mean())


def test_a_fused_dropout_takes_no_packed_data() -> None:
    model = seeded(Fused)
    attached_regularizer = attached(model)
    packed = pack_padded_sequence(torch.randn(BATCH, TIME, HIDDEN), torch.tensor([7, 4, 2]), batch_first=True)
    raw, _ = model.rnn(packed)
    with pytest.raises(TypeError, match=r"FusedRNNDropout: expected .* a tensor, got the data of a PackedSequence"):
        model.dropout(raw.data)
    attached_regularizer.clear()
    model.dropout.eval()  # drops nothing, and takes no penalty
    raw, _ = model.rnn(packed)
    model.dropout(raw.data)
    torch.testing.assert_close(penalty_of(attached_regularizer), fused_ar_tar(raw, raw, ALPHA, BETA))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_fused_dropout_follow_nobody(duplicate: Callable[[Any], Any]) -> None:
    model = seeded(Fused)
    reg = attached(model)
    twin = duplicate(model)
    reg.alpha = 7.0
    twin(tokens())
    assert twin.dropout.alpha == 0
    assert twin.dropout.take() is not None  # which the hooks of the first would have taken


@pytest.mark.parametrize("changed", ["nothing", "dropped", "raw", "alpha"])
def test_an_offer_is_taken_as_long_as_it_is_right(changed: str, formed: list[Any]) -> None:
    reg, dropout = regularizer(), OutputDropout(nn.Dropout(0.3))
    link(nn.Sequential(dropout), reg)
    raw = torch.randn(BATCH, TIME, HIDDEN)
    dropped = dropout(raw)
    if changed in ("dropped", "raw"):
        {"dropped": dropped, "raw": raw}[changed].mul_(2)
    elif changed == "alpha":
        reg.alpha = 9.0
    reg.on_loss_begin((0, raw, dropped))
    want = reg.alpha * dropped.pow(2).mean() + BETA * raw.diff(dim=1).pow(2).mean()
    torch.testing.assert_close(penalty_of(reg), want)
    assert len(formed) == (changed != "nothing")


def test_an_offer_is_not_of_what_came_with_lengths_or_after_it() -> None:
    raw, lengths = torch.randn(BATCH, TIME, HIDDEN), torch.full((BATCH,), 2)
    reg, dropout = regularizer(), OutputDropout(nn.Dropout(0.3))
    link(dropout, reg)
    dropped = dropout(raw)
    reg.on_loss_begin((0, raw, dropped), lengths)
    torch.testing.assert_close(penalty_of(reg), fused_ar_tar(raw, dropped, ALPHA, BETA, lengths=lengths))
    dropped = 2 * dropout(raw)
    reg.on_loss_begin((0, raw, dropped))
    torch.testing.assert_close(penalty_of(reg), formula(raw, dropped, 1))


def test_an_rnn_in_evaluation_among_others_is_no_excuse() -> None:
    model, reg = seeded(Stack), regularizer(layers="all")
    for rnn, dropout in zip(model.rnns, model.dropouts, strict=True):
        reg.attach(rnn, dropout)
    model.rnns[2].eval()
    with pytest.raises(RuntimeError, match="nothing was captured"):
        penalty_of(reg)


@either
def test_two_runs_before_their_dropouts() -> None:
    model = seeded(Model)
    reg = attached(model)
    raws = [model.rnn(torch.randn(BATCH, TIME, HIDDEN))[0] for _ in range(2)]
    droppeds = [model.dropout(raw) for raw in raws]
    loss = droppeds[0].mean() + droppeds[1].mean()
    want = sum(formula(raw, dropped, 1) for raw, dropped in zip(raws, droppeds, strict=True))
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, want)


@pytest.mark.parametrize("run", [0, 1])
def test_a_loss_depends_on_a_run_by_any_of_its_inputs(run: int) -> None:
    rnn = seeded(lambda: nn.LSTM(HIDDEN, HIDDEN, batch_first=True))
    reg = regularizer()
    reg.attach(rnn)
    runs = [rnn(torch.randn(BATCH, TIME, HIDDEN))[0] for _ in range(2)]
    loss = torch.ones((), requires_grad=True) - runs[run].mean()
    torch.testing.assert_close(reg.on_backward_begin(loss) - loss, formula(runs[run], runs[run], 1))


def test_a_dropout_that_failed_gets_its_own_coefficients_back() -> None:
    model = seeded(Fused)
    model.dropout.alpha, model.dropout.beta = 0.25, 0.5
    attachment = regularizer().attach(model.rnn, model.dropout)

    def fail(*_: Any) -> None:
        raise KeyError

    hook, raw = model.dropout.register_forward_pre_hook(fail), torch.randn(BATCH, TIME, HIDDEN)
    with pytest.raises(KeyError):
        model.dropout(raw)
    hook.remove()
    attachment.remove()
    dropped = model.dropout(raw)
    want = 0.25 * dropped.pow(2).mean() + 0.5 * raw.diff(dim=1).pow(2).mean()
    torch.testing.assert_close(model.dropout.take().penalty, want)


def test_offers_are_not_held() -> None:
    reg, dropout = regularizer(), OutputDropout(nn.Dropout(0.3))
    link(dropout, reg)
    raw = torch.randn(BATCH, TIME, HIDDEN)
    for drop in (reg.clear, lambda: dropout.eval()(raw), lambda: reg.on_loss_begin((0, raw, raw))):
        dropout.train()(raw)
        assert reg._offered is not None
        assert copy.deepcopy(reg)._offered is None
        drop()
        assert reg._offered is None
    with torch.inference_mode():
        dropout.train()(raw)
    assert reg._offered is None
    assert copy.deepcopy(dropout).linked() is None
    link(dropout, None)
    dropout(raw)
    assert reg._offered is None
    assert dropout.take() is None


@pytest.mark.parametrize("how", ["never linked", "unlinked", "regularizer gone"])
def test_an_output_dropout_that_is_not_linked_is_its_original(how: str) -> None:
    original = nn.Dropout(0.3)
    reg, dropout = regularizer(), OutputDropout(original, alpha=0.25, beta=0.5)
    if how != "never linked":
        link(dropout, reg)
        dropout(torch.randn(BATCH, TIME, HIDDEN))
    if how == "unlinked":
        link(dropout, None)
    del reg
    raw = torch.randn(BATCH, TIME, HIDDEN, requires_grad=True)
    torch.manual_seed(0)
    dropped = dropout(raw)
    torch.manual_seed(0)
    assert torch.equal(dropped, original(raw))
    assert dropout.take() is None
    assert (dropout.alpha, dropout.beta) == (0.25, 0.5)
    alive = weakref.ref(dropped)
    del dropped
    assert alive() is None


# Handles, copies, hidden states


@either
def test_handles() -> None:
    model = seeded(Model)
    reg = regularizer()
    with reg.attach(model.rnn, model.dropout) as handle:
        model(tokens())
        assert penalty_of(reg) > 0
        model(tokens())
    assert handle.captures == []
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
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate: Callable[[Any], Any]) -> None:
    model = seeded(Model)
    reg = attached(model, layers="all", bptt=70)
    output = model.activations(tokens())
    other = duplicate(reg)
    assert repr(other) == repr(reg) == "RNNRegularizer(alpha=2.0, beta=1.0, layers='all', bptt=70)"
    with pytest.raises(RuntimeError, match="nothing was captured; call on_loss_begin"):
        penalty_of(other)
    by_hand = regularizer()
    by_hand.on_loss_begin(output)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        penalty_of(duplicate(by_hand))
    twin = duplicate(model)  # as for an average of weights
    twin(tokens())
    torch.testing.assert_close(penalty_of(reg), formula(*output[1:], time=1))
    twin_reg = attached(twin)
    output = twin.activations(tokens())
    torch.testing.assert_close(penalty_of(twin_reg), formula(*output[1:], time=1))


def test_on_epoch_begin_resets() -> None:
    class Stateful(nn.Module):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    model = Stateful()
    regularizer().on_epoch_begin(model)
    assert model.resets == 1
    regularizer().on_epoch_begin(nn.Linear(1, 1))
    regularizer().on_epoch_begin(nn.DataParallel(model))  # like DistributedDataParallel, hides the model's attributes
    assert model.resets == 2


# The learning rate


@pytest.mark.parametrize("fails", [False, True])
def test_scaled_lr(fails: bool) -> None:
    reg = RNNRegularizer(bptt=70)
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = SGD([{"params": weights[:1], "lr": 0.3}, {"params": weights[1:]}], lr=0.1)

    def step() -> None:
        with reg.scaled_lr(optimizer, 35):
            assert [group["lr"] for group in optimizer.param_groups] == [0.15, 0.05]
            for w in weights:
                w.grad = torch.ones(1)
            if fails:
                raise KeyError
            optimizer.step()

    for _ in range(3):
        if fails:
            with pytest.raises(KeyError):
                step()
        else:
            step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]
    moved = 0 if fails else 3
    torch.testing.assert_close(torch.cat([*weights]).detach(), torch.tensor([1 - moved * 0.15, 1 - moved * 0.05]))


def test_scaled_lr_of_tensors() -> None:
    reg = RNNRegularizer(bptt=3)
    lr = torch.tensor(0.1)
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = Adam([{"params": w} for w in weights], lr=lr)  # one tensor for both groups
    groups = optimizer.param_groups
    before = [group["lr"] for group in groups]
    value = before[0].item()
    with reg.scaled_lr(optimizer, 1):
        assert [group["lr"].item() for group in groups] == pytest.approx([0.1 / 3] * 2)
        assert all(group["lr"] is lr for group, lr in zip(groups, before, strict=True))
    assert all(group["lr"] is lr and lr.item() == value for group, lr in zip(groups, before, strict=True))


@pytest.mark.parametrize(("seq_len", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_sequence_lengths(seq_len: Any, error: type[Exception]) -> None:
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(error, match="seq_len: expected a positive integer"):
        RNNRegularizer(bptt=70).scaled_lr(optimizer, seq_len)
    with pytest.raises(error, match="bptt: expected a positive integer"):
        RNNRegularizer(bptt=seq_len)
    with pytest.raises(RuntimeError, match=r"pass RNNRegularizer\(..., bptt="):
        RNNRegularizer().scaled_lr(optimizer, 70)


# Misuse


def test_nothing_captured() -> None:
    with pytest.raises(RuntimeError, match=r"call on_loss_begin\(output\) .* or attach\(rnn, dropout\)"):
        penalty_of(regularizer())
    model = seeded(Model)
    reg = attached(model)
    with pytest.raises(RuntimeError, match="the attached LSTM did not run"):
        penalty_of(reg)
    model.rnn.forward(torch.randn(BATCH, TIME, HIDDEN))
    with pytest.raises(RuntimeError, match=r"Call the module, not its forward\(\)"):
        penalty_of(reg)


X = torch.ones(2, 3, 4)
PACKED = pack_padded_sequence(X, torch.tensor([3, 2]), batch_first=True)


@pytest.mark.parametrize(
    ("output", "came"),
    [
        (X, "Tensor"),
        (None, "NoneType"),
        ({"decoded": X}, "dict"),
        ((X, X), "tuple of Tensor, Tensor"),
        ([X, X, X, X], "list of Tensor, Tensor, Tensor, Tensor"),
        ((), "tuple of nothing"),
        ((X, X, None), "tuple of Tensor, Tensor, NoneType"),
        ((X, X, (X, X)), "tuple of Tensor, Tensor, tuple of 2"),
        ((X, [X, X], [X]), "tuple of Tensor, list of 2, list of 1"),
        ((X, [], []), "tuple of Tensor, list of 0, list of 0"),
        ((X, [X], [1]), "tuple of Tensor, list of 1, list of 1"),
        (PACKED, "PackedSequence"),
    ],
    ids=str,
)
def test_outputs_refused(output: Any, came: str) -> None:
    reg = regularizer()
    with pytest.raises(TypeError, match=r"expected \(decoded, raw, dropped\).* got (.*)\. Let the model") as error:
        reg.on_loss_begin(output)
    assert f"got {came}. Let the model return (decoded, raw, dropped)" in str(error.value)
    assert "attach(rnn, dropout)" in str(error.value)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        penalty_of(reg)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((nn.Linear(1, 1), None), "rnn: expected an nn.LSTM, nn.GRU or nn.RNN, got Linear"),
        ((nn.LSTMCell(1, 1), None), "rnn: expected an nn.LSTM, nn.GRU or nn.RNN, got LSTMCell"),
        (("lstm", None), "rnn: expected an nn.LSTM, nn.GRU or nn.RNN, got str"),
        ((type("LSTM", (nn.Module,), {"__module__": "own"})(), None), r"nn.GRU or nn.RNN, got own\.LSTM"),
        ((nn.LSTM(1, 1), 0.5), "dropout: expected an nn.Module or None, got float"),
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


def test_an_optimizer_is_asked_for() -> None:
    reg = RNNRegularizer(bptt=5)
    for wrong in (None, [torch.optim.SGD([X], 0.1)]):
        with pytest.raises(TypeError, match=r"optimizer: expected an optimizer .* got (NoneType|list)"):
            reg.scaled_lr(wrong, 5)  # pyright: ignore[reportArgumentType]
    reg.bptt = 0
    with pytest.raises(ValueError, match="bptt: expected a positive integer, got 0"):
        reg.scaled_lr(torch.optim.SGD([X], 0.1), 5)


def test_one_way_to_capture() -> None:
    model = seeded(Model)
    reg = attached(model)
    with pytest.raises(RuntimeError, match="on_loss_begin: attached modules capture already"):
        reg.on_loss_begin(model.activations(tokens()))
    with pytest.raises(RuntimeError, match="rnn: the module is attached already"):
        reg.attach(model.rnn)
    reg = regularizer()
    reg.on_loss_begin(model.activations(tokens()))
    with pytest.raises(RuntimeError, match="attach: on_loss_begin captures already"):
        reg.attach(model.rnn)


def test_losses_refused() -> None:
    with pytest.raises(TypeError, match="loss: expected a tensor, got float"):
        regularizer().on_backward_begin(1.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1}, ValueError, "alpha"),
        ({"beta": float("nan")}, ValueError, "beta"),
        ({"alpha": "2"}, TypeError, "alpha"),
        ({"layers": "first"}, ValueError, "layers: expected 'last' or 'all', got 'first'"),
        ({"layers": 0}, ValueError, "layers: expected 'last' or 'all', got 0"),
    ],
)
def test_arguments_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RNNRegularizer(**options)


def test_a_loss_of_several_elements_is_refused() -> None:
    """The penalty would be added to each."""
    reg = RNNRegularizer(2.0, 1.0)
    x = torch.randn(2, 3, 4)
    reg.on_loss_begin((x, x, x))
    with pytest.raises(ValueError, match=r"loss: expected one element, got shape \(6,\)"):
        reg.on_backward_begin(torch.zeros(6))
