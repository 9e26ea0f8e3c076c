"""Entropy held at a target by a controller on the weights of positive and negative advantages."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.schedules import TargetCurve, target_at
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, Section, option


class EntroPIC(Piece):
    """A <- (1 + alpha) A where A > 0, (1 - alpha) A where A < 0, alpha_t = I_t + K_p e_t, I_{t+1} = I_t + K_i e_t.

    EntroPIC, arXiv 2511.15248; e_t = H_t - H* is the error of the batch's mean entropy, so entropy above the target
    strengthens positive samples, which lowers it. Ours: alpha, and with it the integral, stays within +-`bound`, so
    that weights never change sign. A target that changes over the run is entropy scheduling (ACL Findings 2026.206), of
    which only the idea is known to us: it is reconstructed.
    """

    name = "entropic"
    needs = Needs.OLD_ENTROPY

    class Options(Section):
        target: Annotated[
            NonNegativeFloat | TargetCurve, option("entropy to hold, nats, or {start, end, hold, steps}")
        ] = 0.2
        proportional: Annotated[NonNegativeFloat, option("K_p, gain on the error")] = 1.0
        integral: Annotated[NonNegativeFloat, option("K_i, gain on the sum of errors")] = 0.01
        bound: Annotated[Annotated[float, Meta(gt=0, le=1)], option("largest |alpha|")] = 1.0

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.reconstructed = isinstance(options.target, TargetCurve)  # type: ignore[misc]
        self._integral = 0.0

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        if not len(batch.sequence):
            return batch.advantage, {}
        bound = self.options.bound
        target = target_at(self.options.target, batch.step)
        error = float(batch.entropy_old.double().mean()) - target
        alpha = min(max(self._integral + self.options.proportional * error, -bound), bound)
        self._integral = min(max(self._integral + self.options.integral * error, -bound), bound)
        weight = torch.where(batch.advantage > 0, 1 + alpha, 1 - alpha)
        return batch.advantage * weight, {"alpha": alpha, "integral": self._integral, "target": target}

    def state(self) -> dict[str, float]:
        return {"integral": self._integral}

    def restore(self, state: dict[str, float]) -> None:
        self._integral = state.get("integral", 0.0)
