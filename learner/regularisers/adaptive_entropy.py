"""An entropy bonus whose coefficient follows the entropy."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.schedules import TargetCurve, target_at
from learner.tokens import BatchTokens, MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option

Unit = Annotated[float, Meta(ge=0, le=1)]


class AdaptiveEntropy(Piece):
    """Adds -c_k H(pi(.|s_t)) while the batch's mean entropy is at most the target; c goes up by `step` for a batch
    below the target and down by it for one above, within [0, 1].

    Skywork-OR1, arXiv 2505.22312 (adaptive entropy control), as in TRL. The entropy is that at the start of the batch,
    mean over tokens. A target that changes over the run is entropy scheduling (ACL Findings 2026.206), of which only
    the idea is known to us: it is reconstructed.
    """

    name = "adaptive-entropy"
    needs = Needs.OLD_ENTROPY | Needs.ENTROPY_GRADIENT

    class Options(Section):
        target: Annotated[
            NonNegativeFloat | TargetCurve, option("entropy to hold, nats, or {start, end, hold, steps}")
        ] = 0.2
        step: Annotated[NonNegativeFloat, option("change of the coefficient a batch")] = 0.005
        initial: Annotated[Unit, option("coefficient before the first batch")] = 0.0

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.reconstructed = isinstance(options.target, TargetCurve)  # type: ignore[misc]
        self._coefficient = options.initial
        self._active = False

    def begin(self, batch: BatchTokens) -> None:
        if not len(batch.entropy_old):
            return
        entropy = float(batch.entropy_old.double().mean())
        target = target_at(self.options.target, batch.step)
        change = self.options.step if entropy < target else -self.options.step
        self._coefficient = min(max(self._coefficient + change, 0.0), 1.0)
        self._active = entropy <= target

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        coefficient = self._coefficient if self._active else 0.0
        return -coefficient * tokens.entropy, {"coefficient": torch.full_like(tokens.advantage, coefficient)}

    def state(self) -> dict[str, float]:
        return {"coefficient": self._coefficient}

    def restore(self, state: dict[str, float]) -> None:
        self._coefficient = state.get("coefficient", self.options.initial)
