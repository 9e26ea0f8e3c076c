"""Verification of drafts by rejection sampling: what is emitted is distributed as if there had been no drafts.

Three rules, all exact:

- A draft drawn from q, token by token (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): accept
  token x with probability min(1, p(x)/q(x)); after a rejection emit a token from norm(max(p - q, 0)).
- A draft drawn from q, as a block (Sun et al., arXiv 2403.10444): accepts at least as many tokens in expectation.
- A deterministic draft: draw y from p with the number plain sampling would use at that position; accept while y is the
  drafted token, else emit y. That is the first rule for a one-hot q, and makes text equal with and without drafting.

A greedy row's p is one-hot, and needs no rule of its own. Log-prob and entropy are the target's for every emitted
token, whichever way it came: marginally each is a sample of p.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.sampling.distribution import inverse_cdf
from pipeline.sampling.target import Target
from pipeline.sampling.uniforms import Stream, uniforms

_MAX_DRAFT_BITS = 16


@dataclass(frozen=True, slots=True)
class TokenUniforms:
    """Random numbers in (0, 1) for the N scored positions, float64 [N] each."""

    sample: Tensor
    accept: Tensor | None = None
    residual: Tensor | None = None
    """both only for drafts with probabilities"""

    @staticmethod
    def draw(
        seeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        probabilistic: bool,
        device: torch.device,
        block: bool = False,
    ) -> "TokenUniforms":
        """For B rows with `seeds` [B] whose next token has index `positions` [B], and drafts of `lengths` [B].

        Args:
            probabilistic: whether numbers for drafts with probabilities are wanted.
            block: whether these are for block verification.
        """
        row, depth = packed_rows(lengths)
        index = positions[row] + depth

        def stream(which: Stream, counter: np.ndarray) -> Tensor:
            return torch.from_numpy(uniforms(seeds[row], counter, which)).to(device)

        sample = stream(Stream.SAMPLE, index)
        if not probabilistic:
            return TokenUniforms(sample)
        # Block verification learns from numbers beyond the last token it accepts. Those positions come again in the
        # next verification, and must meet other numbers: counted from where this verification starts.
        counter = (positions[row] << _MAX_DRAFT_BITS) + depth if block else index
        accept = stream(Stream.BLOCK if block else Stream.ACCEPT, counter)
        return TokenUniforms(sample, accept, stream(Stream.RESIDUAL, index))


@dataclass(frozen=True, slots=True)
class VerifiedTokens:
    """Row b emits its first `accepted[b] + 1` tokens; the rest of the row is -1 (log-probs and entropies 0)."""

    tokens: Tensor
    """int64 [B, K+1]"""
    accepted: Tensor
    """int64 [B]"""
    logprobs: Tensor
    """float32 [B, K+1], nats, as `Target.logprobs`"""
    entropies: Tensor | None
    """float32 [B, K+1], nats, as `Target.entropies`"""
    kept_counts: Tensor | None = None
    """int64 [B, K+1], ids that truncation left to draw each emitted token from; 0 where nothing was truncated, and
    behind a row's last token; None where that is everywhere"""
    kept_ids: Tensor | None = None
    """int64 [sum of kept_counts], row by row, ascending for each token"""


