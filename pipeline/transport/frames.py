"""A message's frames as one record of a log: their number, their lengths, then the frames themselves."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from struct import calcsize, error, pack, unpack_from


def pack_frames(frames: Sequence[bytes]) -> list[bytes]:
    """Parts that make a record when written one after the other; the frames are not copied."""
    return [pack(f"<{1 + len(frames)}I", len(frames), *map(len, frames)), *frames]


def unpack_frames(record: bytes) -> list[bytes]:
    """The frames of a record.

    Raises:
        ValueError: it is none that `pack_frames` made.
    """
    try:
        (count,) = unpack_from("<I", record)
        begin = calcsize("<I") * (1 + count)
        lengths = unpack_from(f"<{count}I", record, 4) if begin <= len(record) else ()
    except error as problem:
        raise ValueError("a record that is no list of frames") from problem
    bounds = [*accumulate(lengths, initial=begin)]
    if bounds[-1] != len(record):
        raise ValueError("a record that is no list of frames")
    return [record[start:end] for start, end in pairwise(bounds)]
