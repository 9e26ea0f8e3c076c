"""Notices a run that is about to learn nothing more, and names the metric that says so."""

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

PATIENCE = 5
"""batches in a row that must look so"""
ENTROPY_SHARE = 0.1
"""of the entropy at the beginning"""
EFFECTIVE_SHARE = 0.1
"""effective sample size as a share of the tokens"""

Values = Mapping[str, float | None]


class CollapseWatch:
    """Looks at the metrics of each batch; says a thing once until it is over."""

    def __init__(self) -> None:
        self._first_entropies: list[float] = []
        self._in_a_row: dict[str, int] = defaultdict(int)

    def look(self, metrics: Values) -> list[str]:
        """Warnings that are due after this batch, each naming its metric, the value, and what to do."""
        signs = {
            "entropy": self._entropy_sign(metrics.get("entropy")),
            "importance_weight_ess": _ess_sign(metrics.get("importance_weight_ess")),
            "reward_std": _reward_sign(metrics.get("reward_std")),
        }
        due = []
        for metric, sign in signs.items():
            self._in_a_row[metric] = self._in_a_row[metric] + 1 if sign else 0
            if self._in_a_row[metric] == PATIENCE:
                due.append(f"{metric} {sign}")
        return due

    def _entropy_sign(self, entropy: float | None) -> str:
        if entropy is None or not math.isfinite(entropy):
            return ""
        if len(self._first_entropies) < PATIENCE:
            self._first_entropies.append(entropy)
        first = fmean(self._first_entropies)
        if entropy >= ENTROPY_SHARE * first:
            return ""
        return (
            f"is {entropy:.3g}, below {ENTROPY_SHARE:.0%} of the {first:.3g} at the beginning: the policy hardly "
            "explores any more; lower learner.learning_rate, or hold it (a gate or a regulariser of docs/objectives.md)"
        )


def _ess_sign(share: float | None) -> str:
    if share is None or not math.isfinite(share) or share >= EFFECTIVE_SHARE:
        return ""
    return (
        f"is {share:.3g}: few tokens carry the importance weight, so rollouts are too far from the policy; lower "
        "learner.max_staleness or learner.learning_rate"
    )


def _reward_sign(deviation: float | None) -> str:
    if deviation is None or deviation != 0:
        return ""
    return "is 0: all samples of a batch get the same reward, so nothing is learnt; look at the task and its reward"
