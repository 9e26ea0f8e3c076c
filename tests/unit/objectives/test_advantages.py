"""Reward shaping, advantage estimators and modulators against the papers' numbers and plain loops."""

import itertools
import math
import statistics

import pytest
import torch

from learner.modulators.attention_entropy import ranks_within
from learner.modulators.d3s import most_varied
from learner.pieces import build
from learner.schedules import TargetCurve, target_at
from pipeline.errors import UsageError
from tests.unit.objectives.scenes import batch_of, group_rewards, random_batch


def advantages(table, samples):
    return build("advantage", table)(samples).tolist()


def modulated(table, batch):
    return build("modulator", table)(batch)


def test_overlong_punishment_equals_the_published_vector():
    overlong = build("shaping", {"name": "overlong", "limit": 20480, "buffer": 4096})
    samples = group_rewards([1.0, 1.0, -1.0, 0.5], [0, 0, 0, 0], [18432, 16384, 20480, 10])
    assert overlong(samples).tolist() == pytest.approx([0.5, 1.0, -2.0, 0.5])


def test_overlong_punishment_takes_the_runs_limit_and_a_fifth_of_it_by_default():
    samples = group_rewards([0.0] * 3, [0, 0, 0], [80, 90, 100], max_response_tokens=100)
    assert build("shaping", {"name": "overlong"})(samples).tolist() == pytest.approx([0.0, -0.5, -1.0])


def test_signed_rewards():
    assert build("shaping", {"name": "signed"})(group_rewards([0.0, 1.0], [0, 0])).tolist() == [-1.0, 1.0]


def test_population_deviation_equals_the_published_vector():
    samples = group_rewards([1.0, 0.0, 0.0, 1.0], [0] * 4)
    expected = [0.999998, -0.999998, -0.999998, 0.999998]
    assert advantages({"name": "grpo", "population_std": True}, samples) == pytest.approx(expected, abs=1e-6)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards, groups = [1.0, 0.0, 5.0, 2.0, 2.0, 7.0], [0, 0, 1, 1, 1, 2]
    expected = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        others = [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and j != i]
        expected.append(reward - statistics.mean(others) if others else 0.0)
    assert advantages({"name": "leave-one-out"}, group_rewards(rewards, groups)) == pytest.approx(expected)


def test_leave_one_out_is_dr_grpos_estimator_times_n_over_n_less_one():
    samples = group_rewards([1.0, 0.0, 0.0, 1.0, 0.0], [0] * 5)
    plain = advantages({"name": "grpo", "normalise_std": False}, samples)
    assert advantages({"name": "leave-one-out"}, samples) == pytest.approx([a * 5 / 4 for a in plain])


def test_the_reward_itself():
    assert advantages({"name": "reward"}, group_rewards([0.5, -2.0], [0, 0])) == [0.5, -2.0]


def test_token_group_statistics_count_every_token():
    rewards, lengths = [1.0, 0.0, 1.0], [2, 6, 1]
    each = [r for r, n in zip(rewards, lengths, strict=True) for _ in range(n)]
    mean, deviation = statistics.mean(each), statistics.pstdev(each)
    found = advantages({"name": "token-group"}, group_rewards(rewards, [0] * 3, lengths))
    assert found == pytest.approx([(r - mean) / (deviation + 1e-6) for r in rewards], rel=1e-6)
    assert sum(a * n for a, n in zip(found, lengths, strict=True)) == pytest.approx(0.0, abs=1e-6)


def test_token_group_falls_back_to_grpo_where_an_advantage_would_be_five_or_more():
    samples = group_rewards([1.0, 0.0, 0.0, 0.0], [0] * 4, [1, 40, 40, 40])
    assert advantages({"name": "token-group"}, samples) == pytest.approx(
        advantages({"name": "grpo"}, samples), rel=1e-6
    )
    assert max(advantages({"name": "token-group", "fallback": 100}, samples)) > 5


def test_overlong_filter_takes_the_advantage_of_cut_off_samples():
    batch = random_batch()
    found, _ = modulated({"name": "overlong-filter"}, batch)
    assert (found[batch.sequence == 2] == 0).all()
    assert torch.equal(found[batch.sequence != 2], batch.advantage[batch.sequence != 2])


def test_empg_equals_the_published_vector():
    # three steps of one token each, whose entropies are 0, 1/2 and 1 of the range
    batch = batch_of([1.0] * 3, advantage=[1.0] * 3, sequence=[0, 1, 2], entropy_old=torch.tensor([0.2, 0.7, 1.2]),
                     turn=torch.zeros(3, dtype=torch.int64))  # fmt: skip
    g = [1.519441, 0.921588, 0.558971]
    found, _ = modulated({"name": "empg", "zeta": 0.0}, batch)
    assert found.tolist() == pytest.approx([value - statistics.mean(g) for value in g], abs=1e-5)


