"""The sequences that hold memory: who may start, who gets pages for the next tokens, and who gives them back."""

from collections.abc import Sequence as Items

import numpy as np

from drafters.base import Needs
from pipeline.engine.native.batch import Batch
from pipeline.engine.native.drafting import Drafting
from pipeline.engine.native.memory import Memory
from pipeline.engine.native.prefill import prefill
from pipeline.engine.native.scheduler import Scheduler
from pipeline.engine.native.sequence import Sequence
from pipeline.engine.native.small_model import SmallModel, on_small
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE


class Running:
    """Starting sequences, whose prompt is not complete, and live ones."""

    def __init__(
        self,
        batch: Batch,
        *,
        decoder: Decoder,
        memory: Memory,
        small: SmallModel | None,
        scheduler: Scheduler,
        drafting: Drafting,
        max_sequences: int,
        max_draft_tokens: int,
        prefill_tokens: int,
    ) -> None:
        """The options are `NativeGenerator`'s; `drafting` hears of live sequences that are preempted."""
        self.starting: list[Sequence] = []
        self.batch = batch
        self.preemptions = 0
        self._decoder, self._memory, self._small = decoder, memory, small
        self._scheduler, self._drafting = scheduler, drafting
        self._most, self._max_draft, self._prefill_tokens = max_sequences, max_draft_tokens, prefill_tokens

    def __len__(self) -> int:
        return len(self.starting) + len(self.batch)

    # ---- getting memory ------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Starts those next in the queue while there is memory for them."""
        if len(self) >= self._most or not len(self._scheduler):
            return
        admission = self._memory.admission(self.starting, list(self.batch))
        small = self._small
        beside = small.admission(self.starting, list(self.batch)) if small else None
        while len(self) < self._most:
            sequence = self._scheduler.next()
            if sequence is None or not admission.fits(sequence):
                break
            if small and beside and not sequence.request.policy_only:
                copy = small.copy_of(sequence)
                if not beside.fits(copy):
                    break
                beside.add(copy)
            admission.add(sequence)
            self._scheduler.start()
            self.starting.append(sequence)

    def prefill(self) -> list[Sequence]:
        """Computes prompts; returns those whose is complete, which are live now."""
        if not self.starting:
            return []
        hidden = Needs.HIDDEN_STATES in self._drafting.needs
        computed = prefill(self._decoder, self._memory, self.starting, self._prefill_tokens, hidden)
        ready = [s for s in self.starting if s.ready]
        if not (computed or ready or len(self.batch)):
            self.preempt()  # they hold so much of the memory together that none can go on
            return []
        self.starting = [s for s in self.starting if not s.ready]
        for sequence in ready:
            self.batch.add(sequence)
            self._last_member_started(sequence.group)
        return ready

    def catch_up(self) -> None:
        """The models that take over compute what they missed; preempts where there is no memory for that."""
        while self._small:
            done, rows = self._small.catch_up(list(self.batch), self._decoder, self._memory)
            for row in rows:
                self.batch.set_pages(row)
                self._last_member_started(self.batch[row].group)
            if done:
                break
            self.preempt()

    def make_room(self) -> np.ndarray:
        """Longest draft of each live sequence, int64 [B], for which it now has pages; preempts where even the next
        token of one has none."""
        self._compress()
        budgets: list[int] = []
        while len(budgets) < len(self.batch):
            budget = self._room(len(budgets))
            if budget is None:
                self.preempt()
                budgets = []  # rows have moved
            else:
                budgets.append(budget)
        return np.array(budgets, np.int64)

    def _room(self, row: int) -> int | None:
        """Draft tokens for which the sequence in a row now has pages; None: not even for the next token."""
        sequence = self.batch[row]
        if self._small and sequence.copy is not None and on_small(sequence):
            return 0 if self._small.memory.grow(sequence.copy, sequence.copy.cached + 1) else None
        wanted = min(self._max_draft, self._memory.draft_room(sequence))
        pages = len(sequence.pages)
        if not self._memory.grow(sequence, sequence.held + 1 + wanted):
            wanted = min(wanted, pages * PAGE - sequence.held - 1)
            if wanted < 0 and not self._memory.grow(sequence, sequence.held + 1):
                return None
            wanted = max(wanted, 0)
        if len(sequence.pages) > pages:
            self.batch.set_pages(row, known=pages)
        return wanted

    def _compress(self) -> None:
        """Live sequences that have outgrown their budget; preempts where copying what one shares has no pages."""
        while self._memory.compresses and (due := [s for s in self.batch if self._memory.due(s) <= 0]):
            if not self._memory.compress(due):
                self.preempt()
            for row in range(len(self.batch)):
                self.batch.set_pages(row)

    # ---- giving it back ------------------------------------------------------------------------------------------

    def preempt(self) -> None:
        """Takes the memory of prompts kept for later, else of the sequence that holds memory for the shortest time."""
        if self._memory.forget_prompts() or (self._small and self._small.free_idle(list(self.batch), self._memory)):
            return
        if self.starting:
            victim = self.starting.pop()
        else:
            victim = self.batch.take_out(max(range(len(self.batch)), key=lambda row: self.batch[row].id))
            self._drafting.preempt([victim.id])
        self._free(victim)
        self._scheduler.put_back(victim)
        self.preemptions += 1

    def restart(self, live: bool) -> None:
        """Sequences that are starting compute their prompts anew, and with `live` the others what they had."""
        again, self.starting = self.starting, []
        if live:
            self._drafting.preempt(self.batch.ids)
            again += [self.batch.take_out(row) for row in reversed(range(len(self.batch)))]
        for sequence in sorted(again, key=lambda s: s.id, reverse=True):
            self._free(sequence)
            self._scheduler.put_back(sequence)

    def stop_starting(self, group: int) -> list[Sequence]:
        """Those of a group that were starting; they are no more."""
        stopped = [s for s in self.starting if s.group == group]
        self.starting = [s for s in self.starting if s.group != group]
        for sequence in stopped:
            self._free(sequence)
        return stopped

    def remove(self, rows: Items[int]) -> None:
        """Live sequences that are finished or cancelled."""
        for row in sorted(rows, reverse=True):
            self._free(self.batch.take_out(row))

    def forget_prompt(self, group: int) -> None:
        """No sample of the group will ask for its prompt any more."""
        self._memory.forget_prompt(group)
        if self._small:
            self._small.memory.forget_prompt(group)

    def _last_member_started(self, group: int) -> None:
        """The policy's copy of a group's prompt goes once all samples have it."""
        if not self._scheduler.waits(group) and not any(s.group == group for s in self.starting):
            self._memory.forget_prompt(group)

    def _free(self, sequence: Sequence) -> None:
        self._memory.free(sequence)
        if self._small:
            self._small.free(sequence)
