"""A line of metrics.jsonl as flat names and numbers, for what draws curves."""

from collections.abc import Mapping
from typing import Any


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the line; those of nested objects under `object/key`. What is null was not measured and is left
    out."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": number for name, number in scalars(value).items()}
        elif isinstance(value, int | float):
            found[key] = float(value)
    return found
