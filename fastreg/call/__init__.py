"""The floor of one call: from its arguments to the penalty, and from the upstream gradient to the gradients."""

import sys
from pathlib import Path

# Adapters and attach import this floor first, also where the unrelated distribution has replaced fastreg/__init__.py.
if getattr(sys.modules["fastreg"], "__distribution__", None) != "fastreg-rnn":
    raise ImportError(
        f"{Path(__file__).resolve().parents[1] / '__init__.py'} is not the file of fastreg-rnn: the unrelated "
        "distribution 'fastreg' has replaced it. Run `pip uninstall fastreg fastreg-rnn`, and install fastreg-rnn again"
    )
