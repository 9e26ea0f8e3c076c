"""The learning rate of each batch of a run: linear warm-up, then constant, a line, or half a cosine."""

import math

from pipeline.config.types import LearnerSection


def learning_rate(step: int, steps: int, learner: LearnerSection) -> float:
    """Of the batch after `step` trained ones.

    Warm-up rises from learning_rate / warmup_steps. What follows falls to `final_learning_rate` of the peak at the end
    of the run: in a line, or as f + (1 - f) (1 + cos(pi x)) / 2 of the way x in [0, 1] (Loshchilov & Hutter 2017,
    "SGDR", arXiv 1608.03983, equation 5, one period). Past the end the rate stays at its final value.

    Args:
        step: batches trained before this one.
        steps: batches of the whole run.
    """
    peak, warmup, final = learner.learning_rate, learner.warmup_steps, learner.final_learning_rate
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    way = min(1.0, (step - warmup) / max(1, steps - warmup))
    if learner.learning_rate_schedule == "linear":
        return peak * (1 - (1 - final) * way)
    if learner.learning_rate_schedule == "cosine":
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * way)) / 2)
    return peak
