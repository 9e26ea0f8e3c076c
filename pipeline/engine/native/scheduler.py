"""Which sample starts next: preempted ones first, then groups in the order they came, a group's samples together.

Or staggered: one sample of each group first, the others once one of theirs is finished. What it said is then a good
guess at what they will say, which samples that run side by side cannot tell each other.
"""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.sequence import Sequence


@dataclass(slots=True)
class _Waiting:
    request: GroupRequest
    limits: Items[int]
    stop: frozenset[int]
    started: int = 0
    ahead: bool = False
    """whether one of its samples is finished"""

    @property
    def left(self) -> int:
        return len(self.request.seeds) - self.started


class Scheduler:
    """The queue of samples that hold no memory: not started, or preempted.

    Groups start in their order, so what staggering searches is at the front: only `cancel` walks past them.
    """

    def __init__(self, stagger: bool = False) -> None:
        self._stagger = stagger
        self._groups: deque[_Waiting] = deque()
        self._preempted: deque[Sequence] = deque()
        self._left: dict[int, int] = {}
        """samples of each group that have not started"""
        self._count = 0
        self._next_id = 0

    def add(self, request: GroupRequest, limits: Items[int], stop: frozenset[int]) -> None:
        """Queues a group; sample i may have `limits[i]` tokens and ends at a token of `stop`."""
        self._groups.append(_Waiting(request, limits, stop))
        self._left[request.id] = len(request.seeds)
        self._count += len(request.seeds)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that lost its memory; it is the next to go on."""
        self._preempted.appendleft(sequence)
        self._count += 1

    def next(self) -> Sequence | None:
        """The next one to start or to go on; it stays in the queue until `start`."""
        if self._preempted:
            return self._preempted[0]
        if not self._groups:
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
        self._left[group.request.id] -= 1
        if not group.left:
            self._groups.remove(group)
            del self._left[group.request.id]

    def finished(self, group: int) -> None:
        """A sample of the group is finished: the others need not wait any longer."""
        if self._stagger and group in self._left:
            next(w for w in self._groups if w.request.id == group).ahead = True

    def _group(self) -> _Waiting:
        """The first group, or, staggered, the first that does not wait for one of its samples; no place stays empty."""
        if self._stagger:
            return next((w for w in self._groups if w.ahead or not w.started), self._groups[0])
        return self._groups[0]

    def cancel(self, group: int) -> list[Sequence]:
        """Forgets a group; returns its preempted sequences."""
        preempted = [s for s in self._preempted if s.request.id == group]
        self._preempted = deque(s for s in self._preempted if s.request.id != group)
        self._groups = deque(w for w in self._groups if w.request.id != group)
        self._count -= len(preempted) + self._left.pop(group, 0)
        return preempted

    def waits(self, group: int) -> bool:
        """Whether samples of the group have not started."""
        return group in self._left

    def groups(self) -> set[int]:
        return self._left.keys() | {s.request.id for s in self._preempted}

    def __len__(self) -> int:
        return self._count
