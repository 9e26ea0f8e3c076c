"""Values that benchmarks take on their command lines; what cannot be read is refused with the option and the value."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pipeline.config.types import LEAST_TEMPERATURE
from pipeline.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence, as every command of ours does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def names(text: str) -> list[str]:
    """Comma-separated words."""
    return [part.strip() for part in text.split(",") if part.strip()]


def at_least(least: int, most: int = 1 << 31) -> Callable[[str], int]:
    """An integer that is not smaller, nor larger than `most`."""

    def read(text: str) -> int:
        value = int(_number(text, int, "a whole number"))
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; give at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large; give at most {most}")
        return value

    return read


SEED = at_least(0, 10**9)


def temperature(text: str) -> float:
    """0, or a number that logits can be divided by."""
    value = float(_number(text, float, "a number"))
    if not (value == 0 or LEAST_TEMPERATURE <= value < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is no temperature; give 0 (greedy) or at least {LEAST_TEMPERATURE:g}")
    return value


def files(text: str) -> list[Path]:
    """Comma-separated paths; at least one of them."""
    if not names(text):
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return [Path(part) for part in names(text)]


def integers(least: int = 1) -> Callable[[str], list[int]]:
    """Comma-separated integers, none of them smaller; at least one of them."""
    read = at_least(least)

    def read_all(text: str) -> list[int]:
        if not names(text):
            raise argparse.ArgumentTypeError(f"{text!r} holds no number; separate whole numbers by commas")
        return [read(part) for part in names(text)]

    return read_all


def seconds(text: str) -> float:
    """A length of time, more than none."""
    value = float(_number(text, float, "a number"))
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no length of time; give more than 0")
    return value


def minutes(text: str) -> float:
    """A length of time, or 0."""
    value = float(_number(text, float, "a number"))
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no length of time; give 0 or more")
    return value


def fraction(text: str) -> float:
    """A part of something, neither none nor all of it."""
    value = float(_number(text, float, "a number"))
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; give a number between 0 and 1")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = float(_number(text, float, "a number"))
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} cannot be used; give a finite number of at least 0")
    return value


def each(read: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Comma-separated numbers; there may be none."""
    return lambda text: [read(part) for part in names(text)]


def _number(text: str, kind: type, called: str) -> float | int:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {called}") from None
