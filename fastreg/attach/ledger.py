"""`Ledger`: the runs of the modules that are attached to one regularizer, and the outcome of each loss.

A run is one call of an attached module in training with gradients enabled. It is in one state at a time:

    WAITING     the module has returned raw, and the dropout has not run yet
    AGAIN       activation checkpointing runs the forward again, in a backward; the run adds nothing to a loss
    FORMED      the penalty is computed, and the tensors that need gradients are marked for the run
    CONSTANT    the penalty is computed, and nothing before it needs a gradient
    WITHOUT     the dropout ran without gradients
    TAKEN       a loss has taken the penalty
    DROPPED     `clear`, an error, or the removal of the attachment has dropped the run

`begin` makes a run WAITING or AGAIN, `arrive` lets it run WITHOUT gradients, `form` makes it FORMED or CONSTANT, `take`
makes it TAKEN, and `clear` makes it DROPPED. The ledger holds the waiting runs, which have no graph, and the latest run
of each attachment if it is a constant. The graph holds the other runs by their marks, and the ledger refers to them
weakly.

`OUTCOMES` is the table of the outcomes of a loss or a backward. docs/hooks.md shows the same table.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastreg.attach.mark import leaf_before, mark, reached
from fastreg.call.problem import ARTAR, Coefficient, axes_of, data_of, is_on
from fastreg.call.torch_state import (
    accumulates,
    at_the_end,
    current,
    level_of_caller,
    untraced,
    version_of,
    will_execute,
)

State = Enum("State", "WAITING AGAIN FORMED CONSTANT WITHOUT TAKEN DROPPED")
WAITING, AGAIN, FORMED, CONSTANT, WITHOUT, TAKEN, DROPPED = State
HELD = WAITING, FORMED, CONSTANT  # the states of a run whose penalty a loss may still take

NO_GRADIENTS = (
    "the attached {module} or its dropout ran without gradients, so the gradient of the penalty would be lost. For "
    "activation checkpointing pass use_reentrant=False; otherwise run both outside torch.no_grad()"
)
# The cases of a loss, and at the end the case of a backward. A case without a message is as it should be, the cases in
# WARNINGS are warned of, and all others are errors.
OUTCOMES = {
    "a dropout did not get raw": "on_backward_begin: the attached {dropout} did not get the output of the {module}: "
    "something lies between them (packing, padding, a slice, a full backward hook, another module), or a step ended "
    "before the dropout ran. Attach a dropout that gets this very tensor, or no dropout, or use on_loss_begin; after a "
    "step that ended early, call clear()",
    "all modules are in evaluation": "",
    "an earlier loss took the run": "on_backward_begin: nothing was captured: an earlier loss has taken the run of the "
    "attached {modules} that this loss depends on. Add up the losses of a step, and call on_backward_begin once, with "
    "their sum",
    "a module ran without gradients": f"on_backward_begin: {NO_GRADIENTS}",
    "the loss needs no gradient": "",
    "the loss depends on no run": "on_backward_begin: nothing was captured: the loss depends on no run of the attached "
    "{modules}, though there is one. Pass the loss that was computed from the output of the module, or from the output "
    "of its dropout if one is attached",
    "there is no run": "on_backward_begin: nothing was captured: the loss depends on no run of the attached {modules}: "
    "it was computed from other tensors or from a detached output, or the module was not called, or clear() or an "
    "earlier error dropped the run. Call the module, not its forward(): where a wrapper calls the forward() of a "
    "module inside it, as WeightDrop does, attach the wrapper. A copy of a module, by deepcopy or pickle, has no "
    "hooks: attach it, too",
    "a coefficient changed": "on_backward_begin: alpha or beta has changed since the forward of the attached {module}, "
    "but the penalty has the coefficients of that forward; change them after the backward",
    "four runs over one step": "on_backward_begin: the {module} ran {count} times over one time step, where AR would "
    "add up and TAR has no changes; stack its outputs along time, and call fused_ar_tar",
    "two runs over one step": "on_backward_begin: the {module} ran {count} times over one time step, where TAR has no "
    "changes. If this is a loop over time, stack its outputs along time, and call fused_ar_tar",
    "a module was never called": "attach: the attached {module} was never called, and has no penalty; attach what the "
    "model calls",
    "the loss depends on runs": "",
    "only frozen modules ran": "",
    "no penalty got a gradient": "attach: a second backward has run through the output of the attached {module}, and "
    "no penalty had a gradient: call loss = regularizer.on_backward_begin(loss), and then loss.backward()",
}
MASKED = {"valid": "only valid steps count", "starts": "changes into starts do not count"}
WARNINGS = "two runs over one step", "a module was never called", "no penalty got a gradient"
ENOUGH = 2 if will_execute else 20  # backwards before the last warning; an attack makes several before the loss


def report(case: str, attachments: Sequence[Any], count: int = 0) -> None:
    """Raise the error of a case, or give its warning; the message names the modules of the attachments."""
    if not OUTCOMES[case]:
        return
    modules = ", ".join(dict.fromkeys(x.names["module"] for x in attachments))
    text = OUTCOMES[case].format(modules=modules, count=count, **attachments[0].names)
    if case not in WARNINGS:
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=level_of_caller())


@dataclass(eq=False)
class Run:
    """Describe one run of an attached module.

    Attributes:
        attachment: the attachment of the module.
        raw: a weak reference to the module's output, or to the rows of a `PackedSequence`.
        version: the version of raw when the module returned it.
        shape: the shape of raw.
        packed: the `PackedSequence` whose data is raw, without the data; `None` if raw is not packed.
        masks: the masks of valid steps and of starts, by their names, each of which may be `None`; empty without raw.
        given: alpha and beta of the regularizer.
        stamps: the stamps of alpha and beta at the time when the module ran; `given` itself if both are floats.
        state: the state.
        terms: the penalty and its terms of a run that is formed or constant; otherwise `None`.
        can_be_lost: whether the penalty needs a gradient, and a coefficient is not 0, until `backwards` is `None`.
    """

    attachment: Any
    raw: Callable[[], Any]
    version: int
    shape: torch.Size
    packed: PackedSequence | None
    masks: dict[str, Any]
    given: Sequence[Coefficient]
    stamps: Sequence[Any]
    state: State
    terms: ARTAR | None = None
    can_be_lost: bool = False

    def coefficients(self) -> Sequence[Coefficient]:
        """Return alpha and beta on the device of raw, which has to be alive."""
        if self.stamps is self.given:
            return self.given
        return [x.to(self.raw().device) if isinstance(x, Tensor) else x for x in self.given]

    def end(self, state: State) -> Any:
        """Return the penalty and its terms, once."""
        terms, self.terms, self.state = self.terms, None, state
        return terms

    def is_one_step(self) -> bool:
        """Return whether raw is a single time step."""
        steps = self.shape[self.attachment.source.place.axis()] if self.packed is None else len(self.packed.batch_sizes)
        return steps == 1

    def __str__(self) -> str:
        """Say which axes of raw were taken for what, and which time steps count."""
        if self.packed is not None:
            sizes = self.packed.batch_sizes
            rows = f"{sizes[0]} packed sequences of up to {len(sizes)} time steps, hidden {self.shape[-1]}"
            return f"raw {(*self.shape,)} as {rows}; every step counts"
        time, batch = axes_of(self, self.attachment.source.place.axis())
        names, given = {time: "time", batch: "batch"}, [x for x in self.masks if self.masks[x] is not None]
        axes = ", ".join([f"{names.get(i, 'hidden')} {size}" for i, size in enumerate(self.shape)])
        steps = "; ".join([f"{x} {(*self.masks[x].shape,)}: {MASKED[x]}" for x in given])
        return f"raw {(*self.shape,)} as {axes}; {steps or 'no mask: every step counts'}"


def stamps_of(coefficients: Sequence[Coefficient]) -> Sequence[Any]:
    """Return values that change when a coefficient is replaced, or is a tensor and changed in place.

    Of two floats these are the coefficients themselves.
    """
    alpha, beta = coefficients
    if type(alpha) is float and type(beta) is float:
        return coefficients
    return tuple([(id(x), version_of(x)) if isinstance(x, Tensor) else x for x in coefficients])


@dataclass
class Site:
    """Hold what the ledger knows of an attachment.

    Attributes:
        notes: what has happened to the module once, such as a warning: the ledger keeps it for a later attachment.
        has_run: whether the module has run in training since the last loss.
        without: whether a call in training had no gradients.
        constant: the latest run, if it needs no gradient and no loss has taken it.
        shown: what the first run has taken for what, in words.
    """

    notes: set[str]
    has_run: bool = False
    without: bool = False
    constant: Run | None = None
    shown: str = ""

    def is_first(self, note: str) -> bool:
        """Make a note, and return whether it is new."""
        is_new = note not in self.notes
        self.notes.add(note)
        return is_new


# The latest run of each raw in all ledgers, by the id of raw
_runs_of: dict[int, Callable[[], Run | None]] = {}


class Ledger:
    """Hold the runs of the modules that are attached to a regularizer.

    Args:
        owner: the regularizer, which has the coefficients; when it is gone, the attachments are removed.

    Attributes:
        sites: what is known of each attachment.
        notes: the notes on each module, whether it is attached or not.
        waiting: the runs that wait for their dropout, in the order of the forward; the keys are the runs, too.
        runs: weak references to all runs.
        backwards: the backwards through marks in which a penalty could have got a gradient; `None` once a penalty has
            got one, or the lack of one was warned of.
    """

    def __init__(self, owner: Any) -> None:
        self.owner: Callable[[], Any] = weakref.ref(owner, lambda _: [x.remove() for x in [*self.sites]])
        self.sites: dict[Any, Site] = {}
        self.notes: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
        self.waiting: dict[Any, Run] = {}
        self.runs: list[Callable[[], Run | None]] = []
        self.backwards: set[int] | None = set()

    def add(self, attachment: Any) -> None:
        """Add an attachment."""
        self.sites[attachment] = Site(self.notes.setdefault(attachment.source.module, set()))

    def remove(self, attachment: Any) -> None:
        """Drop the runs of an attachment, and leave it out from now on."""
        self.clear(attachment)
        del self.sites[attachment]

    # A forward

    def enter(self, attachment: Any, is_training: bool, again: bool) -> bool:
        """Note that a module was called; return whether the call is a run."""
        site, is_run = self.sites[attachment], is_training and torch.is_grad_enabled()
        site.notes.add("called")
        if is_training and not again:  # a recomputation belongs to a loss that has passed
            site.has_run = True
        if is_training and not is_run:
            site.without = True
        return is_run

    def begin(self, attachment: Any, raw: Tensor | PackedSequence, masks: dict[str, Any], again: bool) -> Run:
        """Note a new run, which waits for its dropout.

        Args:
            attachment: the attachment of the module.
            raw: the output of the module.
            masks: the masks of valid steps and of starts, by their names.
            again: whether this is a recomputation.
        """
        rows: Any = data_of(raw)
        packed: Any = None if raw is rows else raw._replace(data=None)  # pyright: ignore
        owner = self.owner()
        given = owner.alpha, owner.beta
        if not again:
            self.sites[attachment].constant = None
        # The masks go with raw, although a run whose raw is gone may wait until the loss.
        are_masks = masks["valid"] is not None or masks["starts"] is not None
        of_raw = weakref.ref(rows, (lambda _: masks.clear()) if are_masks else None), version_of(rows), rows.shape
        run = Run(attachment, *of_raw, packed, masks, given, stamps_of(given), AGAIN if again else WAITING)
        self.waiting[run], _runs_of[id(rows)] = run, found = run, weakref.ref(run)
        self.runs.append(found)
        if len(self.runs) % 1000 == 0:  # a loop without a loss must not fill the memory
            self.alive()
            self.waiting = {x if x.raw() is not None else (x.attachment, x.state): x for x in self.waiting.values()}
        return run

    def find(self, rows: Any) -> Run | None:
        """Return the latest run whose raw is a tensor, or `None`."""
        run = (found := _runs_of.get(id(rows))) and found()
        is_its = run is not None and run.raw() is rows and run.state is not DROPPED  # an id may have been another's
        return run if is_its else None

    def arrive(self, run: Run) -> bool:
        """Note that raw of a run has got to its dropout; return whether it is the first time."""
        is_first = self.waiting.pop(run, None) is not None
        if is_first and not torch.is_grad_enabled():
            run.state, self.sites[run.attachment].without = WITHOUT, True
        return is_first

    def form(self, run: Run, dropped: Tensor, terms: ARTAR) -> Tensor:
        """Note the penalty of a run; return dropped, marked if it needs a gradient."""
        site, run.terms = self.sites[run.attachment], terms
        if self.backwards is not None:
            run.can_be_lost = terms.penalty.requires_grad and any(map(is_on, run.given))
        site.shown = site.shown or str(run)
        if dropped.requires_grad:
            run.state = FORMED
            return mark(run, [True], dropped)[0]
        run.state, site.constant = CONSTANT, run
        return dropped

    # A loss

    @untraced  # a compiler must not trace a search of the graph
    def take(self, loss: Tensor) -> list[ARTAR]:
        """Take the penalties of the runs on which a loss depends, and of constants.

        Raises:
            RuntimeError: the outcome is an error.

        Warns:
            UserWarning: the outcome is a warning.
        """
        for run in self.waiting.values():
            if run.state is WAITING:
                report("a dropout did not get raw", [run.attachment])
        alive = self.alive()
        counted = reached(loss, [run for run in alive if run.state is FORMED])
        training = {x: site for x, site in self.sites.items() if x.source.module.training}
        if not counted and not self._is_constant(loss, training, alive):
            return []
        counted += [site.constant for site in training.values() if site.constant is not None]
        self._check(counted)
        for x, site in training.items():
            if site.is_first("called"):
                report("a module was never called", [x])
            if x.say is not None and site.shown and site.is_first("said"):
                x.say(repr(x))
            site.constant = None
        for site in self.sites.values():
            site.has_run = False
        self.waiting.clear()  # of runs in recomputations
        for run in counted if self.backwards is not None else ():
            if run.can_be_lost:
                run.terms.penalty.register_hook(self._settle)
        return [run.end(TAKEN) for run in counted]

    def _is_constant(self, loss: Tensor, training: dict[Any, Site], alive: Sequence[Run]) -> bool:
        """Report the case of a loss that depends on no run that is formed; return whether constants count for it.

        Args:
            loss: the loss.
            training: the attachments whose modules are in training.
            alive: all runs.
        """
        without = [x for x, site in training.items() if site.without]
        are_constant = [site.constant is not None for site in training.values() if site.has_run]
        if not training:
            case = "all modules are in evaluation"
        elif reached(loss, [run for run in alive if run.state is TAKEN]):
            case = "an earlier loss took the run"
        elif are_constant and all(are_constant):
            case = "only frozen modules ran"
        elif without:
            case = "a module ran without gradients" if loss.requires_grad else "the loss needs no gradient"
        else:
            is_formed = any([run.state is FORMED for run in alive])
            case = "the loss depends on no run" if is_formed else "there is no run"
        report(case, [*without, *training])
        return case == "only frozen modules ran"

    def _check(self, counted: Sequence[Run]) -> None:
        """Report what is wrong with the runs that count for a loss."""
        owner = self.owner()
        stamps = stamps_of((owner.alpha, owner.beta))
        for run in counted:
            if run.stamps != stamps:
                report("a coefficient changed", [run.attachment])
        single = [run.attachment for run in counted if run.is_one_step()] if len(counted) > 1 else []
        for x, count in Counter(single).most_common() if single else ():  # an error comes before all warnings
            if count > 3:
                report("four runs over one step", [x], count)
            elif count > 1 and self.sites[x].is_first("two runs over one step"):
                report("two runs over one step", [x], count)

    def clear(self, *attachments: Any) -> None:
        """Drop the runs of attachments; without arguments, of all."""
        attachments = attachments or (*self.sites,)
        for run in self.alive():
            if run.attachment in attachments:
                run.end(DROPPED)
                self.waiting.pop(run, None)
        for x in attachments:
            self.sites[x] = replace(self.sites[x], has_run=False, without=False, constant=None)

    def alive(self) -> list[Run]:
        """Return the runs that are alive, and forget all others."""
        alive = [run for x in self.runs if (run := x()) is not None]
        self.runs = [*map(weakref.ref, alive)]
        for key, x in _runs_of.copy().items() if len(_runs_of) > 1000 else ():
            if x() is None:
                _runs_of.pop(key, None)
        return alive

    # A backward

    @untraced
    def passed(self, run: Run, node: Any) -> None:
        """Note that a backward runs through a mark; warn at its end if it is the second one without a penalty.

        The mark comes before the penalty in the same backward, so only the end shows whether a penalty got a gradient.

        Args:
            run: the run of the mark.
            node: the node of the mark.
        """
        backwards, task = self.backwards, current()
        if backwards is None or task in backwards or not (run.can_be_lost and accumulates(leaf_before(node))):
            return
        backwards.add(task)
        if len(backwards) >= ENOUGH:
            at_the_end(partial(self._warn, run.attachment))

    def _warn(self, attachment: Any) -> None:
        """Warn once, unless a penalty has got a gradient."""
        if self.backwards is not None:
            self.backwards = None
            report("no penalty got a gradient", [attachment])

    def _settle(self, gradient: Tensor | None) -> None:
        """Note that a penalty has got a gradient; an unused penalty of a fused dropout gets `None` instead."""
        if gradient is not None:
            self.backwards = None


def total(formed: Iterable[ARTAR], device: torch.device) -> ARTAR:
    """Add up the penalties and terms of runs, which may be on several devices."""
    on = [x if x.penalty.device == device else ARTAR(*[y.to(device) for y in x]) for x in formed]
    return reduce(lambda x, y: ARTAR(*map(torch.add, x, y)), on)
