"""What was damaged on the way is not taken."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.transport.integrity import RESET, seal, unseal

FRAMES = st.lists(st.binary(max_size=40), min_size=1, max_size=5)


@given(FRAMES)
def test_frames_arrive_as_they_left(frames):
    assert unseal(seal(frames)) == frames


@given(FRAMES, st.data())
def test_any_flipped_bit_is_noticed(frames, data):
    sealed = seal(frames)
    index = data.draw(st.integers(0, len(sealed) - 1).filter(lambda i: len(sealed[i]) > 0))
    bit = data.draw(st.integers(0, 8 * len(sealed[index]) - 1))
    damaged = bytearray(sealed[index])
    damaged[bit // 8] ^= 1 << (bit % 8)
    assert unseal([*sealed[:index], bytes(damaged), *sealed[index + 1 :]]) is None


def test_bytes_that_moved_between_frames_and_missing_frames_are_noticed():
    sealed = seal([b"abc", b"def", b""])
    assert unseal([b"ab", b"cdef", *sealed[2:]]) is None
    assert unseal(sealed[1:]) is None and unseal(sealed[:-1]) is None
    assert unseal([]) is None and unseal(RESET) is None
