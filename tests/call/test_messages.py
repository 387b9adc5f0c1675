"""Errors and warnings name the argument and the remedy: a case for each bad argument, and the mistakes of newcomers."""

from __future__ import annotations

import copy
import os
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastreg import FusedRNNDropout, RNNRegularizer, fused_ar_tar, fused_dropout_ar_tar, with_penalty
from fastreg.call import backends
from fastreg.call.arguments import ValidShapeError
from fastreg.call.problem import TimeAxis
from fastreg.call.rnn_dropout import Request
from tests import language_model as lm
from tests.calls import Decorated
from tests.conftest import ROOT, python, skip_without
from tests.language_model import ALPHA, BETA, HIDDEN

# Right calls are silent.
pytestmark = pytest.mark.filterwarnings("error", "ignore:fastreg runs the plain formula on CPUs")

X = torch.randn(2, 5, 8)
JAGGED = torch.nested.nested_tensor([X[0], X[0]], layout=torch.jagged)
FIRST = {"time_dim": 0}
META = X.to("meta")  # a device other than the CPU
LENGTHS, STARTS = tensor([5, 3]), tensor([[1, 0, 0, 1, 0]] * 2) > 0
PACKED, OTHER = (pack_padded_sequence(X, tensor(n), batch_first=True) for n in ([5, 3], [4, 4]))
DECORATED = PackedSequence(OTHER.data, OTHER.batch_sizes.as_subclass(Decorated))
HALVES = PackedSequence(PACKED.data, PACKED.batch_sizes.float())
ROWS_OF_ROWS = tuple.__new__(PackedSequence, (PACKED.data[None], PACKED.batch_sizes, None, None))
MANY, ONES = torch.randn(101, 5, 8), torch.ones(101, 5).long()  # more values than Python compares one by one
TOO_LOW, TOO_HIGH = (ONES.index_fill(0, tensor(50), value) for value in (-1, 6))
LOWEST = -(2**63) + 1  # sums and differences of such sizes wrap
WRONG_SIZES = [tensor(x) for x in ([1, LOWEST, 1, LOWEST, 4], [1, 1, 2, 2, 2], [8, 1, -1], [2, 2, 2, 1])]
WRONG_SIZES += [WRONG_SIZES[1].as_subclass(Decorated)]
TWO_AXES = r".* Pass time_dim=0 if .* torch\.stack\(states, 1\)"

