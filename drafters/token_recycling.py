"""Token Recycling: the token that the target itself thought likeliest the last time it stood at this token.

After Luo et al. (arXiv 2408.08696), in its chain form: the paper keeps the eight likeliest successors of every token
and drafts a fixed tree of them; a chain needs the first alone. The paper also learns from rejected draft tokens; here
only emitted ones count, whoever drafted them.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta, Struct

from drafters.base import BaseDrafter, DraftRequest, Needs, Proposal, SequenceStart, Verified


class TokenRecyclingDrafter(BaseDrafter):
    """Chains each token's likeliest successor, as the target last saw it; no training, kept across sequences."""

    name = "token-recycling"
    needs = Needs.LOGITS

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """`max_tokens` bounds the draft."""

        max_tokens: Annotated[int, Meta(ge=1)] = 6

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or self.Options()
        self._successors = np.zeros(0, np.int64)
        """[V], -1 where the token has not been met"""
        self._last: dict[int, int] = {}

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        self._last |= {start.id: int(start.prompt_ids[-1]) for start in sequences}

    def propose(self, request: DraftRequest) -> Proposal:
        rows = len(request.ids)
        width = min(int(request.budgets.max(initial=0)), self.options.max_tokens)
        tokens, lengths = np.zeros((rows, width), np.int64), np.zeros(rows, np.int64)
        if not len(self._successors):
            return Proposal(tokens, lengths)
        current = np.array([self._last[i] for i in request.ids], np.int64)
        for depth in range(width):
            current = np.where(current >= 0, self._successors[current], -1)
            goes_on = (current >= 0) & (lengths == depth) & (depth < request.budgets)
            tokens[goes_on, depth] = current[goes_on]
            lengths += goes_on
        return Proposal(tokens, lengths)

    def observe(self, verified: Verified) -> None:
        assert verified.logits is not None and verified.starts is not None
        if not len(self._successors):
            self._successors = np.full(verified.logits.shape[1], -1, np.int64)
        before: list[int] = []
        """the tokens after which the target was asked"""
        places: list[int] = []
        for i, emitted, start in zip(verified.ids, verified.emitted, verified.starts.tolist(), strict=True):
            if len(emitted):
                before += [self._last[i], *emitted[:-1].tolist()]
                places += range(start, start + len(emitted))
                self._last[i] = int(emitted[-1])
        if before:
            rows = torch.tensor(places, device=verified.logits.device)
            self._successors[before] = verified.logits[rows].argmax(-1).cpu().numpy()

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._last.pop(i, None)
