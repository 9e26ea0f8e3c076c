"""Messages as frames, and frames as messages: nothing is kept of a frame before its counts and types are checked.

Raises `pipeline.messages.BadMessage` for anything a peer should not have sent.
"""

from typing import Any

import msgspec
import numpy as np

from pipeline.messages import (
    LARGEST_HEADER,
    SCHEMA,
    BadMessage,
    EngineMessage,
    Grant,
    LearnerMessage,
    Lease,
    Message,
    Role,
    Sampler,
    Trajectory,
    TrajectoryHeader,
)

_encoder = msgspec.msgpack.Encoder()
_engine_decoder = msgspec.msgpack.Decoder(EngineMessage)
_learner_decoder = msgspec.msgpack.Decoder(LearnerMessage)

_LARGEST_REWARD = 1e18
"""as of `pipeline.tasks.rewards`"""
_HUGE = float(np.finfo(np.float32).max)
_ARRAYS = ("<u4", "<u4", "<f4", "<f4", "<u4", "<u4", "<u4", "u1", "u1")
_DTYPES = tuple(np.dtype(each) for each in _ARRAYS)
_SIZES = tuple(dtype.itemsize for dtype in _DTYPES)
_LAST_SAMPLER, _LAST_ROLE, _LAST_ORIGIN = max(Sampler), max(Role), 3


def encode(message: Message) -> list[bytes]:
    """Frames of a message without arrays."""
    return [_encoder.encode(message)]


def encode_trajectory(trajectory: Trajectory) -> list[bytes]:
    """Frames of a trajectory: header, and the arrays as `TrajectoryHeader` orders them."""
    arrays = (
        trajectory.prompt_ids, trajectory.token_ids, trajectory.logprobs, trajectory.entropies,
        trajectory.versions, trajectory.kept_counts, trajectory.kept_ids, trajectory.samplers, trajectory.roles,
    )  # fmt: skip
    parts = [np.ascontiguousarray(a, dtype=d).data for a, d in zip(arrays, _DTYPES, strict=True) if a is not None]
    return [_encoder.encode(trajectory.header), b"".join(parts)]


def decode_trajectory(header: TrajectoryHeader, bodies: list[bytes]) -> Trajectory:
    """Arrays of a trajectory (views of the frame, read-only).

    Raises:
        BadMessage: another schema, a frame of the wrong length, a log-prob that is not finite or above zero, a token
            that is not among those kept for it.
    """
    if header.schema != SCHEMA:
        raise BadMessage(f"trajectory schema {header.schema}, this side speaks {SCHEMA}")
    if len(bodies) != 1:
        raise BadMessage(f"trajectory with {len(bodies)} array frames instead of 1")
    arrays = _split(header, bodies[0])
    prompt_ids, token_ids, logprobs, entropies, versions, kept_counts, kept_ids, samplers, roles = arrays
    if not _within(logprobs, -_HUGE, 1e-3):
        raise BadMessage("a log-prob is not finite or is above 0")
    if not _within(entropies, -1e-3, _HUGE):
        raise BadMessage("an entropy is not finite or is below 0")
    if not all(abs(reward) <= _LARGEST_REWARD for reward in (header.reward, *header.reward_parts.values())):
        raise BadMessage(f"reward {header.reward}, or a part of it, is not finite or beyond {_LARGEST_REWARD:g}")
    _check_origins(header)
    if samplers.size and (highest := samplers.max()) > _LAST_SAMPLER:
        raise BadMessage(f"unknown sampler {highest}")
    if roles.size and (highest := roles.max()) > _LAST_ROLE:
        raise BadMessage(f"unknown role {highest}")
    kept = header.kept_ids is not None
    if kept:
        _check_kept(token_ids, kept_counts, kept_ids)
    return Trajectory(
        header=header, prompt_ids=prompt_ids, token_ids=token_ids, logprobs=logprobs,
        entropies=entropies if header.has_entropy else None, versions=versions, samplers=samplers, roles=roles,
        kept_counts=kept_counts if kept else None, kept_ids=kept_ids if kept else None,
    )  # fmt: skip


