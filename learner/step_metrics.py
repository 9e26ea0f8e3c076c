"""What is measured on an optimiser batch before its first optimiser step."""

import torch

from learner.objective import BatchTokens, GroupRewards
from learner.ratios import effective_sample_fraction, k3
from pipeline.messages import Sampler

Metrics = dict[str, float | None]
"""Key of `metrics.jsonl` -> value; None where there is nothing to measure."""


def reward_metrics(samples: GroupRewards, response_lengths: torch.Tensor) -> Metrics:
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
        "response_length_mean": mean(response_lengths),
        "truncated_fraction": mean(samples.truncated),
    }


def off_policy_metrics(tokens: BatchTokens, weight: torch.Tensor, kv_kept: torch.Tensor) -> Metrics:
    """How far N tokens are from pi_old: age, importance weights, and the learner-engine mismatch.

    `mismatch_k3` looks only at tokens that the policy itself sampled at the learner's own version, in samples without
    keys and values of an older one: there pi_old and mu are the same weights, and what differs is numerics.

    Args:
        kv_kept: bool [N], the token's sample went on under new weights with the keys and values of older ones.
    """
    same = (tokens.age == 0) & (tokens.sampler == int(Sampler.POLICY)) & ~kv_kept
    return {
        "mismatch_k3": mean(k3(tokens.logp_old[same], tokens.logp_behaviour[same])),
        "importance_weight_mean": mean(weight),
        "importance_weight_ess": effective_sample_fraction(weight) if weight.numel() else None,
        "staleness_mean": mean(tokens.age),
        "staleness_max": float(tokens.age.max()) if tokens.age.numel() else None,
    }


def mean(values: torch.Tensor) -> float | None:
    """Mean in float64; None of nothing."""
    return float(values.double().mean()) if values.numel() else None
