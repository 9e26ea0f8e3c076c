"""Drafts of a smaller model with the same tokenizer (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318).

It reads what was emitted since it was last asked, together with the token that the first draft token follows, then
draws one token after the other. New weights of the policy leave it as it is: acceptance falls as the policy moves away
from it, the distribution of what is sampled does not change.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from msgspec import Meta, Struct

from drafters.base import BaseDrafter, DraftRequest, Needs, Proposal, SequenceStart, Target, Verified
from drafters.drawing import Drawing
from drafters.own_cache import OwnCache
from pipeline.errors import UsageError
from pipeline.models.checkpoint import load_decoder
from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import page_bytes
from pipeline.models.tokenizer import Tokenizer


class DraftModelDrafter(BaseDrafter):
    """Drafts with a smaller checkpoint of the same tokenizer, which keeps its own keys and values."""

    name = "draft-model"
    needs = Needs.TARGET_LAYERS

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """`path` is the checkpoint directory. A draft has `max_tokens` tokens, and ends early with the first one whose
        distribution's peak is under `stop_below`. They are drawn at the sequence's temperature, or, with `greedy`, the
        likeliest are taken. `kv_mb` bounds keys and values (0: room for as many tokens as the policy's cache); `dtype`
        is the policy's (`auto`), `float32` or `bfloat16`."""

        path: str = ""
        max_tokens: Annotated[int, Meta(ge=1)] = 6
        stop_below: Annotated[float, Meta(ge=0, le=1)] = 0.4
        greedy: bool = False
        dtype: Literal["auto", "float32", "bfloat16"] = "auto"
        kv_mb: Annotated[float, Meta(ge=0)] = 0.0

    def __init__(self, options: Options | None = None) -> None:
        """
        Raises:
            UsageError: no path, or no checkpoint there.
        """
        self.options = options or self.Options()
        if not self.options.path:
            raise UsageError(
                'drafter draft-model needs a checkpoint; give {name = "draft-model", path = "DIR"} as the drafter'
            )
        self._folder = Path(self.options.path)
        self._config = ModelConfig.from_folder(self._folder)
        self._own: OwnCache | None = None
        self._vocab_size = 0
        self._drafted = 0

    def attach(self, target: Target) -> None:
        """
        Raises:
            UsageError: the checkpoint cannot be used, or its token ids mean something else than the target's.
        """
        self._check_vocabulary(target)
        wanted = self.options.dtype
        dtype = target.decoder.dtype if wanted == "auto" else getattr(torch, wanted)
        decoder = load_decoder(self._folder, dtype, target.decoder.device)
        pages = target.cache.pages
        if self.options.kv_mb:
            pages = int(self.options.kv_mb * 2**20) // page_bytes(self._config, dtype)
        if pages < 1:
            raise UsageError(
                f"kv_mb {self.options.kv_mb:g} of drafter draft-model holds no page of "
                f"{page_bytes(self._config, dtype)} bytes; raise it"
            )
        self._own, self._vocab_size = OwnCache(decoder, pages), target.decoder.config.vocab_size

    def _check_vocabulary(self, target: Target) -> None:
        theirs = target.tokenizer
        if theirs is None:  # no files to compare
            ours, wanted = self._config.vocab_size, target.decoder.config.vocab_size
            if ours != wanted:
                raise UsageError(
                    f"draft model {self._folder} has a vocabulary of {ours} tokens, the policy one of {wanted}; "
                    "give a checkpoint with the policy's tokenizer"
                )
            return
        self._check_tokenizer(theirs)

    def check_policy(self, folder: Path | None, brings_head: bool) -> None:
        if folder is not None:
            self._check_tokenizer(Tokenizer(folder))

    def _check_tokenizer(self, theirs: Tokenizer) -> None:
        mine = Tokenizer(self._folder)
        id = theirs.first_difference(mine)
        if id is not None:
            raise UsageError(
                f"draft model {self._folder} has another tokenizer than the policy: the first token that differs is "
                f"{id}, {_spelled(mine.token(id))} there and {_spelled(theirs.token(id))} in the policy's; "
                "give a checkpoint with the policy's tokenizer"
            )

    # ---- what happens to sequences -------------------------------------------------------------------------------

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        if self._own is not None:
            self._own.begin(sequences)

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        self.begin(sequences)

    def observe(self, verified: Verified) -> None:
        if self._own is not None:
            for i, emitted in zip(verified.ids, verified.emitted, strict=True):
                self._own.emitted(i, emitted.tolist())

    def preempt(self, ids: Sequence[int]) -> None:
        if self._own is not None:
            self._own.drop(ids)

    def end(self, ids: Sequence[int]) -> None:
        if self._own is not None:
            self._own.end(ids)

    # ---- drafting ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propose(self, request: DraftRequest) -> Proposal:
        own, options, ids = self._own, self.options, request.ids
        if own is None:
            return Proposal.empty(len(ids))
        budgets = np.minimum(request.budgets, options.max_tokens)
        budgets = np.where(own.room(ids, budgets), budgets, 0)
        drawing = Drawing(
            request, budgets, own.seeds(ids), own.lengths(ids),
            vocab_size=self._vocab_size, greedy=options.greedy, stop_below=options.stop_below,
        )  # fmt: skip
        rows = drawing.rows
        if not len(rows):
            return Proposal.empty(len(ids))
        hidden = own.catch_up([ids[row] for row in rows.tolist()])
        while True:
            tokens = drawing.draw(own.decoder.logits(hidden))
            self._drafted += len(tokens)
            going = np.isin(rows, drawing.rows, assume_unique=True)
            rows = drawing.rows
            if not len(rows):
                return drawing.proposal()
            hidden = own.step([ids[row] for row in rows.tolist()], tokens[going])

    def counters(self) -> dict[str, float]:
        own = self._own
        if own is None:
            return {}
        return {
            "drafted": self._drafted,
            "tokens_read": own.tokens_read,
            "no_room": own.no_room,
            "kv_bytes": own.cache.bytes,
        }


def _spelled(token: str | None) -> str:
    return "none" if token is None else repr(token)
