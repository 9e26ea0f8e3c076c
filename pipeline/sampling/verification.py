"""Verification of drafts by rejection sampling: what is emitted is distributed as if there had been no drafts.

Two rules, both exact (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318):

- A draft drawn from q: accept token x with probability min(1, p(x)/q(x)); after a rejection emit a token from
  norm(max(p - q, 0)).
- A deterministic draft: draw y from p with the number plain sampling would use at that position; accept while y is the
  drafted token, else emit y. That is the first rule for a one-hot q, and makes text equal with and without drafting.

Log-prob and entropy are the target's for every emitted token, whichever way it came: marginally each is a sample of p.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.sampling.distribution import entropy, inverse_cdf, log_probabilities
from pipeline.sampling.uniforms import Stream, uniforms


@dataclass(frozen=True, slots=True)
class TokenUniforms:
    """Random numbers in (0, 1) for the N scored positions, float64 [N] each."""

    sample: Tensor
    accept: Tensor | None = None
    residual: Tensor | None = None
    """both only for drafts with probabilities"""

    @staticmethod
    def draw(
        seeds: np.ndarray, positions: np.ndarray, lengths: np.ndarray, probabilistic: bool, device: torch.device
    ) -> "TokenUniforms":
        """For B rows with `seeds` [B] whose next token has index `positions` [B], and drafts of `lengths` [B]."""
        row, depth = packed_rows(lengths)

        def stream(which: Stream) -> Tensor:
            return torch.from_numpy(uniforms(seeds[row], positions[row] + depth, which)).to(device)

        if not probabilistic:
            return TokenUniforms(stream(Stream.SAMPLE))
        return TokenUniforms(stream(Stream.SAMPLE), stream(Stream.ACCEPT), stream(Stream.RESIDUAL))


@dataclass(frozen=True, slots=True)
class VerifiedTokens:
    """Row b emits its first `accepted[b] + 1` tokens; the rest of the row is -1 (log-probs and entropies 0)."""

    tokens: Tensor
    """int64 [B, K+1]"""
    accepted: Tensor
    """int64 [B]"""
    logprobs: Tensor
    """float32 [B, K+1], nats at the sampling temperature; at temperature 1 for greedy rows"""
    entropies: Tensor | None
    """float32 [B, K+1], nats, full vocabulary, at the same temperature"""


def packed_rows(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and depth int64 [N] of the scored positions, `lengths[b] + 1` a row: after each draft token, and before."""
    row = np.repeat(np.arange(len(lengths)), lengths + 1)
    first = np.cumsum(lengths + 1) - (lengths + 1)
    return row, np.arange(len(row)) - first[row]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What the target wants beyond the draft distribution, unnormalised: max(p - q, 0)."""
    return (p - q).clamp_min(0)


def verify(
    logits: Tensor,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    temperatures: Tensor,
    draws: TokenUniforms,
    probabilities: Tensor | None = None,
    with_entropy: bool = True,
) -> VerifiedTokens:
    """Accepts the longest good prefix of each draft and emits one token more.

    Args:
        logits: the target's, [N, V], packed row by row, N = sum(lengths + 1); float64 is kept, else float32 is used.
        token_ids: drafts, int64 [B, K]; row b holds `lengths[b]` tokens.
        lengths: int64 [B], 0 for a row without a draft.
        temperatures: float32 [B]; 0 is greedy: argmax, and a draft token is accepted where it is the argmax.
        draws: the N positions' random numbers.
        probabilities: [B, K, V], what each draft token was drawn from; None: the drafts are deterministic.
        with_entropy: whether to compute entropies.
    """
    layout = _Layout.of(token_ids, lengths, logits.device)
    logp = log_probabilities(logits, temperatures[layout.row])
    p, best = logp.exp(), logits.argmax(-1)
    greedy = (temperatures == 0)[layout.row]
    if probabilities is None:
        tokens = torch.where(greedy, best, inverse_cdf(p, draws.sample))
        accepted = layout.leading(tokens == layout.drafted)
    else:
        tokens, accepted = _verify_sampled(layout, p, probabilities.to(p.dtype), draws, best, greedy)
    emitted = layout.depth <= accepted[layout.row]
    width = int(lengths.max()) + 1
    place = (layout.row * width + layout.depth)[emitted]

    def padded(values: Tensor, fill: int) -> Tensor:
        out = torch.full((len(lengths) * width,), fill, dtype=values.dtype, device=values.device)
        return out.index_copy_(0, place, values[emitted]).view(-1, width)

    return VerifiedTokens(
        tokens=padded(tokens, -1),
        accepted=accepted,
        logprobs=padded(logp.gather(1, tokens.unsqueeze(1)).squeeze(1), 0),
        entropies=padded(entropy(p), 0) if with_entropy else None,
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the N scored positions of B rows lie."""

    row: Tensor
    """int64 [N]"""
    depth: Tensor
    """int64 [N], draft tokens before the position"""
    drafted: Tensor
    """int64 [N], draft token the position's distribution is tested against; -1 after the last"""
    first: Tensor
    """int64 [B], each row's first position"""
    lengths: Tensor
    """int64 [B]"""

    @staticmethod
    def of(token_ids: np.ndarray, lengths: np.ndarray, device: torch.device) -> "_Layout":
        row, depth = packed_rows(lengths)
        drafted = np.full(len(row), -1, np.int64)
        inside = depth < lengths[row]
        drafted[inside] = token_ids[row[inside], depth[inside]]
        first = np.cumsum(lengths + 1) - (lengths + 1)
        return _Layout(*(torch.from_numpy(a).to(device) for a in (row, depth, drafted, first, lengths)))

    def leading(self, good: Tensor) -> Tensor:
        """int64 [B]: positions of each row before its first that is not `good` [N]; a row's last never is."""
        index = torch.arange(len(good), device=good.device)
        end = torch.full_like(self.first, len(good))
        return end.scatter_reduce_(0, self.row, torch.where(good, len(good), index), "amin") - self.first


def _verify_sampled(
    layout: _Layout, p: Tensor, q: Tensor, draws: TokenUniforms, best: Tensor, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [N] (meaningful up to each row's end) and accepted [B] for drafts that were sampled from q."""
    assert draws.accept is not None and draws.residual is not None
    x, last_column = layout.drafted.clamp_min(0), q.shape[1] - 1
    p_x = p.gather(1, x.unsqueeze(1)).squeeze(1)
    q_x = q[layout.row, layout.depth.clamp_max(last_column), x]
    good = torch.where(greedy, best == layout.drafted, (draws.accept * q_x < p_x) & (layout.drafted >= 0))
    accepted = layout.leading(good)

    end = layout.first + accepted
    rejected = accepted < layout.lengths
    q_end = q[torch.arange(len(q), device=p.device), accepted.clamp_max(last_column)]
    rest = residual(p[end], q_end)
    # p = q leaves no residual; a rejection there has probability 0 but for rounding, and p is the law to fall back on.
    use_residual = rejected & (rest.sum(-1) > 0)
    weights = torch.where(use_residual.unsqueeze(-1), rest, p[end])
    drawn = inverse_cdf(weights, torch.where(rejected, draws.residual[end], draws.sample[end]))
    tokens = x.index_copy(0, end, torch.where(greedy[end], best[end], drawn))
    return tokens, accepted
