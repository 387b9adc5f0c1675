"""`Run`, a call whose penalty waits for a loss; `take`, by which a loss takes penalties; and `Alarm`, for lost ones.

A loss takes the penalty of each run on which it depends, once. If it depends on none, `take` tells an evaluation and
frozen modules, which have no penalty, from a mistake. Where a training loop makes a mistake that no loss shows, the
alarm counts how often a module was without effect.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.attach.mark import runs_of
from fastreg.call.problem import Penalty, sum_of
from fastreg.call.rnn_dropout import Request
from fastreg.call.torch_state import level_of_caller, untraced

TAKEN_OVER = (
    "on_backward_begin: another regularizer has attached the {module}; remove() the handle that attach() has returned "
    "here, or attach the module here again"
)
GAP = (
    "on_backward_begin: the attached {dropout} did not get the output of the {module}: something lies between them "
    "(packing, padding, a slice, a full backward hook, another module), or it was changed in place, as by "
    "Dropout(inplace=True), or the model calls F.dropout instead, or the dropout ran without gradients. Attach a "
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
    "on_backward_begin: nothing was captured: the loss depends on no run of an attached module whose penalty is left. "
    "Since the last penalty {modules}. Attach what the model calls: a wrapper and not the module inside, a copy and "
    "not its original; leave no layer out at random (LayerDrop); add up all losses of a step; pass use_reentrant=False "
    "to a checkpoint; call torch.compiler.reset() if the model was compiled before. See docs/errors-and-warnings.md"
)
LOST = (
    "attach: no penalty got a gradient in {count} backwards through the attached {name}, or losses without it. Call "
    "loss = regularizer.on_backward_begin(loss), then loss.backward(), and let the loss depend on the output of the "
    "module and its dropout. Attach what the model calls; call train() on it, or remove() the handle; run what belongs "
    "to no training step under torch.no_grad(). See docs/errors-and-warnings.md"
)
LIMIT = 100  # how many backwards and losses in a row may bring no gradient of a penalty
HOOKED = 10  # how many there are before a penalty has to show that it gets a gradient, by a hook, which takes 10 us


# What an attached module has done; these words complete an error
IDLE = "was not called"
TAKEN = "gave its penalty to a loss, or it was cleared"
WITHOUT_GRADIENTS = "ran without gradients"
RAN = "ran, but this loss does not depend on its output"
EVALUATED = "ran in evaluation mode"
CONSTANT = "returned an output that needs no gradient"


@dataclass(eq=False)
class Run:
    """Describe a call of an attached module in training with gradients. The autograd graph owns it.

    Until the dropout has got raw, raw's node owns the run, and later the marks do. If it is not among the open runs of
    its attachment, a loss has taken it, or it was cleared, or an error has ended it.

    Attributes:
        attachment: the attachment of the module.
        request: the coefficients, on the device of raw, the axis of time and the masks.
        packed: the `PackedSequence` whose data is raw, without the data; `None` if raw is not packed.
        version: how often raw had been changed in place.
        penalty: the penalty and its terms, while the run is open and does not wait for its dropout.
        lengths: the number of time steps of raw, of the longest of packed sequences, and the number of sequences.
    """

    attachment: Any
    request: Request
    packed: PackedSequence | None
    version: int
    penalty: Penalty | None = None
    lengths: tuple[int, int] = 0, 0


@dataclass(eq=False)
class Alarm:
    """Warn of a module whose penalties get no gradient, over all its attachments, one after the other.

    Attributes:
        name: the type of the module.
        backwards: how many backwards have passed a mark of the module after a call of it, since a penalty of the module
            last got a gradient.
        losses: how many losses that need a gradient came since then that depend on no run of the module, or since the
            module was last called as it should be, without a penalty.
        is_called: whether the module was called, with a penalty that needs a gradient, after the last such backward.
    """

    name: str
    backwards: int = 0
    losses: int = 0
    is_called: bool = False

    def pass_through(self) -> None:
        """Count a backward through the module, once for all calls before it."""
        if self.is_called:
            self.is_called = False
            self.add(backwards=1)

    def add(self, backwards: int = 0, losses: int = 0) -> None:
        """Count backwards and losses, and warn at the limit, once until a penalty gets a gradient."""
        self.backwards, self.losses = self.backwards + backwards, self.losses + losses
        if self.backwards + self.losses == LIMIT:
            self.backwards += LIMIT  # from here on the count is above the limit, whatever happens to the losses
            warnings.warn(LOST.format(name=self.name, count=LIMIT), stacklevel=level_of_caller())

    def settle(self, gradient: Tensor | None) -> None:
        """Count anew, as a penalty has got a gradient; a fused dropout's is `None` where only its output gets one."""
        if gradient is not None:
            self.backwards = self.losses = 0


