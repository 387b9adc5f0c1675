"""`Runs`: the runs of the modules that are attached to one regularizer, and the outcome of each loss.

A run is one call of an attached module in training with gradients enabled. Raw carries the run until the dropout gets
raw. Then the penalty is formed, and the autograd graph owns the run by its marks, while `Runs` refers to it weakly. A
run is held until a loss takes its penalty. A run of a frozen module, which needs no gradient, adds nothing.

Mistakes that no loss shows have one net. The penalty of a run is lost if the run is freed, or a backward gets to its
mark, before the penalty has got a gradient. The `Tally` of its module counts such runs, a gradient of a penalty sets
the count back, and after many of them in a row the module is warned of.

The regularizer calls `take` and `clear`, and the hooks call `begin`. `Runs` calls no hook.

`OUTCOMES` is the table of the outcomes of a loss or a run. docs/hooks.md shows the same table.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastreg.attach.mark import reached
from fastreg.call.private import version_of
from fastreg.call.problem import ARTAR, Coefficient, is_on
from fastreg.call.torch_state import level_of_caller, untraced

# The cases of a loss, and at the end the cases of a run. A case without a message is as it should be, the cases in
# WARNINGS are warned of, once for a module, and all others are errors.
OUTCOMES = {
    "a dropout did not get raw": "on_backward_begin: the attached {dropout} did not get the output of the {module}: "
    "something lies between them (packing, padding, a slice, a full backward hook, another module), or the dropout ran "
    "without gradients, or a step ended before it ran. Attach a dropout that gets this very tensor, or no dropout, or "
    "use on_loss_begin; pass use_reentrant=False to a checkpoint; after a step that ended early, call clear()",
    "all modules are in evaluation": "",
    "only frozen modules ran": "",
    "nothing needs a gradient": "",
    "the loss depends on no run": "on_backward_begin: nothing was captured: the attached {modules} ran, but the loss "
    "does not depend on its output, or on the output of its dropout. Pass a loss of the model's output that is not "
    "detached; see docs/messages.md",
    "a module ran without gradients": "on_backward_begin: nothing was captured: the attached {modules} ran only under "
    "torch.no_grad() or in a reentrant checkpoint. Enable gradients, or pass use_reentrant=False; see docs/messages.md",
    "a run is taken": "on_backward_begin: nothing was captured: the attached {modules} has not run since an earlier "
    "loss took its penalty, or since clear() or an error. Call on_backward_begin once in a step that calls the module, "
    "with the sum of all losses; see docs/messages.md",
    "no module was called": "on_backward_begin: nothing was captured: the attached {modules} has never been called in "
    "training. Attach what the model calls, which may be a wrapper or a copy of the module; see docs/messages.md",
    "a coefficient changed": "on_backward_begin: alpha or beta has changed since the forward of the attached {module}, "
    "but the penalty has the coefficients of that forward; change them after the backward",
    "four runs over one step": "on_backward_begin: the {module} ran {count} times over one time step, where AR would "
    "add up and TAR has no changes; stack its outputs along time, and call fused_ar_tar",
    "several runs over one step": "on_backward_begin: the {module} ran {count} times over one time step, where AR adds "
    "up and TAR has no changes. If this is a loop over time, stack its outputs along time, and call fused_ar_tar",
    "the loss depends on runs": "",
    "a module is left out": "on_backward_begin: {count} losses came without a call of the attached {module}, which was "
    "frozen or never called before; attach what the model calls, such as a wrapper or a copy, or remove() the handle",
    "a regularizer is deleted": "attach: the regularizer of the attached {module} was deleted before the module ran in "
    "training, and its hooks are removed now; keep the regularizer in a variable",
    "no penalty got a gradient": "attach: the penalties of {count} runs of the attached {module} in a row got no "
    "gradient. Call loss = regularizer.on_backward_begin(loss), then loss.backward(), and let the loss depend on the "
    "output of the module and its dropout. If these runs belong to no training step, run them under torch.no_grad()",
}
WARNINGS = "several runs over one step", "a module is left out", "a regularizer is deleted", "no penalty got a gradient"
# The calls of a module in training: it was never called, or not since a loss took a penalty; or its strongest call
# since then. LOST has the case of a loss that depends on no run, by the strongest call of the modules.
NEVER, BEFORE, NO_GRADIENTS, FROZEN, RUN = range(5)
LOST = (
    *("no module was called", "a run is taken", "a module ran without gradients"),
    *("only frozen modules ran", "the loss depends on no run"),
)
AT_FIRST, PATIENCE = 20, 50  # how many penalties in a row may get no gradient, before the first one gets it and after
HOOKED = 10  # how many runs begin after a penalty got a gradient until another penalty has to show that it gets one


@dataclass(eq=False)
class Tally:
    """Count the lost penalties of a module, which may be attached several times, one after the other.

    Attributes:
        begun: how many runs have begun whose penalties need a gradient.
        settled: how many of them had begun when a penalty last got a gradient, which forgives them all.
        lost: how many of the later ones were freed, or passed by a backward, before a penalty got a gradient.
        patience: how many may be.
        ran: whether the last call in training with gradients was a run that is not frozen.
        losses: the losses since the last call in training.
        notes: the messages about the module that were given, as each is given once.
    """

    begun: int = 0
    settled: int = 0
    lost: int = 0
    patience: int = AT_FIRST
    ran: bool = False
    losses: int = 0
    notes: set[str] = field(default_factory=set)

    def is_due(self) -> bool:
        """Return whether a penalty has to show by a hook that it gets a gradient."""
        return self.patience == AT_FIRST or self.begun >= self.settled + HOOKED

    def is_first(self, note: str) -> bool:
        """Make a note, and return whether it is new."""
        is_new = note not in self.notes
        self.notes.add(note)
        return is_new


@dataclass(eq=False)
class Run:
    """Describe one run of an attached module.

    Attributes:
        attachment: the attachment of the module.
        stamps: the stamps of alpha and beta at the time when the module ran.
        number: the number of the run in the tally of the module; 0 if its penalty cannot be lost.
        is_held: whether a loss may take the penalty, now or after the dropout.
        terms: the penalty and its terms, from the dropout until a loss takes them.
        is_one_step: whether raw is a single time step.
        is_lost: whether its penalty was counted as lost.
    """

    attachment: Any
    stamps: Sequence[Any]
    number: int = 0
    is_held: bool = True
    terms: ARTAR | None = None
    is_one_step: bool = False
    is_lost: bool = False

    def end(self) -> Any:
        """Return the penalty and its terms, once."""
        terms, self.terms, self.is_held = self.terms, None, False
        return terms

    @untraced
    def lose(self) -> None:
        """Count a lost penalty, once, unless the penalty of a later run has got a gradient."""
        tally = self.attachment.tally
        tally.lost += self.number > tally.settled and not self.is_lost
        self.is_lost = True

    __del__ = lose


def report(case: str, attachments: Sequence[Any], count: int = 0) -> None:
    """Raise the error of a case, or give its warning, once for a module; the message names the modules."""
    if case in WARNINGS and not attachments[0].tally.is_first(case):
        return
    modules = ", ".join(dict.fromkeys(x.names["module"] for x in attachments))
    text = OUTCOMES[case].format(modules=modules, count=count, **attachments[0].names)
    if case not in WARNINGS:
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=level_of_caller())


def stamps_of(coefficients: Sequence[Coefficient]) -> Sequence[Any]:
    """Return values that change when a coefficient is replaced, or is a tensor and changed in place."""
    return [(id(x), version_of(x)) if isinstance(x, Tensor) else x for x in coefficients]


class Runs:
    """Hold the runs of the modules that are attached to a regularizer; a copy holds none.

    Attributes:
        attachments: the attachments.
        tallies: the tally of each module, whether it is attached or not.
        runs: weak references to the runs that are held, and to some that no longer are.
    """

    def __init__(self) -> None:
        self.attachments: list[Any] = []
        self.tallies: WeakKeyDictionary[nn.Module, Tally] = WeakKeyDictionary()
        self.runs: list[Callable[[], Run | None]] = []

    def __reduce__(self) -> Any:
        return Runs, ()

    def begin(self, attachment: Any, given: Sequence[Coefficient], needs_gradient: bool) -> Run:
        """Return a new run, and warn if the module has lost many penalties.

        Args:
            attachment: the attachment of the module.
            given: alpha and beta.
            needs_gradient: whether raw needs a gradient.
        """
        tally = attachment.tally
        if tally.lost >= tally.patience:
            report("no penalty got a gradient", [attachment], tally.lost)
        can_be_lost = needs_gradient and any(map(is_on, given))
        tally.begun += can_be_lost
        run = Run(attachment, stamps_of(given), tally.begun if can_be_lost else 0)
        self.runs.append(ref(run))
        if len(self.runs) % 1000 == 0:  # a loop without a loss must not fill the memory
            self.held()
        return run

    @untraced  # a compiler must not trace a search of the graph
    def take(self, loss: Tensor, given: Sequence[Coefficient]) -> ARTAR | None:
        """Take the penalties of the runs on which a loss depends, and return their sum, or `None` if there are none.

        Args:
            loss: the loss.
            given: alpha and beta.

        Raises:
            RuntimeError: the outcome is an error.

        Warns:
            UserWarning: the outcome is a warning.
        """
        training = [x for x in self.attachments if x.source.module.training]
        if waiting := [x for x in training if x.waiting]:
            report("a dropout did not get raw", waiting)
        counted = reached(loss, [run for run in self.held() if run.terms is not None])
        if not counted:
            self._check_calls(loss, training)
        self._check(counted, given)
        for x in training:
            x.tally.losses += loss.requires_grad
            if x.tally.losses > PATIENCE and not x.tally.ran:
                report("a module is left out", [x], x.tally.losses)
        if not counted:
            return None
        terms = total([run.end() for run in counted], loss.device)
        tallies = {run.attachment.tally for run in counted if run.number > 0}
        if terms.penalty.requires_grad and any([x.is_due() for x in tallies]):  # a hook takes 10 us
            terms.penalty.register_hook(partial(settle, tallies))
        for x in training:
            x.called = min(x.called, BEFORE)
            if x.say is not None and x.shown and x.tally.is_first("said"):
                x.say(repr(x))
        return terms

    def _check_calls(self, loss: Tensor, training: Sequence[Any]) -> None:
        """Report the error of a loss that depends on no run, unless the calls of the modules explain it."""
        kinds = {x.called for x in training}
        calls = kinds - {NEVER, BEFORE}
        needs_no_gradient = bool(calls) and RUN not in calls and not loss.requires_grad
        if training and calls != {FROZEN} and not needs_no_gradient:
            kind = RUN if RUN in calls else NO_GRADIENTS if calls else max(kinds)
            report(LOST[kind], [x for x in training if x.called == kind])

    def _check(self, counted: Sequence[Run], given: Sequence[Coefficient]) -> None:
        """Report errors and warnings of the runs that count for a loss."""
        stamps = stamps_of(given)
        for run in counted:
            if run.stamps != stamps:
                report("a coefficient changed", [run.attachment])
        single = [run.attachment for run in counted if run.is_one_step]
        for x, count in Counter(single).most_common() if single else ():  # an error comes before all warnings
            if count > 1:
                is_loop = count > 3 and is_on(given[1])
                report("four runs over one step" if is_loop else "several runs over one step", [x], count)

    def clear(self) -> None:
        """Drop all runs, which do not count as lost."""
        for run in self.held():
            run.number = 0
            run.end()
        for x in self.attachments:
            x.waiting, x.called = 0, min(x.called, BEFORE)

    def held(self) -> list[Run]:
        """Return the runs that are held, and whose hooks are not removed, and forget all others."""
        left = self.attachments
        held = [run for x in self.runs if (run := x()) is not None and run.is_held and run.attachment in left]
        self.runs = [*map(ref, held)]
        return held


def settle(tallies: Iterable[Tally], gradient: Tensor | None) -> None:
    """Note that penalties have got a gradient, which forgives all runs of their modules that began before.

    The node of a fused dropout calls the hook with `None` where only its output gets a gradient.
    """
    for x in tallies if gradient is not None else ():
        x.settled, x.lost, x.patience = x.begun, 0, PATIENCE


def total(formed: Iterable[ARTAR], device: torch.device) -> ARTAR:
    """Add up the penalties and terms of runs, which may be on several devices."""
    on = [x if x.penalty.device == device else ARTAR(*[y.to(device) for y in x]) for x in formed]
    return reduce(lambda x, y: ARTAR(*map(torch.add, x, y)), on)
