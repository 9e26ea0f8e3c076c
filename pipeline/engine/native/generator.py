"""The native generator: continuous batching with speculative decoding, one device."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drafters.base import Drafter, DraftRequest, Needs, Places, Proposal, SequenceStart, Verified
from drafters.none import NoDrafter
from pipeline.engine.generator import FinishedSample, GroupRequest, KeptIds
from pipeline.engine.native.compression import Compressor, KVCompression
from pipeline.engine.native.drafting import Drafting
from pipeline.engine.native.memory import Memory, page_budget
from pipeline.engine.native.prefill import prefill
from pipeline.engine.native.scheduler import Scheduler
from pipeline.engine.native.sequence import Emission, Sequence
from pipeline.engine.native.small_model import SmallModel, check_together, on_small, together
from pipeline.engine.native.stop_strings import StopStrings
from pipeline.engine.native.switching import SwitchingRule
from pipeline.errors import RunFailed, UsageError
from pipeline.messages import Capabilities, Sampler
from pipeline.models.checkpoint import load_decoder, load_weights_into
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache
from pipeline.models.tokenizer import Tokenizer
from pipeline.sampling.plain import verify_plain
from pipeline.sampling.processors import Processors
from pipeline.sampling.uniforms import salted
from pipeline.sampling.verification import TokenUniforms, VerifiedTokens, verify


@dataclass(slots=True)
class GeneratorStats:
    """Counts and wall seconds since the generator was made."""

    generated_tokens: int = 0
    verifications: int = 0
    """forward passes, counted once for each sequence in them"""
    drafted: int = 0
    accepted: int = 0
    drafter_failures: int = 0
    preemptions: int = 0
    """sequences that lost their memory to others and were computed again"""
    compressions: int = 0
    """of sequences' caches, those of preempted ones again"""
    forward_seconds: float = 0.0
    drafter_seconds: float = 0.0
    sampling_seconds: float = 0.0
    other_seconds: float = 0.0


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
            UsageError: the checkpoint cannot be used, `max_length` is over what the model was made for, `kv_bytes` does
                not hold one sequence of `max_length`, or the small model or the drafter does not fit the policy.
        """
        self.decoder = model if isinstance(model, Decoder) else load_decoder(model, dtype, device)
        config = self.decoder.config
        self.capabilities = Capabilities(entropy=entropy, kept_ids=True)
        self.version = version
        self.max_sequences, self.max_draft_tokens = max_sequences, max_draft_tokens
        self.max_length = max_length or config.max_positions
        if self.max_length > config.max_positions:
            raise UsageError(
                f"prompt and response of {self.max_length} tokens exceed the model's {config.max_positions} positions; "
                "lower sampling.max_prompt_tokens or sampling.max_new_tokens"
            )
        self._stop = frozenset(config.eos_token_ids if stop_token_ids is None else stop_token_ids)
        self._prefill_tokens, self._recompute = prefill_tokens, recompute_on_update
        self._tokenizer, self._folder = tokenizer, None if isinstance(model, Decoder) else Path(model)
        self.small: SmallModel | None = None
        if (small_model is None) != (switching is None):
            raise UsageError("a small model needs a switching rule, and a rule a small model; give both, or none")
        if small_model is not None and switching is not None:
            check_together(drafter or NoDrafter(), kv_compression is not None)
            self.small = SmallModel(small_model, switching, self.decoder, self._folder, self.max_length)
        self._pages = page_budget(
            config,
            self.decoder.dtype,
            self.decoder.device,
            kv_bytes,
            max_sequences,
            self.max_length,
            kv_compression,
            self.small.page_bytes if self.small else 0,
        )
        self._compressor = None
        if kv_compression:
            kv_compression.check(config, self.max_length)
            self._compressor = Compressor(kv_compression, self.decoder)
        self._memory = self._new_memory()
        self._scheduler = Scheduler(stagger)
        self._starting: list[Sequence] = []
        """those whose prompt is not complete"""
        self._live: list[Sequence] = []
        """row b of every batch"""
        self._tables = np.zeros((max_sequences, -(-self.max_length // PAGE)), np.int64)
        """row b: pages of live sequence b"""
        self._groups: dict[int, int] = {}
        """samples of each group that have not finished"""
        if verification not in ("standard", "block"):
            raise UsageError(f"verification {verification!r} is unknown; use standard or block")
        self._block = verification == "block"
        self._processors = Processors(config.vocab_size, self.decoder.device)
        self._salt = False
        """whether numbers depend on the sequence beside the seed: from the first drafts with probabilities on"""
        self._drafting = Drafting(drafter or NoDrafter(), self, on_event)
        self._stats = GeneratorStats()
        self._mark = 0.0

    # ---- the seam ------------------------------------------------------------------------------------------------

    def load_weights(self, folder: Path, version: int) -> None:
        """Overwrites the weights; sequences under way keep their keys and values, and say so, or compute them anew.

        Raises:
            UsageError: the folder does not hold this model's weights; nothing has changed then.
        """
        load_weights_into(self.decoder, folder)
        if self.small:
            self.small.load_weights(folder)
        self.version = version
        self._memory.forget_prompts()
        again, self._starting = self._starting, []
        if self._recompute:
            self._drafting.preempt([s.id for s in self._live])
            again, self._live = again + self._live, []
        for sequence in sorted(again, key=lambda s: s.id, reverse=True):
            self._free(sequence)
            self._scheduler.put_back(sequence)
        for sequence in self._live:
            sequence.kv_kept = sequence.kv_kept or sequence.cached > 0
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
        if request.id in self._groups:
            raise ValueError(f"group {request.id} is already running")
        wanted = limits or [request.sampling.max_new_tokens] * len(request.seeds)
        room = self.max_length - len(prompt)
        stop = self._stop.union(request.sampling.stop_token_ids)
        self._processors.check(request.sampling, stop)
        if request.sampling.stop_strings:
            self._load_tokenizer()
        self._groups[request.id] = len(request.seeds)
        self._scheduler.add(request, [min(limit, room) for limit in wanted], stop)

    def cancel(self, group: int) -> None:
        self._groups.pop(group, None)
        stopped = self._scheduler.cancel(group)
        for sequence in [s for s in self._starting if s.group == group]:
            self._starting.remove(sequence)
            self._free(sequence)
            stopped.append(sequence)
        self._end([s for s in stopped if s.begun])
        self._release([row for row, s in enumerate(self._live) if s.group == group])
        self._memory.forget_prompt(group)
        if self.small:
            self.small.memory.forget_prompt(group)

    def _load_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            if self._folder is None:
                raise UsageError("stop strings need a tokenizer; give NativeGenerator one, or a checkpoint directory")
            self._tokenizer = Tokenizer(self._folder)
        return self._tokenizer

    def has_work(self) -> bool:
        return bool(self._live or self._starting) or len(self._scheduler) > 0

    def running(self) -> int:
        return len(self._live) + len(self._starting) + len(self._scheduler)

    def close(self) -> None:
        """Forgets everything under way and frees the cache."""
        for group in list(self._groups):
            self.cancel(group)
        self._memory = self._new_memory()

    @property
    def kv_bytes(self) -> int:
        """Memory of keys and values that was ever in use."""
        return self._memory.cache.bytes + (self.small.memory.cache.bytes if self.small else 0)

    def stats(self) -> GeneratorStats:
        """Totals so far; the object is the caller's."""
        compressions = self._compressor.count if self._compressor else 0
        return replace(self._stats, drafter_failures=self._drafting.failures, compressions=compressions)

    # ---- as its drafter's target -----------------------------------------------------------------------------------

    @property
    def cache(self) -> KVCache:
        return self._memory.cache

    @property
    def tokenizer(self) -> Tokenizer | None:
        if self._tokenizer is None and (self._folder is None or not (self._folder / "tokenizer.json").exists()):
            return None
        return self._load_tokenizer()

    def places(self, ids: Items[int]) -> Places:
        """As `drafters.base.Target` says."""
        row_of = {s.id: row for row, s in enumerate(self._live)}
        rows = [row_of[i] for i in ids]
        held = np.array([self._live[row].held for row in rows], np.int64)
        evicted = np.array([self._live[row].evicted for row in rows], np.int64) if self._compressor else None
        return Places(self._tables[rows], held, evicted)

    def _new_memory(self) -> Memory:
        if self.small:
            self.small.set_pages(self._pages)
        cache = KVCache(self.decoder.config, self.decoder.dtype, self.decoder.device, self._pages)
        return Memory(cache, self._compressor)

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
        self._start()
        budgets, small_logits = self._prepare()
        if not self._live:
            return []
        temperatures = np.array([s.temperature for s in self._live], np.float32)
        proposal = self._propose(budgets, temperatures)
        began = self._mark
        samplers = [Sampler.SWITCHED_MODEL if on_small(s) else Sampler.POLICY for s in self._live]
        states: list[Tensor] | None = [] if Needs.LAYER_STATES in self._drafting.needs else None
        hidden, logits = self._forward(proposal, states, small_logits)
        self._lap("forward_seconds")
        verified = self._verify(logits, proposal)
        emissions = self._emissions(verified, proposal, logits)
        self._lap("sampling_seconds")
        seconds = self._mark - began
        drafters = proposal.drafted_by or [self._drafting.name] * len(emissions)
        for sequence, emission, drafter, sampler in zip(self._live, emissions, drafters, samplers, strict=True):
            sequence.append(emission, self.version, drafter, sampler)
        slots = np.array([s.slot for s in self._live], np.int64)
        self._processors.observe(slots, [e.token_ids for e in emissions])
        self._count(emissions)
        self._lap("other_seconds")
        self._observe(emissions, hidden, logits, states, proposal, seconds)
        self._lap("drafter_seconds")
        return self._finish()

    def _admit(self) -> None:
        """Starts those next in the queue while there is memory for them."""
        admission = self._memory.admission(self._starting, self._live)
        while len(self._live) + len(self._starting) < self.max_sequences:
            sequence = self._scheduler.next()
            if sequence is None or not admission.fits(sequence):
                break
            admission.add(sequence)
            self._scheduler.start()
            self._starting.append(sequence)

    def _start(self) -> None:
        """Computes prompts, and makes those live whose is complete."""
        if not self._starting:
            return
        hidden = Needs.HIDDEN_STATES in self._drafting.needs
        computed = prefill(self.decoder, self._memory, self._starting, self._prefill_tokens, hidden)
        self._lap("forward_seconds")
        ready = [s for s in self._starting if s.ready]
        if not (computed or ready or self._live):
            self._preempt()  # they hold so much of the memory together that none can go on
            return
        self._starting = [s for s in self._starting if not s.ready]
        for sequence in ready:
            self._tables[len(self._live), : len(sequence.pages)] = sequence.pages
            self._live.append(sequence)
            self._last_member_started(sequence.group)
        if ready:
            new = [s for s in ready if not s.begun]
            restored = [s for s in ready if s.begun]
            for sequence in new:
                self._begin(sequence)
            self._drafting.begin([self._start_of(s) for s in new])
            self._drafting.restore([self._start_of(s) for s in restored])
            for sequence in ready:
                sequence.hidden = []
            self._lap("drafter_seconds")

    def _start_of(self, s: Sequence) -> SequenceStart:
        hidden = None
        if Needs.HIDDEN_STATES in self._drafting.needs:
            none = self.decoder.embedding.new_zeros(0, self.decoder.config.hidden_size)
            hidden = s.hidden[0] if len(s.hidden) == 1 else torch.cat([none, *s.hidden])
        response = s.token_ids[: s.count].copy()
        return SequenceStart(s.id, s.request.prompt_ids, s.group, s.temperature, s.seed, response, hidden)

    def _begin(self, sequence: Sequence) -> None:
        """Its settings take effect; they stay over preemption until `_end`."""
        params, sequence.begun = sequence.sampling, True
        sequence.slot = self._processors.add(params, sequence.stop, sequence.request.prompt_ids)
        if self.small:
            self.small.begin(sequence, self.capabilities.entropy)
        if params.stop_strings:
            stream = self._load_tokenizer().stream()
            sequence.stop_strings = StopStrings(params.stop_strings, stream, params.min_new_tokens)

    def _end(self, sequences: Items[Sequence]) -> None:
        """What has begun is finished or cancelled."""
        self._drafting.end([s.id for s in sequences])
        for sequence in sequences:
            self._processors.remove(sequence.slot)

    def _last_member_started(self, group: int) -> None:
        """Frees a group's prompt once no sample will ask for it."""
        if not self._scheduler.waits(group) and not any(s.group == group for s in self._starting):
            self._memory.forget_prompt(group)

    def _prepare(self) -> tuple[np.ndarray, Tensor | None]:
        """Models and memory for the next tokens: the longest drafts, int64 [B], and the small model's logits."""
        self._catch_up()
        budgets = self._make_room()
        asked = [s for s in self._live if on_small(s)]
        logits = self._forward_small()
        if self.small is None or logits is None or not self.small.hand_over(asked, logits):
            return budgets, logits
        self._catch_up()
        budgets = self._make_room()
        row_of = {s.id: row for row, s in enumerate(asked)}
        rows = [row_of[s.id] for s in self._live if on_small(s)]  # memory may have run out for some
        return budgets, logits[rows] if rows else None

    def _catch_up(self) -> None:
        """The models that take over compute what they missed; preempts where there is no memory for that."""
        while self.small:
            done, rows = self.small.catch_up(self._live, self.decoder, self._memory)
            for row in rows:
                self._tables[row, : len(self._live[row].pages)] = self._live[row].pages
                self._last_member_started(self._live[row].group)
            if done:
                break
            self._preempt()
        self._lap("forward_seconds")

    def _make_room(self) -> np.ndarray:
        """Longest draft of each live sequence, int64 [B], for which it now has pages; preempts where even the next
        token of one has none."""
        self._compress()
        budgets: list[int] = []
        row = 0
        while row < len(self._live):
            sequence = self._live[row]
            if self.small and sequence.copy is not None and on_small(sequence):
                if not self.small.memory.grow(sequence.copy, sequence.copy.cached + 1):
                    self._preempt()
                    row, budgets = 0, []
                    continue
                budgets.append(0)
                row += 1
                continue
            wanted = min(self.max_draft_tokens, self._memory.draft_room(sequence))
            pages = len(sequence.pages)
            if not self._memory.grow(sequence, sequence.held + 1 + wanted):
                wanted = min(wanted, pages * PAGE - sequence.held - 1)
                if wanted < 0 and not self._memory.grow(sequence, sequence.held + 1):
                    self._preempt()
                    row, budgets = 0, []  # rows have moved
                    continue
                wanted = max(wanted, 0)
            self._tables[row, pages : len(sequence.pages)] = sequence.pages[pages:]
            budgets.append(wanted)
            row += 1
        return np.array(budgets, np.int64)

    def _compress(self) -> None:
        """Live sequences that have outgrown their budget; preempts where copying what one shares has no pages."""
        while self._compressor and (due := [s for s in self._live if self._memory.due(s) <= 0]):
            if not self._memory.compress(due):
                self._preempt()
            for row, sequence in enumerate(self._live):
                self._tables[row, : len(sequence.pages)] = sequence.pages

    def _preempt(self) -> None:
        """Takes the memory of prompts kept for later, else of the sequence that holds memory for the shortest time."""
        if self._memory.forget_prompts() or (self.small and self.small.free_idle(self._live, self._memory)):
            return
        if self._starting:
            victim = self._starting.pop()
        else:
            row = max(range(len(self._live)), key=lambda r: self._live[r].id)
            victim = self._live[row]
            self._take_out(row)
            self._drafting.preempt([victim.id])
        self._free(victim)
        self._scheduler.put_back(victim)
        self._stats.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self._memory.free(sequence)
        if self.small:
            self.small.free(sequence)

    def _propose(self, budgets: np.ndarray, temperatures: np.ndarray) -> Proposal:
        self._lap("other_seconds")
        proposal = self._drafting.propose(DraftRequest([s.id for s in self._live], budgets, temperatures))
        self._lap("drafter_seconds")
        return proposal

    def _forward_small(self) -> Tensor | None:
        """Logits [rows, V] of the sequences that the small model samples; None where there are none."""
        sequences = [s for s in self._live if on_small(s)]
        if self.small is None or not sequences:
            return None
        logits = self.small.forward(sequences)
        self._lap("forward_seconds")
        return logits

    def _forward(
        self, proposal: Proposal, states: list[Tensor] | None, small_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] after each sequence's last token and after each of its draft tokens, and their logits
        [N, V]; `states` as for `Decoder.forward`. Where the small model samples, there are logits alone."""
        live, counts = self._live, proposal.lengths + 1
        rows = np.flatnonzero([small_logits is None or not on_small(s) for s in live])
        if small_logits is not None and not len(rows):
            return small_logits[:, :0], small_logits
        held = np.array([s.held for s in live], np.int64)[rows]
        evicted = np.array([s.evicted for s in live], np.int64)[rows] if self._compressor else None
        last = np.array([s.last_token for s in live], np.int64)
        used = np.arange(proposal.token_ids.shape[1] + 1) < counts[:, None]
        tokens = np.concatenate([last[:, None], proposal.token_ids], axis=1)[rows][used[rows]]
        plan = self._memory.cache.plan(self._tables[rows], held, counts[rows], evicted)
        packed = torch.from_numpy(tokens).to(self.decoder.device)
        hidden = self.decoder.forward(packed, plan, self._memory.cache, states)
        logits = self.decoder.logits(hidden)
        if small_logits is not None:
            logits = together(rows, counts, logits, small_logits)
        return hidden, logits

    def _verify(self, logits: Tensor, proposal: Proposal) -> VerifiedTokens:
        seeds = np.array([s.seed for s in self._live], np.int64)
        positions = np.array([s.count for s in self._live], np.int64)
        slots = np.array([s.slot for s in self._live], np.int64)
        probabilistic = proposal.probabilities is not None
        # From here on no seed has a text of its own anyway, and a drafter that remembers what a seed led to must not
        # meet the same numbers again.
        self._salt = self._salt or probabilistic
        if self._salt:
            seeds = salted(seeds, np.array([s.id + 1 for s in self._live], np.int64))
        temperatures = self._processors.temperatures(slots)
        if not probabilistic and temperatures is not None and logits.device.type == "cpu":
            return verify_plain(
                logits, temperatures, proposal.token_ids, proposal.lengths, seeds, positions, self.capabilities.entropy
            )
        target = self._processors.target(
            logits, slots, positions, proposal.token_ids, proposal.lengths, self.capabilities.entropy
        )
        return verify(
            target,
            proposal.token_ids,
            proposal.lengths,
            TokenUniforms.draw(seeds, positions, proposal.lengths, probabilistic, logits.device, self._block),
            proposal.probabilities,
            proposal.sampled,
            self._block,
        )

    def _emissions(self, verified: VerifiedTokens, proposal: Proposal, logits: Tensor) -> list[Emission]:
        accepted, logprobs = verified.accepted.cpu().numpy(), verified.logprobs.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise RunFailed(f"publication {self.version} gives log-probs that are not numbers; its weights are broken")
        tokens = verified.tokens.cpu().numpy()
        entropies = None if verified.entropies is None else verified.entropies.cpu().numpy()
        emissions, kept = [], _kept_by_row(verified)
        starts = np.cumsum(proposal.lengths + 1) - (proposal.lengths + 1)
        for row, sequence in enumerate(self._live):
            n = int(accepted[row])
            emission = Emission(
                tokens[row, : n + 1],
                logprobs[row, : n + 1],
                None if entropies is None else entropies[row, : n + 1],
                int(proposal.lengths[row]),
                n,
                kept[row].first(n + 1) if sequence.request.sampling.truncates else None,
            )
            if self.small:
                emission = self.small.cut(sequence, emission, logits[starts[row] :])
            emissions.append(sequence.cut_at_stop(emission))
        return emissions

    def _observe(
        self,
        emissions: list[Emission],
        hidden: Tensor,
        logits: Tensor,
        states: list[Tensor] | None,
        proposal: Proposal,
        seconds: float,
    ) -> None:
        self._drafting.observe(
            Verified(
                ids=[s.id for s in self._live],
                emitted=[e.token_ids for e in emissions],
                accepted=np.array([e.accepted for e in emissions], np.int64),
                hidden=hidden if Needs.HIDDEN_STATES in self._drafting.needs else None,
                logits=logits if Needs.LOGITS in self._drafting.needs else None,
                starts=np.cumsum(proposal.lengths + 1) - (proposal.lengths + 1),
                seconds=seconds,
                layers=None if states is None else torch.stack(states),
            )
        )

    def _finish(self) -> list[FinishedSample]:
        rows = [row for row, s in enumerate(self._live) if s.finish_reason]
        done = [self._live[row].finished(self.capabilities.entropy) for row in rows]
        self._release(rows)
        for sample in done:
            self._scheduler.finished(sample.group)
            self._groups[sample.group] -= 1
            if not self._groups[sample.group]:
                del self._groups[sample.group]
                if self.small:
                    self.small.memory.forget_prompt(sample.group)
        self._lap("other_seconds")
        return done

    def _release(self, rows: list[int]) -> None:
        """Ends live sequences."""
        self._end([self._live[row] for row in rows])
        for row in sorted(rows, reverse=True):
            self._free(self._live[row])
            self._take_out(row)

    def _take_out(self, row: int) -> None:
        """The last live sequence moves into the hole, so that live ones stay in the first rows."""
        last = len(self._live) - 1
        self._live[row], self._tables[row] = self._live[last], self._tables[last]
        self._live.pop()

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


def _kept_by_row(verified: VerifiedTokens) -> list[KeptIds]:
    """Of each row's columns; empty where nothing was truncated."""
    if verified.kept_counts is None or verified.kept_ids is None:
        return []
    counts, ids = verified.kept_counts.cpu().numpy(), verified.kept_ids.cpu().numpy()
    parts = np.split(ids, counts.sum(1).cumsum()[:-1])
    return [KeptIds(row, part) for row, part in zip(counts, parts, strict=True)]
