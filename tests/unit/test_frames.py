"""Frames come back from a record as they went in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.transport.frames import pack_frames, unpack_frames


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_frames_come_back_as_they_went_in(frames):
    assert unpack_frames(b"".join(pack_frames(frames))) == frames


@given(st.lists(st.binary(max_size=9), max_size=4), st.binary(min_size=1, max_size=5))
def test_a_record_of_another_length_is_refused(frames, more):
    record = b"".join(pack_frames(frames))
    for wrong in (record + more, record[:-1]):
        with pytest.raises(ValueError, match="no list of frames"):
            unpack_frames(wrong)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_raise_nothing_but_value_error(record):
    try:
        frames = unpack_frames(record)
    except ValueError:
        return
    assert b"".join(pack_frames(frames)) == record
