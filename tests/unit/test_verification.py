import numpy as np
import pytest
import torch
from scipy import special, stats

from pipeline.sampling import verification
from pipeline.sampling.target import plain_target
from pipeline.sampling.uniforms import Stream, uniforms
from pipeline.sampling.verification import TokenUniforms, packed_rows, verify

ROWS, VOCABULARY, LENGTH = 60_000, 40, 2
CPU = torch.device("cpu")
RULES = ["deterministic", "standard", "block"]


def verify_at(logits, drafts, lengths, temperatures, draws, q=None, **options):
    """Verification of rows that have a temperature and no other setting."""
    row, _ = packed_rows(lengths)
    return verify(plain_target(logits, temperatures[row]), drafts, lengths, draws, q, **options)


class Experiment:
    """One context and one draft distribution, verified ROWS times with different seeds (float32, as in production)."""

    def __init__(self, temperature, rule, stated_temperature=None):
        sampled = rule != "deterministic"
        rng = np.random.default_rng(7)
        logits = rng.normal(0, 2, (LENGTH + 1, VOCABULARY)).astype(np.float32)
        draft_logits = logits[:LENGTH] + rng.normal(0, 1, (LENGTH, VOCABULARY)).astype(np.float32)
        self.p = special.softmax(logits.astype(np.float64) / temperature, axis=1)
        self.q = special.softmax(draft_logits.astype(np.float64) / temperature, axis=1)
        stated = special.softmax(draft_logits.astype(np.float64) / (stated_temperature or temperature), axis=1)
        if sampled:
            drafts = np.stack([rng.choice(VOCABULARY, ROWS, p=q) for q in self.q], axis=1)
        else:
            drafts = np.tile(self.p[:LENGTH].argsort(axis=1)[:, -2], (ROWS, 1))
        self.drafts = drafts
        lengths = np.full(ROWS, LENGTH)
        draws = TokenUniforms.draw(np.arange(ROWS), np.zeros(ROWS, np.int64), lengths, sampled, CPU, rule == "block")
        out = verify_at(
            torch.from_numpy(logits).repeat(ROWS, 1),
            drafts,
            lengths,
            torch.full((ROWS,), temperature),
            draws,
            torch.from_numpy(stated).float().expand(ROWS, -1, -1) if sampled else None,
            block=rule == "block",
        )
        self.out, self.tokens, self.accepted = out, out.tokens.numpy(), out.accepted.numpy()

    def p_value(self, depth=0):
        """Of the tokens at a depth that were reached, against p; cells of few expected counts are pooled."""
        reached = self.tokens[self.accepted >= depth, depth]
        observed, expected = np.bincount(reached, minlength=VOCABULARY), self.p[depth] * len(reached)
        rare = expected <= 5
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        keep = expected > 0
        return stats.chisquare(observed[keep], expected[keep] * observed.sum() / expected[keep].sum()).pvalue


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_emitted_tokens_follow_the_target_and_acceptance_its_formula(temperature, rule):
    run = Experiment(temperature, rule)
    assert all(run.p_value(depth) > 1e-4 for depth in range(LENGTH + 1))
    if rule == "block":
        standard = Experiment(temperature, "standard")
        assert run.accepted.mean() > standard.accepted.mean() + 0.005
        return
    if rule == "standard":
        chance = np.minimum(run.p[0], run.q[0]).sum()
    else:
        chance = run.p[0, run.drafts[0, 0]]
    assert 0.05 < chance < 0.95
    assert abs((run.accepted > 0).mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / ROWS)


@pytest.mark.parametrize("rule", RULES)
def test_log_probs_and_entropies_are_the_targets_for_every_kind_of_token(rule):
    run = Experiment(0.6, rule)
    logp, entropies = np.log(run.p), stats.entropy(run.p, axis=1)
    emitted = np.arange(LENGTH + 1) <= run.accepted[:, None]
    assert set(run.accepted) == {0, 1, 2}
    expected = logp[np.arange(LENGTH + 1), run.tokens]
    np.testing.assert_allclose(run.out.logprobs.numpy()[emitted], expected[emitted], atol=1e-5)
    np.testing.assert_allclose(
        run.out.entropies.numpy()[emitted], np.broadcast_to(entropies, emitted.shape)[emitted], atol=1e-5
    )
    assert (run.tokens[~emitted] == -1).all()


