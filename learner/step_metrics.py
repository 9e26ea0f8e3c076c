"""What is measured on an optimiser batch before its first optimiser step."""

import torch

from learner.ratios import effective_sample_fraction, importance_ratio, k3
from learner.tokens import BatchTokens, GroupRewards, MicroBatchTokens
from pipeline.messages import Sampler

Metrics = dict[str, float | None]
"""Key of `metrics.jsonl` -> value; None where there is nothing to measure."""


def reward_metrics(samples: GroupRewards) -> Metrics:
    """Rewards, lengths and lost signal of S samples.

    `reward_std` is the population standard deviation over the batch; `groups_without_signal` counts groups whose
    rewards are all equal.
    """
    rewards, groups = samples.rewards.double(), samples.groups
    equal = 0
    for group in groups.unique():
        reward = rewards[groups == group]
        equal += int(reward.min() == reward.max())
    return {
        "reward_mean": mean(rewards),
        "reward_std": float(rewards.std(correction=0)) if rewards.numel() else None,
        "groups_without_signal": float(equal),
        "response_length_mean": mean(samples.response_lengths),
        "truncated_fraction": mean(samples.truncated),
    }


def off_policy_metrics(age: torch.Tensor, weight: torch.Tensor) -> Metrics:
    """How old N tokens are, and the importance weights they were trained with."""
    return {
        "importance_weight_mean": mean(weight),
        "importance_weight_ess": effective_sample_fraction(weight) if weight.numel() else None,
        "staleness_mean": mean(age),
        "staleness_max": float(age.max()) if age.numel() else None,
    }


def sampler_metrics(weight: torch.Tensor, sampler: torch.Tensor) -> Metrics:
    """What became of the tokens of each sampler (`pipeline.messages.Sampler`); nothing where the policy sampled all.

    `sampler/NAME/share`: of N tokens; `sampler/NAME/mass`: of the sum of their importance weights; `sampler/NAME/ess`:
    effective sample size of that sampler's weights over its tokens.
    """
    if not bool((sampler != int(Sampler.POLICY)).any()):
        return {}
    total = float(weight.double().sum())
    found: Metrics = {}
    for which in Sampler:
        own = weight[sampler == int(which)].double()
        if own.numel():
            key = f"sampler/{which.name.lower().replace('_', '-')}"
            found[f"{key}/share"] = own.numel() / weight.numel()
            found[f"{key}/mass"] = float(own.sum()) / total if total else 0.0
            found[f"{key}/ess"] = effective_sample_fraction(own)
    return found


def mismatch(logp: torch.Tensor, tokens: BatchTokens | MicroBatchTokens, kv_kept: torch.Tensor) -> torch.Tensor:
    """k3 between learner and engine, of those of N tokens that the policy itself sampled at the learner's own version,
    in samples without keys and values of an older one: there both have the same weights, and what differs is numerics.

    Args:
        logp: under the learner's weights at the start of the batch.
        kv_kept: bool [N], the token's sample went on under new weights with the keys and values of older ones.
    """
    same = (tokens.age == 0) & (tokens.sampler == int(Sampler.POLICY)) & ~kv_kept
    return k3(logp[same], tokens.logp_behaviour[same])


def compressed_metrics(logp: torch.Tensor, tokens: BatchTokens) -> Metrics:
    """Of tokens that were sampled from a compressed cache, where there are any: their share, and the ratio
    xi = pi_old / mu of the dense policy to the sampler (Sparse-RL, arXiv 2601.10079) with its k3; staleness is part of
    xi."""
    compressed = tokens.sampler == int(Sampler.COMPRESSED_KV)
    if not bool(compressed.any()):
        return {}
    ratio = importance_ratio(logp, tokens.logp_behaviour)[compressed].double()
    return {
        "compressed/fraction": mean(compressed),
        "compressed/k3": mean(k3(logp, tokens.logp_behaviour)[compressed]),
        "compressed/ratio_mean": mean(ratio),
        "compressed/ratio_min": float(ratio.min()),
        "compressed/ratio_max": float(ratio.max()),
    }


def age_metrics(logp: torch.Tensor, tokens: BatchTokens) -> Metrics:
    """Mean k3 between the policy at the start of the batch and mu by the age of the tokens that a policy sampled, where
    there are such tokens: how fast data goes stale; and of the tokens that something else sampled."""
    distance = k3(logp, tokens.logp_behaviour)
    policy = tokens.sampler == int(Sampler.POLICY)
    bins = {"0": (0, 0), "1": (1, 1), "2_3": (2, 3), "4_up": (4, None)}
    found: Metrics = {}
    for name, (low, high) in bins.items():
        inside = policy & (tokens.age >= low)
        inside = inside & (tokens.age <= high) if high is not None else inside
        if bool(inside.any()):
            found[f"k3/age_{name}"] = float(distance[inside].double().mean())
    others = tokens.sampler != int(Sampler.POLICY)
    if bool(others.any()):
        found["k3/other_samplers"] = float(distance[others].double().mean())
    return found


def mean(values: torch.Tensor) -> float | None:
    """Mean in float64; None of nothing."""
    return float(values.double().mean()) if values.numel() else None
