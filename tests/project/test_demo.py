"""The demo, end to end on a small text, and the parts of its AWD-LSTM."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.measure import timing
from bench.study import demo, training
from bench.study.awd_lstm import AWDLSTM, Dropouts
from bench.study.corpus import batches
from bench.study.report import Run, Study

pytestmark = pytest.mark.main


def test_trains_end_to_end(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(training, "LEARNING_RATE", 0.01)  # there are few steps to learn in
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # where the demo has processes
    files = ["--text", str(text), "--plot", str(tmp_path / "plot.png")]
    with timing.threads(1):
        demo.main([*files, "--device", "cpu", "--epochs", "3", "--alpha", "2", "--beta", "1"])
    output = capsys.readouterr().out
    lines = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ .*$", output.split(demo.HEADER)[1], re.MULTILINE)
    rows = [[float(x) for x in line.split()] for line in lines]
    regularized, plain = ([row[2:] for row in rows if row[:2] == pair] for pair in ([2, 1], [0, 0]))
    for table in regularized, plain:
        epochs, losses, perplexities, *_ = zip(*table, strict=True)
        assert epochs == (1, 2, 3)
        assert all([*x] == sorted({*x}, reverse=True) for x in (losses, perplexities))
    unigram = re.search(r"word frequencies alone: ([\d.]+)", output)
    assert unigram is not None
    assert plain[-1][2] < float(unigram[1])
    assert 0 < regularized[-1][3] < plain[-1][3]
    assert 0 < regularized[-1][4] < plain[-1][4]
    ends = f"validation perplexity after epoch 3: {regularized[-1][2]:.2f} regularized, {plain[-1][2]:.2f} not"
    assert ends in output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_the_unit_whose_changes_are_the_median_without_regularization():
    lists = {"train_loss": [3.0], "valid_loss": [3.0], "ar": [0.1], "tar": [0.2]}
    rest = {"final_train_loss": 3.0, "seconds": 1.0, "settings": {}, "machine": {}}
    runs = [Run(0.0, beta, 1, **lists, **rest) for beta in (1.0, 0.0)]
    jumps = torch.tensor([4.0, 0.5, 1.0, 3.0, -2.0])  # of the five units, in each second step
    plain = torch.arange(6).remainder(2)[:, None] * jumps * torch.ones(2, 1, 1)
    regularized = torch.rand(2, 6, 5)  # other changes, which do not count
    panel = demo.plot(runs, [regularized, plain], Study([])).axes[-1]
    assert "unit 4 " in panel.get_title()
    shown = [torch.tensor(line.get_ydata()) for line in panel.get_lines()]
    torch.testing.assert_close(shown, [regularized[0, :, 4], plain[0, :, 4]])


def test_batches_cover_the_text_in_order():
    rows, lengths = torch.arange(2 * 30).view(2, 30), iter([7, 5, 9, 20])
    pairs = list(batches(rows, lambda: next(lengths)))
    assert torch.equal(torch.cat([ids for ids, _ in pairs], 1), rows[:, :-1])
    assert torch.equal(torch.cat([following for _, following in pairs], 1), rows[:, 1:])


def test_the_hidden_state_is_carried_and_reset():
    ids, model = torch.randint(11, (3, 8)), AWDLSTM(11, 4, 6, 2, Dropouts(0.0, 0.0, 0.0, 0.0, 0.0))
    whole, _, _ = model(ids)
    model.reset()
    first, _, _ = model(ids[:, :5])
    second, _, _ = model(ids[:, 5:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    second.sum().backward()  # by itself: the first part's graph is not reached