@pytest.mark.parametrize("rule", ["standard", "block"])
def test_chi_square_catches_a_skipped_residual(monkeypatch, rule):
    monkeypatch.setattr(verification, "residual", lambda p, q: p)
    assert Experiment(1.0, rule).p_value() < 1e-10


def test_chi_square_catches_a_wrong_temperature_on_one_side():
    assert Experiment(0.6, "standard", stated_temperature=1.0).p_value() < 1e-10


def accept_one_too_many(monkeypatch):
    honest = verification._Layout.leading
    monkeypatch.setattr(
        verification._Layout, "leading", lambda self, good: torch.minimum(honest(self, good) + 1, self.lengths)
    )


def test_chi_square_catches_one_accepted_too_many(monkeypatch):
    accept_one_too_many(monkeypatch)
    assert Experiment(1.0, "standard").p_value() < 1e-10


def test_acceptance_rate_catches_one_accepted_too_many_of_a_deterministic_draft(monkeypatch):
    """Such a draft's emitted token is the draw itself: its own law holds, the context of the next one is wrong."""
    accept_one_too_many(monkeypatch)
    run = Experiment(1.0, "deterministic")
    chance = run.p[0, run.drafts[0, 0]]
    assert abs((run.accepted > 0).mean() - chance) > 40 * np.sqrt(chance * (1 - chance) / ROWS)


