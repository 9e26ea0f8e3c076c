"""The optimiser's side of the learner: from a batch of trajectory groups to a changed policy.

A batch is packed, the policy at its start (pi_old) is evaluated once, corrections are computed over all of it, and
then each of its mini-batches gives one optimiser step.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from learner import ranks
from learner.assembly import Groups, MicroBatch, batch_tokens, group_rewards, micro_batches
from learner.logprobs import TokenValues, Wanted, pack_logprobs
from learner.objective import Objective, Plans
from learner.packing import Pack, trained_positions
from learner.policy import checkpoint_activations, load_policy
from learner.schedule import learning_rate
from learner.shares import evaluated, pack_for_ranks
from learner.step_metrics import (
    Metrics,
    age_metrics,
    compressed_metrics,
    mean,
    mismatch,
    off_policy_metrics,
    reward_metrics,
    sampler_metrics,
)
from learner.tokens import BatchTokens, GroupRewards, MicroBatchTokens, Needs, concatenated
from pipeline.config.types import Config, LearnerSection
from pipeline.errors import RunFailed, UsageError
from pipeline.messages import Trajectory


@dataclass(slots=True)
class StepSums:
    """What the optimiser steps of one batch add up to."""

    loss: float = 0.0
    """losses of the mini-batches, each times its tokens"""
    tokens: int = 0
    entropy: float = 0.0
    """sum over tokens, of the policy at each optimiser step"""
    skipped_steps: int = 0
    grad_norms: list[float] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    """the corrections' weights, as used"""
    samplers: list[torch.Tensor] = field(default_factory=list)
    """of the same tokens"""
    mismatches: list[torch.Tensor] = field(default_factory=list)
    """`mismatch` of the first mini-batch, where the policy was not evaluated before it"""
    metrics: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """the pieces' metrics, summed over tokens"""

    def over_ranks(self, device: torch.device) -> "StepSums":
        """These of all ranks. What a mini-batch or an optimiser step counts is global already."""
        if ranks.world_size() == 1:
            return self
        total = ranks.summed_values({"loss": self.loss, "entropy": self.entropy})
        empty, no_samplers = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
        return replace(
            self,
            loss=total["loss"],
            entropy=total["entropy"],
            metrics=ranks.summed_values(self.metrics),
            weights=[ranks.gathered(torch.cat([empty, *self.weights]))],
            samplers=[ranks.gathered(torch.cat([no_samplers, *self.samplers]))],
            mismatches=[ranks.gathered(torch.cat([empty, *(k3.to(device) for k3 in self.mismatches)])).cpu()],
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch before its first optimiser step."""

    minibatches: list[list[MicroBatch]]
    batch: BatchTokens
    samples: GroupRewards
    """rewards as they came"""
    kv_kept: torch.Tensor
    """bool [S], the sample kept keys and values of older weights"""
    evaluated: bool
    """the policy at the start of the batch was evaluated"""
    metrics: Metrics


class Trainer:
    """Trains `model` in place. `step` counts the batches trained; a resumed run sets it from its checkpoint."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        learner: LearnerSection,
        temperature: float,
        seed: int = 0,
        *,
        reference: PreTrainedModel | None = None,
        max_response_tokens: int = 0,
        steps: int = 0,
    ) -> None:
        """
        Args:
            model: loaded by `learner.policy.load_policy`.
            temperature: of the run's rollouts. Log-probs and entropies of a sample are taken at its own.
            seed: of the division of a batch into mini-batches, with the step.
            reference: frozen model for pieces that need `Needs.REFERENCE`.
            max_response_tokens: `sampling.max_new_tokens`.
            steps: batches of the whole run, where a schedule of the learning rate ends.

        Raises:
            UsageError: temperature 0: greedy rollouts have no log-probs to train on; or a reference is missing.
        """
        if temperature <= 0:
            raise UsageError(f"sampling.temperature {temperature} cannot be trained on; set it above 0")
        if Needs.REFERENCE in objective.needs and reference is None:
            raise UsageError("the objective needs a reference model; set learner.reference_path")
        self.model = model
        self.objective = objective
        self.learner = learner
        self.temperature = temperature
        self.seed = seed
        self.reference = reference
        self.max_response_tokens = max_response_tokens
        self.steps = steps
        self.compute = torch.bfloat16 if learner.dtype == "bfloat16" else torch.float32
        self.step = 0
        self.skipped_in_a_row = 0
        if learner.gradient_checkpointing:
            checkpoint_activations(model)
        self.optimizer = adamw(model, learner)
        needs = objective.needs
        # A GPU's kernel takes whole sequences, and so do attention entropies.
        self.shares_prompts = model.device.type == "cpu" and Needs.ATTENTION_ENTROPY not in needs
        self._wanted = Wanted(expected_score=Needs.EXPECTED_SCORE in needs, nucleus=objective.nucleus)

    def train(self, groups: Groups, publication: int) -> Metrics:
        """Train on one batch.

        Args:
            groups: samples by prompt; a group may be incomplete, and the batch empty.
            publication: version that the model's weights have now, which ages are counted from.

        Returns:
            Metrics of the step, all of `metrics.jsonl` that the trainer can know, and the pieces' own.
        """
        prepared = self._prepare(groups, publication)
        sums = StepSums()
        learning_rate = self._set_learning_rate()
        for index, minibatch in enumerate(prepared.minibatches):
            self._optimise(minibatch, sums, prepared, first=index == 0)
        self.step += 1
        sums = sums.over_ranks(prepared.batch.age.device)
        return {
            **reward_metrics(prepared.samples),
            **off_policy_metrics(prepared.batch.age, torch.cat([prepared.batch.age.new_zeros(0), *sums.weights])),
            **sampler_metrics(
                *(torch.cat([prepared.batch.age[:0], *parts]) for parts in (sums.weights, sums.samplers))
            ),
            "entropy": sums.entropy / sums.tokens if sums.tokens else None,
            "entropy_ratio_kept": None,
            "clip_fraction": None,
            **prepared.metrics,
            **({} if prepared.evaluated else {"mismatch_k3": mean(torch.cat([torch.empty(0), *sums.mismatches]))}),
            **{key: value / sums.tokens for key, value in sums.metrics.items()},
            "loss": sums.loss / sums.tokens if sums.tokens else 0.0,
            "grad_norm": sum(sums.grad_norms) / len(sums.grad_norms) if sums.grad_norms else None,
            "learning_rate": learning_rate,
            "tokens_trained": float(sums.tokens),
            "skipped_steps": float(sums.skipped_steps),
        }

    def _prepare(self, groups: Groups, publication: int) -> Prepared:
        """All that is fixed before the first optimiser step: packs, pi_old, advantages, corrections."""
        objective, device = self.objective, self.model.device
        samples = [sample for group in groups for sample in group]
        rewards = group_rewards(groups, self.temperature, self.max_response_tokens)
        shaped = objective.shaped(rewards)
        minibatches = [
            pack_for_ranks(
                samples, indices, self.learner.micro_batch_tokens, str(device), share_prompts=self.shares_prompts
            )
            for indices in self._split(samples)
        ]
        packs = [row for packs in minibatches for row in packs]
        old = (
            [values for packs in minibatches for values in self._evaluate(packs)] if objective.needs_old_pass else None
        )
        reference = (
            [logp for packs in minibatches for logp in self._evaluate_reference(packs)] if self.reference else []
        )
        advantages = objective.advantages(shaped)
        batch = batch_tokens(packs, old, shaped, advantages, objective, publication, self.step, device)
        batch, metrics = objective.modulated(batch)
        weight = torch.ones_like(batch.advantage)
        if objective.proximal != "interpolate":
            weight, corrections = objective.weights(batch)
            metrics |= corrections
        kv_kept = torch.tensor(
            [sample.header.kv_kept_across_update for sample in samples], dtype=torch.bool, device=device
        )
        return Prepared(
            micro_batches(minibatches, old, batch, weight, reference, objective, seed=self.seed),
            batch,
            rewards,
            kv_kept,
            old is not None,
            {**metrics, **_old_policy_metrics(old, batch, kv_kept)},
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
    def _evaluate(self, packs: Sequence[Pack]) -> list[TokenValues]:
        """Of each pack of a mini-batch, under the weights now."""
        # On the very packs that are trained later: the same arithmetic makes all ratios of the first mini-batch 1.
        wanted = self._wanted._replace(attention_entropy=Needs.ATTENTION_ENTROPY in self.objective.needs)
        return evaluated(packs, lambda row: self._values(row, wanted), wanted)

    @torch.no_grad()
    def _evaluate_reference(self, packs: Sequence[Pack]) -> list[torch.Tensor]:
        def values(row: Pack) -> TokenValues:
            assert self.reference is not None
            return pack_logprobs(self.reference, row, row.temperature, compute=self.compute)

        return [found.logp for found in evaluated(packs, values, Wanted())]

    def _values(self, row: Pack, wanted: Wanted) -> TokenValues:
        return pack_logprobs(self.model, row, row.temperature, wanted, self.compute)

    def _set_learning_rate(self) -> float:
        rate = learning_rate(self.step, self.steps, self.learner)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _optimise(self, minibatch: Sequence[MicroBatch], sums: StepSums, prepared: Prepared, *, first: bool) -> None:
        """One optimiser step, left out where the gradient is not finite or there is no token to train."""
        count = sum(len(micro.pack) for micro in minibatch)
        if not count:
            return
        loss = 0.0
        for micro, plans in ranks.own(list(zip(minibatch, self._plans(minibatch, first), strict=True))):
            logp, share = self._backward(micro, plans, sums)
            loss += share
            if first and not prepared.evaluated:
                kept = prepared.kv_kept[micro.fixed.sequence]
                sums.mismatches.append(mismatch(logp, micro.fixed, kept).cpu())
        norm = float(ranks.full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.learner.max_grad_norm)))
        if self._usable(norm):
            self.optimizer.step()
            sums.grad_norms.append(norm)
        else:
            sums.skipped_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        sums.loss += loss * count
        sums.tokens += count

    def _usable(self, norm: float) -> bool:
        """Whether a gradient of this norm is taken.

        Raises:
            RunFailed: too many in a row are not.
        """
        limit = self.learner.max_update_norm
        if math.isfinite(norm) and (not limit or norm <= limit):
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.learner.max_skipped_steps:
            raise RunFailed(
                f"{self.skipped_in_a_row} optimiser steps in a row were skipped (learner.max_skipped_steps), the last "
                f"at step {self.step + 1} with gradient norm {norm}; lower learner.learning_rate and go on from a "
                "checkpoint before it went wrong"
            )
        return False

    def _plans(self, minibatch: Sequence[MicroBatch], first: bool) -> list[Plans]:
        """What pieces plan from the whole mini-batch, cut to its micro-batches."""
        if not self.objective.planners:
            return [{} for _ in minibatch]
        parts = [micro.fixed for micro in minibatch]
        if self.objective.plans_from_policy:
            # Before the first optimiser step the policy is the one that was evaluated at the start of the batch.
            known = [micro.evaluated for micro in minibatch if micro.evaluated is not None] if first else []
            values = known or self._evaluate([micro.pack for micro in minibatch])
            parts = [_under(part, now) for part, now in zip(parts, values, strict=True)]
        plans = self.objective.plans(self.objective.with_proximal(concatenated(parts)))
        cut = {key: plan.split([len(micro.pack) for micro in minibatch]) for key, plan in plans.items()}
        return [{key: plan[index] for key, plan in cut.items()} for index in range(len(minibatch))]

    def _backward(self, micro: MicroBatch, plans: Plans, sums: StepSums) -> tuple[torch.Tensor, float]:
        """Accumulate the gradient of one micro-batch; its log-probs, and its share of the mini-batch's loss."""
        wanted = self._wanted._replace(entropy_gradient=Needs.ENTROPY_GRADIENT in self.objective.needs)
        values = self._values(micro.pack, wanted)
        if not len(micro.pack):
            values.logp.sum().backward()
            return values.logp.detach(), 0.0
        tokens = self.objective.with_proximal(_under(micro.fixed, values))
        loss, metrics = self.objective.loss(tokens, plans)
        loss.backward()
        for key, value in metrics.items():
            sums.metrics[key] += float(value)
        sums.weights.append(tokens.weight)
        sums.samplers.append(tokens.sampler)
        sums.entropy += float(values.entropy.detach().double().sum())
        return values.logp.detach(), float(loss.detach())


