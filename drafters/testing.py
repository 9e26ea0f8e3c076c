"""What every drafter must keep to, as one call in a test file:

    from drafters.testing import check_drafter

    def test_my_drafter():
        check_drafter(MyDrafter)

The checks run the drafter on a small random model through everything that happens to it in an engine. None asks whether
its drafts are any good.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from drafters.base import Drafter, Needs, Proposal, SequenceStart
from drafters.rehearsal import STOP, VOCABULARY, Rehearsal, load_random, sequences, tiny_target
from pipeline.models.decoder import Decoder


class NotADrafter(AssertionError):
    """The drafter breaks the protocol; the text says which check found it, and what."""


def check_drafter(make: Callable[[], Drafter], *, samples: int = 2000) -> None:
    """Runs every check on drafters that `make` builds.

    Args:
        make: builds a drafter without knowledge; a drafter that draws at random starts from the same seed each time.
        samples: texts for the check of the distribution; more find smaller errors.

    Raises:
        NotADrafter: a check failed.
    """
    checks: dict[str, Callable[[], None]] = {
        "protocol": lambda: check_protocol(make),
        "ragged batches": lambda: check_ragged_batches(make),
        "deterministic drafts keep the text": lambda: check_deterministic_drafts_keep_the_text(make),
        "distribution": lambda: check_distribution(make, samples),
        "ends and preemption": lambda: check_ends_and_preemption(make),
        "new weights": lambda: check_new_weights(make),
        "past alone": lambda: check_past_alone(make),
        "counters": lambda: check_counters(make),
    }
    for name, check in checks.items():
        try:
            check()
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # whatever a drafter raises is what its author has to see
            raise NotADrafter(f"{name}: {type(error).__name__}: {error}") from error


def check_protocol(make: Callable[[], Drafter]) -> None:
    drafter = make()
    assert isinstance(drafter, Drafter), "it lacks a method or attribute of drafters.base.Drafter"
    assert isinstance(drafter.name, str) and drafter.name, f"its name is {drafter.name!r}"
    assert isinstance(drafter.needs, Needs), f"its needs are {drafter.needs!r}, not drafters.base.Needs"


def check_ragged_batches(make: Callable[[], Drafter]) -> None:
    """Budgets from nothing to eight, one sequence and many, rows in changing order, some that are not asked for."""
    rehearsal = Rehearsal(make(), tiny_target(), budget=8)
    rehearsal.begin(sequences(1), limit=30)
    for _ in range(3):
        rehearsal.step()
    rehearsal.begin(sequences(9, first=1), limit=30)
    while rehearsal.live:
        rehearsal.step()
        rehearsal.live.reverse()
    assert len(rehearsal.finished) == 10


def check_deterministic_drafts_keep_the_text(make: Callable[[], Drafter]) -> None:
    """Where no probabilities are given, every text equals the one without drafts."""
    drafter, plain = make(), Rehearsal(None, tiny_target())
    rehearsal = _without_probabilities(drafter)
    for r in (plain, rehearsal):
        r.begin(sequences(12), limit=24)
    expected = plain.run()
    found = rehearsal.run()
    if rehearsal.deterministic:
        assert found == expected, f"a text of sequence {_first_difference(found, expected)} differs from the plain one"


def check_distribution(make: Callable[[], Drafter], samples: int) -> None:
    """Pairs of first tokens against their law under the target, and drafted tokens against the probabilities stated for
    them, by chi-square: p must be over 1e-6 and 1e-9.

    A drafter that states probabilities its tokens were not drawn from fails here, and one that leaves out a token that
    it has drawn because of what it is.
    """
    target, prompt, temperature = tiny_target(), [1, 5, 9, 5, 9], 0.9
    law = _pair_law(target, prompt, temperature)
    rehearsal = _Tallied(make(), target, budget=3)
    for first in range(0, samples, 250):
        rehearsal.begin(sequences(min(250, samples - first), first=first, temperature=temperature, group=0), limit=4)
        rehearsal.run()
    seen = np.zeros_like(law)
    for tokens in rehearsal.finished.values():
        seen[tokens[0], tokens[1] if len(tokens) > 1 else 0] += 1
    expected = law * samples
    common = expected >= 5
    observed, wanted = (
        np.append(seen[common], seen[~common].sum()),
        np.append(expected[common], expected[~common].sum()),
    )
    statistic = float((((observed - wanted) ** 2) / np.maximum(wanted, 1e-9)).sum())
    p_value = _p_value(statistic, len(wanted) - 1)
    assert p_value > 1e-6, (
        f"with its drafts the first two tokens do not follow the target: chi-square {statistic:.0f} at "
        f"{len(wanted) - 1} degrees of freedom, p = {p_value:.1e}; are its probabilities those that its tokens were "
        "drawn from?"
    )
    for depth in range(rehearsal.budget):
        statistic, degrees = rehearsal.deviation(depth)
        p_value = _p_value(statistic, degrees)
        assert p_value > 1e-9, (
            f"token {depth + 1} of its drafts does not follow the probabilities stated for it: chi-square "
            f"{statistic:.0f} at {degrees} degrees of freedom, p = {p_value:.1e}; a token that was drawn stays in the "
            "draft, whatever it is"
        )


def check_ends_and_preemption(make: Callable[[], Drafter]) -> None:
    """Sequences are cancelled, preempted for a while and restored, and new ones come, in the middle of others."""
    plain, rehearsal = Rehearsal(None, tiny_target()), _without_probabilities(make())
    for r in (plain, rehearsal):
        r.begin(sequences(9), limit=24)
        r.step()
        out = r.preempt([i for i in (1, 4, 5) if any(t.start.id == i for t in r.live)])
        r.step()
        r.cancel([i for i in (0, 7) if any(t.start.id == i for t in r.live)])
        r.begin(sequences(3, first=20), limit=24)
        r.step()
        r.restore(out[:2])
        r.step()
        r.cancel([text.start.id for text in out[2:]])
        r.run()
    if rehearsal.deterministic:
        both = rehearsal.finished.keys() & plain.finished.keys()
        assert len(both) >= 8
        for i in both:
            assert rehearsal.finished[i] == plain.finished[i], f"the text of sequence {i} differs from the plain one"


def check_new_weights(make: Callable[[], Drafter]) -> None:
    """The target changes twice while sequences are under way."""
    rehearsal = _without_probabilities(make())
    rehearsal.begin(sequences(6), limit=24)
    for version, seed in ((1, 5), (2, 0)):
        for _ in range(2):
            if rehearsal.live:
                rehearsal.step()
        load_random(rehearsal.target, seed)
        assert rehearsal.drafter is not None
        rehearsal.drafter.weights_changed(version)
        rehearsal.begin(sequences(3, first=10 * version), limit=24)
    rehearsal.run()


def check_past_alone(make: Callable[[], Drafter]) -> None:
    """Two runs that are the same up to a step have the same drafts up to there, whatever the sequences emit later: a
    draft rests on the past alone, and arrays handed out are not written to afterwards."""
    runs = []
    for seed in (1, 2):
        rehearsal = Rehearsal(make(), tiny_target())
        rehearsal.begin(sequences(6, temperature=1.0), limit=30)
        for _ in range(4):
            if rehearsal.live:
                rehearsal.step()
        load_random(rehearsal.target, seed)  # another future
        rehearsal.run()
        runs.append(rehearsal.proposals)
    for step in range(min(4, *map(len, runs))):
        assert runs[0][step] == runs[1][step], (
            f"the drafts of step {step} differ between two runs with the same past: either they depend on what came "
            "after, or make() does not start from the same seed"
        )


def check_counters(make: Callable[[], Drafter]) -> None:
    """A drafter that shows figures can do so before anything has happened, and after."""
    drafter = make()
    figures: Callable[[], object] = getattr(drafter, "counters", dict)
    rehearsal = Rehearsal(drafter, tiny_target())
    for _ in range(2):
        found = figures()
        assert isinstance(found, Mapping), f"counters() gave {type(found).__name__}, not figures by name"
        rehearsal.begin(sequences(3), limit=12)
        rehearsal.run()


class _Tallied(Rehearsal):
    """Compares the tokens of drawn drafts with the probabilities stated for them, at each depth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._excess = np.zeros((self.budget, VOCABULARY))
        """how often each token was drafted, beyond what the probabilities sum up to"""
        self._covariance = np.zeros((self.budget, VOCABULARY, VOCABULARY))

    def _propose(self) -> Proposal:
        proposal = super()._propose()
        if proposal.probabilities is None:
            return proposal
        for depth in range(proposal.token_ids.shape[1]):
            rows = proposal.lengths > depth
            rows &= True if proposal.sampled is None else proposal.sampled
            stated = proposal.probabilities[:, depth].double().cpu().numpy()[rows]
            self._excess[depth] += np.eye(VOCABULARY)[proposal.token_ids[rows, depth]].sum(0) - stated.sum(0)
            self._covariance[depth] += np.diag(stated.sum(0)) - stated.T @ stated
        return proposal

    def deviation(self, depth: int) -> tuple[float, int]:
        """Chi-square and its degrees of freedom, of the combinations of tokens that were seen often enough."""
        variances, combinations = np.linalg.eigh(self._covariance[depth])
        common = variances >= 5
        excess = self._excess[depth] @ combinations[:, common]
        return float((excess**2 / variances[common]).sum()), int(common.sum())


