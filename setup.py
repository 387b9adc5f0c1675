"""Build the kernels for CPUs, once for each level of processors.

Everything else is in pyproject.toml. Without a compiler that knows these options the installation goes on without
kernels.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from copy import copy
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import BaseError

SOURCE = Path("kernels", "cpu.cpp")
HEADERS = sorted(SOURCE.parent.glob("cpu_*.h"))
LEVELS = {"_cpu": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {f"_cpu_v{level}": [f"-march=x86-64-v{level}"] for level in (3, 4)}
# kernels/cpu.py computes the same hash: in a source tree it loads no library that was built from other sources.
SOURCES = sha256(b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))).hexdigest()[:16]
OPTIONS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden"),
    "-ffp-contract=off",  # the same roundings in all builds
    f"-DSOURCES=0x{SOURCES}",
    *("-fno-math-errno", "-fno-trapping-math"),  # errno and exceptions are unused, and would prevent vectorization
]


class Build(build_ext):
    """Build with GNU OpenMP if the compiler has it, and also leave the libraries in the source tree.

    If the source tree is the current folder, Python imports the package from there, installed or not.
    """

    def finalize_options(self) -> None:
        """Build all levels at the same time; an editable installation would drop an option that `setup` gets."""
        super().finalize_options()
        self.parallel = True

    def build_extension(self, ext: Extension) -> None:
        """Build one library, unless the source tree has it, built from these sources; a wheel has only new ones."""
        target = Path(self.get_ext_fullpath(ext.name))
        built = SOURCE.parent / target.name
        if "bdist_wheel" not in self.distribution.commands and is_current(built):
            replace(target, built)
            return
        own = copy(self)  # with its own object files, as other levels compile the same source at the same time
        own.build_temp = str(Path(self.build_temp, ext.name))
        own.force = True  # the compiler may be another one
        try:
            build_ext.build_extension(own, ext)
            shared = b"libgomp" in target.read_bytes()
        except BaseError:
            shared = False
        if not shared:  # there is no OpenMP, or it is Clang's, which must not run beside PyTorch's
            target.unlink(missing_ok=True)
            for options in (ext.extra_compile_args, ext.extra_link_args):
                options.remove("-fopenmp")
            build_ext.build_extension(own, ext)
        replace(built, target)


class Wheel(bdist_wheel):
    """Build one wheel for every version of Python, because the libraries do not use Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return a tag that names only the platform."""
        return "py3", "none", super().get_tag()[2]


class Source(sdist):
    """Keep the link that makes a source tree importable."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Add the link, which setuptools leaves out."""
        super().make_release_tree(base_dir, files)
        Path(base_dir, "fastreg", "kernels").symlink_to("../kernels")


def is_current(library: Path) -> bool:
    """Return whether a library was built from these sources, with these options."""
    if not library.exists() or library.stat().st_mtime < Path(__file__).stat().st_mtime:
        return False
    return int(SOURCES, 16).to_bytes(8, sys.byteorder) in library.read_bytes()


def replace(old: Path, new: Path) -> None:
    """Replace a library by a copy, as other processes may have loaded it."""
    old.parent.mkdir(parents=True, exist_ok=True)
    beside = old.with_name(f"new{old.name}")  # not as libraries are named, which are found by the names' beginnings
    shutil.copy2(new, beside)
    os.replace(beside, old)


setup(
    ext_modules=[
        Extension(
            f"fastreg.kernels.{name}",
            [str(SOURCE)],
            depends=["setup.py", *map(str, HEADERS)],
            extra_compile_args=["-fopenmp", *level, *OPTIONS],
            extra_link_args=["-fopenmp"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
        for name, level in LEVELS.items()
    ],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel, "sdist": Source},
)
