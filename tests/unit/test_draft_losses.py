"""Losses of draft heads against their formulas computed another way."""

import math

import pytest
import torch

from drafters.mtp.losses import LOSSES, Objective, acceptance, expected_accepted, kl_divergence

P, Q = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]])


def test_acceptance_and_its_gradient_on_a_known_pair():
    z = Q.log().requires_grad_()
    alpha = acceptance(z, P)
    (1 - alpha).sum().backward()
    assert alpha.item() == pytest.approx(0.9)
    torch.testing.assert_close(z.grad, torch.tensor([[-0.12, -0.09, 0.14, 0.07]]))


def test_gradient_of_acceptance_is_that_of_its_definition():
    torch.manual_seed(0)
    z = torch.randn(50, 13, requires_grad=True)
    p = torch.softmax(2 * torch.randn(50, 13), -1)
    weight = torch.rand(50)
    (acceptance(z, p) * weight).sum().backward()
    found, z.grad = z.grad, None
    (torch.minimum(torch.softmax(z, -1), p).sum(-1) * weight).sum().backward()
    torch.testing.assert_close(found, z.grad, rtol=1e-4, atol=1e-6)
    for column in range(3):
        step = torch.zeros_like(z)
        step[:, column] = 1e-3
        with torch.no_grad():
            slope = (acceptance(z + step, p) - acceptance(z - step, p)) / 2e-3 * weight
        torch.testing.assert_close(found[:, column], slope, rtol=0.03, atol=1e-3)


def test_end_to_end_loss_weights_depths_by_what_precedes_and_follows():
    alphas = torch.tensor([[0.9, 0.8, 0.7]], requires_grad=True)
    loss = 1 - expected_accepted(alphas)
    loss.sum().backward()
    assert 3 * expected_accepted(alphas).item() == pytest.approx(2.124)
    assert loss.item() == pytest.approx(0.292)
    torch.testing.assert_close(-alphas.grad, torch.tensor([[0.786667, 0.51, 0.24]]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ce", -math.log(0.2)),
        ("kl", 0.033762),
        ("tv", 0.1),
        ("e2e-tv", 0.1),
        ("lk-alpha", 0.105361),
        ("lk-lambda", 0.095548),
    ],
)
def test_losses_on_a_known_pair(name, expected):
    valid = torch.tensor([[True]])
    loss, alphas = Objective(name)([Q.log()], [P], [torch.tensor([2])], valid, torch.ones(1))
    assert loss.item() == pytest.approx(expected, abs=2e-6)
    assert alphas.item() == pytest.approx(0.9)
    assert kl_divergence(Q.log(), P).item() == pytest.approx(0.033762, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up_and_rows_without_a_target_count_nothing(name):
    torch.manual_seed(1)
    n, depths, vocabulary = 12, 3, 7
    logits = [torch.randn(n, vocabulary) for _ in range(depths)]
    p = [torch.softmax(torch.randn(n, vocabulary), -1) for _ in range(depths)]
    tokens = [torch.randint(vocabulary, (n,)) for _ in range(depths)]
    valid = torch.arange(depths) < torch.randint(1, depths + 1, (n, 1))
    counts = valid.float().sum(0)

    def part(rows):
        columns = [[x[rows] for x in xs] for xs in (logits, p, tokens)]
        return Objective(name)(*columns, valid[rows], counts)[0]

    whole = part(slice(None))
    torch.testing.assert_close(part(slice(0, 5)) + part(slice(5, n)), whole)
    for d in range(depths):
        logits[d][~valid[:, d]] = torch.randn(vocabulary)
    torch.testing.assert_close(part(slice(None)), whole)
    alphas = [torch.minimum(torch.softmax(z, -1), t).sum(-1) for z, t in zip(logits, p, strict=True)]
    if name == "tv":
        weights = torch.tensor([1, 0.8, 0.64]) / 2.44
        expected = sum(w * (1 - a)[v].mean() for w, a, v in zip(weights, alphas, valid.T, strict=True))
        torch.testing.assert_close(whole, expected)
    if name == "e2e-tv":
        rows = [
            sum(1 - math.prod(float(alphas[i][r]) for i in range(j + 1)) for j in range(depths) if valid[r, j]) / depths
            for r in range(n)
        ]
        assert whole.item() == pytest.approx(sum(rows) / n, abs=1e-6)
