"""Entropy held by reinforcing right answers that were sampled at another temperature."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import BatchMetrics, BatchTokens
from pipeline.config.types import Count, NonNegativeFloat, PositiveFloat, PositiveInt, Section, option
from pipeline.errors import UsageError


class AEPO(Piece):
    """Adds REINFORCE on positive samples of another temperature: grad J = grad J_GRPO + E_{o ~ pi^T}[1 grad log pi(o)].

    AEPO, arXiv 2510.08141, with the sample count in place of the coefficient alpha, as its code has it. Every
    `every`-th lease is sampled at T = `hot` while the policy's entropy is below the target and at `cold` otherwise; of
    those samples the ones whose advantage within their group is above `least` get A = 1, at most `samples` of them
    (half as many above the target), and all others A = 0. The entropy is the mean of -log pi_old over the batch before,
    without these samples. Their log-probs are taken at their own temperature on both sides, so importance weights hold
    the difference of weights and numerics, not that of temperatures.
    """

    name = "aepo"

    class Options(Section):
        target: Annotated[NonNegativeFloat, option("entropy to hold, nats a token")] = 0.5
        hot: Annotated[PositiveFloat, option("temperature below the target")] = 1.2
        cold: Annotated[PositiveFloat, option("temperature above the target")] = 0.8
        every: Annotated[PositiveInt, option("one lease in this many is sampled at another temperature")] = 4
        least: Annotated[float, option("a sample's advantage must be above this to be reinforced")] = 0.05
        samples: Annotated[Count, option("most samples reinforced in a batch")] = 60

    def __init__(self, options: Options) -> None:
        if not options.cold < options.hot:
            raise UsageError(f"aepo: cold = {options.cold} must be below hot = {options.hot}, or entropy runs away")
        super().__init__(options)
        self._entropy: float | None = None

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        assert batch.samples is not None
        if not len(batch.sequence):
            return batch.advantage, {}
        explored = batch.samples.explored[batch.sequence]
        positive = explored & (batch.advantage > self.options.least)
        limit = self.options.samples // 2 if self._above_target else self.options.samples
        chosen = batch.sequence[positive].unique()[:limit]
        reinforced = positive & torch.isin(batch.sequence, chosen)
        advantage = torch.where(explored, reinforced.to(batch.advantage.dtype), batch.advantage)
        self._remember(batch, explored)
        return advantage, {"explored": float(explored.float().mean()), "reinforced_samples": float(len(chosen))}

    def lease_temperature(self, lease_id: int) -> float | None:
        """Temperature of a lease's samples; None is the run's. Called from the thread that grants leases."""
        if lease_id % self.options.every != self.options.every - 1:
            return None
        cold: float = self.options.cold
        hot: float = self.options.hot
        return cold if self._above_target else hot

    def state(self) -> dict[str, float]:
        return {} if self._entropy is None else {"entropy": self._entropy}

    def restore(self, state: dict[str, float]) -> None:
        self._entropy = state.get("entropy")

    @property
    def _above_target(self) -> bool:
        return self._entropy is not None and self._entropy > self.options.target

    def _remember(self, batch: BatchTokens, explored: torch.Tensor) -> None:
        surprise = -batch.logp_old[~explored].double()
        if len(surprise):
            self._entropy = float(surprise.mean())
