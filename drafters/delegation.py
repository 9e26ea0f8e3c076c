"""Steps in which an arbiter does not decide: deciding takes time too, and where it changes little, it loses.

While one drafter alone is asked, every decision is compared with verifying all of that drafter's draft without one. If
that promises more tokens a second, the drafter's whole drafts are verified for some steps, after which decisions are
compared again. What was drafted has no part in it but through what earlier steps taught. Two drafters can be delegates
together, by turns: the second is asked where the first's draft promises little.
"""

from collections.abc import Sequence
from typing import NamedTuple

_COMPARED, _COMPARED_AGAIN = 8, 2
"""decisions that are compared before steps go without: at first, and between stretches that went without"""
_MARGIN = 1.02
"""whole drafts must promise this much more than decided ones"""
_FEWEST, _MOST = 8, 128
"""steps without a decision: twice as many every time, while they go on to promise more"""
_MEMORY = 32
"""comparisons that count fully; older ones fade"""
_SEEN, _SEEN_MEMORY, _FADES = 8, 64, 0.97
"""Steps that went without a decision and were learnt from: as many are needed to say what became of promises, as many
count fully; and what is left of that with every comparison after which nothing is delegated, so that promises are
believed again some day."""


class Outlook(NamedTuple):
    """What a step promises."""

    tokens: float
    """by their worth"""
    seconds: float

    def longer(self, seconds: float) -> "Outlook":
        return Outlook(self.tokens, self.seconds + seconds)

    def towards(self, newer: "Outlook", rate: float) -> "Outlook":
        """A running mean."""
        return Outlook(
            self.tokens + rate * (newer.tokens - self.tokens), self.seconds + rate * (newer.seconds - self.seconds)
        )

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Delegation:
    """To one or two of an arbiter's drafters, for batches of one size."""

    def __init__(self) -> None:
        self._plain = self._decided = self._whole = Outlook(0, 0)
        self.stop()

    def stop(self) -> None:
        """What was compared does not hold any more."""
        self._of: tuple[tuple[int, ...], int] = (), 0
        """drafters, and sequences"""
        self._left = self._compared = self._seen = 0
        """steps to go, and comparisons since the last that went without a decision, and of all"""
        self._window = _FEWEST
        """steps of the next delegation"""
        self._promised = self._kept = Outlook(0, 0)
        """of the same steps"""
        self._learnt, self._trust = 0, 0.0

    def learn(self, promised: Outlook, kept: Outlook) -> None:
        """A step without a decision: what it promised, and what it brought and took."""
        self._learnt += 1
        rate = 1 / min(self._learnt, _SEEN_MEMORY)
        self._promised, self._kept = self._promised.towards(promised, rate), self._kept.towards(kept, rate)
        self._trust = float(self._learnt >= _SEEN)

    @property
    def bias(self) -> float:
        """By what factor whole drafts bring more tokens a second than they promise; 1 while that is not known."""
        return 1 + self._trust * (self._kept.rate / self._promised.rate - 1) if self._trust else 1.0

    def compare(
        self, drafters: tuple[int, ...], rows: int, plain: Outlook, decided: Outlook, whole: Outlook
    ) -> bool:  # fmt: skip
        """A step of so many sequences in which these drafters alone were awake: without drafts, as decided, and with
        the whole draft of one. Whether the last is the best, by all that was compared."""
        if self._of != (drafters, rows):
            self.stop()
            self._of = drafters, rows
        self._seen += 1
        rate = 1 / min(self._seen, _MEMORY)
        self._plain, self._decided = self._plain.towards(plain, rate), self._decided.towards(decided, rate)
        self._whole = self._whole.towards(whole, rate)
        self._compared += 1
        pays = self.bias * self._whole.rate > self._plain.rate
        best = pays and self._whole.rate > _MARGIN * self._decided.rate
        if not best:
            self._window, self._trust = _FEWEST, _FADES * self._trust
        elif self._compared >= (_COMPARED if self._window == _FEWEST else _COMPARED_AGAIN):
            self._left, self._compared = self._window, 0
            self._window = min(2 * self._window, _MOST)
        return best

    def take(self, asked: tuple[int, ...], rows: int, asleep: Sequence[int] = ()) -> int:
        """Steps of so many sequences, in which these drafters are asked, that go without a decision from now on. A step
        in which others are asked, too, to see what they bring, comes between and does not end it.

        Args:
            asked: drafters.
            rows: sequences.
            asleep: steps after this one in which each of the others sleeps.
        """
        if self._of != (asked, rows):
            if not set(asked) > set(self._of[0]):
                self._left = 0
            return 0
        taken = min(self._left, *(steps + 1 for steps in asleep)) if asleep else self._left
        self._left -= taken
        return taken

    def give_back(self, steps: int) -> None:
        """Steps that were taken and did not come."""
        self._left += steps


class Lull:
    """Steps of so many sequences that are all like the one in which they were decided on."""

    def __init__(self) -> None:
        self.rests = False
        """whether nobody drafts in this step, nor in those left"""
        self.delegates: tuple[int, ...] = ()
        """whose drafts are verified as they are"""
        self._rows = self._steps = self.left = 0
        """sequences; and steps after the one that decided on them, in all and to come"""

    def begin(self, delegates: tuple[int, ...], rows: int, steps: int) -> None:
        """This step and so many more."""
        self.rests, self.delegates = not delegates, delegates
        self._rows, self._steps, self.left = rows, steps, steps

    def goes_on(self, rows: int) -> bool:
        """Whether another step, of so many sequences, is one of them."""
        if not self.left or rows != self._rows:
            return False
        self.left -= 1
        return True

    def end(self) -> int:
        """Steps that went by after the one that decided on them."""
        passed = self._steps - self.left
        self.begin((), 0, 0)
        self.rests = False
        return passed
