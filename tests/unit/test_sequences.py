"""Gaps and repeats in a stream are counted, whatever the order, in bounded memory."""

import random

from learner.sequences import Sequences


def test_a_stream_in_order_has_neither_gaps_nor_repeats():
    sequences = Sequences()
    for number in range(100):
        sequences.seen("a", 0, number)
        sequences.seen("b", 0, number)
    assert (sequences.missing, sequences.repeats) == (0, 0)


def test_counts_agree_with_sets_in_any_order():
    generator = random.Random(0)
    for _ in range(200):
        sequences, seen, repeats = Sequences(), set(), 0
        sequences.seen("a", 0, 0)
        seen.add(0)
        for _ in range(60):
            number = generator.randrange(40)
            repeats += number in seen
            seen.add(number)
            sequences.seen("a", 0, number)
        assert sequences.missing == max(seen) + 1 - len(seen)
        assert sequences.repeats == repeats


def test_a_new_incarnation_is_a_stream_of_its_own():
    sequences = Sequences()
    for incarnation in range(3):
        sequences.seen("a", incarnation, 0)
    assert (sequences.missing, sequences.repeats) == (0, 0)


def test_what_came_before_a_restart_is_neither_missing_nor_repeated():
    sequences = Sequences()
    for number in (4, 9, 7):
        sequences.restored("a", 0, number)
    for number in (5, 10, 11):  # 5 was with the engine still
        sequences.seen("a", 0, number)
    assert (sequences.missing, sequences.repeats) == (0, 0)
    sequences.seen("a", 0, 14)
    assert sequences.missing == 2


def test_a_hostile_stream_takes_bounded_memory():
    sequences = Sequences()
    sequences.seen("a", 0, 0)
    for number in range(10_000):
        sequences.seen("a", 0, (number + 1) * (1 << 40))
        sequences.seen(f"p{number}", 0, 0)
    assert len(sequences._streams) <= 1024
    assert all(len(stream.holes) <= 256 for stream in sequences._streams.values())
    huge = Sequences()
    huge.seen("a", 0, 0)
    huge.seen("a", 0, 1 << 61)
    for number in range(2, 4000, 2):
        huge.seen("a", 0, number)
    assert len(huge._streams["a", 0].holes) <= 256
