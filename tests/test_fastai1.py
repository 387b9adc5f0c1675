"""`fastreg.fastai1` in real fastai v1 learners, each release in a process of its own (`fastai1_train.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

RELEASES = ("1.0.36", "1.0.42", "1.0.61")
HERE = Path(__file__).parent
INSTALLED = Path(sys.prefix, "fastai1")


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.Popen[str], Path]]:
    """All releases at work at the same time."""
    folder = tmp_path_factory.mktemp("fastai1")
    started = {}
    for release in RELEASES:
        if (INSTALLED / release).is_dir():
            path = os.pathsep.join([str(INSTALLED / release), str(HERE.parent)])
            environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(folder)}
            command = [sys.executable, str(HERE / "fastai1_train.py"), str(folder / release)]
            with (folder / f"{release}.log").open("w") as log:
                process = subprocess.Popen(
                    command, env=environment, cwd=folder, text=True, stdout=log, stderr=subprocess.STDOUT
                )
            started[release] = process, folder / release
    return started


@pytest.fixture(scope="module", params=RELEASES)
def found(request: pytest.FixtureRequest, trainings: dict[str, tuple[subprocess.Popen[str], Path]]) -> dict[str, Any]:
    """The results of the process of one release."""
    release = request.param
    if release not in trainings:
        pytest.skip(f"fastai {release} is not installed in {INSTALLED}: run tests/frameworks.sh")
    process, path = trainings[release]
    assert process.wait(300) == 0, path.with_suffix(path.suffix + ".log").read_text()[-3000:]
    results = torch.load(path, weights_only=False)
    assert results["release"] == release
    return results


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def test_the_weights_are_the_stock_ones(found: dict[str, Any]) -> None:
    assert gap(found["stock"], found["stock fused"]) < 1e-5


def test_the_weights_are_those_of_the_formula(found: dict[str, Any]) -> None:
    assert gap(found["written"], found["fused"]) < 1e-5


@pytest.mark.parametrize("less", ["off", "alpha only", "beta only"])
def test_both_terms_show_in_the_weights(found: dict[str, Any], less: str) -> None:
    assert gap(found[less], found["fused"]) > 1e-3
    assert all(term > 0 for term in found["terms"])


def test_the_loss_scale_scales_the_penalty_too(found: dict[str, Any]) -> None:
    if found["release"] == "1.0.36":
        pytest.skip("mixed precision of fastai 1.0.36 cannot train language models: it halves the token ids")
    assert gap(found["written, scaled"], found["fused, scaled"]) < 1e-5


def test_fuse_keeps_place_and_coefficients(found: dict[str, Any]) -> None:
    bptt = None if found["release"] == "1.0.61" else 16
    assert found["given"] == {"bptt": bptt, "alpha": 40.0, "beta": 30.0, "adjust": False}
    assert found["place"][0] == found["place"][1] == ["RNNTrainer"]
    assert found["attribute"]
    assert found["idempotent"]
    assert found["not adjusted"]


def test_hooks_return_what_the_release_expects(found: dict[str, Any]) -> None:
    assert found["dicts"] == (found["release"] == "1.0.61")
    assert found["outputs"]
    assert all(found["outputs"])  # the callbacks after it see the true output alone, in validation, too


@pytest.mark.parametrize("which", ["adjusted", "adjusted, failed"])
def test_adjust_scales_the_lr_for_the_step_alone(found: dict[str, Any], which: str) -> None:
    fit = found[which]
    base = [lr for lr in (1e-4, 1e-3, 1e-2) for _ in range(2)]  # two groups a layer group, with decay and without
    assert all(lrs == pytest.approx(base) for lrs in [*fit["between"], fit["after"]])
    assert len(fit["lengths"]) == len(fit["stepped"]) > 0
    for length, lrs, decay in zip(fit["lengths"], fit["stepped"], fit["decays"], strict=True):
        assert lrs == pytest.approx([lr * length / 20 for lr in base])
        assert decay == pytest.approx(lrs[::2])
    assert any(length != 20 for length in fit["lengths"])
    assert fit["error"] == ("no error" if which == "adjusted" else "ArithmeticError: the step failed")


def test_nothing_is_held(found: dict[str, Any]) -> None:
    assert found["held"] == [{"fit": 0, "loss": 0, "step": 0, "validate": 0}] * 2


def test_exports_load_without_fastreg(found: dict[str, Any]) -> None:
    exported = found["exported"]
    if found["release"] == "1.0.36":  # has no exports yet
        assert exported == {}
        return
    by_path = dict.fromkeys(("rnn", "dropout", "output", "batch_first", "valid", "starts"))
    assert exported["state"] == found["given"] | by_path
    names = ["learner"] if found["release"] == "1.0.42" else ["learner", "purged"]
    for name in names:
        trainer, dropout, *coefficients = exported[name]
        assert trainer == "fastai.callbacks.rnn.RNNTrainer"
        assert dropout == "fastai.text.models.awd_lstm.RNNDropout"
        assert coefficients == [40.0, 30.0]
        assert exported[name, "same"]
        assert exported[name, "kept"]  # the learner is as fused as it was
        assert exported[name, "fused"] == ["fastreg.fastai1.RNNTrainer", "fastreg.rnn_dropout.FusedRNNDropout"]
    assert exported.get("destroyed") == ("ZombieLearner" if len(names) == 2 else None)


def test_the_fused_dropout_trains_the_stock_weights(found: dict[str, Any]) -> None:
    fused = found["fused dropout"]
    assert gap(fused["weights"], found["stock"]) < 1e-5
    assert fused["formed"] == 0  # the dropout's own penalties were taken
    assert fused["kind"] == (True, "raw", found["release"] != "1.0.36")
    assert all(term > 0 for term in fused["terms"])
    assert fused["idempotent"]
    assert fused["evaluation"]


def test_a_schedule_reaches_the_fused_dropout(found: dict[str, Any]) -> None:
    assert gap(found["fused dropout"]["off"], found["off"]) < 1e-5


def test_a_run_before_the_loss_does_not_pass_for_the_step(found: dict[str, Any]) -> None:
    assert gap(found["fused dropout"]["twice"], found["stock"]) < 1e-5
    assert found["fused dropout"]["twice formed"] > 0


def test_unfuse_puts_back_what_was(found: dict[str, Any]) -> None:
    fused = found["fused dropout"]
    assert fused["unfused"]
    assert fused["back"]
    assert fused["coefficients"]
    assert fused["attributes"] == (False, True)
    assert gap(fused["trained again"], fused["expected again"]) == 0


def test_modules_by_their_paths_train_the_weights_of_the_formula(found: dict[str, Any]) -> None:
    paths = found["paths"]
    assert gap(paths["written"], paths["by path"]) < 1e-5
    assert gap(paths["written"], paths["fused"]) < 1e-5
    assert gap(paths["written"], paths["off"]) > 1e-3
    assert gap(paths["valid"], paths["valid by path"]) < 1e-5
    assert gap(paths["valid"], paths["written"]) > 1e-3
    assert gap(paths["starts"], paths["starts by path"]) < 1e-5
    assert gap(paths["starts"], paths["written"]) > 1e-4
    assert paths["hooks"] == 0
    assert paths["kept"] is None
    assert paths.get("purged", (True, ("rnn",))) == (True, ("rnn",))
    assert paths["no module"].startswith("ValueError: rnn: Alone has no such module at 'lstm'; candidates: 'rnn'")
    assert paths["no rnn"] == "TypeError: dropout: expected True or False, got 'dropout'"


def test_errors_say_what_to_do(found: dict[str, Any]) -> None:
    assert found["no reset"].startswith("TypeError: Sequential has no reset(), which RNNTrainer calls")
    assert found["plain output"].startswith("TypeError: on_loss_begin: expected (decoded, raw, dropped)")
    assert "got Tensor" in found["plain output"] or "got a Tensor" in found["plain output"]
    assert found["no bptt"].startswith("ValueError: bptt: expected the usual number of time steps")
    error, untouched = found["no dropout"]
    assert error.startswith("ValueError: fuse: dropout=True takes the place of the RNNDropout of a LinearDecoder")
    assert "Sequential has none" in error
    assert untouched
    assert found["no trainer"].startswith("ValueError: fuse: the learner has no RNNTrainer; learn.callbacks.append")
    assert found["subclass"] == "ValueError: fuse: the learner's Mine is a subclass of RNNTrainer, and left alone"
    assert "Dropped is a subclass, left alone" in found["subclass of the dropout"]
    assert found["two trainers"].startswith("ValueError: RNNTrainer: the learner has two of them")
    learner = ["learn: expected a Learner, got NoneType"] * 3
    assert found["types"] == [f"TypeError: {x}" for x in (*learner, "dropout: expected True or False, got 0.5")]
    error, untouched = found["nothing swapped"]
    assert error.startswith("ValueError: p: expected a probability")
    assert untouched
