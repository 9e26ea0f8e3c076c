"""Checks that every piece of an objective must pass, ours or a stranger's.

from learner.testing import check_piece

def test_my_gate():
    check_piece("gate", {"name": "my_package.my_gate:MyGate", "threshold": 0.3})
"""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from learner.objective import Objective
from learner.pieces import build
from learner.ratios import log_ratio
from learner.segments import positions, token_uniforms
from learner.tokens import BatchTokens, GroupRewards, Layout, MicroBatchTokens, Needs, selected

_NEUTRAL = {"advantage": "grpo", "surrogate": "unclipped", "aggregation": "token-mean"}
"""What an objective needs beside the piece that is checked."""


def check_piece(kind: str, piece: Mapping[str, Any], seed: int = 0) -> Any:
    """Build a piece from its configuration table and hold it to its kind's contract; returns the piece.

    Checked on random samples: shapes and types, finite results, nothing changed in place, corrections without gradient,
    the same result when the samples come in another order and, for what is trained, when they are divided into
    micro-batches; that a surrogate has a gradient; and that nothing fails without any token.

    Args:
        kind: shaping, advantage, modulator, correction, surrogate, gate, regulariser or aggregation.
        piece: `name` beside its own options, as in the configuration.
        seed: of the samples.

    Raises:
        AssertionError: it says which part of the contract is broken.
        UsageError: the table does not describe a piece.
    """
    built = build(kind, piece)
    assert isinstance(built.needs, Needs), f"{built.name}: needs is {built.needs!r}, not learner.tokens.Needs"
    batch = random_batch(seed)
    if kind in ("shaping", "advantage"):
        _check_samples(built, batch)
    elif kind in ("modulator", "correction"):
        _check_batch(kind, piece, batch)
    elif kind == "aggregation":
        _check_aggregation(built, batch)
    else:
        _check_tokens(kind, piece, batch, seed)
    return built


