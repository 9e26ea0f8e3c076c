"""The optimiser's side of the learner: from a batch of trajectory groups to a changed policy.

A batch is packed, the policy at its start (pi_old) is evaluated once, corrections are computed over all of it, and
then each of its mini-batches gives one optimiser step.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from transformers import PreTrainedModel

from learner.logprobs import pack_logprobs
from learner.objective import BatchTokens, GroupRewards, MicroBatchTokens, Needs, Objective
from learner.packing import Pack, pack, trained_positions
from learner.step_metrics import Metrics, mean, off_policy_metrics, reward_metrics
from pipeline.config.types import LearnerSection
from pipeline.errors import UsageError
from pipeline.messages import Trajectory

Groups = Sequence[Sequence[Trajectory]]
"""An optimiser batch: one inner sequence a group of samples of the same prompt."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A pack with what is fixed before the first optimiser step, all float32 [T]."""

    pack: Pack
    logp_old: torch.Tensor
    entropy_old: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor


@dataclass(slots=True)
class StepSums:
    """What the optimiser steps of one batch add up to."""

    loss: float = 0.0
    """sum over tokens"""
    tokens: int = 0
    skipped_steps: int = 0
    grad_norms: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """the pieces' metrics, summed over tokens"""


class Trainer:
    """Trains `model` in place. `step` counts the batches trained; a resumed run sets it from its checkpoint."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        learner: LearnerSection,
        temperature: float,
        seed: int = 0,
    ) -> None:
        """
        Args:
            model: loaded by `learner.policy.load_policy`.
            temperature: of the rollouts; log-probs and entropies are taken at it.
            seed: of the division of a batch into mini-batches, with the step.

        Raises:
            UsageError: temperature 0: greedy rollouts have no log-probs to train on.
        """
        if temperature <= 0:
            raise UsageError(f"sampling.temperature {temperature} cannot be trained on; set it above 0")
        self.model = model
        self.objective = objective
        self.learner = learner
        self.temperature = temperature
        self.seed = seed
        self.compute = torch.bfloat16 if learner.dtype == "bfloat16" else torch.float32
        self.step = 0
        self.optimizer = adamw(model, learner)

    def train(self, groups: Groups, publication: int) -> Metrics:
        """Train on one batch.

        Args:
            groups: samples by prompt; a group may be incomplete, and the batch empty.
            publication: version that the model's weights have now, which ages are counted from.

        Returns:
            Metrics of the step, all of `metrics.jsonl` that the trainer can know, and the pieces' own.
        """
        samples = [sample for group in groups for sample in group]
        rewards = self._group_rewards(groups)
        advantages = self.objective.advantages(rewards)
        minibatches = [
            pack(samples, indices, self.learner.micro_batch_tokens, str(self.model.device))
            for indices in self._split(samples)
        ]
        old = [self._evaluate(row) for packs in minibatches for row in packs]
        tokens = self._batch_tokens([row for packs in minibatches for row in packs], old, advantages, publication)
        weight, correction_metrics = self.objective.weights(tokens)

        sums = StepSums()
        learning_rate = self._set_learning_rate()
        for minibatch in _prepare(minibatches, old, tokens.advantage, weight):
            self._optimise(minibatch, sums)
        self.step += 1

        lengths = torch.tensor([len(sample.token_ids) for sample in samples])
        kv_kept = torch.tensor(
            [sample.header.kv_kept_across_update for sample in samples], dtype=torch.bool, device=self.model.device
        )
        entropies = torch.cat([entropy for _, entropy in old]) if old else torch.empty(0)
        return {
            **reward_metrics(rewards, lengths),
            **off_policy_metrics(tokens, weight, kv_kept[tokens.sequence]),
            "entropy": mean(entropies),
            "entropy_ratio_kept": None,
            "clip_fraction": None,
            **correction_metrics,
            **{key: value / sums.tokens for key, value in sums.metrics.items()},
            "loss": sums.loss / sums.tokens if sums.tokens else 0.0,
            "grad_norm": sum(sums.grad_norms) / len(sums.grad_norms) if sums.grad_norms else None,
            "learning_rate": learning_rate,
            "tokens_trained": float(sums.tokens),
            "skipped_steps": float(sums.skipped_steps),
        }

    def _group_rewards(self, groups: Groups) -> GroupRewards:
        samples = [sample for group in groups for sample in group]
        return GroupRewards(
            rewards=torch.tensor([sample.header.reward for sample in samples], dtype=torch.float32),
            groups=torch.tensor([g for g, group in enumerate(groups) for _ in group], dtype=torch.int64),
            lengths=torch.tensor([trained_positions(sample).size for sample in samples], dtype=torch.int64),
            truncated=torch.tensor([sample.header.finish_reason == "length" for sample in samples], dtype=torch.bool),
        )

    def _split(self, samples: Sequence[Trajectory]) -> list[list[int]]:
        """Indices of the samples of each mini-batch: in random order, each to the one with the fewest tokens so far."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % (1 << 63))
        minibatches: list[list[int]] = [[] for _ in range(self.learner.minibatches)]
        tokens = [0] * self.learner.minibatches
        for index in torch.randperm(len(samples), generator=generator).tolist():
            lightest = tokens.index(min(tokens))
            minibatches[lightest].append(index)
            tokens[lightest] += trained_positions(samples[index]).size
        return minibatches

    @torch.no_grad()
    def _evaluate(self, row: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        # On the very packs that are trained later: the same arithmetic makes all ratios of the first mini-batch 1.
        return pack_logprobs(self.model, row, self.temperature, compute=self.compute)

    def _batch_tokens(
        self,
        packs: Sequence[Pack],
        old: Sequence[tuple[torch.Tensor, torch.Tensor]],
        advantages: torch.Tensor,
        publication: int,
    ) -> BatchTokens:
        def joined(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
            return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=self.model.device)

        sequence = joined([row.sequence for row in packs], torch.int64)
        version = joined([row.version for row in packs], torch.int64)
        return BatchTokens(
            logp_old=joined([logp for logp, _ in old], torch.float32),
            logp_behaviour=joined([row.logp_behaviour for row in packs], torch.float32),
            sequence=sequence,
            advantage=advantages.to(self.model.device)[sequence],
            age=(publication - version).clamp(min=0),
            sampler=joined([row.sampler for row in packs], torch.int64),
        )

    def _set_learning_rate(self) -> float:
        """Linear warm-up over the first `warmup_steps` batches."""
        warmup = min(1.0, (self.step + 1) / self.learner.warmup_steps) if self.learner.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.learner.learning_rate * warmup
        return self.learner.learning_rate * warmup

    def _optimise(self, minibatch: Sequence[MicroBatch], sums: StepSums) -> None:
        """One optimiser step, left out where the gradient is not finite or there is no token to train."""
        denominator = sum(len(micro.pack) for micro in minibatch)
        if not denominator:
            return
        loss = sum(self._backward(micro, denominator, sums) for micro in minibatch)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.learner.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            sums.grad_norms.append(norm)
        else:
            sums.skipped_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        sums.loss += loss * denominator
        sums.tokens += denominator

    def _backward(self, micro: MicroBatch, denominator: int, sums: StepSums) -> float:
        """Accumulate the gradient of one micro-batch; its share of the mini-batch's loss."""
        differentiate_entropy = Needs.ENTROPY_GRADIENT in self.objective.needs
        logp, entropy = pack_logprobs(self.model, micro.pack, self.temperature, differentiate_entropy, self.compute)
        tokens = MicroBatchTokens(
            logp=logp,
            entropy=entropy,
            logp_old=micro.logp_old,
            entropy_old=micro.entropy_old,
            logp_behaviour=micro.pack.logp_behaviour,
            advantage=micro.advantage,
            weight=micro.weight,
            sequence=micro.pack.sequence,
        )
        loss, metrics = self.objective.loss(tokens, denominator)
        loss.backward()
        for key, value in metrics.items():
            sums.metrics[key] += float(value)
        return float(loss.detach())


def adamw(model: PreTrainedModel, learner: LearnerSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); weight decay on matrices only, fused."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": learner.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=learner.learning_rate,
        betas=(learner.beta1, learner.beta2),
        fused=True,
    )


def _prepare(
    minibatches: Sequence[Sequence[Pack]],
    old: Sequence[tuple[torch.Tensor, torch.Tensor]],
    advantage: torch.Tensor,
    weight: torch.Tensor,
) -> list[list[MicroBatch]]:
    """The batch's per-token values cut back to the packs of each mini-batch."""
    packs = [row for packs in minibatches for row in packs]
    sizes = [len(row) for row in packs]
    parts = zip(packs, old, advantage.split(sizes), weight.split(sizes), strict=True)
    micro = iter([MicroBatch(row, logp, entropy, a, w) for row, (logp, entropy), a, w in parts])
    return [list(islice(micro, len(packs))) for packs in minibatches]
