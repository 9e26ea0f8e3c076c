"""The first tokens and the latest ones."""

from typing import Annotated

import torch
from torch import Tensor

from pipeline.config.types import Count, Section, option
from pipeline.engine.native.eviction.base import EvictionPolicy


class SinksWindow(EvictionPolicy):
    """Attention sinks and a window, after StreamingLLM (Xiao et al., arXiv 2309.17453).

    The first tokens draw attention whatever they say, so a window alone loses them at a price. Unlike there, tokens
    keep the positions they have in the text.
    """

    class Options(Section):
        sinks: Annotated[Count, option("first tokens that stay")] = 4

    @property
    def sinks(self) -> int:
        return int(self.options.sinks)

    @property
    def recent(self) -> int:
        return 1

    def scores(self, keys: Tensor, queries: Tensor) -> Tensor:
        age = torch.arange(keys.shape[2], dtype=torch.float32, device=keys.device)
        return age.expand(keys.shape[:3])
