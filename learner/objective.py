"""One training step's objective: advantages -> corrections -> surrogate -> gates -> regularisers -> aggregation.

The pieces live one a file in the folders of those names; this module holds what they exchange and composes them.
Symbols: pi the policy now, pi_old the policy at the start of the batch (recomputed by the learner), mu the
distribution that sampled. All log-probs are nats at the sampling temperature, float32.
"""

from dataclasses import dataclass
from enum import Flag, auto
from typing import Protocol

import torch

from learner.pieces import build
from pipeline.config.types import ObjectiveSection

CONTRACT_METRICS = frozenset({"clip_fraction", "entropy_ratio_kept"})
"""Metrics a piece reports under their own name; all its others are reported as "piece/metric"."""


class Needs(Flag):
    """What a piece reads beyond log-probs and advantages; what no piece reads is not computed."""

    NOTHING = 0
    BEHAVIOUR_LOGPROBS = auto()
    """log mu as the engine recorded it"""
    OLD_ENTROPY = auto()
    """entropy of pi_old, from the learner's own pass"""
    ENTROPY = auto()
    """entropy of pi, as a value"""
    ENTROPY_GRADIENT = auto()
    """entropy of pi, differentiated"""
    ENGINE_ENTROPY = auto()
    """entropy as the engine recorded it"""


@dataclass(frozen=True, slots=True)
class GroupRewards:
    """What an advantage estimator sees: all S samples of an optimiser batch."""

    rewards: torch.Tensor
    """float32 [S]"""
    groups: torch.Tensor
    """int64 [S], samples with the same number answer the same prompt; numbered from 0"""
    lengths: torch.Tensor
    """int64 [S], trained response tokens"""
    truncated: torch.Tensor
    """bool [S], stopped by the length limit"""


@dataclass(frozen=True, slots=True)
class BatchTokens:
    """What a correction sees: all N trained tokens of an optimiser batch, before the first optimiser step."""

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


@dataclass(frozen=True, slots=True)
class MicroBatchTokens:
    """What surrogates, gates and regularisers see: the T trained tokens of one micro-batch."""

    logp: torch.Tensor
    """float32 [T], log pi, with gradient"""
    entropy: torch.Tensor
    """float32 [T], full-vocabulary entropy of pi; with gradient if a piece needs `Needs.ENTROPY_GRADIENT`"""
    logp_old: torch.Tensor
    entropy_old: torch.Tensor
    logp_behaviour: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    """float32 [T], the correction's importance weight, detached"""
    sequence: torch.Tensor
    """int64 [T], index of the token's sample in the optimiser batch"""


TokenMetrics = dict[str, torch.Tensor]
"""Metric -> value of each of T tokens, detached; reported as the mean over the batch's trained tokens."""


class Advantage(Protocol):
    name: str
    needs: Needs

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """Advantage of each sample, float32 [S]."""


class Correction(Protocol):
    name: str
    needs: Needs

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, dict[str, float]]:
        """Importance weight of each token, float32 [N], finite and detached; and metrics of the batch."""


class Surrogate(Protocol):
    name: str
    needs: Needs

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """Loss of each token, float32 [T], to minimise, before the correction's weight."""


class Gate(Protocol):
    name: str
    needs: Needs

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """The loss [T] with gradient only where the gate lets it through."""


class Regulariser(Protocol):
    name: str
    needs: Needs

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """A term [T] added to the loss, its coefficient included."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The pieces of one objective, in the order they are applied."""

    advantage: Advantage
    correction: Correction
    surrogate: Surrogate
    gates: tuple[Gate, ...] = ()
    regularisers: tuple[Regulariser, ...] = ()

    @classmethod
    def from_config(cls, section: ObjectiveSection) -> "Objective":
        """Build the pieces a configuration names.

        Raises:
            UsageError: an unknown piece or option.
        """
        return cls(
            advantage=build("advantage", section.advantage),
            correction=build("correction", section.correction),
            surrogate=build("surrogate", section.surrogate),
            gates=tuple(build("gate", piece) for piece in section.gates),
            regularisers=tuple(build("regulariser", piece) for piece in section.regularisers),
        )

    @property
    def needs(self) -> Needs:
        needs = self.advantage.needs | self.correction.needs | self.surrogate.needs
        for gate in self.gates:
            needs |= gate.needs
        for regulariser in self.regularisers:
            needs |= regulariser.needs
        return needs

    @property
    def needs_entropy_from_engine(self) -> bool:
        """Whether engines must record entropies; the learner refuses engines that cannot."""
        return Needs.ENGINE_ENTROPY in self.needs

    def advantages(self, samples: GroupRewards) -> torch.Tensor:
        """Advantage of each sample, float32 [S]."""
        return self.advantage(samples)

    def weights(self, batch: BatchTokens) -> tuple[torch.Tensor, dict[str, float]]:
        """Importance weight of each token, float32 [N], and metrics under the piece's name."""
        weight, metrics = self.correction(batch)
        return weight, {_metric_key(self.correction.name, key): value for key, value in metrics.items()}

    def loss(self, tokens: MicroBatchTokens, denominator: float) -> tuple[torch.Tensor, TokenMetrics]:
        """The micro-batch's share of the loss: the sum over its tokens / `denominator`.

        Args:
            tokens: the T trained tokens of a micro-batch.
            denominator: trained tokens of the whole optimiser mini-batch over all its micro-batches and ranks (token
                mean, DAPO, arXiv 2503.14476). Tokens that a gate or a weight of 0 takes out stay in it.

        Returns:
            The scalar to differentiate, and metrics as scalar sums over the T tokens.
        """
        loss, metrics = self.surrogate(tokens)
        sums = _sums(self.surrogate.name, metrics)
        loss = loss * tokens.weight
        for gate in self.gates:
            loss, metrics = gate(loss, tokens)
            sums |= _sums(gate.name, metrics)
        for regulariser in self.regularisers:
            term, metrics = regulariser(tokens)
            loss = loss + term
            sums |= _sums(regulariser.name, metrics)
        return loss.sum() / denominator, sums


def _metric_key(piece: str, metric: str) -> str:
    return metric if metric in CONTRACT_METRICS else f"{piece}/{metric}"


def _sums(piece: str, metrics: TokenMetrics) -> TokenMetrics:
    return {_metric_key(piece, key): value.detach().float().sum() for key, value in metrics.items()}
