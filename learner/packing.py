"""Trajectories to packed micro-batches: sequences one after another in one row, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.messages import Role, Trajectory


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
    )


def _turns(roles: np.ndarray) -> np.ndarray:
    """int64 [T]: how many runs of environment tokens that follow a generated one began before each token."""
    environment = roles == Role.ENVIRONMENT
    begins = environment[1:] & ~environment[:-1]
    return np.concatenate([[0], np.cumsum(begins)])[: len(roles)]


def _tensor(arrays: list[np.ndarray], dtype: type[np.generic], device: str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)