def _p_value(chi_square: float, degrees: int) -> float:
    if not degrees:
        return 1.0
    halves = torch.tensor([degrees / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


class _Watched(Rehearsal):
    """Remembers whether the drafter ever gave probabilities."""

    deterministic = True

    def _propose(self) -> Proposal:
        proposal = super()._propose()
        self.deterministic = self.deterministic and proposal.probabilities is None
        return proposal


def _without_probabilities(drafter: Drafter) -> _Watched:
    return _Watched(drafter, tiny_target())


def _first_difference(found: dict[int, list[int]], expected: dict[int, list[int]]) -> int:
    return next(i for i in expected if found.get(i) != expected[i])


def _pair_law(target: Decoder, prompt: list[int], temperature: float) -> np.ndarray:
    """Probabilities float64 [V, V] of the first two tokens; a text that stops at once counts as followed by 0."""

    def following(prefixes: list[list[int]]) -> np.ndarray:
        probe = Rehearsal(None, target)
        probe.begin([SequenceStart(i, np.array(p, np.int64), 0, 1.0, 0) for i, p in enumerate(prefixes)], limit=9)
        logits = probe._forward(Proposal.empty(len(prefixes)))[1]
        return torch.softmax(logits.double() / temperature, -1).numpy()

    with torch.no_grad():
        first = following([prompt])[0]
        second = following([[*prompt, token] for token in range(VOCABULARY)])
    second[STOP] = np.eye(VOCABULARY)[0]
    return first[:, None] * second
