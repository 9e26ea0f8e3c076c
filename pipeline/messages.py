"""The wire schema between engines and the learner: what is said. Torch-free; `pipeline.codec` makes frames of it.

Frame 0 of every message is one msgspec struct with a tag, without the fields that have their defaults; a trajectory's
arrays follow in one raw little-endian frame. New fields go last and have a default.
"""

from enum import IntEnum
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

SCHEMA = 4

Text = Annotated[str, Meta(max_length=1 << 20)]
Name = Annotated[str, Meta(max_length=256)]
LONGEST_DETAIL = 4096
"""characters of why a sample will not come"""
Id = Annotated[int, Meta(ge=0, lt=1 << 62)]
Small = Annotated[int, Meta(ge=0, lt=1 << 31)]
Version = Annotated[int, Meta(ge=-1, lt=1 << 31)]
"""A publication; -1 before the first."""
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Producer = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,128}\Z")]
"""What may stand in a line of a log, or of a file, without being escaped."""
SampleId = tuple[Id, Small]
"""(lease id, sample index in the group): the identity of a trajectory."""
IDS_A_MESSAGE = 1 << 16
"""entries of a list of leases or samples; who has more to say sends several messages, or says the rest later"""
LARGEST_HEADER = 4 << 20
"""bytes of frame 0 that the learner looks at"""
LARGEST_CHUNK = 1 << 18
"""bytes of weights in one message; a slow connection must pass one within a few heartbeats"""
MOST_TENSORS = 1 << 17
"""of a publication that is broadcast"""
MOST_MEMBERS = 1 << 12
"""processes of one engine that receive weights"""
LARGEST_ORIGINS = 1 << 18
"""response tokens of a sample that tells how each of them came"""
_LONGEST_ERROR = 1 << 16

LeaseIds = Annotated[tuple[Id, ...], Meta(max_length=IDS_A_MESSAGE)]
SampleIds = Annotated[tuple[SampleId, ...], Meta(max_length=IDS_A_MESSAGE)]


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


class Message(Struct, kw_only=True, frozen=True, forbid_unknown_fields=False, omit_defaults=True):
    """Base of everything in frame 0."""


Finite = Annotated[float, Meta(ge=-1e6, le=1e6)]


class SamplingParams(Struct, kw_only=True, frozen=True, omit_defaults=True):
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


DEEPEST = 32
"""positions of a draft that are counted one by one"""
Depths = Annotated[tuple[Small, ...], Meta(max_length=DEEPEST)]


class DraftCounts(Struct, kw_only=True, frozen=True, omit_defaults=True):
    drafted: Small = 0
    accepted: Small = 0
    tried_at: Depths = ()
    """drafts that had a first token; a second one, after an accepted first; ..."""
    accepted_at: Depths = ()
    """of these, where it was accepted"""


# ---- engine -> learner -------------------------------------------------------------------------------------------


class Hello(Message, tag="hello", kw_only=True, frozen=True):
    schema: Small
    producer: Producer
    incarnation: Id
    digest: Annotated[dict[Name, Name], Meta(max_length=64)]
    capabilities: Capabilities
    running: LeaseIds = ()
    """Leases this engine still works on; all its others are free to be reissued."""
    spooled: SampleIds = ()
    """Samples in its spool that are not known to be committed; the oldest when there are too many to list."""
    version: Version = -1
    """Publication loaded."""
    instance: Id = 0
    """A number the process drew when it started: tells two processes apart that share a copied spool."""


class Progress(Message, tag="progress", kw_only=True, frozen=True):
    """Sent every heartbeat: renews leases, grants credit, reports counters since start."""

    running: LeaseIds
    credit: Small
    """Samples the engine could start now, beyond the leases it holds."""
    version: Version
    generated_tokens: Id = 0
    busy_seconds: Seconds = 0.0
    spooled_bytes: Id = 0
    blocked_seconds: Seconds = 0.0
    """That the engine took nothing new because its spool was full."""
    spool_damaged: Id = 0
    """Stretches of its spool that could not be read; what was in them is sampled anew."""
    seconds: Annotated[dict[Name, Seconds], Meta(max_length=16)] = {}
    """What the engine's main thread did with its time since start, by state; beside it `reward`, in other threads, and
    `sending`, CPU time in all."""


class TrajectoryHeader(Message, tag="trajectory", kw_only=True, frozen=True):
    """One finished sample. One frame of arrays follows, without gaps: prompt ids u32, token ids u32, log-probs f32,
    entropies f32 (if there are any), versions u32; where something was truncated, what that left to draw each token
    from: number of ids u32 (0: the whole vocabulary) and the ids u32, token by token; samplers u8, roles u8. All but
    prompt and kept ids have one entry a response token."""

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
    reward_parts: Annotated[dict[Name, float], Meta(max_length=64)]
    finish_reason: Name
    """"stop" or "length"."""
    sampling: SamplingParams
    drafters: Annotated[dict[Name, DraftCounts], Meta(max_length=64)]
    verifications: Small
    kv_kept_across_update: bool = False
    text: Text = ""
    kept_ids: Small | None = None
    """Number of kept ids; None where nothing was truncated."""
    origins: Annotated[bytes, Meta(max_length=LARGEST_ORIGINS)] = b""
    """u8 an entry a response token, `pipeline.engine.generator.TokenOrigin`; only of samples that are to be shown."""
    draft_sources: Annotated[bytes, Meta(max_length=LARGEST_ORIGINS)] = b""
    """u8 an entry a response token: 1 + place in `drafters` of who drafted it; 0: it was not drafted."""


class SampleFailed(Message, tag="sample-failed", kw_only=True, frozen=True):
    """The sample will not arrive: its reward failed, say. Counted by reason; the lease can close without it."""

    lease: Id
    sample: Small
    reason: Name
    detail: Annotated[str, Meta(max_length=LONGEST_DETAIL)]


