"""One training step's objective: shaping -> advantages -> modulators -> corrections -> surrogate -> gates ->
regularisers -> aggregation.

The pieces live one a file in the folders of those names (signatures: `learner.protocols`, tensors: `learner.tokens`);
this module composes them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from learner.pieces import build, trait
from learner.protocols import Advantage, Aggregation, Correction, Gate, Modulator, Regulariser, Shaping, Surrogate
from learner.ratios import finite_or_zero
from learner.tokens import (
    BatchMetrics,
    BatchTokens,
    GroupRewards,
    Layout,
    MicroBatchTokens,
    Needs,
    TokenMetrics,
    selected,
    usable,
)
from pipeline.config.types import ObjectiveSection
from pipeline.errors import UsageError

CONTRACT_METRICS = frozenset({"clip_fraction", "entropy_ratio_kept"})
"""Metrics a piece reports under their own name; all its others are reported as "piece/metric"."""

Plans = dict[str, torch.Tensor]
"""Piece -> what its `plan` returned, first axis the tokens it is for."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The pieces of one objective, in the order they are applied."""

    advantage: Advantage
    surrogate: Surrogate
    aggregation: Aggregation
    shaping: tuple[Shaping, ...] = ()
    modulators: tuple[Modulator, ...] = ()
    corrections: tuple[Correction, ...] = ()
    gates: tuple[Gate, ...] = ()
    regularisers: tuple[Regulariser, ...] = ()
    proximal: str = "recompute"
    """where pi_old comes from: `objective.proximal`"""
    needs: Needs = field(init=False)

    def __post_init__(self) -> None:
        needs = Needs.NOTHING
        for piece in self.pieces():
            needs |= piece.needs
        object.__setattr__(self, "needs", needs)

    @classmethod
    def from_config(cls, section: ObjectiveSection) -> "Objective":
        """Build the pieces a configuration names; `learner.composition.check_composition` says if they fit together.

        Raises:
            UsageError: an unknown piece or option.
        """
        return cls(
            shaping=tuple(build("shaping", piece) for piece in section.shaping),
            advantage=build("advantage", section.advantage),
            modulators=tuple(build("modulator", piece) for piece in section.modulators),
            corrections=tuple(build("correction", piece) for piece in section.corrections),
            surrogate=build("surrogate", section.surrogate),
            gates=tuple(build("gate", piece) for piece in section.gates),
            regularisers=tuple(build("regulariser", piece) for piece in section.regularisers),
            aggregation=build("aggregation", section.aggregation),
            proximal=section.proximal,
        )

    def pieces(self) -> Iterator[Any]:
        """All pieces, in the order they are applied."""
        yield from self.shaping
        yield self.advantage
        yield from self.modulators
        yield from self.corrections
        yield self.surrogate
        yield from self.gates
        yield from self.regularisers
        yield self.aggregation

    @property
    def needs_entropy_from_engine(self) -> bool:
        """Whether engines must record entropies; the learner refuses engines that cannot."""
        old = Needs.OLD_ENTROPY in self.needs and self.proximal == "behaviour"
        return old or Needs.ENGINE_ENTROPY in self.needs

    @property
    def needs_old_pass(self) -> bool:
        """Whether the policy at the start of the batch is evaluated before the first optimiser step."""
        return self.proximal == "recompute" or Needs.ATTENTION_ENTROPY in self.needs

    @property
    def nucleus(self) -> float:
        """Probability mass that nucleus entropies are taken on; 0: none are."""
        return max(trait(piece, "nucleus") for piece in self.pieces())

    @property
    def planners(self) -> list[tuple[str, Any]]:
        """Pieces with a `plan`, and the keys of what they plan."""
        parts: list[Any] = [self.surrogate, *self.gates, *self.regularisers]
        return [(f"{index}:{piece.name}", piece) for index, piece in enumerate(parts) if hasattr(piece, "plan")]

    @property
    def plans_from_policy(self) -> bool:
        """Whether a plan looks at the policy now."""
        return any(trait(piece, "plans_from_policy") for _, piece in self.planners)

    # ---- a batch -------------------------------------------------------------------------------------------------

    def shaped(self, samples: GroupRewards) -> GroupRewards:
        """The samples with shaped rewards."""
        for shape in self.shaping:
            samples = replace(samples, rewards=_shaped_like(shape, shape(samples), samples.rewards))
        return samples

    def advantages(self, samples: GroupRewards) -> torch.Tensor:
        """Advantage of each sample, float32 [S], from rewards that are shaped."""
        return _shaped_like(self.advantage, self.advantage(samples), samples.rewards)

    def modulated(self, batch: BatchTokens) -> tuple[BatchTokens, BatchMetrics]:
        """The batch with the modulators' advantages; pieces that look at batches have seen it.

        Tokens with a value that is not finite are kept from them, since one would stay in a controller's memory for
        good, and have advantage 0.
        """
        metrics: BatchMetrics = {}
        index = usable(batch).nonzero()[:, 0]
        seen = selected(batch, index)
        for modulator in self.modulators:
            advantage, measured = _with_metrics(modulator, modulator(seen), seen.advantage)
            seen = replace(seen, advantage=finite_or_zero(advantage))
            metrics |= _named(modulator.name, measured)
        for piece in self.pieces():
            if hasattr(piece, "begin"):
                piece.begin(seen)
        advantage = torch.zeros_like(batch.advantage).index_copy(0, index, seen.advantage)
        return replace(batch, advantage=advantage), metrics

    def weights(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """Importance weight of each token, float32 [N], and metrics under the pieces' names.

        Tokens with a value that is not finite weigh 0 from the start. Corrections see them all the same: an impossible
        token is what masks of whole samples look for.
        """
        finite = usable(batch)
        weight = finite.to(batch.advantage.dtype)
        metrics: BatchMetrics = {}
        for correction in self.corrections:
            weight, measured = _with_metrics(correction, correction(weight, batch), batch.advantage)
            weight = torch.where(finite, finite_or_zero(weight), torch.zeros_like(weight))
            metrics |= _named(correction.name, measured)
        return weight, metrics

    # ---- an optimiser mini-batch -----------------------------------------------------------------------------------

    def coefficients(self, layout: Layout) -> torch.Tensor:
        """What each token's loss is multiplied by before the sum, float32 [M]."""
        return _shaped_like(self.aggregation, self.aggregation(layout), layout.sequence)

    def plans(self, tokens: MicroBatchTokens) -> Plans:
        """What pieces plan from all M tokens of the mini-batch."""
        with torch.no_grad():
            seen = self._usable(tokens)
            return {key: piece.plan(seen) for key, piece in self.planners}

    def loss(self, tokens: MicroBatchTokens, plans: Plans | None = None) -> tuple[torch.Tensor, TokenMetrics]:
        """The micro-batch's share of the loss: the sum over its tokens, each times its coefficient.

        A token that any log-prob is not finite of is not trained; it stays in the denominator.

        Args:
            tokens: the T trained tokens of a micro-batch.
            plans: those of the mini-batch, cut to these tokens; needed if there are `planners`.

        Returns:
            The scalar to differentiate, and metrics as scalar sums over the T tokens.
        """
        plans = plans or {}
        tokens = self._usable(tokens)
        parts: list[Any] = [self.surrogate, *self.gates, *self.regularisers]
        views = [
            replace(tokens, planned=plans[key]) if (key := f"{index}:{piece.name}") in plans else tokens
            for index, piece in enumerate(parts)
        ]
        like = tokens.advantage
        loss, metrics = _with_metrics(self.surrogate, self.surrogate(views[0]), like)
        sums = _sums(self.surrogate, metrics, like)
        loss = torch.where(tokens.weight != 0, loss * tokens.weight, torch.zeros_like(loss))
        for gate, view in zip(self.gates, views[1:], strict=False):
            loss, metrics = _with_metrics(gate, gate(loss, view), like)
            sums |= _sums(gate, metrics, like)
        for regulariser, view in zip(self.regularisers, views[1 + len(self.gates) :], strict=True):
            term, metrics = _with_metrics(regulariser, regulariser(view), like)
            loss = loss + term
            sums |= _sums(regulariser, metrics, like)
        return (loss * tokens.coefficient).sum(), sums

    def with_proximal(self, tokens: MicroBatchTokens) -> MicroBatchTokens:
        """Under `proximal = "interpolate"`: pi_old between mu and pi, and the importance weights that follow.

        log pi_old = log mu + age / (age + 1) (sg(log pi) - log mu), where age + 1 is the number of publications from
        the one that sampled the token to the one being made; as AReaL (arXiv 2505.24298) interpolates it in its code. A
        token of the newest publication has pi_old = mu.
        """
        if self.proximal != "interpolate":
            return tokens
        share = tokens.age / (tokens.age + 1.0)
        logp_old = tokens.logp_behaviour + share * (tokens.logp.detach() - tokens.logp_behaviour)
        tokens = replace(tokens, logp_old=logp_old)
        batch = BatchTokens(
            logp_old=logp_old, logp_behaviour=tokens.logp_behaviour, sequence=tokens.sequence,
            advantage=tokens.advantage, age=tokens.age, sampler=tokens.sampler, step=tokens.step,
        )  # fmt: skip
        return replace(tokens, weight=self.weights(batch)[0])

    # ---- between batches -------------------------------------------------------------------------------------------

    def lease_temperature(self, lease_id: int) -> float | None:
        """Temperature that a lease is sampled at; None: the run's."""
        asked = (p.lease_temperature(lease_id) for p in self.modulators if hasattr(p, "lease_temperature"))
        return next((temperature for temperature in asked if temperature is not None), None)

    def state(self) -> dict[str, dict[str, float]]:
        """What pieces remember between batches, for a checkpoint."""
        return {key: piece.state() for key, piece in self._with_state()}

    def restore(self, state: dict[str, dict[str, float]]) -> None:
        for key, piece in self._with_state():
            # What was not finite when it was kept is forgotten: it would never become finite again.
            piece.restore({name: value for name, value in state.get(key, {}).items() if math.isfinite(value)})

    def _with_state(self) -> Iterator[tuple[str, Any]]:
        return ((f"{i}:{piece.name}", piece) for i, piece in enumerate(self.pieces()) if hasattr(piece, "state"))

    def _usable(self, tokens: MicroBatchTokens) -> MicroBatchTokens:
        """Tokens with a value that is not finite get weight 0, advantage 0, ratio 1 and no gradient. Not by a product:
        0 times infinity is not a number."""
        names = (
            "logp", "logp_old", "logp_behaviour", "entropy", "entropy_old", "advantage", "weight", "logp_reference",
            "expected_score", "nucleus_entropy",
        )  # fmt: skip
        values = {name: value for name in names if len(value := getattr(tokens, name))}
        finite = torch.ones_like(tokens.logp_old, dtype=torch.bool)
        for value in values.values():
            finite = finite & value.detach().isfinite()
        if bool(finite.all()):
            return tokens
        changed: dict[str, Any] = {
            name: torch.where(finite, value, torch.zeros_like(value)) for name, value in values.items()
        }
        return replace(tokens, **changed)


def _named(piece: str, metrics: BatchMetrics) -> BatchMetrics:
    return {_metric_key(piece, key): value for key, value in metrics.items()}


def _metric_key(piece: str, metric: str) -> str:
    return metric if metric in CONTRACT_METRICS else f"{piece}/{metric}"


def _sums(piece: Any, metrics: TokenMetrics, like: torch.Tensor) -> TokenMetrics:
    return {
        _metric_key(piece.name, key): _shaped_like(piece, value, like, f"metric {key}").detach().float().sum()
        for key, value in metrics.items()
    }


def _with_metrics(piece: Any, result: Any, like: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A piece's tensor and metrics, with the shape checked: another would be broadcast, and train something else."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise UsageError(f"{piece.name} returns {type(result).__name__}; make it return a tensor and a dict of metrics")
    return _shaped_like(piece, result[0], like), result[1]


def _shaped_like(piece: Any, result: Any, like: torch.Tensor, what: str = "result") -> torch.Tensor:
    if not isinstance(result, torch.Tensor) or result.shape != like.shape:
        found = f"shape {list(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise UsageError(
            f"{piece.name}: its {what} has {found}, not {list(like.shape)}; return one value a token, or a sample, as "
            "learner/protocols.py says (learner.testing.check_piece checks it)"
        )
    return result
