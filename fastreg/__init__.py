"""Fused activation regularization (AR) and temporal activation regularization (TAR) for RNNs."""

__version__ = "0.7.0"
__distribution__ = "fastreg-rnn"  # see fastreg/call/__init__.py

import sys
import warnings

if sys.argv[:1] == ["-m"]:  # in `python -m fastreg` a warning of PyTorch would come before the report
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

from fastreg.attach import attachment, regularizer
from fastreg.attach.mark import with_penalty
from fastreg.attach.regularizer import RNNRegularizer
from fastreg.call import problem, rnn_dropout
from fastreg.call.dropout import fused_dropout_ar_tar
from fastreg.call.penalty import fused_ar_tar
from fastreg.call.problem import ARTAR
from fastreg.call.rnn_dropout import FusedRNNDropout

__all__ = ["ARTAR", "FusedRNNDropout", "RNNRegularizer", "fused_ar_tar", "fused_dropout_ar_tar", "with_penalty"]

# Pickles of releases up to 0.4.0 name these modules, when all were in this folder.
OLD_NAMES = {"attachment": attachment, "problem": problem, "regularizer": regularizer, "rnn_dropout": rnn_dropout}
sys.modules |= {f"fastreg.{name}": module for name, module in OLD_NAMES.items()}
