"""Reward functions: TRL's signature, the built-in one, and scoring that loses no sample to another's failure."""

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pipeline.errors import UsageError
from pipeline.plugins import search_working_directory

RewardFunction = Callable[..., Sequence[float]]
"""`(prompts, completions, **columns) -> list[float]`, called by keyword: every argument a list with one entry a
completion."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One completion's reward, or why there is none."""

    reward: float | None
    error: str = ""
    reason: str = "reward_error"
    """under which a sample without a reward is counted"""


LARGEST = 1e18
"""magnitude of a reward; its square, summed over a batch, must fit into a float32"""
_NUMBER = re.compile(r"\s*(-?)\s*\$?\s*(-?)([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def answer_number(text: str) -> Decimal | None:
    """The number right after the last `####`, without dollar sign and thousands separators; None if there is none."""
    _, mark, tail = text.rpartition("####")
    return number_at_start(tail) if mark else None


def number_at_start(text: str) -> Decimal | None:
    """The number that a text begins with, leaving out what follows it: `$1,234.` is 1234."""
    match = _NUMBER.match(text)
    if match is None:
        return None
    sign, inner_sign, digits = match.groups()
    value = Decimal(digits.replace(",", ""))
    return -value if sign or inner_sign else value


def reference_number(reference: str) -> Decimal | None:
    """The number a reference answer states: after its last `####`, or the whole of a bare number."""
    return answer_number(reference) if "####" in reference else number_at_start(reference)


def numeric_answer(prompts: list[str], completions: list[str], *, reference: list[str], **columns: Any) -> list[float]:
    """1.0 where a completion's number after its last `####` equals the reference's, else 0.0.

    Raises:
        ValueError: a reference answer states no number.
    """
    rewards = []
    for completion, stated in zip(completions, reference, strict=True):
        wanted = reference_number(stated)
        if wanted is None:
            raise ValueError(f"the reference answer {stated!r} states no number")
        rewards.append(float(answer_number(completion) == wanted))
    return rewards


_BUILT_IN: dict[str, RewardFunction] = {"numeric-answer": numeric_answer}


def is_built_in(name: str) -> bool:
    """Whether a reward is ours; others run in a process of their own."""
    return name in _BUILT_IN


def load_reward(name: str) -> RewardFunction:
    """A built-in reward by name, or a user's own as `module:function`; modules in the working directory are found.

    Raises:
        UsageError: no such name, module or function, or the module fails while it is imported.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UsageError(f"task.reward = {name!r} is unknown; use {', '.join(_BUILT_IN)} or module:function")
    search_working_directory()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: importing it can raise anything
        raise UsageError(
            f"task.reward = {name!r}: importing module {module_name!r} failed ({type(error).__name__}: {error}); "
            f"see that `python -c 'import {module_name}'` passes in the working directory"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(
            f"task.reward = {name!r}: module {module_name!r} has no function {function_name!r}; "
            "define it as (prompts, completions, **columns) -> list of floats"
        )
    return function


def score_group(
    reward: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]
) -> list[Scored]:
    """Rewards of a group, from one call. If that fails as a whole, one call a sample: those that fail alone carry the
    error, the others their reward."""
    try:
        return [Scored(value) for value in _call(reward, prompts, completions, columns)]
    except _BadReward:
        pass
    scored = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        own = {key: [values[index]] for key, values in columns.items()}
        try:
            scored.append(Scored(_call(reward, [prompt], [completion], own)[0]))
        except _BadReward as error:
            scored.append(Scored(None, f"sample {index}: {error}"))
    return scored


class _BadReward(Exception):
    """A reward function raised, or returned something that is not one finite number a completion."""


def _call(
    reward: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]
) -> list[float]:
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        returned = list(reward(prompts=prompts, completions=completions, **columns))
    except Exception as error:  # the function is the user's: it can raise anything
        raise _BadReward(f"reward function {name} raised {type(error).__name__}: {error}") from error
    if len(returned) != len(completions):
        raise _BadReward(f"reward function {name} returned {len(returned)} values for {len(completions)} completions")
    return [_finite(value, name) for value in returned]


def _finite(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _BadReward(f"reward function {name} returned {value!r}, which is not a finite number")
    if abs(number) > LARGEST:
        raise _BadReward(f"reward function {name} returned {value!r}; rewards beyond {LARGEST:g} cannot be averaged")
    return number
