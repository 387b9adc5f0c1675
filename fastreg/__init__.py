"""Fused activation regularization (AR) and temporal activation regularization (TAR) for RNNs."""

from fastreg.dropout import FusedRNNDropout, fused_dropout_ar_tar
from fastreg.penalty import fused_ar_tar
from fastreg.reference import ARTAR
from fastreg.regularizer import RNNRegularizer

__version__ = "0.1.0"
__all__ = ["ARTAR", "FusedRNNDropout", "RNNRegularizer", "fused_ar_tar", "fused_dropout_ar_tar"]
