"""Terms added to the loss, and how losses are added up, against their formulas computed another way."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from learner.pieces import BUILT_IN, build
from learner.tokens import Layout
from pipeline.errors import UsageError
from tests.unit.objectives.scenes import batch_of, objective, random_batch, random_tokens, tokens_of, with_plan


def kl_tokens(logp, reference, ratios=(1.0, 1.0)):
    return tokens_of(ratios, [0.0] * len(logp), logp=logp, logp_reference=torch.tensor(reference).double())


@pytest.mark.parametrize(
    ("estimator", "value"), [("k2", lambda x: x * x / 2), ("k3", lambda x: math.exp(x) - x - 1), ("k1", lambda x: -x)]
)
def test_kl_estimates_have_their_values(estimator, value):
    score = "policy" if estimator == "k1" else "none"
    term, metrics = build("regulariser", {"name": "kl", "estimator": estimator, "score": score, "coefficient": 0.1})(
        kl_tokens([-1.0, -2.0], [-1.5, -1.2])
    )
    assert term.tolist() == pytest.approx([0.1 * value(-0.5), 0.1 * value(0.8)])
    assert metrics["estimate"].tolist() == pytest.approx([value(-0.5), value(0.8)])


def test_straight_through_kl_has_the_value_of_k3_and_the_gradient_of_k2():
    tokens = kl_tokens([-1.0, -2.0], [-1.5, -1.2])
    term, _ = build("regulariser", {"name": "kl", "estimator": "k3+", "coefficient": 1.0})(tokens)
    assert term.tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.exp(0.8) - 1.8])
    assert torch.autograd.grad(term.sum(), tokens.logp)[0].tolist() == pytest.approx([0.5, -0.8])


@pytest.mark.parametrize(
    ("table", "unbiased"),
    [
        ({"estimator": "k2"}, True),
        ({"estimator": "k3+"}, True),
        ({"estimator": "k1", "score": "policy"}, True),
        ({"estimator": "k3", "score": "policy"}, True),
        ({"estimator": "k3", "score": "ratio"}, True),
        ({"estimator": "k3"}, False),
    ],
)
def test_gradients_of_kl_terms_in_expectation_against_the_reverse_kl(table, unbiased):
    """The expectation over the policy's own samples, enumerated: which estimates have the gradient of KL(pi || ref)."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=draw, dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=draw, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    kl = (logp.exp() * (logp - reference)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    tokens = replace(kl_tokens([0.0] * 6, [0.0] * 6, [1.0] * 6), logp=logp, logp_old=logp.detach(),
                     logp_reference=reference)  # fmt: skip
    term, _ = build("regulariser", {"name": "kl", "coefficient": 1.0, **table})(tokens)
    (gradient,) = torch.autograd.grad((logp.detach().exp() * term).sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-9) == unbiased


def test_kl_is_bounded():
    term, _ = build("regulariser", {"name": "kl", "coefficient": 1.0})(kl_tokens([-60.0, -0.1], [-0.1, -60.0]))
    assert term.tolist() == pytest.approx([10.0, 10.0])


def test_k1_alone_is_refused():
    with pytest.raises(UsageError, match="set score"):
        build("regulariser", {"name": "kl", "estimator": "k1"})


def test_the_squared_log_ratio():
    tokens = tokens_of([1.0, math.e, math.exp(-2)], [0.0] * 3)
    term, _ = build("regulariser", {"name": "log-ratio", "coefficient": 0.5})(tokens)
    assert term.tolist() == pytest.approx([0.0, 0.5, 2.0], abs=1e-9)