# The beginning of the message, and the remedy; the error; and the arguments of calls that get it. Dropped is raw if it
# is not among them.
OF_BOTH: list[Any] = [
    (r"lengths: .* to the 5 time steps .*, got -1$", ValueError, {"raw": MANY, "lengths": TOO_LOW[:, 0]}),
    (r"lengths: .* to the 5 time steps .*, got 6$", ValueError, {"raw": MANY, "lengths": TOO_HIGH[:, 0]}),
    (r"lengths: expected shape \(2,\), .*, got \(1,\)$", ValueError, {"lengths": LENGTHS[:1]}),
    ("valid: .*, got -1$", ValueError, {"raw": MANY, "valid": TOO_LOW}),
    ("starts: .*, got 6$", ValueError, {"raw": MANY, "starts": TOO_HIGH}),
    ("raw: ", TypeError, {"raw": X.int()}, {"raw": JAGGED}),
    ("raw: ", ValueError, {"raw": X[0, 0]}),
    (f"raw: {TWO_AXES}", ValueError, {"raw": X[0]}),
    ("alpha: ", TypeError, {"alpha": "2"}),
    ("alpha: ", ValueError, {"alpha": -1.0}, {"alpha": 10**400}, {"alpha": tensor(2)}, {"alpha": tensor(-1.0)}),
    ("alpha: .* where raw is", ValueError, {"alpha": tensor(1.0, device="meta")}),
    ("beta: ", ValueError, {"beta": torch.ones(1)}),
    ("beta: .* requires no gradient", ValueError, {"beta": tensor(1.0, requires_grad=True)}),
    ("batch_first: ", TypeError, {"batch_first": 1}),
    ("batch_first and time_dim: ", ValueError, {"time_dim": 1, "batch_first": True}),
    ("time_dim: ", TypeError, {"time_dim": [1]}, {"time_dim": True}),
    ("time_dim: ", ValueError, {"time_dim": 3}, {"raw": X.sum(), "time_dim": 0}),
    ("return_terms: ", TypeError, {"return_terms": "no"}),
    ("reduction: ", ValueError, {"reduction": ["mean"]}, {"reduction": "none"}),
    ("lengths and valid: ", ValueError, {"valid": STARTS, "lengths": LENGTHS}),
    ("lengths: ", TypeError, {"lengths": LENGTHS.to_sparse()}),
    (r"lengths: .*; use \.long\(\), or pass a mask as valid=", TypeError, {"lengths": LENGTHS > 3}),
    (r"lengths: .*; use torch\.tensor\(\)", TypeError, {"lengths": [5, 3]}),
    ("lengths: ", ValueError, {"lengths": LENGTHS + 1}, {"lengths": LENGTHS - 4}, {"lengths": LENGTHS.to("meta")}),
    (r"valid: .*; use \.bool\(\)", TypeError, {"valid": STARTS.float()}, {"raw": META, "valid": META[..., 0]}),
    (r"valid: .*; a .* mask of lengths is torch\.arange", ValidShapeError, {"valid": LENGTHS}),
    (r"valid: .*\(batch, time\) = \(2, 5\), .* is transposed; use valid\.T", ValidShapeError, {"valid": STARTS.t()}),
    (r"valid: .* < lengths", ValidShapeError, {"valid": LENGTHS[:1].expand(5), "batch_first": False}),
    (r"starts: .*; use \.bool\(\)", TypeError, {"starts": STARTS.double()}, {"raw": META, "starts": META[..., 0]}),
    (r"starts: .*\(time, batch\) = \(2, 5\), ", ValueError, {"starts": STARTS.t(), "batch_first": False}),
    (r"starts: .*\(time,\) = \(5,\), .*\(1, 5\)$", ValueError, {"raw": X[0], "starts": STARTS[:1]} | FIRST),
    (r"starts: .*their \.T and starts\.T .*time_dim=1", ValueError, {"raw": STARTS.float(), "starts": STARTS} | FIRST),
    (r"starts: .*\(batch, time\) = \(2, 8\), ", ValueError, {"starts": torch.ones(8, 2) > 0, "time_dim": -1}),
    ("starts: ", ValueError, {"starts": STARTS[0]}, {"starts": STARTS.int() * 2}),
]
OF_PENALTY: list[Any] = [
    ("raw: ", TypeError, {"raw": 1}),
    ("raw: .* only if beta is 0", TypeError, {"raw": None}),
    ("dropped: .* only if alpha is 0", TypeError, {"dropped": None}),
    ("dropped: ", TypeError, {"dropped": X.to(torch.complex64)}, {"dropped": JAGGED}),
    (r"dropped: .* shape of raw, \(2, 5, 8\), got \(2, 4, 8\)$", ValueError, {"dropped": X[:, :4]}),
    ("dropped: expected a tensor on cpu, .* got one on meta$", ValueError, {"dropped": X.to("meta")}),
    ("raw: ", ValueError, {"raw": []}),
    ("raw and dropped: ", ValueError, {"raw": [X, X], "dropped": [X]}),
    ("raw and dropped: .*an RNN returns", ValueError, {"raw": (X, X[:, :1]), "dropped": X}),
    (r"dropped\[1\]: .*raw\[1\], .* got \(2, 5, 3\)$", ValueError, {"raw": [X, X], "dropped": [X, X[..., :3]]}),
    (rf"raw\[0\]: {TWO_AXES}", ValueError, {"raw": [*X.unbind(1)]}),
    (r"raw\[1\]: ", TypeError, {"raw": [X, None], "dropped": [X, X]}),
    (r"raw\[0\]\.batch_sizes: ", ValueError, {"raw": [PackedSequence(PACKED.data, WRONG_SIZES[0])]}),
    (r"alpha: .* where raw\[0\] is", ValueError, {"raw": [X, X], "alpha": tensor(1.0, device="meta")}),
    (r"raw\[1\]: .*an RNN returns", TypeError, {"raw": [X, (X, X)], "dropped": [X, X]}),
    (r"raw\[1\]: .*an RNN returns", ValueError, {"raw": (X, X[:, :1])}, {"raw": [X, X.movedim(2, 1)], "time_dim": -1}),
    (r"raw\[1\]: expected the batch_sizes of raw\[0\], got", ValueError, {"raw": [PACKED, OTHER]}),
    ("dropped: ", TypeError, {"raw": PACKED, "dropped": PACKED.data}),
    ("dropped: ", ValueError, {"raw": PACKED, "dropped": OTHER}, {"raw": PACKED, "dropped": DECORATED}),
    (r"raw\.data: ", ValueError, {"raw": ROWS_OF_ROWS}),
    (r"raw\.batch_sizes: ", TypeError, {"raw": HALVES}),
    (r"raw\.batch_sizes: ", ValueError, *[{"raw": PackedSequence(PACKED.data, x)} for x in WRONG_SIZES]),
    ("lengths: .*; pad_packed_sequence returns", ValueError, {"raw": PACKED, "lengths": LENGTHS}),
    ("starts: .*; pad_packed_sequence returns", ValueError, {"raw": PACKED, "starts": STARTS}),
    ("time_dim: ", ValueError, {"raw": PACKED, "time_dim": 1}),
    ("batch_first and time_dim: ", ValueError, {"raw": PACKED, "time_dim": 0, "batch_first": True}),
]
OF_DROPOUT: list[Any] = [
    ("raw: ", TypeError, {"raw": None}, {"raw": [X]}),
    ("p: ", ValueError, {"p": Fraction(10**20 - 1, 10**20)}),
    ("training: ", TypeError, {"training": "no"}),
    ("mask: ", TypeError, {"mask": 1}, {"mask": X.double()}),
    (r"mask: .* \(2, 1, 8\) or .* \(2, 5, 8\), got \(2, 3, 8\)$", ValueError, {"mask": X[:, :3]}),
    ("mask: ", ValueError, {"mask": X.to("meta")}),
    ("mask: .* requires no gradient", ValueError, {"mask": X.clone().requires_grad_()}),
]
OF_MODULE: list[Any] = [
    ("alpha: ", ValueError, {"alpha": -1.0}),
    ("beta: ", ValueError, {"beta": -1.0}),
    ("batch_first and time_dim: ", ValueError, {"batch_first": True, "time_dim": 1}),
]
OF_VIEW: list[Any] = [
    ("x: expected a tensor, got tuple .*pass the output", TypeError, {"x": (X, X)}),
    ("x: expected a tensor, got PackedSequence; pad_packed_sequence", TypeError, {"x": PACKED}),
    ("x: expected a floating-point tensor, got torch.int64$", TypeError, {"x": LENGTHS}),
    ("penalty: expected a tensor, got float$", TypeError, {"penalty": 1.0}),
    (r"penalty: expected a 0-dim tensor, got shape \(2,\)$", ValueError, {"penalty": LENGTHS}),
    ("scale: expected a finite number of at least 0, got -1.0$", ValueError, {"scale": -1}),
]
BAD: dict[Any, tuple[list[Any], dict[str, Any]]] = {  # and the arguments that are right
    fused_ar_tar: (OF_BOTH + OF_PENALTY, {"raw": X, "alpha": 2.0, "beta": 1.0}),
    fused_dropout_ar_tar: (OF_BOTH + OF_DROPOUT, {"raw": X, "p": 0.5, "alpha": 2.0, "beta": 1.0}),
    FusedRNNDropout: (OF_MODULE, {"p": 0.5, "alpha": 2.0, "beta": 1.0}),
    with_penalty: (OF_VIEW, {"x": X, "penalty": X.sum()}),  # also without a gradient, which would give x itself
}


