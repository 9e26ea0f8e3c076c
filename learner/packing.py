"""Trajectories to packed micro-batches: sequences one after another in one row, without padding.

Samples of one prompt may share it: the prompt stands in the row once, and behind it their responses, each of which
attends to the prompt and to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.messages import Role, Sampler, Trajectory

SHARED_PROMPT_TOKENS = 16
"""Shortest prompt that samples share"""


@dataclass(frozen=True, slots=True)
class Kept:
    """What truncation (top-k, top-p, min-p) left the policy to draw each of T trained tokens from."""

    counts: torch.Tensor
    """int64 [T], on the CPU; 0: log-probs are over the whole vocabulary, as of tokens that something else sampled"""
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

    A sequence enters without its last token, which predicts nothing. A segment of the row is a whole sequence, a prompt
    that several share, or a response behind one.
    """

    input_ids: torch.Tensor
    """int64 [1, L]"""
    position_ids: torch.Tensor
    """int64 [1, L], in the token's sequence"""
    cu_seq_lens: torch.Tensor
    """int32 [segments + 1], on the CPU"""
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
    prefixes: tuple[tuple[int, int], ...] | None = None
    """of each segment, the positions [first, last) of the row that come before it in its sequence; None: nowhere any"""

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


def pack(
    samples: Sequence[Trajectory],
    indices: Sequence[int],
    micro_batch_tokens: int,
    device: str,
    *,
    share_prompts: bool = False,
) -> list[Pack]:
    """Pack some samples of an optimiser batch; samples without a trained token are left out.

    Args:
        samples: all samples of the batch.
        indices: those to pack.
        micro_batch_tokens: most input tokens a pack; one longer sequence makes a longer pack.
        device: where the tensors go.
        share_prompts: pass a prompt through the model once for all its samples in a pack, where that pays.
    """
    indices = [index for index in indices if trained_positions(samples[index]).size]
    units = [[index] for index in indices]
    if share_prompts:
        units = [unit for same in _by_prompt(samples, indices) for unit in _shared(samples, same, micro_batch_tokens)]
    bins = first_fit_decreasing([_row_tokens(samples, unit) for unit in units], micro_batch_tokens)
    return [_pack_row(samples, [units[position] for position in members], device) for members in bins]


def sharing_pays(prompt_tokens: int, samples: int) -> bool:
    """Whether a prompt passes through the model once for these samples of it.

    What is saved is a prompt's pass for every further sample; what is paid is that a response's attention looks at two
    pieces of the row and is started apart from its prompt's.
    """
    return samples > 1 and prompt_tokens >= SHARED_PROMPT_TOKENS


def _by_prompt(samples: Sequence[Trajectory], indices: Sequence[int]) -> list[list[int]]:
    found: dict[bytes, list[int]] = {}
    for index in indices:
        found.setdefault(samples[index].prompt_ids.tobytes(), []).append(index)
    return list(found.values())


def _shared(samples: Sequence[Trajectory], same: Sequence[int], capacity: int) -> list[list[int]]:
    """Samples of one prompt, those that share it together, as many as a row holds."""
    if not sharing_pays(len(samples[same[0]].prompt_ids), len(same)):
        return [[index] for index in same]
    units: list[list[int]] = [[]]
    for index in same:
        if units[-1] and _row_tokens(samples, [*units[-1], index]) > capacity:
            units.append([])
        units[-1].append(index)
    return units


def _row_tokens(samples: Sequence[Trajectory], unit: Sequence[int]) -> int:
    """Input tokens of samples that share their prompt."""
    return len(samples[unit[0]].prompt_ids) + sum(len(samples[index].token_ids) - 1 for index in unit)


def idle_pack(device: str) -> Pack:
    """A row of one token that trains nothing: for a rank that must pass through the model with the others."""
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    one, values = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.empty(0, device=device)
    return Pack(
        input_ids=one, position_ids=one, cu_seq_lens=torch.tensor([0, 1], dtype=torch.int32), predictor=nothing,
        target=nothing, sequence=nothing, logp_behaviour=values, version=nothing, sampler=nothing, temperature=values,
        turn=nothing, entropy_engine=values,
    )  # fmt: skip


