"""Test the tests: break a copy of the code in one random place at a time, and print the faults that no test notices.

    python -m tests.mutants [--seed N] [--count N] [PATH...]    # in all code, or in some files and folders

A mutant lacks one operand of an `and` or `or`, one statement, one element of a tuple, such as a key, or one `+ 1` or
`- 1`. The tests of the code's folder must fail on it, and pass on the unchanged code. A survivor lacks a test, or has
the same results. The same seed draws the same places from the same code.

Triton's interpreter runs one program after the other, so faults that only a GPU shows (barriers, streams) survive.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from difflib import unified_diff
from functools import partial
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

COPIED = ["fastreg", "kernels", "tests", "bench", "examples", "pyproject.toml", "setup.py"]
ROOMS = {  # the folder of the code -> the folders of its tests
    "kernels": ["tests/kernels", "tests/call"],
    "fastreg/call": ["tests/call"],
    "fastreg/attach": ["tests/attach", "tests/adapters"],
    "fastreg": ["tests/adapters"],
}
ELSEWHERE = ("__init__.py", "__main__.py")  # tests/project tests these
OPTIONS = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", "not repeats_bitwise"]  # which takes long
OPTIONS += ["-W", "error:fastreg runs the plain formula on CPUs"]  # which would hide mutants of the kernels
TIME, MEMORY = ["timeout", "--signal=KILL", "900"], ["prlimit", f"--data={2**32}"]  # seconds, also of a hang, and bytes
BUILD = [sys.executable, "setup.py", "--quiet", "build_ext"]
STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Delete, ast.Continue, ast.Break, ast.If)
# In C++ an operand ends at a separator, or at a bracket that does not begin in it.
OPERAND = r"(?:[^&|;?:,(){}=]|::|[<>!=]=|(?<!&)&(?!&)|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))+"
CPP = [  # the first group of a match is left out
    rf"(?:(?<=[({{])|(?<=[,;{{] )|(?<=[^=!<>]= )|(?<=return ))(?!\s|return )({OPERAND}(?:&&|\|\|) )",
    rf"( (?:&&|\|\|){OPERAND})",
    r"( [+-] 1\b)(?![.\w])",
    r"^ +((?:if \(.*\) )?(?:[\w.>\[\]*-]+ [-+|&*]?= .*|[\w:]+\(.*\)|continue|break));",
]
Version = tuple[int, Callable[[], str]]  # the line of a fault, and a function that writes the whole file


class Mutant(NamedTuple):
    """A version of a file by its number; number 0 has no fault."""

    file: str
    number: int = 0

    def source(self) -> tuple[int, str]:
        """Return the line of the fault, and the whole file."""
        line, write = next(islice(versions(self.file), self.number, None))
        return line, write()

    def __str__(self) -> str:
        line, text = self.source()
        _, _, _, *changes = unified_diff(Mutant(self.file).source()[1].split("\n"), text.split("\n"), n=0)
        return "\n    ".join([f"{self.file}:{line}", *changes])


def versions(file: str) -> Iterator[Version]:
    """Find a file without a fault, and with each of its faults. Each can be written until the next one is found."""
    text = Path(file).read_text()
    return versions_of_python(ast.parse(text)) if file.endswith(".py") else versions_of_cpp(text.split("\n"))


def versions_of_python(tree: ast.Module) -> Iterator[Version]:
    """Change one node of the tree at a time, in Python or in Triton's language, and change it back."""
    write = partial(ast.unparse, tree)
    yield 0, write
    for parent in ast.walk(tree):
        is_paired = isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Tuple)
        for field, value in ast.iter_fields(parent):
            if isinstance(value, ast.Tuple) and (field == "slice" or is_paired):  # of types, or as many as names
                continue
            nodes = value if isinstance(value, list) else [value]
            for i, node in enumerate(nodes):
                for new in shortened(node):
                    setattr(parent, field, [*nodes[:i], new, *nodes[i + 1 :]] if nodes is value else new)
                    yield node.lineno, write
            setattr(parent, field, value)


