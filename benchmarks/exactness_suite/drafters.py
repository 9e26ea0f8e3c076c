"""Drafters that do their worst: whatever they draft, the distribution must not move."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from drafters.base import BaseDrafter, DraftRequest, Proposal, SequenceStart, Verified
from drafters.mtp.module import MTPModule
from pipeline.models.config import ModelConfig

Guess = Callable[[SequenceStart, list[int], int], Sequence[int]]
"""(start, tokens so far, budget) -> draft"""


class Tracking(BaseDrafter):
    """Knows what each sequence emitted so far."""

    def __init__(self) -> None:
        self.starts: dict[int, SequenceStart] = {}
        self.emitted: dict[int, list[int]] = {}

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            self.starts[start.id], self.emitted[start.id] = start, []

    def observe(self, verified: Verified) -> None:
        for i, tokens in zip(verified.ids, verified.emitted, strict=True):
            self.emitted[i] += tokens.tolist()

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            del self.starts[i], self.emitted[i]


class Guessing(Tracking):
    """Deterministic drafts by a function."""

    def __init__(self, name: str, guess: Guess) -> None:
        super().__init__()
        self.name, self._guess = name, guess

    def propose(self, request: DraftRequest) -> Proposal:
        rows = zip(request.ids, request.budgets.tolist(), strict=True)
        drafts = [self._guess(self.starts[i], self.emitted[i], budget) for i, budget in rows]
        token_ids = np.zeros((len(drafts), max(1, *map(len, drafts))), np.int64)
        for row, draft in enumerate(drafts):
            token_ids[row, : len(draft)] = draft
        return Proposal(token_ids, np.array([len(draft) for draft in drafts], np.int64))


def constant(token: int) -> Guessing:
    """Always the same token."""
    return Guessing("constant token", lambda start, emitted, budget: [token] * budget)


def least_likely(laws: Mapping[tuple[int, ...], np.ndarray]) -> Guessing:
    """The least likely next token, as far as the laws after each prefix are known."""

    def guess(start: SequenceStart, emitted: list[int], budget: int) -> list[int]:
        draft: list[int] = []
        while len(draft) < budget and (prefix := (*emitted, *draft)) in laws:
            draft.append(int(laws[prefix].argmin()))
        return draft

    return Guessing("least likely token", guess)


def random_tokens(vocabulary: int, seed: int) -> Guessing:
    """Any tokens, any number of them."""
    rng = np.random.default_rng(seed)
    return Guessing(
        "random tokens", lambda s, e, budget: rng.integers(0, vocabulary, rng.integers(0, budget + 1)).tolist()
    )


def too_long(after: int) -> Guessing:
    """Drafts beyond its budget from some call on; it is switched off then."""
    calls = iter(range(1 << 30))
    return Guessing("drafts beyond its budget", lambda s, e, budget: [0] * (budget + (next(calls) >= after)))


def future(texts: Mapping[int, list[int]]) -> Guessing:
    """What each seed is going to sample."""
    return Guessing(
        "copies of the future", lambda start, emitted, budget: texts[start.seed][len(emitted) : len(emitted) + budget]
    )


class Overwriting(Tracking):
    """Writes into whatever it is given, unlocking it first, and drafts up to the budgets that it wrote."""

    name = "overwrites what it is given"

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        super().begin(sequences)
        for start in sequences:
            _overwrite(start.prompt_ids, start.response_ids)

    def propose(self, request: DraftRequest) -> Proposal:
        lengths = request.budgets.copy()
        _overwrite(request.budgets, request.temperatures, *(request.truncation or ()))
        return Proposal(np.zeros((len(lengths), max(1, int(lengths.max()))), np.int64), lengths)

    def observe(self, verified: Verified) -> None:
        assert verified.starts is not None
        super().observe(verified)
        _overwrite(*verified.emitted, verified.accepted, verified.starts)


def _overwrite(*arrays: np.ndarray) -> None:
    for array in arrays:
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        try:
            owner.flags.writeable = array.flags.writeable = True
        except ValueError:  # it is somebody's memory that numpy does not own
            continue
        array[:] = 0


class Drawn(Tracking):
    """Draws drafts from a distribution of its own for each depth of the response, and says which."""

    name = "drawn from its own distribution"

    def __init__(self, vocabulary: int, seed: int, sharpness: float = 1.0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._law = torch.softmax(sharpness * torch.randn(8, vocabulary, generator=self._generator), -1)

    def propose(self, request: DraftRequest) -> Proposal:
        budgets = torch.from_numpy(request.budgets)
        lengths = (torch.rand(len(budgets), generator=self._generator) * (budgets + 1)).long()
        q = self.law(request, max(1, int(lengths.max())))
        drawn = torch.multinomial(q.flatten(0, 1), 1, generator=self._generator).view(q.shape[:2])
        return Proposal(drawn.numpy(), lengths.numpy(), q)

    def law(self, request: DraftRequest, depth: int) -> torch.Tensor:
        """[B, depth, V]"""
        return self._law[:depth].expand(len(request.ids), -1, -1)


def random_head(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a multi-token-prediction head for the checkpoint in `folder`, with distributions of its own."""
    generator = torch.Generator().manual_seed(seed)
    module = MTPModule(ModelConfig.from_folder(folder))
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return module.weights()


class Mixed(Drawn):
    """Some rows drawn, the others deterministic, without probabilities worth reading."""

    name = "drawn and deterministic rows in one batch"

    def propose(self, request: DraftRequest) -> Proposal:
        drawn = super().propose(request)
        assert drawn.probabilities is not None
        sampled = np.array([(i + len(self.emitted[i])) % 2 == 0 for i in request.ids])
        token_ids = np.where(sampled[:, None], drawn.token_ids, 1)
        q = torch.where(torch.from_numpy(sampled)[:, None, None], drawn.probabilities, torch.nan)
        return Proposal(token_ids, drawn.lengths, q, sampled=sampled)


class Remembering(Drawn):
    """Draws mostly what the same seed led to before, if it was seen."""

    name = "history of the same seeds"

    def __init__(self, vocabulary: int, seed: int, weight: float = 0.8) -> None:
        super().__init__(vocabulary, seed, sharpness=0.0)
        self._vocabulary, self._weight = vocabulary, weight
        self.memory: dict[int, list[int]] = {}

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self.memory[self.starts[i].seed] = self.emitted[i]
        super().end(ids)

    def law(self, request: DraftRequest, depth: int) -> torch.Tensor:
        q = torch.full((len(request.ids), depth, self._vocabulary), 1 / self._vocabulary)
        for row, i in enumerate(request.ids):
            known = self.memory.get(self.starts[i].seed, [])[len(self.emitted[i]) :][:depth]
            for column, token in enumerate(known):
                q[row, column] *= 1 - self._weight
                q[row, column, token] += self._weight
        return q
