"""Drafters as benchmarks take them: several in one option, each a name, module:Class or a table, and a length."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafters.registry import piece_of, written
from pipeline.errors import UsageError

_OPEN, _CLOSE = "([{", ")]}"


def drafters(text: str) -> list[str]:
    """Separated by commas, those within brackets and quotes apart; at least one."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += 0 if quote else (character in _OPEN) - (character in _CLOSE)
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    found = [part.strip() for part in parts if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no drafter")
    return found


def and_length(text: str) -> tuple[str, int | None]:
    """The drafter of `drafter` or `drafter@longest draft`, and the length; None: there is none.

    Raises:
        UsageError: what is behind @ is no length.
    """
    table, brace, rest = text.rpartition("}")
    name, at, length = rest.partition("@")
    if at and not (length.isdecimal() and int(length)):
        raise UsageError(f"drafter {text}: after @ goes the longest draft in tokens, for example suffix-automaton@8")
    return table + brace + name, int(length) if at else None


def check(text: str) -> None:
    """Builds it once, to find out what is wrong with it before anything is measured.

    Raises:
        UsageError: no such drafter, or one that cannot be made.
    """
    written(and_length(text)[0])


def short_name(text: str) -> str:
    """Short, for rows and lines: the name, its options with folders by their last part, its drafters in brackets."""
    drafter, length = and_length(text)
    return _short(piece_of(drafter)) + (f"@{length}" if length else "")


def _short(piece: Mapping[str, Any]) -> str:
    parts, inner = [], ""
    for key, value in piece.items():
        if key == "drafters":
            inner = "[" + " ".join(_short({"name": p} if isinstance(p, str) else p) for p in value) + "]"
        elif key == "auxiliary":
            inner = "[" + _short({"name": value} if isinstance(value, str) else value) + "]"
        elif key != "name":
            shown = Path(value).name if isinstance(value, str) else str(value)
            parts.append(f"{key}={re.sub(r'[^-.:=+*/@A-Za-z0-9_]+', ' ', shown).strip()}")
    return str(piece["name"]) + inner + (f"({' '.join(parts)})" if parts else "")
