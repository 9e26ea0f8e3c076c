"""What asking a drafter costs and brings, and when it is worth asking again."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from drafters.delegation import Outlook
from drafters.reach import FIRST, Reach

DEAR = 0.03
"""A drafter that takes more than this part of a plain step is judged whenever it is asked."""
_PATIENCE, _DEAR_PATIENCE = 12, 2
"""steps in a row in which it did not pay, after which it sleeps"""
_FIRST_TRIES, _TRIES, _HOPELESS = 24, 8, -0.3
"""Steps in a row in which one that reads is asked, at first and when it wakes, before it may sleep, and the gain below
which it is spared the rest: nothing is known of it at first, later the first of them finds caches cold, and it reads
what it missed."""
_EXPLORATION = 0.01
"""part of the time that asking drafters which do not pay is to take, all of them together; shorter sleeps take more"""
_SHORTEST, _LONGEST, _LONGEST_OF_READERS = 16, 128, 512
"""steps of a sleep when it is longest: at least, for drafters that cost next to nothing, at most, and at most for those
that have to read what they missed"""
_MOST_SLEEPS = 16
"""that are counted"""
_TOGETHER = 32
"""Longer sleeps end in a step whose number is a multiple of this."""
_RETRY_AFTER = 8
"""steps after which a sleeper that costs little to wake is asked where the batch has become half or twice as large"""
SAMPLE = 4
"""sequences that a drafter which reads is asked for, to see whether it still does not pay"""
_RATE, _RATE_OF_READERS = 0.1, 0.03
"""what a judgement counts for in the mean: drafts of a model promise much in one step and little in the next"""
_FEWEST = 3
"""judgements that what seems hopeless rests on"""
_UNKNOWN, _NOTHING = 1 << 40, Outlook(0, 0)


@dataclass(slots=True)
class Standing:
    """Of one drafter in an arbiter; steps are those of the batches that it stands for."""

    reads: bool = False
    """whether it computes a model over what it missed: to ask it again costs as much as if it had never slept"""
    widest: int = _UNKNOWN
    """longest draft it has made before this step: the step's own may be as long as it is because of what was drawn"""
    _width: int = 0
    """longest draft of the last step in which it was asked"""
    reach: Reach = field(default_factory=Reach)
    """of one that reads"""
    limit: int = _UNKNOWN
    """tokens that a draft is to have at most in this step"""
    gain: float = math.nan
    """by how much asking it raises tokens a second, its own time included; not a number before it is known"""
    _judgements: int = 0
    _found: Outlook = _NOTHING
    _otherwise: Outlook = _NOTHING
    """running means of what steps with and without it promise"""
    _whole: Outlook = _NOTHING
    """what a step promises, on average, in which all that it drafts is verified; 0: that is not known"""
    _asking: float = math.nan
    """of one that does not read"""
    _telling: float = math.nan
    _spent: float = 0.0
    """in asking it since it woke, for all sequences or a few"""
    _step: int = 0
    _asked: int = 0
    """step"""
    _rows: int = 1
    """of that step"""
    _idle: int = 0
    _sleeps: int = 0
    """in a row; those of one that costs next to nothing are twice as long every time"""
    _wakes: int = 0
    """step"""
    _tries: int = _FIRST_TRIES
    """left"""
    doubted: bool = False
    """whether it has slept, and goes back to sleep unless it pays now"""

    @property
    def seconds(self) -> float:
        """Of a step in which it is asked and told what came of it."""
        asking = self.reach.seconds(self.reach.tokens) if self.reads else self._asking
        return (asking if asking >= 0 else 0.0) + (self._telling if self._telling >= 0 else 0.0)

    def consider(self, counts: np.ndarray, rows: int, seconds: Callable[[int, int], float], overhead: float) -> None:
        """How far to ask it in this step; as `Reach.choose`. What did not pay before is seen anew where it changes."""
        if not self.reads:
            return
        if self.reach.due and self.reach.choose(counts, rows, seconds, overhead) and self.gain <= 0:
            self.gain, self._idle, self._judgements = math.nan, 0, 0
        if self.reach.settled:
            self._whole = self.average(rows, seconds).longer(overhead + self.seconds)
        self.limit_to(self.reach.next)

    def limit_to(self, tokens: int) -> None:
        """How far to ask it in this step, if it reads: while it does not pay, what more would do is to be seen, too."""
        if self.reads:
            self.limit = max(tokens, FIRST) if self.gain <= 0 else tokens

    def usual(self, budgets: np.ndarray) -> np.ndarray:
        """int64 [B], how long its drafts are taken to be in this step before they are seen."""
        return np.minimum(budgets, min(self.widest, self.limit))

    def may_add(self, promised: np.ndarray, plain: float) -> bool:
        """Whether it is worth asking beside drafts that promise so many accepted tokens, float64 [B], where a step
        without drafts takes `plain` seconds: one that reads may bring less than is emitted in the time."""
        if not self.reads:
            return True
        return float(np.maximum(self.reach.accepted - promised, 0).sum()) > self.part_of(plain) * len(promised)

    def part_of(self, seconds: float) -> float:
        """Its own time, measured in a step's."""
        return self.seconds / seconds

    @property
    def tried(self) -> bool:
        """Whether its drafts are to be verified even where they seem not to pay, to see whether they do."""
        return self.reads and self.gain <= 0 and self._tries > 0

    def begin_step(self, rows: int) -> bool:
        """Whether to ask it in this step, with so many sequences."""
        awake = self.awake(rows)
        self._step += 1
        if awake and self.reads and self._step - self._asked > 1:
            self._tries, self._judgements, self._spent = _TRIES, 0, 0.0
        if self._width:
            self.widest = self._width if self.widest == _UNKNOWN else max(self.widest, self._width)
        return awake

    def awake(self, rows: int) -> bool:
        """Whether it is going to be asked in the next step, if that has so many sequences."""
        step = self._step + 1
        if step >= self._wakes:
            return True
        return not self.reads and step - self._asked >= _RETRY_AFTER and not 0.5 < rows / self._rows < 2

    @property
    def asleep(self) -> int:
        """Further steps in which it is not asked, if the number of sequences stays."""
        return max(self._wakes - self._step - 1, 0)

    def average(self, rows: int, seconds: Callable[[int, int], float]) -> Outlook:
        """What a step promises in which its drafts, which are as long as usual, are verified, without what asking
        takes; of one that reads.

        Args:
            rows: sequences.
            seconds: of a verification, by sequences and tokens.
        """
        tokens = self.reach.tokens
        verifying = seconds(rows, rows * (1 + tokens)) + self.reach.beyond(tokens)
        return Outlook(rows * (1 + self.reach.accepted), verifying)

    def reconsider(self) -> None:
        """Ask it in the next step, if that takes next to nothing."""
        if not self.reads:
            self._wakes = min(self._wakes, self._step + 1)

    def pass_over(self, steps: int, asked: bool) -> None:
        """So many steps went by, in which it was asked, or was not, without anything being measured."""
        self._step += steps
        if asked:
            self._asked = self._step

    def samples(self, plain: float) -> bool:
        """Whether a few sequences are enough to ask it for, if it must read what it missed of each: it has slept, and
        did not pay."""
        return self.gain <= 0 and self._step - self._asked > 1 and self.part_of(plain) > DEAR

    def was_asked(self, rows: int, seconds: float, width: int, whole: bool = True) -> None:
        """It proposed drafts of up to `width` tokens, for all sequences where it was asked as a whole."""
        if whole and not self.reads:
            self._asking = _usual(self._asking, seconds)
        elif whole and width and (self._step - self._asked <= 1 or not self.reach.known):
            self.reach.was_asked(width, seconds)  # but not where it read what it had missed
        self._spent += seconds
        self._asked, self._rows = self._step, rows
        self._width = width

    def was_verified(self, tokens: float, seconds: float, usual: float) -> float:
        """Whole drafts of so many tokens a sequence took so long, where `usual` was expected. Seconds of that which are
        its own, if it reads, and say nothing of steps without its drafts."""
        if not self.reads:
            return 0.0
        self.reach.was_verified(tokens, seconds, usual)
        return self.reach.beyond(tokens)

    def was_told(self, seconds: float) -> None:
        """It observed a step."""
        self._telling = _usual(self._telling, seconds)

    def judged(
        self, found: Outlook, otherwise: Outlook, plain: float, steps: int = 1, deciding: float = 0.0,
        drafters: int = 1, alone: bool = False,
    ) -> None:  # fmt: skip
        """What a step promises that asks it, and one that does not, where a step without drafts takes `plain` seconds;
        a sample of so many steps. The step took `deciding` seconds beside those of asking; it is one of so many
        drafters, and asked alone or not. Single drafts promise very different things: gains are of their means."""
        self._judgements += 1
        rate = max(1 / self._judgements, _RATE_OF_READERS if self.reads else _RATE)
        self._found, self._otherwise = self._found.towards(found, rate), self._otherwise.towards(otherwise, rate)
        self.gain = self._found.rate / self._otherwise.rate - 1
        if alone and self._whole.seconds:
            self.gain = max(self.gain, self._whole.rate / otherwise.rate - 1)
        self._tries = max(self._tries - 1, 0)
        if self.gain > 0:
            self._idle, self._sleeps, self.doubted, self._spent = 0, 0, False, 0.0
            return
        self._idle += steps
        cost = self.part_of(plain)
        trying = self.tried and self._rows <= SAMPLE
        if trying and (self.gain > _HOPELESS or self._judgements < _FEWEST):
            return
        over = self._idle - (_DEAR_PATIENCE if cost > DEAR else _PATIENCE)
        if over > 0:
            longest = self._longest_sleep(plain, deciding, drafters)
            self._sleep(int(longest if cost > DEAR else min(longest, 2**self._sleeps)))

    def _longest_sleep(self, plain: float, deciding: float, drafters: int) -> float:
        """Steps after which waking it again has taken the part of the time that exploration may take."""
        taken = deciding + self.seconds
        if self.reads:  # what it missed, and less in some steps than there would have been without it
            missed = max(self._spent - self._judgements * self.seconds, 0.0)
            taken = deciding + missed - self.gain * self._judgements * self._found.seconds
        longest = max(taken / plain / _EXPLORATION * drafters, _SHORTEST)
        return min(longest, _LONGEST_OF_READERS if self.reads else _LONGEST)

    def _sleep(self, steps: int) -> None:
        self.doubted, self._wakes = True, self._step + 1 + steps
        self._sleeps = min(self._sleeps + 1, _MOST_SLEEPS)
        if steps >= _TOGETHER:  # in steps in which others wake, too: one decision for all
            self._wakes += -self._wakes % _TOGETHER


class Standings:
    """Of one drafter: one for all, or, where it reads, for batches of 1, 2, 3 to 4, 5 to 8 sequences and so on, so that
    a batch that runs out and fills again does not wake it."""

    def __init__(self, reads: bool) -> None:
        self._reads = reads
        self._of: dict[int, Standing] = {}

    def of(self, rows: int) -> Standing:
        size = (rows - 1).bit_length() if self._reads else 0
        if size not in self._of:
            self._of[size] = Standing(self._reads)
        return self._of[size]


def _usual(before: float, seconds: float) -> float:
    """A running mean; a pause of the machine, or compiling in the first call, is not what it costs."""
    if math.isnan(before) or seconds < before / 2:
        return seconds
    return before + _RATE * (min(seconds, 2 * before) - before)
