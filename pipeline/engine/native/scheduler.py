"""Which sample starts next: preempted ones first, then groups in the order they came, a group's samples together.

Or staggered: one sample of each group first, the others once one of theirs is finished. What it said is then a good
guess at what they will say, which samples that run side by side cannot tell each other.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.sequence import Sequence


@dataclass(slots=True)
class _Group:
    request: GroupRequest
    limits: Items[int]
    stop: frozenset[int]
    started: int = 0
    finished: int = 0

    @property
    def waiting(self) -> int:
        """Samples that have not started."""
        return len(self.request.seeds) - self.started

    @property
    def done(self) -> bool:
        return self.finished == len(self.request.seeds)


class Scheduler:
    """The groups that are not finished, and the queue of their samples that hold no memory: not started, or preempted.

    Groups start in their order, so what staggering searches is at the front: nothing walks through the queue.
    """

    def __init__(self, stagger: bool = False) -> None:
        self._stagger = stagger
        self._groups: dict[int, _Group] = {}
        self._queue: OrderedDict[int, _Group] = OrderedDict()
        """those with samples that have not started"""
        self._preempted: deque[Sequence] = deque()
        self._count = 0
        self._next_id = 0

    def __contains__(self, group: int) -> bool:
        """Whether some sample of the group is not finished."""
        return group in self._groups

    def __len__(self) -> int:
        """Samples in the queue."""
        return self._count

    @property
    def groups(self) -> list[int]:
        """Those that are not finished."""
        return list(self._groups)

    def add(self, request: GroupRequest, limits: Items[int], stop: frozenset[int]) -> None:
        """Queues a group; sample i may have `limits[i]` tokens and ends at a token of `stop`."""
        group = _Group(request, limits, stop)
        self._groups[request.id] = self._queue[request.id] = group
        self._count += group.waiting

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that lost its memory; it is the next to go on."""
        self._preempted.appendleft(sequence)
        self._count += 1

    def next(self) -> Sequence | None:
        """The next one to start or to go on; it stays in the queue until `start`."""
        if self._preempted:
            return self._preempted[0]
        if not self._queue:
            return None
        group = self._group()
        return Sequence(self._next_id, group.request, group.started, group.limits[group.started], group.stop)

    def start(self) -> None:
        """Takes what `next` returned out of the queue."""
        self._count -= 1
        if self._preempted:
            self._preempted.popleft()
            return
        group = self._group()
        group.started += 1
        self._next_id += 1
        if not group.waiting:
            del self._queue[group.request.id]

    def finished(self, group: int) -> bool:
        """A sample of the group is finished, and where they are staggered the others wait no longer; whether it was the
        last."""
        record = self._groups[group]
        record.finished += 1
        if record.done:
            del self._groups[group]
        return record.done

    def _group(self) -> _Group:
        """The first group, or, staggered, the first that does not wait for one of its samples; no place stays empty."""
        first = next(iter(self._queue.values()))
        if self._stagger:
            return next((g for g in self._queue.values() if g.finished or not g.started), first)
        return first

    def cancel(self, group: int) -> list[Sequence]:
        """Forgets a group; returns its preempted sequences."""
        record = self._groups.pop(group, None)
        if record is None:
            return []
        preempted = [s for s in self._preempted if s.group == group]
        self._preempted = deque(s for s in self._preempted if s.group != group)
        self._queue.pop(group, None)
        self._count -= len(preempted) + record.waiting
        return preempted

    def waits(self, group: int) -> bool:
        """Whether samples of the group have not started."""
        return group in self._queue