@dataclass(slots=True)
class _Row:
    """Input tokens of a pack, segment by segment."""

    inputs: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    prefixes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, tokens: np.ndarray, prefix: tuple[int, int] = (0, 0)) -> int:
        """A segment behind a prefix; where it starts in the row."""
        start = self.starts[-1]
        if len(tokens):
            self.inputs.append(tokens)
            self.positions.append(np.arange(len(tokens)) + prefix[1] - prefix[0])
            self.starts.append(start + len(tokens))
            self.prefixes.append(prefix)
        return start

    def add_unit(self, samples: Sequence[Trajectory], unit: Sequence[int]) -> list[np.ndarray]:
        """Samples that share their prompt; of each, where the tokens of its sequence stand in the row."""
        prompt = samples[unit[0]].prompt_ids.astype(np.int64)
        if len(unit) == 1:
            start = self.add(np.concatenate([prompt, samples[unit[0]].token_ids])[:-1].astype(np.int64))
            return [start + np.arange(self.starts[-1] - start)]
        begin = self.add(prompt)
        prefix = begin, self.starts[-1]
        places = []
        for response in (samples[index].token_ids[:-1].astype(np.int64) for index in unit):
            start = self.add(response, prefix)
            places.append(np.concatenate([np.arange(*prefix), start + np.arange(len(response))]))
        return places


def _pack_row(samples: Sequence[Trajectory], units: Sequence[Sequence[int]], device: str) -> Pack:
    row = _Row()
    places = [place for unit in units for place in row.add_unit(samples, unit)]
    members = [index for unit in units for index in unit]
    predictor, target, sequence, logp, version, sampler = [], [], [], [], [], []
    temperature, turn, entropy = [], [], []
    for index, place in zip(members, places, strict=True):
        sample = samples[index]
        trained = trained_positions(sample)
        predictor.append(place[len(sample.prompt_ids) + trained - 1])
        target.append(sample.token_ids[trained])
        sequence.append(np.full(len(trained), index))
        logp.append(sample.logprobs[trained])
        version.append(sample.versions[trained])
        sampler.append(sample.samplers[trained])
        temperature.append(np.full(len(trained), sample.header.sampling.temperature))
        turn.append(_turns(sample.roles)[trained])
        entropy.append(np.full(len(trained), np.nan) if sample.entropies is None else sample.entropies[trained])
    return Pack(
        input_ids=_tensor(row.inputs, np.int64, device)[None],
        position_ids=_tensor(row.positions, np.int64, device)[None],
        cu_seq_lens=torch.tensor(row.starts, dtype=torch.int32),
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
        prefixes=tuple(row.prefixes) if any(last > first for first, last in row.prefixes) else None,
    )


def _turns(roles: np.ndarray) -> np.ndarray:
    """int64 [T]: how many runs of environment tokens that follow a generated one began before each token."""
    environment = roles == Role.ENVIRONMENT
    begins = environment[1:] & ~environment[:-1]
    return np.concatenate([[0], np.cumsum(begins)])[: len(roles)]


def _kept(samples: Sequence[Trajectory], device: str) -> Kept | None:
    """Of the samples' trained tokens; nothing of those that another sampler than the policy drew.

    Their importance weight is pi / mu. Inside what that sampler kept, both may be near 1 whatever the policy thinks of
    the token, with top-k 1 always.
    """
    if all(sample.kept_counts is None for sample in samples):
        return None
    counts, ids = [], []
    for sample in samples:
        trained = trained_positions(sample)
        if sample.kept_counts is None or sample.kept_ids is None:
            counts.append(np.zeros(len(trained), np.int64))
            continue
        chosen = np.zeros(len(sample.kept_counts), bool)
        chosen[trained] = sample.samplers[trained] == int(Sampler.POLICY)
        counts.append(np.where(chosen, sample.kept_counts, 0)[trained].astype(np.int64))
        ids.append(sample.kept_ids[np.repeat(chosen, sample.kept_counts)].astype(np.int64))
    return Kept(torch.from_numpy(np.concatenate(counts)), _tensor(ids, np.int64, device))


def _tensor(arrays: list[np.ndarray], dtype: type[np.generic], device: str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)
