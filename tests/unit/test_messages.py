"""The wire schema carries what it is given and refuses everything else with BadMessage."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import codec, messages
from pipeline.messages import SCHEMA, BadMessage, DraftCounts, SamplingParams, Trajectory, TrajectoryHeader


def make_trajectory(tokens: int = 5, entropies: bool = True, **header) -> Trajectory:
    generator = np.random.default_rng(tokens)
    plain = TrajectoryHeader(
        schema=SCHEMA, producer="producer", incarnation=2, sequence=9, lease=4, sample=1, prompt_tokens=3,
        response_tokens=tokens, has_entropy=entropies, reward=0.5, reward_parts={"right": 0.5}, finish_reason="stop",
        sampling=SamplingParams(temperature=0.7, stop_token_ids=(2,)), verifications=4,
        drafters={"suffix-automaton": DraftCounts(drafted=6, accepted=2)},
    )  # fmt: skip
    return Trajectory(
        header=msgspec.structs.replace(plain, **header),
        prompt_ids=np.array([1, 2, 3], np.uint32),
        token_ids=generator.integers(0, 1000, tokens).astype(np.uint32),
        logprobs=-generator.random(tokens).astype(np.float32),
        entropies=generator.random(tokens).astype(np.float32) if entropies else None,
        versions=np.arange(tokens, dtype=np.uint32),
        samplers=np.arange(tokens, dtype=np.uint8) % 3,
        roles=np.arange(tokens, dtype=np.uint8) % 2,
    )


def with_kept_ids(trajectory: Trajectory) -> Trajectory:
    """Of token i, i % 3 ids beside itself; of the last token, nothing was truncated."""
    ids = [[token, *range(2000, 2000 + i % 3)] for i, token in enumerate(trajectory.token_ids.tolist()[:-1])]
    trajectory.kept_counts = np.array([len(some) for some in [*ids, []]], np.uint32)
    trajectory.kept_ids = np.concatenate([*ids, []]).astype(np.uint32)
    trajectory.header = msgspec.structs.replace(trajectory.header, kept_ids=len(trajectory.kept_ids))
    return trajectory


ARRAYS = ("prompt_ids", "token_ids", "logprobs", "versions", "samplers", "roles")


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("entropies", [False, True])
def test_trajectory_arrives_as_it_left(tokens, entropies):
    sent = make_trajectory(tokens, entropies)
    got = codec.decode_from_engine(codec.encode_trajectory(sent))
    assert isinstance(got, Trajectory)
    assert got.header == sent.header and got.id == (4, 1)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
        assert getattr(got, name).dtype == getattr(sent, name).dtype
    assert (got.entropies is None) == (not entropies)
    if entropies:
        np.testing.assert_array_equal(got.entropies, sent.entropies)


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_kept_ids_arrive_as_they_left(tokens):
    sent = with_kept_ids(make_trajectory(tokens))
    got = codec.decode_from_engine(codec.encode_trajectory(sent))
    np.testing.assert_array_equal(got.kept_counts, sent.kept_counts)
    np.testing.assert_array_equal(got.kept_ids, sent.kept_ids)
    plain = codec.decode_from_engine(codec.encode_trajectory(make_trajectory(tokens)))
    assert plain.kept_counts is None and plain.kept_ids is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.kept_ids.__setitem__(0, 4000), "token 0 was not drawn from the ids kept for it"),
        (lambda t: t.kept_counts.__setitem__(1, 3), "9 kept ids where 10 were announced"),
        (lambda t: t.kept_counts.__setitem__(1, 1 << 31), "were announced"),
        (lambda t: t.kept_ids.__setitem__(2, t.kept_ids[1]), "token 1 was not drawn"),
        (lambda t: setattr(t, "header", msgspec.structs.replace(t.header, kept_ids=8)), "array frame"),
        (lambda t: setattr(t, "header", msgspec.structs.replace(t.header, kept_ids=None)), "array frame"),
    ],
)
def test_kept_ids_that_do_not_fit_the_tokens_are_refused(change, complaint):
    sent = with_kept_ids(make_trajectory(6))
    change(sent)
    with pytest.raises(BadMessage, match=complaint):
        codec.decode_from_engine(codec.encode_trajectory(sent))


def test_arrays_travel_little_endian_whatever_their_type_was():
    sent = make_trajectory(2)
    sent.token_ids = np.array([1, 258], dtype=">i8")
    assert codec.encode_trajectory(sent)[1][12:20] == bytes([1, 0, 0, 0, 2, 1, 0, 0])


@pytest.mark.parametrize(
    ("array", "value", "complaint"),
    [
        ("logprobs", np.nan, "log-prob"),
        ("logprobs", 0.5, "log-prob"),
        ("logprobs", -np.inf, "log-prob"),
        ("entropies", -1.0, "entropy"),
        ("entropies", np.nan, "entropy"),
        ("samplers", 7, "unknown sampler 7"),
        ("roles", 9, "unknown role 9"),
    ],
)
def test_impossible_values_are_refused(array, value, complaint):
    sent = make_trajectory()
    getattr(sent, array)[2] = value
    with pytest.raises(BadMessage, match=complaint):
        codec.decode_from_engine(codec.encode_trajectory(sent))


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"schema": SCHEMA + 1}, "schema"),
        ({"response_tokens": 6}, "array frame"),
        ({"prompt_tokens": 2}, "array frame"),
        ({"has_entropy": False}, "array frame"),
        ({"reward": float("nan")}, "reward"),
    ],
)
def test_header_that_contradicts_the_arrays_is_refused(header, complaint):
    with pytest.raises(BadMessage, match=complaint):
        codec.decode_from_engine(codec.encode_trajectory(make_trajectory(**header)))


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        codec.encode(messages.Drain()),
        codec.encode_trajectory(make_trajectory())[:-1],
        [*codec.encode(messages.Leaving()), b"body"],
        [msgspec.msgpack.encode({"type": "leaving", "handed_back": [-1]})],
        [msgspec.msgpack.encode({"type": "progress", "running": [], "credit": 1 << 40, "version": 0})],
        *[
            [msgspec.msgpack.encode({"type": "progress", "running": [], "credit": 0, "version": 0} | wrong)]
            for wrong in (
                {"busy_seconds": float("nan")},
                {"blocked_seconds": float("inf")},
                {"seconds": {"a": -1.0}},
                {"version": 1 << 40},
                {"version": -2},
            )
        ],
        *[
            codec.encode(
                messages.Hello(
                    schema=SCHEMA, producer=producer, incarnation=0, digest={}, capabilities=messages.Capabilities()
                )
            )
            for producer in ("", "a\nb", "../a", "a" * 200, "\x1b[2J")
        ],
        [msgspec.msgpack.encode({"type": "sample-failed", "lease": 0, "sample": 0, "reason": b"\xff", "detail": ""})],
    ],
)
def test_malformed_engine_messages_are_refused(frames):
    with pytest.raises(BadMessage):
        codec.decode_from_engine(frames)


@pytest.mark.parametrize(
    "wrong",
    [{"group_size": 0}, {"group_size": 3}, {"seeds": ()}, {"temperatures": (1.0,)}, {"temperatures": (0.0, 1.0)}],
)
def test_leases_that_contradict_themselves_are_refused(wrong):
    lease = messages.Lease(
        id=0, epoch=0, kind="train", prompt="", prompt_ids=(1,), columns={}, group_size=2, seeds=(1, 2), version=0,
        sampling=SamplingParams(),
    )  # fmt: skip
    grant = messages.Grant(leases=(lease,))
    assert codec.decode_from_learner(codec.encode(grant)) == grant
    with pytest.raises(BadMessage):
        codec.decode_from_learner(codec.encode(messages.Grant(leases=(lease, msgspec.structs.replace(lease, **wrong)))))


def test_a_header_holds_only_what_differs_from_the_defaults():
    plain = make_trajectory(sampling=SamplingParams(), drafters={}, reward_parts={})
    told = msgspec.msgpack.decode(codec.encode_trajectory(plain)[0])
    assert told["sampling"] == {} and "origins" not in told and "text" not in told
    assert len(codec.encode_trajectory(plain)[0]) < 260


@given(st.lists(st.binary(max_size=60), max_size=9))
def test_arbitrary_bytes_raise_nothing_but_bad_message(frames):
    for decode in (codec.decode_from_engine, codec.decode_from_learner):
        try:
            decode(frames)
        except BadMessage:
            continue


@given(position=st.integers(0, 10_000), value=st.integers(0, 255), frame=st.integers(0, 1))
def test_damaged_trajectories_raise_nothing_but_bad_message(position, value, frame):
    frames = codec.encode_trajectory(with_kept_ids(make_trajectory()))
    damaged = bytearray(frames[frame])
    damaged[position % len(damaged)] = value
    frames[frame] = bytes(damaged)
    try:
        got = codec.decode_from_engine(frames)
    except BadMessage:
        return
    if isinstance(got, Trajectory):
        assert got.header.response_tokens == len(got.token_ids) and np.isfinite(got.logprobs).all()


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x90"


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_refused_or_skipped_without_harm(depth):
    frame = b"\x82" + msgspec.msgpack.encode("type") + msgspec.msgpack.encode("leaving")
    frame += msgspec.msgpack.encode("unknown") + nested(depth)
    try:
        codec.decode_from_engine([frame])
    except BadMessage:
        assert depth > 100


def test_lists_longer_than_allowed_and_huge_headers_are_refused():
    long = messages.Leaving(handed_back=tuple(range(messages.IDS_A_MESSAGE + 1)))
    with pytest.raises(BadMessage, match="length"):
        codec.decode_from_engine(codec.encode(long))
    announced = b"\x82\xa4type\xa7leaving\xabhanded_back\xdd\xff\xff\xff\xff"  # four thousand million entries
    with pytest.raises(BadMessage):
        codec.decode_from_engine([announced])
    with pytest.raises(BadMessage, match="header"):
        codec.decode_from_engine([bytes(messages.LARGEST_HEADER + 1)])


def test_a_part_of_the_reward_that_is_no_number_is_refused():
    with pytest.raises(BadMessage, match="part"):
        codec.decode_from_engine(codec.encode_trajectory(make_trajectory(reward_parts={"right": float("inf")})))


def test_an_error_of_any_length_fits_into_a_message():
    told = messages.fatal("m" * (1 << 21), "t" * (1 << 21) + "end")
    assert codec.decode_from_engine(codec.encode(told)) == told and told.traceback.endswith("end")


def test_messages_of_a_later_version_with_new_fields_are_understood():
    later = msgspec.msgpack.encode({"type": "leaving", "handed_back": [3], "mood": "fine"})
    assert codec.decode_from_engine([later]) == messages.Leaving(handed_back=(3,))
