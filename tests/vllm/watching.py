"""A stranger's drafter that holds vLLM to the drafter protocol while it drafts."""

from collections.abc import Sequence

import numpy as np

from drafters.base import DraftRequest, Proposal, SequenceStart, Verified
from drafters.suffix_automaton import SuffixAutomatonDrafter


class Watching(SuffixAutomatonDrafter):
    """A suffix automaton that fails, and is then switched off, at the first broken promise."""

    name = "watching"

    def __init__(self, options: SuffixAutomatonDrafter.Options | None = None) -> None:
        super().__init__(options)
        self.texts: dict[int, list[int]] = {}
        self.paused: set[int] = set()
        self.prompts: dict[int, bytes] = {}
        self.seen = dict.fromkeys(("tokens", "checksum", "begun", "preempted", "restored", "ended", "version"), 0.0)

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            assert start.id not in self.texts and not len(start.response_ids)
            same = self.prompts.setdefault(start.group, start.prompt_ids.tobytes())
            assert same == start.prompt_ids.tobytes(), "a group's prompt differs"
            self.texts[start.id] = []
            self.seen["begun"] += 1
        super().begin(sequences)

    def propose(self, request: DraftRequest) -> Proposal:
        assert len(set(request.ids)) == len(request.ids) and set(request.ids) <= self.texts.keys() - self.paused
        return super().propose(request)

    def observe(self, verified: Verified) -> None:
        for i, emitted in zip(verified.ids, verified.emitted, strict=True):
            text = self.texts[i]
            assert emitted.dtype == np.int64 and len(emitted) and i not in self.paused, "emitted while it paused"
            self.seen["tokens"] += len(emitted)
            self.seen["checksum"] += float(((len(text) + 1 + np.arange(len(emitted))) * (emitted + 1)).sum())
            text += emitted.tolist()
        super().observe(verified)

    def preempt(self, ids: Sequence[int]) -> None:
        assert not self.paused & set(ids)
        self.paused |= set(ids)
        self.seen["preempted"] += len(ids)
        super().preempt(ids)

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            assert start.id in self.paused and start.response_ids.tolist() == self.texts[start.id]
            self.paused.discard(start.id)
            self.seen["restored"] += 1
        super().restore(sequences)

    def weights_changed(self, version: int) -> None:
        self.seen["version"] = version
        super().weights_changed(version)

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            del self.texts[i]
            self.paused.discard(i)
            self.seen["ended"] += 1
        super().end(ids)

    def counters(self) -> dict[str, float]:
        return dict(self.seen)