def packed_rows(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and depth int64 [N] of the scored positions, `lengths[b] + 1` a row: after each draft token, and before."""
    row = np.repeat(np.arange(len(lengths)), lengths + 1)
    first = np.cumsum(lengths + 1) - (lengths + 1)
    return row, np.arange(len(row)) - first[row]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What the target wants beyond the draft distribution, unnormalised: max(p - q, 0)."""
    return (p - q).clamp_min(0)


def verify(
    target: Target,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    draws: TokenUniforms,
    probabilities: Tensor | None = None,
    sampled: np.ndarray | None = None,
    block: bool = False,
) -> VerifiedTokens:
    """Accepts the longest good prefix of each draft and emits one token more.

    Args:
        target: what is sampled at the N scored positions, packed row by row, N = sum(lengths + 1).
        token_ids: drafts, int64 [B, K]; row b holds `lengths[b]` tokens.
        lengths: int64 [B], 0 for a row without a draft.
        draws: the N positions' random numbers.
        probabilities: [B, K, V], what each draft token was drawn from; None: the drafts are deterministic.
        sampled: bool [B], rows whose draft was drawn from `probabilities`; the others are deterministic, and their
            probabilities are not read. None: all rows.
        block: whether drafts that were drawn are verified as blocks.
    """
    layout = _Layout.of(token_ids, lengths, target.probabilities.device)
    if probabilities is None or (sampled is not None and not sampled.any()):
        tokens = inverse_cdf(target.probabilities, draws.sample)
        accepted = layout.leading(tokens == layout.drafted)
    elif sampled is None or sampled.all():
        tokens, accepted = _verify_sampled(layout, target.probabilities, probabilities, draws, block)
    else:
        tokens, accepted = _verify_mixed(layout, target.probabilities, probabilities, draws, sampled, block)
    return _collect(layout, target, tokens, accepted, int(lengths.max()) + 1)


def _collect(layout: "_Layout", target: Target, tokens: Tensor, accepted: Tensor, width: int) -> VerifiedTokens:
    """What the B rows emit, padded to `width` columns; without waiting for a GPU, unless something was truncated."""
    column = torch.arange(width, device=accepted.device)
    index = (layout.first.unsqueeze(1) + column).clamp_max(len(tokens) - 1)
    inside = column <= accepted.unsqueeze(1)

    def padded(values: Tensor, fill: int) -> Tensor:
        return torch.where(inside, values[index], fill)

    kept_counts = kept_ids = None
    if target.kept is not None:
        emitted = layout.depth <= accepted[layout.row]
        counts, kept_ids = target.kept.of(emitted)
        kept_counts = torch.where(inside, torch.zeros_like(tokens).masked_scatter_(emitted, counts)[index], 0)
    return VerifiedTokens(
        tokens=padded(tokens, -1),
        accepted=accepted,
        logprobs=padded(target.logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), 0),
        entropies=None if target.entropies is None else padded(target.entropies, 0),
        kept_counts=kept_counts,
        kept_ids=kept_ids,
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

    def of_rows(self, rows: Tensor) -> tuple["_Layout", Tensor]:
        """The layout of some rows int64 [R] alone, and their positions int64 in this one."""
        lengths = self.lengths[rows]
        inside = torch.zeros(len(self.first), dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
        positions = inside[self.row].nonzero().squeeze(1)
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths + 1)
        first = (lengths + 1).cumsum(0) - (lengths + 1)
        return _Layout(row, self.depth[positions], self.drafted[positions], first, lengths), positions


def _verify_mixed(
    layout: _Layout, p: Tensor, q: Tensor, draws: TokenUniforms, sampled: np.ndarray, block: bool
) -> tuple[Tensor, Tensor]:
    """Tokens [N] and accepted [B] where some rows' drafts were drawn and the others' are deterministic."""
    assert draws.accept is not None and draws.residual is not None
    rows = torch.from_numpy(np.flatnonzero(sampled)).to(p.device)
    inner, positions = layout.of_rows(rows)
    numbers = TokenUniforms(draws.sample[positions], draws.accept[positions], draws.residual[positions])
    drawn_tokens, drawn_accepted = _verify_sampled(inner, p[positions], q[rows], numbers, block)
    tokens = inverse_cdf(p, draws.sample)
    accepted = layout.leading(tokens == layout.drafted)
    return tokens.index_copy(0, positions, drawn_tokens), accepted.index_copy(0, rows, drawn_accepted)


def _verify_sampled(layout: _Layout, p: Tensor, q: Tensor, draws: TokenUniforms, block: bool) -> tuple[Tensor, Tensor]:
    """Tokens [N] (meaningful up to each row's end) and accepted [B] for drafts that were drawn from q."""
    assert draws.accept is not None and draws.residual is not None
    q = q.to(p.dtype)
    x, last_column = layout.drafted.clamp_min(0), q.shape[1] - 1
    p_x = p.gather(1, x.unsqueeze(1)).squeeze(1)
    q_x = q[layout.row, layout.depth.clamp_max(last_column), x]
    if block:
        accepted, scale = _accept_block(layout, p, q, p_x, q_x, draws.accept)
    else:
        accepted = layout.leading((draws.accept * q_x < p_x) & (layout.drafted >= 0))
        scale = torch.ones_like(p[:1, :1])

    end = layout.first + accepted
    rejected = accepted < layout.lengths
    q_end = q[torch.arange(len(q), device=p.device), accepted.clamp_max(last_column)]
    rest = residual(p[end] * scale, q_end)
    # p = q leaves no residual; a rejection there has probability 0 but for rounding, and p is the law to fall back on.
    use_residual = rejected & (rest.sum(-1) > 0)
    weights = torch.where(use_residual.unsqueeze(-1), rest, p[end])
    drawn = inverse_cdf(weights, torch.where(rejected, draws.residual[end], draws.sample[end]))
    return x.index_copy(0, end, drawn), accepted


def _accept_block(
    layout: _Layout, p: Tensor, q: Tensor, p_x: Tensor, q_x: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Accepted [B] by block verification (arXiv 2403.10444, algorithm 2), and the P [B, 1] of the accepted prefix.

    With i tokens of a draft accepted, P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i)) from P_0 = 1 on. The longest prefix is
    accepted whose own number is below h_i = R_i / (R_i + 1 - P_i), R_i = sum max(P_i p_{i+1} - q_{i+1}, 0), or below
    P_i where the draft ends with it.
    """
    rows, width = len(layout.lengths), q.shape[1]
    ratio = torch.zeros(rows, width, dtype=torch.float64, device=p.device)
    inside = layout.drafted >= 0
    ratio[layout.row[inside], layout.depth[inside]] = (p_x.double() / q_x.double())[inside]
    kept = [torch.ones(rows, dtype=torch.float64, device=p.device)]
    for column in ratio.unbind(1):
        kept.append((kept[-1] * column).clamp_max(1.0))
    prefix = torch.stack(kept, 1)[layout.row, layout.depth]

    q_n = q[layout.row, layout.depth.clamp_max(width - 1)]
    rest = residual(p * prefix.to(p.dtype).unsqueeze(1), q_n).sum(-1).double()
    # P = 1 and nothing left, as where p = q, is the 0 / 0 that stands for acceptance.
    chance = torch.where((prefix >= 1) & (rest <= 0), 1.0, rest / (rest + 1 - prefix))
    chance = torch.where(inside, chance, prefix)
    good = (numbers < chance) & (layout.depth > 0)
    depth = torch.where(good, layout.depth, 0)
    accepted = torch.zeros_like(layout.lengths).scatter_reduce_(0, layout.row, depth, "amax")
    return accepted, prefix[layout.first + accepted].to(p.dtype).unsqueeze(1)