def random_batch(seed: int = 0, samples: int = 12, group_size: int = 4) -> BatchTokens:
    """A batch with ratios on both sides of usual bounds, a cut-off and an explored sample, and several turns."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (samples,), generator=draw)
    sequence = torch.arange(samples).repeat_interleave(lengths)
    count = len(sequence)
    groups = torch.arange(samples) // group_size
    rewards = (torch.rand(samples, generator=draw) < 0.5).float()
    rewards[::group_size], rewards[1::group_size] = 0.0, 1.0
    logp_old = -3 * torch.rand(count, generator=draw) - 0.01
    return BatchTokens(
        logp_old=logp_old,
        logp_behaviour=logp_old + 0.3 * torch.randn(count, generator=draw).clamp(-2, 2),
        sequence=sequence,
        advantage=torch.randn(samples, generator=draw)[sequence],
        age=torch.randint(0, 4, (count,), generator=draw),
        sampler=torch.zeros(count, dtype=torch.int64),
        entropy_old=torch.rand(count, generator=draw) + 0.05,
        token=torch.arange(count) * 7 % 12,
        turn=positions(sequence) // 3,
        attention_entropy=torch.rand(count, generator=draw),
        samples=GroupRewards(
            rewards=2 * rewards - 1,
            groups=groups,
            lengths=lengths,
            truncated=torch.arange(samples) == 2,
            response_lengths=lengths,
            explored=torch.arange(samples) % 6 == 5,
            max_response_tokens=8,
        ),
        step=3,
    )


def random_tokens(batch: BatchTokens, seed: int = 0, vocabulary: int = 12) -> tuple[torch.Tensor, MicroBatchTokens]:
    """Logits [T, V], float64 with gradient, and the batch's tokens under the policy that has them."""
    draw = torch.Generator().manual_seed(seed + 1)
    count = len(batch.sequence)
    logits = (1.5 * torch.randn(count, vocabulary, generator=draw, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, vocabulary, (count,), generator=draw)
    drift = 0.3 * torch.randn(count, generator=draw, dtype=torch.float64)
    tokens = under_logits(
        logits,
        target,
        MicroBatchTokens(
            logp=torch.empty(0), entropy=torch.empty(0), logp_old=torch.empty(0), entropy_old=torch.empty(0),
            logp_behaviour=torch.empty(0), advantage=batch.advantage.double(), weight=torch.ones(count).double(),
            sequence=batch.sequence, coefficient=torch.full((count,), 1.0 / max(count, 1)).double(),
            reward=_samples(batch).rewards[batch.sequence], age=batch.age, sampler=batch.sampler,
            uniform=token_uniforms(seed, batch.step, batch.sequence, positions(batch.sequence)), step=batch.step,
        ),
    )  # fmt: skip
    logp, entropy = tokens.logp.detach(), tokens.entropy.detach()
    return logits, replace(
        tokens,
        logp_old=logp + drift,
        logp_behaviour=logp + drift.flip(0),
        entropy_old=entropy * (1 + 0.1 * drift),
        logp_reference=logp + 0.5 * drift.flip(0),
    )


def under_logits(logits: torch.Tensor, target: torch.Tensor, tokens: MicroBatchTokens) -> MicroBatchTokens:
    """The tokens under the policy with these logits [T, V]; the nucleus is the whole vocabulary."""
    logprobs = logits.log_softmax(-1)
    p = logprobs.exp()
    entropy = -(p * logprobs).sum(-1)
    return replace(
        tokens,
        logp=logprobs.gather(1, target[:, None])[:, 0],
        entropy=entropy,
        nucleus_entropy=entropy,
        expected_score=(p.square() * (logprobs + entropy[:, None])).sum(-1).detach(),
    )


def select(tokens: MicroBatchTokens, index: torch.Tensor) -> MicroBatchTokens:
    """Some of the tokens, in the order of `index`."""
    names = [f.name for f in fields(MicroBatchTokens) if f.name != "step"]
    return replace(tokens, **{n: value[index] for n in names if len(value := getattr(tokens, n))})


def _samples(batch: BatchTokens) -> GroupRewards:
    assert batch.samples is not None
    return batch.samples


def _check_samples(piece: Any, batch: BatchTokens) -> None:
    samples = _samples(batch)
    before = samples.rewards.clone()
    result = piece(samples)
    _check_values(piece, result, samples.rewards)
    assert torch.equal(samples.rewards, before), f"{piece.name} changes the rewards in place"
    order = torch.randperm(len(before), generator=torch.Generator().manual_seed(1))
    names = [f.name for f in fields(GroupRewards) if f.name != "max_response_tokens"]
    shuffled = replace(samples, **{name: getattr(samples, name)[order] for name in names})
    _check_close(piece, piece(shuffled), result[order], "depends on the order of the samples")
    nothing = replace(samples, **{name: getattr(samples, name)[:0] for name in names})
    assert len(piece(nothing)) == 0, f"{piece.name} gives {len(piece(nothing))} values for no sample"


def _check_batch(kind: str, table: Mapping[str, Any], batch: BatchTokens) -> None:
    def result_of(given: BatchTokens) -> torch.Tensor:
        # A fresh piece each time: one that remembers may answer a second batch differently.
        piece = build(kind, table)
        value, metrics = piece(torch.ones_like(given.advantage), given) if kind == "correction" else piece(given)
        assert all(isinstance(number, float) for number in metrics.values()), f"{piece.name}: metrics must be floats"
        return value

    piece = build(kind, table)
    before = batch.advantage.clone(), batch.logp_old.clone()
    result = result_of(batch)
    _check_values(piece, result, batch.advantage)
    assert not result.requires_grad, f"{piece.name} must be detached"
    assert torch.equal(before[0], batch.advantage), f"{piece.name} changes advantages in place"
    assert torch.equal(before[1], batch.logp_old), f"{piece.name} changes log-probs in place"
    order = _other_order(batch.sequence)
    _check_close(piece, result_of(selected(batch, order)), result[order], "depends on the order of the samples")
    assert len(result_of(selected(batch, order[:0]))) == 0, f"{piece.name} gives values for no token"
    values = torch.tensor([torch.inf, -torch.inf, torch.nan])
    broken = replace(batch, logp_behaviour=torch.cat([values, batch.logp_behaviour[3:]]))
    assert bool(result_of(broken).isfinite().all()), f"{piece.name} gives weights that are not finite"
    for name in ("logp_old", "logp_behaviour", "entropy_old", "attention_entropy"):
        changed: dict[str, Any] = {name: torch.cat([values, getattr(batch, name)[3:]])}
        _check_within_objective(kind, table, replace(batch, **changed))


def _check_within_objective(kind: str, table: Mapping[str, Any], batch: BatchTokens) -> None:
    """With values that are not finite, as an objective gives them to a piece: results, metrics and memory are."""
    piece = build(kind, table)
    parts: dict[str, Any] = {key: build(key, {"name": name}) for key, name in _NEUTRAL.items()}
    whole = Objective(**parts | {f"{kind}s": (piece,)})
    for _ in range(2):
        result, metrics = whole.weights(batch) if kind == "correction" else whole.modulated(batch)
        tensor = result.advantage if isinstance(result, BatchTokens) else result
        numbers = [*metrics.values(), *(value for state in whole.state().values() for value in state.values())]
        assert bool(tensor.isfinite().all()) and all(map(math.isfinite, numbers)), (
            f"{piece.name} gives values that are not finite, or remembers one"
        )


def _check_aggregation(piece: Any, batch: BatchTokens) -> None:
    groups = _samples(batch).groups[batch.sequence]
    layout = Layout(batch.sequence, groups, 8)
    result = piece(layout)
    _check_values(piece, result, batch.advantage)
    assert bool((result > 0).all()), f"{piece.name} gives a token no share in the loss"
    order = _other_order(batch.sequence)
    _check_close(piece, piece(Layout(batch.sequence[order], groups[order], 8)), result[order], "depends on the order")


def _check_tokens(kind: str, table: Mapping[str, Any], batch: BatchTokens, seed: int) -> None:
    piece = build(kind, table)
    _, tokens = random_tokens(batch, seed)
    order = _other_order(batch.sequence)
    loss, gradient = _loss(kind, piece, tokens)
    _check_values(piece, loss, tokens.advantage)
    assert bool(gradient.isfinite().all()), f"{piece.name} has a gradient that is not finite"
    if kind == "surrogate":
        assert bool((gradient != 0).any()), f"{piece.name} has no gradient"
    shuffled, moved = _loss(kind, build(kind, table), select(tokens, order))
    _check_close(piece, shuffled, loss[order], "depends on the order of the samples")
    _check_close(piece, moved, gradient[order], "has a gradient that depends on the order of the samples")
    half = batch.sequence <= batch.sequence.max() // 2
    divided, cut = _loss(kind, build(kind, table), tokens, [half.nonzero()[:, 0], (~half).nonzero()[:, 0]])
    _check_close(piece, divided, loss, "depends on the division into micro-batches")
    _check_close(piece, cut, gradient, "has a gradient that depends on the division into micro-batches")
    assert len(_loss(kind, build(kind, table), select(tokens, order[:0]))[0]) == 0, f"{piece.name} fails without tokens"


def _loss(
    kind: str, piece: Any, tokens: MicroBatchTokens, parts: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token and the gradient of its sum with respect to log-probs; in parts, if given, of one plan."""
    index = torch.arange(len(tokens.sequence))
    planned = torch.empty(0)
    leaf = tokens.logp.detach().clone().requires_grad_()
    now = replace(tokens, logp=leaf, entropy=tokens.entropy.detach(), nucleus_entropy=tokens.nucleus_entropy.detach())
    if hasattr(piece, "plan"):
        with torch.no_grad():
            planned = piece.plan(replace(now, logp=leaf.detach()))
    values = torch.zeros_like(tokens.advantage)
    for part in parts or [index]:
        view = replace(select(now, part), planned=planned[part] if len(planned) else planned)
        base = -view.advantage * log_ratio(view.logp, view.logp_old).exp()
        result = piece(base, view) if kind == "gate" else piece(view)
        assert isinstance(result, tuple) and len(result) == 2, f"{piece.name} must return a tensor and metrics"
        _check_shape(piece, result[0], view.advantage)
        for name, metric in result[1].items():
            assert metric.shape == view.advantage.shape, f"{piece.name}: metric {name} is not one value a token"
            assert not metric.requires_grad, f"{piece.name}: metric {name} must be detached"
        values = values.index_add(0, part, result[0].to(values.dtype))
    if not values.requires_grad:
        return values, torch.zeros_like(values)
    (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
    return values.detach(), torch.zeros_like(values) if gradient is None else gradient


def _other_order(sequence: torch.Tensor) -> torch.Tensor:
    """An index that puts the samples in another order and leaves each one's tokens together."""
    samples = sequence.unique()
    shuffled = samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(2))]
    return torch.cat([(sequence == sample).nonzero()[:, 0] for sample in shuffled])


def _check_values(piece: Any, result: torch.Tensor, like: torch.Tensor) -> None:
    _check_shape(piece, result, like)
    assert result.is_floating_point(), f"{piece.name} returns {result.dtype}, not floats"
    assert bool(result.isfinite().all()), f"{piece.name} returns values that are not finite"


def _check_shape(piece: Any, result: torch.Tensor, like: torch.Tensor) -> None:
    assert isinstance(result, torch.Tensor), f"{piece.name} returns {type(result).__name__}, not a tensor"
    assert result.shape == like.shape, f"{piece.name} returns shape {list(result.shape)}, not {list(like.shape)}"


def _check_close(piece: Any, result: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert torch.allclose(result.double(), expected.double(), atol=1e-6, rtol=1e-5), f"{piece.name} {what}"