def test_empg_equals_a_loop_over_steps():
    batch = random_batch(3)
    steps = {}
    for i, (sequence, turn) in enumerate(zip(batch.sequence.tolist(), batch.turn.tolist(), strict=True)):
        steps.setdefault((sequence, turn), []).append(i)
    h = {key: statistics.mean(batch.entropy_old[i].item() for i in members) for key, members in steps.items()}
    low, high = min(h.values()), max(h.values())
    relative = {key: (value - low) / (high - low + 1e-8) for key, value in h.items()}
    mean_g = statistics.mean(math.exp(-value) for value in relative.values())
    value = {}
    for (sequence, turn), members in steps.items():
        value[sequence, turn] = batch.advantage[members[0]].item() * math.exp(-relative[sequence, turn]) / mean_g
        if (sequence, turn + 1) in steps:
            value[sequence, turn] += 0.1 * math.exp(-relative[sequence, turn + 1])
    mean = statistics.mean(value.values())
    keys = zip(batch.sequence.tolist(), batch.turn.tolist(), strict=True)
    found, metrics = modulated({"name": "empg"}, batch)
    assert found.tolist() == pytest.approx([value[key] - mean for key in keys], abs=1e-5)
    assert metrics["steps"] == len(steps) > 12


def test_tokens_that_end_a_step_divide_a_sample_as_turns_do():
    newline, dot = 3, 9
    tokens = [[5, newline, 5, 5, dot, newline, 5], [newline, 5, 5], [5, 5], [5, dot]]
    turns, sequence = [], []
    for sample, ids in enumerate(tokens):
        for position in range(len(ids)):
            turns.append(sum(token in (newline, dot) for token in ids[:position]))
            sequence.append(sample)
    more = {"entropy_old": torch.rand(len(turns), generator=torch.Generator().manual_seed(0)),
            "advantage": [1.0 if sample % 2 else -1.0 for sample in sequence]}  # fmt: skip
    one_turn = torch.zeros(len(turns), dtype=torch.int64)
    by_turn = batch_of([1.0] * len(turns), sequence=sequence, turn=torch.tensor(turns), **more)
    ids = torch.tensor([token for sample in tokens for token in sample])
    by_token = batch_of([1.0] * len(turns), sequence=sequence, turn=one_turn, token=ids, **more)
    found, metrics = modulated({"name": "empg", "ends": [newline, dot]}, by_token)
    expected, _ = modulated({"name": "empg", "turns": True}, by_turn)
    torch.testing.assert_close(found, expected)
    assert metrics["steps"] == 4 + 2 + 1 + 1
    assert not torch.allclose(found, modulated({"name": "empg", "ends": [dot]}, by_token)[0])


def test_the_most_varied_subset_is_the_best_of_all_subsets():
    draw = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 5):
        values = torch.randn(7, generator=draw)
        best = max(statistics.pvariance(subset) for subset in itertools.combinations(values.tolist(), count))
        assert statistics.pvariance(values[most_varied(values, count)].tolist()) == pytest.approx(best)


def test_d3s_keeps_the_shares_asked_for_and_relaxes_to_all():
    batch = random_batch()
    table = {"name": "d3s", "samples_a_prompt": [0.5, 1.0], "samples": [0.5, 1.0], "tokens": [0.4, 1.0], "steps": 3}
    from dataclasses import replace

    early, metrics = modulated(table, replace(batch, step=0))
    kept_samples = batch.sequence[early != 0].unique()
    assert metrics["samples_kept"] == pytest.approx(3 / 12)  # 2 of 4 a prompt, then half of those 6
    assert len(kept_samples) <= 3
    candidates = sum(int((batch.sequence == s).sum()) for s in kept_samples)
    assert int((early != 0).sum()) <= round(0.4 * candidates) + 1
    assert torch.equal(early[early != 0], batch.advantage[early != 0])
    late, _ = modulated(table, replace(batch, step=3))
    assert torch.equal(late, batch.advantage)


def entropy_batch(entropy, advantage, reward, step=0):
    from dataclasses import replace

    batch = batch_of([1.0] * 4, advantage=advantage, sequence=[0, 0, 1, 1], entropy_old=torch.full((4,), entropy))
    return replace(batch, samples=group_rewards(reward, [0, 0]), step=step)


