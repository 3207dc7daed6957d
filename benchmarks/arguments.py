"""Types of arguments for argparse, which names the argument in front of what they find wrong.

Nothing but the standard library, as where results are only drawn.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """Integers from `least` on."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise ArgumentTypeError(f"got {value}, expected at least {least}")
        return value

    return integer


positive = at_least(1)


def seconds(text: str) -> float:
    """A time to aim for; with 0 it is the least that a script measures."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"got {value:g}, expected at least 0, in seconds")
    return value


def output(text: str) -> Path:
    """A file to write: its directory is there, or hours later nothing could be written."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{path.absolute().parent} is not a directory")
    return path
