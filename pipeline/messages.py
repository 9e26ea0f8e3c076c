"""The wire schema between engines and the learner. Torch-free.

Frame 0 of every message is one msgspec struct with a tag; arrays of a trajectory follow as raw little-endian frames.
New fields go last and have a default. `decode` raises `BadMessage` for anything a peer should not have sent; it
checks counts and types before it keeps a byte.
"""

from enum import IntEnum
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

SCHEMA = 2

Text = Annotated[str, Meta(max_length=1 << 20)]
Name = Annotated[str, Meta(max_length=256)]
Id = Annotated[int, Meta(ge=0, lt=1 << 62)]
Small = Annotated[int, Meta(ge=0, lt=1 << 31)]
SampleId = tuple[Id, Small]
"""(lease id, sample index in the group): the identity of a trajectory."""


class BadMessage(ValueError):
    """A peer sent something the schema does not allow; the text says what."""


class Sampler(IntEnum):
    """Who sampled a token (u8 on the wire)."""

    POLICY = 0
    SWITCHED_MODEL = 1
    COMPRESSED_KV = 2


class Role(IntEnum):
    """Where a token comes from (u8 on the wire); only generated tokens are trained."""

    GENERATED = 0
    ENVIRONMENT = 1


class Message(Struct, kw_only=True, frozen=True, forbid_unknown_fields=False):
    """Base of everything in frame 0."""


Finite = Annotated[float, Meta(ge=-1e6, le=1e6)]


class SamplingParams(Struct, kw_only=True, frozen=True):
    """How tokens are drawn and when a response ends; `pipeline.sampling.processors` says in which order settings act.
    Every default leaves the model's own distribution as it is."""

    temperature: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    """0 is greedy: the most likely token; truncation does not matter then"""
    max_new_tokens: Annotated[int, Meta(ge=1, lt=1 << 24)] = 256
    stop_token_ids: tuple[Small, ...] = ()
    top_k: Small = 0
    """keep the k most likely tokens; 0: all"""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """keep the fewest most likely tokens that have this probability together"""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """keep tokens at least this likely, relative to the most likely one"""
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    """divides positive and multiplies negative logits of tokens in prompt or response"""
    presence_penalty: Finite = 0.0
    """taken off the logits of tokens in the response"""
    frequency_penalty: Finite = 0.0
    """taken off the logits of tokens in the response, once for each time they occur"""
    logit_bias: tuple[tuple[Small, Finite], ...] = ()
    """(token id, added to its logit)"""
    allowed_token_ids: tuple[Small, ...] = ()
    """only these can be drawn; none given: all"""
    bad_token_ids: tuple[Small, ...] = ()
    """these are never drawn"""
    min_new_tokens: Small = 0
    """before so many tokens a response cannot stop"""
    stop_strings: tuple[Annotated[str, Meta(min_length=1, max_length=1 << 12)], ...] = ()
    """the token that completes one of these in the response's text is its last"""

    @property
    def truncates(self) -> bool:
        """Whether only a part of the vocabulary can be drawn, chosen by probability."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether logits depend on which tokens came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def masks(self) -> bool:
        """Whether logits of named tokens are changed."""
        return bool(self.logit_bias or self.allowed_token_ids or self.bad_token_ids or self.min_new_tokens)


class Capabilities(Struct, kw_only=True, frozen=True):
    """What an engine can give per token beyond the behaviour log-prob."""

    entropy: bool = False
    kept_ids: bool = False
    """the ids that truncation (top-k, top-p, min-p) left to draw from"""


class DraftCounts(Struct, kw_only=True, frozen=True):
    drafted: Small = 0
    accepted: Small = 0


# ---- engine -> learner -------------------------------------------------------------------------------------------


class Hello(Message, tag="hello", kw_only=True, frozen=True):
    schema: Small
    producer: Name
    incarnation: Id
    digest: dict[Name, Name]
    capabilities: Capabilities
    running: tuple[Id, ...] = ()
    """Leases this engine still works on; all its others are free to be reissued."""
    spooled: tuple[SampleId, ...] = ()
    """Samples in its spool that are not known to be committed."""
    version: int = -1
    """Publication loaded, -1 before the first."""


class Progress(Message, tag="progress", kw_only=True, frozen=True):
    """Sent every heartbeat: renews leases, grants credit, reports counters since start."""

    running: tuple[Id, ...]
    credit: Small
    """Samples the engine could start now, beyond the leases it holds."""
    version: int
    generated_tokens: Id = 0
    busy_seconds: float = 0.0
    spooled_bytes: Id = 0


class TrajectoryHeader(Message, tag="trajectory", kw_only=True, frozen=True):
    """One finished sample. Frames: prompt ids u32, token ids u32, log-probs f32, entropies f32 or empty, versions u32,
    samplers u8, roles u8; all but the prompt have one entry a response token. Then what truncation left to draw each
    token from: number of ids u32 (one entry a response token, 0: the whole vocabulary), and the ids u32, token by
    token; both empty where nothing was truncated."""

    schema: Small
    producer: Name
    incarnation: Id
    sequence: Id
    """Position in the producer's stream; detects gaps and repeats, nothing more."""
    lease: Id
    sample: Small
    prompt_tokens: Small
    response_tokens: Small
    has_entropy: bool
    reward: float
    reward_parts: dict[Name, float]
    finish_reason: Name
    """"stop" or "length"."""
    sampling: SamplingParams
    drafters: dict[Name, DraftCounts]
    verifications: Small
    kv_kept_across_update: bool = False
    text: Text = ""
    kept_ids: Small | None = None
    """Length of the frame of kept ids; None where nothing was truncated."""


