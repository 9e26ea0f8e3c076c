"""One response under way: its tokens and what is recorded of each."""

from dataclasses import dataclass

import numpy as np

from pipeline.engine.generator import FinishedSample, GroupRequest, TokenOrigin
from pipeline.messages import DraftCounts, Sampler


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


class Sequence:
    """Prompt of P tokens and a response of up to `limit` ones.

    It is ready for a verification when the KV cache holds every token but the last, which the next forward pass reads.
    """

    __slots__ = (
        "begun", "cached", "count", "drafts", "entropies", "id", "kv_kept", "limit", "logprobs", "origins", "pages",
        "request", "sample", "sources", "stop", "token_ids", "verifications", "versions",
    )  # fmt: skip

    def __init__(self, id: int, request: GroupRequest, sample: int, limit: int, stop: frozenset[int]) -> None:
        self.id, self.request, self.sample, self.limit, self.stop = id, request, sample, limit, stop
        self.token_ids = np.zeros(limit, np.int64)
        self.logprobs = np.zeros(limit, np.float32)
        self.entropies = np.zeros(limit, np.float32)
        self.versions = np.zeros(limit, np.int64)
        self.origins = np.zeros(limit, np.uint8)
        self.sources = np.zeros(limit, np.uint8)
        self.count = self.verifications = 0
        self.drafts: dict[str, tuple[int, int]] = {}
        """tokens drafted and accepted, by drafter"""
        self.kv_kept = False
        self.begun = False
        """whether the drafter knows it"""
        self.cached = 0
        """tokens whose keys and values are in the cache"""
        self.pages: list[int] = []
        """of the cache, in order"""

    @property
    def seed(self) -> int:
        return self.request.seeds[self.sample]

    @property
    def temperature(self) -> float:
        return (
            self.request.temperatures[self.sample] if self.request.temperatures else self.request.sampling.temperature
        )

    @property
    def group(self) -> int:
        return self.request.id

    @property
    def target(self) -> int:
        """Tokens that must be in the cache before the next verification."""
        return len(self.request.prompt_ids) + self.count - 1

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
        """What follows the first stop token is not part of the response."""
        for n, token in enumerate(emission.token_ids.tolist(), 1):
            if token in self.stop:
                entropies = None if emission.entropies is None else emission.entropies[:n]
                return Emission(
                    emission.token_ids[:n],
                    emission.logprobs[:n],
                    entropies,
                    emission.drafted,
                    min(emission.accepted, n),
                )
        return emission

    def append(self, emission: Emission, version: int, drafter: str) -> None:
        """Records an emission that was sampled by publication `version` after a draft of `drafter`."""
        start, end = self.count, self.count + len(emission.token_ids)
        self.token_ids[start:end] = emission.token_ids
        self.logprobs[start:end] = emission.logprobs
        if emission.entropies is not None:
            self.entropies[start:end] = emission.entropies
        self.versions[start:end] = version
        self.origins[start : start + emission.accepted] = TokenOrigin.ACCEPTED
        if emission.accepted < end - start:
            whole = 0 < emission.drafted == emission.accepted
            self.origins[end - 1] = TokenOrigin.BONUS if whole else TokenOrigin.SAMPLED
        self.count = end
        self.cached = self.target  # the pass that sampled the last token computed all before it
        self.verifications += 1
        if emission.drafted:
            drafted, accepted = self.drafts.get(drafter, (0, 0))
            self.drafts[drafter] = drafted + emission.drafted, accepted + emission.accepted
            self.sources[start : start + emission.accepted] = 1 + list(self.drafts).index(drafter)

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, or None while the response goes on."""
        if self.count and self.last_token in self.stop:
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
            samplers=np.full(n, Sampler.POLICY, np.uint8),
            finish_reason=self.finish_reason or "length",
            verifications=self.verifications,
            drafters={name: DraftCounts(drafted=d, accepted=a) for name, (d, a) in self.drafts.items()},
            kv_kept_across_update=self.kv_kept,
            origins=self.origins[:n].copy(),
            draft_sources=self.sources[:n].copy(),
        )
