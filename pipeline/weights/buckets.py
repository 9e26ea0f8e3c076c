"""How the tensors of a publication are laid out for broadcasts: in which order, and in buckets of bounded size.

Learner and engine compute the same layout from the same manifest. A bucket is some whole tensors, each at a multiple of
16 bytes, and a seal, the last 8 bytes; a tensor that is larger than a bucket has one to itself. It travels in pieces of
at most a bucket's size, so that a sender needs no more memory than that beside its tensors. Torch-free.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from pipeline.messages import WeightsTensor

BUCKET_BYTES = 64 << 20
SEAL_BYTES = 8
_ALIGNMENT = 16
_SIZES: dict[str, int] = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
_DIGITS = re.compile(r"(\d+)")
_MASK = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in its bucket, in bytes."""

    tensor: WeightsTensor
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    number: int
    slots: tuple[Slot, ...]
    bytes: int
    """the seal included"""

    def pieces(self, limit: int) -> Iterator[tuple[int, int]]:
        """(begin, end) of each broadcast."""
        for begin in range(0, self.bytes, limit):
            yield begin, min(begin + limit, self.bytes)


def size_of(tensor: WeightsTensor) -> int:
    """In bytes."""
    return prod(tensor.shape) * _SIZES[tensor.dtype]


def in_order(names: Iterable[str], first: Sequence[str] = ()) -> list[str]:
    """Names in the order of broadcasts: those of `first` that there are, then the others, layer 10 after layer 9."""
    present = set(names)
    head = [name for name in dict.fromkeys(first) if name in present]
    return head + sorted(present.difference(head), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(name)]


def buckets(tensors: Iterable[WeightsTensor], limit: int) -> Iterator[Bucket]:
    """
    Args:
        tensors: in the order of their broadcast.
        limit: bytes of a bucket of more than one tensor, a multiple of 16.
    """
    number, end = 0, 0
    slots: list[Slot] = []
    for tensor in tensors:
        size = size_of(tensor)
        if slots and end + size + SEAL_BYTES > limit:
            yield Bucket(number, tuple(slots), end + SEAL_BYTES)
            number, end, slots = number + 1, 0, []
        slots.append(Slot(tensor, end, size))
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    if slots:
        yield Bucket(number, tuple(slots), end + SEAL_BYTES)


def seal(words: int, version: int, bucket: Bucket) -> int:
    """What a bucket ends with, an int64: its place in its publication, and the sum of its other int64 words. It tells
    this bucket of this version from any other, and from half of one, but not an attacker's bytes from ours."""
    return (words + 0x9E3779B97F4A7C15 * (version + 1) + 0xC2B2AE3D27D4EB4F * (bucket.number + 1)) & _MASK
