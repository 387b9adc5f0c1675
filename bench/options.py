"""Options on a command line: errors in one line, and numbers within bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
    """A parser of finite numbers from `least` up."""
    what, below = ("a whole number", 2**63) if kind is int else ("a finite number", math.inf)  # 2**63 bounds a seed

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= (value := kind(text)) < below:
                return value
        raise argparse.ArgumentTypeError(f"must be {what}, {least} or more, got {text!r}")

    return parse
