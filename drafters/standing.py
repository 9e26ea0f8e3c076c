"""What asking a drafter costs and brings, and when it is worth asking again: with few sequences and with many, each
apart, since a batch that runs out and fills again teaches little about the other."""

import math
from dataclasses import dataclass

DEAR = 0.03
"""A drafter that takes more than this part of a plain step is judged whenever it is asked."""
_PATIENCE, _DEAR_PATIENCE = 12, 2
"""steps in a row in which it did not pay, after which it sleeps"""
_EXPLORATION = 0.01
"""part of the time that asking drafters which do not pay may take"""
_SHORTEST, _LONGEST, _LONGEST_OF_READERS = 16, 64, 512
"""steps of a sleep when it is longest: at least, for drafters that cost next to nothing, at most, and at most for those
that have to read what they missed"""
SAMPLE = 4
"""sequences that a drafter which reads is asked for, to see whether it still does not pay"""
_RATE = 0.1
_UNKNOWN = 1 << 40


@dataclass(slots=True)
class Standing:
    """Of one drafter in an arbiter, with about so many sequences; steps are those with about so many."""

    reads: bool = False
    """whether it computes a model over what it missed: to ask it again costs as much as if it had never slept"""
    widest: int = _UNKNOWN
    """longest draft it has made"""
    gain: float = math.nan
    """by how much asking it raises tokens a second, its own time included; not a number before it is known"""
    _asking: float = math.nan
    _telling: float = math.nan
    _latest: float = 0.0
    """of the last time it was asked, for all sequences or a few"""
    _step: int = 0
    _asked: int = 0
    """step"""
    _idle: int = 0
    _wakes: int = 0
    """step"""

    @property
    def seconds(self) -> float:
        """Of a step in which it is asked and told what came of it."""
        return (self._asking if self._asking >= 0 else 0.0) + (self._telling if self._telling >= 0 else 0.0)

    def part_of(self, seconds: float) -> float:
        """Its own time, measured in a step's."""
        return self.seconds / seconds

    def begin_step(self) -> bool:
        """Whether to ask it in this step."""
        self._step += 1
        return self._step >= self._wakes

    @property
    def awake(self) -> bool:
        """Whether it is going to be asked in the next step."""
        return self._step + 1 >= self._wakes

    def samples(self, rows: int, plain: float) -> bool:
        """Whether a few of so many sequences are enough to ask it for: it has slept, did not pay, and must read what it
        missed of each sequence that it is asked for."""
        slept = self._step - self._asked > 1
        return self.reads and rows > SAMPLE and self.gain <= 0 and slept and self.part_of(plain) > DEAR

    def was_asked(self, seconds: float, width: int, whole: bool = True) -> None:
        """It proposed drafts of up to `width` tokens, for all sequences where it was asked as a whole."""
        if whole:
            self._asking = _least_of_late(self._asking, seconds)
        self._latest, self._asked = seconds, self._step
        if width:
            self.widest = width if self.widest == _UNKNOWN else max(self.widest, width)

    def was_told(self, seconds: float) -> None:
        """It observed a step."""
        self._telling = _least_of_late(self._telling, seconds)

    def judged(self, gain: float, plain: float, steps: int = 1) -> None:
        """Asking it raised tokens a second by `gain`, where a step without drafts takes `plain` seconds; a sample of
        so many steps."""
        self.gain = gain if math.isnan(self.gain) else self.gain + _RATE * (gain - self.gain)
        if self.gain > 0:
            self._idle = 0
            return
        self._idle += steps
        cost = self.part_of(plain)
        over = self._idle - (_DEAR_PATIENCE if cost > DEAR else _PATIENCE)
        if over > 0:
            longest = max((self._latest / plain if self.reads else cost) / _EXPLORATION, _SHORTEST)
            longest = min(longest, _LONGEST_OF_READERS if self.reads else _LONGEST)
            self._wakes = self._step + 1 + int(longest if cost > DEAR else min(longest, 1 + over / 2))


class Standings:
    """Of one drafter, for batches of 1, 2, 3 to 4, 5 to 8 sequences and so on."""

    def __init__(self, reads: bool) -> None:
        self._reads = reads
        self._of: dict[int, Standing] = {}

    def of(self, rows: int) -> Standing:
        size = (rows - 1).bit_length()
        if size not in self._of:
            self._of[size] = Standing(self._reads)
        return self._of[size]


def _least_of_late(before: float, seconds: float) -> float:
    """A pause of the machine, or compiling in the first call, is not what it costs."""
    return seconds if math.isnan(before) else min(seconds, 1.05 * before)
