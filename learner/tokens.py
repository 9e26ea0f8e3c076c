"""What the pieces of an objective are given: dataclasses of tensors over samples and over trained tokens.

Symbols: pi the policy now, pi_old the proximal policy (`objective.proximal`: the policy at the start of the batch
unless configured otherwise), mu the distribution that sampled. Log-probs and entropies are nats at the sampling
temperature, float32. A tensor that no piece of the objective needs (`Needs`) is empty.
"""

from dataclasses import dataclass, field, fields, replace
from enum import Flag, auto

import torch


class Needs(Flag):
    """What a piece reads beyond log-probs and advantages; what no piece reads is not computed."""

    NOTHING = 0
    BEHAVIOUR_LOGPROBS = auto()
    """log mu as the engine recorded it"""
    OLD_ENTROPY = auto()
    """entropy of pi_old: from the learner's own pass, or the engine's where pi_old is mu"""
    ENTROPY = auto()
    """entropy of pi, as a value"""
    ENTROPY_GRADIENT = auto()
    """entropy of pi, differentiated"""
    ENGINE_ENTROPY = auto()
    """entropy as the engine recorded it"""
    EXPECTED_SCORE = auto()
    """sum_v p_v^2 (log p_v + H) of pi, a full-vocabulary sum"""
    NUCLEUS_ENTROPY = auto()
    """entropy of pi renormalised on its nucleus, differentiated"""
    REFERENCE = auto()
    """log-probs under a frozen reference model"""
    ATTENTION_ENTROPY = auto()
    """entropy of one layer's attention, at the start of the batch"""


def _none() -> torch.Tensor:
    return torch.empty(0)


@dataclass(frozen=True, slots=True)
class GroupRewards:
    """What reward shaping and advantage estimators see: all S samples of an optimiser batch."""

    rewards: torch.Tensor
    """float32 [S]"""
    groups: torch.Tensor
    """int64 [S], samples with the same number answer the same prompt; numbered from 0"""
    lengths: torch.Tensor
    """int64 [S], trained response tokens"""
    truncated: torch.Tensor
    """bool [S], stopped by the length limit"""
    response_lengths: torch.Tensor = field(default_factory=_none)
    """int64 [S], response tokens, also those that are not trained"""
    explored: torch.Tensor = field(default_factory=_none)
    """bool [S], sampled at another temperature than the run's"""
    max_response_tokens: int = 0
    """`sampling.max_new_tokens`"""


@dataclass(frozen=True, slots=True)
class BatchTokens:
    """What modulators and corrections see: all N trained tokens of an optimiser batch, before the first optimiser step.

    Tokens of a sample are next to each other, in their order.
    """

    logp_old: torch.Tensor
    """float32 [N]"""
    logp_behaviour: torch.Tensor
    """float32 [N], log mu as the engine recorded it"""
    sequence: torch.Tensor
    """int64 [N], index of the token's sample"""
    advantage: torch.Tensor
    """float32 [N]"""
    age: torch.Tensor
    """int64 [N], publications between the token's policy and the newest"""
    sampler: torch.Tensor
    """int64 [N], `pipeline.messages.Sampler`"""
    entropy_old: torch.Tensor = field(default_factory=_none)
    """float32 [N]"""
    token: torch.Tensor = field(default_factory=_none)
    """int64 [N], its id"""
    turn: torch.Tensor = field(default_factory=_none)
    """int64 [N], which step of an agent the token belongs to: runs of generated tokens between environment tokens"""
    attention_entropy: torch.Tensor = field(default_factory=_none)
    """float32 [N], of the position that predicts the token, over log(context length), mean of the heads"""
    samples: GroupRewards | None = None
    """rewards after shaping; None where only corrections are applied"""
    step: int = 0
    """batches trained before this one"""


def selected(batch: BatchTokens, index: torch.Tensor) -> BatchTokens:
    """Some of the batch's tokens, in the order of `index`; samples stay, also those without a token."""
    names = [f.name for f in fields(BatchTokens) if f.name not in ("samples", "step")]
    return replace(batch, **{name: value[index] for name in names if len(value := getattr(batch, name))})


def usable(batch: BatchTokens) -> torch.Tensor:
    """Tokens none of whose values is infinite or not a number; bool [N]."""
    values = (
        batch.logp_old, batch.logp_behaviour, batch.advantage, batch.entropy_old, batch.attention_entropy,
    )  # fmt: skip
    finite = torch.ones_like(batch.advantage, dtype=torch.bool)
    for value in values:
        finite = finite & value.isfinite() if len(value) else finite
    return finite


@dataclass(frozen=True, slots=True)
class MicroBatchTokens:
    """What surrogates, gates and regularisers see: the T trained tokens of one micro-batch, always whole samples.

    Their `plan` sees the tokens of the whole optimiser mini-batch in the same form, detached.
    """

    logp: torch.Tensor
    """float32 [T], log pi, with gradient"""
    entropy: torch.Tensor
    """float32 [T], full-vocabulary entropy of pi; with gradient if a piece needs `Needs.ENTROPY_GRADIENT`"""
    logp_old: torch.Tensor
    entropy_old: torch.Tensor
    logp_behaviour: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    """float32 [T], product of the corrections' importance weights, detached"""
    sequence: torch.Tensor
    """int64 [T], index of the token's sample in the optimiser batch"""
    coefficient: torch.Tensor
    """float32 [T], what the aggregation multiplies each token's loss by before it adds them up"""
    reward: torch.Tensor = field(default_factory=_none)
    """float32 [T], of the token's sample, after shaping"""
    age: torch.Tensor = field(default_factory=_none)
    """int64 [T], as in `BatchTokens`"""
    sampler: torch.Tensor = field(default_factory=_none)
    """int64 [T]"""
    uniform: torch.Tensor = field(default_factory=_none)
    """float64 [T] in [0, 1), a function of (run seed, step, sample, position)"""
    logp_reference: torch.Tensor = field(default_factory=_none)
    """float32 [T]"""
    expected_score: torch.Tensor = field(default_factory=_none)
    """float32 [T]"""
    nucleus_entropy: torch.Tensor = field(default_factory=_none)
    """float32 [T], with gradient"""
    planned: torch.Tensor = field(default_factory=_none)
    """[T, ...], what the piece's own `plan` returned for these tokens; empty for pieces without one"""
    step: int = 0
    """batches trained before this one"""


def concatenated(parts: list[MicroBatchTokens]) -> MicroBatchTokens:
    """The tokens of several micro-batches of one mini-batch, at least one, in their order; `planned` is empty."""
    tensors = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])
        for f in fields(MicroBatchTokens)
        if f.name not in ("planned", "step")
    }
    return MicroBatchTokens(**tensors, step=parts[0].step)


@dataclass(frozen=True, slots=True)
class Layout:
    """What an aggregation sees: where the M trained tokens of an optimiser mini-batch belong."""

    sequence: torch.Tensor
    """int64 [M]"""
    group: torch.Tensor
    """int64 [M]"""
    max_response_tokens: int = 0
    """`sampling.max_new_tokens`"""


TokenMetrics = dict[str, torch.Tensor]
"""Metric -> value of each of T tokens, detached; reported as the mean over the batch's trained tokens."""
BatchMetrics = dict[str, float]
"""Metric of a batch -> value."""