@pytest.mark.parametrize(
    ("function", "message", "error", "options"),
    [(f, *row[:2], good | bad) for f, (rows, good) in BAD.items() for row in rows for bad in row[2:]],
    ids=[f"{f.__name__}-{row[0]}" for f, (rows, _) in BAD.items() for row in rows for _ in row[2:]],
)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(
    function: Any, message: str, error: type[Exception], options: dict[str, Any]
) -> None:
    if function is fused_ar_tar:
        options = {"dropped": options["raw"]} | options
    with pytest.raises(error, match=f"^{message}") as raised:
        function(**options)
    assert raised.type is error


@pytest.mark.parametrize("add", [lambda x, terms: x + terms, lambda x, terms: sum([terms, terms]), with_penalty])
def test_terms_in_the_place_of_their_penalty_are_an_error_that_names_it(add: Any) -> None:
    terms = fused_ar_tar(X, X, 2.0, 1.0, return_terms=True)
    with pytest.raises(TypeError, match=r"\.penalty"):
        add(X.sum(), terms)


WITHOUT_KERNELS = [("mps", r"mps: there are no kernels for mps$"), ("xpu", "GPUs: the kernels need float64")]


@pytest.mark.parametrize(("kind", "message"), WITHOUT_KERNELS)
def test_a_device_without_kernels_warns_once(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's Arc has no float64; no other test asks for the properties of these devices."""
    if kind == "xpu" and backends.TRITON is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=device.index == 9))
    backends.warn_of_the_formula.cache_clear()
    with pytest.warns(UserWarning, match=f"^fastreg runs the plain formula on {message}") as got:
        assert [backends.backend_for(torch.device(kind, i)) for i in (7, 8)] == [None, None]
    assert [warning.filename for warning in got] == [__file__]
    assert (backends.backend_for(torch.device(kind, 9)) is None) == (kind == "mps")


