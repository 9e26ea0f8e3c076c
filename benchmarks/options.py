"""Values that benchmarks take on their command lines; what cannot be read is refused with the option and the value."""

import argparse
from collections.abc import Callable


def names(text: str) -> list[str]:
    """Comma-separated words."""
    return [part.strip() for part in text.split(",") if part.strip()]


def at_least(least: int) -> Callable[[str], int]:
    """An integer that is not smaller."""

    def read(text: str) -> int:
        value = int(_number(text, int, "a whole number"))
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; give at least {least}")
        return value

    return read


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


def floats(text: str) -> list[float]:
    """Comma-separated numbers; there may be none."""
    return [_number(part, float, "a number") for part in names(text)]


def _number(text: str, kind: type, called: str) -> float | int:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {called}") from None
