"""The exactness suite passes, and notices every way of breaking what it checks."""

import dataclasses
import json

import msgspec
import numpy as np
import pytest
import torch
from scipy import special, stats

from benchmarks import exactness
from benchmarks.exactness_suite import drafters, rollouts
from benchmarks.exactness_suite.checkpoint import checkpoint_checks
from benchmarks.exactness_suite.counts import Case, count_checks, repetition_checks
from benchmarks.exactness_suite.enumeration import enumeration_checks
from benchmarks.exactness_suite.fitting import build_fitted
from benchmarks.exactness_suite.generators import GENERATORS
from benchmarks.exactness_suite.model import random_checkpoint
from benchmarks.exactness_suite.scale import FULL, SHORT
from drafters.base import BaseDrafter
from drafters.registry import build, piece_of
from pipeline.bench import bench
from pipeline.engine.native import verifier
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.sampling import distribution, processors, verification
from pipeline.sampling.exactness import Check, bound_check, chi_square_p_value, draw_constant, holm
from pipeline.sampling.uniforms import Stream, uniforms
from tests.unit.broken_rules import (
    COMPILED,
    SKIP_THE_RESIDUAL,
    change_the_compiled_pass,
    skip_residual,
    without_the_compiled_pass,
)

COUNTED = dataclasses.replace(SHORT, every_rule=False)
SCALE = dataclasses.replace(SHORT, rollouts=2_000, recorded=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def logits(folder):
    checkpoint = random_checkpoint(folder / "counted", SHORT.vocabulary, sharpness=1.0, seed=exactness.SEED)
    return exactness.real_logits(checkpoint, SHORT.draft_tokens)


@pytest.fixture(scope="module")
def tiny(folder):
    path = random_checkpoint(folder / "tiny", rollouts.VOCABULARY, sharpness=0.6, seed=exactness.SEED)
    return path, rollouts.JointLaw(path)


def failed(checks):
    return {check.name for check in exactness.failures(checks)}


@pytest.mark.slow
def test_the_short_suite_passes_and_writes_its_results(tmp_path, capsys):
    assert bench("exactness", ["--short", "--out", str(tmp_path)]) == 0
    assert "checks passed" in capsys.readouterr().out
    assert (tmp_path / "results.json").stat().st_size > 1000


def test_every_setting_with_every_rule_gives_values_that_can_be_written():
    logits = np.random.default_rng(0).normal(0, 1, (3, 16))
    checks = list(count_checks(logits, dataclasses.replace(FULL, draws=500), 1))
    assert len(checks) > 3 * 13 * 2 - 1
    assert json.loads(msgspec.json.encode([dataclasses.asdict(check) for check in checks]))


def test_what_cannot_be_tested_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"rollahead\[vllm\]"):
        bench("exactness", ["--generator", "vllm", "--short", "--out", str(tmp_path)])
    with pytest.raises(UsageError, match="sufix-automaton"):
        bench("exactness", ["--drafter", "sufix-automaton", "--short", "--out", str(tmp_path)])


# ---- the rule broken on purpose ----------------------------------------------------------------------------------


def accept_one_too_many(monkeypatch):
    honest = verification._Layout.leading
    monkeypatch.setattr(
        verification._Layout, "leading", lambda self, good: torch.minimum(honest(self, good) + 1, self.lengths)
    )


def reuse_the_uniform(monkeypatch):
    honest = verification.TokenUniforms.draw

    def draw(*arguments):
        numbers = honest(*arguments)
        return dataclasses.replace(numbers, residual=numbers.accept)

    monkeypatch.setattr(verification.TokenUniforms, "draw", staticmethod(draw))


def ignore_the_temperature_of_the_target(monkeypatch):
    honest = distribution.log_probabilities
    monkeypatch.setattr(processors, "log_probabilities", lambda logits, temperatures=None: honest(logits))


