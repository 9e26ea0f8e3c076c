"""Weights divided by their mean over the batch."""

from typing import Annotated, Literal

import torch

from learner.pieces import Piece
from learner.tokens import BatchMetrics, BatchTokens
from pipeline.config.types import Section, option


class BatchNormalisation(Piece):
    """W_t <- W_t / mean(W) over the tokens of the batch whose weight is not 0, so that corrections leave the size of
    the step alone.

    Self-normalised importance sampling over a batch, as in Sparse-RL (arXiv 2601.10079), slime and verl. At level
    "sequence" the mean is over samples, of their mean weight. Sums are over the whole batch and all ranks. Put it last.
    """

    name = "batch-normalisation"
    batch_statistics = True

    class Options(Section):
        level: Annotated[Literal["token", "sequence"], option("mean over tokens, or over samples")] = "token"

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        kept = weight != 0
        share = torch.ones_like(weight, dtype=torch.float64)
        if self.options.level == "sequence":
            ids, inverse = batch.sequence.unique(return_inverse=True)
            tokens = share.new_zeros(len(ids)).index_add(0, inverse, kept.double())[inverse]
            share = 1 / tokens.clamp(min=1)
        sums = torch.stack([(weight.double() * share)[kept].sum(), share[kept].sum()])
        mean = float(sums[0] / sums[1]) if float(sums[1]) > 0 else 1.0
        return weight / mean if mean > 0 else weight, {"mean": mean}
