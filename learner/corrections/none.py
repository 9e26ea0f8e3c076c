"""No off-policy correction."""

import torch

from learner.objective import BatchTokens, Needs
from pipeline.config.types import Section


class NoCorrection:
    """Every weight is 1: tokens count as if pi_old had sampled them."""

    name = "none"
    needs = Needs.NOTHING

    class Options(Section):
        pass

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, dict[str, float]]:
        """float32 [N]"""
        return torch.ones_like(batch.logp_old), {}
