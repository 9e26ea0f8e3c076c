"""The engine's drafter: guarded, told what becomes of the batch, and watched in case it does not return."""

import warnings
from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import torch

from drafters.base import Drafter, DraftRequest, Needs, Proposal, SequenceStart, Target, Verified, locked
from drafters.guard import CALL_SECONDS, Guard
from drafters.watchdog import WATCH_SECONDS, watch
from pipeline.engine.native.batch import Batch
from pipeline.engine.native.scoring import Scores
from pipeline.engine.native.sequence import Emission, Sequence


class Drafting(Guard):
    """`Guard` with the target attached and a watchdog."""

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        on_event: Callable[[str], None] | None = None,
        call_seconds: float = CALL_SECONDS,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        super().__init__(drafter, target.decoder.config.vocab_size, on_event or warnings.warn, call_seconds)
        watch(self, watch_seconds)
        self._target = target
        self.attach(target)

    def start(self, new: Items[Sequence], restored: Items[Sequence]) -> None:
        """Sequences have become live, for the first time or after a preemption."""
        self.begin([self._start_of(s) for s in new])
        self.restore([self._start_of(s) for s in restored])
        for sequence in (*new, *restored):
            sequence.hidden = []

    def draft(self, batch: Batch, budgets: np.ndarray) -> Proposal:
        """Of at most `budgets` [B] tokens a row."""
        return self.propose(DraftRequest(batch.ids, budgets, batch.temperatures, batch.truncation))

    def follow(self, batch: Batch, emissions: Items[Emission], scores: Scores, seconds: float) -> None:
        """Shows what a verification of so many seconds emitted."""
        self.observe(
            Verified(
                ids=batch.ids,
                emitted=[e.token_ids for e in emissions],
                accepted=locked(np.array([e.accepted for e in emissions], np.int64)),
                hidden=scores.hidden if Needs.HIDDEN_STATES in self.needs else None,
                logits=scores.logits if Needs.LOGITS in self.needs else None,
                starts=locked(scores.starts),
                seconds=seconds,
                layers=None if scores.layers is None else torch.stack(scores.layers),
            )
        )

    def _start_of(self, s: Sequence) -> SequenceStart:
        hidden = None
        if Needs.HIDDEN_STATES in self.needs:
            decoder = self._target.decoder
            none = decoder.embedding.new_zeros(0, decoder.config.hidden_size)
            hidden = s.hidden[0] if len(s.hidden) == 1 else torch.cat([none, *s.hidden])
        # Copies: what generation reads, penalties among it, is out of a drafter's reach.
        prompt, response = locked(s.request.prompt_ids.copy()), locked(s.token_ids[: s.count].copy())
        return SequenceStart(s.id, prompt, s.group, s.temperature, s.seed, response, hidden)