@pytest.mark.parametrize("aggregation", sorted(BUILT_IN["aggregation"]))
def test_positive_nll_is_a_mean_over_right_answers_tokens_whatever_the_aggregation(aggregation):
    batch = random_batch()
    _, tokens = random_tokens(batch, 0)
    whole = objective(surrogate={"name": "reinforce"}, aggregation={"name": aggregation},
                      regularisers=[{"name": "positive-nll", "coefficient": 0.1}])  # fmt: skip
    layout = Layout(batch.sequence, batch.samples.groups[batch.sequence], 8)
    tokens = replace(
        tokens, coefficient=whole.coefficients(layout).double(), advantage=torch.zeros_like(tokens.advantage)
    )
    loss, sums = whole.loss(tokens, whole.plans(tokens))
    right = tokens.reward > 0
    assert loss.item() == pytest.approx(0.1 * -tokens.logp[right].mean().item(), rel=1e-6)
    assert float(sums["positive-nll/right"]) == right.sum()
    nothing = replace(tokens, reward=torch.zeros_like(tokens.reward))
    assert whole.loss(nothing, whole.plans(nothing))[0].item() == 0.0


def test_the_adaptive_coefficient_rises_below_its_target_and_falls_above():
    piece = build("regulariser", {"name": "adaptive-entropy", "target": 0.2})
    tokens = tokens_of([1.0] * 2, [0.0] * 2, entropy=torch.tensor([0.1, 0.3]).double())
    coefficients = []
    for entropy in (0.1, 0.15, 0.3, 0.25, 0.4, 0.19):
        piece.begin(batch_of([1.0] * 2, entropy_old=torch.full((2,), entropy)))
        term, metrics = piece(tokens)
        coefficients.append(float(metrics["coefficient"][0]))
        assert term.tolist() == pytest.approx([-coefficients[-1] * 0.1, -coefficients[-1] * 0.3])
    # the bonus is applied only at or below the target; the coefficient falls on above it and never below 0
    assert coefficients == pytest.approx([0.005, 0.01, 0.0, 0.0, 0.0, 0.005])
    again = build("regulariser", {"name": "adaptive-entropy"})
    again.restore(piece.state())
    assert again.state() == piece.state() == {"coefficient": pytest.approx(0.005)}


def test_a_proportional_coefficient_acts_on_both_sides_of_the_target_and_keeps_its_integral():
    piece = build("regulariser", {"name": "adaptive-entropy", "target": 0.2, "step": 0.1, "proportional": 0.5})
    tokens = tokens_of([1.0] * 2, [0.0] * 2, entropy=torch.tensor([0.1, 0.3]).double())
    coefficients = []
    for entropy in (0.1, 0.3, 0.3, 9.0, 9.0, 0.2):
        piece.begin(batch_of([1.0] * 2, entropy_old=torch.full((2,), entropy)))
        coefficients.append(float(piece(tokens)[1]["coefficient"][0]))
    # errors 0.5, -0.5, -0.5, then -3 each; the integral is what is left where there is no error
    assert coefficients == pytest.approx([0.05 + 0.25, -0.25, -0.05 - 0.25, -1.0, -1.0, -0.65])
    assert piece.state() == {"coefficient": pytest.approx(-0.65)}


def siren_mean(entropy, sequence):
    """Mean over samples of the mean over the tokens from the 0.8 quantile on."""
    means = []
    for s in sorted(set(sequence)):
        own = torch.tensor([h for h, q in zip(entropy, sequence, strict=True) if q == s])
        means.append(own[own >= own.quantile(0.8)].mean().item())
    return statistics.mean(means)


