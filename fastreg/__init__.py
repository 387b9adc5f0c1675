"""Fused activation regularization (AR) and temporal activation regularization (TAR) for RNNs."""

__version__ = "0.4.0"
__distribution__ = "fastreg-rnn"  # see fastreg/installation.py

import sys
import warnings

if sys.argv[:1] == ["-m"]:  # in `python -m fastreg` a warning of PyTorch would come before the report
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

from fastreg.carrier import with_penalty
from fastreg.dropout import fused_dropout_ar_tar
from fastreg.penalty import fused_ar_tar
from fastreg.problem import ARTAR
from fastreg.regularizer import RNNRegularizer
from fastreg.rnn_dropout import FusedRNNDropout

__all__ = ["ARTAR", "FusedRNNDropout", "RNNRegularizer", "fused_ar_tar", "fused_dropout_ar_tar", "with_penalty"]
