"""What the link tells the engine's main loop."""

from dataclasses import dataclass

from pipeline.messages import Lease


@dataclass(frozen=True, slots=True)
class Granted:
    """Leases to start, together."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class VersionHint:
    """A newer publication exists."""

    version: int


@dataclass(frozen=True, slots=True)
class Revoked:
    """Leases whose samples are not wanted any more."""

    leases: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drained:
    """The run is over: leave."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The link is dead."""

    message: str
    refused: bool
    """the learner does not want this engine; else it failed, or stayed away too long"""


Event = Granted | VersionHint | Revoked | Drained | Failed
