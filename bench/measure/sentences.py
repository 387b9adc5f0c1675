"""The part of the README about speed, in sentences, and the summary of docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product

from bench.measure.results import BOTH, FORMULAS, OURS, STEP, Case, Figure, Result, geometric_mean

ALLOCATORS = "docs/performance.md#two-allocators"
LOSING = "docs/performance.md#where-fastreg-loses"
CHEAP, SMALL, LARGE = "8 elementwise layers", "LSTM", "AWD-LSTM"  # models of the steps that are compared
REMEDIES = {  # the pass and the way that are slow -> words for both, and a remedy
    ("dropout", "fused_ar_tar"): ("After a dropout, `fused_ar_tar`", ": use `FusedRNNDropout`"),
    (STEP, "attach"): ("A step with `attach`", ": use the call"),
}


def of(result: Result) -> Iterator[str]:
    """Return sentences about the results of one machine: those whose cases were measured."""
    parts = result.parts()
    if {CHEAP, SMALL, LARGE} <= {case.info["model"] for case in parts[0].of(STEP)}:
        yield steps(parts[0])
    if measured := [part for part in reversed(parts) if part.of(BOTH)]:
        yield " ".join([call(measured[0]), *map(with_memory_kept, measured[1:])])
    yield from worst(result)


def steps(part: Result) -> str:
    """Compare whole steps with the faster formula, by kinds of models."""

    def ratio(model: str, way: str) -> str:
        return change(over_faster([case for case in part.of(STEP) if case.info["model"] == model], way))

    return (
        f"Against the faster of both formulas, a step with `fused_ar_tar` is {ratio(CHEAP, 'fused_ar_tar')} with cheap "
        f"layers, {ratio(SMALL, 'fused_ar_tar')} with small LSTMs (`attach`: {ratio(SMALL, 'attach')}), and "
        f"{ratio(LARGE, 'fused_ar_tar')} with an AWD-LSTM."
    )


def change(figures: Iterable[Figure]) -> str:
    """Say by how much ratios differ from 1, as in "0 to 5% shorter"; 0 stands for one that cannot be told from 1."""
    percents = [round(100 * (figure.median - 1)) if figure.differs_from(1) else 0 for figure in figures]
    low, high = min(percents), max(percents)
    if low < 0 < high:
        return f"between {-low}% shorter and {high}% longer"
    if low == high == 0:
        return "the same within the error"
    numbers = dict.fromkeys(f"{x}" for x in sorted(map(abs, (low, high))))
    return f"{' to '.join(numbers)}% {'longer' if high > 0 else 'shorter'}"


def means(part: Result) -> list[str]:
    """Return the mean ratio of calls to the compiled formula, and to the eager one."""
    return [f"{geometric_mean([case.over('fastreg', x) for case in part.of(BOTH)]).median:.2f}" for x in FORMULAS]


def call(part: Result) -> str:
    """Compare a call with both formulas, and count the cases in which it is not faster than the compiled one."""
    compiled, eager = means(part)
    cases = sorted(part.of(BOTH), key=lambda case: -math.prod(case.info["shape"]))
    ties = [case for case in cases if not case.over("fastreg", "compiled").differs_from(1)]
    are_largest, number = ties == cases[: len(ties)], len(ties)
    if number == 1:
        tied = f" {'The largest' if are_largest else 'One'} of {len(cases)} cases ties with the compiled formula."
    else:
        which = f"The {number} largest" if are_largest else f"{number}"
        tied = f" {which} of {len(cases)} cases tie with the compiled formula." if ties else ""
    return f"One call takes {compiled} of the compiled formula's time and {eager} of the eager formula's.{tied}"


def with_memory_kept(part: Result) -> str:
    return f"[If malloc keeps freed memory]({ALLOCATORS}): {' and '.join(means(part))}."


def over_faster(cases: list[Case], way: str) -> list[Figure]:
    """Return the ratios of a way to the faster formula."""
    return [figure for case in cases if (figure := case.over_faster(way)) is not None]


def worst(result: Result) -> Iterator[str]:
    """Name the row that loses most against the faster formula, if one loses, with its allocator and a remedy."""
    rows = [(figure, case, way) for case, way in product(result.cases, OURS) if (figure := case.over_faster(way))]
    figure, case, way = max(rows, key=lambda row: row[0])
    if figure.median > 1 and figure.differs_from(1):
        slow, remedy = REMEDIES.get((case.info["pass"], way), (OURS[way], ""))
        allocator = f" ({case.info['allocator']})" * bool(case.info.get("allocator"))
        yield f"{slow} takes [up to]({LOSING}) {figure} times the formula's time{allocator}{remedy}."


def summary(result: Result) -> list[list[str]]:
    """Return the rows of a table: the time of whole steps and of calls over the time with the faster formula."""
    first, ways = result.parts()[0], ("fused_ar_tar", "attach", "FusedRNNDropout")
    rows = [["over the faster formula", *(OURS[way] for way in ways)]]
    for model in (CHEAP, SMALL, LARGE):
        if cases := [case for case in first.of(STEP) if case.info["model"] == model]:
            shapes = " and ".join(f"({', '.join(map(str, case.info['shape']))})" for case in cases)
            rows.append([f"step, {model}, {shapes}", *("; ".join(map(str, over_faster(cases, way))) for way in ways)])
    for part in reversed(result.parts()):
        alone, dropped = (over_faster(part.of(kind), "fastreg") for kind in (BOTH, "dropout"))
        cells = [f"{geometric_mean(figures)}" if figures else "" for figures in (alone, [], dropped)]
        rows.append([", ".join(filter(None, ["call, mean", part.cases[0].info.get("allocator")])), *cells])
    return rows
