"""`ActivationRegularization`: AR and TAR for PyTorch Lightning, as a callback; the module stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial, update_wrapper
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fastreg.problem import Coefficient
from fastreg.regularizer import RNNRegularizer

if TYPE_CHECKING:
    Callback: Any = object  # Lightning is not needed to check types
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError:
            raise ImportError("fastreg.lightning: Lightning is not installed; pip install lightning") from None


class ActivationRegularization(Callback):
    """Add `alpha * AR + beta * TAR` of the named RNNs to the loss that `training_step` returns.

    Lightning scales, accumulates and clips the sum as it would the loss. What the module itself logs stays free of
    the penalties; `ar` and `tar` are logged beside it, as means over the steps of an epoch, and over the callbacks
    where there are several. If the module has a `reset()`, it is called when an epoch of training or validation starts.

        Trainer(callbacks=[ActivationRegularization(2.0, 1.0, rnn="encoder.lstm", dropout="drop")])

    Args:
        alpha, beta: the coefficients; a schedule may change `callback.regularizer.alpha` and `.beta`.
        rnn: the attribute path of an `nn.LSTM`, `nn.GRU` or `nn.RNN`, or of several, from the first layer to the last.
        dropout: the path of the dropout that takes the RNN's output: one for every RNN, or a list with one, or
            `None`, an RNN.
        layers: `"last"` or `"all"` of the RNNs, as for `RNNRegularizer`.

    Raises:
        TypeError, ValueError: an argument is not as described; when a fit starts, a path that names no such module.
        RuntimeError: the module optimizes by hand; in a step, as `RNNRegularizer.on_backward_begin`.
    """

    def __init__(
        self,
        alpha: Coefficient = 0.0,
        beta: Coefficient = 0.0,
        *,
        rnn: str | Sequence[str],
        dropout: str | Sequence[str | None] | None = None,
        layers: Literal["last", "all"] = "last",
    ) -> None:
        self.regularizer = RNNRegularizer(alpha, beta, layers=layers)
        for name, paths in (("rnn", rnn), ("dropout", dropout)):
            if not (isinstance(paths, (str, list, tuple)) or (paths is None and name == "dropout")):
                raise TypeError(f"{name}: expected an attribute path, or a list of them, got {type(paths).__name__}")
        self.rnns = [rnn] if isinstance(rnn, str) else list(rnn)
        one_for_all = dropout is None or isinstance(dropout, str)
        self.dropouts: list[Any] = [dropout] * len(self.rnns) if one_for_all else list(dropout or ())
        if not self.rnns or len(self.dropouts) != len(self.rnns):
            raise ValueError(
                "rnn and dropout: expected a dropout, or None, for each RNN, "
                f"got {len(self.rnns)} RNNs and {len(self.dropouts)} dropouts"
            )
        self._undo = ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the modules and wrap `training_step`; by now `configure_model` has made the modules."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "ActivationRegularization: the module has automatic_optimization=False, where the loss never passes "
                "a callback; use fastreg.RNNRegularizer in its training_step"
            )
        for rnn, dropout in zip(self.rnns, self.dropouts, strict=True):
            after = None if dropout is None else _find(pl_module, "dropout", dropout)
            self._undo.enter_context(self.regularizer.attach(_find(pl_module, "rnn", rnn), after))
        # All callbacks share one wrapper: they may end in any order, and only the last puts the step back.
        if not isinstance(pl_module.training_step, _RegularizedStep):
            pl_module.training_step = _RegularizedStep(pl_module)
        regularize = partial(self._regularize, pl_module)
        pl_module.training_step.regularize.append(regularize)
        self._undo.callback(pl_module.training_step.remove, regularize)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take off the hooks and the wrapper of `training_step`."""
        self._undo.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take off the hooks and the wrapper of `training_step`: Lightning tears nothing down after an error."""
        self._undo.close()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the hidden state."""
        self.regularizer.on_epoch_begin(pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the hidden state."""
        self.regularizer.on_epoch_begin(pl_module)

    def _regularize(self, pl_module: Any, output: Any) -> Any:
        """Add the penalty to the loss that `training_step` returned, and log the terms."""
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):  # None skips the step; Lightning refuses anything else
            self.regularizer.clear()
            return output
        total = self.regularizer.on_backward_begin(loss)
        if total is not loss:  # it is, where the RNNs are in evaluation
            terms = {"ar": self.regularizer.ar, "tar": self.regularizer.tar}
            pl_module.log_dict(terms, on_step=False, on_epoch=True, batch_size=1)
        return output | {"loss": total} if isinstance(output, dict) else total


class _RegularizedStep:
    """Wrap `training_step` to add penalties to its loss; a copy or a pickle of the module has its own plain step."""

    def __init__(self, pl_module: Any) -> None:
        self.own = "training_step" in vars(pl_module)  # it is where Lightning has compiled the module
        self.step = pl_module.training_step
        update_wrapper(self, self.step)  # Lightning reads its signature
        self.pl_module = pl_module
        self.regularize: list[Callable[[Any], Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.step(*args, **kwargs)
        for regularize in self.regularize:
            output = regularize(output)
        return output

    def remove(self, regularize: Callable[[Any], Any]) -> None:
        """Leave out a callback's penalty; after the last one, give the module its own step back."""
        self.regularize.remove(regularize)
        if not self.regularize:
            del self.pl_module.training_step
            if self.own:
                self.pl_module.training_step = self.step

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not isinstance(self.step, MethodType):
            return deepcopy(self.step, memo)
        return MethodType(self.step.__func__, deepcopy(self.step.__self__, memo))

    def __reduce__(self) -> Any:
        return self.step.__reduce__() if isinstance(self.step, MethodType) else (partial, (self.step,))


def _find(pl_module: nn.Module, kind: Literal["rnn", "dropout"], path: str) -> nn.Module:
    """Return the module at an attribute path.

    Raises:
        ValueError: there is none, or for `"rnn"` no RNN; the message lists the paths that would do.
    """
    modules = dict(pl_module.named_modules(remove_duplicate=False))
    fits = {
        "rnn": lambda module: isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)),
        "dropout": lambda module: "drop" in type(module).__name__.lower(),
    }[kind]
    if path not in modules or (kind == "rnn" and not fits(modules[path])):
        candidates = ", ".join(repr(name) for name, module in modules.items() if fits(module)) or "none"
        raise ValueError(f"{kind}: {type(pl_module).__name__} has no such module at {path!r}; candidates: {candidates}")
    return modules[path]
