"""The small model beside the policy: its keys and values, and the forward passes of sequences that it is sampling."""

from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drafters.base import Drafter, Needs
from pipeline.config.types import Config
from pipeline.engine.native.compression import page_table
from pipeline.engine.native.memory import Admission, Memory
from pipeline.engine.native.prefill import prefill
from pipeline.engine.native.sequence import Emission, Sequence
from pipeline.engine.native.switching import SwitchingRule, SwitchState
from pipeline.errors import UsageError
from pipeline.messages import Sampler
from pipeline.models.checkpoint import load_decoder, load_small_model_into
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import KVCache, page_bytes
from pipeline.models.tokenizer import check_same_tokenizer
from pipeline.sampling.distribution import entropy, log_probabilities

OPTION = "engine.switching.small_model"
ALL_AT_ONCE = 1 << 62
"""Tokens of a catch-up: a switch waits for nothing."""


class Copy(Sequence):
    """What the small model holds of a sequence: pages and cached tokens of its own, the text the sequence's.

    Vocabularies of one tokenizer may be padded to different sizes. An id that the small model has no embedding for is
    no token's; if the policy draws it all the same, the small model reads its own last id.
    """

    __slots__ = ("last_id", "of", "reads_record", "state")

    def __init__(self, of: Sequence, rule: SwitchingRule, recorded: bool, vocab_size: int) -> None:
        super().__init__(of.id, of.request, of.sample, 0, of.stop)
        self.of, self.state, self.last_id = of, SwitchState(rule, of.seed), vocab_size - 1
        params = of.sampling
        self.reads_record = recorded and params.temperature in (0, 1) and not (params.masks or params.penalises)
        """whether the entropies recorded of its tokens are those before temperature and settings"""

    @property
    def target(self) -> int:
        return self.of.target

    @property
    def last_token(self) -> int:
        return min(self.of.last_token, self.last_id)

    def text(self, begin: int, end: int) -> np.ndarray:
        return np.minimum(self.of.text(begin, end), self.last_id)