class SampleFailed(Message, tag="sample-failed", kw_only=True, frozen=True):
    """The sample will not arrive: its reward failed, say. Counted by reason; the lease can close without it."""

    lease: Id
    sample: Small
    reason: Name
    detail: Text


class Leaving(Message, tag="leaving", kw_only=True, frozen=True):
    """The engine leaves in order; the leases it names go back to the learner."""

    handed_back: tuple[Id, ...] = ()


# ---- learner -> engine -------------------------------------------------------------------------------------------


class Welcome(Message, tag="welcome", kw_only=True, frozen=True):
    schema: Small
    run: Name
    version: int
    """Newest publication; the engine follows the weights folder of its own configuration."""
    received: tuple[SampleId, ...] = ()
    """Of the samples in HELLO, those that need not be sent again."""


class Refused(Message, tag="refused", kw_only=True, frozen=True):
    reason: Text
    keys: tuple[Name, ...] = ()


class Lease(Struct, kw_only=True, frozen=True):
    """A prompt and the right to sample a group of responses to it."""

    id: Id
    epoch: Small
    kind: Name
    """"train" or "eval"."""
    prompt: Text
    prompt_ids: tuple[Small, ...]
    columns: dict[Name, Any]
    """What the reward needs beside prompt and completion."""
    group_size: Small
    sampling: SamplingParams
    seeds: tuple[Id, ...]
    """One a sample: f(run seed, epoch, lease, sample)."""
    version: int
    """The engine must have loaded this publication, or a later one, before it starts."""
    temperatures: tuple[Annotated[float, Meta(gt=0)], ...] = ()
    """One a sample, for a lease that explores at another temperature than `sampling`'s; empty: they do not."""

    def sampling_of(self, sample: int) -> SamplingParams:
        """What a sample is sampled with."""
        if not self.temperatures:
            return self.sampling
        return msgspec.structs.replace(self.sampling, temperature=self.temperatures[sample])


class Grant(Message, tag="grant", kw_only=True, frozen=True):
    """Leases that are to start together."""

    leases: tuple[Lease, ...]


class Received(Message, tag="received", kw_only=True, frozen=True):
    """In the learner's memory: need not be resent on this connection."""

    samples: tuple[SampleId, ...]


class Committed(Message, tag="committed", kw_only=True, frozen=True):
    """In the learner's journal, synced to disk, or deliberately not wanted: the spool may forget them."""

    samples: tuple[SampleId, ...]


class Published(Message, tag="published", kw_only=True, frozen=True):
    """A hint that a newer publication exists; WELCOME repeats the state."""

    version: int


class Revoke(Message, tag="revoke", kw_only=True, frozen=True):
    """Leases whose samples are no longer wanted; the engine may stop them."""

    leases: tuple[Id, ...]


class Drain(Message, tag="drain", kw_only=True, frozen=True):
    """The run is over: stop generating, flush, leave."""


# ---- both ways ---------------------------------------------------------------------------------------------------


class Fatal(Message, tag="fatal", kw_only=True, frozen=True):
    """The sender ends with an error; the peer shows it."""

    message: Text
    traceback: Text = ""


EngineMessage = Hello | Progress | TrajectoryHeader | SampleFailed | Leaving | Fatal
LearnerMessage = Welcome | Refused | Grant | Received | Committed | Published | Revoke | Drain | Fatal

_encoder = msgspec.msgpack.Encoder()
_engine_decoder = msgspec.msgpack.Decoder(EngineMessage)
_learner_decoder = msgspec.msgpack.Decoder(LearnerMessage)


