"""The shipped contract test: every built-in piece passes it, a user's function can, and broken pieces fail."""

import pytest
import torch

from learner.pieces import BUILT_IN, build
from learner.testing import check_piece
from learner.tokens import Needs
from pipeline.config.types import Section
from pipeline.errors import UsageError

ALL = [(kind, name) for kind, names in BUILT_IN.items() for name in names]
VARIANTS = [
    ("correction", {"name": "tis", "level": "sequence"}),
    ("correction", {"name": "mis", "weight": "token"}),
    *[
        ("correction", {"name": "rejection", "level": level, "estimator": estimator})
        for level in ("token", "sequence-sum", "sequence-mean", "sequence-max")
        for estimator in ("k2", "k3")
    ],
    ("correction", {"name": "batch-normalisation", "level": "sequence"}),
    ("surrogate", {"name": "dppo", "divergence": "kl"}),
    ("surrogate", {"name": "reinforce", "cap": 2.0}),
    ("gate", {"name": "steer", "shape": "exponential"}),
    ("gate", {"name": "opsm", "anchor": "old"}),
    ("gate", {"name": "clip-cov", "low": -1.0, "fraction": 0.3}),
    ("gate", {"name": "kl-cov", "fraction": 0.3}),
    ("gate", {"name": "clip-b", "mu": 0.5}),
    ("gate", {"name": "clip-v", "mu": 0.5, "fraction": 0.3}),
    ("regulariser", {"name": "kl", "estimator": "k3+", "score": "ratio"}),
    ("modulator", {"name": "empg", "ends": [3, 9]}),
    ("modulator", {"name": "entropic", "target": {"start": 0.6, "end": 0.3}}),
]


@pytest.mark.parametrize(("kind", "name"), ALL)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_built_in_piece_keeps_to_its_contract(kind, name, seed):
    check_piece(kind, {"name": name}, seed)


@pytest.mark.parametrize(("kind", "table"), VARIANTS, ids=lambda value: str(value))
def test_so_do_their_other_forms(kind, table):
    check_piece(kind, table)


def squared(tokens, *, scale=1.0):
    """A user's surrogate: a function on the dataclass, its option a keyword."""
    return scale * -tokens.advantage * (tokens.logp - tokens.logp_old).exp().square() / 2


def certain_only(loss, tokens, *, above=0.5):
    kept = tokens.entropy.detach() < above
    return torch.where(kept, loss, torch.zeros_like(loss)), {"kept": kept}


def rank_advantages(samples):
    """Rewards as ranks within the whole batch, ties by their mean."""
    less = (samples.rewards[None, :] < samples.rewards[:, None]).float().sum(1)
    equal = (samples.rewards[None, :] == samples.rewards[:, None]).float().sum(1)
    return less + (equal - 1) / 2 - (len(samples.rewards) - 1) / 2


def no_weight(weight, batch):
    return weight


certain_only.needs = Needs.ENTROPY


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("surrogate", {"name": f"{__name__}:squared", "scale": 2.0}),
        ("gate", {"name": f"{__name__}:certain_only"}),
        ("advantage", {"name": f"{__name__}:rank_advantages"}),
        ("correction", {"name": f"{__name__}:no_weight"}),
    ],
)
def test_a_users_function_is_a_piece(kind, table):
    piece = check_piece(kind, table)
    assert piece.name == table["name"].partition(":")[2]


def test_a_users_functions_keywords_are_its_options():
    piece = build("surrogate", {"name": f"{__name__}:squared", "scale": 3.0})
    assert piece.options == {"scale": 3.0}
    assert build("gate", {"name": f"{__name__}:certain_only"}).needs == Needs.ENTROPY
    assert Needs.OLD_ENTROPY in piece.needs
    with pytest.raises(UsageError, match=r"no option 'scael' \(= 3.0\); did you mean 'scale'"):
        build("surrogate", {"name": f"{__name__}:squared", "scael": 3.0})


def wrong_shape(loss, tokens):
    return loss[:-1]


def batch_mean(loss, tokens):
    return loss - loss.detach().mean()


def in_place(samples):
    samples.rewards.mul_(2)
    return samples.rewards.clone()


def attached(weight, batch):
    return weight * torch.ones(1, requires_grad=True)


def infinite(weight, batch):
    return weight * (batch.logp_old - batch.logp_behaviour).exp()


def order_matters(samples):
    return samples.rewards - samples.rewards[0]


def no_gradient(tokens):
    return tokens.advantage * 1.0


def metric_of_a_batch(loss, tokens):
    return loss, {"mean": loss.detach().mean()}


@pytest.mark.parametrize(
    ("kind", "function", "said"),
    [
        ("gate", "wrong_shape", "shape"),
        ("gate", "batch_mean", "division into micro-batches"),
        ("gate", "metric_of_a_batch", "one value a token"),
        ("advantage", "in_place", "in place"),
        ("advantage", "order_matters", "order"),
        ("correction", "attached", "detached"),
        ("correction", "infinite", "finite"),
        ("surrogate", "no_gradient", "no gradient"),
    ],
)
def test_what_breaks_the_contract_is_named(kind, function, said):
    with pytest.raises(AssertionError, match=said):
        check_piece(kind, {"name": f"{__name__}:{function}"})


class WithoutNeeds:
    name = "without"
    needs = None

    class Options(Section):
        pass

    def __init__(self, options):
        pass

    def __call__(self, loss, tokens):
        return loss, {}


def test_needs_must_be_declared():
    with pytest.raises(AssertionError, match="Needs"):
        check_piece("gate", {"name": f"{__name__}:WithoutNeeds"})
