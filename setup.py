"""Build the kernels for CPUs, once for each level of processors, of which the best that runs is loaded.

All else is in pyproject.toml. Without a compiler that knows these options the installation goes on without kernels.
"""

from __future__ import annotations

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

LEVELS = {"_cpu": [], "_cpu_v3": ["-march=x86-64-v3"], "_cpu_v4": ["-march=x86-64-v4"]}
OPTIONS = [
    *("-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden"),
    "-ffp-contract=off",  # the same roundings in all builds
    *("-fno-math-errno", "-fno-trapping-math"),  # what nobody looks at, and keeps loops from vector code
    "-fno-unswitch-loops",  # loops that need it have copies already
]


class Wheel(bdist_wheel):
    """One wheel serves every Python: the libraries use nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Name the platform alone."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"fastreg.kernels.{name}",
            ["kernels/cpu.cpp"],
            extra_compile_args=[*level, *OPTIONS],
            extra_link_args=["-fopenmp"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
        for name, level in LEVELS.items()
    ],
    options={"build_ext": {"parallel": True}},
    cmdclass={"bdist_wheel": Wheel},
)
