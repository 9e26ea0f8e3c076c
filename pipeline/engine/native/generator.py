"""The native generator: continuous batching with speculative decoding, one device."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drafters.base import Drafter, DraftRequest, Needs, Proposal, SequenceStart, Verified
from drafters.none import NoDrafter
from pipeline.engine.generator import FinishedSample, GroupRequest
from pipeline.engine.native.drafting import Drafting
from pipeline.engine.native.prefill import start_sequences
from pipeline.engine.native.scheduler import Scheduler
from pipeline.engine.native.sequence import Emission, Sequence
from pipeline.errors import RunFailed, UsageError
from pipeline.messages import Capabilities
from pipeline.models.checkpoint import load_decoder, load_weights_into
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import KVCache
from pipeline.sampling.verification import TokenUniforms, VerifiedTokens, packed_rows, verify


@dataclass(slots=True)
class GeneratorStats:
    """Counts and wall seconds since the generator was made."""

    generated_tokens: int = 0
    verifications: int = 0
    """forward passes, counted once for each sequence in them"""
    drafted: int = 0
    accepted: int = 0
    drafter_failures: int = 0
    forward_seconds: float = 0.0
    drafter_seconds: float = 0.0
    sampling_seconds: float = 0.0
    other_seconds: float = 0.0


class NativeGenerator:
    """`pipeline.engine.generator.Generator` on the lean decoder.

    A step admits queued samples, asks the drafter, runs one forward pass over each sequence's last token and draft,
    verifies, and hands out what finished. Text depends on prompt, seed and weights alone (up to the rounding of other
    batch shapes); deterministic drafts leave even the text of a given seed as it is.
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        *,
        drafter: Drafter | None = None,
        max_sequences: int = 64,
        max_draft_tokens: int = 8,
        max_length: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        stop_token_ids: Items[int] | None = None,
        entropy: bool = True,
        version: int = -1,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            model: Hugging Face checkpoint directory, or a decoder to use (then `dtype` and `device` are its own).
            drafter: None drafts nothing.
            max_sequences: sequences running at once.
            max_draft_tokens: longest draft a verification.
            max_length: tokens of prompt and response together; None: what the model was made for.
            stop_token_ids: tokens that end every response, beside those of a request; None: the model's own.
            entropy: whether to record entropies.
            version: publication that `model` is.
            on_event: told in one sentence when the drafter is switched off or stuck; None: `warnings.warn`.

        Raises:
            UsageError: the checkpoint cannot be used, or `max_length` is over what the model was made for.
        """
        self.decoder = model if isinstance(model, Decoder) else load_decoder(model, dtype, device)
        config = self.decoder.config
        self.capabilities = Capabilities(entropy=entropy)
        self.version = version
        self.max_sequences, self.max_draft_tokens = max_sequences, max_draft_tokens
        self.max_length = max_length or config.max_positions
        if self.max_length > config.max_positions:
            raise UsageError(
                f"prompt and response of {self.max_length} tokens exceed the model's {config.max_positions} positions; "
                "lower sampling.max_prompt_tokens or sampling.max_new_tokens"
            )
        self._stop = frozenset(config.eos_token_ids if stop_token_ids is None else stop_token_ids)
        self._cache = KVCache(config, self.decoder.dtype, self.decoder.device, max_sequences, self.max_length)
        self._scheduler = Scheduler()
        self._live: list[Sequence] = []
        """row b of every batch, and slot b of the cache"""
        self._drafting = Drafting(drafter or NoDrafter(), self.decoder, on_event)
        self._weight_loads = 0
        self._stats = GeneratorStats()
        self._mark = 0.0

    # ---- the seam ------------------------------------------------------------------------------------------------

    def load_weights(self, folder: Path, version: int) -> None:
        """Overwrites the weights in place; sequences under way keep their keys and values, and say so.

        Raises:
            UsageError: the folder does not hold this model's weights; nothing has changed then.
        """
        load_weights_into(self.decoder, folder)
        self.version = version
        self._weight_loads += 1
        for sequence in self._live:
            sequence.kv_kept = sequence.kv_kept or sequence.cached > 0
        self._drafting.weights_changed(version)

    def add(self, request: GroupRequest, limits: Items[int] | None = None) -> None:
        """Queues a group; a response ends at `max_length` in any case.

        Args:
            request: the group.
            limits: most tokens of each sample, where they differ; None: the sampling parameters' for all.

        Raises:
            UsageError: the prompt is empty, leaves no room for a response, or has ids outside the vocabulary.
            ValueError: the group's id is in use.
        """
        prompt, vocab_size = request.prompt_ids, self.decoder.config.vocab_size
        if not 0 < len(prompt) < self.max_length:
            raise UsageError(f"a prompt of {len(prompt)} tokens does not fit between 1 and {self.max_length - 1}")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise UsageError(f"prompt token id {prompt.max()} is outside the vocabulary of {vocab_size} tokens")
        if request.id in self._scheduler.groups() or any(s.request.id == request.id for s in self._live):
            raise ValueError(f"group {request.id} is already running")
        wanted = limits or [request.sampling.max_new_tokens] * len(request.seeds)
        room = self.max_length - len(prompt)
        stop = self._stop.union(request.sampling.stop_token_ids)
        self._scheduler.add(request, [min(limit, room) for limit in wanted], stop)

    def cancel(self, group: int) -> None:
        self._scheduler.cancel(group)
        self._release([row for row, s in enumerate(self._live) if s.request.id == group])

    def has_work(self) -> bool:
        return bool(self._live) or len(self._scheduler) > 0

    def running(self) -> int:
        return len(self._live) + len(self._scheduler)

    def close(self) -> None:
        """Forgets everything under way and frees the cache."""
        for group in self._scheduler.groups() | {s.request.id for s in self._live}:
            self.cancel(group)
        self._cache = KVCache(
            self.decoder.config, self.decoder.dtype, self.decoder.device, self.max_sequences, self.max_length
        )

    def stats(self) -> GeneratorStats:
        """Totals so far; the object is the caller's."""
        s = self._stats
        return GeneratorStats(
            s.generated_tokens, s.verifications, s.drafted, s.accepted, self._drafting.failures,
            s.forward_seconds, s.drafter_seconds, s.sampling_seconds, s.other_seconds,
        )  # fmt: skip

    def drafter_counters(self) -> dict[str, float]:
        """The drafter's own figures so far; what they are is the drafter's business."""
        return self._drafting.counters()

    # ---- a step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[FinishedSample]:
        """One verification of every live sequence.

        Raises:
            RunFailed: the weights give log-probs that are not numbers.
        """
        self._mark = time.perf_counter()
        self._admit()
        if not self._live:
            return []
        temperatures = np.array([s.temperature for s in self._live], np.float32)
        proposal = self._propose(temperatures)
        began = self._mark
        hidden = self._forward(proposal)
        logits = self.decoder.logits(hidden)
        self._lap("forward_seconds")
        verified = self._verify(logits, proposal, temperatures)
        emissions = self._emissions(verified, proposal)
        self._lap("sampling_seconds")
        seconds = self._mark - began
        drafters = proposal.drafted_by or [self._drafting.name] * len(emissions)
        for sequence, emission, drafter in zip(self._live, emissions, drafters, strict=True):
            sequence.append(emission, self.version, drafter)
        self._count(emissions)
        self._lap("other_seconds")
        self._observe(emissions, hidden, logits, proposal, seconds)
        self._lap("drafter_seconds")
        return self._finish()

    def _admit(self) -> None:
        starting = self._scheduler.start(self.max_sequences - len(self._live))
        if not starting:
            return
        start_sequences(self.decoder, self._cache, self._live, starting, self._weight_loads)
        self._lap("forward_seconds")
        starts = [SequenceStart(s.id, s.request.prompt_ids, s.request.id, s.temperature, s.seed) for s in starting]
        self._drafting.begin(starts)
        self._lap("drafter_seconds")

    def _propose(self, temperatures: np.ndarray) -> Proposal:
        budgets = np.array([min(self.max_draft_tokens, s.room) for s in self._live], np.int64)
        self._lap("other_seconds")
        proposal = self._drafting.propose(DraftRequest([s.id for s in self._live], budgets, temperatures))
        self._lap("drafter_seconds")
        return proposal

    def _forward(self, proposal: Proposal) -> Tensor:
        """Hidden states [N, H] after each sequence's last token and after each of its draft tokens."""
        counts = proposal.lengths + 1
        cached = np.array([s.cached for s in self._live], np.int64)
        last = np.array([s.last_token for s in self._live], np.int64)
        columns = np.arange(proposal.token_ids.shape[1] + 1)
        tokens = np.concatenate([last[:, None], proposal.token_ids], axis=1)[columns < counts[:, None]]
        plan = self._cache.plan(0, cached, counts)
        return self.decoder.forward(torch.from_numpy(tokens).to(self.decoder.device), plan, self._cache)

    def _verify(self, logits: Tensor, proposal: Proposal, temperatures: np.ndarray) -> VerifiedTokens:
        seeds = np.array([s.seed for s in self._live], np.int64)
        positions = np.array([s.count for s in self._live], np.int64)
        sampled = proposal.probabilities is not None
        return verify(
            logits,
            proposal.token_ids,
            proposal.lengths,
            torch.from_numpy(temperatures).to(logits.device),
            TokenUniforms.draw(seeds, positions, proposal.lengths, sampled, logits.device),
            proposal.probabilities,
            self.capabilities.entropy,
        )

    def _emissions(self, verified: VerifiedTokens, proposal: Proposal) -> list[Emission]:
        accepted, logprobs = verified.accepted.cpu().numpy(), verified.logprobs.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise RunFailed(f"publication {self.version} gives log-probs that are not numbers; its weights are broken")
        tokens = verified.tokens.cpu().numpy()
        entropies = None if verified.entropies is None else verified.entropies.cpu().numpy()
        emissions = []
        for row, sequence in enumerate(self._live):
            n = int(accepted[row])
            emission = Emission(
                tokens[row, : n + 1],
                logprobs[row, : n + 1],
                None if entropies is None else entropies[row, : n + 1],
                int(proposal.lengths[row]),
                n,
            )
            emissions.append(sequence.cut_at_stop(emission))
        return emissions

    def _observe(
        self, emissions: list[Emission], hidden: Tensor, logits: Tensor, proposal: Proposal, seconds: float
    ) -> None:
        self._drafting.observe(
            Verified(
                ids=[s.id for s in self._live],
                emitted=[e.token_ids for e in emissions],
                accepted=np.array([e.accepted for e in emissions], np.int64),
                hidden=_padded(hidden, proposal) if Needs.HIDDEN_STATES in self._drafting.needs else None,
                logits=_padded(logits, proposal) if Needs.LOGITS in self._drafting.needs else None,
                seconds=seconds,
            )
        )

    def _finish(self) -> list[FinishedSample]:
        rows = [row for row, s in enumerate(self._live) if s.finish_reason]
        done = [self._live[row].finished(self.capabilities.entropy) for row in rows]
        self._release(rows)
        self._lap("other_seconds")
        return done

    def _release(self, rows: list[int]) -> None:
        """Frees rows; the last live sequence moves into each hole, so that live ones stay in the first slots."""
        self._drafting.end([self._live[row].id for row in rows])
        for row in sorted(rows, reverse=True):
            last = self._live.pop()
            if row < len(self._live):
                self._cache.copy(len(self._live), row, last.cached)
                self._live[row] = last

    def _count(self, emissions: list[Emission]) -> None:
        stats = self._stats
        stats.verifications += len(emissions)
        for emission in emissions:
            stats.generated_tokens += len(emission.token_ids)
            stats.drafted += emission.drafted
            stats.accepted += emission.accepted

    def _lap(self, part: str) -> None:
        """Books the time since the last call; on a GPU waiting shows up where results are first read."""
        now = time.perf_counter()
        setattr(self._stats, part, getattr(self._stats, part) + now - self._mark)
        self._mark = now


def _padded(packed: Tensor, proposal: Proposal) -> Tensor:
    """[B, K+1, ...] of packed rows [N, ...], zeros behind each row's own."""
    row, depth = packed_rows(proposal.lengths)
    out = packed.new_zeros(len(proposal.lengths), proposal.token_ids.shape[1] + 1, *packed.shape[1:])
    out[torch.from_numpy(row), torch.from_numpy(depth)] = packed
    return out
