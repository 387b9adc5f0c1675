"""Write the files of this folder: `PYTHONPATH=CHECKOUT python tests/data/write.py FOLDER`.

CHECKOUT is one of release 0.2.0, the commit "Version 0.2.0: contributing, changelog, pre-commit, a workflow".
tests/test_saved.py loads the files.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path

import torch
from fastai.callback.rnn import RNNCallback  # noqa: F401  # before fastai.text, which needs it
from fastai.data.core import DataLoaders
from fastai.text.data import LMDataLoader
from fastai.text.learner import language_model_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from torch import nn
from torch.nn import functional as F

import fastreg
from fastreg.fastai import fuse

warnings.simplefilter("ignore")


class Texts(list):
    """A dataset that learners can be exported with; the export holds a list."""

    def new_empty(self) -> list:
        return list(self[:1])


def model(**options) -> nn.ModuleDict:
    """Return a model that has warned of a penalty that was not taken, and holds another."""
    torch.manual_seed(0)
    rnn = nn.GRU(4, 4, batch_first=options.get("batch_first", True))
    made = nn.ModuleDict({"rnn": rnn, "dropout": fastreg.FusedRNNDropout(0.5, **options)})
    for _ in range(2):
        made["dropout"](made["rnn"](torch.randn(2, 5, 4))[0])
    return made


def main(folder: Path) -> None:
    """Write the files."""
    assert fastreg.__version__ == "0.2.0", fastreg.__file__
    torch.save(model(alpha=2.0, beta=1.0), folder / "model.pt")
    torch.save(model(alpha=torch.tensor(2.0), batch_first=False, ar_of="raw"), folder / "model_of_raw.pt")
    torch.save(model(alpha=2.0, beta=1.0).state_dict(), folder / "state.pt")

    attached, regularizer = model(), fastreg.RNNRegularizer(2.0, 1.0, layers="all", bptt=5)
    attached.regularizer = regularizer
    handle = regularizer.attach(attached["rnn"], attached["dropout"])  # noqa: F841  # keeps the hooks
    terms = regularizer.take(attached["dropout"](attached["rnn"](torch.randn(2, 5, 4))[0]).sum())
    torch.save(attached, folder / "attached.pt")
    (folder / "regularizer.pkl").write_bytes(
        pickle.dumps((regularizer, terms._replace(penalty=terms.penalty.detach())))
    )

    texts = Texts([torch.arange(60) % 7])
    dls = DataLoaders(LMDataLoader(texts, bs=2, seq_len=5), LMDataLoader(texts, bs=2, seq_len=5))
    dls.vocab = [str(i) for i in range(7)]
    config = {**awd_lstm_lm_config, "emb_sz": 4, "n_hid": 4, "n_layers": 1}
    learn = fuse(
        language_model_learner(dls, AWD_LSTM, config=config, pretrained=False, alpha=2.0, beta=1.0), dropout=True
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    learn.loss_func = F.cross_entropy  # instead of an object whose class the export would hold as code of this Python
    learn.export(folder.resolve() / "learner.pkl")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
