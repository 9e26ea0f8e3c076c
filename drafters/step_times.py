"""What steps take beside verification and drafters: in an arbiter, and in the engine around it."""

from collections.abc import Callable

_RATE = 0.1
_PAUSE = 1e-4
"""seconds beyond twice what is usual that still count"""


class StepTimes:
    """Running means, seconds a step.

    Attributes:
        deciding: of an arbiter's own, in proposing.
        learning: of an arbiter's own, in observing.
        beside: in neither the arbiter nor verification.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.deciding = self.learning = self.beside = 0.0
        self._before = self._left_at = 0.0
        """seconds of this step before it was proposed for, and when the arbiter was last left"""
        self._disturbed = True

    @property
    def own(self) -> float:
        """An arbiter's, of a step in which it decides."""
        return self.deciding + self.learning

    @property
    def decided(self) -> float:
        """Of a step in which it decides."""
        return self.own + self.beside

    @property
    def undecided(self) -> float:
        """Of one in which it does not."""
        return self.learning + self.beside

    def disturb(self) -> None:
        """Sequences come or go: that takes its time, but not in every step."""
        self._disturbed = True

    def proposing(self) -> float:
        """A step begins; when that is."""
        now = self._clock()
        self._before = now - self._left_at
        return now

    def left(self) -> None:
        """It has proposed."""
        self._left_at = self._clock()

    def observing(self, verification: float) -> None:
        """The step is told of, whose verification took so long; 0: that is not known."""
        beside = self._before + self._clock() - self._left_at - verification
        if verification > 0 and not self._disturbed:
            self.beside = _smoothed(self.beside, max(beside, 0.0))

    def done(self) -> None:
        """It has observed."""
        self._left_at, self._disturbed = self._clock(), False

    def has_decided(self, seconds: float) -> None:
        self.deciding = _smoothed(self.deciding, seconds)

    def has_learnt(self, seconds: float) -> None:
        self.learning = _smoothed(self.learning, seconds)


def _smoothed(seconds: float, spent: float) -> float:
    """A pause of the machine is no cost."""
    return seconds + _RATE * (min(spent, 2 * seconds + _PAUSE) - seconds)
