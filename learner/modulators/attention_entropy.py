"""Soft weights of tokens by the entropy of the attention that predicts them."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.segments import sequence_length
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import PositiveInt, Section, option


class AttentionEntropyWeights(Piece):
    """A_t <- w_t A_t, w_t = 1 + a (2 s - 1)(2 e_t - 1), s = min(step / steps, 1), e_t the rank within the sample of the
    attention entropy over log(context length), in [0, 1].

    After arXiv 2605.07660, whose abstract says that weight moves during training from tokens whose prediction looks at
    few places (anchors) to those that look at many (explorers). Reconstructed: the paper's weights are not known to us.
    Ranks are symmetric about 1/2, so the mean of a sample's weights is 1. The entropies are those of the middle layer,
    averaged over its heads, at the start of the batch.
    """

    name = "attention-entropy"
    needs = Needs.ATTENTION_ENTROPY
    reconstructed = True

    class Options(Section):
        amplitude: Annotated[Annotated[float, Meta(ge=0, le=0.5)], option("a, largest change of a weight")] = 0.5
        steps: Annotated[PositiveInt, option("batches from anchors to explorers")] = 100

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        progress = min(batch.step / self.options.steps, 1.0)
        rank = ranks_within(batch.attention_entropy, batch.sequence)
        weight = 1 + self.options.amplitude * (2 * progress - 1) * (2 * rank - 1)
        return batch.advantage * weight.to(batch.advantage.dtype), {"progress": progress}


def ranks_within(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Rank of each of N values among those of its sample, from 0 to 1; float32 [N]. Ties in their order; 1/2 for a
    value that is alone."""
    order = values.argsort(stable=True)
    order = order[sequence[order].argsort(stable=True)]
    _, counts = sequence[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.empty(len(values), device=values.device)
    rank[order] = (torch.arange(len(values), device=values.device) - starts).float()
    length = sequence_length(sequence)
    return torch.where(length > 1, rank / (length - 1).clamp(min=1), 0.5)
