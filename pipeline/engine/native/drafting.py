"""A drafter behind a guard: whatever it does wrong costs speed, not text, and is said once."""

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from drafters.base import Drafter, DraftRequest, Needs, Proposal, SequenceStart, Verified
from pipeline.models.decoder import Decoder

T = TypeVar("T")


class BadProposal(ValueError):
    """A drafter proposed something the protocol does not allow; the text says what."""


class Drafting:
    """Calls a drafter; the first exception or bad proposal switches it off for good."""

    def __init__(self, drafter: Drafter, target: Decoder, on_event: Callable[[str], None] | None = None) -> None:
        self.name, self.needs = drafter.name, drafter.needs
        self.failures = 0
        """1 once the drafter has been switched off"""
        self._drafter: Drafter | None = drafter
        self._vocab_size = target.config.vocab_size
        self._on_event = on_event or warnings.warn
        if Needs.TARGET_LAYERS in self.needs:
            self._call(lambda d: d.attach(target), None)

    @property
    def active(self) -> bool:
        return self._drafter is not None

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        self._call(lambda d: d.begin(sequences), None)

    def propose(self, request: DraftRequest) -> Proposal:
        """A checked proposal, no wider than its longest draft; empty where nothing may or can be drafted."""
        empty = Proposal.empty(len(request.ids))
        if not self.active or not request.budgets.any():
            return empty
        return self._call(lambda d: checked(d.propose(request), request, self._vocab_size), empty)

    def observe(self, verified: Verified) -> None:
        self._call(lambda d: d.observe(verified), None)

    def weights_changed(self, version: int) -> None:
        self._call(lambda d: d.weights_changed(version), None)

    def end(self, ids: Sequence[int]) -> None:
        self._call(lambda d: d.end(ids), None)

    def _call(self, action: Callable[[Drafter], T], otherwise: T) -> T:
        if self._drafter is None:
            return otherwise
        try:
            return action(self._drafter)
        except Exception as error:  # a stranger's code may raise anything, and generation does not depend on it
            self._drafter = None
            self.failures += 1
            self._on_event(f"drafter {self.name} is switched off after {type(error).__name__}: {error}")
            return otherwise


def checked(proposal: Proposal, request: DraftRequest, vocab_size: int) -> Proposal:
    """The proposal, trimmed to its longest draft.

    Raises:
        BadProposal: shapes, lengths, ids or probabilities the protocol does not allow.
    """
    rows, ids, lengths = len(request.ids), proposal.token_ids, proposal.lengths
    if ids.ndim != 2 or len(ids) != rows or lengths.shape != (rows,):
        raise BadProposal(f"token_ids {ids.shape} and lengths {lengths.shape} for {rows} rows")
    if ids.dtype.kind != "i" or lengths.dtype.kind != "i":
        raise BadProposal(f"token_ids are {ids.dtype} and lengths {lengths.dtype}, not signed integers")
    if (lengths < 0).any() or (lengths > np.minimum(request.budgets, ids.shape[1])).any():
        raise BadProposal(f"lengths {lengths.tolist()} where budgets are {request.budgets.tolist()}")
    if proposal.parents is not None:
        raise BadProposal("parents are reserved for trees")
    width = int(lengths.max(initial=0))
    used = np.arange(width) < lengths[:, None]
    ids = np.where(used, ids[:, :width], 0).astype(np.int64)
    if (ids < 0).any() or (ids >= vocab_size).any():
        raise BadProposal(f"a token id is outside the vocabulary of {vocab_size}")
    if proposal.probabilities is None or width == 0:
        return Proposal(ids, lengths.astype(np.int64))
    q = proposal.probabilities
    if q.ndim != 3 or q.shape[0] != rows or q.shape[1] < width or q.shape[2] != vocab_size:
        raise BadProposal(f"probabilities {tuple(q.shape)} for {rows} drafts of up to {width} tokens")
    q, sampled = q[:, :width].float(), proposal.sampled
    if sampled is not None and (sampled.shape != (rows,) or sampled.dtype != np.bool_):
        raise BadProposal(f"sampled is {sampled.dtype} {sampled.shape} where {rows} booleans were expected")
    _check_probabilities(q, ids, used if sampled is None else used & sampled[:, None])
    return Proposal(ids, lengths.astype(np.int64), q, sampled=sampled)


def _check_probabilities(q: torch.Tensor, ids: np.ndarray, used: np.ndarray) -> None:
    """Verification is exact only for the distribution the token was drawn from, so q must at least be one with it."""
    inside = torch.from_numpy(used).to(q.device)
    drawn = q.gather(2, torch.from_numpy(ids).to(q.device).unsqueeze(2)).squeeze(2)
    good = (q.min(-1).values >= 0) & ((q.sum(-1) - 1).abs() < 1e-3) & (drawn > 0)
    if not bool(good[inside].all()):
        raise BadProposal("probabilities of a draft token are negative, do not sum to 1, or give the token itself none")
