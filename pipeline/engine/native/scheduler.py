"""Which sample starts next: groups in the order they came, as many of their samples as there is room for."""

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

    @property
    def left(self) -> int:
        return len(self.request.seeds) - self.started


class Scheduler:
    """The queue of samples that have not started."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._next_id = 0

    def add(self, request: GroupRequest, limits: Items[int], stop: frozenset[int]) -> None:
        """Queues a group; sample i may have `limits[i]` tokens and ends at a token of `stop`."""
        self._waiting.append(_Waiting(request, limits, stop))

    def cancel(self, group: int) -> None:
        self._waiting = deque(w for w in self._waiting if w.request.id != group)

    def start(self, room: int) -> list[Sequence]:
        """Up to `room` sequences, a group's next to each other; what is left of a group stays first in the queue."""
        starting: list[Sequence] = []
        while self._waiting and len(starting) < room:
            group = self._waiting[0]
            for _ in range(min(group.left, room - len(starting))):
                limit = group.limits[group.started]
                starting.append(Sequence(self._next_id, group.request, group.started, limit, group.stop))
                group.started += 1
                self._next_id += 1
            if not group.left:
                self._waiting.popleft()
        return starting

    def groups(self) -> set[int]:
        return {w.request.id for w in self._waiting}

    def __len__(self) -> int:
        return sum(w.left for w in self._waiting)
