"""Fused activation regularization (AR) and temporal activation regularization (TAR) for RNNs."""

__version__ = "0.10.0"

import sys
import warnings

with warnings.catch_warnings():
    if sys.argv[:1] == ["-m"] and "fastreg" in sys.orig_argv:  # `python -m fastreg`, whose report comes first
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from fastreg.attach.regularizer import RNNRegularizer
from fastreg.call.dropout import fused_dropout_ar_tar
from fastreg.call.penalty import fused_ar_tar
from fastreg.call.problem import ARTAR
from fastreg.call.rnn_dropout import FusedDropout, FusedRNNDropout
from fastreg.call.with_penalty import with_penalty

__all__ = [
    "ARTAR",
    "FusedDropout",
    "FusedRNNDropout",
    "RNNRegularizer",
    "fused_ar_tar",
    "fused_dropout_ar_tar",
    "with_penalty",
]

_ADAPTERS = {
    **dict.fromkeys(["fuse", "rnn_cbs"], "fastreg.fastai, or fastreg.fastai1 for fastai 1"),
    "ActivationRegularization": "fastreg.lightning",
    "RegularizedTrainer": "fastreg.transformers",
}


def __getattr__(name: str) -> object:
    """Raise an error, which names the module of an adapter; Python would replace an `AttributeError` in an import."""
    if name in _ADAPTERS:
        raise ImportError(f"fastreg: {name} is in a module of its own; import it from {_ADAPTERS[name]}")
    raise AttributeError(f"module 'fastreg' has no attribute {name!r}")
