"""Keys and values of a drafter's own model, for the sequences of the engine: caught up when asked, rolled back when
drafts were wrong, the prompt of a group computed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from drafters.base import SequenceStart
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache

_NARROW = 8
"""A sequence that lacks no more tokens catches up in the pass that gives its first draft token; one that lacks more, a
prompt, does so before, apart from the others, which would be padded to its width."""
_CHUNK, _PASS = 512, 4096
"""tokens of a sequence in a pass, and of a pass with padding"""


@dataclass(slots=True)
class _Text:
    start: SequenceStart
    tokens: list[int]
    """prompt and response"""
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    ahead: list[int] = field(default_factory=list)
    """draft tokens behind `tokens` that are cached, too"""

    @property
    def prompt(self) -> int:
        """Prompt tokens that its group shares: all but the last."""
        return len(self.start.prompt_ids) - 1


class OwnCache:
    """A decoder beside the target, and how far it has read each sequence."""

    def __init__(self, decoder: Decoder, pages: int) -> None:
        """
        Args:
            decoder: the drafter's model.
            pages: most memory, in pages; a sequence that finds none is not drafted for.
        """
        self.decoder = decoder
        self.cache = KVCache(decoder.config, decoder.dtype, decoder.device, pages)
        self.tokens_read = 0
        """by the model, drafts included"""
        self.no_room = 0
        """drafts for which there was no memory"""
        self._texts: dict[int, _Text] = {}
        self._members: dict[int, int] = {}
        """live sequences of each group"""
        self._prompts: dict[int, tuple[list[int], int]] = {}
        """pages and tokens of the prompt of each group that has been computed"""

    # ---- what happens to sequences -------------------------------------------------------------------------------

    def begin(self, starts: Sequence[SequenceStart]) -> None:
        """New sequences, or preempted ones that go on."""
        for start in starts:
            if start.id not in self._texts:
                self._members[start.group] = self._members.get(start.group, 0) + 1
            self._texts[start.id] = _Text(start, [*start.prompt_ids.tolist(), *start.response_ids.tolist()])

    def emitted(self, i: int, tokens: Sequence[int]) -> None:
        """The sequence goes on with `tokens`; of the drafts ahead, what agrees with them stays."""
        text = self._texts[i]
        for ours, theirs in zip(text.ahead, tokens, strict=False):
            if ours != theirs:
                break
            text.cached += 1
        text.ahead = []
        text.tokens += tokens
        # A draft that was not verified as a whole may agree to the last token, which the next pass reads again.
        text.cached = min(text.cached, len(text.tokens) - 1)

    def drop(self, ids: Sequence[int]) -> None:
        """Their memory is free for others."""
        for i in ids:
            text = self._texts[i]
            self.cache.release(text.pages)
            text.pages, text.cached, text.ahead = [], 0, []

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            if i not in self._texts:
                continue
            self.drop([i])
            group = self._texts.pop(i).start.group
            self._members[group] -= 1
            if not self._members[group]:
                del self._members[group]
                self._forget_prompt(group)

    def seeds(self, ids: Sequence[int]) -> np.ndarray:
        return np.array([self._texts[i].start.seed for i in ids], np.int64)

    def lengths(self, ids: Sequence[int]) -> np.ndarray:
        """int64 [B], tokens of each sequence."""
        return np.array([len(self._texts[i].tokens) for i in ids], np.int64)

    # ---- passes --------------------------------------------------------------------------------------------------

    def room(self, ids: Sequence[int], more: np.ndarray) -> np.ndarray:
        """bool [B]: which have memory for their text and `more` [B] tokens, at positions that the model knows."""
        most = self.decoder.config.max_positions
        found = [
            bool(wanted) and len(self._texts[i].tokens) + wanted <= most and self._grow(self._texts[i], wanted)
            for i, wanted in zip(ids, more.tolist(), strict=True)
        ]
        self.no_room += int((more > 0).sum()) - sum(found)
        return np.array(found, np.bool_)

    def catch_up(self, ids: Sequence[int]) -> Tensor:
        """Reads what it has not read; hidden states [B, H] after the last token of each."""
        texts = [self._texts[i] for i in ids]
        for text in texts:
            text.ahead = []
        self._read_long(texts)
        parts = [text.tokens[text.cached :] for text in texts]
        counts = np.array([len(part) for part in parts], np.int64)
        hidden = self._forward(texts, [token for part in parts for token in part], counts)
        return hidden[torch.from_numpy(counts.cumsum() - 1).to(hidden.device)]

    def step(self, ids: Sequence[int], tokens: np.ndarray) -> Tensor:
        """Reads one draft token [B] of each; hidden states [B, H] after it."""
        texts = [self._texts[i] for i in ids]
        hidden = self._forward(texts, tokens, np.ones(len(ids), np.int64))
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.cached -= 1  # drafts are no text: they count once they are emitted
            text.ahead.append(token)
        return hidden

    def _read_long(self, texts: Sequence[_Text]) -> None:
        """Sequences far behind, until only their last token is missing; one of a group reads the prompt for all."""
        while True:
            for text in texts:
                self._adopt_prompt(text)
            chunks = self._next_chunks(texts)
            if not chunks:
                return
            tokens = [token for text, count in chunks for token in text.tokens[text.cached : text.cached + count]]
            self._forward([text for text, _ in chunks], tokens, np.array([count for _, count in chunks], np.int64))
            for text, _ in chunks:
                self._keep_prompt(text)

    def _next_chunks(self, texts: Sequence[_Text]) -> list[tuple[_Text, int]]:
        chunks: list[tuple[_Text, int]] = []
        reading: set[int] = set()
        widest = 0
        for text in texts:
            missing = len(text.tokens) - text.cached - 1
            group = text.start.group
            if missing < _NARROW or (group in reading and not text.cached):
                continue
            # A chunk ends where the prompt does, so that the others of the group can take it.
            border = text.prompt - text.cached if text.cached < text.prompt else missing
            count = min(border, missing, _CHUNK)
            if chunks and (len(chunks) + 1) * max(widest, count) > _PASS:
                break
            widest = max(widest, count)
            chunks.append((text, count))
            if text.cached < text.prompt:
                reading.add(group)
        return chunks

    def _forward(self, texts: Sequence[_Text], tokens: Sequence[int] | np.ndarray, counts: np.ndarray) -> Tensor:
        """Hidden states [N, H] of packed tokens; they count as cached."""
        tables = np.zeros((len(texts), max(len(text.pages) for text in texts)), np.int64)
        for row, text in enumerate(texts):
            tables[row, : len(text.pages)] = text.pages
        cached = np.array([text.cached + len(text.ahead) for text in texts], np.int64)
        # The policy may have more rows of padding, and sample one; ours stand for it: what is drafted is verified.
        known = np.minimum(np.asarray(tokens, np.int64), len(self.decoder.embedding) - 1)
        packed = torch.from_numpy(known).to(self.decoder.device)
        hidden = self.decoder.forward(packed, self.cache.plan(tables, cached, counts), self.cache)
        for text, count in zip(texts, counts.tolist(), strict=True):
            text.cached += count
            self.tokens_read += count
        return hidden

    # ---- memory --------------------------------------------------------------------------------------------------

    def _grow(self, text: _Text, more: int) -> bool:
        self._adopt_prompt(text)
        missing = -(-(len(text.tokens) + more) // PAGE) - len(text.pages)
        if missing > self.cache.free:
            for group in list(self._prompts):
                self._forget_prompt(group)
        if missing > self.cache.free:
            return False
        if missing > 0:
            text.pages += self.cache.take(missing)
        return True

    def _keep_prompt(self, text: _Text) -> None:
        if text.cached == text.prompt and text.start.group not in self._prompts:
            pages = text.pages[: -(-text.prompt // PAGE)]
            self.cache.share(pages)
            self._prompts[text.start.group] = (pages, text.prompt)

    def _adopt_prompt(self, text: _Text) -> None:
        """A sequence that has read nothing takes its group's prompt: whole pages are shared, the last one is copied."""
        kept = self._prompts.get(text.start.group)
        if kept is None or text.cached:
            return
        pages, tokens = kept
        whole, rest = tokens // PAGE, tokens % PAGE
        own = text.pages[whole:]
        if rest and not own:
            if not self.cache.free:
                return
            own = self.cache.take(1)
        if rest:
            self.cache.copy(pages[whole], own[0])
        self.cache.share(pages[:whole])
        self.cache.release(text.pages[:whole])
        text.pages, text.cached = [*pages[:whole], *own], tokens

    def _forget_prompt(self, group: int) -> None:
        if group in self._prompts:
            self.cache.release(self._prompts.pop(group)[0])
