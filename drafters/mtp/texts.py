"""What the head knows of each sequence: its pages of keys and values, and the rows it has still to read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drafters.base import SequenceStart
from drafters.mtp.head import MTPHead
from pipeline.models.kv_cache import PAGE, KVCache

_CHUNK, _PASS = 512, 4096
"""rows of a sequence, and rows with padding, that one pass takes"""
MOST_UNREAD_BYTES = 256 << 20
"""of hidden states of sequences that nobody drafts for: beyond it they are read, which leaves keys and values"""


@dataclass(slots=True)
class Text:
    """A sequence of n tokens has n - 1 rows: at position t the target's hidden state there and token t + 1."""

    group: int
    seed: int
    prompt_rows: int
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    """rows in the pages"""
    last: Tensor | None = None
    """h' [H] of the newest of these"""
    tokens: list[np.ndarray] = field(default_factory=list)
    """int64, of the rows to read"""
    hidden: list[Tensor] = field(default_factory=list)
    """[n, H], likewise"""

    @property
    def waiting(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def rows(self) -> int:
        """Read and to be read."""
        return self.cached + self.waiting

    def take(self, count: int) -> tuple[np.ndarray, Tensor]:
        """The first `count` of the rows to read."""
        if len(self.tokens) == 1 and len(self.tokens[0]) == count:
            taken = self.tokens.pop(), self.hidden.pop()
            return taken
        tokens, hidden = np.concatenate(self.tokens), torch.cat(self.hidden)
        rest = count < len(tokens)
        self.tokens, self.hidden = [tokens[count:]] if rest else [], [hidden[count:]] if rest else []
        return tokens[:count], hidden[:count]


class Unread(NamedTuple):
    """Rows that B sequences have still to read: a token, and the target's state before it."""

    tokens: np.ndarray
    """int64 [N], packed"""
    hidden: Tensor
    """[N, H]"""
    counts: np.ndarray
    """int64 [B], of each sequence"""


@dataclass(slots=True)
class _Prompt:
    """A group's prompt as the head read it, shared by its sequences."""

    members: int = 0
    pages: list[int] = field(default_factory=list)
    rows: int = 0
    """0: not read yet"""
    last: Tensor | None = None


class Texts:
    """All sequences, and the head's cache, which grows as it must."""

    def __init__(self, head: MTPHead) -> None:
        self.head = head
        self.cache = KVCache(head.config, head.dtype, head.device, 64)
        self._texts: dict[int, Text] = {}
        self._prompts: dict[int, _Prompt] = {}
        self._brought = 0
        """bytes of hidden states that have come since somebody looked how many are unread"""

    def __getitem__(self, id: int) -> Text:
        return self._texts[id]

    def begin(self, start: SequenceStart) -> None:
        """A sequence, new or restored."""
        if start.hidden is None:
            raise ValueError("hidden states are needed and were not given")
        if start.id not in self._texts:
            self._prompts.setdefault(start.group, _Prompt()).members += 1
        self.pause(start.id)
        tokens = np.concatenate([start.prompt_ids, start.response_ids]).astype(np.int64)[1:]
        text = Text(start.group, start.seed, len(start.prompt_ids) - 1)
        if len(tokens):
            text.tokens, text.hidden = [tokens], [start.hidden]
            self._brought += start.hidden.nbytes
        self._texts[start.id] = text

    def extend(self, id: int, tokens: np.ndarray, hidden: Tensor) -> None:
        """What a sequence emitted, int64 [n], and the states [n, H] before it."""
        text = self._texts[id]
        text.tokens.append(tokens)
        text.hidden.append(hidden)
        self._brought += hidden.nbytes

    def bound(self) -> None:
        """Reads what nobody has drafted after, where it has become too much to keep."""
        if self._brought <= MOST_UNREAD_BYTES:
            return
        self._brought = 0
        unread = [text for text in self._texts.values() if text.tokens]
        states = {part.data_ptr(): part.nbytes for text in unread for part in text.hidden}
        if sum(states.values()) > MOST_UNREAD_BYTES:
            self.read_prompts(unread)
            self.read(unread)

    def pause(self, id: int) -> None:
        """Gives the pages back; `begin` brings all rows again."""
        text = self._texts.get(id)
        if text is not None:
            self.cache.release(text.pages)
            text.pages, text.cached, text.last, text.tokens, text.hidden = [], 0, None, [], []

    def end(self, id: int) -> None:
        if id not in self._texts:
            return
        self.pause(id)
        group = self._texts.pop(id).group
        prompt = self._prompts[group]
        prompt.members -= 1
        if not prompt.members:
            self.cache.release(prompt.pages)
            del self._prompts[group]

    def forget_prompts(self) -> None:
        """New sequences read their prompts anew: weights have changed."""
        for group, prompt in self._prompts.items():
            self.cache.release(prompt.pages)
            self._prompts[group] = _Prompt(prompt.members)

    def read_prompts(self, texts: Sequence[Text]) -> None:
        """Each group's prompt once."""
        leaders: dict[int, Text] = {}
        for text in texts:
            if not text.cached and text.prompt_rows and not self._prompts[text.group].rows:
                leaders.setdefault(text.group, text)
        if leaders:
            self.read(list(leaders.values()), prompts=True)
            for text in leaders.values():
                self._keep_prompt(text)
        for text in texts:
            self._adopt_prompt(text)

    def take_unread(self, texts: Sequence[Text]) -> Unread:
        """All rows that they have still to read, which count as read from now on."""
        counts = [text.waiting for text in texts]
        taken = [text.take(count) for text, count in zip(texts, counts, strict=True) if count]
        for text, count in zip(texts, counts, strict=True):
            text.cached += count
        if len(taken) == 1:
            tokens, hidden = taken[0]
            return Unread(tokens.copy(), hidden.contiguous(), np.array(counts))
        if not taken:
            none = torch.zeros(0, self.head.config.hidden_size, dtype=self.head.dtype, device=self.head.device)
            return Unread(np.zeros(0, np.int64), none, np.array(counts))
        return Unread(np.concatenate([t for t, _ in taken]), torch.cat([h for _, h in taken]), np.array(counts))

    def tables(self, texts: Sequence[Text], tokens: Sequence[int]) -> np.ndarray:
        """Page tables int64 [B, most pages] that hold `tokens[b]` rows of text b."""
        for text, count in zip(texts, tokens, strict=True):
            missing = -(-count // PAGE) - len(text.pages)
            if missing > 0:
                text.pages += self._take(missing)
        table = np.zeros((len(texts), max(len(text.pages) for text in texts)), np.int64)
        for row, text in enumerate(texts):
            table[row, : len(text.pages)] = text.pages
        return table

    def _take(self, count: int) -> list[int]:
        if count > self.cache.free:
            self.cache.extend(max(count, self.cache.store.shape[2]))
        return self.cache.take(count)

    def read(self, texts: Sequence[Text], prompts: bool = False) -> None:
        """What they have still to read, of the prompts alone or all of it, in passes of bounded size."""
        while True:
            chunks: list[tuple[Text, int]] = []
            widest = 0
            for text in texts:
                count = min(text.prompt_rows - text.cached if prompts else text.waiting, _CHUNK)
                if count > 0 and (len(chunks) + 1) * max(widest, count) <= max(_PASS, count):
                    chunks.append((text, count))
                    widest = max(widest, count)
            if not chunks:
                return
            self._pass(chunks)

    def _pass(self, chunks: Sequence[tuple[Text, int]]) -> None:
        texts, counts = [text for text, _ in chunks], np.array([count for _, count in chunks], np.int64)
        cached = np.array([text.cached for text in texts], np.int64)
        taken = [text.take(count) for text, count in chunks]
        tokens = torch.from_numpy(np.concatenate([t for t, _ in taken])).to(self.head.device)
        hidden = self.head.target_input(torch.cat([h for _, h in taken]))
        plan = self.cache.plan(self.tables(texts, (cached + counts).tolist()), cached, counts)
        out = self.head.forward(tokens, hidden, plan, self.cache)
        for (text, count), end in zip(chunks, np.cumsum(counts).tolist(), strict=True):
            text.cached += count
            text.last = out[end - 1]

    def _keep_prompt(self, text: Text) -> None:
        pages = text.pages[: -(-text.prompt_rows // PAGE)]
        self.cache.share(pages)
        prompt = self._prompts[text.group]
        prompt.pages, prompt.rows, prompt.last = pages, text.prompt_rows, text.last

    def _adopt_prompt(self, text: Text) -> None:
        """Whole pages are shared; the last, which the sequence goes on writing, is copied."""
        prompt = self._prompts[text.group]
        if text.cached or not prompt.rows:
            return
        text.take(prompt.rows)
        whole = prompt.rows // PAGE
        text.pages = prompt.pages[:whole]
        self.cache.share(text.pages)
        if prompt.rows % PAGE:
            text.pages = text.pages + self._take(1)
            self.cache.copy(prompt.pages[whole], text.pages[whole])
        text.cached, text.last = prompt.rows, prompt.last
