"""Drafts copied from text seen before: what most often followed the longest suffix of the sequence that is known.

After SAM-Decoding (Hu et al., arXiv 2411.10666): a dynamic automaton of generated text, static ones of corpora, and
another drafter where neither knows enough. Beyond the paper: the dynamic automata are those of a reinforcement-learning
run (`drafters.suffix.memory`), the continuation is the most frequent one instead of the first occurrence's, and the
draft ends where it becomes unlikely.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct, field

from drafters.arbiter import ArbiterDrafter
from drafters.base import DraftRequest, Proposal, SequenceStart, Verified
from drafters.composite import CompositeDrafter, Ensemble, joined, restricted
from drafters.suffix import matching
from drafters.suffix.corpus import load_corpus
from drafters.suffix.memory import CORPORA, SuffixMemory
from pipeline.errors import UsageError
from pipeline.models.tokenizer import Tokenizer

MOST = 10**6
"""tokens; more than any text has"""
Count = Annotated[int, Meta(ge=0, le=MOST)]


class SuffixAutomatonDrafter(CompositeDrafter):
    """Copies what followed the longest known suffix: in the prompt, its group, earlier epochs, other texts, corpora."""

    name = "suffix-automaton"

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """A match of `min_match` tokens or more gives `base + factor * match` tokens, at most `max_tokens`, and fewer
        where the continuation's relative frequency falls below `min_frequency`. `prefer` says which continuation.

        Where no match has `auxiliary_below` tokens, the drafter `auxiliary` is asked (a name, or a table with name and
        options; not an arbiter, which must see all drafts of a step).

        `memory_mb` bounds kept text (about 65 bytes a token, twice for a prompt's own); 0 keeps nothing beyond a
        prompt's live sequences, so that a restart forgets nothing either. Beside it, `corpora` are folders that
        `rollahead corpus build` made; a match in one counts for `corpus_bias` tokens less than it has.
        """

        min_match: Annotated[int, Meta(ge=1, le=MOST)] = 1
        base: Annotated[float, Meta(ge=0, le=MOST)] = 1.0
        factor: Annotated[float, Meta(ge=0, le=MOST)] = 1.0
        max_tokens: Annotated[int, Meta(ge=1, le=MOST)] = 128
        min_frequency: Annotated[float, Meta(ge=0, le=1)] = 0.1
        prefer: Literal["frequent", "latest"] = "frequent"
        memory_mb: Annotated[float, Meta(ge=0, le=10**9)] = 256.0
        corpora: list[str] = field(default_factory=list)
        corpus_bias: Count = 5
        auxiliary: dict[str, Any] | str | None = None
        auxiliary_below: Count = 5

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or self.Options()
        auxiliary = self.options.auxiliary
        ensemble = Ensemble.build([] if auxiliary is None else [auxiliary])
        # An arbiter learns from a step's seconds what verifying its own drafts takes; here they are not the only ones.
        if any(isinstance(part, ArbiterDrafter) for part in ensemble.all()):
            raise UsageError(
                f"auxiliary = {auxiliary!r} of drafter {self.name} has an arbiter, which must see all drafts of a "
                f'step; put {self.name} into it instead: {{name = "arbiter", drafters = ["{self.name}", ...]}}'
            )
        super().__init__(ensemble)
        self._corpora = [load_corpus(Path(folder)) for folder in self.options.corpora]
        self.memory = SuffixMemory(
            int(self.options.memory_mb * 2**20), self._corpora, latest=self.options.prefer == "latest"
        )
        _compile()
        self._biases = np.zeros(CORPORA + len(self.options.corpora), np.int64)
        self._biases[CORPORA:] = self.options.corpus_bias

    def check_policy(self, folder: Path | None, brings_head: bool) -> None:
        super().check_policy(folder, brings_head)
        known = {
            path: c.vocabulary for path, c in zip(self.options.corpora, self._corpora, strict=True) if c.vocabulary
        }
        if not known or folder is None:
            return
        vocabulary = Tokenizer(folder).vocabulary_digest()
        for path, theirs in known.items():
            if theirs != vocabulary:
                raise UsageError(
                    f"corpus {path} was built with another tokenizer than that of the policy {folder}; build it again "
                    f"with rollahead corpus build --tokenizer {folder}"
                )

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        super().begin(sequences)
        self.memory.begin(sequences)

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        super().restore(sequences)
        self.memory.begin(sequences)

    def propose(self, request: DraftRequest) -> Proposal:
        if not len(self.ensemble):
            return self._copied(request, self.options.min_match)
        own = self._copied(request, max(self.options.min_match, self.options.auxiliary_below))
        (auxiliary,) = self.ensemble
        other = auxiliary.propose(restricted(request, own.lengths == 0))
        choice = np.where(own.lengths > 0, 0, 1)
        return joined([own, other], [self.name, auxiliary.name], choice, np.maximum(own.lengths, other.lengths))

    def _copied(self, request: DraftRequest, shortest: int) -> Proposal:
        options, memory = self.options, self.memory
        tokens, lengths, matches, confidences = matching.propose(
            memory.pool.heads, memory.automata, memory.places, memory.lengths, memory.rows(request.ids),
            request.budgets, self._biases, shortest, options.base, options.factor, options.min_frequency,
            options.max_tokens,
        )  # fmt: skip
        return Proposal(tokens, lengths, matches=matches, confidences=confidences)

    def observe(self, verified: Verified) -> None:
        super().observe(verified)
        self.memory.observe(verified.ids, *verified.flat())

    def end(self, ids: Sequence[int]) -> None:
        super().end(ids)
        self.memory.end(ids)

    def counters(self) -> dict[str, float]:
        memory = self.memory
        return super().counters() | {
            "memory_bytes": memory.held_bytes,
            "memory_tokens": memory.tokens,
            "bytes_a_token": memory.held_bytes / max(1, memory.tokens),
            "evicted": memory.evicted,
        }


@functools.cache
def _compile() -> None:
    """The compiled parts, before the first sequence waits for them."""
    memory = SuffixMemory(2**20)
    memory.begin([SequenceStart(0, np.array([1, 2, 1]), 0, 1.0, 0)])
    memory.observe([0], np.arange(200), np.array([0, 200]))
    matching.propose(
        memory.pool.heads, memory.automata, memory.places, memory.lengths, memory.rows([0]), np.ones(1, np.int64),
        np.zeros(CORPORA, np.int64), 1, 1.0, 1.0, 0.0, 1,
    )  # fmt: skip
