"""A drafter that is not asked for a while need not be told every step either."""

from collections.abc import Sequence

import numpy as np

from drafters.base import Needs, Verified
from drafters.guard import Guard

WAITS = ~(Needs.HIDDEN_STATES | Needs.LAYER_STATES)
"""what a drafter may need whose observations can wait; the others keep a state for every token"""


class LateObserver:
    """Tells a drafter what was emitted, at once or, many steps together, when it must know."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._waiting: list[Verified] = []
        self._may_wait = not guard.needs & ~WAITS

    def observe(self, verified: Verified, asleep: bool) -> bool:
        """Whether it was told at once; `asleep`: the drafter is not going to be asked in the next step."""
        if asleep and self._may_wait:
            # Without the target's tensors: those of many steps would not fit into memory.
            self._waiting.append(Verified(verified.ids, verified.emitted, verified.accepted, seconds=verified.seconds))
            return False
        self.deliver()
        self._guard.observe(verified)
        return True

    def deliver(self) -> None:
        """Before it is asked, and before one of its sequences ends."""
        if self._waiting:
            self._guard.observe(merged(self._waiting))
            self._waiting = []


def merged(steps: Sequence[Verified]) -> Verified:
    """As if one verification had emitted it all; without logits."""
    emitted: dict[int, list[np.ndarray]] = {}
    accepted: dict[int, int] = {}
    for step in steps:
        for i, tokens, count in zip(step.ids, step.emitted, step.accepted.tolist(), strict=True):
            emitted.setdefault(i, []).append(tokens)
            accepted[i] = accepted.get(i, 0) + count
    return Verified(
        list(emitted),
        [np.concatenate(parts) for parts in emitted.values()],
        np.array(list(accepted.values()), np.int64),
        seconds=sum(step.seconds for step in steps),
    )