@pytest.mark.parametrize(
    ("entropy", "step", "expected"),
    [
        (0.65, 0, [0.7, 0.7, -0.7, -0.7]),  # inside: GRPO
        (0.75, 0, [1.0, 1.0, 0.0, 0.0]),  # above: right answers only
        (0.55, 0, [0.0, 0.0, -1.0, -1.0]),  # below: wrong answers only
        (0.55, 50, [0.7, 0.7, -0.7, -0.7]),  # the corridor has come down to 0.5 .. 0.6
        (0.45, 100, [0.7, 0.7, -0.7, -0.7]),
        (0.55, 100, [1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_entrocraft_learns_from_one_side_outside_its_corridor(entropy, step, expected):
    batch = entropy_batch(entropy, [0.7, 0.7, -0.7, -0.7], [1.0, -1.0], step)
    assert modulated({"name": "entrocraft"}, batch)[0].tolist() == pytest.approx(expected)


def test_entropic_is_a_proportional_integral_controller():
    piece = build("modulator", {"name": "entropic", "target": 0.5})
    integral = 0.0
    for entropy in (0.6, 0.55, 0.3, 0.5):
        error = torch.tensor(entropy).item() - 0.5
        alpha = integral + error
        integral += 0.01 * error
        found, metrics = piece(entropy_batch(entropy, [1.0, 2.0, -1.0, -2.0], [1.0, 0.0]))
        expected = [1 + alpha, 2 * (1 + alpha), -(1 - alpha), -2 * (1 - alpha)]
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
        assert metrics["alpha"] == pytest.approx(alpha, abs=1e-6)
    again = build("modulator", {"name": "entropic", "target": 0.5})
    again.restore(piece.state())
    batch = entropy_batch(0.9, [1.0, 1.0, -1.0, -1.0], [1.0, 0.0])
    assert torch.equal(again(batch)[0], piece(batch)[0])


def test_entropic_weights_never_change_sign():
    found, metrics = modulated(
        {"name": "entropic", "target": 0.1}, entropy_batch(3.0, [1.0, 1.0, -1.0, -1.0], [1.0, 0.0])
    )
    assert found.tolist() == [2.0, 2.0, 0.0, 0.0] and metrics["alpha"] == 1.0


def test_target_curves_hold_and_then_anneal():
    linear = TargetCurve(start=0.6, end=0.2, hold=10, steps=20)
    assert [target_at(linear, step) for step in (0, 10, 20, 30, 99)] == pytest.approx([0.6, 0.6, 0.4, 0.2, 0.2])
    cosine = TargetCurve(start=0.6, end=0.2, hold=10, steps=20, shape="cosine")
    assert target_at(cosine, 15) == pytest.approx(0.6 - 0.4 * (1 - math.cos(math.pi / 4)) / 2)
    assert target_at(0.3, 7) == 0.3


def test_aepo_reinforces_positive_samples_of_another_temperature():
    from dataclasses import replace

    piece = build("modulator", {"name": "aepo", "every": 4})
    batch = batch_of([1.0] * 6, advantage=[0.9, 0.9, 0.01, -1.0, 0.5, -0.5], sequence=[0, 0, 1, 2, 3, 4])
    explored = torch.tensor([True, True, True, False, False])
    batch = replace(batch, samples=group_rewards([1.0] * 5, [0] * 5, explored=explored))
    found, metrics = piece(batch)
    assert found.tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0, 0.5, -0.5])
    assert metrics["reinforced_samples"] == 1.0
    assert piece.state()["entropy"] == pytest.approx(1.0)  # mean of -log pi_old of the last two


def test_aepo_explores_hotter_below_its_target_and_cooler_above():
    piece = build("modulator", {"name": "aepo", "target": 0.5, "every": 4})
    piece.restore({"entropy": 0.3})
    assert [piece.lease_temperature(lease) for lease in range(5)] == [None, None, None, 1.2, None]
    piece.restore({"entropy": 0.7})
    assert piece.lease_temperature(3) == 0.8
    with pytest.raises(UsageError, match="below hot"):
        build("modulator", {"name": "aepo", "hot": 0.5})


def test_attention_weights_go_from_anchors_to_explorers_and_average_to_one():
    from dataclasses import replace

    batch = replace(random_batch(), advantage=torch.ones(len(random_batch().sequence)))
    for step, direction in ((0, -1), (100, 1)):
        weight, _ = modulated({"name": "attention-entropy"}, replace(batch, step=step))
        for sequence in batch.sequence.unique():
            own = batch.sequence == sequence
            order = batch.attention_entropy[own].argsort()
            steps = weight[own][order].diff()
            assert (steps * direction > 0).all()
            assert float(weight[own].mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(weight.max()) == pytest.approx(1.5)


def test_ranks_within_samples():
    ranks = ranks_within(torch.tensor([3.0, 1.0, 2.0, 9.0, 5.0]), torch.tensor([0, 0, 0, 1, 2]))
    assert ranks.tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]
