"""Repetition, presence and frequency penalties, and the token counts they need."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def penalise(
    logits: Tensor, counts: Tensor, seen: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Logits [R, V] after penalties.

    Args:
        counts: [R, V], occurrences in the response.
        seen: bool [R, V], occurs in prompt or response.
        repetition: [R]; seen tokens' logits are divided by it where positive, multiplied where negative (CTRL,
            arXiv 1909.05858, as transformers and vLLM have it).
        presence: [R]; subtracted for tokens of the response.
        frequency: [R]; subtracted as often as a token occurs in the response.
    """
    factor = repetition.unsqueeze(1).to(logits.dtype)
    logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    taken = frequency.unsqueeze(1) * counts + presence.unsqueeze(1) * (counts > 0)
    return logits - taken.to(logits.dtype)


class TokenCounts:
    """Per sequence, how often each token occurs in the response and whether it occurs in the prompt.

    Kept incrementally: a step costs what it emits. Rows are there for sequences with penalties only.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._response = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._free: list[int] = []

    def add(self, prompt_ids: np.ndarray) -> int:
        """A row for a sequence that starts with this prompt."""
        if not self._free:
            size = len(self._response)
            more = max(4, size)
            self._response = torch.cat([self._response, self._response.new_zeros(more, self._response.shape[1])])
            self._prompt = torch.cat([self._prompt, self._prompt.new_zeros(more, self._prompt.shape[1])])
            self._free = list(range(size + more - 1, size - 1, -1))
        row = self._free.pop()
        self._response[row] = 0
        self._prompt[row] = False
        self._prompt[row, torch.from_numpy(prompt_ids).to(self._prompt.device)] = True
        return row

    def remove(self, row: int) -> None:
        self._free.append(row)

    def observe(self, rows: np.ndarray, emitted: Sequence[np.ndarray]) -> None:
        """Counts the tokens of B sequences; a row of -1 is not counted."""
        index = np.repeat(rows, [len(tokens) for tokens in emitted])
        tokens = np.concatenate([*emitted, np.zeros(0, np.int64)])[index >= 0]
        self._count(self._response, index[index >= 0], tokens)

    def with_drafts(
        self, rows: np.ndarray, positions: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Occurrences int32 [R, V] in the response, and bool [R, V] in prompt or response, as R scored positions see
        them: with the drafted tokens before them.

        Args:
            rows: int64 [R].
            positions: int64 [R], which of the N scored positions these are, ascending.
            token_ids: drafts, int64 [B, K]; row b holds `lengths[b]` tokens.
            lengths: int64 [B].
        """
        row = torch.from_numpy(rows).to(self._response.device)
        counts = self._response[row]
        draft = np.repeat(np.arange(len(lengths)), lengths + 1)[positions]
        depth = positions - (np.cumsum(lengths + 1) - (lengths + 1))[draft]
        before = np.arange(token_ids.shape[1]) < depth[:, None]
        where, column = np.nonzero(before)
        self._count(counts, where, token_ids[draft[where], column])
        return counts, self._prompt[row] | (counts > 0)

    @staticmethod
    def _count(counts: Tensor, rows: np.ndarray, tokens: np.ndarray) -> None:
        index = tuple(torch.from_numpy(a).to(counts.device) for a in (rows, tokens))
        counts.index_put_(index, counts.new_ones(len(rows)), accumulate=True)
