"""Drafts copied from the sequence's own past: the text that followed the longest suffix seen before.

A suffix automaton of prompt and output (Blumer et al., 1985), extended token by token, answers "longest suffix that
occurred earlier" without a search: it is the suffix link of the last state. After SAM-Decoding (Hu et al.,
arXiv 2411.10666), with the latest earlier occurrence instead of the first.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from drafters.base import BaseDrafter, DraftRequest, Proposal, SequenceStart, Verified

_MAX_LINK_WALK = 32


class SuffixAutomaton:
    """Suffix automaton of a growing text, flat lists over states; state 0 is the empty string.

    Extending costs amortised constant time, the lookup constant time.
    """

    __slots__ = ("_end", "_last", "_length", "_link", "_next", "match_end", "match_length", "text")

    def __init__(self) -> None:
        self.text: list[int] = []
        self.match_length = 0
        """tokens of the longest suffix of the text that also ends earlier"""
        self.match_end = 0
        """where that earlier occurrence ends: `text[match_end]` followed it"""
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [0]
        """per state, where its latest known occurrence ends"""
        self._last = 0

    def copy(self) -> "SuffixAutomaton":
        """An automaton of the same text that grows on its own."""
        new = SuffixAutomaton()
        new.text, new._link, new._length, new._end = self.text[:], self._link[:], self._length[:], self._end[:]
        new._next = [edges.copy() for edges in self._next]
        new._last, new.match_length, new.match_end = self._last, self.match_length, self.match_end
        return new

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens to the text."""
        for token in tokens:
            self.text.append(token)
            self._append(token)
            matched = self._link[self._last]
            self.match_length, self.match_end = self._length[matched], self._end[matched]
            self._mark_occurrences(matched)

    def _append(self, token: int) -> None:
        transitions, link, length = self._next, self._link, self._length
        current = self._add_state({}, 0, length[self._last] + 1, len(self.text))
        state = self._last
        while state != -1 and token not in transitions[state]:
            transitions[state][token] = current
            state = link[state]
        if state != -1:
            target = transitions[state][token]
            if length[target] != length[state] + 1:
                target = self._split(target, state, token)
            link[current] = target
        self._last = current

    def _split(self, target: int, state: int, token: int) -> int:
        """A state for the strings of `target` that now also end here, the shorter ones."""
        transitions, link = self._next, self._link
        clone = self._add_state(transitions[target].copy(), link[target], self._length[state] + 1, self._end[target])
        while state != -1 and transitions[state].get(token) == target:
            transitions[state][token] = clone
            state = link[state]
        link[target] = clone
        return clone

    def _add_state(self, edges: dict[int, int], link: int, length: int, end: int) -> int:
        self._next.append(edges)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1

    def _mark_occurrences(self, state: int) -> None:
        """Every suffix of the text now ends here. The walk is cut short: a text of one token repeated has a state for
        each of its suffixes. What lies beyond keeps an older occurrence, which is as true."""
        end = len(self.text)
        for _ in range(_MAX_LINK_WALK):
            if state <= 0:
                return
            self._end[state] = end
            state = self._link[state]

    def continuation(self, count: int) -> list[int]:
        """`count` tokens that followed the matched suffix; a match that runs into the text's end repeats its period."""
        draft = self.text[self.match_end : self.match_end + count]
        period = len(self.text) - self.match_end
        while len(draft) < count:
            draft.append(draft[len(draft) - period])
        return draft


class SuffixAutomatonDrafter(BaseDrafter):
    """Copies what followed the longest repeated suffix of prompt and output; no training, no second model."""

    name = "suffix-automaton"

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """The draft has `base + factor * match` tokens, at most `max_tokens`, from a match of `min_match` on."""

        min_match: Annotated[int, Meta(ge=1)] = 1
        base: Annotated[float, Meta(ge=0)] = 1.0
        factor: Annotated[float, Meta(ge=0)] = 1.0
        max_tokens: Annotated[int, Meta(ge=1)] = 128

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or self.Options()
        self._sequences: dict[int, SuffixAutomaton] = {}
        self._groups: dict[int, int] = {}
        """group of each sequence"""
        self._prompts: dict[int, SuffixAutomaton] = {}
        """prompt automaton of each group with a live member"""

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            if start.group not in self._prompts:
                self._prompts[start.group] = automaton = SuffixAutomaton()
                automaton.extend(start.prompt_ids.tolist())
            self._groups[start.id] = start.group
            self._sequences[start.id] = self._prompts[start.group].copy()

    def propose(self, request: DraftRequest) -> Proposal:
        drafts = [
            self._draft(self._sequences[i], budget)
            for i, budget in zip(request.ids, request.budgets.tolist(), strict=True)
        ]
        lengths = np.array([len(draft) for draft in drafts], np.int64)
        token_ids = np.zeros((len(drafts), int(lengths.max(initial=0))), np.int64)
        for row, draft in enumerate(drafts):
            token_ids[row, : len(draft)] = draft
        return Proposal(token_ids, lengths)

    def _draft(self, automaton: SuffixAutomaton, budget: int) -> list[int]:
        options = self.options
        if automaton.match_length < options.min_match:
            return []
        wanted = int(options.base + options.factor * automaton.match_length)
        return automaton.continuation(min(budget, wanted, options.max_tokens))

    def observe(self, verified: Verified) -> None:
        for i, emitted in zip(verified.ids, verified.emitted, strict=True):
            self._sequences[i].extend(emitted.tolist())

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._sequences.pop(i, None)
            self._groups.pop(i, None)
        live = set(self._groups.values())
        for group in [g for g in self._prompts if g not in live]:
            del self._prompts[group]
