"""Drafts of a multi-token-prediction head, reused for one token after another."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from msgspec import Meta, Struct
from torch import Tensor

from drafters.base import BaseDrafter, DraftRequest, Needs, Proposal, SequenceStart, Verified
from drafters.mtp.head import MTPHead, head_files, load_head
from drafters.mtp.texts import Text, Texts
from pipeline.errors import UsageError
from pipeline.models.decoder import Decoder
from pipeline.sampling.distribution import inverse_cdf


class MTPDrafter(BaseDrafter):
    """Draws from a trained multi-token-prediction head that reads the target's hidden states (rollahead train-drafter).

    The head reads every verified token with the target's true hidden state before it drafts on its own; what its own
    drafts left in its cache is overwritten then.
    """

    name = "mtp"
    needs = Needs.HIDDEN_STATES | Needs.TARGET_LAYERS

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """`path` is the folder of the head; empty: the model's own. Drafts have up to `max_tokens` tokens, drawn from
        the head's distribution at the sequence's temperature (`probabilistic`, verified with it) or its likeliest ones
        (`greedy`); a greedy draft ends where the product of its probabilities falls below `stop_below`. `seed` is that
        of the draws."""

        path: str = ""
        max_tokens: Annotated[int, Meta(ge=1)] = 4
        sampling: Literal["probabilistic", "greedy"] = "probabilistic"
        stop_below: Annotated[float, Meta(ge=0, le=1)] = 0.0
        seed: int = 0

    def __init__(self, options: Options | None = None, weights: Mapping[str, Tensor] | None = None) -> None:
        """
        Args:
            options: from the configuration.
            weights: the head's tensors, where they are in memory; None: from a folder.
        """
        self.options = options or self.Options()
        self._weights = weights
        self._generator = torch.Generator().manual_seed(self.options.seed)
        self._greedy = self.options.sampling == "greedy"
        self._texts: Texts

    # ---- weights -------------------------------------------------------------------------------------------------

    def attach(self, target: object) -> None:
        """
        Raises:
            UsageError: there is no head, or it does not fit the target.
        """
        assert isinstance(target, Decoder)
        self._target, self._head = target, MTPHead(target)
        if self._weights is not None:
            self._head.load(self._weights.__getitem__)
        elif self.options.path or target.source:
            load_head(self._head, self.options.path or str(target.source))
        else:
            raise UsageError("drafter mtp needs a head: give its folder as option path, or a model that holds one")
        self._texts = Texts(self._head)

    def weights_changed(self, version: int) -> None:
        """Embedding and output head are the target's own; a publication may bring a head beside them."""
        source = self._target.source
        if source is not None and self._weights is None and head_files(source):
            load_head(self._head, source)
        self._texts.forget_prompts()

    # ---- sequences -----------------------------------------------------------------------------------------------

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            self._texts.begin(start)

    restore = begin

    def preempt(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._texts.pause(i)

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._texts.end(i)

    def observe(self, verified: Verified) -> None:
        assert verified.hidden is not None and verified.starts is not None
        for i, emitted, start in zip(verified.ids, verified.emitted, verified.starts.tolist(), strict=True):
            if len(emitted):
                text = self._texts[i]
                text.tokens.append(emitted)
                text.hidden.append(verified.hidden[start : start + len(emitted)])

    # ---- drafts --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propose(self, request: DraftRequest) -> Proposal:
        budgets = np.minimum(request.budgets, self.options.max_tokens)
        self._texts.catch_up([i for i, budget in zip(request.ids, budgets.tolist(), strict=True) if budget])
        # Nothing can be drafted after a prompt of a single token, whose successor no row predicts.
        known = np.array([self._texts[i].last is not None for i in request.ids], np.bool_)
        rows = np.flatnonzero((budgets > 0) & known)
        if not len(rows):
            return Proposal.empty(len(request.ids))
        return self._drafts(request, rows, budgets)

    def _drafts(self, request: DraftRequest, rows: np.ndarray, budgets: np.ndarray) -> Proposal:
        texts = [self._texts[request.ids[row]] for row in rows]
        width = int(budgets[rows].max())
        draft = _Draft(len(request.ids), width, request.temperatures, self._greedy, self._generator)
        cached = np.array([text.cached for text in texts], np.int64)
        tables = self._texts.tables(texts, (cached + budgets[rows] - 1).tolist())
        hidden = torch.stack([_last(text) for text in texts])
        while True:
            drawn = draft.extend(rows, self._head.logits(hidden))
            on = (budgets[rows] > draft.depth) & (draft.survival[rows] >= self.options.stop_below)
            if draft.depth == width or not on.any():
                return draft.proposal()
            if not on.all():
                kept = torch.from_numpy(np.flatnonzero(on)).to(drawn.device)
                drawn, hidden = drawn[kept], hidden[kept]
                rows, tables, cached = rows[on], tables[on], cached[on]
            plan = self._texts.cache.plan(tables, cached + draft.depth - 1, np.ones(len(rows), np.int64))
            hidden = self._head.forward(drawn, hidden, plan, self._texts.cache)

    def counters(self) -> dict[str, float]:
        return {"kv_bytes": self._texts.cache.bytes}


class _Draft:
    """Drafts of B rows as they grow, one depth after another."""

    def __init__(
        self, rows: int, width: int, temperatures: np.ndarray, greedy: bool, generator: torch.Generator
    ) -> None:
        self._generator, self._greedy = generator, greedy
        self._temperatures = temperatures
        self._sampled = np.zeros(rows, np.bool_) if greedy else temperatures > 0
        self._width = width
        self._tokens, self._lengths = np.zeros((rows, width), np.int64), np.zeros(rows, np.int64)
        self._confidences = np.zeros((rows, width), np.float32)
        self._q: Tensor | None = None
        self.survival = np.ones(rows)
        """of each row, the product of its tokens' probabilities; of drawn rows 1, since a draft that were to end by
        what was drawn would no longer be drawn from the distribution it states"""
        self.depth = 0

    def extend(self, rows: np.ndarray, logits: Tensor) -> Tensor:
        """The next token, int64 [A] on the device, of A rows by the head's logits [A, V]."""
        device, temperatures = logits.device, self._temperatures[rows]
        hot = torch.from_numpy(np.where(temperatures > 0, temperatures, 1.0)).to(device)
        q = torch.softmax(logits / hot.unsqueeze(1), -1)
        best, tokens = q.max(-1)
        sampled = self._sampled[rows]
        if sampled.any():
            uniform = torch.rand(len(rows), generator=self._generator, dtype=torch.float64).to(device)
            drawn = inverse_cdf(q, uniform)
            tokens = drawn if sampled.all() else torch.where(torch.from_numpy(sampled).to(device), drawn, tokens)
            if self._q is None:
                self._q = q.new_zeros(len(self._lengths), self._width, q.shape[1])
            self._q[torch.from_numpy(rows).to(device), self.depth] = q
        confidences = best.cpu().numpy()
        self.survival[rows] *= np.where(sampled, 1.0, confidences)
        # What is known before anything is drawn: a choice by more would not leave the draft its distribution.
        known = self._confidences[rows, 0] if self.depth else confidences
        self._confidences[rows, self.depth] = np.where(sampled, known, confidences)
        self._tokens[rows, self.depth] = tokens.cpu().numpy()
        self.depth += 1
        self._lengths[rows] = self.depth
        return tokens

    def proposal(self) -> Proposal:
        sampled = self._sampled if self._q is not None else None
        return Proposal(self._tokens, self._lengths, self._q, sampled=sampled, confidences=self._confidences)


def _last(text: Text) -> Tensor:
    assert text.last is not None
    return text.last
