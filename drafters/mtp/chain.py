"""A head's drafts in one compiled call: it reads what was verified, draws a token, reads that, draws the next.

A layer of a small model takes some ten microseconds on a CPU; what calls it from Python, token by token, takes ten
times as long. What comes out is bit for bit what the parts give one by one.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from drafters.drawing import Chained, Wanted
from drafters.mtp.texts import Unread
from pipeline.models.cpu_kernels import FAST
from pipeline.models.cpu_layers import (
    ARGUMENTS,
    FACTS,
    CompiledLayers,
    join,
    pack,
    product_facts,
    product_part,
    through_layers,
)
from pipeline.models.cpu_products import packed_address
from pipeline.models.kv_cache import PAGE, KVCache
from pipeline.models.linear import Linear
from pipeline.models.openmp import meet, on_all_threads, pointer, thread_count, thread_number
from pipeline.sampling.plain import draw_row


class HeadChain:
    """For the weights of a head and its target as they are now; it holds addresses of them."""

    def __init__(
        self,
        layers: CompiledLayers,
        *,
        embedding: Tensor,
        norms: tuple[Tensor, Tensor],
        fc: Linear,
        final_norm: Tensor,
        head: Linear,
        epsilon: float,
    ) -> None:
        """
        Args:
            layers: the head's one.
            embedding: bfloat16 [V, H].
            norms: of a token's embedding, and of the state before it, float32 [H].
            fc: of both to the layer's input, packed.
            final_norm: float32 [H], before the output layer.
            head: output layer, without a bias.
            epsilon: of all norms.
        """
        self._layers = layers
        self._vocab_size = len(head.weight)
        self._facts = product_facts(0, 0, head, 0, final_norm, epsilon)
        self._weights = embedding.view(torch.int16).numpy(), norms[0].numpy(), norms[1].numpy()
        self._fc, self._epsilon = packed_address(fc.weight), epsilon
        self._final_norm = final_norm
        """whose address is among the facts"""
        self._room: _Room | None = None

    def __call__(
        self, wanted: Wanted, last: Tensor, unread: Unread, tables: np.ndarray, cached: np.ndarray, cache: KVCache
    ) -> Chained:
        """Drafts of up to K tokens for B sequences.

        Args:
            wanted: of the drafts.
            last: bfloat16 [B, H], h' of the newest row of each that has been read; overwritten where there are unread
                ones.
            unread: what is read first.
            tables: int64 [B, pages], with room for what is unread and K - 1 tokens behind it.
            cached: int64 [B], rows that have been read.
            cache: of the head.
        """
        rows, depths = wanted.numbers.shape
        most, threads = max(rows, len(unread.tokens)), torch.get_num_threads()
        room = self._room
        if room is None or room.most < most or (room.rows, room.depths) != (rows, depths):
            room = self._room = _Room(rows, depths, most, last.shape[1], self._vocab_size)
        parts = self._layers.parts(cache, most, tables.shape[1] * PAGE, threads)
        found = Chained(
            np.zeros((rows, depths), np.int64), np.zeros(rows, np.int64), np.zeros((rows, depths), np.float32),
            torch.empty(rows, depths, self._vocab_size),
        )  # fmt: skip
        kept = _pack(
            room.arguments, room.passes, self._facts.copy(), np.array([self._epsilon, wanted.stop_below]),
            *self._weights, self._fc, last.view(torch.int16).numpy(), unread.tokens,
            unread.hidden.view(torch.int16).numpy(), unread.counts, tables, cached, cache.pages, room.states, room.x,
            room.read, room.live, room.logits, room.counters, room.counter, *wanted[:5], found.tokens, found.lengths,
            found.peaks, found.probabilities.numpy(), *parts,
        )  # fmt: skip
        on_all_threads(_chain, _part, room.arguments)
        del kept, parts  # what the addresses are of has lived until here
        return found


class _Room:
    """Arrays that a call works in, for the next one of as many rows and depths."""

    def __init__(self, rows: int, depths: int, most: int, hidden: int, vocab_size: int) -> None:
        self.rows, self.depths, self.most = rows, depths, most
        # The last states, then two by turns: a thread that is ahead must not overwrite what others still read.
        self.states = np.empty((2, rows, hidden), np.int16)
        self.x, self.read = np.empty((most, hidden), np.int16), np.zeros((rows, hidden), np.int16)
        self.live, self.logits = np.empty(rows, np.bool_), np.empty((rows, vocab_size), np.float32)
        self.counters, self.counter = np.empty((depths, 2), np.int64), np.empty(1, np.int64)
        self.arguments, self.passes = np.empty(_COUNT, np.int64), np.empty((depths, ARGUMENTS), np.int64)


_EMBEDDING, _VOCABULARY, _FIRST, _SECOND, _FC, _HEAD, _PASSES, _LAST, _STATES, _X, _READ, _LIVE = range(12)
_LOGITS, _COUNTER, _TEMPERATURES, _SAMPLED, _NUMBERS, _BUDGETS, _TOKENS, _LENGTHS, _PEAKS, _Q = range(12, 22)
_NEW, _NEW_TOKENS, _NEW_HIDDEN, _NEW_STARTS, _NEW_POSITIONS, _ROWS, _DEPTHS, _HIDDEN = range(22, 30)
_TRUNCATION, _REAL = range(30, 32)
_COUNT = 33
"""int64 addresses and sizes in this order, 0 where nothing truncates; the last two are float64: epsilon of the norms,
the peak to stop below."""


@njit(cache=True)
def _pack(
    a: np.ndarray,
    passes: np.ndarray,
    facts: np.ndarray,
    real: np.ndarray,
    embedding: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    fc: int,
    last: np.ndarray,
    tokens: np.ndarray,
    hidden: np.ndarray,
    counts: np.ndarray,
    tables: np.ndarray,
    cached: np.ndarray,
    pages: int,
    states: np.ndarray,
    x: np.ndarray,
    read: np.ndarray,
    live: np.ndarray,
    logits: np.ndarray,
    counters: np.ndarray,
    counter: np.ndarray,
    temperatures: np.ndarray,
    sampled: np.ndarray,
    numbers: np.ndarray,
    budgets: np.ndarray,
    truncation: np.ndarray,
    drawn: np.ndarray,
    lengths: np.ndarray,
    peaks: np.ndarray,
    q: np.ndarray,
    table: np.ndarray,
    shape: np.ndarray,
    layer_real: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    work: np.ndarray,
    sums: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fills the arguments of the whole and of the passes through the layer, of unread rows and of each further token;
    arrays that some of them are the addresses of."""
    (rows, depths), new = numbers.shape, len(tokens)
    live[:], counters[:], counter[:] = True, 0, 0
    starts = np.zeros(rows + 1, np.int64)
    for b in range(rows):
        starts[b + 1] = starts[b] + counts[b]
    place, page = np.empty(new, np.int64), np.empty(new, np.int64)
    for b in range(rows):
        for k in range(counts[b]):
            place[starts[b] + k] = cached[b] + k
            page[starts[b] + k] = tables[b, (cached[b] + k) // PAGE]
    pack(
        passes[0], x.ctypes.data, 0, pages, tables, cached, starts, place, place, page, counters[0], table, shape,
        layer_real, cos, sin, work, sums,
    )  # fmt: skip
    singly, ahead = np.arange(rows + 1), np.empty((depths, rows), np.int64)
    pages_ahead = np.empty((depths, rows), np.int64)
    for d in range(1, depths):
        for b in range(rows):
            ahead[d, b] = cached[b] + counts[b] + d - 1
            pages_ahead[d, b] = tables[b, ahead[d, b] // PAGE]
        pack(
            passes[d], states[d % 2].ctypes.data, 0, pages, tables, ahead[d], singly, ahead[d], ahead[d],
            pages_ahead[d], counters[d], table, shape, layer_real, cos, sin, work, sums,
        )  # fmt: skip
    facts[1], facts[6] = rows, logits.ctypes.data
    a[_EMBEDDING], a[_VOCABULARY], a[_FIRST] = embedding.ctypes.data, len(embedding), first.ctypes.data
    a[_SECOND], a[_FC], a[_HEAD], a[_PASSES] = second.ctypes.data, fc, facts.ctypes.data, passes.ctypes.data
    a[_LAST], a[_STATES], a[_X] = last.ctypes.data, states.ctypes.data, x.ctypes.data
    a[_READ], a[_LIVE], a[_LOGITS] = read.ctypes.data, live.ctypes.data, logits.ctypes.data
    a[_COUNTER], a[_TEMPERATURES] = counter.ctypes.data, temperatures.ctypes.data
    a[_SAMPLED], a[_NUMBERS], a[_BUDGETS] = sampled.ctypes.data, numbers.ctypes.data, budgets.ctypes.data
    a[_TOKENS], a[_LENGTHS], a[_PEAKS], a[_Q] = drawn.ctypes.data, lengths.ctypes.data, peaks.ctypes.data, q.ctypes.data
    a[_TRUNCATION] = truncation.ctypes.data if len(truncation) else 0
    a[_NEW], a[_NEW_TOKENS], a[_NEW_HIDDEN] = new, tokens.ctypes.data, hidden.ctypes.data
    a[_NEW_STARTS], a[_NEW_POSITIONS] = starts.ctypes.data, place.ctypes.data
    a[_ROWS], a[_DEPTHS], a[_HIDDEN] = rows, depths, last.shape[1]
    a[_REAL:] = real.view(np.int64)
    return starts, place, page, singly, ahead, pages_ahead, facts


@njit(fastmath=FAST, cache=True)
def _chain(a: np.ndarray, thread: int, threads: int) -> None:
    """What one thread of several does of the drafts; `a` int64 [_COUNT]."""
    rows, depths, hidden, counter, new = a[_ROWS], a[_DEPTHS], a[_HIDDEN], a[_COUNTER], a[_NEW]
    head = carray(pointer(a[_HEAD]), (FACTS,), np.int64)
    passes = carray(pointer(a[_PASSES]), (depths, ARGUMENTS), np.int64)
    embedding = carray(pointer(a[_EMBEDDING]), (a[_VOCABULARY], hidden), np.int16)
    last = carray(pointer(a[_LAST]), (rows, hidden), np.int16)
    states = carray(pointer(a[_STATES]), (2, rows, hidden), np.int16)
    read = carray(pointer(a[_READ]), (rows, hidden), np.int16)
    live = carray(pointer(a[_LIVE]), (rows,), np.bool_)
    met = 0
    if new:
        tokens = carray(pointer(a[_NEW_TOKENS]), (new,), np.int64)
        starts = carray(pointer(a[_NEW_STARTS]), (rows + 1,), np.int64)
        positions = carray(pointer(a[_NEW_POSITIONS]), (new,), np.int64)
        x = carray(pointer(a[_X]), (new, hidden), np.int16)
        embedded = np.zeros((new, hidden), np.int16)
        for n in range(new):
            if positions[n] > 0:
                embedded[n] = embedding[tokens[n]]
        _join(a, embedded, carray(pointer(a[_NEW_HIDDEN]), (new, hidden), np.int16), x, thread, threads)
        met += threads
        if threads > 1:
            meet(counter, met)
        through_layers(passes[0], thread, threads)
        if thread == 0:
            for b in range(rows):
                if starts[b + 1] > starts[b]:
                    last[b] = x[starts[b + 1] - 1]
        met += threads
        if threads > 1:
            meet(counter, met)

    facts, before = head.copy(), last
    for depth in range(depths):
        if depth:
            _join(a, read, before, states[depth % 2], thread, threads)
            met += threads
            if threads > 1:
                meet(counter, met)
            through_layers(passes[depth], thread, threads)
            before = states[depth % 2]
        facts[0] = before.ctypes.data
        product_part(facts, thread, threads)
        met += threads
        if threads > 1:
            meet(counter, met)
        for n in range(thread, rows, threads):
            if live[n]:
                token, live[n] = _drawn(a, n, depth)
                read[n] = embedding[token]
        met += threads
        if threads > 1:
            meet(counter, met)
        if not live.any():
            return


@njit(fastmath=FAST, cache=True)
def _join(a: np.ndarray, embedded: np.ndarray, before: np.ndarray, out: np.ndarray, thread: int, threads: int) -> None:
    """This thread's part of the layer's input int16 [N, H] of embeddings and the states before them."""
    hidden = embedded.shape[1]
    epsilon = a[_REAL:].view(np.float64)[0]
    first = carray(pointer(a[_FIRST]), (hidden,), np.float32)
    second = carray(pointer(a[_SECOND]), (hidden,), np.float32)
    join(embedded, before, first, second, epsilon, a[_FC], out, thread, threads)


@njit(cache=True)
def _drawn(a: np.ndarray, n: int, depth: int) -> tuple[int, bool]:
    """The next token of row n, and whether its draft goes on."""
    rows, depths, size = a[_ROWS], a[_DEPTHS], a[_VOCABULARY]
    row = carray(pointer(a[_LOGITS]), (rows, size), np.float32)[n]
    q = carray(pointer(a[_Q]), (rows, depths, size), np.float32)[n, depth]
    temperature = carray(pointer(a[_TEMPERATURES]), (rows,), np.float32)[n]
    sampled = carray(pointer(a[_SAMPLED]), (rows,), np.bool_)[n]
    number = carray(pointer(a[_NUMBERS]), (rows, depths), np.float64)[n, depth]
    budget = carray(pointer(a[_BUDGETS]), (rows,), np.int64)[n]
    top_k, top_p, min_p = 0.0, 1.0, 0.0
    if a[_TRUNCATION]:
        top_k, top_p, min_p = carray(pointer(a[_TRUNCATION]), (rows, 3), np.float64)[n]
    token, peak = draw_row(row, temperature, sampled, number, q, top_k, top_p, min_p)
    carray(pointer(a[_TOKENS]), (rows, depths), np.int64)[n, depth] = token
    carray(pointer(a[_PEAKS]), (rows, depths), np.float32)[n, depth] = peak
    carray(pointer(a[_LENGTHS]), (rows,), np.int64)[n] = depth + 1
    return token, bool(depth + 1 < budget and peak >= np.float32(a[_REAL:].view(np.float64)[1]))


_kept: list[Any] = []
"""Compiled functions whose address is in use."""


@cache
def _part() -> int:
    """Address of `_chain` as a C function."""

    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def part(address: Any) -> None:
        _chain(carray(address, (_COUNT,)), thread_number(), thread_count())

    _kept.append(part)
    found: int = part.address
    return found