def shortened(node: object) -> Iterator[ast.AST]:
    """List the forms of a node that lack one operand, one element or `+ 1`; a statement may be missing."""
    if isinstance(node, ast.BoolOp):
        yield from (ast.BoolOp(node.op, [x for x in node.values if x is not out]) for out in node.values)
    elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        yield from (ast.Tuple([x for x in node.elts if x is not out], node.ctx) for out in node.elts)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)) and ast.unparse(node.right) == "1":
        yield node.left
    elif isinstance(node, STATEMENTS) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        names = [x for x in ast.walk(node) if isinstance(x, ast.Name)] if isinstance(node, ast.Assign) else []
        bound, read = ({x.id for x in names if isinstance(x.ctx, kind)} for kind in (ast.Store, ast.Load))
        if bound <= read:  # otherwise a name may never be bound
            yield ast.Pass()


def versions_of_cpp(lines: list[str]) -> Iterator[Version]:
    """Change one line at a time, by its text."""
    yield 0, lambda: "\n".join(lines)
    for i, line in enumerate(lines):
        code = re.sub("//.*|^#.*", "", line)
        for found in (x for pattern in CPP for x in re.finditer(pattern, code)):
            changed = line[: found.start(1)] + line[found.end(1) :]
            yield i + 1, lambda i=i, changed=changed: "\n".join([*lines[:i], changed, *lines[i + 1 :]])


def build(folder: str) -> bool:
    """Build the C++ kernels of a copy; return whether they could be compiled."""
    for library in Path(folder, "kernels").glob("*.so"):
        library.unlink()
    subprocess.run(BUILD, cwd=folder, capture_output=True)  # without a library it succeeds, too
    return any(Path(folder, "kernels").glob("*.so"))


def room_of(file: str) -> str:
    return max((room for room in ROOMS if file.startswith(room)), key=len)


def runs(file: str) -> Iterator[tuple[bool, str]]:
    """List how tests run for a file, interpreted or not, and where they are: in the file of the same name first."""
    room, own = room_of(file), Path().glob(f"tests/*/test_{Path(file).stem}.py")
    ways = (True, False) if room == "kernels" and file.endswith(".py") else (False,)  # Triton and C++ share code
    return product(ways, [*map(str, own), *ROOMS[room]])


def verdict(mutant: Mutant) -> str:
    """Run the tests on a mutant in a copy of the checkout until one fails."""
    with TemporaryDirectory() as folder:
        subprocess.run(["cp", "-a", *COPIED, folder], check=True)
        Path(folder, mutant.file).write_text(mutant.source()[1])
        if not mutant.file.endswith(".py") and not build(folder):
            return "not compiled"
        for interpreted, tests in runs(mutant.file):
            # A search without end would fill the memory. The interpreter reserves more than it uses.
            command = [*TIME, *MEMORY * (not interpreted), sys.executable, "-m", "pytest", *OPTIONS, tests]
            command += ["-m", "numbers and " * interpreted + "not (gpu or more)", f"--sample={4 if interpreted else 1}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": f"{interpreted:d}"}
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
                return f"killed by {[tests, *re.findall('(?m)^(?:FAILED|ERROR) (.+?)(?: - .*)?$', done.stdout)][-1]}"
    return "SURVIVED"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.mutants", description="Break a copy of the code, and test it.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("paths", nargs="*", default=["kernels", "fastreg"])
    options = parser.parse_args()
    tracked = subprocess.run(["git", "ls-files", *options.paths], stdout=-1, text=True, check=True).stdout.split()
    files = [x for x in tracked if x.endswith((".py", ".cpp", ".h")) and not x.endswith(ELSEWHERE)]
    found = [Mutant(file, number) for file in files for number, _ in enumerate(versions(file)) if number]
    drawn = random.Random(options.seed).sample(found, min(options.count, len(found)))
    print(f"{len(drawn)} of {len(found)} mutants, seed {options.seed}", flush=True)
    whole = [*{room_of(x.file): Mutant(x.file) for x in drawn}.values()]
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, said in zip([*whole, *drawn], pool.map(verdict, [*whole, *drawn]), strict=True):
            if mutant.number:
                print(f"{mutant}\n    {said}", flush=True)
                survivors += said == "SURVIVED"
            elif said != "SURVIVED":
                pool.shutdown(cancel_futures=True)
                parser.error(f"on the unchanged code of {mutant.file}: {said}")
    parser.exit(survivors > 0, f"{survivors} of {len(drawn)} survived\n")


if __name__ == "__main__":
    main()
