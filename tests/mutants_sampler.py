"""Test the tests: break a copy of the code in one random place at a time, and print the faults that no test notices.

    python -m tests.mutants_sampler [--seed N] [--count N] [PATH...]    # in all code, or in some files and folders

A mutant drops one operand of an `and` or `or`, one statement of a function, one element of a tuple, such as a key, or
one `+ 1` or `- 1`. The tests of the code's folder must fail on it, and pass on the unchanged code. A survivor lacks a
test, or its results are those of the code. The same seed draws the same places from the same code.

Triton's interpreter runs one program after the other, so faults that only a GPU shows (barriers, streams) survive.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from difflib import unified_diff
from functools import cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ["fastreg", "kernels", "tests", "bench", "pyproject.toml"]
# The folder of the code -> the folders of its tests
ROOMS = {
    "kernels": ["tests/kernels", "tests/call"],
    "fastreg/call": ["tests/call"],
    "fastreg/attach": ["tests/attach"],
    "fastreg": ["tests/adapters"],
}
UNREAD = re.compile(r"fastreg/(__init__|__main__|installation)\.py")  # tests/project tests these
LIMIT = 900  # seconds for the tests of a mutant; tests/conftest.py ends a test that hangs earlier
OPTIONS = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", "not repeats_bitwise"]
OPTIONS += ["-W", "error:fastreg runs the plain formula on CPUs"]  # which would hide mutants of the kernels
STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Delete, ast.Continue, ast.Break)
CPP_STATEMENT = re.compile(r"(?m)^ +((?:if \(.*\) )?(?:[\w.>\[\]*-]+ [-+|&*]?= .*|[\w:]+\(.*\)|continue|break));")


class Mutant(NamedTuple):
    """A part of a file, by the bytes where it begins and ends, and the text that takes its place."""

    file: str
    start: int
    stop: int
    new: bytes = b""

    def source(self) -> bytes:
        """Return the whole file with the wrong place in it."""
        text = (ROOT / self.file).read_bytes()
        return text[: self.start] + self.new + text[self.stop :]

    def __str__(self) -> str:
        text = (ROOT / self.file).read_bytes()
        _, _, hunk, *changes = unified_diff(text.decode().split("\n"), self.source().decode().split("\n"), n=0)
        return "\n    ".join([f"{self.file}:{re.findall('[0-9]+', hunk)[0]}", *changes])


class Function:
    """A function in Python, or a kernel in Triton's language, in which each node has mutants."""

    def __init__(self, file: str, text: bytes, function: ast.FunctionDef) -> None:
        self.file, self.text = file, text
        self.lines = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
        names = [x for x in ast.walk(function) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
        self.bound = {x.id: x.lineno for x in sorted(names, key=lambda x: -x.lineno)}  # where each name is bound first
        self.bound |= {x.arg: 0 for x in function.args.args}

    def mutant(self, node: Any, new: bytes) -> Mutant:
        start = self.lines[node.lineno - 1] + node.col_offset
        stop = self.lines[node.end_lineno - 1] + node.end_col_offset
        return Mutant(self.file, start, stop, new)

    def part(self, node: Any) -> bytes:
        """Return the text of an expression in parentheses, which may stand around it."""
        _, start, stop, _ = self.mutant(node, b"")
        return self.text[start:stop] if isinstance(node, ast.Starred) else b"(" + self.text[start:stop] + b")"

    def can_go(self, node: Any) -> bool:
        """Return whether a statement is worth dropping: it is no docstring, and binds no name for the first time."""
        if isinstance(node, ast.If):
            return not node.orelse and self.part(node).startswith(b"(if ")
        names = [x for target in getattr(node, "targets", []) for x in ast.walk(target) if isinstance(x, ast.Name)]
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_first = any(isinstance(x.ctx, ast.Store) and self.bound[x.id] == node.lineno for x in names)
        return isinstance(node, STATEMENTS) and not is_text and not is_first

    def mutants(self, node: Any) -> Iterator[Mutant]:
        """Find the mutants of a statement or an expression, but leave out messages, indices and types."""
        if self.can_go(node):
            yield self.mutant(node, b"pass")
        is_tuple = isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1
        parts = node.values if isinstance(node, ast.BoolOp) else node.elts if is_tuple else []
        glue = b", " if is_tuple else b" and " if isinstance(getattr(node, "op", None), ast.And) else b" or "
        for left_out in parts:
            kept = glue.join(self.part(x) for x in parts if x is not left_out)
            yield self.mutant(node, b"(" + kept + b"," * is_tuple + b")")
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)) and self.part(node.right) == b"(1)":
            yield self.mutant(node, self.part(node.left))
        is_paired = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)  # as many values as names
        for child in [] if isinstance(node, (ast.Raise, ast.JoinedStr)) else ast.iter_child_nodes(node):
            if isinstance(child, ast.Tuple) and (is_paired or isinstance(node, ast.Subscript)):
                continue
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield from self.mutants(child)


def mutants_of_python(file: str) -> Iterator[Mutant]:
    """Find the mutants of the functions of a file that compute something."""
    text = (ROOT / file).read_bytes()
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef) and function.name not in ("__repr__", "__str__"):
            own = Function(file, text, function)
            if b"raise NotImplementedError" not in own.part(function):
                for statement in function.body:
                    yield from own.mutants(statement)


