"""Results of one machine each: JSON in bench/results, with a line for each row."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from bench.measure.machine import ALLOCATORS, DEFAULT, RESULTS
from bench.measure.timing import MOST_WAITING

BUSY = f"the machine was busy: threads waited for a core during more than {MOST_WAITING:.0%} of the time"
BOTH, STEP = "forward + backward", "step"  # passes of cases
TRAINERS = "Lightning", "Transformers", "fastai"  # passes, too, of steps that a trainer makes
# The ways as tables name them, and in this order: without a penalty, the formulas, and those that call fastreg.
WITHOUT = "no penalty"
CALL_COMPILED = "fused_ar_tar in compiled step"
FORMULAS = {
    "eager": "formula",
    "tight": "two lines",
    "compiled": "formula compiled",
    "compiled with dropout": "dropout and formula compiled",
    "compiled step": "whole step compiled",
}
OURS = {
    "fastreg": "fastreg",
    "fused_ar_tar": "`fused_ar_tar`",
    CALL_COMPILED: "whole step compiled, `fused_ar_tar`",
    "attach": "`attach`",
    "fused dropout": "fused dropout",
    "adapter": "adapter",
    "adapter with fused dropout": "adapter, fused dropout",
}
BASES = {
    "dropout alone": "dropout alone",
    "compiled dropout alone": "compiled dropout alone",
    "two-line dropout": "two-line dropout alone",
    "fused dropout alone": "fused dropout alone",
    "without lengths": "without lengths",
}
WAYS = {WITHOUT: "without"} | BASES | FORMULAS | OURS


class Figure(NamedTuple):
    """A median over rounds, and its standard error."""

    median: float
    error: float

    def differs_from(self, value: float) -> bool:
        """Return whether the value is further away than two standard errors."""
        return abs(self.median - value) > 2 * self.error

    def __str__(self) -> str:
        """Render a ratio, or say that it cannot be told from 1."""
        digits = 1 if self.median >= 10 else 2 if self.error >= 0.005 else 3
        return f"{self.median:.{digits}f}±{self.error:.{digits}f}" if self.differs_from(1) else self.lost()

    def percent(self) -> str:
        """Render by how many percent a ratio is above 1 or below it."""
        text = f"{100 * (self.median - 1):+.{self.digits}f} ± {100 * self.error:.{self.digits}f}%"
        return text.replace("-", "\N{MINUS SIGN}") if self.differs_from(1) else self.lost()

    def lost(self) -> str:
        return f"no difference seen, ±{100 * self.error:.{self.digits}f}%"

    @property
    def digits(self) -> int:
        """Return the decimals of a percentage."""
        return 0 if self.error >= 0.0095 else 1


@dataclass
class Case:
    """Ways that were measured in turns: the facts of all, and for each its statistics and its figures."""

    info: dict[str, Any]
    ways: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name the facts that tell a case from others of its pass."""
        shape = f"({', '.join(map(str, self.info['shape']))})"
        model, dtype, layout = (self.info.get(fact) for fact in ("model", "dtype", "layout"))
        layout = None if layout == "batch first" else layout
        counted = [f"{self.info[fact]} {fact}" for fact in ("programs", "dropout") if fact in self.info]
        return ", ".join(filter(None, [model, shape, dtype, layout, *counted]))

    def over(self, way: str, other: str) -> Figure:
        """Return the time of a way over the time of another one, by pairs of turns."""
        return Figure(*self.ways[way]["over"][other])

    def over_fastest(self, way: str) -> Figure | None:
        """Return the time of a way over the time of the fastest formula; `None` if one of them was not measured."""
        formulas = [formula for formula in FORMULAS if formula in self.ways]
        if way not in self.ways or not formulas:
            return None
        return self.over(way, min(formulas, key=lambda formula: self.ways[formula]["median"]))


@dataclass
class Result:
    """The result of one machine."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    cases: list[Case]
    missing: dict[str, str]

    @property
    def on_gpu(self) -> bool:
        return "copy_bandwidth" in self.machine

    def of(self, kind: str) -> list[Case]:
        """Return the cases of one pass."""
        return [case for case in self.cases if case.info["pass"] == kind]

    def parts(self) -> list[Result]:
        """Split the cases of a CPU by allocator, the default one first; a GPU's cases stay together."""
        parts = [[case for case in self.cases if case.info.get("allocator") == allocator] for allocator in ALLOCATORS]
        return [replace(self, cases=cases) for cases in parts if cases] or [self]


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one result of runs with different allocators; a row of a busy machine is missing."""
    rows, missing = {}, {}
    for run in runs:
        by_default = any(row["extra_info"].get("allocator") == DEFAULT for row in run["benchmarks"])
        suffix = f" ({DEFAULT})" * by_default
        missing |= {f"{test}{suffix}": why for test, why in run["missing"].items()}
        for row in run["benchmarks"]:
            group = row["group"] + suffix
            if row["extra_info"]["waiting"] > MOST_WAITING:
                missing[f"{group}/{row['name']}"] = BUSY
                continue
            kept = {"name": row["name"], "stats": {key: row["stats"][key] for key in ("median", "rounds")}}
            rows[group, row["name"]] = kept | {"group": group, "extra_info": row["extra_info"]}
    return runs[-1] | {"benchmarks": [*rows.values()], "missing": missing}


def compact(found: dict[str, Any]) -> str:
    """Return a merged result with a short line for each row. Numbers have five significant digits; pages show three."""
    found = json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    keys = "machine_info", "commit_info", "datetime", "version", "missing"
    parts = [f'"{key}": {json.dumps(found[key])}' for key in keys]
    parts.append('"benchmarks": [\n' + ",\n".join(map(json.dumps, found["benchmarks"])) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def result_of(found: dict[str, Any]) -> Result:
    cases: dict[str, Case] = {}
    for row in found["benchmarks"]:
        case = cases.setdefault(row["group"], Case(row["extra_info"]))
        case.ways[row["name"]] = row["extra_info"] | row["stats"]
    return Result(found["machine_info"], found["commit_info"], found["datetime"], [*cases.values()], found["missing"])


def load() -> list[Result]:
    """Read the results of all machines."""
    return [result_of(json.loads(file.read_text())) for file in sorted(RESULTS.glob("*.json"))]
