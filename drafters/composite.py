"""Drafters made of drafters: each guarded on its own, all kept current, their drafts joined in one proposal."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drafters.base import (
    BaseDrafter,
    Drafter,
    DraftRequest,
    Needs,
    Proposal,
    SequenceStart,
    Target,
    Verified,
    check_policy,
)
from drafters.guard import CALL_SECONDS, Guard
from drafters.registry import build
from pipeline.errors import UsageError


class Ensemble:
    """Drafters that follow the same sequences; one that fails is switched off and the rest go on."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.drafters = list(drafters)
        self.needs = Needs.NOTHING
        for drafter in self.drafters:
            self.needs |= drafter.needs
        self.guards: list[Guard] = []
        self.host(2**31 - 1, warnings.warn, CALL_SECONDS)

    @staticmethod
    def build(pieces: Sequence[Mapping[str, Any] | str]) -> "Ensemble":
        """From pieces of configuration: names, or tables with a name and options."""
        return Ensemble([build({"name": piece} if isinstance(piece, str) else piece) for piece in pieces])

    def all(self) -> Iterator[Drafter]:
        """Its drafters, and theirs where they have some."""
        for drafter in self.drafters:
            yield drafter
            if isinstance(drafter, CompositeDrafter):
                yield from drafter.ensemble.all()

    def host(self, vocab_size: int, on_event: Callable[[str], None], call_seconds: float) -> None:
        self.guards = [Guard(drafter, vocab_size, on_event, call_seconds) for drafter in self.drafters]

    @property
    def failures(self) -> int:
        return sum(guard.failures for guard in self.guards)

    @property
    def at_work(self) -> str | None:
        return next((guard.at_work for guard in self.guards if guard.calling is not None), None)

    def __iter__(self) -> Iterator[Guard]:
        return iter(self.guards)

    def __len__(self) -> int:
        return len(self.guards)

    def attach(self, target: Target) -> None:
        for guard in self.guards:
            guard.attach(target)

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for guard in self.guards:
            guard.begin(sequences)

    def observe(self, verified: Verified) -> None:
        for guard in self.guards:
            guard.observe(verified)

    def preempt(self, ids: Sequence[int]) -> None:
        for guard in self.guards:
            guard.preempt(ids)

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        for guard in self.guards:
            guard.restore(sequences)

    def weights_changed(self, version: int) -> None:
        for guard in self.guards:
            guard.weights_changed(version)

    def end(self, ids: Sequence[int]) -> None:
        for guard in self.guards:
            guard.end(ids)

    def counters(self) -> dict[str, float]:
        return {f"{guard.name}.{key}": value for guard in self.guards for key, value in guard.counters().items()}


class CompositeDrafter(BaseDrafter):
    """Forwards everything but `propose` to its ensemble."""

    hands_on = False

    def __init__(self, ensemble: Ensemble) -> None:
        """
        Raises:
            UsageError: a drafter of its own kind is among the drafters, at whatever depth.
        """
        if any(isinstance(part, type(self)) for part in ensemble.all()):
            raise UsageError(f"drafter {self.name} is to hand out drafts of another {self.name}; name other drafters")
        self.ensemble = ensemble
        self.needs = ensemble.needs

    @property
    def failures(self) -> int:
        return self.ensemble.failures

    @property
    def at_work(self) -> str | None:
        return self.ensemble.at_work

    def host(self, vocab_size: int, on_event: Callable[[str], None], call_seconds: float) -> None:
        self.ensemble.host(vocab_size, on_event, call_seconds)

    def attach(self, target: Target) -> None:
        self.ensemble.attach(target)

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        self.ensemble.begin(sequences)

    def observe(self, verified: Verified) -> None:
        self.ensemble.observe(verified)

    def preempt(self, ids: Sequence[int]) -> None:
        self.ensemble.preempt(ids)

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        self.ensemble.restore(sequences)

    def weights_changed(self, version: int) -> None:
        self.ensemble.weights_changed(version)

    def end(self, ids: Sequence[int]) -> None:
        self.ensemble.end(ids)

    def check_policy(self, folder: Path | None, brings_head: bool) -> None:
        for drafter in self.ensemble.drafters:
            check_policy(drafter, folder, brings_head)

    def counters(self) -> dict[str, float]:
        return self.ensemble.counters()


def restricted(request: DraftRequest, rows: np.ndarray) -> DraftRequest:
    """The request with a budget for some rows alone; `rows` is bool [B]."""
    return DraftRequest(request.ids, np.where(rows, request.budgets, 0), request.temperatures, request.truncation)


def beginnings(proposal: Proposal, name: str, lengths: np.ndarray) -> Proposal:
    """The first `lengths` [B] tokens of each row of a proposal with probabilities, by the drafter `name`."""
    width, q, sampled = int(lengths.max(initial=0)), proposal.probabilities, proposal.sampled
    assert q is not None
    tokens, confidences = proposal.token_ids, proposal.confidences
    if width < tokens.shape[1]:
        tokens, q = np.ascontiguousarray(tokens[:, :width]), q[:, :width].contiguous()
        confidences = None if confidences is None else np.ascontiguousarray(confidences[:, :width])
    drafted = lengths > 0
    by = proposal.drafted_by or [name if some else "" for some in drafted.tolist()]
    sampled = drafted if sampled is None else sampled & drafted
    return Proposal(tokens, lengths, q, None, sampled, by, proposal.matches, confidences)


def joined(proposals: Sequence[Proposal], names: Sequence[str], choice: np.ndarray, lengths: np.ndarray) -> Proposal:
    """Row b is the first `lengths[b]` tokens of `proposals[choice[b]]`'s row b; -1 chooses no draft.

    Args:
        proposals: for the same B rows.
        names: of who made them.
        choice: int64 [B].
        lengths: int64 [B], no more than the chosen draft has.
    """
    lengths = np.where(choice >= 0, lengths, 0)
    rows, width = len(choice), int(lengths.max(initial=0))
    tokens, matches = np.zeros((rows, width), np.int64), np.zeros(rows, np.int64)
    confidences = np.zeros((rows, width), np.float32)
    drawn = [p.probabilities is not None and bool((choice == i).any()) for i, p in enumerate(proposals)]
    q: torch.Tensor | None = None
    sampled = np.zeros(rows, np.bool_)
    by = [""] * rows
    for index, proposal in enumerate(proposals):
        mine = np.flatnonzero(choice == index)
        if not len(mine) or not width:
            continue
        used = min(width, proposal.token_ids.shape[1])
        tokens[mine, :used] = proposal.token_ids[mine, :used]
        if proposal.matches is not None:
            matches[mine] = proposal.matches[mine]
        if proposal.confidences is not None:
            confidences[mine, :used] = proposal.confidences[mine, :used]
        for row in mine.tolist():
            by[row] = proposal.drafted_by[row] if proposal.drafted_by is not None else names[index]
        if drawn[index]:
            assert proposal.probabilities is not None
            if q is None:
                q = proposal.probabilities.new_zeros(rows, width, proposal.probabilities.shape[2])
            at = torch.from_numpy(mine).to(q.device)
            q[at, :used] = proposal.probabilities[at, :used]
            sampled[mine] = True if proposal.sampled is None else proposal.sampled[mine]
    return Proposal(tokens, lengths, q, None, sampled if q is not None else None, by, matches, confidences)
