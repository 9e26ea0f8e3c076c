import copy

import pytest
import torch
from torch import nn

from drafters.mtp.optimizer import HeadOptimizer
from pipeline.config.types import DrafterSection


def head_and_optimizer(name, **rates):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8, bias=False), nn.LayerNorm(8, bias=False), nn.Linear(8, 32, bias=False))
    return module, HeadOptimizer(module, DrafterSection(optimizer=name, **rates))


def step(module, optimizer, seed, factor=1.0):
    """What the step changed, by name."""
    before = copy.deepcopy(module.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step(factor)
    assert all(p.grad is None for p in module.parameters())
    return {n: p - before[n] for n, p in module.state_dict().items()}


def test_muon_goes_equally_far_in_all_directions_of_a_matrix_and_adamw_in_each_number():
    module, optimizer = head_and_optimizer("muon", matrix_learning_rate=0.1, learning_rate=0.01)
    changed = step(module, optimizer, 0, factor=0.5)
    for name, scale in (("0.weight", 1), ("2.weight", 2)):  # 8 x 16, and 32 x 8: the root of outputs over inputs
        lengths = torch.linalg.svdvals(changed[name].float()) / (0.05 * scale)
        assert lengths.min() > 0.6 and lengths.max() < 1.3, "Newton-Schulz in bfloat16 leaves them near one"
    torch.testing.assert_close(changed["1.weight"].abs(), torch.full((8,), 0.005), rtol=1e-3, atol=0)
    module, optimizer = head_and_optimizer("adamw", learning_rate=0.01)
    changed = step(module, optimizer, 0)["0.weight"].abs()
    torch.testing.assert_close(changed, torch.full((8, 16), 0.01), rtol=0.05, atol=0)  # and a little decay


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_what_goes_on_from_moments_does_as_if_it_had_never_stopped(name):
    module, optimizer = head_and_optimizer(name)
    for seed in range(3):
        step(module, optimizer, seed)
    saved = copy.deepcopy(module.state_dict()), {n: t.clone() for n, t in optimizer.moments().items()}
    step(module, optimizer, 3)
    again, resumed = head_and_optimizer(name)
    assert resumed.moments() == {}
    again.load_state_dict(saved[0])
    resumed.load(saved[1])
    assert resumed.moments().keys() == saved[1].keys()
    step(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    fresh, _ = head_and_optimizer(name)
    fresh.load_state_dict(saved[0])
    step(fresh, HeadOptimizer(fresh, DrafterSection(optimizer=name)), 3)
    assert not torch.equal(next(fresh.parameters()), next(module.parameters())), "moments matter"
