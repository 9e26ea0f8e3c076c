"""Statistical tests of counts, and one verdict over many of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

LEVEL = 1e-4
"""family-wise error of all chi-square tests of a suite together"""
LEAST_EXPECTED = 5.0
SIGMAS = 4.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold."""

    name: str
    passed: bool
    """of a chi-square test alone; over a suite `holm` decides"""
    value: float
    """p-value of a chi-square test, else what is compared with `bound`"""
    bound: float | None = None
    """largest value that passes; None for a p-value"""
    samples: int = 0
    detail: str = ""


def chi_square_p_value(observed: np.ndarray, expected: np.ndarray, least: float = LEAST_EXPECTED) -> float:
    """Of counts against expected counts of the same total, Pearson's test.

    Cells that expect fewer than `least` are pooled into one; counts where nothing is expected make the p-value 0.
    """
    if observed[expected <= 0].sum() > 0:
        return 0.0
    order = np.argsort(expected)
    rare = expected[order].cumsum() < least
    rare |= expected[order] < least
    pooled = order[rare]
    rest = order[~rare]
    seen, wanted = observed[rest].astype(np.float64), expected[rest].astype(np.float64)
    if len(pooled):
        seen, wanted = np.append(seen, observed[pooled].sum()), np.append(wanted, expected[pooled].sum())
        if wanted[-1] < least and len(wanted) > 1:
            # Too little even together: with the smallest of the others.
            seen[0], wanted[0] = seen[0] + seen[-1], wanted[0] + wanted[-1]
            seen, wanted = seen[:-1], wanted[:-1]
    if len(wanted) < 2:
        return 1.0
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    half = torch.tensor([(len(wanted) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def chi_square_check(name: str, tokens: np.ndarray, law: np.ndarray, detail: str = "") -> Check:
    """Cells int64 [N], as indices of `law` [C], against N draws from the law."""
    observed = np.bincount(tokens, minlength=len(law))
    p_value = chi_square_p_value(observed, law / law.sum() * len(tokens))
    return Check(name, p_value > LEVEL, p_value, None, len(tokens), detail)


def acceptance_check(name: str, accepted: np.ndarray, chance: float, detail: str = "") -> Check:
    """bool [N], whether drafts were accepted, against their probability: within `SIGMAS` standard deviations."""
    sigma = math.sqrt(max(chance * (1 - chance), 1e-12) / len(accepted))
    deviations = abs(float(accepted.mean()) - float(chance)) / sigma
    text = detail or f"{accepted.mean():.4f} accepted, {chance:.4f} expected"
    return Check(name, deviations < SIGMAS, deviations, SIGMAS, len(accepted), text)


def bound_check(name: str, error: float, bound: float, samples: int = 0, detail: str = "") -> Check:
    """An error that must stay below a bound; not a number fails."""
    return Check(name, bool(error < bound), float(error), bound, samples, detail)


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which hypotheses are rejected with a family-wise error of `level` (Holm 1979): the smallest p-value is compared
    with level / m, the next with level / (m - 1), and so on until one is not rejected. One that is not a number counts
    as 0: what could not be tested did not pass."""
    known = [0.0 if math.isnan(p_value) else p_value for p_value in p_values]
    order = sorted(range(len(known)), key=known.__getitem__)
    rejected = [False] * len(known)
    for rank, index in enumerate(order):
        if known[index] > level / (len(known) - rank):
            break
        rejected[index] = True
    return rejected