def ragged(temperatures, sampled, lengths=(0, 3, 1, 2), seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    logits = torch.from_numpy(rng.normal(0, 1, (int((lengths + 1).sum()), 6)).astype(np.float32))
    drafts = rng.integers(0, 6, (len(lengths), 3))
    q = torch.softmax(torch.from_numpy(rng.normal(0, 1, (len(lengths), 3, 6)).astype(np.float32)), -1)
    draws = TokenUniforms.draw(np.arange(len(lengths)) + seed, np.full(len(lengths), 9), lengths, sampled, CPU)
    out = verify_at(logits, drafts, lengths, torch.tensor(temperatures), draws, q if sampled else None)
    return logits, drafts, lengths, q, out


@pytest.mark.parametrize("sampled", [False, True])
def test_ragged_mixed_batch_equals_each_row_alone(sampled):
    accepted = set()
    for seed in range(60):
        temperatures = [1.0, 0.0, 0.7, 0.0]
        logits, drafts, lengths, q, out = ragged(temperatures, sampled, seed=seed)
        first = 0
        for row, length in enumerate(lengths):
            draws = TokenUniforms.draw(np.array([row + seed]), np.array([9]), lengths[row : row + 1], sampled, CPU)
            alone = verify_at(
                logits[first : first + length + 1],
                drafts[row : row + 1],
                lengths[row : row + 1],
                torch.tensor(temperatures[row : row + 1]),
                draws,
                q[row : row + 1] if sampled else None,
            )
            n = int(alone.accepted[0]) + 1
            accepted.add(n - 1)
            assert out.accepted[row] == alone.accepted[0]
            assert torch.equal(out.tokens[row, :n], alone.tokens[0, :n])
            torch.testing.assert_close(out.logprobs[row, :n], alone.logprobs[0, :n])
            torch.testing.assert_close(out.entropies[row, :n], alone.entropies[0, :n])
            first += length + 1
    assert accepted >= {0, 1, 2}


@pytest.mark.parametrize("sampled", [False, True])
def test_greedy_rows_emit_the_argmax_and_accept_only_it(sampled):
    logits, drafts, lengths, _, _ = ragged([0.0] * 4, sampled)
    best = logits.argmax(-1).numpy()
    row, depth = packed_rows(lengths)
    drafts[row[depth < lengths[row]], depth[depth < lengths[row]]] = best[depth < lengths[row]]
    drafts[1, 2] = (drafts[1, 2] + 1) % 6
    draws = TokenUniforms.draw(np.zeros(4, np.int64), np.zeros(4, np.int64), lengths, sampled, CPU)
    q = torch.full((4, 3, 6), 1 / 6) if sampled else None
    out = verify_at(logits, drafts, lengths, torch.zeros(4), draws, q)
    assert out.accepted.tolist() == [0, 2, 1, 2]
    logp = torch.log_softmax(logits, -1)
    emitted = depth <= out.accepted.numpy()[row]
    assert out.tokens[row, depth].numpy()[emitted].tolist() == best[emitted].tolist()
    np.testing.assert_allclose(
        out.logprobs[row, depth].numpy()[emitted], logp.max(-1).values.numpy()[emitted], atol=1e-6
    )


def test_entropies_are_left_out_when_not_wanted():
    logits = torch.randn(2, 5)
    draws = TokenUniforms(torch.full((2,), 0.5, dtype=torch.float64))
    target = plain_target(logits, torch.ones(2), with_entropy=False)
    out = verify(target, np.zeros((2, 0), np.int64), np.zeros(2, np.int64), draws)
    assert out.entropies is None and out.tokens.shape == (2, 1)


def test_random_numbers_belong_to_seed_and_position():
    lengths = np.array([2, 0])
    draws = TokenUniforms.draw(np.array([5, 6]), np.array([10, 20]), lengths, True, CPU)
    streams = (Stream.SAMPLE, Stream.ACCEPT, Stream.RESIDUAL)
    for stream, values in zip(streams, (draws.sample, draws.accept, draws.residual), strict=True):
        expected = uniforms(np.array([5, 5, 5, 6]), np.array([10, 11, 12, 20]), stream)
        assert values.tolist() == expected.tolist()


def test_block_verification_meets_a_position_with_another_number_each_time_it_comes():
    def accept(position, length):
        return TokenUniforms.draw(np.array([5]), np.array([position]), np.array([length]), True, CPU, True).accept

    numbers = torch.cat([accept(position, 3) for position in range(20)]).tolist()
    assert len(set(numbers)) == len(numbers)


def test_rows_of_drawn_and_deterministic_drafts_mix():
    rng = np.random.default_rng(0)
    lengths, sampled = np.array([2, 0, 3, 1, 3, 0]), np.array([True, True, False, True, True, False])
    temperatures = torch.tensor([1.0, 0.7, 1.0, 0.0, 0.5, 0.0])
    kinds = set()
    for seed in range(60):
        logits = torch.from_numpy(rng.normal(0, 1, (int((lengths + 1).sum()), 6)).astype(np.float32))
        drafts, q = rng.integers(0, 6, (6, 3)), torch.softmax(torch.randn(6, 3, 6), -1)
        q[~sampled] = float("nan")
        for block in (False, True):
            draws = TokenUniforms.draw(np.arange(6) + seed, np.full(6, 4), lengths, True, CPU, block)
            out = verify_at(logits, drafts, lengths, temperatures, draws, q, sampled=sampled, block=block)
            first = np.cumsum(lengths + 1) - (lengths + 1)
            for row, length in enumerate(lengths):
                one = slice(row, row + 1)
                kind = bool(sampled[row])
                numbers = TokenUniforms.draw(np.array([row + seed]), np.array([4]), lengths[one], kind, CPU, block)
                alone = verify_at(
                    logits[first[row] : first[row] + length + 1], drafts[one], lengths[one], temperatures[one],
                    numbers, q[one] if kind else None, block=block,
                )  # fmt: skip
                n = int(alone.accepted[0]) + 1
                kinds.add((kind, block, n))
                assert out.accepted[row] == n - 1
                assert torch.equal(out.tokens[row, :n], alone.tokens[0, :n])
                torch.testing.assert_close(out.logprobs[row, :n], alone.logprobs[0, :n])
    assert {(kind, block, n) for kind in (False, True) for block in (False, True) for n in (1, 2, 3)} <= kinds
