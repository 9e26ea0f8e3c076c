"""The engine's side of broadcasts: asks for a process group, has the generator join it, and receives versions in it.

Files remain: the first version comes as a folder, and so does every one for which there is no group, or whose broadcast
failed. Between two of the engine's steps one call of `follow` does what is due.
"""

import queue
import time
from collections.abc import Callable

from pipeline.engine.generator import ReceivesWeights
from pipeline.messages import (
    WeightsAnswer,
    WeightsClosed,
    WeightsGroup,
    WeightsManifest,
    WeightsQuestion,
    WeightsWanted,
)
from pipeline.weights.group import TransferFailed

_RETRY_SECONDS, _RETRY_SECONDS_MOST = 5.0, 300.0
"""until another group is asked for; longer after each failure"""
_UNSAID = (
    'weights.transfer = "collective" here, but the learner has "files": weights are read as files; set it there, too'
)


class LiveWeights:
    """`receive` is for the socket's thread, the rest for the main loop's."""

    def __init__(
        self, ask: Callable[[WeightsQuestion], bool], broadcasts: Callable[[], bool | None],
        connections: Callable[[], int], seconds: float, on_event: Callable[[str], None],
    ) -> None:  # fmt: skip
        """
        Args:
            ask: sends a message to the learner; False when it is away.
            broadcasts: whether the learner has groups for engines; None while it is away.
            connections: to the learner so far; on a new one no group is known.
            seconds: that an answer is waited for.
            on_event: gets a line about a group that came about or failed.
        """
        self._ask, self._broadcasts, self._connections = ask, broadcasts, connections
        self._seconds, self._on_event = seconds, on_event
        self._answers: queue.SimpleQueue[WeightsGroup | WeightsManifest | WeightsClosed] = queue.SimpleQueue()
        self._connection = 0
        self._group: WeightsGroup | None = None
        self._joining_since = self._wanted_since = 0.0
        """0: not now"""
        self._retry_at, self._patience = 0.0, _RETRY_SECONDS
        self._told = False
        self.torn = False
        """a broadcast ended in the middle: the generator's weights are of no version until some are loaded"""

    def receive(self, message: WeightsAnswer) -> None:
        """An answer of the learner; returns at once."""
        if isinstance(message, (WeightsGroup, WeightsManifest, WeightsClosed)):
            self._answers.put(message)

    @property
    def arriving(self) -> bool:
        """Whether `follow` has something to do that takes its time."""
        return not self._answers.empty()

    def follow(self, generator: ReceivesWeights, wanted: int) -> bool:
        """Go on with the group, and with a version that the generator does not have yet.

        Returns:
            Whether `wanted` is loaded or on its way; else it has to be read as files.

        Raises:
            GeneratorLost: the generator has died.
        """
        if self._connection != self._connections():
            self._begin_connection(generator)
        while not self._answers.empty():
            self._handle(generator, self._answers.get())
        if self._group is None:
            self._join(generator)
            return not self.torn and wanted <= generator.version
        if wanted <= generator.version:
            return True
        now = time.monotonic()
        if not self._wanted_since:
            if not self._ask(WeightsWanted(group=self._group.group, version=wanted)):
                return False
            self._wanted_since = now
        if now - self._wanted_since > self._seconds:
            self._give_up(generator, f"the learner has not sent version {wanted} within {self._seconds:g} s")
            return False
        return True

    def loaded(self) -> None:
        """The generator has read a version from files."""
        self.torn = False

    def forget(self) -> None:
        """The generator is no more; another one begins with files."""
        self._group, self._joining_since, self._wanted_since, self.torn = None, 0.0, 0.0, False

    # ---- the group -----------------------------------------------------------------------------------------------

    def _begin_connection(self, generator: ReceivesWeights) -> None:
        """The learner knows nothing of an earlier one's group."""
        self._connection = self._connections()
        while not self._answers.empty():
            self._answers.get()
        if self._group is not None:
            generator.leave_group()
        self._group, self._joining_since, self._wanted_since = None, 0.0, 0.0
        self._retry_at, self._told = 0.0, False

    def _join(self, generator: ReceivesWeights) -> None:
        """Ask for a group, if it is time to."""
        now = time.monotonic()
        waiting = self._joining_since and now - self._joining_since < 2 * self._seconds
        offered = self._broadcasts()
        if offered is False and not self._told:
            self._told = True
            self._on_event(_UNSAID)
        if offered and not waiting and now >= self._retry_at and self._ask(generator.receiving()):
            self._joining_since = now

    def _handle(self, generator: ReceivesWeights, message: WeightsGroup | WeightsManifest | WeightsClosed) -> None:
        try:
            if isinstance(message, WeightsGroup):
                if self._joining_since:
                    self._joining_since = 0.0
                    generator.join_group(message)
                    self._group = message
                    self._on_event(f"weights come over {message.backend}, by way of {message.address}")
            elif isinstance(message, WeightsClosed):
                if self._joining_since or (self._group is not None and message.group == self._group.group):
                    self._give_up(generator, f"the learner says that {message.reason}")
            elif self._group is not None and message.group == self._group.group:
                self.torn = True  # until all of it is here
                generator.receive_weights(message)
                self.torn, self._wanted_since, self._patience = False, 0.0, _RETRY_SECONDS
        except TransferFailed as error:
            self._give_up(generator, str(error))

    def _give_up(self, generator: ReceivesWeights, why: str) -> None:
        """This version, and those until there is another group, are read as files."""
        generator.leave_group()
        self._group, self._joining_since, self._wanted_since = None, 0.0, 0.0
        self._retry_at = time.monotonic() + self._patience
        self._on_event(f"weights are read as files for {self._patience:.0f} s at least: {why}")
        self._patience = min(2 * self._patience, _RETRY_SECONDS_MOST)
