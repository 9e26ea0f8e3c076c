"""One response under way: its tokens and what is recorded of each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from torch import Tensor

from pipeline.engine.generator import FinishedSample, GroupRequest, KeptIds, TokenOrigin
from pipeline.engine.native.stop_strings import StopStrings
from pipeline.messages import DEEPEST, DraftCounts, Sampler

if TYPE_CHECKING:
    from pipeline.engine.native.small_model import Copy


@dataclass(slots=True)
class Emission:
    """What a verification emitted for a sequence, n tokens."""

    token_ids: np.ndarray
    """int64 [n]"""
    logprobs: np.ndarray
    """float32 [n]"""
    entropies: np.ndarray | None
    """float32 [n]"""
    drafted: int
    accepted: int
    kept: KeptIds | None = None
    """of these tokens; None where nothing was truncated"""

    def first(self, n: int) -> "Emission":
        """The first n tokens of it."""
        return Emission(
            self.token_ids[:n],
            self.logprobs[:n],
            None if self.entropies is None else self.entropies[:n],
            self.drafted,
            min(self.accepted, n),
            None if self.kept is None else self.kept.first(n),
        )


class Sequence:
    """Prompt of P tokens and a response of up to `limit` ones.

    It is ready for a verification when the KV cache holds every token but the last, which the next forward pass reads,
    or what a compression left of them.
    """

    __slots__ = (
        "begun", "cached", "copy", "count", "depths", "drafts", "entropies", "evicted", "hidden", "id", "kept",
        "kv_kept", "limit", "logprobs", "origins", "pages", "request", "sample", "samplers", "sampling", "seed", "slot",
        "sources", "stop", "stop_strings", "string_completed", "temperature", "token_ids", "verifications", "versions",
    )  # fmt: skip

    def __init__(self, id: int, request: GroupRequest, sample: int, limit: int, stop: frozenset[int]) -> None:
        self.id, self.request, self.sample, self.limit, self.stop = id, request, sample, limit, stop
        self.seed, self.sampling = request.seeds[sample], request.sampling
        if request.temperatures:  # each sample's own
            self.sampling = msgspec.structs.replace(self.sampling, temperature=request.temperatures[sample])
        self.temperature = self.sampling.temperature
        self.token_ids = np.zeros(limit, np.int64)
        self.logprobs = np.zeros(limit, np.float32)
        self.entropies = np.zeros(limit, np.float32)
        self.versions = np.zeros(limit, np.int64)
        self.samplers = np.full(limit, Sampler.POLICY, np.uint8)
        self.origins = np.zeros(limit, np.uint8)
        self.sources = np.zeros(limit, np.uint8)
        self.count = self.verifications = 0
        self.drafts: dict[str, tuple[int, int]] = {}
        """tokens drafted and accepted, by drafter"""
        self.depths: dict[str, np.ndarray] = {}
        """int64 [2, DEEPEST] by drafter: drafts tried at a depth, and accepted there"""
        self.kv_kept = False
        self.begun = False
        """whether the drafter knows it, and its settings have a slot"""
        self.cached = 0
        """tokens whose keys and values were computed, and are in the cache"""
        self.evicted = 0
        """as many of these are not in the cache any more, in no layer and head"""
        self.pages: list[int] = []
        """of the cache, in order"""
        self.hidden: list[Tensor] = []
        """hidden states of the cached tokens, until the drafter has them; empty where it asks for none"""
        self.copy: Copy | None = None
        """what a small model beside the policy holds of it; None where there is none"""
        self.slot = -1
        """of its settings in the generator's `Processors`; -1 before it begins"""
        self.stop_strings: StopStrings | None = None
        self.string_completed = False
        self.kept: list[KeptIds] = []
        """an entry an emission, where tokens are truncated"""

    @property
    def group(self) -> int:
        return self.request.id

    @property
    def target(self) -> int:
        """Tokens that must be in the cache before the next verification."""
        return len(self.request.prompt_ids) + self.count - 1

    @property
    def held(self) -> int:
        """Tokens whose keys and values take up memory."""
        return self.cached - self.evicted

    @property
    def ready(self) -> bool:
        return self.cached == self.target

    def text(self, begin: int, end: int) -> np.ndarray:
        """int64, tokens of prompt and response together."""
        prompt = self.request.prompt_ids
        response = self.token_ids[max(0, begin - len(prompt)) : max(0, end - len(prompt))]
        return np.concatenate([prompt[begin:end], response]).astype(np.int64, copy=False)

    @property
    def last_token(self) -> int:
        return int(self.token_ids[self.count - 1] if self.count else self.request.prompt_ids[-1])

    @property
    def room(self) -> int:
        """Draft tokens that could all be used: a verification emits one token more than it accepts."""
        return self.limit - self.count - 1

    def cut_at_stop(self, emission: Emission) -> Emission:
        """What follows the first stop token, or the token that completes a stop string, is not part of the response."""
        tokens = emission.token_ids.tolist()
        if self.stop_strings is None and self.stop.isdisjoint(tokens):
            return emission
        n = next((n for n, token in enumerate(tokens, 1) if token in self.stop), len(tokens))
        if self.stop_strings is not None:
            end = self.stop_strings.first_end(tokens[:n])
            self.string_completed = end is not None
            n = end or n
        return emission if n == len(tokens) else emission.first(n)

    def append(self, emission: Emission, version: int, drafter: str, sampler: Sampler = Sampler.POLICY) -> None:
        """Records an emission of `sampler`, under publication `version` and after a draft of `drafter`."""
        start, end = self.count, self.count + len(emission.token_ids)
        # An item is several times as fast as a slice, and most emissions of a large batch are one token.
        at = start if end - start == 1 else slice(start, end)
        one = 0 if end - start == 1 else slice(None)
        self.token_ids[at] = emission.token_ids[one]
        self.logprobs[at] = emission.logprobs[one]
        if emission.entropies is not None:
            self.entropies[at] = emission.entropies[one]
        if emission.kept is not None:
            self.kept.append(emission.kept)
        self.versions[at] = version
        who = Sampler.COMPRESSED_KV if self.evicted else sampler
        if who is not Sampler.POLICY:  # which stands there
            self.samplers[at] = who
        if emission.drafted:
            self.origins[start : start + emission.accepted] = TokenOrigin.ACCEPTED
            if emission.accepted < end - start:
                whole = emission.accepted == emission.drafted
                self.origins[end - 1] = TokenOrigin.BONUS if whole else TokenOrigin.RESIDUAL
        self.count = end
        # The pass that sampled the last token computed all before it.
        holder = self.copy if sampler == Sampler.SWITCHED_MODEL and self.copy is not None else self
        holder.cached = self.target
        self.verifications += 1
        if emission.drafted:
            drafted, accepted = self.drafts.get(drafter, (0, 0))
            self.drafts[drafter] = drafted + emission.drafted, accepted + emission.accepted
            self.sources[start : start + emission.accepted] = 1 + list(self.drafts).index(drafter)
            depths = self.depths.setdefault(drafter, np.zeros((2, DEEPEST), np.int64))
            depths[0, : min(emission.drafted, emission.accepted + 1)] += 1
            depths[1, : emission.accepted] += 1

    def _counts(self, drafter: str) -> DraftCounts:
        (drafted, accepted), (tried_at, accepted_at) = self.drafts[drafter], self.depths[drafter]
        deepest = int(np.count_nonzero(tried_at))  # a depth is tried only where the one before it was
        return DraftCounts(
            drafted=drafted,
            accepted=accepted,
            tried_at=tuple(tried_at[:deepest].tolist()),
            accepted_at=tuple(accepted_at[:deepest].tolist()),
        )

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, or None while the response goes on."""
        if self.string_completed or (self.count and self.last_token in self.stop):
            return "stop"
        return "length" if self.count >= self.limit else None

    def finished(self, with_entropy: bool) -> FinishedSample:
        """The sample of a sequence that has a finish reason."""
        n = self.count
        return FinishedSample(
            group=self.request.id,
            sample=self.sample,
            token_ids=self.token_ids[:n].copy(),
            logprobs=self.logprobs[:n].copy(),
            entropies=self.entropies[:n].copy() if with_entropy else None,
            versions=self.versions[:n].copy(),
            samplers=self.samplers[:n].copy(),
            finish_reason=self.finish_reason or "length",
            verifications=self.verifications,
            drafters={name: self._counts(name) for name in self.drafts},
            kv_kept_across_update=self.kv_kept,
            origins=self.origins[:n].copy(),
            kept=KeptIds.joined(self.kept) if self.kept else None,
            draft_sources=self.sources[:n].copy(),
        )
