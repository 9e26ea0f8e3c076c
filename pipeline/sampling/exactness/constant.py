"""Many verifications of one context, as rows of one batch: the cheapest way to count what sampling settings do."""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.messages import SamplingParams
from pipeline.sampling.processors import Processors
from pipeline.sampling.target import plain_target
from pipeline.sampling.verification import TokenUniforms, verify

_ELEMENTS = 1 << 23
"""logits in memory at once"""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What N verifications of a draft of K tokens emitted."""

    tokens: np.ndarray
    """int64 [N, K+1], -1 behind a row's last token"""
    accepted: np.ndarray
    """int64 [N]"""
    logprobs: np.ndarray
    """float32 [N, K+1]"""
    drafts: np.ndarray
    """int64 [N, K]"""


def draw_constant(
    logits: np.ndarray,
    params: SamplingParams,
    rows: int,
    *,
    draft: np.ndarray | None = None,
    proposal: np.ndarray | None = None,
    stated: np.ndarray | None = None,
    block: bool = False,
    prompt_ids: np.ndarray | None = None,
    response_ids: np.ndarray | None = None,
    stop: tuple[int, ...] = (),
    seed: int = 0,
) -> Drawn:
    """`rows` verifications, each with numbers of its own, through the code that generates.

    Args:
        logits: [K+1, V], after each number of draft tokens, whichever they are.
        draft: int64 [K], the same in every row; None: drawn from `proposal`.
        proposal: [K, V], what drafts are drawn from.
        stated: [K, V], what verification is told they were drawn from; None: the truth.
        prompt_ids: of the context, for penalties.
        response_ids: before the draft.
    """
    rng = np.random.default_rng(seed)
    depth, vocabulary = len(logits) - 1, logits.shape[1]
    context = np.zeros(0, np.int64) if response_ids is None else response_ids
    processors = Processors(vocabulary, torch.device("cpu"))
    processors.check(params, stop)
    slot = processors.add(params, stop, np.zeros(0, np.int64) if prompt_ids is None else prompt_ids)
    processors.observe(np.array([slot]), [context])
    if stated is None:
        stated = proposal
    chunks = []
    size = max(1, _ELEMENTS // ((depth + 1) * vocabulary))
    for first in range(0, rows, size):
        count = min(size, rows - first)
        if proposal is None:
            drafts = np.tile(np.zeros(0, np.int64) if draft is None else draft, (count, 1))
        else:
            drafts = np.stack([rng.choice(vocabulary, count, p=q / q.sum()) for q in proposal], axis=1)
        lengths, positions = np.full(count, depth), np.full(count, len(context))
        target = processors.target(
            torch.from_numpy(logits).float().repeat(count, 1), np.full(count, slot), positions, drafts, lengths, False
        )
        draws = TokenUniforms.draw(
            seed * rows + first + np.arange(count), positions, lengths, proposal is not None, torch.device("cpu"), block
        )
        told = None if stated is None else torch.from_numpy(stated).float().expand(count, -1, -1)
        out = verify(target, drafts, lengths, draws, told, block=block)
        chunks.append((out.tokens.numpy(), out.accepted.numpy(), out.logprobs.numpy(), drafts))
    return Drawn(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))


def draw_repeatedly(
    law: np.ndarray,
    proposal: np.ndarray,
    rows: int,
    tokens: int,
    draft_tokens: int,
    *,
    block: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """int64 [rows, tokens]: responses of a model that draws every token from `law` [V], verified time after time.

    Args:
        proposal: [V], what every draft token is drawn from.
        draft_tokens: in each verification, also those beyond the end.
    """
    rng = np.random.default_rng(seed)
    logits = torch.log(torch.from_numpy(law)).float().expand(rows * (draft_tokens + 1), -1)
    target = plain_target(logits, torch.ones(len(logits)), with_entropy=False)
    stated = torch.from_numpy(proposal).float().expand(rows, draft_tokens, -1)
    responses = np.full((rows, tokens + draft_tokens + 1), -1, np.int64)
    positions, lengths = np.zeros(rows, np.int64), np.full(rows, draft_tokens)
    while (positions < tokens).any():
        drafts = rng.choice(len(law), (rows, draft_tokens), p=proposal)
        seeds = seed * rows + np.arange(rows)
        draws = TokenUniforms.draw(seeds, positions, lengths, True, torch.device("cpu"), block)
        out = verify(target, drafts, lengths, draws, stated, block=block)
        open_rows = np.flatnonzero(positions < tokens)
        emitted = out.accepted.numpy()[open_rows] + 1
        for depth in range(draft_tokens + 1):
            some = open_rows[depth < emitted]
            responses[some, positions[some] + depth] = out.tokens.numpy()[some, depth]
        positions[open_rows] += emitted
    return responses[:, :tokens]
