"""Train fastai's AWD-LSTM with AR and TAR fused: `python examples/fastai_lm.py`, a few seconds on a CPU.

The model learns to predict the characters of this file.
"""

import argparse
from pathlib import Path

import torch
from fastai.text.all import AWD_LSTM, DataLoaders, LMDataLoader, awd_lstm_lm_config, language_model_learner, set_seed

from fastreg.fastai import fuse


def main(epochs: int) -> None:
    set_seed(0)
    text = Path(__file__).read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text])
    split = len(ids) * 9 // 10
    dls = DataLoaders(LMDataLoader([ids[:split]], bs=4, seq_len=40), LMDataLoader([ids[split:]], bs=4, seq_len=40))
    dls.vocab = characters
    config = {**awd_lstm_lm_config, "emb_sz": 32, "n_hid": 64, "n_layers": 2}
    learn = language_model_learner(dls, AWD_LSTM, config=config, pretrained=False, alpha=2.0, beta=1.0)
    fuse(learn, dropout=True)  # swaps the callbacks and the last dropout; the table gets the columns ar and tar
    learn.fit(epochs, 1e-2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
