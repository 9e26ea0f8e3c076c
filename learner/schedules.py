"""Targets that change over the steps of a run."""

import math
from typing import Annotated, Literal

from msgspec import Struct

from pipeline.config.types import Count, NonNegativeFloat, PositiveInt, option


class TargetCurve(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A value that is held and then annealed: `start` for `hold` batches, then to `end` within `steps` batches."""

    start: Annotated[NonNegativeFloat, option("value at first, nats a token")]
    end: Annotated[NonNegativeFloat, option("value at last, nats a token")]
    hold: Annotated[Count, option("batches at the first value")] = 0
    steps: Annotated[PositiveInt, option("batches from the first to the last value")] = 100
    shape: Annotated[Literal["linear", "cosine"], option("how it gets there")] = "linear"


def target_at(target: "float | TargetCurve", step: int) -> float:
    """The target after `step` batches."""
    if not isinstance(target, TargetCurve):
        return target
    progress = min(max((step - target.hold) / target.steps, 0.0), 1.0)
    if target.shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return target.start + (target.end - target.start) * progress
