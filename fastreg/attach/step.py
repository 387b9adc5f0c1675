"""`Step`: the runs of the modules that are attached to one regularizer, and the outcome of each loss.

A run is one call of an attached module in training with gradients enabled. Raw carries the run until the dropout gets
raw. Then the penalty is formed, and the autograd graph owns the run by its marks, while the step refers to it weakly. A
run is held until a loss takes its penalty. A run that needs no gradient has no marks, and the site of its module keeps
its penalty as a constant.

The regularizer calls `take` and `clear`, the hooks call `enter`, `begin`, `arrive` and `form`, and the marks call
`passed`. A step calls none of them, and reads no module.

`OUTCOMES` is the table of the outcomes of a loss or a backward. docs/hooks.md shows the same table.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastreg.attach.mark import reached
from fastreg.call.problem import ARTAR, Coefficient, is_on
from fastreg.call.torch_state import accumulates, current, level_of_caller, untraced, version_of

# The cases of a loss, and at the end the case of a backward. A case without a message is as it should be, the cases in
# WARNINGS are warned of, and all others are errors.
OUTCOMES = {
    "a dropout did not get raw": "on_backward_begin: the attached {dropout} did not get the output of the {module}: "
    "something lies between them (packing, padding, a slice, a full backward hook, another module), or the dropout ran "
    "without gradients, or a step ended before it ran. Attach a dropout that gets this very tensor, or no dropout, or "
    "use on_loss_begin; pass use_reentrant=False to a checkpoint; after a step that ended early, call clear()",
    "all modules are in evaluation": "",
    "the loss depends on no run": "on_backward_begin: nothing was captured: the loss depends on no run of the attached "
    "{modules}, that is, on no call in training with gradients, or an earlier loss has taken it. Likely causes: a "
    "second call in one step (call on_backward_begin once, with the sum of the losses); a step that leaves the module "
    "out, as LayerDrop does (set its probability to 0, or attach what every step calls); a forward under "
    "torch.no_grad() or in a reentrant checkpoint (pass use_reentrant=False); a loss of other tensors, or of a "
    "detached output; a wrapper, such as WeightDrop, that calls the forward() of the module (attach the wrapper); a "
    "copy of the model, whose hooks do nothing (attach the copy); clear() or an error since the forward",
    "nothing needs a gradient": "",
    "a coefficient changed": "on_backward_begin: alpha or beta has changed since the forward of the attached {module}, "
    "but the penalty has the coefficients of that forward; change them after the backward",
    "four runs over one step": "on_backward_begin: the {module} ran {count} times over one time step, where AR would "
    "add up and TAR has no changes; stack its outputs along time, and call fused_ar_tar",
    "several runs over one step": "on_backward_begin: the {module} ran {count} times over one time step, where AR adds "
    "up and TAR has no changes. If this is a loop over time, stack its outputs along time, and call fused_ar_tar",
    "a module was never called": "attach: the attached {module} was never called in training, and has no penalty; "
    "attach what the model calls",
    "the loss depends on runs": "",
    "only frozen modules ran": "",
    "no penalty got a gradient": "attach: a second backward runs through the output of the attached {module}, and no "
    "penalty had a gradient: call loss = regularizer.on_backward_begin(loss), and then loss.backward()",
}
WARNINGS = "several runs over one step", "a module was never called", "no penalty got a gradient"
NO_CALL, NO_GRADIENTS, FROZEN, RUN = range(4)  # kinds of calls in training, in the order of their weight for a loss


class Site:
    """Hold what a step knows of an attached module; the handle that `attach` returns adds the hooks.

    Attributes:
        names: the names of the types of the module and of its dropout, for messages.
        paths: their paths in the model, where an adapter has found them there.
        say: a function that is called once with the `repr()` of the site, at the first loss; `None` to say nothing.
        shown: the axes and the masks of the first run, in words.
        notes: events that count once for the module, such as a warning; a later site of the module has the same notes.
        waiting: how many runs wait for their dropout.
        most: the most that a call in training has been since a loss last took a penalty.
        constant: the penalty and its terms of the latest run, if that is frozen and no loss has taken it.
        was_frozen: whether no run before the last loss that took a penalty needed a gradient.
    """

    names: dict[str, str] = {"module": "Attachment"}  # noqa: RUF012 - of a copy
    paths: tuple[Any, Any] = None, None
    say: Callable[[str], Any] | None = None
    shown: str = ""
    notes: set[str]
    waiting: int = 0
    most: int = NO_CALL
    constant: ARTAR | None = None
    was_frozen: bool = False

    def __repr__(self) -> str:
        label = [f"{path} ({x})" if path else x for x, path in zip(self.names.values(), self.paths, strict=False)]
        return f"{' -> '.join(label)}: {self.shown or 'no run yet'}"

    def is_first(self, note: str) -> bool:
        """Make a note, and return whether it is new."""
        is_new = note not in self.notes
        self.notes.add(note)
        return is_new


def report(case: str, sites: Sequence[Site], count: int = 0) -> None:
    """Raise the error of a case, or give its warning; the message names the modules of the sites."""
    if not OUTCOMES[case]:
        return
    modules = ", ".join(dict.fromkeys(x.names["module"] for x in sites))
    text = OUTCOMES[case].format(modules=modules, count=count, **sites[0].names)
    if case not in WARNINGS:
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=level_of_caller())


@dataclass(eq=False)
class Run:
    """Describe one run of an attached module.

    Attributes:
        step: the step of the regularizer.
        site: the site of the module.
        stamps: the stamps of alpha and beta at the time when the module ran.
        is_held: whether a loss may take the penalty, now or after the dropout.
        terms: the penalty and its terms, from the dropout until a loss takes them.
        can_be_lost: whether forgetting the penalty would change the training, as far as no backward has decided yet.
        is_one_step: whether raw is a single time step.
    """

    step: Step
    site: Site
    stamps: Sequence[Any]
    is_held: bool = True
    terms: ARTAR | None = None
    can_be_lost: bool = False
    is_one_step: bool = False

    def end(self) -> Any:
        """Return the penalty and its terms, once."""
        terms, self.terms, self.is_held = self.terms, None, False
        return terms


def stamps_of(coefficients: Sequence[Coefficient]) -> Sequence[Any]:
    """Return values that change when a coefficient is replaced, or is a tensor and changed in place."""
    return [(id(x), version_of(x)) if isinstance(x, Tensor) else x for x in coefficients]


class Step:
    """Hold the runs of the modules that are attached to a regularizer.

    Attributes:
        sites: the sites of the attached modules.
        notes: the notes on each module, whether it is attached or not.
        runs: weak references to the runs that are held, and to some that no longer are.
        backwards: the backwards through marks in which no penalty has got a gradient; `None` once a penalty has got
            one, or the lack of one was warned of.
    """

    def __init__(self) -> None:
        self.sites: list[Any] = []
        self.notes: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
        self.runs: list[Callable[[], Run | None]] = []
        self.backwards: set[int] | None = set()

    def add(self, site: Site, module: nn.Module) -> None:
        """Add the site of a module."""
        site.notes = self.notes.setdefault(module, set())
        self.sites.append(site)

    def remove(self, site: Site) -> None:
        """Drop the runs of a site, and leave it out from now on."""
        self.clear(site)
        self.sites.remove(site)

    # A forward

    def enter(self, site: Site) -> bool:
        """Note a call in training; return whether it is a run, or the recomputation of one."""
        site.notes.add("called")
        if torch.is_grad_enabled():
            return True
        site.most = max(site.most, NO_GRADIENTS)
        return False

    def begin(self, site: Site, given: Sequence[Coefficient], waits: bool) -> Run:
        """Return a new run.

        Args:
            site: the site of the module.
            given: alpha and beta.
            waits: whether the run waits for a dropout.
        """
        run = Run(self, site, stamps_of(given))
        self.runs.append(ref(run))
        if len(self.runs) % 1000 == 0:  # a loop without a loss must not fill the memory
            self.held()
        site.waiting += waits
        return run

    def arrive(self, run: Run) -> bool:
        """Note that raw of a run has got to its dropout; return whether a loss may take the penalty."""
        run.site.waiting -= run.is_held
        return run.is_held

    def form(self, run: Run, terms: ARTAR, given: Sequence[Coefficient], is_frozen: bool) -> None:
        """Note the penalty of a run.

        Args:
            run: the run.
            terms: the penalty and its terms.
            given: alpha and beta.
            is_frozen: whether the run needs no gradient.
        """
        site = run.site
        if is_frozen:
            site.most, site.constant = max(site.most, FROZEN), terms
        else:
            site.most, site.constant, run.terms = RUN, None, terms
            run.can_be_lost = self.backwards is not None and terms.penalty.requires_grad and any(map(is_on, given))

    # A loss

    @untraced  # a compiler must not trace a search of the graph
    def take(self, loss: Tensor, given: Sequence[Coefficient], training: Sequence[Site]) -> ARTAR | None:
        """Take the penalties of the runs on which a loss depends, and of constants; return their sum.

        Args:
            loss: the loss.
            given: alpha and beta.
            training: the sites of the modules in training.

        Raises:
            RuntimeError: the outcome is an error.

        Warns:
            UserWarning: the outcome is a warning.
        """
        for site in self.sites:
            if site.waiting:
                report("a dropout did not get raw", [site])
        counted = reached(loss, [run for run in self.held() if run.terms is not None])
        report("the loss depends on runs" if counted else self._case_without(loss, training), training)
        self._check(counted, given)
        formed = [run.end() for run in counted] + [x.constant for x in training if x.constant is not None]
        if not formed:
            return None
        for site in training:
            site.was_frozen = site.most == FROZEN if site.most else site.was_frozen
            site.most, site.constant = NO_CALL, None
            if site.is_first("called"):
                report("a module was never called", [site])
            if site.say is not None and site.shown and site.is_first("said"):
                site.say(repr(site))
        terms = total(formed, loss.device)
        if self.backwards is not None and torch.is_grad_enabled() and any([run.can_be_lost for run in counted]):
            # The node of this view is newer than all marks, so that a backward gets to it before it gets to a mark.
            terms = terms._replace(penalty=terms.penalty.view_as(terms.penalty))
            terms.penalty.register_hook(self._settle)
        return terms

    def _case_without(self, loss: Tensor, training: Sequence[Site]) -> str:
        """Return the case of a loss that depends on no run."""
        most = {site.most for site in training} - {NO_CALL}
        if not training:
            return "all modules are in evaluation"
        if most == {FROZEN} or (not most and all([site.was_frozen for site in training])):
            return "only frozen modules ran"
        may_be_lost = loss.requires_grad or RUN in most or not most
        return "the loss depends on no run" if may_be_lost else "nothing needs a gradient"

    def _check(self, counted: Sequence[Run], given: Sequence[Coefficient]) -> None:
        """Report errors and warnings of the runs that count for a loss."""
        stamps = stamps_of(given)
        for run in counted:
            if run.stamps != stamps:
                report("a coefficient changed", [run.site])
        single = [run.site for run in counted if run.is_one_step]
        for site, count in Counter(single).most_common() if single else ():  # an error comes before all warnings
            if count > 3 and is_on(given[1]):
                report("four runs over one step", [site], count)
            if count > 1 and site.is_first("several runs over one step"):
                report("several runs over one step", [site], count)

    def clear(self, *sites: Site) -> None:
        """Drop the runs of sites; without arguments, of all."""
        among = sites or self.sites
        for run in self.held():
            if run.site in among:
                run.end()
        for site in among:
            site.waiting, site.most, site.constant, site.was_frozen = 0, NO_CALL, None, False

    def held(self) -> list[Run]:
        """Return the runs that are held, and forget all others."""
        held = [run for x in self.runs if (run := x()) is not None and run.is_held]
        self.runs = [*map(ref, held)]
        return held

    # A backward

    @untraced
    def passed(self, run: Run, leaf: Any) -> None:
        """Note that a backward runs through a mark; warn if it is the second one, and no penalty got a gradient.

        Args:
            run: the run of the mark.
            leaf: the node of a leaf before the mark.
        """
        if self.backwards is None or not accumulates(leaf):
            return
        self.backwards.add(current())
        if len(self.backwards) > 1:
            self.backwards = None
            report("no penalty got a gradient", [run.site])

    def _settle(self, _: Tensor) -> None:
        """Note that a penalty has got a gradient."""
        self.backwards = None


def total(formed: Iterable[ARTAR], device: torch.device) -> ARTAR:
    """Add up the penalties and terms of runs, which may be on several devices."""
    on = [x if x.penalty.device == device else ARTAR(*[y.to(device) for y in x]) for x in formed]
    return reduce(lambda x, y: ARTAR(*map(torch.add, x, y)), on)