def _split(header: TrajectoryHeader, body: bytes) -> list[np.ndarray]:
    """The arrays in a frame; those that the header does not announce are empty."""
    tokens = header.response_tokens
    counts = (
        header.prompt_tokens, tokens, tokens, tokens if header.has_entropy else 0, tokens,
        tokens if header.kept_ids is not None else 0, header.kept_ids or 0, tokens, tokens,
    )  # fmt: skip
    announced = sum(count * size for count, size in zip(counts, _SIZES, strict=True))
    if len(body) != announced:
        raise BadMessage(f"array frame of {len(body)} bytes where {announced} were announced")
    arrays, offset = [], 0
    for dtype, size, count in zip(_DTYPES, _SIZES, counts, strict=True):
        arrays.append(np.frombuffer(body, dtype, count, offset) if count else np.empty(0, dtype))
        offset += count * size
    return arrays


def _check_origins(header: TrajectoryHeader) -> None:
    """What a sample that is to be shown tells of each token."""
    for told, last in ((header.origins, _LAST_ORIGIN), (header.draft_sources, len(header.drafters))):
        if told and len(told) != header.response_tokens:
            raise BadMessage(f"{len(told)} origins of tokens where {header.response_tokens} tokens were announced")
        if told and max(told) > last:
            raise BadMessage("an origin of a token that is not known, or a drafter that is not in the header")


def _within(values: np.ndarray, low: float, high: float) -> bool:
    """Whether all values lie between; a NaN lies nowhere, as every comparison with it is false."""
    return not values.size or bool(values.min() >= low and values.max() <= high)


def _check_kept(token_ids: np.ndarray, kept_counts: np.ndarray, kept_ids: np.ndarray) -> None:
    """Every token for which ids were kept must be one of them, once."""
    total = int(kept_counts.sum(dtype=np.uint64))
    if total != len(kept_ids):
        raise BadMessage(f"{len(kept_ids)} kept ids where {total} were announced")
    position = np.repeat(np.arange(len(token_ids)), kept_counts)
    found = np.bincount(position[kept_ids == token_ids[position]], minlength=len(token_ids))
    if (found != (kept_counts > 0)).any():
        raise BadMessage(f"token {int(np.argmax(found != (kept_counts > 0)))} was not drawn from the ids kept for it")


def decode_from_engine(frames: list[bytes]) -> EngineMessage | Trajectory:
    """What an engine sent; a trajectory comes with its arrays."""
    if frames and len(frames[0]) > LARGEST_HEADER:
        raise BadMessage(f"a header of {len(frames[0])} bytes, at most {LARGEST_HEADER} are allowed")
    message = _decode(_engine_decoder, frames)
    if isinstance(message, TrajectoryHeader):
        return decode_trajectory(message, frames[1:])
    if len(frames) > 1:
        raise BadMessage(f"{type(message).__name__} with {len(frames) - 1} frames it should not have")
    return message


def decode_from_learner(frames: list[bytes]) -> LearnerMessage:
    """What the learner sent."""
    message = _decode(_learner_decoder, frames)
    if len(frames) > 1:
        raise BadMessage(f"{type(message).__name__} with {len(frames) - 1} frames it should not have")
    if isinstance(message, Grant):
        for lease in message.leases:
            _check_lease(lease)
    return message


def _check_lease(lease: Lease) -> None:
    """What a lease says of its samples must agree."""
    size = lease.group_size
    if not 1 <= size == len(lease.seeds):
        raise BadMessage(f"lease {lease.id} of {size} samples with {len(lease.seeds)} seeds")
    if lease.temperatures and len(lease.temperatures) != size:
        raise BadMessage(f"lease {lease.id} of {size} samples with {len(lease.temperatures)} temperatures")


def _decode(decoder: msgspec.msgpack.Decoder, frames: list[bytes]) -> Any:
    if not frames:
        raise BadMessage("a message without frames")
    try:
        return decoder.decode(frames[0])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(str(error)) from error
