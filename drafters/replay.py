"""What a drafter would have done on texts that are known.

A deterministic draft does not change the text of a seed, so a text that was generated once tells what any such drafter
would have had accepted at every step, and a table of costs what that would have taken: whole policies can be compared
without a model, without noise, and the same way twice.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from drafters.base import Drafter, DraftRequest, SequenceStart, Verified

Costs = Callable[[int, int], float]
"""seconds of a verification of so many sequences with so many tokens in all, each one's last one included"""


@dataclass(frozen=True, slots=True)
class RecordedText:
    """A prompt and what was sampled after it."""

    prompt_ids: np.ndarray
    """int64 [P]"""
    response_ids: np.ndarray
    """int64 [T], T >= 1"""
    group: int = 0


@dataclass(slots=True)
class ReplayTotals:
    """Counts of a replay."""

    steps: int = 0
    verifications: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    verification_seconds: float = 0.0
    """by the table of costs"""
    drafter_seconds: float = 0.0
    """by the clock"""
    by_drafter: dict[str, tuple[int, int]] = field(default_factory=dict)
    """tokens drafted and accepted"""

    @property
    def tokens_per_second(self) -> float:
        """By the table of costs alone."""
        return self.tokens / self.verification_seconds


@dataclass(slots=True)
class _Running:
    id: int
    text: RecordedText
    count: int = 0


def replay(
    drafter: Drafter, texts: Sequence[RecordedText], *, slots: int, max_draft_tokens: int, costs: Costs | None = None
) -> ReplayTotals:
    """Generates the texts again, `slots` at a time in their order, with drafts of `drafter`.

    Args:
        drafter: a fresh one; its drafts are taken as deterministic, and it gets neither logits nor hidden states.
        texts: what was sampled.
        slots: sequences at once.
        max_draft_tokens: longest draft.
        costs: of a verification; None: one second each.
    """
    totals, waiting, live = ReplayTotals(), deque(enumerate(texts)), list[_Running]()
    while waiting or live:
        starting = [_Running(*waiting.popleft()) for _ in range(min(len(waiting), slots - len(live)))]
        began = time.perf_counter()
        if starting:
            drafter.begin([SequenceStart(s.id, s.text.prompt_ids, s.text.group, 1.0, s.id) for s in starting])
        live += starting
        room = [min(max_draft_tokens, len(s.text.response_ids) - s.count - 1) for s in live]
        request = DraftRequest([s.id for s in live], np.array(room, np.int64), np.ones(len(live), np.float32))
        proposal = drafter.propose(request)
        totals.drafter_seconds += time.perf_counter() - began
        seconds = costs(len(live), len(live) + int(proposal.lengths.sum())) if costs else 1.0
        emitted, accepted = [], np.zeros(len(live), np.int64)
        names = proposal.drafted_by or [drafter.name] * len(live)
        for row, sequence in enumerate(live):
            n = int(proposal.lengths[row])
            ahead = sequence.text.response_ids[sequence.count : sequence.count + n + 1]
            good = np.append(proposal.token_ids[row, :n] == ahead[:n], False)
            accepted[row] = int(good.argmin())
            emitted.append(ahead[: accepted[row] + 1])
            sequence.count += len(emitted[-1])
            if n:
                before = totals.by_drafter.get(names[row], (0, 0))
                totals.by_drafter[names[row]] = before[0] + n, before[1] + int(accepted[row])
        totals.steps += 1
        totals.verifications += len(live)
        totals.tokens += sum(map(len, emitted))
        totals.drafted += int(proposal.lengths.sum())
        totals.accepted += int(accepted.sum())
        totals.verification_seconds += seconds
        began = time.perf_counter()
        drafter.observe(Verified(request.ids, emitted, accepted, seconds=seconds))
        done = [s for s in live if s.count == len(s.text.response_ids)]
        if done:
            drafter.end([s.id for s in done])
            live = [s for s in live if s.count < len(s.text.response_ids)]
        totals.drafter_seconds += time.perf_counter() - began
    return totals
