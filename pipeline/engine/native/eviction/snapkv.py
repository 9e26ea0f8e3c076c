"""What the latest queries attend to."""

from typing import Annotated

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor

from pipeline.config.types import Count, PositiveInt, Section, option
from pipeline.engine.native.eviction.base import EvictionPolicy, attention_scores, check_kernel


class SnapKV(EvictionPolicy):
    """Attention probability that the latest queries give a token, added up, as SnapKV (Li et al., arXiv 2404.14469)
    chooses of a prompt; here again and again while the response grows, which makes it one of the family of H2O (Zhang
    et al., arXiv 2306.14048).

    Scores are averaged over neighbouring tokens, so that what stands beside an attended token stays with it. The
    published code has a window of 32 or 64 and kernels of 5; a window of 8, R-KV's, leaves room in small budgets.
    """

    class Options(Section):
        window: Annotated[PositiveInt, option("latest tokens, whose queries vote and which stay")] = 8
        kernel: Annotated[
            Annotated[int, Meta(ge=1)], option("neighbouring tokens that a score is averaged over; odd")
        ] = 5
        sinks: Annotated[Count, option("first tokens that stay")] = 0

    def __init__(self, options: Options) -> None:
        check_kernel(options.kernel)
        super().__init__(options)

    @property
    def queries(self) -> int:
        return int(self.options.window)

    @property
    def recent(self) -> int:
        return int(self.options.window)

    @property
    def sinks(self) -> int:
        return int(self.options.sinks)

    def scores(self, keys: Tensor, queries: Tensor) -> Tensor:
        tokens = torch.arange(keys.shape[2], device=keys.device)
        seen = tokens <= tokens[-self.recent :, None]
        votes = attention_scores(keys, queries).masked_fill(~seen, -torch.inf).softmax(-1).sum((2, 3))
        return F.avg_pool1d(votes, self.options.kernel, 1, self.options.kernel // 2, count_include_pad=False)