def state_another_temperature_of_the_draft(monkeypatch):
    def draw(self, rows, seed):
        drawn = self.rule != "deterministic"
        flat = np.sqrt(self.proposal) / np.sqrt(self.proposal).sum(-1, keepdims=True)
        return draw_constant(
            self.logits, self.params, rows, draft=None if drawn else self.draft,
            proposal=self.proposal if drawn else None, stated=flat if drawn else None, block=self.rule == "block",
            prompt_ids=np.array([1, 4, 6, 4]), response_ids=np.array([3, 5]), stop=(2,), seed=seed,
        )  # fmt: skip

    monkeypatch.setattr(Case, "draw", draw)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "kinds"),
    [
        (skip_residual, {"standard", "block"}),
        (accept_one_too_many, {"deterministic", "standard"}),
        (reuse_the_uniform, {"standard"}),
        (ignore_the_temperature_of_the_target, {"block"}),
        (state_another_temperature_of_the_draft, {"standard", "block"}),
    ],
)
def test_counting_catches(monkeypatch, logits, break_it, kinds):
    """What is not broken passes: see the test of the short suite."""
    break_it(monkeypatch)
    caught = failed(count_checks(logits, COUNTED, exactness.SEED))
    assert kinds <= {kind for kind in ("deterministic", "standard", "block") if any(kind in name for name in caught)}


@pytest.mark.parametrize(
    ("break_it", "kinds"),
    [
        (skip_residual, {"standard", "block"}),
        (accept_one_too_many, {"deterministic", "standard"}),
    ],
)
def test_enumeration_catches(monkeypatch, break_it, kinds):
    assert not failed(enumeration_checks(SHORT))
    break_it(monkeypatch)
    caught = failed(enumeration_checks(SHORT))
    assert kinds <= {kind for kind in ("deterministic", "standard", "block") if any(kind in name for name in caught)}


def least_p_value(tiny, drafter, *, rule="standard", twice=False, samples=3_000):
    path, law = tiny
    params = SamplingParams(temperature=0.8)
    asked = rollouts.requests(params, samples, 10)
    generator = GENERATORS["native"](path, drafter, verification=rule)
    if twice:
        rollouts.generate(generator, asked)
    found = rollouts.generate(generator, asked)
    return min(check.value for check in rollouts.joint_checks("", found, law.joint(params)))


@pytest.mark.parametrize("break_it", [skip_residual, accept_one_too_many, reuse_the_uniform])
def test_whole_responses_catch(monkeypatch, tiny, break_it):
    make = lambda: drafters.Drawn(rollouts.VOCABULARY, 1, sharpness=2.0)  # noqa: E731
    without_the_compiled_pass(monkeypatch)
    assert least_p_value(tiny, make()) > 1e-4
    break_it(monkeypatch)
    assert least_p_value(tiny, make()) < 1e-8


@pytest.mark.parametrize("change", COMPILED, ids=[new for _, new in COMPILED])
def test_whole_responses_catch_the_compiled_pass(monkeypatch, tiny, change):
    make = lambda: drafters.Drawn(rollouts.VOCABULARY, 1, sharpness=2.0)  # noqa: E731
    assert least_p_value(tiny, make()) > 1e-4
    change_the_compiled_pass(monkeypatch, *change)
    assert least_p_value(tiny, make()) < 1e-8


def test_numbers_that_block_verification_looked_at_must_not_come_again(monkeypatch):
    """With the numbers of the standard rule, the next verification would meet those it knows to be large."""
    assert not failed(repetition_checks(1))
    honest = verification.TokenUniforms.draw
    monkeypatch.setattr(
        verification.TokenUniforms, "draw", staticmethod(lambda *arguments: honest(*arguments[:5], False))
    )
    assert ["block" in name for name in failed(repetition_checks(1))] == [True]


@pytest.mark.slow
def test_seeds_that_come_again_need_new_numbers_where_a_drafter_remembers_them(monkeypatch, tiny):
    make = lambda: drafters.Remembering(rollouts.VOCABULARY, 1)  # noqa: E731
    assert least_p_value(tiny, make(), twice=True, samples=5_000) > 1e-4
    monkeypatch.setattr(verifier, "salted", lambda seeds, salts: seeds)
    assert least_p_value(tiny, make(), twice=True, samples=5_000) < 1e-6