@pytest.mark.parametrize("aggregation", ["token-mean", "constant-horizon"])
def test_siren_is_the_square_of_the_whole_mini_batches_distance(aggregation):
    batch = random_batch()
    _, tokens = random_tokens(batch, 0)
    whole = objective(surrogate={"name": "unclipped"}, aggregation={"name": aggregation},
                      regularisers=[{"name": "siren"}])  # fmt: skip
    layout = Layout(batch.sequence, batch.samples.groups[batch.sequence], 8)
    leaf = tokens.nucleus_entropy.detach().requires_grad_()
    tokens = replace(
        tokens, coefficient=whole.coefficients(layout).double(), advantage=torch.zeros_like(tokens.advantage),
        logp=tokens.logp.detach(), entropy=tokens.entropy.detach(), nucleus_entropy=leaf,
    )  # fmt: skip
    expected = siren_mean(leaf.tolist(), batch.sequence.tolist())

    first, _ = whole.loss(tokens, whole.plans(tokens))
    assert first.item() == pytest.approx(0.0, abs=1e-12)  # the anchor is the first value
    assert whole.regularisers[0].state()["anchor"] == pytest.approx(expected, rel=1e-5)

    whole.regularisers[0].restore({"anchor": expected - 0.3})
    loss, _ = whole.loss(tokens, whole.plans(tokens))
    assert loss.item() == pytest.approx(0.005 * 0.3**2, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, leaf)

    def square(point):
        return 0.005 * (siren_mean(point.tolist(), batch.sequence.tolist()) - (expected - 0.3)) ** 2

    for index in range(0, len(leaf), 7):
        bumped = leaf.detach().clone()
        bumped[index] += 1e-3
        # quantile masks do not change under so small a step
        numeric = (square(bumped) - square(leaf.detach())) / 1e-3
        assert float(gradient[index]) == pytest.approx(numeric, rel=0.02, abs=2e-7)


def by_hand(name, losses, sequence, group, horizon):
    samples = sorted(set(sequence))
    own = {s: [x for x, q in zip(losses, sequence, strict=True) if q == s] for s in samples}
    match name:
        case "token-mean":
            return statistics.mean(losses)
        case "sequence-mean":
            return statistics.mean(statistics.mean(values) for values in own.values())
        case "sequence-sum":
            return statistics.mean(sum(values) for values in own.values())
        case "constant-horizon":
            return statistics.mean(sum(values) for values in own.values()) / horizon
    groups = sorted(set(group))
    return statistics.mean(statistics.mean(x for x, g in zip(losses, group, strict=True) if g == one) for one in groups)


@pytest.mark.parametrize("name", sorted(BUILT_IN["aggregation"]))
def test_aggregations_equal_nested_means(name):
    draw = torch.Generator().manual_seed(0)
    sequence = [0, 0, 0, 1, 3, 3, 4, 4, 4, 4, 4]
    group = [0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2]
    losses = torch.randn(11, generator=draw)
    coefficients = build("aggregation", {"name": name})(Layout(torch.tensor(sequence), torch.tensor(group), 20))
    expected = by_hand(name, losses.tolist(), sequence, group, 20)
    assert float((coefficients * losses).sum()) == pytest.approx(expected, rel=1e-5)


def test_a_horizon_of_ones_own():
    layout = Layout(torch.tensor([0, 1]), torch.tensor([0, 0]), 20)
    assert build("aggregation", {"name": "constant-horizon", "horizon": 5})(layout).tolist() == pytest.approx([0.1] * 2)


@pytest.mark.parametrize("name", sorted(BUILT_IN["gate"]))
def test_tokens_that_a_gate_takes_out_stay_in_the_denominator(name):
    """The coefficient is decided before any gate, from where tokens are, and gates do not see it change."""
    batch = random_batch()
    _, tokens = random_tokens(batch, 0)
    whole = objective(gates=[{"name": name}])
    coefficients = whole.coefficients(Layout(batch.sequence, batch.sequence))
    assert coefficients.tolist() == pytest.approx([1 / len(batch.sequence)] * len(batch.sequence))
    loss, _ = whole.loss(replace(tokens, coefficient=coefficients.double()), whole.plans(tokens))
    gate = whole.gates[0]
    base = -tokens.advantage * (tokens.logp - tokens.logp_old).exp()
    left, _ = gate(base, with_plan(gate, tokens))
    assert loss.item() == pytest.approx(left.sum().item() / len(batch.sequence), rel=1e-6)
