"""Forward passes over the batch: what the models say after each sequence's last token and after each of its drafts'."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drafters.base import Proposal
from pipeline.engine.native.batch import Batch
from pipeline.engine.native.memory import Memory
from pipeline.engine.native.small_model import SmallModel, on_small, together
from pipeline.messages import Sampler
from pipeline.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Scores:
    """Of the N = sum(draft lengths + 1) positions, packed row by row."""

    logits: Tensor
    """float32 [N, V]"""
    hidden: Tensor
    """[N, H] after the final norm; where the small model samples a row, [0 or fewer than N, H]"""
    starts: np.ndarray
    """int64 [B], each row's first position"""
    samplers: list[Sampler]
    """B, whose scores they are"""
    layers: list[Tensor] | None
    """[N, H] each: the embedding and what each layer gave; None where nobody asks"""


class Scorer:
    """Scores drafts with the policy, and next tokens of sequences that the small model samples with that."""

    def __init__(self, decoder: Decoder, memory: Memory, small: SmallModel | None) -> None:
        self._decoder, self._memory, self._small = decoder, memory, small

    def small_logits(self, batch: Batch) -> Tensor | None:
        """[rows, V] of the sequences that the small model samples; None where there are none."""
        sequences = [s for s in batch if on_small(s)] if self._small else []
        return self._small.forward(sequences) if self._small and sequences else None

    def score(self, batch: Batch, proposal: Proposal, small_logits: Tensor | None, with_layers: bool) -> Scores:
        """Runs the policy over the sequences that it samples.

        Args:
            batch: the live sequences; there are pages for the drafts.
            proposal: their drafts; none where the small model samples.
            small_logits: of those rows.
            with_layers: whether what each layer gave is wanted.
        """
        counts, starts = proposal.lengths + 1, np.cumsum(proposal.lengths + 1) - (proposal.lengths + 1)
        layers: list[Tensor] | None = [] if with_layers else None
        if small_logits is None:
            hidden = self._forward(batch, proposal, None, layers)
            return Scores(self._decoder.logits(hidden), hidden, starts, [Sampler.POLICY] * len(batch), layers)
        samplers = [Sampler.SWITCHED_MODEL if on_small(s) else Sampler.POLICY for s in batch]
        rows = np.flatnonzero(np.array(samplers) == Sampler.POLICY)
        if not len(rows):
            return Scores(small_logits, small_logits[:, :0], starts, samplers, layers)
        hidden = self._forward(batch, proposal, rows, layers)
        logits = together(rows, counts, self._decoder.logits(hidden), small_logits)
        return Scores(logits, hidden, starts, samplers, layers)

    def _forward(
        self, batch: Batch, proposal: Proposal, rows: np.ndarray | None, layers: list[Tensor] | None
    ) -> Tensor:
        """Hidden states [N, H] of some rows of the batch; None: of all."""
        chosen = slice(None) if rows is None else rows
        counts = (proposal.lengths + 1)[chosen]
        tokens = np.concatenate([batch.last_tokens[:, None], proposal.token_ids], axis=1)[chosen]
        packed = torch.from_numpy(tokens[np.arange(tokens.shape[1]) < counts[:, None]]).to(self._decoder.device)
        evicted = batch.evicted[chosen] if self._memory.compresses else None
        cache = self._memory.cache
        plan = cache.plan(batch.tables[chosen], batch.held[chosen], counts, evicted)
        return self._decoder.forward(packed, plan, cache, layers)
