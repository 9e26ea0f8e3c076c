"""Chooses, for every sequence and step, which drafter drafts and how far, by what it has measured.

Every drafter follows every sequence. Cheap ones propose in every step, dear ones where their usual gain is worth their
time; `drafters.allocation` decides what of it is verified, from `drafters.acceptance` and `drafters.cost_model`.

A draft that was drawn must be chosen and cut without regard to what was drawn: a token that is verified only where it,
or what was drawn after it, looks good is not distributed as its probabilities say (`_blind`).
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from drafters.acceptance import CONFIDENCES, DEPTHS, MATCHES, learn, refresh
from drafters.allocation import REASONS, allocate
from drafters.base import DraftRequest, Needs, Proposal, SequenceStart, Target, Verified
from drafters.composite import CompositeDrafter, Ensemble, joined
from drafters.cost_model import CostModel
from pipeline.errors import UsageError

_DEAR = 0.03
"""A drafter whose proposal takes more than this part of a plain step is asked only where that pays."""
_EXPLORE_EVERY = 64
"""steps after which a dear drafter is asked though it does not seem to pay"""
_RETRY_AFTER = 8
"""the same where the batch has become half or twice as large meanwhile"""
_TRIAL_EVERY = 24
"""asked-for drafts in a row that did not pay, after which some are verified to see whether they still do not"""
_REST_AFTER, _LONGEST_REST = 24, 7
"""After so many steps in which nothing paid, cheap drafters rest too, for up to so many steps at a time."""
_RATE = 0.1
_UNKNOWN = 1 << 40


@dataclass(slots=True)
class _Step:
    """What was proposed and chosen, until the step is observed."""

    ids: Sequence[int]
    proposals: list[Proposal]
    tokens: np.ndarray
    """int64 [D, B, K]"""
    lengths: np.ndarray
    """int64 [D, B]"""
    assumed: np.ndarray
    """int64 [D, B], the same as far as it may be known in choosing"""
    matches: np.ndarray
    confidences: np.ndarray
    choice: np.ndarray
    granted: np.ndarray
    """int64 [B], tokens of the choice that were to be verified, if it has as many"""
    drafted: int = 0


@dataclass(slots=True)
class _Groups:
    """How far the members of each group are: what is worth how much."""

    group: dict[int, int] = field(default_factory=dict)
    """of each live sequence"""
    begun: dict[int, int] = field(default_factory=dict)
    live: dict[int, int] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)
    """tokens of each live sequence"""

    def begin(self, starts: Sequence[SequenceStart]) -> None:
        for start in starts:
            if start.id not in self.group:
                self.group[start.id] = start.group
                self.begun[start.group] = self.begun.get(start.group, 0) + 1
                self.live[start.group] = self.live.get(start.group, 0) + 1
                self.generated[start.id] = len(start.response_ids)

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            group = self.group.pop(i, None)
            if group is not None:
                del self.generated[i]
                self.live[group] -= 1
                if not self.live[group]:
                    del self.live[group], self.begun[group]

    def urgency(self, ids: Sequence[int], weight: float) -> np.ndarray:
        """float64 [B]: 1, and up to `weight` more for the last of a group and for the longest of the batch: whoever
        waits for the group waits for these."""
        if weight == 0 or len(ids) == 1:
            return np.ones(len(ids))
        generated = np.array([self.generated[i] for i in ids], np.float64)
        over = np.clip(generated / max(1.0, generated.mean()) - 1, 0, 1)
        ended = np.array([1 - self.live[g] / self.begun[g] for g in (self.group[i] for i in ids)])
        return 1 + weight * np.maximum(over, ended)


class ArbiterDrafter(CompositeDrafter):
    """Measures what drafting costs and brings, and drafts where, with whom and as far as it pays."""

    name = "arbiter"
    needs = Needs.TARGET_LAYERS

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """`drafters` to choose from, names or tables; `calibration_seconds` bounds measuring at the start, 0 leaves it
        to the steps themselves; `measure` false decides by a fixed guess of costs, which makes decisions repeat;
        `urgency` is what a token of the last or longest sequence of a group is worth more than another."""

        drafters: list[dict[str, Any] | str] = msgspec.field(default_factory=lambda: ["suffix-automaton"])
        calibration_seconds: Annotated[float, Meta(ge=0)] = 1.0
        measure: bool = True
        urgency: Annotated[float, Meta(ge=0, le=1)] = 0.1

    def __init__(
        self,
        options: Options | None = None,
        costs: CostModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            options: from the configuration.
            costs: what verifications cost, where that is known; None: it is measured.
            clock: seconds, to measure drafters with.
        """
        self.options = options or self.Options()
        if not self.options.drafters:
            raise UsageError(f"drafter {self.name} has an empty list of drafters; name at least one, or use none")
        super().__init__(Ensemble.build(self.options.drafters))
        self.costs = costs or CostModel(learns=self.options.measure)
        self._calibrates = costs is None and self.options.measure and self.options.calibration_seconds > 0
        if self._calibrates:
            self.needs |= Needs.TARGET_LAYERS
        self._clock = clock if self.options.measure else lambda: 0.0
        count = len(self.ensemble)
        self._counts = np.zeros((count, MATCHES, CONFIDENCES, DEPTHS, 2))
        self._chances = np.zeros((count, MATCHES, CONFIDENCES, DEPTHS))
        refresh(self._counts, self._chances)
        _compile()
        self._groups = _Groups()
        self._seconds = np.zeros(count)
        """of a proposal of each drafter, where it made one"""
        self._own_seconds = 0.0
        """of deciding and observing, a step"""
        self._asked, self._rows = np.zeros(count, np.int64), np.ones(count, np.int64)
        """step at which each was asked last, and for how many sequences"""
        self._widest = np.full(count, _UNKNOWN, np.int64)
        """longest draft each has made"""
        self._gain = np.full(count, np.nan)
        """of dear ones: by how much asking raises tokens a second; not a number before it is known"""
        self._price, self._idle, self._rest, self._steps = 0.1, 0, 0, 0
        self._reasons = np.zeros(len(REASONS), np.int64)
        self._resting = self._not_asked = 0
        self._trial = False
        """whether this step is one to learn what drafting costs"""
        self._step: _Step | None = None

    def attach(self, target: Target) -> None:
        super().attach(target)
        if self._calibrates:
            from drafters.calibration import measure_verifications

            self.costs.fit(measure_verifications(target.decoder, self.options.calibration_seconds))

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        super().begin(sequences)
        self._groups.begin(sequences)

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        super().restore(sequences)
        self._groups.begin(sequences)

    def end(self, ids: Sequence[int]) -> None:
        super().end(ids)
        self._groups.end(ids)

    # ---- a step --------------------------------------------------------------------------------------------------

    def propose(self, request: DraftRequest) -> Proposal:
        began = self._clock()
        self._steps += 1
        if self._rest > 0:
            self._rest -= 1
            self._resting += len(request.ids)
            self._step = None
            return Proposal.empty(len(request.ids))
        self._trial = self.costs.learns and self._idle > 0 and self._idle % _TRIAL_EVERY == 0
        asked = [index for index in range(len(self.ensemble)) if self._worth_asking(index, len(request.ids))]
        proposals = [
            self._ask(index, request) if index in asked else Proposal.empty(len(request.ids))
            for index in range(len(self.ensemble))
        ]
        asking = self._clock() - began
        step = self._stacked(request, proposals)
        urgency = self._groups.urgency(request.ids, self.options.urgency)
        granted, tokens, seconds = self._allocated(step, step.assumed, request, urgency, self._reasons)
        for index in asked:
            if self._dear(index, len(request.ids)):
                self._judge(index, step, request, urgency, tokens / (seconds + self._seconds[index]))
        rows = np.arange(len(granted))
        lengths = np.where(step.choice >= 0, np.minimum(granted, step.lengths[step.choice, rows]), 0)
        step.granted, step.drafted = granted, int(lengths.sum())
        self._step = step
        self._consider_rest(step.drafted)
        spent = self._clock() - began - asking
        self._own_seconds += _RATE * (min(spent, 2 * self._own_seconds + 1e-4) - self._own_seconds)
        if not step.drafted:
            return Proposal.empty(len(request.ids))
        return joined(proposals, [guard.name for guard in self.ensemble], step.choice, lengths)

    def observe(self, verified: Verified) -> None:
        super().observe(verified)
        for i, emitted in zip(verified.ids, verified.emitted, strict=True):
            self._groups.generated[i] += len(emitted)
        step, rows = self._step, len(verified.ids)
        self.costs.observe(rows, rows + (step.drafted if step else 0), verified.seconds)
        if step is None or list(step.ids) != list(verified.ids):
            return
        self._step = None
        borders = np.zeros(rows + 1, np.int64)
        np.cumsum([len(tokens) for tokens in verified.emitted], out=borders[1:])
        lengths = step.lengths
        for index, proposal in enumerate(step.proposals):
            # What was drawn but not verified teaches nothing. A draft that ended before what was granted teaches that
            # it does: its missing tokens count as rejected.
            drawn = _drawn(proposal)
            lengths[index, drawn] = np.where(step.choice == index, step.granted, 0)[drawn]
        learn(
            self._counts, self._chances, step.tokens, lengths, step.matches, step.confidences,
            np.concatenate(verified.emitted).astype(np.int64, copy=False), borders,
        )  # fmt: skip

    def _allocated(
        self, step: _Step, drafts: np.ndarray, request: DraftRequest, urgency: np.ndarray, reasons: np.ndarray
    ) -> tuple[np.ndarray, float, float]:
        """Fills `step.choice`; returns lengths int64 [B], expected tokens, and seconds without those of asking."""
        lengths = np.zeros(len(request.ids), np.int64)
        self._price, tokens, seconds = allocate(
            self._chances, step.matches, step.confidences, drafts, request.budgets, urgency, self.costs.table,
            self.costs.scale[0], self._own_seconds, self._price, self._trial, step.choice, lengths,
            reasons,
        )  # fmt: skip
        return lengths, tokens, seconds

    def _dear(self, index: int, rows: int) -> bool:
        return bool(self._seconds[index] > _DEAR * self.costs.seconds(rows, rows))

    def _worth_asking(self, index: int, rows: int) -> bool:
        """Cheap drafters always are; a dear one where it paid for its time, or now and then to see whether it would."""
        if not self._asked[index] or not self._dear(index, rows) or self._gain[index] > 0:
            return True
        since = self._steps - self._asked[index]
        changed = not 0.5 < rows / self._rows[index] < 2
        if since >= _EXPLORE_EVERY or (changed and since >= _RETRY_AFTER):
            return True
        self._not_asked += rows
        return False

    def _ask(self, index: int, request: DraftRequest) -> Proposal:
        began = self._clock()
        proposal = self.ensemble.guards[index].propose(request)
        seconds = self._clock() - began
        # The least of late: a pause of the machine, or compiling in the first call, is not what asking costs.
        known = self._asked[index] > 0
        self._seconds[index] = min(seconds, 1.05 * self._seconds[index]) if known else seconds
        self._asked[index], self._rows[index] = self._steps, len(request.ids)
        return proposal

    def _judge(self, index: int, step: _Step, request: DraftRequest, urgency: np.ndarray, rate: float) -> None:
        """What asking a dear drafter brought, its time included, against deciding without it."""
        drafts, choice, price = step.assumed.copy(), step.choice.copy(), self._price
        drafts[index] = 0
        _, tokens, seconds = self._allocated(step, drafts, request, urgency, np.zeros_like(self._reasons))
        step.choice[:], self._price = choice, price
        gain = rate * seconds / tokens - 1
        before = self._gain[index]
        self._gain[index] = gain if np.isnan(before) else before + _RATE * (gain - before)

    def _stacked(self, request: DraftRequest, proposals: list[Proposal]) -> _Step:
        """The proposals side by side, padded to the widest."""
        rows, width = len(request.ids), max(p.token_ids.shape[1] for p in proposals)
        width = max(width, int(request.budgets.max(initial=0)) if any(_drawn(p).any() for p in proposals) else 0)
        shape = (len(proposals), rows, width)
        tokens, confidences = np.full(shape, -1, np.int64), np.full(shape, -1.0, np.float32)
        lengths, matches = np.zeros(shape[:2], np.int64), np.full(shape[:2], -1, np.int64)
        for index, proposal in enumerate(proposals):
            used = proposal.token_ids.shape[1]
            inside = np.arange(used) < proposal.lengths[:, None]
            tokens[index, :, :used], lengths[index] = np.where(inside, proposal.token_ids, -1), proposal.lengths
            if proposal.matches is not None:
                matches[index] = proposal.matches
            if proposal.confidences is not None:
                confidences[index, :, :used] = proposal.confidences
        assumed = lengths.copy()
        for index, proposal in enumerate(proposals):
            _blind(proposal, np.minimum(request.budgets, self._widest[index]), assumed[index], confidences[index])
            if proposal.token_ids.shape[1]:
                seen = int(self._widest[index]) if self._widest[index] < _UNKNOWN else 0
                self._widest[index] = max(seen, proposal.token_ids.shape[1])
        none = np.zeros(rows, np.int64)
        return _Step(request.ids, proposals, tokens, lengths, assumed, matches, confidences, none, none.copy())

    def _consider_rest(self, drafted: int) -> None:
        """Where nothing has paid for long, asking for drafts is a cost like another."""
        self._idle = 0 if drafted and not self._trial else self._idle + 1
        if self._idle > _REST_AFTER:
            self._rest = min(_LONGEST_REST, (self._idle - _REST_AFTER + 3) // 4)

    def counters(self) -> dict[str, float]:
        """Sequence steps by what was decided and why, and what the drafters say."""
        decisions = {reason: int(count) for reason, count in zip(REASONS, self._reasons, strict=True)}
        return decisions | {"resting": self._resting, "not asked": self._not_asked} | super().counters()


def _drawn(proposal: Proposal) -> np.ndarray:
    """bool [B], rows whose draft was drawn from probabilities."""
    if proposal.probabilities is None:
        return np.zeros(len(proposal.lengths), np.bool_)
    return proposal.lengths > 0 if proposal.sampled is None else proposal.sampled & (proposal.lengths > 0)


def _blind(proposal: Proposal, usual: np.ndarray, lengths: np.ndarray, confidences: np.ndarray) -> None:
    """Hides what depends on drawn tokens: how long a draft became, and every confidence but the first, which was known
    before anything was drawn.

    Args:
        proposal: of a drafter, B rows.
        usual: int64 [B], the length to assume instead.
        lengths: int64 [B], changed.
        confidences: float32 [B, K], changed.
    """
    drawn = _drawn(proposal)
    lengths[drawn] = usual[drawn]
    confidences[drawn] = confidences[drawn, :1]


@functools.cache
def _compile() -> None:
    """The compiled parts, before any step is measured."""
    counts, chances = np.zeros((1, MATCHES, CONFIDENCES, DEPTHS, 2)), np.zeros((1, MATCHES, CONFIDENCES, DEPTHS))
    tokens, one = np.zeros((1, 1, 1), np.int64), np.ones((1, 1), np.int64)
    confidences, costs = np.zeros((1, 1, 1), np.float32), CostModel()
    costs.observe(1, 2, 0.01)
    allocate(
        chances, one, confidences, one, one[0], np.ones(1), costs.table, costs.scale[0], 0.0, 0.1, False,
        one[0].copy(), one[0].copy(), np.zeros(len(REASONS), np.int64),
    )  # fmt: skip
    learn(counts, chances, tokens, one, one, confidences, one[0], np.array([0, 1]))
