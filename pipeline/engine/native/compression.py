"""A budget of cached tokens a sequence: when one has outgrown it, what its eviction policy likes least is dropped.

A sequence is compressed at fixed lengths, whatever was drafted and whoever runs beside it: first when it holds `budget`
and `every` tokens (or its prompt is computed, where that is longer), then `every` tokens later, and so on. So the
compressed sampler is a distribution of its own, a function of prompt, text and weights: drafting and preemption leave
it as it is, and its log-probs are the behaviour policy's. Keys are rotated to their tokens' positions, so what stays
can move to the front of the pages. Compressed sampling for RL: Sparse-RL, arXiv 2601.10079.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.types import KVCompressionSection
from pipeline.engine.native.eviction import build
from pipeline.engine.native.eviction.base import EvictionPolicy, check_counts, kept
from pipeline.engine.native.sequence import Sequence
from pipeline.errors import UsageError
from pipeline.models.attention import QueryProbe
from pipeline.models.config import UNLIMITED, ModelConfig
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache

_PASS = 8192
"""Cached tokens that one round of a compression looks at; bounds its memory."""


@dataclass(frozen=True, slots=True)
class KVCompression:
    """How long-running sequences give memory back."""

    policy: EvictionPolicy
    budget: int = 512
    """tokens that a compression leaves"""
    every: int = 128
    """tokens from one compression to the next"""

    def __post_init__(self) -> None:
        check_counts(self.policy)
        fixed = self.policy.sinks + self.policy.recent
        if self.budget <= fixed:
            raise UsageError(
                f"engine.kv_compression.budget = {self.budget} leaves no choice: the policy always keeps "
                f"{self.policy.sinks} first and {self.policy.recent} latest tokens; raise it above {fixed}, or lower "
                "the policy's sinks or window"
            )

    @classmethod
    def from_config(cls, section: KVCompressionSection) -> "KVCompression | None":
        """None where the configuration asks for none.

        Raises:
            UsageError: an unknown policy or option, or a budget that the policy cannot keep to.
        """
        if section.policy.get("name") == "none":
            if len(section.policy) > 1:
                raise UsageError("engine.kv_compression.policy has options but no name; add for example name = r-kv")
            return None
        return cls(build(section.policy), section.budget, section.every)

    @property
    def limit(self) -> int:
        """Most cached tokens of a sequence whose prompt is not longer."""
        return self.budget + self.every

    def check(self, config: ModelConfig, length: int) -> None:
        """Refuses models that cannot be compressed.

        Raises:
            UsageError: some layer has a window shorter than `length`.
        """
        window = min(config.window(layer) for layer in range(config.layers))
        if window < length:
            raise UsageError(
                f"this model has layers with a sliding window of {window} tokens, which forget by themselves; set "
                "engine.kv_compression.policy = none"
            )

    def border(self, sequence: Sequence) -> int:
        """Cached tokens at which a sequence is compressed next."""
        if sequence.request.full_cache:
            return UNLIMITED
        if sequence.evicted:
            return self.limit
        return max(self.limit, len(sequence.request.prompt_ids) - 1)

    def most(self, sequence: Sequence, tokens: int) -> int:
        """Most tokens it has in the cache at once on its way to `tokens` of prompt and response."""
        if sequence.request.full_cache:
            return tokens
        if sequence.evicted:
            return min(tokens, self.limit)
        return min(tokens, max(self.limit, len(sequence.request.prompt_ids) - 1))


class Compressor:
    """Compresses sequences of one cache."""

    def __init__(self, plan: KVCompression, decoder: Decoder) -> None:
        self.plan, self._decoder = plan, decoder
        self._probe = QueryProbe(decoder.config, decoder.dtype, decoder.device)
        self._pages = -(-plan.budget // PAGE)
        self.count = 0
        """sequences compressed so far, each time counted"""

    def compress(self, sequences: Items[Sequence], cache: KVCache) -> list[Sequence]:
        """Leaves sequences with `budget` cached tokens, and only the pages these need.

        Args:
            sequences: with more cached tokens.
            cache: that holds them.

        Returns:
            those for which there are pages: what a sequence shares is not written to, so it needs others for it.
        """
        done = self._with_pages(sorted(sequences, key=lambda s: s.held), cache)
        rest = done
        while rest:
            alike = [s for s in rest if s.held == rest[0].held][: max(1, _PASS // rest[0].held)]
            rest = rest[len(alike) :]
            self._round(alike, cache)
        self.count += len(done)
        return done

    def _with_pages(self, sequences: list[Sequence], cache: KVCache) -> list[Sequence]:
        """Those that find their pages free when they are compressed one after the other."""
        found, free = [], cache.free
        for sequence in sequences:
            own = int((cache.holders(sequence.pages) == 1).sum())
            if own + free >= self._pages:
                free += own - self._pages
                found.append(sequence)
        return found

    def _round(self, sequences: list[Sequence], cache: KVCache) -> None:
        """Those that hold equally many tokens."""
        held, budget = sequences[0].held, self.plan.budget
        old = page_table(sequences)
        queries = self._queries(sequences, old, cache)
        for sequence in sequences:
            cache.release(sequence.pages)
            sequence.pages = cache.take(self._pages)
            sequence.evicted += held - budget
        before, after = (torch.from_numpy(t).to(self._decoder.device) for t in (old, page_table(sequences)))
        for layer in range(self._decoder.config.layers):
            # All rows of a layer are read before one is written: a row's new pages may have been another's.
            keys, values = (x[:, :, :held] for x in cache.read_pages(layer, before))
            stay = kept(self.plan.policy, keys, queries[layer], budget).unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
            cache.write_pages(layer, after, keys.gather(2, stay), values.gather(2, stay))

    def _queries(self, sequences: list[Sequence], tables: np.ndarray, cache: KVCache) -> list[Tensor]:
        """[B, heads, W, D] of each layer: what the latest tokens asked for, computed again."""
        config, count = self._decoder.config, self.plan.policy.queries
        if not count:
            empty = torch.empty(len(sequences), config.heads, 0, config.head_dim, device=self._decoder.device)
            return [empty] * config.layers
        held = np.array([s.held for s in sequences], np.int64)
        evicted = np.array([s.evicted for s in sequences], np.int64)
        tokens = np.concatenate([s.text(s.cached - count, s.cached) for s in sequences])
        plan = cache.plan(tables, held - count, np.full(len(sequences), count, np.int64), evicted)
        self._decoder.forward(torch.from_numpy(tokens).to(self._decoder.device), plan, cache, attention=self._probe)
        found = [q.view(len(sequences), count, config.heads, -1).transpose(1, 2) for q in self._probe.queries]
        self._probe.queries.clear()
        return found


def page_table(sequences: list[Sequence]) -> np.ndarray:
    """int64 [B, most pages], short rows filled with page 0."""
    table = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), np.int64)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.pages)] = sequence.pages
    return table