class Leaving(Message, tag="leaving", kw_only=True, frozen=True):
    """The engine leaves in order; the leases it names go back to the learner."""

    handed_back: LeaseIds = ()


class WeightsRequest(Message, tag="weights-request", kw_only=True, frozen=True):
    """Asks for a publication whose folder the engine cannot read: for the list of its files, or for a piece of one."""

    version: Id
    file: Name = ""
    """Empty: the list."""
    offset: Id = 0


class WeightsJoin(Message, tag="weights-join", kw_only=True, frozen=True):
    """Asks for a process group of this engine's own, in which the learner broadcasts publications; of a learner whose
    WELCOME offers that. It takes the place of an earlier one."""

    devices: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MOST_MEMBERS)]
    """Of the processes that receive, by rank from 1 on: "cpu", or "cuda" and the GPU's own name."""
    order: Annotated[tuple[Name, ...], Meta(max_length=MOST_TENSORS)] = ()
    """Tensors that are to come first, in this order; the others follow, layer by layer."""


class WeightsWanted(Message, tag="weights-wanted", kw_only=True, frozen=True):
    """The engine waits, between two steps, for this publication or a newer one in its group."""

    group: Id
    version: Id


# ---- learner -> engine -------------------------------------------------------------------------------------------


class Welcome(Message, tag="welcome", kw_only=True, frozen=True):
    schema: Small
    run: Name
    version: Version
    """Newest publication; the engine follows the weights folder of its own configuration."""
    received: SampleIds = ()
    """Of the samples in HELLO, those that need not be sent again."""
    broadcasts: bool = False
    """An engine can ask for a process group in which it receives weights."""


class Window(Message, tag="window", kw_only=True, frozen=True):
    """How much the engine may have sent that is not committed yet; one sample is always allowed."""

    samples: Small
    bytes: Id


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
    version: Version
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


class Committed(Message, tag="committed", kw_only=True, frozen=True):
    """In the learner's journal, synced to disk, or deliberately not wanted: the spool may forget them."""

    samples: SampleIds


class Published(Message, tag="published", kw_only=True, frozen=True):
    """A hint that a newer publication exists; WELCOME repeats the state."""

    version: Version


class Revoke(Message, tag="revoke", kw_only=True, frozen=True):
    """Leases whose samples are no longer wanted; the engine may stop them."""

    leases: LeaseIds


class WeightsFile(Struct, kw_only=True, frozen=True):
    """One file of a publication."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    bytes: Id
    sha256: Name


class WeightsFiles(Message, tag="weights-files", kw_only=True, frozen=True):
    """The files of a publication; none when it is not there any more."""

    version: Id
    files: Annotated[tuple[WeightsFile, ...], Meta(max_length=256)]


class WeightsChunk(Message, tag="weights-chunk", kw_only=True, frozen=True):
    """A piece of a publication's file; empty when there is nothing at that offset any more."""

    version: Id
    file: Name
    offset: Id
    data: Annotated[bytes, Meta(max_length=LARGEST_CHUNK)]


class WeightsGroup(Message, tag="weights-group", kw_only=True, frozen=True):
    """A process group to join: the learner is rank 0 of it."""

    group: Id
    address: Name
    """tcp://HOST:PORT of the store (torch's TCPStore) where its members find each other, under the prefix `group`."""
    backend: Literal["gloo", "nccl"]
    size: Annotated[int, Meta(ge=2, le=MOST_MEMBERS + 1)]
    """Members, the learner included."""
    seconds: Seconds
    """That one member waits for another."""


class WeightsTensor(Struct, kw_only=True, frozen=True):
    """What a tensor of a publication is."""

    name: Name
    dtype: Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    shape: Annotated[tuple[Small, ...], Meta(max_length=16)]


class WeightsManifest(Message, tag="weights-manifest", kw_only=True, frozen=True):
    """What is broadcast in the group from now on: these tensors in this order, in buckets as `pipeline.weights.buckets`
    lays them out."""

    group: Id
    version: Id
    bucket_bytes: Annotated[int, Meta(ge=1 << 10, le=1 << 31)]
    """Of one bucket, at most, unless a single tensor is larger; and of one broadcast."""
    tensors: Annotated[tuple[WeightsTensor, ...], Meta(max_length=MOST_TENSORS)]


class WeightsClosed(Message, tag="weights-closed", kw_only=True, frozen=True):
    """The group is no more; what was wanted in it comes as files."""

    group: Id
    reason: Text


class Drain(Message, tag="drain", kw_only=True, frozen=True):
    """The run is over: stop generating, flush, leave."""


# ---- both ways ---------------------------------------------------------------------------------------------------


class Fatal(Message, tag="fatal", kw_only=True, frozen=True):
    """The sender ends with an error, or, of the learner, listens to this engine no more; the peer shows it."""

    message: Text
    """of the learner's, a sentence that says on which side the error is"""
    traceback: Text = ""


def fatal(message: str, traceback: str = "") -> Fatal:
    """A `Fatal` that fits into a message: of a long traceback the end, where the error is."""
    return Fatal(message=message[:_LONGEST_ERROR], traceback=traceback[-_LONGEST_ERROR:])


WeightsQuestion = WeightsRequest | WeightsJoin | WeightsWanted
WeightsAnswer = WeightsFiles | WeightsChunk | WeightsGroup | WeightsManifest | WeightsClosed
EngineMessage = Hello | Progress | TrajectoryHeader | SampleFailed | Leaving | WeightsQuestion | Fatal
LearnerMessage = Welcome | Window | Refused | Grant | Committed | Published | Revoke | WeightsAnswer | Drain | Fatal


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
