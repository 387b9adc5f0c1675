"""`Paths`: the modules of a model that an adapter attaches to, by their attribute paths."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from fastreg import FusedRNNDropout, fused_ar_tar
from fastreg.attach.paths import Paths, Swap, check_options_of_fuse, coefficients_of_learner, pairs_of, paths_of_learner
from fastreg.attach.source import Masks
from tests import language_model as lm
from tests.language_model import ALPHA, BATCH, BETA, HIDDEN, TIME

NO_MODULE, PATH = "ModuleDict has no such module at ", "expected the attribute path of a module, .* got"


@pytest.mark.parametrize(
    ("rnn", "dropout", "message"),
    [
        ("rnn", None, rf"rnn: {NO_MODULE}'rnn'; children of the ModuleDict: 'encoder', 'stack', 'scan'$"),
        ("encoder.rnn", "drop", rf"dropout: {NO_MODULE}'drop'; children of the ModuleDict: 'encoder'"),
        ("encoder.lstm", None, rf"rnn: {NO_MODULE}'encoder\.lstm'; children of the Model: 'embedding'"),
        ("scan.x", None, rf"rnn: {NO_MODULE}'scan\.x'; children of the Linear: none$"),
        (["encoder.rnn", "stack"], None, r"may return \(time, batch, hidden\) like the LSTM inside it"),
        ("encoder.rnn", ["a", "b"], "dropout: expected a path or None for each of 1 RNNs, got 2"),
        ([], None, r"rnn: expected at least one path, .* got \[\]"),
        (["encoder.rnn", "encoder.rnn"], None, "rnn: .* each path once, got "),
    ],
)
def test_attaches_to_all_modules_until_the_stack_is_closed_or_to_none(rnn: Any, dropout: Any, message: str) -> None:
    stack, scan = nn.Sequential(nn.LSTM(HIDDEN, HIDDEN)), nn.Linear(HIDDEN, HIDDEN)
    model: Any = nn.ModuleDict({"encoder": lm.Model(), "stack": stack, "scan": scan})
    reg = lm.regularizer()
    with pytest.raises(ValueError, match=message):
        Paths(pairs_of(rnn, dropout)).attach(reg, model, list, layout=True)
    assert not any(module._forward_hooks for module in model.modules())
    with Paths(pairs_of(["encoder.rnn", "scan"], ["encoder.dropout", None])).attach(reg, model, list, layout=True):
        raw, _ = model["encoder"].rnn(lm.inputs())
        last = model["scan"](dropped := model["encoder"].dropout(raw))
        torch.testing.assert_close(lm.penalty_of(reg, last), lm.formula(raw, dropped, 1) + lm.formula(last, last, 1))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pairs_of(None, None), f"rnn: {PATH} NoneType"),
        (lambda: pairs_of("", None), f"rnn: {PATH} an empty one"),
        (lambda: pairs_of(["rnn", nn.GRU(2, 2)], None), f"rnn: {PATH} GRU"),
        (lambda: pairs_of("rnn", True), f"dropout: {PATH} bool"),
        (lambda: pairs_of(["rnn"], [nn.Dropout()]), f"dropout: {PATH} Dropout"),
        (lambda: paths_of_learner("rnn", "", {}, Masks()), f"dropout: {PATH} an empty one"),
        (lambda: paths_of_learner(None, True, {}, Masks(), time_dim=1), "dropout: expected False beside batch_first"),
        (lambda: coefficients_of_learner("rnn", None, None), "alpha and beta: expected coefficients beside rnn"),
        (lambda: check_options_of_fuse(["lengths"]), "lengths: expected valid instead"),
        (lambda: Paths(output=len), "rnn: expected a path, as output picks raw from what its module returns, got None"),
        (lambda: Paths([("rnn", None)], time_dim=1.0), "time_dim: expected an int"),  # pyright: ignore
        (lambda: Paths([("rnn", None)], output=1), "output: expected a callable or None, got int"),  # pyright: ignore
        (lambda: Masks(starts=1), "starts: expected a callable or None, got int"),  # pyright: ignore
    ],
)
def test_what_is_no_path_and_no_function_is_an_error(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_a_layout_that_is_said_comes_before_that_of_the_adapter() -> None:
    model, reg = nn.ModuleDict({"scan": nn.Linear(HIDDEN, HIDDEN)}), lm.regularizer()
    for given in ({"batch_first": False}, {"time_dim": 0}):
        with Paths([("scan", None)], **given).attach(reg, model, list, layout=True):
            raw = model["scan"](lm.inputs())
            torch.testing.assert_close(lm.penalty_of(reg, raw), lm.formula(raw, raw, 0))


@pytest.mark.parametrize("layout", [{"batch_first": False}, {"time_dim": 0}])
def test_captures_have_the_layout_of_the_paths(layout: dict[str, Any]) -> None:
    reg, raw = lm.regularizer(), torch.randn(TIME, BATCH, HIDDEN)
    Paths((), **layout).capture(reg.on_loss_begin, (raw, [raw], [raw]), [], None)
    torch.testing.assert_close(lm.penalty_of(reg), fused_ar_tar(raw, raw, ALPHA, BETA, **layout))


def test_a_language_model_has_a_fused_dropout_while_attached() -> None:
    model = nn.Sequential(lm.gru(), nn.Module())
    model[1].output_dp = own = nn.Dropout(0.1).eval()
    fused = {"pairs": [("0", Swap("1.output_dp", nn.Dropout, FusedRNNDropout))]}
    paths = paths_of_learner(None, True, fused, Masks())
    with paths.attach(lm.regularizer(), model, list):
        fused_dropout = model[1].output_dp
        assert (type(fused_dropout), fused_dropout.training) == (FusedRNNDropout, False)
        model.train()
    assert model[1].output_dp is own
    assert own.training


@pytest.mark.parametrize(("name", "got"), [("valid", r"Tensor\[2, 5\], dict\['mask'\]"), ("output", "tuple")])
def test_a_note_on_an_error_in_a_function_names_it_and_its_arguments(name: str, got: str) -> None:
    """The function of masks gets the batch instead of the module's arguments."""

    def fail(*_: Any) -> Any:
        raise KeyError("mask")

    model, reg, batch = nn.ModuleDict({"rnn": lm.gru()}), lm.regularizer(), [torch.ones(2, 5), {"mask": 1}]
    paths = Paths([("rnn", None)], **({"output": fail} if name == "output" else {"masks": Masks(valid=fail)}))
    with pytest.raises(KeyError, match="mask") as raised, paths.attach(reg, model, lambda: batch):
        model["rnn"](lm.inputs())
    if hasattr(raised.value, "add_note"):  # from Python 3.11 on
        (note,) = raised.value.__notes__  # pyright: ignore[reportAttributeAccessIssue]
        assert re.fullmatch(rf"{name}: fastreg called this function with \({got}\)", note)


@pytest.mark.parametrize(("mask", "got"), [([1], "list"), (torch.tensor(True), "a tensor without axes")])
def test_a_function_of_masks_that_returns_no_mask_is_a_type_error(mask: Any, got: str) -> None:
    masks = Masks(starts=lambda *_: mask).of_batch(lambda: [torch.ones(2, 5)])
    with pytest.raises(TypeError, match=rf"^starts: expected the callable to return a mask, .* or None, got {got}$"):
        masks.of(lm.inputs())
