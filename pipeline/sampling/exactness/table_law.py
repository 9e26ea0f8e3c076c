"""Exact enumeration: the joint law of what is emitted, on models small enough to write down.

The random numbers are integrated out by cells: the harness works out, with numpy and from the rules' definitions, the
intervals in which each number leads to one outcome, calls the production code at both ends of every cell, and weights
each call by half the cell. A threshold in the wrong place, or any wrong rule, puts weight on the wrong sequence.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.sampling.target import plain_target
from pipeline.sampling.verification import TokenUniforms, verify

INSET = 1e-13
_NEUTRAL = 0.5
Point = tuple[float, float]
"""A random number, and its weight."""


class TableModel:
    """p(. | prefix) for every prefix of up to `depth` tokens, some entries zero."""

    def __init__(self, seed: int, vocabulary: int, depth: int, zeros: float = 0.2) -> None:
        rng = np.random.default_rng(seed)
        self.vocabulary = vocabulary
        self.table: dict[tuple[int, ...], np.ndarray] = {}
        for n in range(depth + 1):
            for prefix in itertools.product(range(vocabulary), repeat=n):
                p = rng.dirichlet(np.ones(vocabulary)) * (rng.random(vocabulary) > zeros)
                p[rng.integers(vocabulary)] += 0.1
                self.table[prefix] = p / p.sum()

    def __getitem__(self, prefix: Sequence[int]) -> np.ndarray:
        return self.table[tuple(prefix)]

    def law(self, length: int) -> dict[tuple[int, ...], float]:
        """Probability of every sequence of `length` tokens."""
        sequences = itertools.product(range(self.vocabulary), repeat=length)
        return {s: float(np.prod([self[s[:i]][s[i]] for i in range(length)])) for s in sequences}


def law_error(
    model: TableModel, length: int, rule: str, proposal: TableModel | None = None, stated: TableModel | None = None
) -> float:
    """Largest error of the law of `length + 1` tokens, when drafts of `length` tokens are verified.

    Args:
        rule: "deterministic": worst over all drafts, each being fixed; "standard" or "block": drafts drawn from
            `proposal`.
        stated: what verification is told of the drafts' distribution; None: the truth.
    """
    if rule == "deterministic":
        return max(
            _Cases(model, length).add_all(_deterministic_cells(model, draft)).error()
            for draft in itertools.product(range(model.vocabulary), repeat=length)
        )
    assert proposal is not None
    cells = _standard_cells if rule == "standard" else _block_cells
    cases = _Cases(model, length, stated or proposal, rule == "block")
    for draft in itertools.product(range(model.vocabulary), repeat=length):
        chance = float(np.prod([proposal[draft[:i]][draft[i]] for i in range(length)]))
        if chance:
            cases.add_all(cells(model, proposal, draft), chance)
    return cases.error()


@dataclass
class _Case:
    draft: tuple[int, ...]
    sample: list[float]
    accept: list[float]
    residual: list[float]
    weight: float


@dataclass
class _Cases:
    """Calls to make, as rows of one batch."""

    model: TableModel
    length: int
    proposal: TableModel | None = None
    block: bool = False
    cases: list[_Case] = field(default_factory=list)

    def add_all(self, cases: Iterable[_Case], chance: float = 1.0) -> "_Cases":
        for case in cases:
            case.weight *= chance
            self.cases.append(case)
        return self

    def error(self) -> float:
        """Of the law of the first `length + 1` tokens: what is emitted, continued by the model itself."""
        law, target = self._law(), self.model.law(self.length + 1)
        return max(abs(law[s] - target[s]) for s in target)

    def _law(self) -> dict[tuple[int, ...], float]:
        drafts = np.array([case.draft for case in self.cases], np.int64)
        p = np.array([[self.model[d[:i]] for i in range(self.length + 1)] for d in drafts])
        q = None
        if self.proposal is not None:
            q = torch.tensor(np.array([[self.proposal[d[:i]] for i in range(self.length)] for d in drafts]))
        numbers = (
            torch.tensor(np.array([getattr(case, name) for case in self.cases], np.float64).ravel())
            for name in ("sample", "accept", "residual")
        )
        with np.errstate(divide="ignore"):
            logits = torch.tensor(np.log(p)).flatten(0, 1)
        target = plain_target(logits, torch.ones(len(logits)))
        lengths = np.full(len(drafts), self.length)
        out = verify(target, drafts, lengths, TokenUniforms(*numbers), q, block=self.block)
        law = dict.fromkeys(self.model.law(self.length + 1), 0.0)
        for tokens, accepted, case in zip(out.tokens.tolist(), out.accepted.tolist(), self.cases, strict=True):
            emitted = tuple(tokens[: accepted + 1])
            for rest in itertools.product(range(self.model.vocabulary), repeat=self.length - accepted):
                sequence = emitted + rest
                tail = [self.model[sequence[:i]][sequence[i]] for i in range(accepted + 1, self.length + 1)]
                law[sequence] += case.weight * float(np.prod(tail))
        return law


def _ends(low: float, high: float) -> list[Point]:
    """Both ends of a cell of random numbers, half its weight each."""
    if high - low <= 4 * INSET:
        return []
    return [(low + INSET, (high - low) / 2), (high - INSET, (high - low) / 2)]


def _draw_cells(weights: np.ndarray) -> list[Point]:
    edges = np.concatenate([[0], np.cumsum(weights) / np.sum(weights)])
    return [point for low, high in itertools.pairwise(edges.tolist()) for point in _ends(low, high)]


def _deterministic_cells(model: TableModel, draft: tuple[int, ...]) -> Iterable[_Case]:
    cells = [_draw_cells(model[draft[:i]]) for i in range(len(draft) + 1)]
    for combination in itertools.product(*cells):
        numbers = [u for u, _ in combination]
        yield _Case(draft, numbers, numbers, numbers, float(np.prod([w for _, w in combination])))


def _ended(draft: tuple[int, ...], accept: list[float], accepted: int, last: float, weight: float) -> _Case:
    """The final draw is the residual's after a rejection, plain sampling's after a whole draft."""
    final = [last if i == accepted else _NEUTRAL for i in range(len(draft) + 1)]
    return _Case(draft, final, accept, final, weight)


def _standard_cells(model: TableModel, proposal: TableModel, draft: tuple[int, ...]) -> Iterable[_Case]:
    length = len(draft)
    p, q = [model[draft[:i]] for i in range(length + 1)], [proposal[draft[:i]] for i in range(length)]
    limits = [min(1.0, p[i][draft[i]] / q[i][draft[i]]) for i in range(length)]
    for accepted in range(length + 1):
        tests = [_ends(0, limits[i]) for i in range(accepted)]
        rest = np.maximum(p[accepted] - q[accepted], 0) if accepted < length else p[accepted]
        if accepted < length:
            tests.append(_ends(limits[accepted], 1))
        if not all(tests):
            continue
        for *decisions, (last, weight) in itertools.product(*tests, _draw_cells(rest)):
            accept = [u for u, _ in decisions] + [_NEUTRAL] * (length + 1 - len(decisions))
            yield _ended(draft, accept, accepted, last, weight * float(np.prod([w for _, w in decisions])))


def _block_cells(model: TableModel, proposal: TableModel, draft: tuple[int, ...]) -> Iterable[_Case]:
    """By the definitions of arXiv 2403.10444: the i-th number, of i = 1..K, decides whether i tokens are accepted."""
    length = len(draft)
    p, q = [model[draft[:i]] for i in range(length + 1)], [proposal[draft[:i]] for i in range(length)]
    prefix = [1.0]
    for i in range(length):
        prefix.append(min(1.0, prefix[-1] * p[i][draft[i]] / q[i][draft[i]]))
    limits = []
    for i in range(1, length + 1):
        if i == length:
            limits.append(prefix[i])
            continue
        rest = float(np.maximum(prefix[i] * p[i] - q[i], 0).sum())
        limits.append(1.0 if prefix[i] == 1 and rest == 0 else rest / (rest + 1 - prefix[i]))
    both: list[list[tuple[bool, Point]]] = [
        [(True, point) for point in _ends(0, limit)] + [(False, point) for point in _ends(limit, 1)] for limit in limits
    ]
    for decisions in itertools.product(*both):
        accepted = max((i for i, (below, _) in enumerate(decisions, 1) if below), default=0)
        rest_p = p[accepted] if accepted == length else np.maximum(prefix[accepted] * p[accepted] - q[accepted], 0)
        if not rest_p.sum() > 0:
            continue
        accept = [_NEUTRAL] + [point[0] for _, point in decisions]
        chance = float(np.prod([point[1] for _, point in decisions]))
        for last, weight in _draw_cells(rest_p):
            yield _ended(draft, accept, accepted, last, weight * chance)
