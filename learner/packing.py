"""Trajectories to packed micro-batches: sequences one after another in one row, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.messages import Role, Trajectory


@dataclass(frozen=True, slots=True)
class Kept:
    """What truncation (top-k, top-p, min-p) left to draw each of T trained tokens from."""

    counts: torch.Tensor
    """int64 [T], on the CPU; 0: the whole vocabulary"""
    ids: torch.Tensor
    """int64 [sum of counts], token by token"""

    def padded(self, start: int, stop: int) -> torch.Tensor:
        """int64 [stop - start, W] of those tokens, -1 behind each one's ids."""
        counts = self.counts[start:stop]
        first = int(self.counts[:start].sum())
        inside = torch.arange(int(counts.max())) < counts[:, None]
        ids = torch.full(inside.shape, -1, dtype=torch.int64, device=self.ids.device)
        ids[inside.to(ids.device)] = self.ids[first : first + int(counts.sum())]
        return ids


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch: a row of L input tokens from whole sequences, and its T trained tokens.

    A sequence enters without its last token, which predicts nothing.
    """

    input_ids: torch.Tensor
    """int64 [1, L]"""
    position_ids: torch.Tensor
    """int64 [1, L], restarting at 0 for each sequence"""
    cu_seq_lens: torch.Tensor
    """int32 [sequences + 1], on the CPU"""
    predictor: torch.Tensor
    """int64 [T], position in the row whose hidden state predicts the token"""
    target: torch.Tensor
    """int64 [T], the token"""
    sequence: torch.Tensor
    """int64 [T], index of the token's sample in the optimiser batch"""
    logp_behaviour: torch.Tensor
    """float32 [T]"""
    version: torch.Tensor
    """int64 [T], publication that sampled the token"""
    sampler: torch.Tensor
    """int64 [T], `pipeline.messages.Sampler`"""
    temperature: torch.Tensor
    """float32 [T], that the token was sampled at"""
    turn: torch.Tensor
    """int64 [T], runs of environment tokens before the token, those at the start of the response not counted"""
    entropy_engine: torch.Tensor
    """float32 [T], as the engine recorded it; not a number where it did not"""
    kept: "Kept | None" = None
    """None where no token's distribution was truncated"""

    def __len__(self) -> int:
        """Trained tokens."""
        return self.target.numel()


def trained_positions(trajectory: Trajectory) -> np.ndarray:
    """int64 [T], response positions that are trained: generated tokens that have a token before them."""
    positions = np.flatnonzero(trajectory.roles == Role.GENERATED)
    return positions[positions + len(trajectory.prompt_ids) > 0]


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the lengths, in bins that hold at most `capacity`; a longer one has a bin of its own.

    Longest first, ties by index: the same lengths give the same bins.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        chosen = next((b for b, free in enumerate(room) if lengths[index] <= free), len(bins))
        if chosen == len(bins):
            bins.append([])
            room.append(capacity)
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    return bins


def pack(samples: Sequence[Trajectory], indices: Sequence[int], micro_batch_tokens: int, device: str) -> list[Pack]:
    """Pack some samples of an optimiser batch; samples without a trained token are left out.

    Args:
        samples: all samples of the batch.
        indices: those to pack.
        micro_batch_tokens: most input tokens a pack; one longer sequence makes a longer pack.
        device: where the tensors go.
    """
    indices = [index for index in indices if trained_positions(samples[index]).size]
    lengths = [len(samples[i].prompt_ids) + len(samples[i].token_ids) - 1 for i in indices]
    bins = first_fit_decreasing(lengths, micro_batch_tokens)
    return [_pack_row(samples, [indices[position] for position in members], device) for members in bins]


def idle_pack(device: str) -> Pack:
    """A row of one token that trains nothing: for a rank that must pass through the model with the others."""
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    one, values = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.empty(0, device=device)
    return Pack(
        input_ids=one, position_ids=one, cu_seq_lens=torch.tensor([0, 1], dtype=torch.int32), predictor=nothing,
        target=nothing, sequence=nothing, logp_behaviour=values, version=nothing, sampler=nothing, temperature=values,
        turn=nothing, entropy_engine=values,
    )  # fmt: skip


def _pack_row(samples: Sequence[Trajectory], members: Sequence[int], device: str) -> Pack:
    inputs, positions, starts = [], [], [0]
    predictor, target, sequence, logp, version, sampler = [], [], [], [], [], []
    temperature, turn, entropy = [], [], []
    for index in members:
        sample = samples[index]
        tokens = np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64)
        trained = trained_positions(sample)
        inputs.append(tokens[:-1])
        positions.append(np.arange(len(tokens) - 1))
        predictor.append(starts[-1] + len(sample.prompt_ids) + trained - 1)
        target.append(tokens[len(sample.prompt_ids) + trained])
        sequence.append(np.full(len(trained), index))
        logp.append(sample.logprobs[trained])
        version.append(sample.versions[trained])
        sampler.append(sample.samplers[trained])
        temperature.append(np.full(len(trained), sample.header.sampling.temperature))
        turn.append(_turns(sample.roles)[trained])
        entropy.append(np.full(len(trained), np.nan) if sample.entropies is None else sample.entropies[trained])
        starts.append(starts[-1] + len(tokens) - 1)
    return Pack(
        input_ids=_tensor(inputs, np.int64, device)[None],
        position_ids=_tensor(positions, np.int64, device)[None],
        cu_seq_lens=torch.tensor(starts, dtype=torch.int32),
        predictor=_tensor(predictor, np.int64, device),
        target=_tensor(target, np.int64, device),
        sequence=_tensor(sequence, np.int64, device),
        logp_behaviour=_tensor(logp, np.float32, device),
        version=_tensor(version, np.int64, device),
        sampler=_tensor(sampler, np.int64, device),
        temperature=_tensor(temperature, np.float32, device),
        turn=_tensor(turn, np.int64, device),
        entropy_engine=_tensor(entropy, np.float32, device),
        kept=_kept([samples[index] for index in members], device),
    )


def _turns(roles: np.ndarray) -> np.ndarray:
    """int64 [T]: how many runs of environment tokens that follow a generated one began before each token."""
    environment = roles == Role.ENVIRONMENT
    begins = environment[1:] & ~environment[:-1]
    return np.concatenate([[0], np.cumsum(begins)])[: len(roles)]


def _kept(samples: Sequence[Trajectory], device: str) -> Kept | None:
    """Of the samples' trained tokens."""
    if all(sample.kept_counts is None for sample in samples):
        return None
    counts, ids = [], []
    for sample in samples:
        trained = trained_positions(sample)
        if sample.kept_counts is None or sample.kept_ids is None:
            counts.append(np.zeros(len(trained), np.int64))
            continue
        counts.append(sample.kept_counts[trained].astype(np.int64))
        chosen = np.isin(np.arange(len(sample.kept_counts)), trained)
        ids.append(sample.kept_ids[np.repeat(chosen, sample.kept_counts)].astype(np.int64))
    return Kept(torch.from_numpy(np.concatenate(counts)), _tensor(ids, np.int64, device))


def _tensor(arrays: list[np.ndarray], dtype: type[np.generic], device: str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)
