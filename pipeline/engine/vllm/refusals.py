"""What vLLM refuses, as one sentence: of its own types' errors the option and its value, of long ones what matters."""

import re
from collections.abc import Collection
from typing import Any

_LONGEST, _LONGEST_VALUE = 400, 80
"""characters"""
_TAILS = re.compile(
    r"\s*(?:\[type=.*|\(parameter=.*|Supported architectures:.*|For further information visit .*)$", re.DOTALL
)


def reason(error: BaseException, options: Collection[str] = ()) -> str:
    """What was wrong, without a full stop.

    Args:
        error: of vLLM, of pydantic, or any other.
        options: names of vLLM's engine arguments, by which a field of its types is told from one of ours.
    """
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        said = _cut(first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, "))
        place = [str(part) for part in first["loc"]]
        if not place:
            return said
        return f"{_option(error.title, place, options)} = {_written(first['input'])} is not valid: {said}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line for line in lines if "Value error, " in line), lines[0])
    return _cut(line.replace("Value error, ", ""))


def _option(title: str, place: list[str], options: Collection[str]) -> str:
    """`SpeculativeConfig` and method -> engine.vllm.speculative_config.method."""
    table = re.sub(r"(?<!^)(?=[A-Z])", "_", title).lower()
    if place[0] in options:
        return ".".join(["engine.vllm", *place])
    if table in options:
        return ".".join(["engine.vllm", table, *place])
    return ".".join([f"vLLM's {title}", *place])


def _written(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _cut(text: str) -> str:
    text = _TAILS.sub("", text.strip()).rstrip(" .")
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " ..."
