"""Train an AWD-LSTM in fastai v1 with AR and TAR: `python examples/fastai1.py`, a few seconds on a CPU.

fastai v1 dates from 2018 to 2020, and imports parts of other packages that newer versions lack. `stand_in()` replaces
them: copy it, and call it before you import fastai. So this runs beside fastai v2, in another process:

    pip install --no-deps --target fastai1 fastai==1.0.61
    PYTHONPATH=fastai1 python examples/fastai1.py

The model learns to predict the characters of this file.
"""

import argparse
import collections
import collections.abc
import sys
import types
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

BATCH, BPTT = 8, 40


def stand_in() -> None:
    """Replace packages that fastai v1 imports, but hardly uses, and names that NumPy and Python have dropped."""
    parts = {
        "pkg_resources": {"require": lambda *_: None},
        "pynvml": {},
        "spacy": {"load": None, "blank": None},
        "spacy.symbols": {"ORTH": 65},
    }
    for name, attributes in parts.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    vars(np).update(int=int, float=float, object=object)
    vars(collections).update({name: getattr(collections.abc, name) for name in collections.abc.__all__})


def main(epochs: int) -> None:
    warnings.simplefilter("ignore")  # of features that PyTorch has renamed since
    stand_in()
    from fastai.text import AWD_LSTM, TextLMDataBunch, Vocab, awd_lstm_lm_config, language_model_learner

    from fastreg import fastai1

    torch.manual_seed(0)
    np.random.seed(0)
    text = Path(__file__).read_text()
    characters = sorted(set(text))
    ids = np.array([characters.index(character) for character in text])
    documents = ids[: len(ids) // 4 * 4].reshape(4, -1)
    config = {**awd_lstm_lm_config, "emb_sz": 32, "n_hid": 64, "n_layers": 2}
    with TemporaryDirectory() as folder:  # where fastai writes
        sets = {"vocab": Vocab(characters), "train_ids": documents, "valid_ids": documents[:1]}
        data = TextLMDataBunch.from_ids(folder, **sets, bs=BATCH, bptt=BPTT)
        options = {"config": config, "drop_mult": 0.1, "pretrained": False, "alpha": 2.0, "beta": 1.0}
        learn = fastai1.fuse(language_model_learner(data, AWD_LSTM, **options))
        for epoch in range(epochs):
            learn.fit(1, 1e-2)
            loss, trainer = learn.recorder.losses[-1], learn.rnn_trainer
            print(f"epoch {epoch}  loss {loss:.3f}  ar {trainer.ar:.4f}  tar {trainer.tar:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    main(parser.parse_args().epochs)