def mutants_of_cpp(file: str) -> Iterator[Mutant]:
    """Find the mutants of a file by its text: operands end at brackets, commas and the like."""
    text = (ROOT / file).read_text(encoding="latin-1")  # one character for each byte
    code = re.sub(r'//[^\n]*|"[^"\n]*"|#[^\n]*', lambda found: "_" * len(found[0]), text)
    stops = re.compile(r"[;,?]| = |&&|\|\||return ")

    def end(at: int, step: int) -> int:
        """Return where an operand ends that begins at a place, or the place before it if it ends there."""
        depth, (opens, closes) = 0, ("([{", ")]}")[::step]
        while depth or not (code[at] in closes + "\n" or stops.match(code, at)):
            depth += (code[at] in opens) - (code[at] in closes)
            at += step
        return at

    for operator in re.finditer(r" (?:&&|\|\|) ", code):
        yield Mutant(file, operator.start(), end(operator.end(), 1))
        before = end(operator.start(), -1)
        skipped = re.compile(r"return |&& |\|\| | = |[^\w!]\s*").match(code, before)
        yield Mutant(file, skipped.end() if skipped else before, operator.end())
    for found in re.finditer(r" [+-] 1\b(?![.\w])", code):
        yield Mutant(file, *found.span())
    for found in CPP_STATEMENT.finditer(code):
        yield Mutant(file, *found.span(1))


def build(kernels: Path) -> bytes:
    """Build the C++ kernels of a copy for this processor, and return the library without the hash of its sources."""
    for library in kernels.glob("*.so"):
        library.unlink()
    sources = b"".join(file.read_bytes() for file in (kernels / "cpu.cpp", *sorted(kernels.glob("cpu_*.h"))))
    key = sha256(sources).hexdigest()[:16]  # as in setup.py
    options = ["-std=c++17", "-O1", "-w", "-march=native", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"]
    command = ["g++", *options, "-shared", "-fPIC", f"-DSOURCES=0x{key}", "cpu.cpp", "-o", "_cpu.abi3.so"]
    subprocess.run(command, cwd=kernels, check=True, capture_output=True)
    return (kernels / "_cpu.abi3.so").read_bytes().replace(int(key, 16).to_bytes(8, sys.byteorder), b"")


@cache
def library() -> bytes:
    """Build the unchanged C++ kernels."""
    with TemporaryDirectory() as folder:
        subprocess.run(["cp", "-r", ROOT / "kernels", folder], check=True)
        return build(Path(folder, "kernels"))


def failure(folder: Path, tests: list[str], interpreted: bool) -> str:
    """Run some folders of tests in a copy of the checkout, the slow ones last; return the first failure, or ""."""
    for marks in ["numbers and not slow"] if interpreted else ["not slow", "slow"]:
        command = [sys.executable, "-m", "pytest", *OPTIONS, "-m", f"{marks} and not (gpu or more or triton)", *tests]
        # A search without end would fill the memory; interpreted tests reserve more than they use.
        command = [*command, "--sample=4"] if interpreted else ["prlimit", f"--data={2**32}", *command]
        own: Any = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": f"{interpreted:d}"}}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        with subprocess.Popen(command, **own, **pipes) as process:
            try:
                said, _ = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # also the processes that the tests have started
                return "tests that hang"
        if process.returncode < 0:
            return signal.Signals(-process.returncode).name
        if process.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            return [*said.split("\n"), *re.findall(r"(?m)^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said)][-1]
    return ""


def verdict(task: tuple[str, Mutant | None]) -> str:
    """Say whether a test fails on a mutant of a file, or on the unchanged code."""
    file, mutant = task
    room = max((room for room in ROOMS if file.startswith(room)), key=len)
    with TemporaryDirectory() as folder:
        subprocess.run(["cp", "-a", *(ROOT / name for name in COPIED), folder], check=True)
        if mutant is not None:
            Path(folder, file).write_bytes(mutant.source())
        if mutant is not None and not file.endswith(".py"):
            try:
                if build(Path(folder, "kernels")) == library():
                    return "the same machine code"
            except subprocess.CalledProcessError:
                return "not compiled"
        failed = failure(Path(folder), ROOMS[room], room == "kernels" and "cpu" not in file)
        return f"killed by {failed}" if failed else "SURVIVED"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.mutants_sampler", description="Break a copy of the code, and test it.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "kernels", ROOT / "fastreg"])
    options = parser.parse_args()
    listed = {
        x.resolve() for path in options.paths for x in (path, *path.rglob("*")) if x.suffix in (".py", ".cpp", ".h")
    }
    files = [file for file in sorted(str(x.relative_to(ROOT)) for x in listed) if not UNREAD.match(file)]
    found = dict.fromkeys(x for file in files for x in (mutants_of_python if file[-1] == "y" else mutants_of_cpp)(file))
    drawn = random.Random(options.seed).sample([*found], min(options.count, len(found)))
    print(f"{len(drawn)} of {len(found)} mutants, seed {options.seed}", flush=True)
    whole = {(os.path.dirname(x.file), "cpu" in x.file): (x.file, None) for x in drawn}  # one file for each kind of run
    tasks: list[tuple[str, Mutant | None]] = [*whole.values(), *((x.file, x) for x in drawn)]
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for (file, mutant), said in zip(tasks, pool.map(verdict, tasks), strict=True):
            if mutant is None and said != "SURVIVED":
                pool.shutdown(cancel_futures=True)
                parser.error(f"the tests of {file} fail on the unchanged code: {said}")
            if mutant is not None:
                print(f"{mutant}\n    {said}", flush=True)
                survivors += said == "SURVIVED"
    parser.exit(survivors > 0, f"{survivors} of {len(drawn)} survived\n")


if __name__ == "__main__":
    main()
