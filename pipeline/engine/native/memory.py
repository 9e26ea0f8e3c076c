"""Pages of the sequences that hold any: admission, growth, and prompts shared by the samples of a group."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.engine.native.compression import Compressor, KVCompression
from pipeline.engine.native.sequence import Sequence
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import PAGE, KVCache, page_bytes


@dataclass(slots=True)
class _Prompt:
    """Pages with all but the last token of a group's prompt, kept for samples that have not started."""

    pages: list[int]
    tokens: int
    evicted: int
    """of these"""
    hidden: Tensor | None
    """[tokens, H], where the drafter asks for them"""

    @property
    def held(self) -> int:
        return self.tokens - self.evicted


class Memory:
    """The KV cache within its budget, and who holds what of it."""

    def __init__(self, cache: KVCache, compressor: Compressor | None = None) -> None:
        self.cache, self._compressor = cache, compressor
        self._prompts: dict[int, _Prompt] = {}

    @property
    def compresses(self) -> bool:
        """Whether keys and values of sequences are ever dropped."""
        return self._compressor is not None

    def clear(self) -> None:
        """Nobody holds anything any more, and the cache's memory is given back."""
        self._prompts.clear()
        self.cache.clear()

    def admission(self, starting: Items[Sequence], live: Items[Sequence]) -> "Admission":
        """Who may start beside the `starting` sequences, which have still to take their pages, and the `live` ones."""
        admission = Admission(self, live)
        for sequence in starting:
            admission.add(sequence)
        return admission

    def needs(self, sequence: Sequence, shares: bool) -> int:
        """Pages it has still to take until it is ready."""
        shared = (len(sequence.request.prompt_ids) - 1) // PAGE if shares else 0
        if self._compressor is None:
            return _pages(sequence.target + 1) - max(len(sequence.pages), shared)
        prompt = self._prompts.get(sequence.group)
        if prompt is not None and prompt.evicted:
            shared = prompt.held // PAGE
        most = self._compressor.plan.most(sequence, sequence.target + 1)
        return max(0, _pages(most) - max(len(sequence.pages), shared))

    def growth(self, sequence: Sequence) -> int:
        """Pages to leave free for it: one, or where it is compressed all that it will ever take."""
        if self._compressor is None or sequence.request.full_cache:
            return 1
        most = self._compressor.plan.most(sequence, len(sequence.request.prompt_ids) + sequence.limit)
        own = int((self.cache.holders(sequence.pages) == 1).sum()) if sequence.pages else 0
        if sequence.ready:
            return max(0, _pages(most) - own)
        return max(1, _pages(most) - _pages(self._compressor.plan.most(sequence, sequence.target + 1)))

    def draft_room(self, sequence: Sequence) -> int:
        """Longest draft after which it need not be compressed before the next one."""
        if self._compressor is None:
            return sequence.room
        return min(sequence.room, self._compressor.plan.border(sequence) - sequence.held - 1)

    def due(self, sequence: Sequence) -> int:
        """Tokens that it has still to compute until it is compressed; 0: it must be now."""
        return 1 << 62 if self._compressor is None else self._compressor.plan.border(sequence) - sequence.held

    def compress(self, sequences: Items[Sequence]) -> list[Sequence]:
        """Compresses those that are due and for which there are pages; returns them."""
        if self._compressor is None:
            return []
        return self._compressor.compress([s for s in sequences if self.due(s) <= 0], self.cache)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` tokens; False where there are not enough, nothing changed then."""
        missing = _pages(tokens) - len(sequence.pages)
        if missing > self.cache.free:
            return False
        if missing > 0:
            sequence.pages += self.cache.take(missing)
        return True

    def free(self, sequence: Sequence) -> None:
        self.cache.release(sequence.pages)
        sequence.pages, sequence.cached, sequence.evicted, sequence.hidden = [], 0, 0, []

    def shared_groups(self) -> set[int]:
        """Groups whose prompt is kept."""
        return set(self._prompts)

    def keep_prompt(self, sequence: Sequence) -> None:
        """Its group's other samples take the prompt from here on."""
        tokens = len(sequence.request.prompt_ids) - 1
        if sequence.group in self._prompts or tokens == 0:
            return
        if sequence.evicted and sequence.cached > tokens:
            return  # response has mixed with what is left of the prompt
        hidden = None
        if sequence.hidden:
            whole = torch.cat(sequence.hidden)
            hidden, rest = whole[:tokens], whole[tokens:]
            sequence.hidden = [hidden, rest] if len(rest) else [hidden]
        prompt = _Prompt(sequence.pages[: _pages(tokens - sequence.evicted)], tokens, sequence.evicted, hidden)
        self.cache.share(prompt.pages)
        self._prompts[sequence.group] = prompt

    def adopt_prompt(self, sequence: Sequence) -> None:
        """A sequence that has nothing takes its group's prompt, if that is there: whole pages are shared; the last,
        which it goes on writing, is copied."""
        prompt = self._prompts.get(sequence.group)
        if prompt is None or sequence.pages:
            return
        whole, rest = divmod(prompt.held, PAGE)
        if rest and not self.cache.free:
            return
        sequence.pages = prompt.pages[:whole]
        self.cache.share(sequence.pages)
        if rest:
            sequence.pages += self.cache.take(1)
            self.cache.copy(prompt.pages[whole], sequence.pages[whole])
        sequence.cached, sequence.evicted = prompt.tokens, prompt.evicted
        sequence.hidden = [] if prompt.hidden is None else [prompt.hidden]

    def forget_prompt(self, group: int) -> None:
        prompt = self._prompts.pop(group, None)
        if prompt:
            self.cache.release(prompt.pages)

    def forget_prompts(self) -> bool:
        """All of them: they are out of date, or their memory is needed. Whether there were any."""
        groups = list(self._prompts)
        for group in groups:
            self.forget_prompt(group)
        return bool(groups)


class Admission:
    """Pages promised to sequences that start, and those left for each sequence to grow into.

    A live sequence that another model samples has fallen behind here; what it misses is promised to it as well.
    """

    def __init__(self, memory: Memory, live: Items[Sequence]) -> None:
        self._memory, self._others = memory, len(live)
        self._promised = sum(map(memory.growth, live))
        self._promised += sum(max(0, memory.needs(s, False)) for s in live if not s.ready)
        self._sharing = memory.shared_groups()

    def fits(self, sequence: Sequence) -> bool:
        """Whether one more may start; the first always may."""
        if not self._others:
            return True
        needed = self._memory.needs(sequence, sequence.group in self._sharing)
        return self._promised + needed <= self._memory.cache.free

    def add(self, sequence: Sequence) -> None:
        needed = self._memory.needs(sequence, sequence.group in self._sharing)
        self._promised += needed + self._memory.growth(sequence)
        self._others += 1
        self._sharing.add(sequence.group)  # its first sample computes the prompt for the others


def page_budget(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    kv_bytes: int,
    sequences: int,
    length: int,
    compression: KVCompression | None = None,
    beside: int = 0,
) -> int:
    """How many pages the cache may have.

    Args:
        config: of the model.
        dtype: of keys and values.
        device: where they are.
        kv_bytes: the budget; 0: what `sequences` of `length` tokens need, at most half of the memory that is free.
        sequences: most at once.
        length: longest one, in tokens.
        compression: what bounds the cached tokens of most sequences.
        beside: bytes of a page of another model's cache that shares the budget, with as many pages.

    Raises:
        UsageError: the budget does not hold one sequence of that length (a compressed one, too, begins with its whole
            prompt).
    """
    one = _pages(length)
    size = page_bytes(config, dtype) + beside
    each = one + 1 if compression is None else _pages(min(length, compression.limit)) + 1
    wanted = max(sequences * each, one + 1)
    budget = kv_bytes or min(wanted * size, _free_memory(device) // 2)
    pages = budget // size
    if pages < one + 1:
        raise UsageError(
            f"a KV cache of {budget} bytes does not hold one sequence of {length} tokens, which needs "
            f"{(one + 1) * size}; raise engine.kv_bytes or lower sampling.max_new_tokens"
        )
    return int(min(pages, sequences * (one + 1)))


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30
