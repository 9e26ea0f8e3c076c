"""Buckets: every byte once, aligned, of bounded size, and told apart by their seals."""

from itertools import pairwise

import pytest

from pipeline.messages import WeightsTensor
from pipeline.weights.buckets import SEAL_BYTES, buckets, in_order, seal, size_of


def tensor(name: str, *shape: int, dtype: str = "float32") -> WeightsTensor:
    return WeightsTensor(name=name, dtype=dtype, shape=shape)


TENSORS = [
    tensor("a", 3), tensor("b", 5, 7, dtype="bfloat16"), tensor("none", 0, 4), tensor("scalar"), tensor("c", 300),
    tensor("d", 1, dtype="uint8"), tensor("e", 2, 2, dtype="float64"), tensor("huge", 1000, 3), tensor("f", 9),
]  # fmt: skip


@pytest.mark.parametrize("limit", [1024, 2048, 1 << 20])
def test_every_tensor_lies_once_aligned_and_whole_in_a_bucket_of_bounded_size(limit):
    found = list(buckets(TENSORS, limit))
    assert [slot.tensor for bucket in found for slot in bucket.slots] == TENSORS
    assert [bucket.number for bucket in found] == list(range(len(found)))
    for bucket in found:
        assert bucket.bytes <= limit or len(bucket.slots) == 1
        assert bucket.bytes % 8 == 0
        end = 0
        for slot in bucket.slots:
            assert slot.bytes == size_of(slot.tensor) and slot.offset % 16 == 0 and slot.offset >= end
            end = slot.offset + slot.bytes
        assert end <= bucket.bytes - SEAL_BYTES


@pytest.mark.parametrize("limit", [1024, 4096])
def test_pieces_cover_a_bucket_without_gaps_and_end_between_words(limit):
    for bucket in buckets(TENSORS, limit):
        pieces = list(bucket.pieces(limit))
        assert pieces[0][0] == 0 and pieces[-1][1] == bucket.bytes
        assert all(before[1] == after[0] for before, after in pairwise(pieces))
        assert all(0 < end - begin <= limit and end % 8 == 0 for begin, end in pieces)


def test_a_seal_belongs_to_one_bucket_of_one_version_with_one_content():
    first, second = list(buckets(TENSORS, 1024))[:2]
    seals = {seal(words, version, bucket) for words in (0, 5) for version in (0, 1) for bucket in (first, second)}
    assert len(seals) == 8 and all(0 <= found < 1 << 63 for found in seals)
    assert seal(5, 1, first) == seal(5 - (1 << 64), 1, first), "sums that wrap around are the same sum"


def test_tensors_come_as_asked_and_the_others_layer_after_layer():
    names = ["model.layers.10.w", "model.layers.9.w", "model.norm", "lm_head", "model.layers.9.b", "mtp.fc"]
    rest = ["model.layers.9.b", "model.layers.9.w", "model.layers.10.w"]
    assert in_order(names, ["mtp.fc", "unknown", "model.norm", "mtp.fc"]) == ["mtp.fc", "model.norm", "lm_head", *rest]
