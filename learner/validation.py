"""What the learner checks before it believes an engine."""

from dataclasses import dataclass

import numpy as np
from msgspec import structs

from pipeline.messages import (
    SCHEMA,
    BadMessage,
    Capabilities,
    Hello,
    Lease,
    Refused,
    Role,
    Trajectory,
    TrajectoryHeader,
)

DROP_REASONS = ("reward_error", "reward_timeout", "reward_died", "too_large", "engine_error")
"""why an engine may say that a sample will not come"""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of what the learner takes from engines."""

    prompt_tokens: int
    response_tokens: int
    vocab_size: int
    window_samples: int = 4096
    """samples that all engines together may have sent and not seen committed"""
    window_bytes: int = 256 << 20
    """bytes of those"""
    stall_seconds: float = 1800.0
    """an engine that has work and generates nothing for this long loses its leases"""


def refusal(hello: Hello, digest: dict[str, str], needs: Capabilities, key: str = "") -> Refused | None:
    """Why an engine cannot serve this learner; None when it can.

    Args:
        key: fingerprint of the key it proved to have; empty without encryption.
    """
    if hello.schema != SCHEMA:
        return Refused(
            reason=f"the engine speaks message schema {hello.schema}, the learner {SCHEMA}; install the same version",
            keys=("schema",),
        )
    keys = tuple(sorted(k for k in digest.keys() | hello.digest.keys() if digest.get(k) != hello.digest.get(k)))
    if keys:
        differences = "; ".join(
            f"{key}: learner {digest.get(key, 'none')}, engine {hello.digest.get(key, 'none')}" for key in keys
        )
        return Refused(
            reason=f"engine and learner disagree on {differences}; start the engine with the learner's configuration",
            keys=keys,
        )
    if key and not hello.producer.startswith(f"{key}-"):
        return Refused(
            reason=f"producer {hello.producer} belongs to another key than this engine's (fingerprint {key})",
            keys=("producer",),
        )
    if needs.kept_ids and not hello.capabilities.kept_ids:
        return Refused(
            reason="sampling.top_k, top_p or min_p is set, and this engine cannot say which tokens they left to draw "
            "from; turn them off or choose another generator",
            keys=("capabilities.kept_ids",),
        )
    if needs.entropy and not hello.capabilities.entropy:
        return Refused(
            reason="the objective needs per-token entropies, which this engine cannot give; choose gates and "
            "corrections without them or another generator",
            keys=("capabilities.entropy",),
        )
    return None


def check_sample(lease_id: int, sample: int, group_size: int) -> None:
    """Raises BadMessage for a sample index that no lease has."""
    if sample >= group_size:
        raise BadMessage(f"sample {sample} of lease {lease_id} in groups of {group_size}")


def drop_reason(reason: str) -> str:
    """What a failed sample is counted under: an engine cannot make the learner count under names of its own."""
    return reason if reason in DROP_REASONS else "engine_error"


def check_trajectory(
    trajectory: Trajectory, producer: str, lease: Lease | None, limits: Limits, needs: Capabilities, newest: int = -1
) -> None:
    """A decoded trajectory against the limits and against what was leased.

    Args:
        needs: what every trajectory must carry.
        lease: None when the lease is not known or done with; the content is not compared then.
        newest: publication, which no token can be newer than; -1: a learner that has just restarted has none yet.

    Raises:
        BadMessage: it says what is wrong.
    """
    header = trajectory.header
    name = f"sample {header.sample} of lease {header.lease}"
    if header.producer != producer:
        raise BadMessage(f"{name} of producer {header.producer} from engine {producer}")
    if header.prompt_tokens > limits.prompt_tokens:
        raise BadMessage(f"{name}: prompt of {header.prompt_tokens} tokens, at most {limits.prompt_tokens} are allowed")
    if not 1 <= header.response_tokens <= limits.response_tokens:
        raise BadMessage(f"{name}: response of {header.response_tokens} tokens, 1 to {limits.response_tokens} allowed")
    for ids in (trajectory.prompt_ids, trajectory.token_ids, trajectory.kept_ids):
        if ids is not None and ids.size and ids.max() >= limits.vocab_size:
            raise BadMessage(f"{name}: token id {ids.max()} in a vocabulary of {limits.vocab_size}")
    if newest >= 0 and trajectory.versions.max() > newest:
        raise BadMessage(f"{name} was sampled by publication {trajectory.versions.max()}, the newest is {newest}")
    if needs.kept_ids and not _has_kept_ids(trajectory):
        raise BadMessage(f"{name} was truncated, and has no kept ids for some token")
    if needs.entropy and trajectory.entropies is None:
        raise BadMessage(f"{name} has no entropies, which the objective needs")
    if lease is not None and not np.array_equal(trajectory.prompt_ids, np.asarray(lease.prompt_ids, np.uint32)):
        raise BadMessage(f"{name} answers another prompt than was leased")
    if lease is not None and not _sampled_as_leased(header, lease):
        raise BadMessage(f"{name} was sampled with {header.sampling} instead of {lease.sampling_of(header.sample)}")


def _sampled_as_leased(header: TrajectoryHeader, lease: Lease) -> bool:
    """An exploring lease that was issued again may have had another temperature before; log-probs are taken at the
    sample's own, so any is trained rightly."""
    expected = lease.sampling_of(header.sample)
    if lease.temperatures and header.sampling.temperature > 0:
        expected = structs.replace(expected, temperature=header.sampling.temperature)
    return header.sampling == expected


def _has_kept_ids(trajectory: Trajectory) -> bool:
    """Whether every generated token says what it was drawn from."""
    counts = trajectory.kept_counts
    return counts is not None and bool(counts[trajectory.roles == Role.GENERATED].all())
