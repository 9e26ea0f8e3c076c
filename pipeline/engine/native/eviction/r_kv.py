"""What the latest queries attend to and nothing else says again."""

from typing import Annotated

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor

from pipeline.config.types import Count, PositiveInt, Section, option
from pipeline.engine.native.eviction.base import EvictionPolicy, attention_scores, check_kernel

Share = Annotated[float, Meta(ge=0, le=1)]


class RKV(EvictionPolicy):
    """R-KV (Cai et al., arXiv 2505.24133): Z = lambda I - (1 - lambda) R.

    I is the attention that the latest queries give what came before them: the greatest score of a KV head's query
    heads, softmax, mean over the queries, the greatest among neighbours. R is the softmax over keys of a key's mean
    cosine similarity to the others; but of the keys that are more alike to one key than the threshold, the newest does
    not count, so that the newest of those that say the same stays. Defaults are those of the published code [the paper
    itself was not read].
    """

    class Options(Section):
        window: Annotated[PositiveInt, option("latest tokens, whose queries vote and which stay")] = 8
        kernel: Annotated[PositiveInt, option("neighbouring tokens that an importance is the greatest of; odd")] = 7
        importance: Annotated[Share, option("lambda, weight of importance against redundancy")] = 0.1
        threshold: Annotated[float, option("cosine similarity from which two keys say the same")] = 0.5
        spared: Annotated[Count, option("newest likenesses of a key that do not count")] = 1

    def __init__(self, options: Options) -> None:
        check_kernel(options.kernel)
        super().__init__(options)

    @property
    def queries(self) -> int:
        return int(self.options.window)

    @property
    def recent(self) -> int:
        return int(self.options.window)

    def scores(self, keys: Tensor, queries: Tensor) -> Tensor:
        share = self.options.importance
        return share * self.importance(keys, queries) - (1 - share) * self.redundancy(keys)

    def importance(self, keys: Tensor, queries: Tensor) -> Tensor:
        """I, float32 [B, kv_heads, T]; 0 for the latest."""
        past = attention_scores(keys, queries)[..., : -self.recent]
        attention = past.amax(2).softmax(-1).mean(2)
        pooled = F.max_pool1d(attention, self.options.kernel, 1, self.options.kernel // 2)
        return F.pad(pooled, (0, self.recent))

    def redundancy(self, keys: Tensor) -> Tensor:
        """R, float32 [B, kv_heads, T]"""
        tokens, spared = keys.shape[2], self.options.spared
        unit = F.normalize(keys.float(), dim=-1)
        total = (unit * (unit.sum(-2, True) - unit)).sum(-1)  # with all others, without the matrix of all pairs
        if spared:
            similarity = unit @ unit.transpose(-1, -2)
            similarity.diagonal(dim1=-2, dim2=-1).zero_()
            # 0 where two keys are not alike, else 1 + the place of the second: the greatest are the newest
            order = torch.arange(1, tokens + 1, dtype=torch.int32, device=keys.device)
            places = (similarity > self.options.threshold) * order
            newest = places.amax(-1, True) if spared == 1 else places.topk(min(spared, tokens)).values
            columns = (newest.long() - 1).clamp(min=0)
            excess = similarity.gather(-1, columns) * (newest > 0)
            total = total.scatter_add(-1, columns.flatten(-2), -excess.flatten(-2))
        return (total / tokens).softmax(-1)