def build_trainer(config: Config, objective: Objective, model_folder: Path) -> Trainer:
    """The trainer that a configuration describes, on the policy it starts from.

    Raises:
        UsageError: no checkpoint at `model_folder` or `learner.reference_path`.
    """
    reference = None
    if Needs.REFERENCE in objective.needs:
        folder = config.learner.reference_path or model_folder
        reference = load_policy(folder, config.learner.device).requires_grad_(False)
    return Trainer(
        load_policy(model_folder, config.learner.device),
        objective,
        config.learner,
        config.sampling.temperature,
        seed=config.run.seed,
        reference=reference,
        max_response_tokens=config.sampling.max_new_tokens,
        steps=config.run.steps,
    )


def _old_policy_metrics(evaluated: Sequence[TokenValues] | None, batch: BatchTokens, kv_kept: torch.Tensor) -> Metrics:
    """What the evaluation of the policy at the start of the batch says; nothing where there was none."""
    if evaluated is None:
        return {}
    empty = batch.advantage[:0]
    logp = torch.cat([empty, *(values.logp for values in evaluated)])
    return {
        "mismatch_k3": mean(mismatch(logp, batch, kv_kept[batch.sequence])),
        "entropy": mean(torch.cat([empty, *(values.entropy for values in evaluated)])),
        **age_metrics(logp, batch),
        **compressed_metrics(logp, batch),
    }


def _under(fixed: MicroBatchTokens, values: TokenValues) -> MicroBatchTokens:
    """The tokens with what the policy now says of them."""
    return replace(
        fixed,
        logp=values.logp,
        entropy=values.entropy,
        expected_score=values.expected_score,
        nucleus_entropy=values.nucleus_entropy,
    )


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