def recorded(folder):
    folder.mkdir(exist_ok=True)
    drafter = lambda folder: build({"name": "suffix-automaton"})  # noqa: E731
    return rollouts.recorded_checks(GENERATORS["native"], drafter, "suffix-automaton", SCALE, 1, folder)


def report_the_draft(target, token_ids, lengths, draws, probabilities=None, *more):
    """Log-probs of the distribution that drafted, where there is one."""
    out = verification.verify(target, token_ids, lengths, draws, probabilities, *more)
    if probabilities is not None:
        for row, n in enumerate(out.accepted.tolist()):
            for depth in range(n):
                out.logprobs[row, depth] = probabilities[row, depth, out.tokens[row, depth]].log()
    return out


def report_the_residual(target, token_ids, lengths, draws, probabilities=None, *more):
    """Log-probs of the distribution that a token in place of a rejected one was drawn from."""
    out = verification.verify(target, token_ids, lengths, draws, probabilities, *more)
    if probabilities is not None:
        first = np.cumsum(lengths + 1) - (lengths + 1)
        for row, n in enumerate(out.accepted.tolist()):
            if n < lengths[row]:
                left = verification.residual(target.probabilities[first[row] + n], probabilities[row, n])
                out.logprobs[row, n] = (left / left.sum()).log()[out.tokens[row, n]]
    return out


@pytest.mark.parametrize(("lie", "kind"), [(report_the_draft, "accepted"), (report_the_residual, "residual")])
def test_recorded_values_catch_another_distributions_log_probs(monkeypatch, tmp_path, lie, kind):
    without_the_compiled_pass(monkeypatch)
    assert not failed(recorded(tmp_path / "a"))
    monkeypatch.setattr(verifier, "verify", lie)
    assert any(kind in name for name in failed(recorded(tmp_path / "b")))


def test_a_drafter_that_is_switched_off_fails_its_suite(tiny, tmp_path):
    class Broken(BaseDrafter):
        name = "broken"

        def propose(self, request):
            raise KeyError("nothing here")

    checks = rollouts.rollout_checks(
        GENERATORS["native"], lambda folder: Broken(), "broken", dataclasses.replace(SCALE, rollouts=200), 1, tmp_path
    )
    assert "broken was never switched off" in failed(checks)


# ---- what is tested ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "mtp",
        '{name = "draft-model", max_tokens = 2}',
        '{name = "arbiter", measure = false, drafters = [{name = "suffix-automaton", auxiliary = "mtp"}]}',
    ],
)
def test_drafters_of_a_model_are_made_for_the_suites_own(tmp_path, text):
    path = random_checkpoint(tmp_path / "tiny", rollouts.VOCABULARY, sharpness=0.6, seed=3)
    drafter, events = build_fitted(piece_of(text), path), []
    generator = GENERATORS["native"](path, drafter, on_event=events.append)
    found = rollouts.generate(generator, rollouts.requests(SamplingParams(), 200, 5))
    assert not events and sum(c.accepted for s in found for c in s.drafters.values()) > 0


def on_a_checkpoint(path, drafter):
    start = lambda told: GENERATORS["native"](path, drafter, on_event=told)  # noqa: E731
    return failed(checkpoint_checks(start, "it", path, 3_000, 2, 1))


def test_a_drafter_is_run_on_the_checkpoint_that_is_given(monkeypatch, tmp_path):
    path = random_checkpoint(tmp_path / "m", rollouts.VOCABULARY, sharpness=1.0, seed=3)
    make = lambda: drafters.Drawn(rollouts.VOCABULARY, 1, sharpness=2.0)  # noqa: E731
    assert not on_a_checkpoint(path, make())
    assert on_a_checkpoint(path, drafters.too_long(after=0)) == {"it on m, never switched off"}
    change_the_compiled_pass(monkeypatch, *SKIP_THE_RESIDUAL)
    assert any(name.startswith("first token") for name in on_a_checkpoint(path, make()))


