"""The built-in task: add several numbers, column by column, and end with the checkable line `#### N`.

    What is 347 + 58 + 912?
    ones: 7+8+2=17
    tens: 4+5+1+1=11
    hundreds: 3+9+1=13
    #### 1317

The last addend of a column is the carry of the one before it, when there is one. Difficulty is the largest number of
digits and of operands; every prompt draws its own up to these, so that easy and hard ones are mixed.
"""

import random
from collections.abc import Sequence
from typing import overload

from pipeline.tasks.base import REFERENCE, Example
from pipeline.tasks.prompts import mix64

TRAIN_SIZE = 1_000_000
HELD_OUT_SIZE = 512
_HELD_OUT_SHARE = 8
_HELD_OUT_DRAWS = 1 << 16

SLIPS = (-2, -1, 1, 2)
COLUMNS = (
    "ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions", "ten millions",
    "hundred millions", "billions", "ten billions", "hundred billions",
)  # fmt: skip


def worked_answer(example: Example, slip_rate: float = 0.0, seed: int = 0) -> str:
    """The text a supervised example teaches: the columns from the right, then the answer.

    Args:
        slip_rate: probability of a column's sum being off by one or two; the columns after it and the answer follow
            from what was written, as a person's would.
        seed: of the slips, with the operands.
    """
    operands: list[int] = example.columns["operands"]
    rng = random.Random(mix64(seed, *operands))
    places = max(len(str(number)) for number in operands)
    lines, carry, answer = [], 0, 0
    for place in range(places):
        addends = [number // 10**place % 10 for number in operands if len(str(number)) > place]
        if carry:
            addends.append(carry)
        column = sum(addends)
        if rng.random() < slip_rate:
            column = max(0, column + rng.choice(SLIPS))
        lines.append(f"{COLUMNS[place]}: {'+'.join(map(str, addends))}={column}")
        carry, digit = divmod(column, 10)
        answer += digit * 10**place
    return "\n".join([*lines, f"#### {answer + carry * 10**places}"])


def is_held_out(operands: Sequence[int]) -> bool:
    """Whether a sum belongs to the held-out set: by a hash of its operands, in any order, not by the run's seed."""
    return mix64(*sorted(operands)) % _HELD_OUT_SHARE == 0


class ArithmeticTask:
    """Sums of 2 to `operands` numbers of 1 to `digits` digits each. Training prompts depend on seed and index alone;
    held-out prompts on neither, so that runs can be compared."""

    def __init__(self, digits: int, operands: int, seed: int) -> None:
        self._digits, self._operands = digits, operands
        self.train: Sequence[Example] = _TrainingSums(digits, operands, seed)
        self.held_out: Sequence[Example] = _held_out(digits, operands)

    @property
    def longest_prompt(self) -> str:
        return _example([10**self._digits - 1] * self._operands).prompt


class _TrainingSums(Sequence[Example]):
    def __init__(self, digits: int, operands: int, seed: int) -> None:
        self._digits, self._operands, self._seed = digits, operands, seed

    def __len__(self) -> int:
        return TRAIN_SIZE

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(TRAIN_SIZE))]
        if not -TRAIN_SIZE <= index < TRAIN_SIZE:
            raise IndexError(f"training prompt {index} of {TRAIN_SIZE}")
        rng = random.Random(mix64(self._seed, index % TRAIN_SIZE))
        while is_held_out(operands := _draw(rng, self._digits, self._operands)):
            pass
        return _example(operands)


def _held_out(digits: int, operands: int) -> list[Example]:
    """Up to HELD_OUT_SIZE different sums; fewer where so small a difficulty has no more."""
    rng = random.Random(mix64(digits, operands))
    found: dict[tuple[int, ...], Example] = {}
    for _ in range(_HELD_OUT_DRAWS):
        drawn = _draw(rng, digits, operands)
        if is_held_out(drawn):
            found.setdefault(tuple(sorted(drawn)), _example(drawn))
        if len(found) == HELD_OUT_SIZE:
            break
    return list(found.values())


def _draw(rng: random.Random, digits: int, operands: int) -> list[int]:
    numbers = []
    for _ in range(rng.randint(2, operands)):
        length = rng.randint(1, digits)
        numbers.append(rng.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1))
    return numbers


def _example(operands: list[int]) -> Example:
    prompt = f"What is {' + '.join(map(str, operands))}?\n"
    return Example(prompt, {REFERENCE: str(sum(operands)), "operands": operands})