@untraced  # a compiler must not trace a search of the graph
def take(
    attachments: Sequence[Any], loss: Tensor, warn: Callable[[str], None]
) -> tuple[Penalty, tuple[int, int]] | None:
    """Take the penalties of the runs on which a loss depends.

    Args:
        attachments: the attachments of a regularizer.
        loss: the loss.
        warn: a function that gives a warning of the regularizer once.

    Returns:
        The sum of the penalties, and the number of time steps of the longest run; `None` if there are no penalties.

    Raises:
        RuntimeError: another regularizer has attached a module, or a run waits for its dropout, or a module ran many
            times over a single time step, or the loss should depend on a run.

    Warns:
        UserWarning: all modules are in evaluation, in a training step; or the alarm of a module has come.
    """
    left, found = set[Run](), list[Run]()
    for x in attachments:
        if not x.handles:
            raise RuntimeError(TAKEN_OVER.format(**x.names))
        for run in x.runs():
            if run.penalty is None:
                raise RuntimeError(GAP.format(**x.names))
            left.add(run)
    for run in runs_of(loss) if left else ():
        if run in left:
            left.remove(run)
            found.append(run)
            if not left:
                break
    reached = {run.attachment for run in found}
    if loss.requires_grad:
        for x in attachments:
            x.starts_anew = True
            if x not in reached:
                x.alarm.add(losses=1)
        if not found:
            _explain(attachments, warn, is_left=bool(left))
    if not found:
        return None
    penalty: Any = sum_of([run.penalty.on(loss.device) for run in found])  # pyright: ignore
    single = [run.attachment for run in found if run.lengths[0] == 1]
    for x in reached:
        if (count := single.count(x)) > 3:
            raise RuntimeError(ONE_STEP.format(count=count, **x.names))
        if x.alarm.backwards + x.alarm.losses >= HOOKED and penalty.value.requires_grad:
            penalty.value.register_hook(x.alarm.settle)
    for run in found:
        run.attachment.close(run)
    for x in attachments:
        # What a module beside has done is of this step, too, and excuses nothing in the next one.
        x.events = {TAKEN: None} if x in reached else {}
    return penalty, max([run.lengths for run in found])


def _explain(attachments: Sequence[Any], warn: Callable[[str], None], is_left: bool) -> None:
    """Return if a loss that depends on no run is right; otherwise warn or raise.

    Args:
        attachments: the attachments of a regularizer.
        warn: as for `take`.
        is_left: whether there is a run that a loss could take.
    """
    if not any(x.source.module.training for x in attachments):
        if any(EVALUATED in x.events and CONSTANT not in x.events for x in attachments):
            warn(IN_EVALUATION.format(modules=", ".join(dict.fromkeys(x.names["module"] for x in attachments))))
    elif is_left or not any(CONSTANT in x.events for x in attachments):
        said = list[str]()
        for x in attachments:
            events = x.events | ({RAN: None} if x.runs() else {})
            said.append(f"the {x.names['module']} {', then '.join(events or [IDLE])}")
        raise RuntimeError(NOTHING.format(modules="; ".join(dict.fromkeys(said))))
