"""What is added to logits of named tokens: a bias, or minus infinity."""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from pipeline.messages import SamplingParams

_Key = tuple[object, ...]


class BiasTable:
    """Two rows for each distinct setting, shared by the sequences that have it: as it is, and stop tokens barred."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._table = torch.zeros(0, 2, vocab_size, device=device)
        self._users: dict[_Key, list[int]] = {}
        """setting -> its row, and how many sequences have it"""

    def add(self, params: SamplingParams, stop: Collection[int]) -> int:
        """The row of a setting, for one sequence more."""
        key = (
            params.logit_bias, params.allowed_token_ids, params.bad_token_ids,
            frozenset(stop) if params.min_new_tokens else None,
        )  # fmt: skip
        if key not in self._users:
            self._users[key] = [self._write(params, stop), 0]
        self._users[key][1] += 1
        return self._users[key][0]

    def remove(self, row: int) -> None:
        """One sequence less has the setting of `row`."""
        key = next(key for key, (used, _) in self._users.items() if used == row)
        self._users[key][1] -= 1
        if not self._users[key][1]:
            del self._users[key]

    def rows(self, rows: np.ndarray, too_short: np.ndarray) -> Tensor:
        """float32 [R, V] for table rows [R], with stop tokens barred where `too_short` bool [R]."""
        index = torch.from_numpy(2 * rows + too_short).to(self._table.device)
        return self._table.flatten(0, 1)[index]

    def _write(self, params: SamplingParams, stop: Collection[int]) -> int:
        used = {row for row, _ in self._users.values()}
        row = next(row for row in range(len(used) + 1) if row not in used)
        if row == len(self._table):
            self._table = torch.cat([self._table, self._table.new_zeros(1, *self._table.shape[1:])])
        bias = torch.zeros(self._table.shape[-1])
        if params.allowed_token_ids:
            bias[:] = float("-inf")
            bias[list(params.allowed_token_ids)] = 0.0
        bias[list(params.bad_token_ids)] = float("-inf")
        for token, value in params.logit_bias:
            bias[token] += value
        self._table[row] = bias
        # Some checkpoints name end-of-text ids beyond the logits they have.
        self._table[row, 1, [token for token in stop if token < len(bias)]] = float("-inf")
        return row
