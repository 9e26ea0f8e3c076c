"""An entropy bonus whose coefficient follows the entropy."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.schedules import TargetCurve, target_at
from learner.tokens import BatchTokens, MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option

Unit = Annotated[float, Meta(ge=0, le=1)]
_WORST = -3.0


class AdaptiveEntropy(Piece):
    """Adds -c_k H(pi(.|s_t)) while the batch's mean entropy is at most the target; c goes up by `step` for a batch
    below the target and down by it for one above, within [0, 1].

    Skywork-OR1, arXiv 2505.22312 (adaptive entropy control), as in TRL. The entropy is that at the start of the batch,
    mean over tokens. With `proportional` above 0 it is a controller of our own instead: the bonus acts on both sides of
    the target, c_k = I_k + proportional e_k within [-1, 1], where e_k is how far the entropy is below its target, in
    targets (from -3 on: one batch is not the policy), and I_k goes up by `step` e_k a batch. A target that changes over
    the run is entropy scheduling (ACL Findings 2026.206), of which only the idea is known to us: it is reconstructed.
    """

    name = "adaptive-entropy"
    needs = Needs.OLD_ENTROPY | Needs.ENTROPY_GRADIENT

    class Options(Section):
        target: Annotated[
            NonNegativeFloat | TargetCurve, option("entropy to hold, nats, or {start, end, hold, steps}")
        ] = 0.2
        step: Annotated[NonNegativeFloat, option("change of the coefficient a batch")] = 0.005
        initial: Annotated[Unit, option("coefficient before the first batch")] = 0.0
        proportional: Annotated[
            NonNegativeFloat, option("coefficient for an entropy one target away; 0: the paper's control, one-sided")
        ] = 0.0

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.reconstructed = isinstance(options.target, TargetCurve)  # type: ignore[misc]
        self._integral = options.initial
        self._coefficient = 0.0
        """of this batch"""

    def begin(self, batch: BatchTokens) -> None:
        if not len(batch.entropy_old):
            return
        entropy = float(batch.entropy_old.double().mean())
        target = target_at(self.options.target, batch.step)
        if self.options.proportional:
            error = max(1 - entropy / max(target, 1e-6), _WORST)
            self._integral = min(max(self._integral + self.options.step * error, -1.0), 1.0)
            self._coefficient = min(max(self._integral + self.options.proportional * error, -1.0), 1.0)
        else:
            change = self.options.step if entropy < target else -self.options.step
            self._integral = min(max(self._integral + change, 0.0), 1.0)
            self._coefficient = self._integral if entropy <= target else 0.0

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        coefficient = self._coefficient
        return -coefficient * tokens.entropy, {"coefficient": torch.full_like(tokens.advantage, coefficient)}

    def state(self) -> dict[str, float]:
        return {"coefficient": self._integral}

    def restore(self, state: dict[str, float]) -> None:
        self._integral = state.get("coefficient", self.options.initial)
