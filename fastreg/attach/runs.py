"""`Run`, a call whose penalty waits for a loss; `take`, by which a loss takes penalties; and `Alarm`, for lost ones.

A loss takes the penalty of each run on which it depends, once. If it depends on none, `take` tells an evaluation and
frozen modules, which have no penalty, from a mistake. Where a training loop makes a mistake that no loss shows, the
alarm counts how often a module was without effect.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from fastreg.attach.mark import runs_of
from fastreg.call.problem import Penalty, sum_of
from fastreg.call.torch_state import level_of_caller, untraced

TAKEN_OVER = (
    "on_backward_begin: another regularizer has attached the {module}; remove() the handle that attach() has returned "
    "here, or attach the module here again"
)
GAP = (
    "on_backward_begin: the attached {dropout} did not get the output of the {module}: something lies between them "
    "(packing, padding, a slice, a full backward hook, another module), or the dropout ran without gradients. Attach a "
    "dropout that gets this very tensor, or no dropout, or use on_loss_begin; pass use_reentrant=False to a "
    "checkpoint; call clear() after a step that ended before the dropout ran"
)
ONE_STEP = (
    "on_backward_begin: the {module} ran {count} times over one time step, where AR would add up and TAR has no "
    "changes; stack its outputs along time, and call fused_ar_tar"
)
IN_EVALUATION = (
    "on_backward_begin: the loss gets no penalty, because all attached modules, {modules}, are in evaluation mode. "
    "Call train() on them before a training step, and run a validation under torch.no_grad()"
)
NOTHING = (
    "on_backward_begin: nothing was captured: the loss depends on no run of the attached {modules} whose penalty is "
    "left. Since the last penalty there were {total} calls in training mode, {without_gradients} of them without "
    "gradients, and {taken} runs of this loss are taken or cleared already. Attach what the model calls, not a module "
    "inside a wrapper or a copy; leave no layer out at random (LayerDrop); add up all losses of a step; pass "
    "use_reentrant=False to a checkpoint; call torch.compiler.reset() if the model was compiled before. See "
    "docs/messages.md"
)
LOST = (
    "attach: no penalty got a gradient in {count} runs of the attached {name}, or losses without a call of it. Call "
    "loss = regularizer.on_backward_begin(loss), then loss.backward(), and let the loss depend on the output of the "
    "module and its dropout. Attach what the model calls; call train() on it, or remove() the handle; run what belongs "
    "to no training step under torch.no_grad(). See docs/messages.md"
)
LIMIT = 100  # how many runs and losses in a row may bring no gradient of a penalty
HOOKED = 10  # how many runs there are before a penalty has to show that it gets a gradient, by a hook


@dataclass(eq=False)
class Run:
    """Describe a call of an attached module in training with gradients. The autograd graph owns it, by its marks.

    Attributes:
        attachment: the attachment of the module.
        penalty: the penalty and its terms, from the dropout until a loss takes them.
        is_held: whether a loss may still take the penalty, now or after the dropout.
        is_one_step: whether raw is a single time step, and TAR is in the penalty.
        is_passed: whether a backward has passed a mark of the run.
    """

    attachment: Any
    penalty: Penalty | None = None
    is_held: bool = True
    is_one_step: bool = False
    is_passed: bool = False

    def end(self) -> Any:
        """Return the penalty and its terms, once."""
        penalty, self.penalty, self.is_held = self.penalty, None, False
        return penalty


@dataclass
class Calls:
    """Count the calls of an attached module since a loss last took one of its penalties.

    Attributes:
        total: the calls in training mode.
        without_gradients: the calls in training mode under `torch.no_grad()` or a transform of torch.func.
        constant: the calls with gradients, in either mode, whose output needed none.
        is_evaluated_in_training: whether the last output in evaluation mode with gradients enabled needed one.
    """

    total: int = 0
    without_gradients: int = 0
    constant: int = 0
    is_evaluated_in_training: bool = False


@dataclass(eq=False)
class Alarm:
    """Warn of a module whose penalties get no gradient, over all its attachments, one after the other.

    Attributes:
        name: the type of the module.
        runs: weak references to the runs since a penalty of the module last got a gradient, if their penalties need
            one. A run is lost once it is freed, or a backward has passed its mark.
        losses: how many losses that need a gradient came since the module was last called.
        next_look: how many runs and losses there have to be to look for lost runs again; infinite after the warning.
    """

    name: str
    runs: list[ReferenceType[Run]] = field(default_factory=list)
    losses: int = 0
    next_look: float = LIMIT

    def count(self, run: Run) -> None:
        """Count a run."""
        if self.next_look < math.inf:
            self.runs.append(ref(run))
            self.watch()

    def forget(self, run: Run) -> None:
        """Do not count a run, as its penalty needs no gradient after all."""
        self.runs = [x for x in self.runs if x() is not run]

    def watch(self) -> None:
        """Warn if lost runs and losses have reached the limit, once until a penalty gets a gradient."""
        count = len(self.runs) + self.losses
        if count < self.next_look:
            return
        lost = count - len([run for x in self.runs if (run := x()) is not None and not run.is_passed])
        self.next_look = count + LIMIT - lost if lost < LIMIT else math.inf
        if lost >= LIMIT:
            warnings.warn(LOST.format(name=self.name, count=lost), stacklevel=level_of_caller())

    def is_due(self) -> bool:
        """Return whether a penalty has to show by a hook that it gets a gradient."""
        return len(self.runs) >= HOOKED or self.next_look > LIMIT

    def settle(self) -> None:
        """Count anew, as a penalty has got a gradient."""
        self.runs, self.losses, self.next_look = [], 0, LIMIT


@untraced  # a compiler must not trace a search of the graph
def take(attachments: Sequence[Any], loss: Tensor, warn: Callable[[str], None]) -> Penalty | None:
    """Take the penalties of the runs on which a loss depends, and return their sum, or `None` if there are none.

    Args:
        attachments: the attachments of a regularizer.
        loss: the loss.
        warn: a function that gives a warning of the regularizer once.

    Raises:
        RuntimeError: another regularizer has attached a module, or a run waits for its dropout, or a module ran many
            times over a single time step, or the loss should depend on a run.

    Warns:
        UserWarning: all modules are in evaluation, in a training step; or the alarm of a module has come.
    """
    left, found = set[Run](), list[Run]()
    for x in attachments:
        if not x.is_attached():
            raise RuntimeError(TAKEN_OVER.format(**x.names))
        for run in x.held():
            if run.penalty is None:
                raise RuntimeError(GAP.format(**x.names))
            left.add(run)
        if loss.requires_grad:
            x.alarm.losses += 1
            x.alarm.watch()
    for run in runs_of(loss) if left else ():
        if run in left:
            left.remove(run)
            found.append(run)
            if not left:
                break
    if not found:
        if loss.requires_grad:
            _explain(attachments, loss, warn, is_left=bool(left))
        return None
    if single := [run.attachment for run in found if run.is_one_step]:
        ((x, count),) = Counter(single).most_common(1)
        if count > 3:
            raise RuntimeError(ONE_STEP.format(count=count, **x.names))
    penalty = sum_of([run.end().on(loss.device) for run in found])
    alarms = {run.attachment.alarm for run in found}
    for run in found:
        run.attachment.calls = Calls()
    if penalty.value.requires_grad and any(map(Alarm.is_due, alarms)):  # a hook takes 10 us
        penalty.value.register_hook(partial(_settle, alarms))
    return penalty


def _explain(attachments: Sequence[Any], loss: Tensor, warn: Callable[[str], None], is_left: bool) -> None:
    """Return if a loss that depends on no run is right; otherwise warn or raise.

    Args:
        attachments: the attachments of a regularizer.
        loss: the loss, which needs a gradient.
        warn: as for `take`.
        is_left: whether there is a run that a loss could take.
    """
    modules, calls = ", ".join(dict.fromkeys(x.names["module"] for x in attachments)), [x.calls for x in attachments]
    if not any(x.source.module.training for x in attachments):
        if any(x.is_evaluated_in_training for x in calls):
            warn(IN_EVALUATION.format(modules=modules))
    elif is_left or not any(x.constant for x in calls):
        counts = {name: sum(getattr(x, name) for x in calls) for name in ("total", "without_gradients")}
        taken = {run for run in runs_of(loss) if run.attachment in attachments and not run.is_held}
        raise RuntimeError(NOTHING.format(modules=modules, taken=len(taken), **counts))


def _settle(alarms: Iterable[Alarm], gradient: Tensor | None) -> None:
    """Note that penalties have got a gradient.

    The node of a fused dropout calls the hook with `None` where only its output gets a gradient.
    """
    for alarm in alarms if gradient is not None else ():
        alarm.settle()
