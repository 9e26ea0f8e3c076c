"""Entropy kept in a corridor by learning only from right, or only from wrong, answers."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.schedules import TargetCurve, target_at
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, Section, option
from pipeline.errors import UsageError


def _lower() -> TargetCurve:
    return TargetCurve(start=0.6, end=0.4)


def _upper() -> TargetCurve:
    return TargetCurve(start=0.7, end=0.5)


class Entrocraft(Piece):
    """A <- max(R, 0) where the batch's mean entropy is above the corridor, min(R, 0) where it is below, and the
    estimator's advantage inside.

    Entrocraft, arXiv 2604.26326, with R the raw reward as its code has it, so rewards must be -1 and 1: with 0 and 1
    nothing is learnt below the corridor. Positive samples alone sharpen the policy, negative ones alone flatten it.
    H is the mean over tokens of the entropy at the start of the batch; the corridor is annealed.
    """

    name = "entrocraft"
    needs = Needs.OLD_ENTROPY
    signed_rewards = True

    class Options(Section):
        lower: Annotated[NonNegativeFloat | TargetCurve, option("lower edge, nats, or {start, end, hold, steps}")] = (
            _lower()
        )
        upper: Annotated[NonNegativeFloat | TargetCurve, option("upper edge, nats, or {start, end, hold, steps}")] = (
            _upper()
        )

    def __init__(self, options: Options) -> None:
        curves = [edge for edge in (options.lower, options.upper) if isinstance(edge, TargetCurve)]
        for step in range(max((curve.hold + curve.steps for curve in curves), default=0) + 1):
            lower, upper = target_at(options.lower, step), target_at(options.upper, step)
            if lower > upper:
                raise UsageError(f"entrocraft: lower = {lower:g} is above upper = {upper:g} at batch {step}; lower it")
        super().__init__(options)

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        assert batch.samples is not None
        if not len(batch.sequence):
            return batch.advantage, {}
        reward = batch.samples.rewards[batch.sequence].to(batch.advantage.dtype)
        entropy = float(batch.entropy_old.double().mean())
        lower, upper = (target_at(edge, batch.step) for edge in (self.options.lower, self.options.upper))
        metrics = {"lower": lower, "upper": upper, "branch": float(entropy > upper) - float(entropy < lower)}
        if entropy > upper:
            return reward.clamp(min=0), metrics
        if entropy < lower:
            return reward.clamp(max=0), metrics
        return batch.advantage, metrics
