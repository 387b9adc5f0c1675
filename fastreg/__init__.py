"""Fused activation regularization (AR) and temporal activation regularization (TAR) for RNNs."""

from fastreg.dropout import fused_dropout_ar_tar
from fastreg.penalty import fused_ar_tar
from fastreg.problem import ARTAR
from fastreg.regularizer import RNNRegularizer
from fastreg.rnn_dropout import FusedRNNDropout

__version__ = "0.2.0"
__all__ = ["ARTAR", "FusedRNNDropout", "RNNRegularizer", "fused_ar_tar", "fused_dropout_ar_tar"]