class Trajectory(Struct, kw_only=True):
    """A finished sample in memory: its header and arrays (P prompt tokens, T response tokens)."""

    header: TrajectoryHeader
    prompt_ids: np.ndarray
    """u32 [P]"""
    token_ids: np.ndarray
    """u32 [T]"""
    logprobs: np.ndarray
    """f32 [T], nats, under the distribution that sampled the token"""
    entropies: np.ndarray | None
    """f32 [T], nats, of the sampling model at the sampling temperature before truncation"""
    versions: np.ndarray
    """u32 [T], publication that sampled the token"""
    samplers: np.ndarray
    """u8 [T], `Sampler`"""
    roles: np.ndarray
    """u8 [T], `Role`"""
    kept_counts: np.ndarray | None = None
    """u32 [T], how many ids truncation left to draw the token from; 0: the whole vocabulary"""
    kept_ids: np.ndarray | None = None
    """u32 [sum of kept_counts], token by token"""

    @property
    def id(self) -> SampleId:
        return self.header.lease, self.header.sample


_FRAMES = ("<u4", "<u4", "<f4", "<f4", "<u4", "u1", "u1", "<u4", "<u4")


def encode(message: Message) -> list[bytes]:
    """Frames of a message without arrays."""
    return [_encoder.encode(message)]


def encode_trajectory(trajectory: Trajectory) -> list[bytes]:
    """Frames of a trajectory: header, then the arrays in the order of `TrajectoryHeader`."""
    arrays = (
        trajectory.prompt_ids, trajectory.token_ids, trajectory.logprobs, trajectory.entropies,
        trajectory.versions, trajectory.samplers, trajectory.roles, trajectory.kept_counts, trajectory.kept_ids,
    )  # fmt: skip
    bodies = [
        b"" if a is None else np.ascontiguousarray(a, dtype=d).tobytes() for a, d in zip(arrays, _FRAMES, strict=True)
    ]
    return [_encoder.encode(trajectory.header), *bodies]


def decode_trajectory(header: TrajectoryHeader, bodies: list[bytes]) -> Trajectory:
    """Arrays of a trajectory (views of the frames, read-only).

    Raises:
        BadMessage: another schema, a frame of the wrong length, a log-prob that is not finite or above zero, a token
            that is not among those kept for it.
    """
    if header.schema != SCHEMA:
        raise BadMessage(f"trajectory schema {header.schema}, this side speaks {SCHEMA}")
    if len(bodies) != len(_FRAMES):
        raise BadMessage(f"trajectory with {len(bodies)} array frames instead of {len(_FRAMES)}")
    tokens = header.response_tokens
    kept = header.kept_ids is not None
    counts = (
        header.prompt_tokens, tokens, tokens, tokens if header.has_entropy else 0, tokens, tokens, tokens,
        tokens if kept else 0, header.kept_ids or 0,
    )  # fmt: skip
    arrays = []
    for body, dtype, count in zip(bodies, _FRAMES, counts, strict=True):
        if len(body) != count * np.dtype(dtype).itemsize:
            raise BadMessage(f"array frame of {len(body)} bytes where {count} {dtype} were announced")
        arrays.append(np.frombuffer(body, dtype))
    prompt_ids, token_ids, logprobs, entropies, versions, samplers, roles, kept_counts, kept_ids = arrays
    if not (np.isfinite(logprobs).all() and (logprobs <= 1e-3).all()):
        raise BadMessage("a log-prob is not finite or is above 0")
    if header.has_entropy and not (np.isfinite(entropies).all() and (entropies >= -1e-3).all()):
        raise BadMessage("an entropy is not finite or is below 0")
    if not np.isfinite(header.reward):
        raise BadMessage(f"reward {header.reward} is not finite")
    if samplers.size and samplers.max() > max(Sampler):
        raise BadMessage(f"unknown sampler {samplers.max()}")
    if roles.size and roles.max() > max(Role):
        raise BadMessage(f"unknown role {roles.max()}")
    if kept:
        _check_kept(token_ids, kept_counts, kept_ids)
    return Trajectory(
        header=header, prompt_ids=prompt_ids, token_ids=token_ids, logprobs=logprobs,
        entropies=entropies if header.has_entropy else None, versions=versions, samplers=samplers, roles=roles,
        kept_counts=kept_counts if kept else None, kept_ids=kept_ids if kept else None,
    )  # fmt: skip


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
    return message


def _decode(decoder: msgspec.msgpack.Decoder, frames: list[bytes]) -> Any:
    if not frames:
        raise BadMessage("a message without frames")
    try:
        return decoder.decode(frames[0])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadMessage(str(error)) from error