def test_numbers_of_numpy_are_coefficients_and_axes() -> None:
    skip_without("numpy")
    import numpy

    assert torch.equal(fused_ar_tar(X, X, numpy.float32(2), 1), fused_ar_tar(X, X, 2.0, 1.0))
    assert torch.equal(fused_ar_tar(X, X, 2, 1, time_dim=numpy.int64(-1)), fused_ar_tar(X, X, 2, 1, time_dim=-1))
    with pytest.raises(TypeError, match=r"^alpha: "):  # before a list asks whether its term is on
        fused_ar_tar([X], [X], numpy.ones(2), 1.0)  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.slow
def test_a_broken_triton_is_named_where_a_gpu_is_used(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so: undefined symbol')\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    ask = "from fastreg import __main__\nimport torch\nfrom fastreg.call.backends import backend_for\n"
    ask += "backend_for(torch.device('cuda'))\n" * 2 + "__main__.main()"
    done = python("-c", ask, folder=tmp_path, PYTHONPATH=path, TRITON_INTERPRET="0")
    why = "Triton cannot be used (OSError: libtriton.so: undefined symbol); in a clone: pip install '.[gpu]'"
    assert "self-test passed" in done.stdout
    assert "Triton cannot be used" not in done.stdout, "which has nothing to say about a machine without a GPU"
    assert done.stderr.count(f"UserWarning: fastreg runs the plain formula on GPUs: {why}") == 1


def test_a_triton_that_is_installed_is_used() -> None:
    """Otherwise an error in the kernels would leave their tests out."""
    assert backends.TRITON is not None or find_spec("triton") is None


# Mistakes of newcomers: a penalty that nobody takes

UNTAKEN = r"^FusedRNNDropout: the penalty of the last forward in training is discarded, .* add the penalty of take\(\)"
ONES_AND_ZEROS = [(1.0, 0.0), (0.0, 1.0), (tensor(1.0), 0.0)]


def own() -> Tensor:
    """Return raw as the output of a layer that is trained."""
    return nn.Linear(HIDDEN, HIDDEN)(lm.inputs())


@pytest.mark.parametrize("by", ["the module", "the forward"])
@pytest.mark.parametrize("coefficients", ONES_AND_ZEROS, ids=str)
def test_a_step_after_a_penalty_that_was_not_taken_warns_once_and_so_does_a_copy(coefficients: Any, by: str) -> None:
    dropout = FusedRNNDropout(0.3, *(coefficients if by == "the module" else (0, 0)))
    options = {"request": Request(coefficients, TimeAxis())} if by == "the forward" else {}
    for duplicate, trains in ((copy.copy, True), (copy.deepcopy, False), (lm.pickled, True)):
        dropout(own(), **options)  # before the module is attached, maybe
        with pytest.warns(UserWarning, match=UNTAKEN) as caught:
            dropout.train(trains)(own())
        assert [warning.filename for warning in caught] == [__file__]
        for _ in range(2):
            dropout.train()(own(), **options)
        dropout = duplicate(dropout)  # without the penalty of the last forward


def test_a_dropout_whose_coefficients_are_0_or_that_samples_or_is_evaluated_or_attached_is_no_mistake() -> None:
    rnn = lm.gru()
    for dropout in (FusedRNNDropout(0.3, 0, 0), FusedRNNDropout(0.3, ALPHA, BETA)):
        for _ in range(3 if dropout.alpha == 0 else 1):
            dropout(own())
        dropout.take()
        for _ in range(2):
            with torch.no_grad():
                lm.run(rnn, dropout)
            lm.run(rnn, dropout.eval())
            assert dropout.take() is None
            dropout.train()
        with lm.regularizer().attach(rnn, dropout):
            for _ in range(2):
                if dropout.alpha == 0:
                    dropout(own())  # of the embeddings
                lm.run(rnn, dropout)


def test_an_own_penalty_that_nobody_takes_before_an_attached_forward_warns_once() -> None:
    rnn, dropout, reg = lm.gru(), FusedRNNDropout(0.3, ALPHA, BETA), lm.regularizer()
    reg.attach(rnn, dropout)
    lm.run(rnn, dropout)
    dropout(own())
    with pytest.warns(UserWarning, match=UNTAKEN) as caught:
        lm.run(rnn, dropout)
    assert [warning.filename for warning in caught] == [lm.__file__]
    dropout(own())
    lm.run(rnn, dropout)


# Mistakes of newcomers: activations that are given to a regularizer


def capture(reg: RNNRegularizer, x: Tensor, **layout: Any) -> None:
    reg.on_loss_begin((x, x, x), **layout)


def test_a_capture_that_the_next_one_discards_warns_once_and_so_does_a_copy() -> None:
    reg, raw = lm.regularizer(), lm.inputs()
    for x in (raw, raw, own()):  # where nothing needs a gradient, nothing is lost
        capture(reg, x)
    for duplicate in (copy.copy, copy.deepcopy, lm.pickled):
        message = r"^on_loss_begin: the last capture is discarded, .* on_backward_begin\(loss\) .* clear\(\)"
        with pytest.warns(UserWarning, match=message) as caught:
            capture(reg, raw)
        assert [warning.filename for warning in caught] == [__file__]
        for _ in range(2):
            capture(reg, own())
        reg = duplicate(reg)
        capture(reg, own())
    reg = RNNRegularizer(0, 0)
    for end in (reg.clear, lambda: reg.on_epoch_begin(lm.Triple()), lambda: lm.penalty_of(reg)) * 2:
        capture(reg, own())
        end()  # which takes or drops it, and so is no mistake


def test_states_for_activations_are_told_once() -> None:
    """A layer returns `(raw, (h, c))`."""
    reg, (raw, (h, c)) = lm.regularizer(), nn.LSTM(HIDDEN, HIDDEN, num_layers=2, batch_first=True)(lm.inputs())
    with pytest.raises(ValueError, match=r"^batch_first: .* not its states h and c"):
        reg.on_loss_begin((raw, h, c))
    reg.on_loss_begin((raw, h, c), batch_first=False)
    lm.penalty_of(reg)
    for layout in ({"batch_first": True}, {"time_dim": 1}):
        for one in (lm.regularizer(), lm.pickled(reg)):
            with pytest.warns(UserWarning, match=r"^on_loss_begin: raw is .* not its states h and c"):
                one.on_loss_begin((raw, h, c), **layout)
            one.clear()
            one.on_loss_begin((raw, h, c), **layout)
