"""Drafts of a multi-token-prediction head, reused for one token after another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta, Struct
from torch import Tensor

from drafters.base import BaseDrafter, DraftRequest, Needs, Proposal, SequenceStart, Target, Verified
from drafters.drawing import Chained, Drawing, Wanted, draw_whole
from drafters.mtp.fitting import check_fits
from drafters.mtp.head import PREFIX, MTPHead, head_files, load_head, load_published
from drafters.mtp.texts import Text, Texts
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig


class MTPDrafter(BaseDrafter):
    """Draws from a trained multi-token-prediction head that reads the target's hidden states (rollahead train-drafter).

    The head reads every verified token with the target's true hidden state before it drafts on its own; what its own
    drafts left in its cache is overwritten then.
    """

    name = "mtp"
    needs = Needs.HIDDEN_STATES | Needs.TARGET_LAYERS

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """`path` is the folder of the head; empty: the model's own. Drafts have up to `max_tokens` tokens, drawn from
        the head's distribution at the sequence's temperature and verified with it, or, with `greedy`, its likeliest
        ones; a draft ends with the first token that came from a distribution with a peak below `stop_below`."""

        path: str = ""
        max_tokens: Annotated[int, Meta(ge=1)] = 4
        greedy: bool = False
        stop_below: Annotated[float, Meta(ge=0, le=1)] = 0.0

    def __init__(self, options: Options | None = None, weights: Mapping[str, Tensor] | None = None) -> None:
        """
        Args:
            options: from the configuration.
            weights: the head's tensors, where they are in memory; None: from a folder.
        """
        self.options = options or self.Options()
        self._weights = weights
        self._texts: Texts

    def check_policy(self, folder: Path | None, brings_head: bool) -> None:
        path = self.options.path
        if path:
            if not (files := head_files(path)):
                raise UsageError(f"{path} holds no multi-token-prediction head; train one with rollahead train-drafter")
            if folder is not None:
                check_fits(files, ModelConfig.from_folder(folder))
        elif not brings_head:
            own = folder if folder is not None and head_files(folder) else "DIR"
            raise UsageError(
                "drafter mtp of a run needs a head, since publications bring none: give "
                f'{{name = "mtp", path = "{own}"}}, '
                "or set drafter.co_train = true, with which the learner trains and publishes one"
            )

    # ---- weights -------------------------------------------------------------------------------------------------

    def attach(self, target: Target) -> None:
        """
        Raises:
            UsageError: there is no head, or it does not fit the target.
        """
        self._target = target.decoder
        self._head = MTPHead(self._target)
        if self._weights is not None:
            self._head.load(self._weights.__getitem__)
        elif self.options.path or self._target.source:
            load_head(self._head, self.options.path or str(self._target.source))
        else:
            raise UsageError("drafter mtp needs a head: give its folder as option path, or a model that holds one")
        self._texts = Texts(self._head)
        self._nothing = self._target.embedding.new_zeros(self._target.config.hidden_size)
        """in place of the state of a text of which no row has been read"""
        if self._head.chains(1):
            self._compile()

    def _compile(self) -> None:
        """A first draft's compiled parts, while nobody waits for it."""
        nobody, one = SequenceStart(-1, np.zeros(2, np.int64), -1, 1.0, 0, hidden=self._nothing[None]), np.ones(1)
        self.begin([nobody])
        self.propose(DraftRequest([-1], one.astype(np.int64), one.astype(np.float32)))
        self.end([-1])

    def weights_changed(self, version: int) -> None:
        """Embedding and output head are the target's own; a publication may bring a head beside them."""
        source, beside = self._target.source, self._target.beside
        if self._weights is None and any(name.startswith(PREFIX) for name in beside):
            load_published(self._head, beside)
        elif source is not None and self._weights is None and head_files(source):
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
                self._texts.extend(i, emitted, verified.hidden[start : start + len(emitted)])
        self._texts.bound()

    # ---- drafts --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propose(self, request: DraftRequest) -> Proposal:
        known = [self._texts[i] for i in request.ids]
        budgets = np.minimum(request.budgets, self.options.max_tokens)
        texts = [text for text, budget in zip(known, budgets.tolist(), strict=True) if budget]
        self._texts.read_prompts(texts)
        whole = self._head.chains(max(len(texts), sum(text.waiting for text in texts)))
        if not whole:  # too much is left to read at once
            self._texts.read(texts)
            whole = self._head.chains(len(texts))
        facts = np.array([(text.seed, text.rows) for text in known], np.int64).reshape(-1, 2)
        seeds, rows = facts[:, 0].copy(), facts[:, 1].copy()
        # Nothing can be drafted after a prompt of a single token, whose successor no row predicts.
        budgets[rows == 0] = 0
        if not budgets.any():
            return Proposal.empty(len(known))
        texts = [text for text, budget in zip(known, budgets.tolist(), strict=True) if budget]
        options = self.options
        if whole:
            return draw_whole(
                lambda wanted: self._chained(wanted, texts), request, budgets, seeds, rows + 1, greedy=options.greedy,
                stop_below=options.stop_below,
            )  # fmt: skip
        drawing = Drawing(
            request, budgets, seeds, rows + 1, vocab_size=self._target.config.vocab_size, greedy=options.greedy,
            stop_below=options.stop_below,
        )  # fmt: skip
        return self._one_by_one(drawing, texts, budgets[drawing.rows])

    def _chained(self, wanted: Wanted, texts: Sequence[Text]) -> Chained:
        """What is left to read is read on the way; rows of shorter drafts are taken along to the end of the longest."""
        depths = wanted.numbers.shape[1]
        cached = np.array([text.cached for text in texts], np.int64)
        tables = self._texts.tables(texts, [text.rows + depths - 1 for text in texts])
        last = torch.stack([self._nothing if text.last is None else text.last for text in texts])
        found = self._head.chain()(wanted, last, self._texts.take_unread(texts), tables, cached, self._texts.cache)
        for text, state in zip(texts, last.unbind(), strict=True):
            text.last = state
        return found

    def _one_by_one(self, drawing: Drawing, texts: Sequence[Text], budgets: np.ndarray) -> Proposal:
        rows = drawing.rows
        cached = np.array([text.cached for text in texts], np.int64)
        tables = self._texts.tables(texts, (cached + budgets - 1).tolist())
        hidden = torch.stack([_last(text) for text in texts])
        while True:
            drawn = drawing.draw(self._head.logits(hidden))
            if not len(drawing.rows):
                return drawing.proposal()
            if len(drawing.rows) < len(rows):
                on = np.isin(rows, drawing.rows)
                rows, drawn, tables, cached = rows[on], drawn[on], tables[on], cached[on]
                hidden = hidden[torch.from_numpy(np.flatnonzero(on)).to(hidden.device)]
            plan = self._texts.cache.plan(tables, cached + drawing.depth - 1, np.ones(len(rows), np.int64))
            tokens = torch.from_numpy(drawn).to(self._head.device)
            hidden = self._head.forward(tokens, self._head.next_input(hidden), plan, self._texts.cache)

    def counters(self) -> dict[str, float]:
        return {"kv_bytes": self._texts.cache.bytes}


def _last(text: Text) -> Tensor:
    assert text.last is not None
    return text.last
