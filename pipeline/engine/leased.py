"""A lease's group on its way through the engine: what is asked of the generator, and how a sample travels."""

from dataclasses import dataclass, field

import numpy as np
from msgspec import structs

from pipeline.config import Config
from pipeline.engine.generator import FinishedSample, GroupRequest
from pipeline.engine.rewarding import ScoredGroup
from pipeline.messages import LARGEST_ORIGINS, SCHEMA, Lease, Role, Trajectory, TrajectoryHeader


@dataclass(slots=True)
class LeaseWork:
    """A lease under way: samples arrive one by one, rewards need the whole group."""

    lease: Lease
    started: bool = False
    samples: dict[int, FinishedSample] = field(default_factory=dict)

    @property
    def unfinished(self) -> int:
        return self.lease.group_size - len(self.samples)


def request_of(lease: Lease, prompt_ids: np.ndarray, config: Config) -> GroupRequest:
    """A lease's group; evaluations are of the policy as it is, unless the configuration asks otherwise."""
    evaluates, engine = lease.kind == "eval", config.engine
    return GroupRequest(
        lease.id,
        prompt_ids,
        lease.sampling,
        lease.seeds,
        lease.temperatures,
        full_cache=evaluates and not engine.kv_compression.evaluation,
        policy_only=evaluates and not engine.switching.evaluation,
    )


def trajectory_of(scored: ScoredGroup, index: int) -> Trajectory:
    """One sample of a scored group as it travels; the link fills in producer, incarnation and sequence."""
    lease, sample, score = scored.group.lease, scored.group.samples[index], scored.scores[index]
    tokens = len(sample.token_ids)
    assert score.reward is not None
    header = TrajectoryHeader(
        schema=SCHEMA, producer="", incarnation=0, sequence=0, lease=lease.id, sample=index,
        prompt_tokens=len(lease.prompt_ids), response_tokens=tokens, has_entropy=sample.entropies is not None,
        reward=score.reward, reward_parts=score.parts, finish_reason=sample.finish_reason,
        sampling=lease.sampling_of(index), drafters=sample.drafters, verifications=sample.verifications,
        kv_kept_across_update=sample.kv_kept_across_update,
        kept_ids=None if sample.kept is None else len(sample.kept.ids),
    )  # fmt: skip
    if not index and sample.origins is not None and sample.draft_sources is not None and tokens <= LARGEST_ORIGINS:
        # of the first sample of a group: what people are shown is a few samples of every batch
        origins, sources = sample.origins.tobytes(), sample.draft_sources.tobytes()
        header = structs.replace(header, origins=origins, draft_sources=sources)
    return Trajectory(
        header=header,
        prompt_ids=np.asarray(lease.prompt_ids, np.uint32),
        token_ids=sample.token_ids.astype(np.uint32),
        logprobs=sample.logprobs,
        entropies=sample.entropies,
        versions=sample.versions.astype(np.uint32),
        samplers=sample.samplers,
        roles=np.full(tokens, Role.GENERATED, np.uint8),
        kept_counts=None if sample.kept is None else sample.kept.counts,
        kept_ids=None if sample.kept is None else sample.kept.ids,
    )
