"""Steps without drafts, from which an arbiter learns what drafting costs."""

from drafters.cost_model import CostModel

_NEEDED = 4
"""steps without drafts, of about as many sequences, that a decision to draft rests on at least"""
_EVERY, _SELDOM = 32, 256
"""drafted steps after which there are some more, at first, and in the end, each time after twice as many: what not
drafting takes is not learnt from drafting"""
_SETTLED = 3
"""Steps without drafts in a row of which the last is learnt from: the first finds the caches full of what drafted."""


class PlainSteps:
    """Has enough of them made, and tells the costs what they took."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._kept: list[tuple[int, float]] = []
        """sequences and seconds, of which the costs have not learnt yet"""
        self._known: set[int] = set()
        """numbers of sequences for which what not drafting takes is known"""
        self._drafted = self._plain = self._untimed = 0
        """steps in a row that had drafts, that had none, and of which nobody said what they took"""
        self._every = _EVERY
        self._begun = False
        """whether steps are going on that are to show it"""

    @property
    def settled(self) -> bool:
        """Whether the last step shows what not drafting takes."""
        return self._plain >= _SETTLED

    def due(self, rows: int) -> bool:
        """Whether a step of so many sequences is to show what it takes without drafts."""
        if not self._costs.learns or self._untimed >= _NEEDED:
            return False
        if rows not in self._known:
            if self._costs.plain_steps(rows) < _NEEDED:
                return True
            self._known.add(rows)
        if self._drafted >= self._every:
            self._begun, self._every = True, min(2 * self._every, _SELDOM)
        else:
            self._begun = self._begun and 0 < self._plain < _SETTLED
        return self._begun

    def count(self, drafted: bool, seconds: float) -> None:
        """A step that took so many seconds, 0 where that is not known."""
        self._drafted, self._plain = (self._drafted + 1, 0) if drafted else (0, self._plain + 1)
        self._untimed = 0 if seconds > 0 else self._untimed + 1

    def keep(self, rows: int, seconds: float) -> None:
        """A step without drafts, for the costs to learn from later."""
        if self.settled:
            self._kept.append((rows, seconds))

    def teach(self) -> None:
        """The costs, what was kept."""
        if self._kept:
            self._costs.observe_plain(self._kept)
            self._kept.clear()
