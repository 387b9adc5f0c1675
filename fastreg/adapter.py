"""Parts that adapters share: the coefficients that a user may set, and the sums of the terms that a trainer logs.

An adapter turns the events of a framework into three. When an epoch begins, the state of the model is reset, and
captures are dropped. When a loss begins, the activations have been captured, by hooks or from the output of the model.
When a backward begins, their penalty is added to the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastreg.attach.paths import Paths
from fastreg.attach.regularizer import RNNRegularizer


def of_regularizer(name: str) -> property:
    """Return a property of an adapter that is an attribute of its regularizer."""
    return property(lambda self: getattr(self.regularizer, name), lambda self, x: setattr(self.regularizer, name, x))


class Adapter:
    """Hold a regularizer and the paths of its modules, and sum up the terms of the steps for the log of a trainer.

    Attributes:
        alpha: coefficient of AR, which a schedule may change between steps.
        beta: coefficient of TAR, as for alpha.
        regularizer: the regularizer.
        paths: the paths.
        sums: the sums of AR and of TAR over the steps since the last log, and the number of steps.
    """

    alpha, beta = of_regularizer("alpha"), of_regularizer("beta")

    def begin(self, regularizer: RNNRegularizer, paths: Paths) -> None:
        """Begin a fit with a regularizer and paths: without sums, and without the warning of the last fit."""
        self.regularizer, self.paths, self.sums = regularizer, paths, torch.zeros(3)
        paths.is_warned = False

    def penalty_of(self, loss: Tensor, adapter: str) -> Tensor | None:
        """Return the penalty of a training step, and add up its terms; without a penalty warn, once in a fit.

        Args:
            loss: the loss of the step.
            adapter: the name of the adapter, for the warning.
        """
        terms = self.regularizer.take(loss)
        if terms is None:
            self.paths.warn_of_evaluation(adapter)
            return None
        summed = torch.stack([terms.ar, terms.tar, torch.ones_like(terms.ar)])
        self.sums = self.sums.to(summed.device) + summed.float()  # of one dtype in all processes
        return terms.penalty

    def means(self, reduce: Callable[[Tensor], Any]) -> dict[str, Any]:
        """Return the means of the terms since the last log, over all processes; there are none without a penalty.

        Args:
            reduce: a function that adds up the sums of all processes. Each process has to call it, even if it has added
                no penalty, because the others wait for it.
        """
        ar, tar, steps = reduce(self.sums)
        self.sums = torch.zeros(3)
        return {"ar": ar / steps, "tar": tar / steps} if steps else {}
