"""From packs and evaluations to the tensors that an objective's pieces see."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from learner.logprobs import TokenValues
from learner.objective import Objective
from learner.packing import Pack, trained_positions
from learner.segments import positions, token_uniforms
from learner.tokens import BatchTokens, GroupRewards, Layout, MicroBatchTokens, Needs
from pipeline.messages import Trajectory

Groups = Sequence[Sequence[Trajectory]]
"""An optimiser batch: one inner sequence a group of samples of the same prompt."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A pack and what is fixed before the first optimiser step."""

    pack: Pack
    fixed: MicroBatchTokens
    """`logp` and `entropy` are those of pi_old here"""
    evaluated: TokenValues | None
    """of the policy at the start of the batch; None where no piece needs that"""


def group_rewards(groups: Groups, temperature: float, max_response_tokens: int) -> GroupRewards:
    """The samples of a batch; all on the CPU."""
    samples = [sample for group in groups for sample in group]
    temperatures = torch.tensor([sample.header.sampling.temperature for sample in samples])
    return GroupRewards(
        rewards=torch.tensor([sample.header.reward for sample in samples], dtype=torch.float32),
        groups=torch.tensor([g for g, group in enumerate(groups) for _ in group], dtype=torch.int64),
        lengths=torch.tensor([trained_positions(sample).size for sample in samples], dtype=torch.int64),
        truncated=torch.tensor([sample.header.finish_reason == "length" for sample in samples], dtype=torch.bool),
        response_lengths=torch.tensor([len(sample.token_ids) for sample in samples], dtype=torch.int64),
        explored=temperatures != temperature,
        max_response_tokens=max_response_tokens,
    )


def batch_tokens(
    packs: Sequence[Pack],
    evaluated: Sequence[TokenValues] | None,
    samples: GroupRewards,
    advantages: torch.Tensor,
    objective: Objective,
    publication: int,
    step: int,
    device: torch.device,
) -> BatchTokens:
    """All trained tokens of a batch, in the order of its packs.

    Args:
        evaluated: of each pack, by the policy at the start of the batch; None if the objective needs no such pass.
        samples: rewards are shaped.
        advantages: float32 [S].
    """

    def joined(parts: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)

    sequence = joined([row.sequence for row in packs], torch.int64)
    behaviour = joined([row.logp_behaviour for row in packs])
    recompute = objective.proximal == "recompute" and evaluated is not None
    entropy_old = torch.empty(0, device=device)
    if recompute:
        entropy_old = joined([values.entropy for values in evaluated or ()])
    elif Needs.OLD_ENTROPY in objective.needs:
        entropy_old = joined([row.entropy_engine for row in packs])
    return BatchTokens(
        logp_old=joined([values.logp for values in evaluated or ()]) if recompute else behaviour,
        logp_behaviour=behaviour,
        sequence=sequence,
        advantage=advantages.to(device)[sequence],
        age=(publication - joined([row.version for row in packs], torch.int64)).clamp(min=0),
        sampler=joined([row.sampler for row in packs], torch.int64),
        entropy_old=entropy_old,
        token=joined([row.target for row in packs], torch.int64),
        turn=joined([row.turn for row in packs], torch.int64),
        attention_entropy=joined([values.attention_entropy for values in evaluated or ()]),
        samples=_moved(samples, device),
        step=step,
    )


def micro_batches(
    minibatches: Sequence[Sequence[Pack]],
    evaluated: Sequence[TokenValues] | None,
    batch: BatchTokens,
    weight: torch.Tensor,
    reference: Sequence[torch.Tensor],
    objective: Objective,
    *,
    seed: int,
) -> list[list[MicroBatch]]:
    """The batch's per-token values cut back to the packs of each mini-batch.

    Args:
        batch: as modulated.
        weight: float32 [N].
        reference: log-probs of each pack under the reference model; empty if there is none.
    """
    packs = [row for packs in minibatches for row in packs]
    whole = _fixed(batch, weight, list(reference), objective, minibatches, seed)
    parts = split(whole, [len(row) for row in packs])
    values: list[TokenValues | None] = list(evaluated) if evaluated is not None else [None] * len(packs)
    micro = iter([MicroBatch(*row) for row in zip(packs, parts, values, strict=True)])
    return [list(islice(micro, len(packs))) for packs in minibatches]


def split(tokens: MicroBatchTokens, sizes: Sequence[int]) -> list[MicroBatchTokens]:
    """Tokens cut into parts of these sizes; empty tensors stay empty."""
    columns = {name: getattr(tokens, name) for name in tokens.__slots__ if name != "step"}
    cut = {name: value.split(list(sizes)) for name, value in columns.items() if len(value)}
    return [replace(tokens, **{name: parts[i] for name, parts in cut.items()}) for i in range(len(sizes))]


def _fixed(
    batch: BatchTokens,
    weight: torch.Tensor,
    reference: list[torch.Tensor],
    objective: Objective,
    minibatches: Sequence[Sequence[Pack]],
    seed: int,
) -> MicroBatchTokens:
    assert batch.samples is not None
    samples, device = batch.samples, batch.advantage.device
    groups = samples.groups[batch.sequence]
    coefficients, start = [], 0
    for packs in minibatches:
        end = start + sum(map(len, packs))
        layout = Layout(batch.sequence[start:end], groups[start:end], samples.max_response_tokens)
        coefficients.append(objective.coefficients(layout) if end > start else batch.advantage[start:end])
        start = end
    return MicroBatchTokens(
        logp=batch.logp_old,
        entropy=batch.entropy_old,
        logp_old=batch.logp_old,
        entropy_old=batch.entropy_old,
        logp_behaviour=batch.logp_behaviour,
        advantage=batch.advantage,
        weight=weight,
        sequence=batch.sequence,
        coefficient=torch.cat(coefficients) if coefficients else batch.advantage,
        reward=samples.rewards[batch.sequence],
        age=batch.age,
        sampler=batch.sampler,
        uniform=token_uniforms(seed, batch.step, batch.sequence, positions(batch.sequence)),
        logp_reference=torch.cat(reference) if reference else torch.empty(0, device=device),
        step=batch.step,
    )


def _moved(samples: GroupRewards, device: torch.device) -> GroupRewards:
    names = [name for name in samples.__slots__ if name != "max_response_tokens"]
    return replace(samples, **{name: getattr(samples, name).to(device) for name in names})
