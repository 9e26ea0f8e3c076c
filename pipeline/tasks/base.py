"""What a task is: prompts to train on, prompts held out, and what the reward needs to know of each. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

REFERENCE = "reference"
"""The column that holds the reference answer, whatever it is called where it comes from."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and what belongs to it."""

    prompt: str
    columns: dict[str, Any]
    """What reward functions get beside prompt and completion, plain data; `REFERENCE` is always there."""
    origin: str = ""
    """Where it was read, as `file:line`; empty where it was generated."""


class Task(Protocol):
    """Prompts with random access: `train[i]` is the same example whenever it is asked for."""

    @property
    def train(self) -> Sequence[Example]: ...

    @property
    def held_out(self) -> Sequence[Example]:
        """Disjoint from `train`; empty where there is none."""

    @property
    def longest_prompt(self) -> str | None:
        """For generated prompts, one that no other exceeds in characters; None: each has to be looked at."""
