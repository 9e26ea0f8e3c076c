"""The native generator: continuous batching with speculative decoding, one device."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drafters.base import Drafter, Needs, Proposal
from drafters.guard import CALL_SECONDS
from drafters.none import NoDrafter
from pipeline.engine.generator import FinishedSample, GroupRequest
from pipeline.engine.native.batch import Batch
from pipeline.engine.native.compression import Compressor, KVCompression
from pipeline.engine.native.drafting import Drafting
from pipeline.engine.native.memory import Memory, page_budget
from pipeline.engine.native.receiving import WeightsReceiver
from pipeline.engine.native.running import Running
from pipeline.engine.native.scheduler import Scheduler
from pipeline.engine.native.scoring import Scorer, Scores
from pipeline.engine.native.sequence import Emission, Sequence
from pipeline.engine.native.small_model import SmallModel, on_small
from pipeline.engine.native.stats import GeneratorStats, Laps
from pipeline.engine.native.stop_strings import StopStrings
from pipeline.engine.native.switching import SwitchingRule
from pipeline.engine.native.target import PolicyTarget
from pipeline.engine.native.verifier import Verifier
from pipeline.errors import UsageError
from pipeline.messages import Capabilities, WeightsGroup, WeightsJoin, WeightsManifest
from pipeline.models.checkpoint import load_decoder, load_weights_into
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import KVCache
from pipeline.models.tokenizer import Tokenizer
from pipeline.sampling.processors import Processors

__all__ = ["GeneratorStats", "NativeGenerator"]


class NativeGenerator:
    """`pipeline.engine.generator.Generator` on the lean decoder.

    A step admits queued samples, computes some of their prompts, asks the drafter, runs one forward pass over each live
    sequence's last token and draft, verifies, and hands out what finished. Text depends on prompt, seed and weights
    alone (up to the rounding of other batch shapes); deterministic drafts leave even the text of a given seed as it is.
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        *,
        drafter: Drafter | None = None,
        drafter_seconds: float = CALL_SECONDS,
        max_sequences: int = 64,
        max_draft_tokens: int = 8,
        max_length: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        stop_token_ids: Items[int] | None = None,
        entropy: bool = True,
        verification: str = "standard",
        tokenizer: Tokenizer | None = None,
        kv_bytes: int = 0,
        kv_compression: KVCompression | None = None,
        prefill_tokens: int = 2048,
        recompute_on_update: bool = False,
        stagger: bool = False,
        small_model: str | Path | Decoder | None = None,
        switching: SwitchingRule | None = None,
        version: int = -1,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            model: Hugging Face checkpoint directory, or a decoder to use (then `dtype` and `device` are its own).
            drafter: None drafts nothing.
            drafter_seconds: longest call of it; after a longer one it is switched off.
            max_sequences: sequences running at once.
            max_draft_tokens: longest draft a verification.
            max_length: tokens of prompt and response together; None: what the model was made for.
            stop_token_ids: tokens that end every response, beside those of a request; None: the model's own.
            entropy: whether to record entropies.
            verification: rule for drafts that bring probabilities: "standard", token by token, or "block".
            tokenizer: for requests with stop strings; None: the checkpoint directory's.
            kv_bytes: memory for keys and values; 0: for `max_sequences` of `max_length`, at most half of what is free.
                When it runs out, the sequences that started last are preempted and computed again later.
            kv_compression: bound on a sequence's keys and values; None: all of them are kept.
            prefill_tokens: tokens of prompts computed between two verifications.
            recompute_on_update: whether new weights compute the keys and values of sequences under way anew.
            stagger: whether, of more samples than run at once, one of each group goes ahead, so that the others' drafts
                can follow it; groups finish later then.
            small_model: of the same tokenizer, samples where the policy's entropy is low; both caches share `kv_bytes`.
            switching: when it does; with `small_model`.
            version: publication that `model` is.
            on_event: told in one sentence when the drafter is switched off or stuck; None: `warnings.warn`.

        Raises:
            UsageError: a count that is too small, a checkpoint that cannot be used, `max_length` over what the model
                was made for, `kv_bytes` that do not hold one sequence of `max_length`, or a small model or drafter that
                does not fit the policy.
        """
        counts = {"max_sequences": (max_sequences, 1), "max_draft_tokens": (max_draft_tokens, 0)}
        counts |= {"kv_bytes": (kv_bytes, 0), "prefill_tokens": (prefill_tokens, 1)}
        for name, (value, least) in counts.items():
            if value < least:
                raise UsageError(f"{name} = {value} is too small; give at least {least}")
        self.decoder = model if isinstance(model, Decoder) else load_decoder(model, dtype, device)
        self.capabilities = Capabilities(entropy=entropy, kept_ids=True)
        self.version, self._recompute = version, recompute_on_update
        self.max_sequences, self.max_draft_tokens = max_sequences, max_draft_tokens
        self.max_length = _length(max_length, self.decoder)
        self._stop = frozenset(self.decoder.config.eos_token_ids if stop_token_ids is None else stop_token_ids)
        folder = None if isinstance(model, Decoder) else Path(model)
        drafter = drafter or NoDrafter()
        self.small = SmallModel.beside(
            small_model, switching, self.decoder, folder, self.max_length, drafter, kv_compression is not None
        )
        self._memory = self._new_memory(kv_bytes, kv_compression)
        batch = Batch(max_sequences, self.max_length)
        self._target = PolicyTarget(self.decoder, self._memory, batch, folder, tokenizer)
        self._drafting = Drafting(drafter, self._target, on_event, drafter_seconds)
        self._scheduler = Scheduler(stagger)
        self._running = Running(
            batch,
            decoder=self.decoder,
            memory=self._memory,
            small=self.small,
            scheduler=self._scheduler,
            drafting=self._drafting,
            max_sequences=max_sequences,
            max_draft_tokens=max_draft_tokens,
            prefill_tokens=prefill_tokens,
        )
        self._processors = Processors(self.decoder.config.vocab_size, self.decoder.device)
        self._scorer = Scorer(self.decoder, self._memory, self.small)
        self._verifier = Verifier(self._processors, self.small, verification, entropy)
        self._receiver = WeightsReceiver(self.decoder, self.small)
        self._stats = GeneratorStats()
        self._laps = Laps(self._stats)

    def _new_memory(self, kv_bytes: int, compression: KVCompression | None) -> Memory:
        """As the options say; the small model's, too."""
        decoder, config = self.decoder, self.decoder.config
        beside = self.small.page_bytes if self.small else 0
        pages = page_budget(
            config, decoder.dtype, decoder.device, kv_bytes, self.max_sequences, self.max_length, compression, beside
        )
        if self.small:
            self.small.set_pages(pages)
        self._compressor: Compressor | None = None
        if compression:
            compression.check(config, self.max_length)
            self._compressor = Compressor(compression, decoder)
        return Memory(KVCache(config, decoder.dtype, decoder.device, pages), self._compressor)

    # ---- the seam ------------------------------------------------------------------------------------------------

    def load_weights(self, folder: Path, version: int) -> None:
        """Overwrites the weights; sequences under way keep their keys and values, and say so, or compute them anew.

        Raises:
            UsageError: the folder does not hold this model's weights; nothing has changed then.
        """
        load_weights_into(self.decoder, folder)
        small = self.small is not None and self.small.load_weights(folder)
        self._weights_changed(version, small)

    def receiving(self) -> WeightsJoin:
        return self._receiver.request()

    def join_group(self, group: WeightsGroup) -> None:
        self._receiver.join(group)

    def receive_weights(self, manifest: WeightsManifest) -> None:
        """As `load_weights`."""
        small = self._receiver.receive(manifest)
        if self.small is not None and small:
            self.small.weights_changed()
        self._weights_changed(manifest.version, small)
        self.decoder.beside = {}

    def leave_group(self) -> None:
        self._receiver.leave()

    def _weights_changed(self, version: int, small: bool) -> None:
        """`small`: the small model's, too."""
        self.version = version
        self._memory.forget_prompts()
        self._running.restart(live=self._recompute)
        for sequence in self._running.batch:
            copied = sequence.copy.cached if small and sequence.copy is not None else 0
            sequence.kv_kept = sequence.kv_kept or sequence.cached > 0 or copied > 0
        self._drafting.weights_changed(version)

    def add(self, request: GroupRequest, limits: Items[int] | None = None) -> None:
        """Queues a group; a response ends at `max_length` in any case.

        Args:
            request: the group.
            limits: most tokens of each sample, where they differ; None: the sampling parameters' for all.

        Raises:
            UsageError: the prompt is empty, leaves no room for a response, or has ids outside the vocabulary; sampling
                settings that no response can have; stop strings without a tokenizer.
            ValueError: the group's id is in use.
        """
        prompt, vocab_size = request.prompt_ids, self.decoder.config.vocab_size
        if not 0 < len(prompt) < self.max_length:
            raise UsageError(f"a prompt of {len(prompt)} tokens does not fit between 1 and {self.max_length - 1}")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise UsageError(f"prompt token id {prompt.max()} is outside the vocabulary of {vocab_size} tokens")
        if request.id in self._scheduler:
            raise ValueError(f"group {request.id} is already running")
        wanted = limits or [request.sampling.max_new_tokens] * len(request.seeds)
        room = self.max_length - len(prompt)
        stop = self._stop.union(request.sampling.stop_token_ids)
        self._processors.check(request.sampling, stop)
        if request.sampling.stop_strings:
            self._target.need_tokenizer()
        self._scheduler.add(request, [min(limit, room) for limit in wanted], stop)

    def cancel(self, group: int) -> None:
        stopped = self._scheduler.cancel(group) + self._running.stop_starting(group)
        self._end([s for s in stopped if s.begun])
        self._release([row for row, s in enumerate(self._running.batch) if s.group == group])
        self._running.forget_prompt(group)

    def has_work(self) -> bool:
        return self.running() > 0

    def running(self) -> int:
        return len(self._running) + len(self._scheduler)

    def close(self) -> None:
        """Forgets everything under way and frees the cache."""
        self._receiver.leave()
        for group in self._scheduler.groups:
            self.cancel(group)
        self._memory.clear()
        if self.small:
            self.small.memory.clear()

    @property
    def kv_bytes(self) -> int:
        """Memory of keys and values that was ever in use."""
        return self._memory.cache.bytes + (self.small.memory.cache.bytes if self.small else 0)

    def stats(self) -> GeneratorStats:
        """Totals so far; the object is the caller's."""
        return replace(
            self._stats,
            drafter_failures=self._drafting.failures,
            preemptions=self._running.preemptions,
            compressions=self._compressor.count if self._compressor else 0,
        )

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
        laps, running, batch = self._laps, self._running, self._running.batch
        laps.start()
        running.admit()
        laps.other()
        ready = running.prefill()
        laps.forward()
        self._begin(ready)
        laps.drafter()
        budgets, small_logits = self._prepare()
        if not len(batch):
            return []
        proposal = self._drafting.draft(batch, budgets)
        laps.drafter()
        began = laps.mark
        with_layers = Needs.LAYER_STATES in self._drafting.needs
        scores = self._scorer.score(batch, proposal, small_logits, with_layers)
        laps.forward()
        emissions = self._verifier.emissions(batch, scores, proposal, self.version)
        laps.sampling()
        seconds = laps.mark - began
        self._append(emissions, scores, proposal)
        laps.other()
        self._drafting.follow(batch, emissions, scores, seconds)
        laps.drafter()
        done = self._finish()
        laps.other()
        return done

    def _begin(self, ready: list[Sequence]) -> None:
        """Sequences have become live: their settings take effect, and stay over preemption until `_end`."""
        if not ready:
            return
        new = [s for s in ready if not s.begun]
        restored = [s for s in ready if s.begun]
        for sequence in new:
            params, sequence.begun = sequence.sampling, True
            sequence.slot = self._processors.add(params, sequence.stop, sequence.request.prompt_ids)
            if self.small:
                self.small.begin(sequence, self.capabilities.entropy)
            if params.stop_strings:
                stream = self._target.need_tokenizer().stream()
                sequence.stop_strings = StopStrings(params.stop_strings, stream, params.min_new_tokens)
        self._drafting.start(new, restored)

    def _prepare(self) -> tuple[np.ndarray, Tensor | None]:
        """Whoever samples next has caught up and has memory: longest drafts, int64 [B], and the small model's logits of
        its rows."""
        running, laps = self._running, self._laps
        running.catch_up()
        laps.forward()
        budgets = running.make_room()
        laps.other()
        asked = [s for s in running.batch if on_small(s)]
        logits = self._scorer.small_logits(running.batch)
        if self.small and logits is not None and self.small.hand_over(asked, logits):
            running.catch_up()
            budgets = running.make_room()
            row_of = {s.id: row for row, s in enumerate(asked)}
            rows = [row_of[s.id] for s in running.batch if on_small(s)]  # memory may have run out for some
            logits = logits[rows] if rows else None
        laps.forward()
        return budgets, logits

    def _append(self, emissions: list[Emission], scores: Scores, proposal: Proposal) -> None:
        """Sequences grow by what they emit."""
        batch = self._running.batch
        drafters = proposal.drafted_by or [self._drafting.name] * len(emissions)
        for sequence, emission, drafter, sampler in zip(batch, emissions, drafters, scores.samplers, strict=True):
            sequence.append(emission, self.version, drafter, sampler)
        self._processors.observe(batch.slots, [e.token_ids for e in emissions])
        self._stats.count(emissions)

    def _finish(self) -> list[FinishedSample]:
        batch = self._running.batch
        rows = [row for row, s in enumerate(batch) if s.finish_reason]
        done = [batch[row].finished(self.capabilities.entropy) for row in rows]
        self._release(rows)
        for sample in done:
            if self._scheduler.finished(sample.group):
                self._running.forget_prompt(sample.group)
        return done

    def _release(self, rows: list[int]) -> None:
        """Ends live sequences."""
        self._end([self._running.batch[row] for row in rows])
        self._running.remove(rows)

    def _end(self, sequences: Items[Sequence]) -> None:
        """What has begun is finished or cancelled."""
        self._drafting.end([s.id for s in sequences])
        for sequence in sequences:
            self._processors.remove(sequence.slot)


def _length(wanted: int | None, decoder: Decoder) -> int:
    """Tokens of prompt and response together."""
    positions = decoder.config.max_positions
    if wanted and wanted > positions:
        raise UsageError(
            f"prompt and response of {wanted} tokens exceed the model's {positions} positions; "
            "lower sampling.max_prompt_tokens or sampling.max_new_tokens"
        )
    return wanted or positions
