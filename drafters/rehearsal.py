"""A generator in small, on a random model, that takes a drafter through what happens to it in an engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from drafters.base import Drafter, DraftRequest, Needs, Places, Proposal, SequenceStart, Verified, locked
from drafters.guard import CALL_SECONDS, Host, checked
from pipeline.models.config import ModelConfig, RopeParameters
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache
from pipeline.models.tokenizer import Tokenizer
from pipeline.sampling.target import plain_target
from pipeline.sampling.verification import TokenUniforms, packed_rows, verify

VOCABULARY = 24
STOP = 2
_PAGES = 1024


def tiny_target(seed: int = 0) -> Decoder:
    """A random model of 24 tokens whose text repeats itself often enough for drafts to be accepted."""
    config = ModelConfig(
        architecture="Qwen3ForCausalLM", vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, layers=2, heads=2,
        kv_heads=1, head_dim=8, rms_norm_eps=1e-6, rope=RopeParameters(), tied_head=True, qk_norm=True, qkv_bias=False,
        output_bias=False, max_positions=256, dtype="float32", bos_token_id=1, eos_token_ids=(STOP,),
    )  # fmt: skip
    decoder = Decoder(config, torch.float32, torch.device("cpu"))
    load_random(decoder, seed)
    return decoder


def load_random(decoder: Decoder, seed: int) -> None:
    """Other weights for the same model."""
    generator = torch.Generator().manual_seed(seed)

    def weight(name: str) -> torch.Tensor:
        shape = decoder.shapes[name]
        if len(shape) == 1:
            return 1.0 + 0.1 * torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator) * (0.55 if "embed" in name else 0.3)

    decoder.load(weight)


@dataclass(slots=True)
class _Text:
    start: SequenceStart
    limit: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    """of the rehearsal's cache, as many as the text may come to need"""

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache, once it has pages: all but the last."""
        return len(self.start.prompt_ids) + len(self.tokens) - 1

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.limit or (bool(self.tokens) and self.tokens[-1] == STOP)


@dataclass
class Rehearsal:
    """Generates with a drafter as an engine does: one verification a step for all live sequences, over one cache that
    the drafter can get at, too.

    `proposals` keeps what was proposed, step by step: ids of the rows and a copy of each draft.
    """

    drafter: Drafter | None
    target: Decoder
    budget: int = 4
    live: list[_Text] = field(default_factory=list)
    finished: dict[int, list[int]] = field(default_factory=dict)
    proposals: list[dict[int, list[int]]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    _handed: Proposal | None = None
    """what the drafter proposed last, in its own arrays"""

    def __post_init__(self) -> None:
        self.cache = KVCache(self.target.config, self.target.dtype, self.target.device, _PAGES)
        if isinstance(self.drafter, Host):
            self.drafter.host(self.target.config.vocab_size, _loudly, CALL_SECONDS)
        if self.drafter is not None and Needs.TARGET_LAYERS in self.drafter.needs:
            self.drafter.attach(self)

    @property
    def decoder(self) -> Decoder:
        return self.target

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None

    @property
    def max_sequences(self) -> int:
        return 16

    def places(self, ids: Sequence[int]) -> Places:
        """As `drafters.base.Target` says."""
        texts = {text.start.id: text for text in self.live}
        return Places(_tables([texts[i] for i in ids]), np.array([texts[i].cached for i in ids], np.int64))

    def begin(self, sequences: Sequence[SequenceStart], limit: int) -> None:
        texts = [_Text(start, limit) for start in sequences]
        self._take_places(texts)
        self.live += texts
        if self.drafter is not None:
            self.drafter.begin(self._starts(texts))

    def preempt(self, ids: Sequence[int]) -> list[_Text]:
        """Takes sequences out of the batch."""
        out = [text for text in self.live if text.start.id in ids]
        self._give_places_back(out)
        self.live = [text for text in self.live if text.start.id not in ids]
        if self.drafter is not None:
            self.drafter.preempt(ids)
        return out

    def restore(self, texts: Sequence[_Text]) -> None:
        self._take_places(texts)
        self.live += texts
        if self.drafter is not None:
            self.drafter.restore(self._starts(texts))

    def cancel(self, ids: Sequence[int]) -> None:
        self._give_places_back([text for text in self.live if text.start.id in ids])
        self.live = [text for text in self.live if text.start.id not in ids]
        if self.drafter is not None:
            self.drafter.end(ids)

    @torch.no_grad()
    def _take_places(self, texts: Sequence[_Text]) -> None:
        """Pages, and the keys and values of all but the last token."""
        for text in texts:
            text.pages = self.cache.take(-(-(len(text.start.prompt_ids) + text.limit) // PAGE))
        behind = [text for text in texts if text.cached]
        if behind:
            packed = np.concatenate([[*text.start.prompt_ids, *text.tokens][:-1] for text in behind])
            counts = np.array([text.cached for text in behind], np.int64)
            plan = self.cache.plan(_tables(behind), np.zeros(len(behind), np.int64), counts)
            self.target.forward(torch.from_numpy(packed.astype(np.int64)), plan, self.cache)

    def _give_places_back(self, texts: Sequence[_Text]) -> None:
        for text in texts:
            self.cache.release(text.pages)
            text.pages = []

    def run(self) -> dict[int, list[int]]:
        while self.live:
            self.step()
        return self.finished

    @torch.no_grad()
    def step(self) -> None:
        """One verification of every live sequence, if there are any."""
        if not self.live:
            return
        proposal = self._propose()
        states: list[torch.Tensor] = []
        hidden, logits = self._forward(proposal, states)
        starts = [text.start for text in self.live]
        seeds = np.array([start.seed for start in starts], np.int64)
        positions = np.array([len(text.tokens) for text in self.live], np.int64)
        temperatures = np.array([start.temperature for start in starts], np.float32)
        packed, _ = packed_rows(proposal.lengths)
        verified = verify(
            plain_target(logits, torch.from_numpy(temperatures[packed])),
            proposal.token_ids,
            proposal.lengths,
            TokenUniforms.draw(seeds, positions, proposal.lengths, proposal.probabilities is not None, logits.device),
            proposal.probabilities,
            proposal.sampled,
        )
        emitted, accepted = [], np.zeros(len(self.live), np.int64)
        for row, text in enumerate(self.live):
            tokens = verified.tokens[row, : int(verified.accepted[row]) + 1].tolist()
            if STOP in tokens:
                tokens = tokens[: tokens.index(STOP) + 1]
            accepted[row] = min(int(verified.accepted[row]), len(tokens))
            text.tokens += tokens
            emitted.append(locked(np.array(tokens, np.int64)))
        self._observe(proposal, hidden, logits, states, emitted, accepted)

    def _starts(self, texts: Sequence[_Text]) -> list[SequenceStart]:
        """As an engine tells them: with the response so far, and hidden states where they are asked for."""
        assert self.drafter is not None
        starts = [
            replace(
                text.start,
                prompt_ids=locked(text.start.prompt_ids.copy()),
                response_ids=locked(np.array(text.tokens, np.int64)),
            )
            for text in texts
        ]
        if Needs.HIDDEN_STATES not in self.drafter.needs or not starts:
            return starts
        tokens = [[*text.start.prompt_ids.tolist(), *text.tokens] for text in texts]
        hidden = self._hidden(tokens).split([len(t) for t in tokens])
        return [replace(start, hidden=h[:-1]) for start, h in zip(starts, hidden, strict=True)]

    def _propose(self) -> Proposal:
        ids = [text.start.id for text in self.live]
        # Ragged on purpose: a budget is anything from nothing to as much as is left.
        most = [
            min(text.limit - len(text.tokens) - 1, (text.start.id + self.budget) % (self.budget + 1))
            for text in self.live
        ]
        temperatures = np.array([text.start.temperature for text in self.live], np.float32)
        request = DraftRequest(ids, locked(np.array(most, np.int64)), locked(temperatures))
        proposal = self._handed = Proposal.empty(len(ids))
        if self.drafter is not None and any(most):
            shown = DraftRequest([*ids], request.budgets.copy(), temperatures.copy())
            self._handed = self.drafter.propose(shown)
            proposal = checked(self._handed, request, self.target.config.vocab_size)
            same = np.array_equal(shown.budgets, most) and np.array_equal(shown.temperatures, temperatures)
            assert same and shown.ids == ids, "it writes into the request, which is for reading; copy what you change"
        self.proposals.append(_drafts(ids, proposal))
        self.drafted += int(proposal.lengths.sum())
        return proposal

    def _forward(
        self, proposal: Proposal, states: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits [N, ...] after each last token and each draft token."""
        rows = zip(self.live, proposal.token_ids, proposal.lengths, strict=True)
        packed = np.concatenate([[[*text.start.prompt_ids, *text.tokens][-1], *ids[:n]] for text, ids, n in rows])
        cached = np.array([text.cached for text in self.live], np.int64)
        plan = self.cache.plan(_tables(self.live), cached, proposal.lengths + 1)
        hidden = self.target.forward(torch.from_numpy(packed.astype(np.int64)), plan, self.cache, states)
        return hidden, self.target.logits(hidden)

    @torch.no_grad()
    def _hidden(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Final-norm hidden states [N, H] of all tokens of the texts, computed anew."""
        counts = np.array([len(text) for text in texts], np.int64)
        pages = -(-int(counts.max()) // PAGE)
        cache = KVCache(self.target.config, self.target.dtype, self.target.device, len(texts) * pages)
        tables = np.array(cache.take(len(texts) * pages), np.int64).reshape(len(texts), pages)
        plan = cache.plan(tables, np.zeros(len(texts), np.int64), counts)
        return self.target.forward(torch.tensor(np.concatenate(texts)), plan, cache)

    def _observe(
        self,
        proposal: Proposal,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        states: list[torch.Tensor],
        emitted: list[np.ndarray],
        accepted: np.ndarray,
    ) -> None:
        done = [text for text in self.live if text.done]
        if self.drafter is not None:
            needs = self.drafter.needs
            self.drafter.observe(
                Verified(
                    [text.start.id for text in self.live],
                    emitted,
                    locked(accepted),
                    hidden if Needs.HIDDEN_STATES in needs else None,
                    logits if Needs.LOGITS in needs else None,
                    locked(np.cumsum(proposal.lengths + 1) - (proposal.lengths + 1)),
                    layers=torch.stack(states) if Needs.LAYER_STATES in needs else None,
                )
            )
            assert self._handed is not None
            same = _drafts([text.start.id for text in self.live], self._handed) == self.proposals[-1]
            assert same, "it writes into a proposal that it has handed out; keep a copy of what you change"
            if done:
                self.drafter.end([text.start.id for text in done])
        self._give_places_back(done)
        self.finished |= {text.start.id: text.tokens for text in done}
        self.accepted += int(accepted.sum())
        self.live = [text for text in self.live if not text.done]


def _loudly(event: str) -> None:
    """An engine goes on without a hosted drafter that fails; its author wants to know."""
    raise AssertionError(event)


def _drafts(ids: Sequence[int], proposal: Proposal) -> dict[int, list[int]]:
    """The draft of each sequence."""
    rows = zip(ids, proposal.token_ids, proposal.lengths, strict=True)
    return {i: tokens[:n].tolist() for i, tokens, n in rows}


def _tables(texts: Sequence[_Text]) -> np.ndarray:
    """int64 [B, most pages], short rows filled with page 0."""
    table = np.zeros((len(texts), max(len(text.pages) for text in texts)), np.int64)
    for row, text in enumerate(texts):
        table[row, : len(text.pages)] = text.pages
    return table


def sequences(
    count: int, first: int = 0, temperature: float | None = None, group: int | None = None
) -> list[SequenceStart]:
    """Mixed temperatures, greedy among them, in groups of three that share a prompt."""
    prompts = [[1, 5, 9, 5, 9], [1], list(range(3, 20)), [7, 7, 7]]
    temperatures = [1.0, 0.5, 0.0]
    return [
        SequenceStart(
            i,
            np.array(prompts[(i // 3 if group is None else group) % len(prompts)], np.int64),
            i // 3 if group is None else group,
            temperatures[i % 3] if temperature is None else temperature,
            1000 + i,
        )
        for i in range(first, first + count)
    ]
