"""Entropy-adaptive decoding: which of two models samples the next token of a sequence.

After Simonds, arXiv 2502.06833 (read: the abstract and a third party's notes): the rolling mean of the last w = 5
entropies of the model at work, taken before the temperature; above a threshold the large model samples, at or below it
the small one; at least d_min = 10 tokens between two switches. Read literally, the noted pseudo-code also counts anew
when a decision leaves the model as it was; here the count is of tokens since the last switch. Our own choices: a
sequence starts on the large model, and while fewer than w tokens are there, the mean is over those.
"""

import math
import re
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.config.types import SwitchingSection


@dataclass(frozen=True, slots=True)
class SwitchingRule:
    """When to switch."""

    threshold: float
    """nats"""
    window: int = 5
    """w, tokens"""
    min_run: int = 10
    """d_min, tokens from one switch to the next, and to the first"""
    before_sampling: bool = False
    """the small model hands over the token that it is uncertain of, not the one after"""
    noise: bool = False
    """uniform random numbers in [0, 1) take the entropies' place: a control that switches as often, but anywhere"""

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or self.window < 1 or self.min_run < 1:
            raise UsageError(
                f"switching with threshold {self.threshold}, window {self.window} and min_run {self.min_run} has no "
                "meaning; give a number, and at least 1 token each"
            )

    @classmethod
    def from_config(cls, section: "SwitchingSection") -> "SwitchingRule | None":
        """None where the configuration names no small model."""
        if not section.small_model:
            return None
        return cls(in_nats(section.threshold, section.unit), section.window, section.min_run, section.before_sampling)


def parse_rule(text: str, threshold: float = 0.0) -> SwitchingRule:
    """A rule written as `window:min_run`, with `:before` behind it for `before_sampling`.

    Raises:
        UsageError: it is not written so.
    """
    if not (found := re.fullmatch(r"([1-9]\d{0,8}):([1-9]\d{0,8})(:before)?", text.strip())):
        raise UsageError(f"{text!r} is no rule of switching; write window and least run as 5:10, or 1:1:before")
    return SwitchingRule(threshold, int(found[1]), int(found[2]), before_sampling=bool(found[3]))


def in_nats(entropy: float, unit: Literal["nats", "bits"]) -> float:
    """The paper counts bits; what is recorded here is nats."""
    return entropy * math.log(2) if unit == "bits" else entropy


class SwitchState:
    """One sequence's: the model at work and what the next decision needs."""

    __slots__ = ("_left", "_noise", "_recent", "_rule", "_run", "small")

    def __init__(self, rule: SwitchingRule, seed: int = 0) -> None:
        """`seed` is the sequence's; only `SwitchingRule.noise` draws."""
        self.small = False
        """whether the small model samples the next token"""
        self._rule, self._run, self._left = rule, 0, 0
        self._recent: deque[float] = deque(maxlen=rule.window)
        self._noise = np.random.default_rng((seed, 0x5EED)) if rule.noise else None

    def step(self, entropy: float) -> bool:
        """A token was sampled, from a distribution of this entropy (nats); whether the other model takes over."""
        self._recent.append(self._measure(entropy))
        self._run += 1
        if self._run < self._rule.min_run or (self.small and self._rule.before_sampling):
            return False
        return self._switch(self._recent)

    def hand_over(self, entropy: float) -> bool:
        """The small model is to sample from a distribution of this entropy (nats); whether the large one does instead.

        Nothing is remembered of this entropy then: the large model's takes its place.
        """
        returns = self._run == 0
        if not (self.small and self._rule.before_sampling) or (self._run < self._rule.min_run and not returns):
            return False
        run = self._left if returns else 0
        if not self._switch([*self._recent, self._measure(entropy)][-self._rule.window :]):
            return False
        self._run = run
        return True

    def _measure(self, entropy: float) -> float:
        return entropy if self._noise is None else float(self._noise.random())

    def _switch(self, recent: Collection[float]) -> bool:
        small = sum(recent) / len(recent) <= self._rule.threshold
        if small == self.small:
            return False
        self.small, self._run, self._left = small, 0, self._run
        return True

    def follow(self, entropies: Iterable[float]) -> int:
        """How many of the tokens that one model emitted stand: all up to the one after which the other takes over.

        The decision after a token looks at nothing behind it, so cutting there leaves the distribution of what stands
        as it is, whatever draft the tokens came from.
        """
        count = 0
        for count, entropy in enumerate(entropies, 1):  # noqa: B007 the loop's last value is what is returned
            if self.step(entropy):
                break
        return count
