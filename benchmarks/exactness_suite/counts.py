"""First and second tokens of many verifications of one context, by sampling setting and kind of draft."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.exactness_suite.model import STOP
from benchmarks.exactness_suite.scale import Scale
from benchmarks.exactness_suite.settings import SOME, chosen
from pipeline.messages import SamplingParams
from pipeline.sampling.exactness import (
    Check,
    Drawn,
    acceptance_check,
    chi_square_check,
    draw_constant,
    draw_repeatedly,
    processed_law,
)

RULES = ("deterministic", "standard", "block")
PROMPT, RESPONSE = np.array([1, 4, 6, 4]), np.array([3, 5])


@dataclass(frozen=True, slots=True)
class Case:
    """A context, a setting and a kind of draft."""

    logits: np.ndarray
    """[K+1, V], after each number of draft tokens"""
    params: SamplingParams
    rule: str
    draft: np.ndarray
    """int64 [K] of deterministic drafts"""
    proposal: np.ndarray
    """[K, V] that other drafts are drawn from"""

    def draw(self, rows: int, seed: int) -> Drawn:
        drawn = self.rule != "deterministic"
        return draw_constant(
            self.logits, self.params, rows, draft=None if drawn else self.draft,
            proposal=self.proposal if drawn else None, block=self.rule == "block", prompt_ids=PROMPT,
            response_ids=RESPONSE, stop=(STOP,), seed=seed,
        )  # fmt: skip

    def law(self, drafted: tuple[int, ...] = ()) -> np.ndarray:
        """Of the token after so many drafted ones."""
        response = [*RESPONSE.tolist(), *drafted]
        return processed_law(self.logits[len(drafted)], self.params, PROMPT.tolist(), response, (STOP,))


def count_checks(logits: np.ndarray, scale: Scale, seed: int) -> Iterator[Check]:
    """Chi-square and acceptance checks on logits [K+1, V]."""
    for index, (name, params) in enumerate(chosen(logits.shape[1], scale.every_rule).items()):
        for rule in RULES if scale.every_rule else (SOME[name],):
            case = make_case(logits, params, rule, seed)
            yield from _checks(f"{name}, {rule} drafts", case, scale.draws, seed + index)


def repetition_checks(seed: int) -> list[Check]:
    """Responses over several verifications, where numbers that were looked at must not be looked at again. Half and
    half against drafts of four to one is where that would show most."""
    law, proposal, rows, tokens = np.array([0.5, 0.5]), np.array([0.8, 0.2]), 20_000, 4
    checks = []
    for rule in ("standard", "block"):
        found = draw_repeatedly(law, proposal, rows, tokens, 3, block=rule == "block", seed=seed)
        cells = found @ (2 ** np.arange(tokens))
        name = f"joint law of {tokens} tokens over several verifications, {rule} drafts"
        checks.append(chi_square_check(name, cells, np.full(2**tokens, 0.5**tokens)))
    return checks


def make_case(logits: np.ndarray, params: SamplingParams, rule: str, seed: int) -> Case:
    """Deterministic drafts guess the second most likely token; drawn ones come from the target's own distribution
    distorted, so that a draft copied through is far from it."""
    rng = np.random.default_rng(seed)
    depth = len(logits) - 1
    noisy = logits[:depth] + rng.normal(0, 1, logits[:depth].shape)
    temperature = params.temperature or 1.0
    proposal = np.exp((noisy - noisy.max(-1, keepdims=True)) / temperature)
    proposal /= proposal.sum(-1, keepdims=True)
    return Case(logits, params, rule, np.argsort(logits[:depth], axis=-1)[:, -2], proposal)


def _checks(name: str, case: Case, rows: int, seed: int) -> list[Check]:
    drawn, first = case.draw(rows, seed), case.law()
    checks = [chi_square_check(f"first token, {name}", drawn.tokens[:, 0], first)]
    if case.rule == "deterministic":
        reached = drawn.accepted >= 1
        second = case.law((int(case.draft[0]),))
        if reached.sum() >= 1000:
            checks.append(chi_square_check(f"second token, {name}", drawn.tokens[reached, 1], second))
        chance = float(first[case.draft[0]])
    elif case.rule == "standard":
        chance = float(np.minimum(first, case.proposal[0]).sum())
    else:
        chance = _block_chance(case, first)
    checks.append(acceptance_check(f"acceptance, {name}", drawn.accepted >= 1, chance))
    return checks


def _block_chance(case: Case, first: np.ndarray) -> float:
    """Probability that block verification accepts something, of drafts of one or two tokens, by its definition."""
    q = case.proposal
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.where(q[0] > 0, np.minimum(1, first / q[0]), 0)
    if len(q) == 1:
        return float((q[0] * one).sum())
    total = 0.0
    for x, chance in enumerate(q[0]):
        second = case.law((x,))
        rest = np.maximum(one[x] * second - q[1], 0).sum()
        accept_one = 1.0 if one[x] == 1 and rest == 0 else rest / (rest + 1 - one[x])
        two = np.minimum(1, one[x] * second / q[1])
        total += float(chance * (q[1] * (1 - (1 - accept_one) * (1 - two))).sum())
    return total
