"""Which layers can be skipped: the dynamic program of CLaSp (Chen et al., arXiv 2505.24196, section 3).

g[i][j] is the best known state after the first i layers with j of them skipped, for the token that was verified last:

    g[i][0] = x_i                                     from the verification
    g[i][j] = g[i-1][j-1]  or  f_i(g[i-1][j])         skip layer i or run it, whichever is nearer to x_i by cosine

An approximation, since a cell keeps one state only. All states of a row run through a layer together, each attending to
the tokens before this one and to itself (the paper's sequence parallelism). Here several sequences can share a set: the
mean of their cosines decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drafters.base import Target
from pipeline.models.kv_cache import PAGE, AttentionPlan

Run = Callable[[int, Tensor], Tensor]
"""layer and J states of S tokens [J, S, H] -> the states after it"""


@dataclass(frozen=True, slots=True)
class SkipTable:
    """What the program found for up to M skipped layers."""

    skips: np.ndarray
    """bool [layers + 1, M + 1], whether g[i][j] skips layer i"""
    similarities: np.ndarray
    """float64 [M + 1], cosine of the last state with that of all layers, by layers skipped"""

    def skipped(self, count: int) -> tuple[int, ...]:
        """The best known set of `count` layers, from 0."""
        found: list[int] = []
        for i in range(len(self.skips) - 1, 0, -1):
            if self.skips[i, count - len(found)]:
                found.append(i - 1)
        return tuple(reversed(found))


def cosines(states: Tensor, truth: Tensor) -> Tensor:
    """float32 [J], of J states of S tokens [J, S, H] with theirs [S, H]; the mean over tokens."""
    return torch.nn.functional.cosine_similarity(states.float(), truth.float().unsqueeze(0), dim=-1).mean(-1)


def solve(states: Tensor, run: Run, most: int) -> SkipTable:
    """Runs the program.

    Args:
        states: [layers + 1, S, H], the embedding of S tokens and what each layer made of it.
        run: a layer.
        most: layers that may be skipped, M, less than there are.
    """
    layers = len(states) - 1
    skips = np.zeros((layers + 1, most + 1), np.bool_)
    best = states[:1]
    """[min(i, M) + 1, S, H], g[i]"""
    for i in range(1, layers + 1):
        free = min(i - 1, most)
        """cells 1 to `free` have a choice; cell i has skipped all so far"""
        rows = [states[i : i + 1]]
        if free:
            skipped, ran = best[:free], run(i - 1, best[1 : free + 1])
            skip = cosines(skipped, states[i]) > cosines(ran, states[i])
            skips[i, 1 : free + 1] = skip.cpu().numpy()
            rows.append(torch.where(skip[:, None, None], skipped, ran))
        if i <= most:
            skips[i, i] = True
            rows.append(best[-1:])
        best = torch.cat(rows)
    return SkipTable(skips, cosines(best, states[-1]).double().cpu().numpy())


class Probe:
    """Runs single layers of the target on states that the last cached token of S sequences might have had.

    Every state has a row of its own in the pass, with a page of its own in place of the sequence's last one, so that
    its keys and values replace the token's for itself alone. A context manager: it holds pages of the target's cache.
    """

    def __init__(self, target: Target, ids: Sequence[int], most: int) -> None:
        """
        Args:
            target: whose cache has at least S free pages.
            ids: of S live sequences.
            most: states of a token that run together, if there are as many free pages; else fewer do.
        """
        self._target = target
        self._most = most = min(most, target.cache.free // len(ids))
        tables, held, evicted = target.places(ids)
        self._before = np.tile(held - 1, most)
        self._evicted = None if evicted is None else np.tile(evicted, most)
        last = (held - 1) // PAGE
        self._tables = np.tile(tables, (most, 1))
        self._pages = target.cache.take(most * len(ids))
        rows = np.arange(len(self._tables))
        sources = self._tables[rows, np.tile(last, most)]
        self._tables[rows, np.tile(last, most)] = self._pages
        begun = np.flatnonzero(self._before % PAGE)
        if len(begun):
            store = target.cache.store
            store[:, :, np.array(self._pages)[begun]] = store[:, :, sources[begun]]
        self._plans: dict[int, AttentionPlan] = {}

    def __enter__(self) -> Run:
        return self._run

    def __exit__(self, *exception: object) -> None:
        self._target.cache.release(self._pages)

    def _run(self, layer: int, states: Tensor) -> Tensor:
        return torch.cat([self._pass(layer, part) for part in states.split(self._most)])

    def _pass(self, layer: int, states: Tensor) -> Tensor:
        rows, decoder, cache = states.shape[0] * states.shape[1], self._target.decoder, self._target.cache
        if rows not in self._plans:
            evicted = None if self._evicted is None else self._evicted[:rows]
            self._plans[rows] = cache.plan(self._tables[:rows], self._before[:rows], np.ones(rows, np.int64), evicted)
        flat = states.reshape(rows, -1)
        return decoder.block(layer, flat, self._plans[rows], cache).view(states.shape)