class SmallModel:
    """A second decoder with a KV cache of its own. Sequences that may switch have a `Copy` here, in `Sequence.copy`.

    Both caches have room for the same number of tokens. A cache is behind while the other model samples, and catches up
    when its model takes over, by one prefill of the tokens it missed.
    """

    def __init__(
        self, model: str | Path | Decoder, rule: SwitchingRule, policy: Decoder, folder: Path | None, length: int
    ) -> None:
        """
        Args:
            model: checkpoint directory, or a decoder to use.
            rule: of sequences that begin from now on.
            policy: the large model; dtype and device are its own.
            folder: of the policy's checkpoint, None: it has none, and nothing can be said of its tokenizer.
            length: longest sequence, in tokens.

        Raises:
            UsageError: another tokenizer, another device, or fewer positions than `length`.
        """
        self.rule = rule
        if isinstance(model, Decoder):
            self.decoder = model
        else:
            if folder is not None:
                check_same_tokenizer(folder, Path(model), OPTION)
            self.decoder = load_decoder(model, policy.dtype, policy.device)
        if self.decoder.device != policy.device:
            raise UsageError(f"the small model is on {self.decoder.device}, the policy on {policy.device}; use one")
        _check_positions(self.decoder.config, length)
        self._vocab_size = policy.config.vocab_size
        self.caught_up = {Sampler.POLICY: 0, Sampler.SWITCHED_MODEL: 0}
        """tokens that catch-ups computed, by the model that took over"""
        self.handed_over = 0
        """tokens that the small model was asked for, and the policy sampled"""
        self.page_bytes = page_bytes(self.decoder.config, self.decoder.dtype)

    @classmethod
    def beside(
        cls,
        model: str | Path | Decoder | None,
        rule: SwitchingRule | None,
        policy: Decoder,
        folder: Path | None,
        length: int,
        drafter: Drafter,
        compresses: bool,
    ) -> "SmallModel | None":
        """As the constructor, for a generator with this drafter and perhaps a compressed cache; None without a model.

        Raises:
            UsageError: also where model and rule do not come together, or do not go with the drafter or the cache.
        """
        if (model is None) != (rule is None):
            raise UsageError("a small model needs a switching rule, and a rule a small model; give both, or none")
        if model is None or rule is None:
            return None
        check_together(drafter, compresses)
        return cls(model, rule, policy, folder, length)

    def set_pages(self, pages: int) -> None:
        """An empty cache of so many pages."""
        decoder = self.decoder
        self.memory = Memory(KVCache(decoder.config, decoder.dtype, decoder.device, pages))

    def load_weights(self, folder: Path) -> bool:
        """Those of a publication, where it has any, which is returned; keys and values go on as the policy's do.

        Raises:
            UsageError: they are not this model's; nothing has changed then.
        """
        loaded = load_small_model_into(self.decoder, folder)
        if loaded:
            self.weights_changed()
        return loaded

    def weights_changed(self) -> None:
        """They are others now."""
        self.memory.forget_prompts()

    def begin(self, sequence: Sequence, recorded: bool) -> None:
        """`recorded`: whether entropies are."""
        if not sequence.request.policy_only:
            sequence.copy = Copy(sequence, self.rule, recorded, self.decoder.config.vocab_size)

    def admission(self, starting: Items[Sequence], live: Items[Sequence]) -> Admission:
        """Who may start for all that this cache holds: any sequence may come to the small model at any token."""
        admission = Admission(self.memory, [s.copy for s in live if s.copy is not None])
        for sequence in starting:
            if not sequence.request.policy_only:
                admission.add(self.copy_of(sequence))
        return admission

    def copy_of(self, sequence: Sequence) -> Copy:
        """What the small model holds of a sequence, or would."""
        return sequence.copy or Copy(sequence, self.rule, False, self.decoder.config.vocab_size)

    def free(self, sequence: Sequence) -> None:
        if sequence.copy is not None:
            self.memory.free(sequence.copy)

    def free_idle(self, live: Items[Sequence], policy: Memory) -> bool:
        """Takes the memory of the model that does not sample from every live sequence; whether there was any."""
        freed = self.memory.forget_prompts()
        for sequence in live:
            if sequence.copy is None:
                continue
            memory, idle = (policy, sequence) if on_small(sequence) else (self.memory, sequence.copy)
            freed = freed or bool(idle.pages)
            memory.free(idle)
        return freed

    def catch_up(self, live: Items[Sequence], decoder: Decoder, memory: Memory) -> tuple[bool, list[int]]:
        """Computes what the models at work have missed; `decoder` and `memory` are the policy's.

        Returns:
            Whether all have caught up, or there was not memory enough; and the rows whose policy cache changed.
        """
        copies: list[Sequence] = [s.copy for s in live if on_small(s) and s.copy is not None and not s.copy.ready]
        rows = [row for row, s in enumerate(live) if not on_small(s) and not s.ready]
        if copies:
            self.caught_up[Sampler.SWITCHED_MODEL] += prefill(self.decoder, self.memory, copies, ALL_AT_ONCE, False)
        if rows:
            behind = [live[row] for row in rows]
            self.caught_up[Sampler.POLICY] += prefill(decoder, memory, behind, ALL_AT_ONCE, False)
        return all(c.ready for c in copies) and all(live[row].ready for row in rows), rows

    def forward(self, sequences: list[Sequence]) -> Tensor:
        """Logits [B, V] after the last token of each; they have caught up, and have room for it."""
        copies = [s.copy for s in sequences if s.copy is not None]
        cached = np.array([c.cached for c in copies], np.int64)
        last = torch.from_numpy(np.array([c.last_token for c in copies], np.int64)).to(self.decoder.device)
        plan = self.memory.cache.plan(page_table(list(copies)), cached, np.ones(len(copies), np.int64))
        logits = self.decoder.logits(self.decoder.forward(last, plan, self.memory.cache))
        return self._in_vocabulary(logits)

    def _in_vocabulary(self, logits: Tensor) -> Tensor:
        """As wide as the policy's: what the small model lacks it never draws."""
        missing = self._vocab_size - logits.shape[1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self._vocab_size]

    def hand_over(self, sequences: Items[Sequence], logits: Tensor) -> bool:
        """The policy takes over those tokens that the small model is too uncertain of; whether there were any.

        Args:
            sequences: that `forward` was asked about.
            logits: [B, V], what it returned.
        """
        if not self.rule.before_sampling:
            return False
        logprobs, before = log_probabilities(logits), self.handed_over
        for sequence, h in zip(sequences, entropy(logprobs.exp(), logprobs).tolist(), strict=True):
            copy = sequence.copy
            if copy is not None and copy.state.hand_over(h):
                copy.cached += 1  # the pass read the last token
                self.handed_over += 1
        return self.handed_over > before

    def entropies(self, batch: Items[Sequence], logits: Tensor, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """float32 [N], nats, before any setting, of the positions of sequences that may switch and whose recorded
        entropies are others; 0 elsewhere.

        Args:
            batch: B sequences.
            logits: [N, V] of their positions, packed row by row.
            starts: int64 [B], each row's first position.
            counts: int64 [B], its positions.
        """
        found = np.zeros(len(logits), np.float32)
        rows = [row for row, s in enumerate(batch) if s.copy is not None and not s.copy.reads_record]
        if rows:
            where = np.concatenate([np.arange(starts[row], starts[row] + counts[row]) for row in rows])
            logprobs = log_probabilities(logits[torch.from_numpy(where).to(logits.device)])
            found[where] = entropy(logprobs.exp(), logprobs).cpu().numpy()
        return found

    def cut(self, sequence: Sequence, emission: Emission, entropies: np.ndarray) -> Emission:
        """The emission up to a switch; the rest was sampled by a model that was no longer to sample.

        `entropies` [at least n] are those of `entropies` for the emission's n tokens.
        """
        copy, count = sequence.copy, len(emission.token_ids)
        if copy is None:
            return emission
        recorded = emission.entropies if copy.reads_record else None
        n = copy.state.follow((entropies[:count] if recorded is None else recorded).tolist())
        return emission if n == count else emission.first(n)


def together(rows: np.ndarray, counts: np.ndarray, logits: Tensor, small_logits: Tensor) -> Tensor:
    """Logits [N, V] of all sequences' positions, `counts` [B] of each: of `rows` those in `logits`, of the others,
    which have one position each, those in `small_logits`."""
    large = np.zeros(len(counts), np.bool_)
    large[rows] = True
    whose = torch.from_numpy(np.repeat(large, counts)).to(logits.device)
    out = logits.new_empty(len(whose), logits.shape[1])
    out[whose], out[~whose] = logits, small_logits
    return out


def on_small(sequence: Sequence) -> bool:
    """Whether the small model samples the next token."""
    return sequence.copy is not None and sequence.copy.state.small


def check_switching(config: Config, drafter: Drafter) -> None:
    """What can be known before a policy is loaded.

    Raises:
        UsageError: a drafter, a small model or a tokenizer that does not fit, or too few positions for a sample.
    """
    switching = config.engine.switching
    if not switching.small_model:
        return
    if config.engine.generator != "native":
        raise UsageError(f"{OPTION} needs engine.generator = native, not {config.engine.generator}; change one of them")
    check_together(drafter, config.engine.kv_compression.policy.get("name") != "none")
    small = ModelConfig.from_folder(switching.small_model)
    if config.model.path:
        check_same_tokenizer(Path(config.model.path), Path(switching.small_model), OPTION)
    _check_positions(small, config.sampling.max_prompt_tokens + config.sampling.max_new_tokens)


def _check_positions(small: ModelConfig, length: int) -> None:
    if length > small.max_positions:
        raise UsageError(
            f"prompt and response of {length} tokens exceed the small model's {small.max_positions} positions; lower "
            "sampling.max_prompt_tokens or sampling.max_new_tokens, or take another engine.switching.small_model"
        )


def check_together(drafter: Drafter, compresses: bool) -> None:
    """Refuse what cannot run beside a small model.

    Raises:
        UsageError: a drafter that must see every token's hidden states, since the small model's are not the policy's; a
            compressed cache, which would have to catch up on tokens it has dropped.
    """
    refused = drafter.needs & ~(Needs.LOGITS | Needs.TARGET_LAYERS)
    if refused:
        what = ", ".join((need.name or "").lower().replace("_", " ") for need in refused)
        raise UsageError(
            f"drafter {drafter.name} needs the policy's {what} of every token, and there are none of those that "
            f"{OPTION} samples; use suffix-automaton, prompt-lookup or draft-model, or leave the small model out"
        )
    if compresses:
        raise UsageError(f"engine.kv_compression and {OPTION} do not go together yet; take one of them out")
