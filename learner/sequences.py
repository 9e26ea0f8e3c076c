"""Gaps and repeats in the streams of engines, by (producer, incarnation, sequence). They decide nothing: what counts is
(lease, sample). But a gap that stays says that something an engine finished never came, and a spool record that was
damaged, or a defect, is behind it."""

from collections import OrderedDict
from dataclasses import dataclass, field

_STREAMS = 1024
_HOLES = 256
"""remembered a stream; of more the oldest are given up and count as missing for ever"""


@dataclass(slots=True)
class _Stream:
    base: int
    """below this nothing is known"""
    end: int
    """one above the highest number seen"""
    holes: list[tuple[int, int]] = field(default_factory=list)
    """[begin, end) of numbers between base and end that were not seen, in rising order"""


class Sequences:
    """Not for several threads; the hub guards it."""

    def __init__(self) -> None:
        self._streams: OrderedDict[tuple[str, int], _Stream] = OrderedDict()
        self._given_up = 0
        self.repeats = 0
        """numbers that came more than once"""

    @property
    def missing(self) -> int:
        """Numbers skipped that have not come yet."""
        holes = (hole for stream in self._streams.values() for hole in stream.holes)
        return self._given_up + sum(end - begin for begin, end in holes)

    def restored(self, producer: str, incarnation: int, sequence: int) -> None:
        """A number that came before the learner restarted; what was below it is not known any more."""
        stream = self._stream(producer, incarnation, sequence)
        stream.base = stream.end = max(stream.end, sequence + 1)

    def seen(self, producer: str, incarnation: int, sequence: int) -> None:
        """A number arrived."""
        stream = self._stream(producer, incarnation, sequence)
        if sequence >= stream.end:
            if sequence > stream.end:
                self._add_hole(stream, sequence)
            stream.end = sequence + 1
        elif sequence >= stream.base and not self._fill(stream, sequence):
            self.repeats += 1

    def _stream(self, producer: str, incarnation: int, sequence: int) -> _Stream:
        key = producer, incarnation
        if key not in self._streams:
            self._streams[key] = _Stream(sequence, sequence)
            if len(self._streams) > _STREAMS:
                _, old = self._streams.popitem(last=False)
                self._given_up += sum(end - begin for begin, end in old.holes)
        self._streams.move_to_end(key)
        return self._streams[key]

    def _add_hole(self, stream: _Stream, sequence: int) -> None:
        stream.holes.append((stream.end, sequence))
        self._bound(stream)

    def _bound(self, stream: _Stream) -> None:
        if len(stream.holes) > _HOLES:
            begin, end = stream.holes.pop(0)
            self._given_up += end - begin
            stream.base = end

    def _fill(self, stream: _Stream, sequence: int) -> bool:
        for index, (begin, end) in enumerate(stream.holes):
            if begin <= sequence < end:
                parts = [(begin, sequence), (sequence + 1, end)]
                stream.holes[index : index + 1] = [part for part in parts if part[0] < part[1]]
                self._bound(stream)
                return True
        return False
