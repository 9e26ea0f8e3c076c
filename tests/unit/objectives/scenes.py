"""Small sets of tokens with chosen numbers, and a policy given by its logits."""

import itertools
from dataclasses import replace

import torch

from learner.objective import Objective
from learner.pieces import BUILT_IN, build
from learner.testing import random_batch, random_tokens, under_logits
from learner.tokens import BatchTokens, GroupRewards, MicroBatchTokens

__all__ = ["random_batch", "random_tokens", "under_logits"]


def group_rewards(rewards, groups, lengths=None, **more):
    count = len(rewards)
    lengths = torch.ones(count, dtype=torch.int64) if lengths is None else torch.tensor(lengths)
    fields = {
        "truncated": torch.zeros(count, dtype=torch.bool),
        "response_lengths": lengths,
        "explored": torch.zeros(count, dtype=torch.bool),
        **more,
    }
    return GroupRewards(
        rewards=torch.tensor(rewards, dtype=torch.float32), groups=torch.tensor(groups), lengths=lengths, **fields
    )


def batch_of(ratios, *, advantage=None, sequence=None, **more):
    """Tokens with the given pi_old / mu."""
    ratios = torch.as_tensor(ratios, dtype=torch.float32)
    zeros = torch.zeros(len(ratios))
    return BatchTokens(
        logp_old=ratios.log() - 1,
        logp_behaviour=zeros - 1,
        sequence=torch.zeros(len(ratios), dtype=torch.int64) if sequence is None else torch.tensor(sequence),
        advantage=zeros if advantage is None else torch.as_tensor(advantage, dtype=torch.float32),
        **({"age": zeros.long(), "sampler": zeros.long()} | more),
    )


def tokens_of(ratios, advantage, **more):
    """Tokens with the given pi / pi_old, float64; log pi is a leaf."""
    ratios = torch.as_tensor(ratios, dtype=torch.float64)
    ones = torch.ones_like(ratios)
    logp = more.pop("logp", ratios.log() - 1.5)
    fields = {
        "logp": torch.as_tensor(logp, dtype=torch.float64).clone().requires_grad_(),
        "entropy": ones,
        "entropy_old": ones,
        "weight": ones,
        "sequence": torch.zeros(len(ratios), dtype=torch.int64),
        "coefficient": ones,
    } | {name: torch.as_tensor(value) for name, value in more.items()}
    logp_old = fields.pop("logp_old", fields["logp"].detach() - ratios.log())
    return MicroBatchTokens(
        **{"logp_behaviour": logp_old, **fields},
        logp_old=logp_old,
        advantage=torch.as_tensor(advantage, dtype=torch.float64),
    )


def gradient_of(surrogate, tokens):
    """d (sum of losses) / d log pi of a surrogate described by its table; as floats."""
    piece = build("surrogate", surrogate)
    tokens = with_plan(piece, tokens)
    loss, _ = piece(tokens)
    return torch.autograd.grad(loss.sum(), tokens.logp)[0].tolist()


def with_plan(piece, tokens):
    if not hasattr(piece, "plan"):
        return tokens
    with torch.no_grad():
        planned = piece.plan(replace(tokens, logp=tokens.logp.detach(), entropy=tokens.entropy.detach()))
    return replace(tokens, planned=planned)


def objective(**pieces):
    """An objective of the pieces given by their tables; the rest does nothing."""
    single = {"advantage": "grpo", "surrogate": "unclipped", "aggregation": "token-mean"}
    lists = ("shaping", "modulators", "corrections", "gates", "regularisers")
    parts = {key: build(key, pieces.get(key, {"name": name})) for key, name in single.items()}
    parts |= {key: tuple(build(key.rstrip("s"), piece) for piece in pieces.get(key, ())) for key in lists}
    return Objective(**parts, proximal=pieces.get("proximal", "recompute"))


WITH_PLAN = ["hapo", "m2po", "clip-cov", "kl-cov", "high-entropy", "steer", "clip-b", "clip-v", "siren", "positive-nll"]
ACTS = {
    "clip-cov": {"low": -1.0, "fraction": 0.3},
    "kl-cov": {"fraction": 0.3},
    "clip-b": {"mu": 0.0},
    "clip-v": {"mu": 0.1, "fraction": 0.3},
    "dppo": {"low": 0.05, "high": 0.05},
    "gspo": {"clip_low": 0.01, "clip_high": 0.01},
    "opsm": {"threshold": 0.01},
    "reinforce": {"cap": 1.1},
}
"""Values with which a piece acts on these few tokens."""


def built(name, **options):
    """An objective of the unclipped surrogate and one piece, with values and in a state in which it acts; or of one
    surrogate."""
    kind = next(kind for kind, names in BUILT_IN.items() if name in names)
    table = {"name": name, **ACTS.get(name, {}), **options}
    whole = objective(surrogate=table) if kind == "surrogate" else objective(**{f"{kind}s": [table]})
    if name == "siren":
        whole.regularisers[0].restore({"anchor": 0.4})
    if name == "adaptive-entropy":
        whole.regularisers[0].restore({"coefficient": 0.3})
        whole.modulated(batch_of([1.0, 1.0], entropy_old=torch.tensor([0.05, 0.15])))  # below its target of 0.2
    return whole


def assert_acts(whole, tokens):
    """The gates and regularisers change the gradient of the surrogate alone, by more than rounding: a check of a piece
    that does nothing would be no check of it."""

    def gradient_with(which):
        leaf = tokens.logp.detach().clone().requires_grad_()
        # Log-prob and entropy move together, so that pieces of the entropy alone have a gradient here.
        now = replace(tokens, logp=leaf, entropy=_following(tokens.entropy, leaf),
                      nucleus_entropy=_following(tokens.nucleus_entropy, leaf))  # fmt: skip
        still = replace(tokens, logp=leaf.detach(), entropy=tokens.entropy.detach(),
                        nucleus_entropy=tokens.nucleus_entropy.detach())  # fmt: skip
        return torch.autograd.grad(which.loss(now, which.plans(still))[0], leaf)[0]

    if whole.gates or whole.regularisers:
        change = gradient_with(whole) - gradient_with(replace(whole, gates=(), regularisers=()))
        assert float(change.abs().max()) > 1e-6, f"{[piece.name for piece in whole.pieces()]} do nothing here"


def _following(values, leaf):
    return values.detach() - 0.5 * (leaf - leaf.detach()) if len(values) else values


class FrozenFactors:
    """Within it, `detach` answers with what it answered the first time: stop-gradient factors stay as they were.

    Enter it once to record at the point of interest, then again for every point near by.
    """

    def __init__(self):
        self._recorded, self._replay = [], None

    def __enter__(self):
        self._original = torch.Tensor.detach
        original, recorded = self._original, self._recorded
        calls = iter(list(recorded)) if recorded else None

        def detach(tensor):
            if calls is None:
                recorded.append(original(tensor).clone())
                return recorded[-1]
            return next(calls)

        torch.Tensor.detach = detach

    def __exit__(self, *_):
        torch.Tensor.detach = self._original


def numeric_gradient(function, point, eps=1e-6):
    """Central differences of a scalar function of a float64 tensor."""
    gradient = torch.zeros_like(point)
    for index in itertools.product(*map(range, point.shape)):
        up, down = point.clone(), point.clone()
        up[index] += eps
        down[index] -= eps
        gradient[index] = (function(up) - function(down)) / (2 * eps)
    return gradient
