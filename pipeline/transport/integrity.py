"""A checksum behind every message.

TCP's own checksum lets about one damaged segment in 65,536 through, and what damages memory on the way damages it
before or after TCP looks. A flipped bit in a token id would be trained on; so the sender appends the CRC-32 of all
frames and their lengths as a last frame. Encrypted connections need none: CURVE authenticates what it carries.
"""

from collections.abc import Sequence
from struct import Struct, pack

from pipeline.transport.checksum import crc32

_TRAILER = Struct("<I")
RESET = [b"\x15"]
"""Sent in place of a message, without a checksum: what you sent was damaged; connect anew and send it again."""


def seal(frames: Sequence[bytes]) -> list[bytes]:
    """A message's frames and their checksum."""
    return [*frames, _TRAILER.pack(_checksum(frames))]


def unseal(frames: list[bytes]) -> list[bytes] | None:
    """The frames without their checksum; None when they are not what was sent."""
    if len(frames) < 2 or len(frames[-1]) != _TRAILER.size:
        return None
    body = frames[:-1]
    return body if _checksum(body) == _TRAILER.unpack(frames[-1])[0] else None


def _checksum(frames: Sequence[bytes]) -> int:
    value = crc32(pack(f"<{len(frames)}Q", *map(len, frames)))
    for frame in frames:
        value = crc32(frame, value)
    return value
