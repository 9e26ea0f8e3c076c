"""Builds a line of metrics.jsonl from what the trainer measured and what the transport counted."""

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from msgspec import structs

from learner.hub import HubStats
from learner.leases import Batch
from learner.step_metrics import Metrics
from pipeline.telemetry import StepMetrics

_KNOWN = {field.name for field in structs.fields(StepMetrics)}
_COUNTS = ("groups_without_signal", "tokens_trained", "skipped_steps")


def step_metrics(
    measured: Metrics,
    batch: Batch,
    now: HubStats,
    before: HubStats,
    *,
    step: int,
    policy_version: int,
    wait_seconds: float,
    learner_seconds: float,
    wall_seconds: float,
    learner_time: Mapping[str, float] | None = None,
) -> StepMetrics:
    """The row of one step; `before` are the transport's counters at the end of the step before."""
    values: dict[str, Any] = {key: value for key, value in measured.items() if key in _KNOWN}
    values |= {key: int(values[key] or 0) for key in _COUNTS}
    values["groups_without_signal"] += batch.filtered_groups
    values |= {key: math.nan for key, value in values.items() if value is None and key != "mismatch_k3"}
    return StepMetrics(
        **values,
        step=step,
        policy_version=policy_version,
        reward_mean_unfiltered=fmean(batch.unfiltered_rewards) if batch.unfiltered_rewards else float("nan"),
        tokens_per_second=values["tokens_trained"] / wall_seconds,
        dropped={
            reason: count - before.dropped.get(reason, 0)
            for reason, count in now.dropped.items()
            if count > before.dropped.get(reason, 0)
        },
        dropped_total=dict(now.dropped),
        **_drafting(batch),
        engine_seconds=now.busy_seconds - before.busy_seconds,
        learner_seconds=learner_seconds,
        wait_seconds=wait_seconds,
        wall_seconds=wall_seconds,
        learner_time=dict(learner_time or {}),
        engine_time=_difference(now.engine_time, before.engine_time),
        response_length_max=float(
            max((t.header.response_tokens for group in batch.groups for t in group.trajectories), default=0)
        ),
        engines=now.engines,
        reissued_total=now.reissued,
        samples={
            "leased": now.account.leased,
            "trained": now.account.trained,
            "dropped": sum(now.account.dropped.values()),
            "buffered": now.account.buffered,
            "in_flight": now.account.in_flight,
        },
        transport=now.transport(),
        extra={key: value for key, value in measured.items() if key not in _KNOWN and value is not None},
    )


def _drafting(batch: Batch) -> dict[str, Any]:
    """acceptance_rate, tokens_per_verification and drafters over the batch's samples."""
    drafters: dict[str, dict[str, int]] = defaultdict(lambda: {"drafted": 0, "accepted": 0})
    depths: dict[str, list[list[int]]] = defaultdict(list)
    tokens = verifications = 0
    for group in batch.groups:
        for trajectory in group.trajectories:
            tokens += trajectory.header.response_tokens
            verifications += trajectory.header.verifications
            for name, counts in trajectory.header.drafters.items():
                drafters[name]["drafted"] += counts.drafted
                drafters[name]["accepted"] += counts.accepted
                for depth, pair in enumerate(zip(counts.tried_at, counts.accepted_at, strict=False)):
                    if depth == len(depths[name]):
                        depths[name].append([0, 0])
                    depths[name][depth] = [a + b for a, b in zip(depths[name][depth], pair, strict=True)]
    drafted = sum(counts["drafted"] for counts in drafters.values())
    accepted = sum(counts["accepted"] for counts in drafters.values())
    return {
        "acceptance_rate": accepted / drafted if drafted else None,
        "tokens_per_verification": tokens / verifications if verifications else 1.0,
        "drafters": dict(drafters),
        "acceptance_by_depth": {
            name: [accepted / tried for tried, accepted in found if tried] for name, found in depths.items()
        },
    }


def _difference(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {state: seconds - before.get(state, 0.0) for state, seconds in now.items()}
