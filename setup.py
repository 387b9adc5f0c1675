"""Build the kernels for CPUs, once for each level of processors, of which the best that runs is loaded.

All else is in pyproject.toml. Without a compiler that knows these options the installation goes on without kernels.
"""

from __future__ import annotations

import shutil
from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

SOURCE = Path("kernels", "cpu.cpp")
HEADERS = sorted(SOURCE.parent.glob("cpu_*.h"))
LEVELS = {"_cpu": [], "_cpu_v3": ["-march=x86-64-v3"]}
OPTIONS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden"),
    "-ffp-contract=off",  # the same roundings in all builds
    *("-fno-math-errno", "-fno-trapping-math"),  # what nobody looks at, and keeps loops from vector code
]


class Build(build_ext):
    """Build with OpenMP where the compiler has it, and not again what an editable installation has built already."""

    def build_extension(self, ext: Extension) -> None:
        """Build one library."""
        target = Path(self.get_ext_fullpath(ext.name))
        built = SOURCE.parent / target.name
        sources = (SOURCE, *HEADERS, Path(__file__))
        if self.editable_mode and built.exists() and built.stat().st_mtime > max(x.stat().st_mtime for x in sources):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)
            return
        own = copy(self)  # objects of its own: another level is compiled from the same source at the same time
        own.build_temp = str(Path(self.build_temp, ext.name))
        try:
            build_ext.build_extension(own, ext)
        except BaseError:
            target.unlink(missing_ok=True)  # what an earlier build has left
            for options in (ext.extra_compile_args, ext.extra_link_args):
                options.remove("-fopenmp")
            build_ext.build_extension(own, ext)


class Wheel(bdist_wheel):
    """One wheel serves every Python: the libraries use nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Name the platform alone."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"fastreg.kernels.{name}",
            [str(SOURCE)],
            depends=[str(header) for header in HEADERS],
            extra_compile_args=["-fopenmp", *level, *OPTIONS],
            extra_link_args=["-fopenmp"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
        for name, level in LEVELS.items()
    ],
    options={"build_ext": {"parallel": True}},
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
