"""Test the tests: break a copy of the code in one random place at a time, and print what no test notices.

    python -m tests.mutants_sampler [--seed N] [--count N] [PATH...]    # in all code, or in some files and folders

A mutant drops one operand of an `and` or `or`, one statement of a function, one element of a tuple, such as a key, or
one `+ 1` or `- 1`. The tests of the code's folder must fail on it, and pass on the code as it is. A survivor lacks a
test, or it does what the code does. The same seed draws the same places from the same code.

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

ROOT = Path(__file__).resolve().parent.parent
COPIED = ["fastreg", "kernels", "tests", "bench", "pyproject.toml"]
# The folder of the code -> the folders of its tests; fastreg/ itself has the adapters, and files for tests/project
ROOMS = {
    "kernels": ["tests/kernels", "tests/call"],
    "fastreg/call": ["tests/call"],
    "fastreg/attach": ["tests/attach"],
    "fastreg": ["tests/adapters"],
}
ELSEWHERE = {"fastreg/__init__.py", "fastreg/__main__.py", "fastreg/installation.py"}
LIMIT = 900  # seconds, after which tests hang; tests/conftest.py ends most of those that do
MEMORY = 2**32  # bytes; a search without end fills more
OPTIONS = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", "not repeats_bitwise"]
OPTIONS += [
    "-W",
    "error:fastreg runs the plain formula on CPUs",
]  # else a library that fails to load would hide mutants
STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Delete, ast.Continue, ast.Break)
UNREAD = (ast.FunctionDef, ast.ClassDef, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)
WORDS, ABSTRACT = ("__repr__", "__str__"), b"raise NotImplementedError"  # functions that compute nothing
OPERATOR, STOPS = re.compile(r" (?:&&|\|\|) "), re.compile(r"[;,?]| = |&&|\|\|")
CPP_STATEMENT = re.compile(r"(?m)^ +((?:if \(.*\) )?(?:[\w.>\[\]*-]+ [-+|&*]?= .*|[\w:]+\(.*\)|continue|break));")


class Mutant(NamedTuple):
    """A part of a file, by the bytes where it begins and ends, and what takes its place."""

    file: str
    start: int
    stop: int
    new: bytes

    def source(self) -> bytes:
        """Return the whole file with the wrong place in it."""
        text = (ROOT / self.file).read_bytes()
        return text[: self.start] + self.new + text[self.stop :]

    def __str__(self) -> str:
        text = (ROOT / self.file).read_bytes()
        old, new = text.decode().splitlines(), self.source().decode().splitlines()
        changed = [
            f"    {line}" for line in unified_diff(old, new, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")
        ]
        return "\n".join([f"{self.file}:{len(text[: self.start].splitlines())}", *changed])


def mutants_of_python(file: str) -> Iterator[Mutant]:
    """Find the mutants of the functions of a file, and of kernels in Triton's language."""
    text = (ROOT / file).read_bytes()
    lines = [0, *accumulate(map(len, text.splitlines(keepends=True)))]

    def mutant(node: Any, new: bytes) -> Mutant:
        start, stop = lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset
        return Mutant(file, start, stop, new)

    def part(node: Any) -> bytes:
        """Return the text of an expression in parentheses, which may stand around it."""
        _, start, stop, _ = mutant(node, b"")
        return text[start:stop] if isinstance(node, ast.Starred) else b"(" + text[start:stop] + b")"

    def can_go(node: Any, bound: dict[str, int]) -> bool:
        """Return whether a mutant without a statement is worth a test: it binds no new name, which would be missing."""
        if isinstance(node, ast.If):
            return not node.orelse and part(node).startswith(b"(if ")
        if not isinstance(node, STATEMENTS) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return False
        names = [x for target in getattr(node, "targets", []) for x in ast.walk(target) if isinstance(x, ast.Name)]
        return all(isinstance(x.ctx, ast.Load) or bound[x.id] < node.lineno for x in names)

    def below(node: Any, bound: dict[str, int]) -> Iterator[Mutant]:
        """Find the mutants of a statement or an expression, but not those of messages."""
        if isinstance(node, UNREAD):
            return
        if can_go(node, bound):
            yield mutant(node, b"pass")
        if isinstance(node, ast.BoolOp):
            operator = b" and " if isinstance(node.op, ast.And) else b" or "
            for value in node.values:
                yield mutant(node, b"(" + operator.join(part(x) for x in node.values if x is not value) + b")")
        if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
            for element in node.elts:
                yield mutant(node, b"(" + b"".join(part(x) + b", " for x in node.elts if x is not element) + b")")
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            if isinstance(node.right, ast.Constant) and node.right.value == 1:
                yield mutant(node, part(node.left))
        is_many = isinstance(node, ast.Subscript) or (
            isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        )
        for child in () if isinstance(node, ast.Raise) else ast.iter_child_nodes(node):
            if not (is_many and isinstance(child, ast.Tuple)):  # indices, types, and as many values as names
                yield from below(child, bound)

    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef) and function.name not in WORDS and ABSTRACT not in part(function):
            stored = [x for x in ast.walk(function) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
            bound = {x.id: x.lineno for x in sorted(stored, key=lambda x: -x.lineno)}
            for statement in function.body:
                yield from below(statement, bound | {x.arg: 0 for x in function.args.args})


def mutants_of_cpp(file: str) -> Iterator[Mutant]:
    """Find the mutants of a file by its text: operands end at brackets, commas and the like."""
    text = (ROOT / file).read_text(encoding="latin-1")  # one character for each byte
    code = re.sub(r'//[^\n]*|"[^"\n]*"|#[^\n]*', lambda found: "_" * len(found[0]), text)

    def end(at: int, step: int) -> int:
        """Return where an operand ends that begins at a place, or where it begins that ends there."""
        depth, (opens, closes) = 0, ("([{", ")]}")[::step]
        while depth or not (code[at] in closes or STOPS.match(code, at) or (step < 0 and code[at] in "{}\n")):
            depth += (code[at] in opens) - (code[at] in closes)
            at += step
        return at

    for found in OPERATOR.finditer(code):
        yield Mutant(file, found.start(), end(found.end(), 1), b"")
        start = end(found.start(), -1) + 1
        start += len(re.match(r"\s*(?:[&|=] *)?(?:return )?", code[start:])[0])  # pyright: ignore[reportOptionalSubscript]
        yield Mutant(file, start, found.end(), b"")
    for found in re.finditer(r" [+-] 1\b(?![.\w])", code):
        yield Mutant(file, *found.span(), b"")
    for found in CPP_STATEMENT.finditer(code):
        yield Mutant(file, *found.span(1), b"")


def build(kernels: Path) -> bytes:
    """Build the C++ kernels in a copy, quickly, for this processor; return the library without the hash of its sources."""
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
    """Build the C++ kernels as they are."""
    with TemporaryDirectory() as folder:
        subprocess.run(["cp", "-r", ROOT / "kernels", folder], check=True)
        return build(Path(folder, "kernels"))


def run(copy: Path, tests: list[str], interpreted: bool) -> str:
    """Run the tests of some folders in a copy of the checkout; return the first failure, or "" if all pass."""
    slow = "numbers and not slow" if interpreted else "not slow", *([] if interpreted else ["slow"])
    for marks in slow:
        command = [sys.executable, "-m", "pytest", *OPTIONS, "-m", f"{marks} and not (gpu or more or triton)", *tests]
        command = [*command, "--sample=4"] if interpreted else ["prlimit", f"--data={MEMORY}", *command]
        own = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpreted))}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=copy, env=own, start_new_session=True, **pipes) as process:
            try:
                said, _ = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                return "tests that hang"
            finally:  # also the processes that tests have started
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode < 0:
            return signal.Signals(-process.returncode).name
        if process.returncode not in (0, 5):  # 5: no test has these marks
            return [*said.strip().splitlines(), *re.findall(r"(?m)^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said)][-1]
    return ""


def verdict(task: tuple[Mutant | None, str]) -> str:
    """Return what becomes of a mutant of a file, or of the code as it is."""
    mutant, file = task
    room = max((room for room in ROOMS if file.startswith(room)), key=len)
    with TemporaryDirectory() as folder:
        subprocess.run(["cp", "-a", *(ROOT / name for name in COPIED), folder], check=True)
        if mutant is not None:
            Path(folder, file).write_bytes(mutant.source())
        if file.endswith((".cpp", ".h")):
            try:
                if build(Path(folder, "kernels")) == library() and mutant is not None:
                    return "the same machine code"
            except subprocess.CalledProcessError:
                return "not compiled"
        failed = run(Path(folder), ROOMS[room], room == "kernels" and "cpu" not in file)
        return f"killed by {failed}" if failed else "SURVIVED"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.mutants_sampler", description=__doc__.partition("\n")[0])  # pyright: ignore
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "kernels", ROOT / "fastreg"])
    options = parser.parse_args()
    listed = [x for path in options.paths for x in ([path] if path.is_file() else path.rglob("*"))]
    files = sorted(
        {str(x.resolve().relative_to(ROOT)) for x in listed if x.suffix in (".py", ".cpp", ".h")} - ELSEWHERE
    )
    found = [
        x
        for file in files
        for x in dict.fromkeys((mutants_of_python if file.endswith(".py") else mutants_of_cpp)(file))
    ]
    drawn = random.Random(options.seed).sample(found, min(options.count, len(found)))
    print(f"{len(drawn)} of {len(found)} mutants, seed {options.seed}", flush=True)
    unbroken = {(file.rpartition("/")[0], "cpu" in file): (None, file) for _, file in [(x, x.file) for x in drawn]}
    tasks: list[tuple[Mutant | None, str]] = [*unbroken.values(), *((x, x.file) for x in drawn)]
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for (mutant, file), said in zip(tasks, pool.map(verdict, tasks), strict=True):
            if mutant is None and said != "SURVIVED":
                pool.shutdown(cancel_futures=True)
                parser.error(f"the code as it is, {file}: {said}")
            if mutant is not None:
                survivors += said == "SURVIVED"
                print(f"{mutant}\n  {said}", flush=True)
    print(f"{survivors} of {len(drawn)} survived", flush=True)
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