def test_what_does_not_fit_is_refused_before_anything_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(exactness, "count_checks", lambda *arguments: pytest.fail("counted"))
    path = random_checkpoint(tmp_path / "m", rollouts.VOCABULARY, sharpness=1.0)
    other = random_checkpoint(tmp_path / "other", rollouts.VOCABULARY + 4, sharpness=1.0)
    of_other = f'{{name = "draft-model", path = "{other}"}}'
    for arguments, said in (
        (["--drafter", of_other], "give that one as --model DIR"),
        (["--drafter", of_other, "--model", str(path)], "has a vocabulary of 16 tokens|tokenizer"),
        (["--drafter", "mtp", "--model", str(path)], "head"),
        (["--model", "/nope"], "model folder /nope does not exist"),
        (["--drafter", "{name = 3}"], "a drafter needs a name"),
    ):
        with pytest.raises(UsageError, match=said):
            bench("exactness", [*arguments, "--short", "--out", str(tmp_path / "out")])


# ---- the statistics ----------------------------------------------------------------------------------------------


def test_chi_square_equals_scipys_with_rare_cells_pooled():
    rng = np.random.default_rng(0)
    law = np.array([0.5, 0.3, 0.15, 0.04, 0.006, 0.0035, 0.0005, 0.0])
    observed = rng.multinomial(1000, law)
    pooled = np.append(observed[:5], observed[5:].sum())
    # 6 + 4 expected: cells below 5 are pooled, here 3.5 + 0.5, and joined with the next as they are too few
    expected = np.array([500, 300, 150, 40, 10])
    seen = np.append(pooled[:4], pooled[4:].sum())
    assert chi_square_p_value(observed, law * 1000) == pytest.approx(stats.chisquare(seen, expected).pvalue)
    assert chi_square_p_value(np.array([500, 499, 1]), np.array([500.0, 500, 0])) == 0
    assert chi_square_p_value(np.array([1000, 0]), np.array([1000.0, 0])) == 1
    assert chi_square_p_value(np.array([900, 100]), np.array([500.0, 500])) == pytest.approx(
        special.chdtrc(1, 640), abs=1e-100
    )


def test_p_values_of_true_laws_are_uniform():
    rng = np.random.default_rng(1)
    law = rng.dirichlet(np.ones(30))
    p_values = [chi_square_p_value(rng.multinomial(5000, law), law * 5000) for _ in range(400)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_holm_rejects_step_by_step():
    assert holm([0.5, 0.00001, 0.9, 0.00004], 1e-4) == [False, True, False, False]
    assert holm([0.00001, 0.00003, 0.9, 0.00004], 1e-4) == [True, True, False, True]
    assert holm([], 1e-4) == []


def test_a_p_value_that_is_no_number_is_rejected_and_hides_no_other_rejection():
    assert holm([float("nan")], 1e-4) == [True]
    assert holm([0.9, float("nan"), 0.00001, 0.5], 1e-4) == [False, True, True, False]


def test_a_value_that_is_no_number_fails():
    check = bound_check("error", float("nan"), 1.0)
    assert isinstance(check, Check) and not check.passed and exactness.failures([check]) == [check]


def test_salted_seeds_are_new_ones():
    from pipeline.sampling.uniforms import salted

    seeds = np.array([7, 7, 7, 8, (1 << 62) - 1], np.int64)
    salts = np.array([0, 1, 2, 1, 3], np.int64)
    new = salted(seeds, salts)
    assert new[0] == 7 and len(set(new.tolist())) == 5 and (new >= 0).all()
    many = salted(np.zeros(20_000, np.int64), np.arange(1, 20_001))
    numbers = uniforms(many, np.zeros(1, np.int64), Stream.SAMPLE)
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
