"""Drafts of the target itself with some of its layers left out, chosen in context (CLaSp, arXiv 2505.24196).

The draft runs on the target's own keys and values: those before the draft are exact in all layers, those of drafted
positions are approximate in the layers that ran and missing in the others, until verification writes them anew. After
some tokens the layers to skip are chosen again (`drafters.skip_program`) by what the last verification's token met.

The paper drafts for one sequence. Here, while few are live, each has a set of its own; for more, a set for all is
chosen by some of them, since rows with different sets would share no pass over the weights.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta, Struct
from torch import Tensor

from drafters.base import BaseDrafter, DraftRequest, Needs, Places, Proposal, SequenceStart, Target, Verified
from drafters.drawing import Drawing
from drafters.skip_program import Probe, solve
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import AttentionPlan, KVCache

Set = tuple[int, ...]

_SAMPLE = 4
"""sequences that choose a set for all"""


@dataclass(slots=True)
class _Text:
    seed: int
    tokens: int
    last: int
    skipped: Set | None = None
    """its own set; None: the one for all"""
    since: int = 0
    """tokens emitted since that was chosen"""


class LayerSkipDrafter(BaseDrafter):
    """Drafts with the policy itself, some of its layers left out; which ones is chosen in context."""

    name = "layer-skip"
    needs = Needs.TARGET_LAYERS | Needs.LAYER_STATES

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """`skip` is the part of the layers left out. The set is chosen anew every `refresh_every` tokens of a sequence;
        up to `own_sets` live sequences have one each. A draft has `max_tokens` tokens, and ends early with the first
        one whose distribution's peak is under `stop_below`. They are drawn at the sequence's temperature, or, with
        `greedy`, the likeliest are taken."""

        skip: Annotated[float, Meta(gt=0, lt=1)] = 0.5
        refresh_every: Annotated[int, Meta(ge=1)] = 128
        own_sets: Annotated[int, Meta(ge=0)] = 2
        max_tokens: Annotated[int, Meta(ge=1)] = 6
        stop_below: Annotated[float, Meta(ge=0, le=1)] = 0.7
        greedy: bool = False

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or self.Options()
        self._target: Target | None = None
        self._count = 0
        self._texts: dict[int, _Text] = {}
        self._shared: Set | None = None
        self._shared_since = 0.0
        self._refreshes = self._drafted = 0
        self._program_seconds = 0.0

    def attach(self, target: Target) -> None:
        """
        Raises:
            UsageError: the target has too few layers for `skip` to leave one out and one in.
        """
        self._count = self._skipped(len(target.decoder.layers))
        self._target = target

    def check_policy(self, folder: Path | None, brings_head: bool) -> None:
        if folder is not None:
            self._skipped(ModelConfig.from_folder(folder).layers)

    def _skipped(self, layers: int) -> int:
        """How many of so many layers are left out."""
        count = round(self.options.skip * layers)
        if not 0 < count < layers:
            raise UsageError(
                f"skip {self.options.skip:g} of drafter layer-skip leaves out {count} of {layers} layers; "
                "choose one that leaves out at least one, and not all"
            )
        return count

    # ---- what happens to sequences -------------------------------------------------------------------------------

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            text = np.concatenate([start.prompt_ids, start.response_ids])
            self._texts[start.id] = _Text(start.seed, len(text), int(text[-1]))

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        self.begin(sequences)

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._texts.pop(i, None)

    @torch.no_grad()
    def observe(self, verified: Verified) -> None:
        ids = verified.ids
        for i, emitted in zip(ids, verified.emitted, strict=True):
            text = self._texts[i]
            text.tokens, text.last, text.since = text.tokens + len(emitted), int(emitted[-1]), text.since + len(emitted)
        self._shared_since += sum(map(len, verified.emitted)) / len(ids)
        every = self.options.refresh_every
        if len(ids) > self.options.own_sets:
            if self._shared is None or self._shared_since >= every:
                self._refresh(verified, list(range(0, len(ids), -(-len(ids) // _SAMPLE))))
            return
        for row, i in enumerate(ids):
            text = self._texts[i]
            if text.skipped is None or text.since >= every:
                self._refresh(verified, [row])
                text.skipped, text.since = self._shared, 0

    def _refresh(self, verified: Verified, rows: list[int]) -> None:
        """Chooses the set for all by some rows."""
        target = self._target
        if target is None or verified.layers is None or verified.starts is None:
            return
        rows = rows[: target.cache.free]
        if not rows:
            return  # no memory to try sets in; the old one still drafts
        began = time.perf_counter()
        # the place of the last token that is cached: the one before the last emitted one
        places = [int(verified.starts[row]) + len(verified.emitted[row]) - 1 for row in rows]
        states = verified.layers[:, torch.tensor(places, device=verified.layers.device)]
        with Probe(target, [verified.ids[row] for row in rows], self._count) as run:
            self._shared = solve(states, run, self._count).skipped(self._count)
        self._shared_since = 0.0
        self._refreshes += 1
        self._program_seconds += time.perf_counter() - began

    # ---- drafting ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propose(self, request: DraftRequest) -> Proposal:
        target, options, ids = self._target, self.options, request.ids
        texts = [self._texts[i] for i in ids]
        own = len(ids) <= options.own_sets
        sets = [(text.skipped if own else None) or self._shared for text in texts]
        wanted = np.minimum(request.budgets, options.max_tokens)
        budgets = np.where([chosen is not None for chosen in sets], wanted, 0)
        if target is None or not budgets.any():
            return Proposal.empty(len(ids))
        drawing = Drawing(
            request, budgets, np.array([text.seed for text in texts], np.int64),
            np.array([text.tokens for text in texts], np.int64), vocab_size=target.decoder.config.vocab_size,
            greedy=options.greedy, stop_below=options.stop_below,
        )  # fmt: skip
        places = target.places(ids)
        tokens = np.array([text.last for text in texts], np.int64)
        while len(rows := drawing.rows):
            chosen = [sets[row] or () for row in rows.tolist()]
            hidden = self._forward(target, tokens[rows], _ahead(places, rows, drawing.depth), chosen)
            tokens[rows] = drawing.draw(target.decoder.logits(hidden))
            self._drafted += len(rows)
        return drawing.proposal()

    def _forward(self, target: Target, tokens: np.ndarray, places: Places, sets: Sequence[Set]) -> Tensor:
        """Hidden states [A, H] after the final norm, of a token for each of A rows, without the layers of its set."""
        decoder, cache = target.decoder, target.cache
        ids = torch.from_numpy(tokens).to(decoder.device)
        if all(chosen == sets[0] for chosen in sets):
            kept = [index for index in range(len(decoder.layers)) if index not in sets[0]]
            return decoder.forward(ids, _one_more(cache, places), cache, only=kept)
        x, plans = decoder.embedding[ids], {}
        for index in range(len(decoder.layers)):
            rows = tuple(row for row, chosen in enumerate(sets) if index not in chosen)
            if rows:
                if rows not in plans:
                    some = _one_more(cache, _ahead(places, np.array(rows), 0))
                    plans[rows] = some, torch.tensor(rows, device=x.device)
                part, where = plans[rows]
                x[where] = decoder.block(index, x[where], part, cache)
        return decoder.attention.norm(x, decoder.final_norm)

    def counters(self) -> dict[str, float]:
        return {
            "drafted": self._drafted,
            "sets_chosen": self._refreshes,
            "seconds_choosing": self._program_seconds,
        }


def _ahead(places: Places, rows: np.ndarray, depth: int) -> Places:
    """Of some rows, `depth` draft tokens further on."""
    evicted = None if places.evicted is None else places.evicted[rows]
    return Places(places.tables[rows], places.held[rows] + depth, evicted)


def _one_more(cache: KVCache, places: Places) -> AttentionPlan:
    return cache.plan(places.tables, places.held, np.ones(len(places.held), np.int64), places.evicted)
