"""Reward functions: TRL's signature, the built-in one, and scoring that loses no sample to another's failure.

What TRL's trainers do with a reward function is done here too (`GRPOTrainer._calculate_rewards`): of a conversational
prompt it gets messages, one that is `async` is awaited, None says that it does not judge a sample, and of several
functions the weighted sum over those that judged counts.
"""

import asyncio
import importlib
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from pipeline.config.types import TaskSection
from pipeline.errors import UsageError
from pipeline.plugins import search_working_directory

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
"""`(prompts, completions, **columns) -> list[float | None]`, called by keyword: every argument a list with one entry a
completion."""
CONVERSATION = "_conversation"
"""column with the messages of a conversational prompt; reward functions get them as `prompts`"""
_TOGETHER = " + "


@dataclass(frozen=True, slots=True)
class Rewards:
    """Several functions, of which the weighted sum counts."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    functions: tuple[RewardFunction, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """One completion's reward, or why there is none."""

    reward: float | None
    error: str = ""
    reason: str = "reward_error"
    """under which a sample without a reward is counted"""
    parts: dict[str, float] = field(default_factory=dict)
    """of several functions what each gave, unweighted"""


LARGEST = 1e18
"""magnitude of a reward; its square, summed over a batch, must fit into a float32"""
_NUMBER = re.compile(r"\s*([-+]?)\s*\$?\s*([-+]?)((?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)")
_GOES_ON = re.compile(r"\^|/\s*[0-9(\\]|:[0-9]|\*+[\w({\\$]")
"""what makes the digits before it the beginning of an expression; asterisks alone are the end of emphasis"""
_WORD = r"[^\W\d_](?:[./'-]?[^\W\d_])*"
_UNIT = re.compile(rf"(?:\s*(?:%|€|°[CF]?)|(?:[^\W\d_]{{2,}}|\s+{_WORD})(?:\s+{_WORD})*)?\.?\s*")
"""what may follow a bare reference's number; a letter right after the digits is algebra"""


def answer_number(text: str) -> Decimal | None:
    """The number right after the last `####`, without dollar sign and thousands separators; None if there is none."""
    _, mark, tail = text.rpartition("####")
    return number_at_start(tail) if mark else None


def number_at_start(text: str) -> Decimal | None:
    """The number that a text begins with, leaving out what follows it: `$1,234.` is 1234. None where it is part of an
    expression, as in `3/4`."""
    match = _NUMBER.match(text)
    if match is None or _GOES_ON.match(text, match.end()):
        return None
    return _value(match)


def reference_number(reference: str) -> Decimal | None:
    """The number a reference answer states: after its last `####`, or the whole of a bare number with its unit."""
    if "####" in reference:
        return answer_number(reference)
    match = _NUMBER.match(reference)
    return _value(match) if match and _UNIT.fullmatch(reference, match.end()) else None


def _value(match: re.Match[str]) -> Decimal | None:
    sign, inner_sign, digits = match.groups()
    try:
        value = Decimal(digits.replace(",", ""))
    except InvalidOperation:  # an exponent beyond all bounds
        return None
    return value.copy_negate() if "-" in (sign, inner_sign) else value


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


def reward_name(task: TaskSection) -> str:
    """`task.reward` and `task.reward_weights` as one name, which `load_reward` takes: "1*a:f + 0.5*b:g".

    Raises:
        UsageError: no function, or weights of another number.
    """
    if isinstance(task.reward, str) and not task.reward_weights:
        return task.reward
    names = [task.reward] if isinstance(task.reward, str) else task.reward
    weights = task.reward_weights or [1.0] * len(names)
    if not names or len(names) != len(weights):
        raise UsageError(
            f"task.reward_weights = {weights} does not fit task.reward = {names}: give every function one weight"
        )
    return _TOGETHER.join(f"{weight:.17g}*{name}" for weight, name in zip(weights, names, strict=True))


def load_reward(name: str) -> RewardFunction | Rewards:
    """A built-in reward by name, or a user's own as `module:function`; modules in the working directory are found.
    Several as `reward_name` writes them.

    Raises:
        UsageError: no such name, module or function, or the module fails while it is imported.
    """
    if "*" not in name:
        return _load(name)
    weights, names = zip(*(part.split("*", 1) for part in name.split(_TOGETHER)), strict=True)
    return Rewards(names, tuple(map(float, weights)), tuple(map(_load, names)))


def _load(name: str) -> RewardFunction:
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
    reward: RewardFunction | Rewards, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]
) -> list[Scored]:
    """Rewards of a group, from one call. If that fails as a whole, one call a sample: those that fail alone carry the
    error, the others their reward."""
    try:
        return _call(reward, prompts, completions, columns)
    except _BadReward:
        pass
    scored = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        own = {key: [values[index]] for key, values in columns.items()}
        try:
            scored += _call(reward, [prompt], [completion], own)
        except _BadReward as error:
            scored.append(Scored(None, f"sample {index}: {error}"))
    return scored


class _BadReward(Exception):
    """A reward function raised, or returned something that is not one finite number a completion."""


def _call(
    reward: RewardFunction | Rewards, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]
) -> list[Scored]:
    together = reward if isinstance(reward, Rewards) else Rewards(("",), (1.0,), (reward,))
    given = [_values(function, prompts, completions, columns) for function in together.functions]
    scored = []
    for values in zip(*given, strict=True):
        judged = [n for n, value in enumerate(values) if value is not None]
        if not judged:
            raise _BadReward("no reward function judged it: all returned None")
        total = _finite(sum(together.weights[n] * (values[n] or 0.0) for n in judged), "of all, weighted,")
        parts = {together.names[n]: values[n] or 0.0 for n in judged} if together is reward else {}
        scored.append(Scored(total, parts=parts))
    return scored


def _values(
    function: RewardFunction, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]
) -> list[float | None]:
    """What one function returns of each completion; None: it does not judge it."""
    name = getattr(function, "__name__", type(function).__name__)
    others = {key: values for key, values in columns.items() if key != CONVERSATION}
    if CONVERSATION in columns and function not in _BUILT_IN.values():
        prompts = columns[CONVERSATION]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    try:
        found = function(prompts=prompts, completions=completions, **others)
        returned = list(asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found)
    except Exception as error:  # the function is the user's: it can raise anything
        raise _BadReward(f"reward function {name} raised {type(error).__name__}: {error}") from error
    if len(returned) != len(completions):
        raise _BadReward(f"reward function {name} returned {len(returned)} values for {len(completions)} completions")
    return [None if value is None else _finite(value, name) for value in returned]


async def _awaited(found: Awaitable[Sequence[float | None]]) -> Sequence[float | None]:
    return await found


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
