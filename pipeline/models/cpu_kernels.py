"""What a forward pass does between its matrix products, compiled by numba, on a CPU.

There ATen's kernels are slow: `rms_norm` is six passes, attention over a ragged batch pays for the longest sequence in
every row. These do one pass over what is live, in float32. Arrays are float32, or int16 holding the bits of bfloat16.
"""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from pipeline.models.cpu_tiles import fetch_tile, page_dots, page_sums
from pipeline.models.openmp import pointer, take_number, team

FAST = {"contract", "reassoc", "nsz"}
"""Sums may be reordered; infinities and NaN keep their meaning."""
_BLOCK_ROWS = 48
"""Queries that are scored together, heads that share keys counted each: their scores stay near, and a long prompt's
first tokens are not scored against its last."""


@intrinsic
def widen(context: Any, x: Any) -> Any:
    """float32 of a stored number."""

    def of_bfloat16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    def of_float32(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    return types.float32(x), of_bfloat16 if x == types.int16 else of_float32


@intrinsic
def narrow(context: Any, x: Any, like: Any) -> Any:
    """A float32 in the type of `like`; bfloat16 rounds to nearest, ties to even."""

    def to_bfloat16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    def to_float32(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    return like(types.float32, like), to_bfloat16 if like == types.int16 else to_float32


@intrinsic
def _power_of_two(context: Any, n: Any) -> Any:
    """2^n of an int32 in [-126, 127]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.add(arguments[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), build


@njit(fastmath=FAST, inline="always")
def exponential(x: float) -> float:
    """e^x for x <= 0 to 2e-7 relative, without a call, so that a loop over it becomes vector instructions:
    x = n ln 2 + r and the Taylor polynomial of e^r, degree 7, |r| <= ln(2) / 2."""
    low = x if x > np.float32(-87.0) else np.float32(-87.0)
    n = np.floor(low * np.float32(1.4426950408889634) + np.float32(0.5))
    # ln 2 in two parts, the first with zeros at its end: n times it is exact
    r = (low - n * np.float32(0.693359375)) - n * np.float32(-2.12194440054690583e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _power_of_two(np.int32(n))


@intrinsic
def float_of(context: Any, word: Any) -> Any:
    """The float32 that an int32 is the bits of."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


@njit(inline="always")
def highest(row: np.ndarray) -> float:
    """The greatest of float32 [N], by their bits, in which a loop becomes vector instructions: of two numbers the
    greater has the greater, once those of negative ones are turned. Not a number, where one is that has no sign."""
    words, most = row.view(np.int32), np.int32(-(2**31))
    for k in range(len(words)):
        most = max(most, words[k] ^ ((words[k] >> 31) & np.int32(0x7FFFFFFF)))
    return float_of(np.int32(most ^ ((most >> 31) & np.int32(0x7FFFFFFF))))


@njit(fastmath=FAST, cache=True)
def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """Rows of `x` [N, H] over their root mean square, times `weight` float32 [H] (Zhang and Sennrich, 2019)."""
    rows, width = x.shape
    for n in range(rows):
        squares = np.float32(0)
        for i in range(width):
            value = widen(x[n, i])
            squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + np.float32(epsilon))
        for i in range(width):
            out[n, i] = narrow(widen(x[n, i]) * scale * weight[i], x[n, i])


@njit(fastmath=FAST, cache=True)
def prepare_attention(
    qkv: np.ndarray,
    norm: np.ndarray,
    epsilon: float,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    places: np.ndarray,
    pages: np.ndarray,
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    """Queries and keys normalised (Qwen3) and rotated; keys and values into their pages.

    Args:
        qkv: [N, heads + 2 kv_heads, D], of N new tokens.
        norm: float32 [2, D] weights for queries and keys; [0, D] where the model has none.
        epsilon: of that norm.
        cos, sin: float32 [positions, D / 2].
        positions: int64 [N], of each token in its text.
        places, pages: int64 [N], of each token in the cache: the place counts from its sequence's first page.
        queries: [N, heads, D], written.
        keys: [pages, kv_heads, D, page], written at the tokens' places.
        values: [pages, kv_heads, page, D], the same.
    """
    for kv in range(keys.shape[1]):
        prepare_head(qkv, norm, epsilon, cos, sin, positions, places, pages, queries, keys, values, 0, len(queries), kv)


@njit(fastmath=FAST, cache=True)
def prepare_head(
    qkv: np.ndarray,
    norm: np.ndarray,
    epsilon: float,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    places: np.ndarray,
    pages: np.ndarray,
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    first: int,
    last: int,
    kv: int,
) -> None:
    """`prepare_attention` for tokens `first` to `last`, one KV head and the query heads that attend to it."""
    heads, dimension = queries.shape[1:]
    kv_heads, half = keys.shape[1], dimension // 2
    group = heads // kv_heads
    row = np.empty(dimension, np.float32)
    for n in range(first, last):
        position, page = positions[n], pages[n]
        place = places[n] % keys.shape[3]
        for member in range(group + 1):
            head = kv * group + member if member < group else heads + kv
            squares = np.float32(0)
            for d in range(dimension):
                row[d] = widen(qkv[n, head, d])
                squares += row[d] * row[d]
            if norm.shape[0]:
                which = 0 if member < group else 1
                scale = np.float32(1) / np.sqrt(squares / np.float32(dimension) + np.float32(epsilon))
                for d in range(dimension):
                    row[d] *= scale * norm[which, d]
            for d in range(half):
                c, s = cos[position, d], sin[position, d]
                low = narrow(row[d] * c - row[d + half] * s, qkv[n, head, d])
                high = narrow(row[d + half] * c + row[d] * s, qkv[n, head, d])
                if member < group:
                    queries[n, head, d], queries[n, head, d + half] = low, high
                else:
                    keys[page, kv, d, place], keys[page, kv, d + half, place] = low, high
        for d in range(dimension):
            values[page, kv, place, d] = qkv[n, heads + kv_heads + kv, d]


@njit(fastmath=FAST, cache=True)
def attend(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: np.ndarray,
    cached: np.ndarray,
    starts: np.ndarray,
    window: int,
    scale: float,
    out: np.ndarray,
    number: int,
) -> None:
    """Causal attention of each sequence's new tokens over its own keys; time grows with the live keys alone.

    Args:
        queries: [N, heads, D], packed by sequence.
        keys: [pages, kv_heads, D, PAGE].
        values: [pages, kv_heads, PAGE, D]; D is a multiple of `cpu_tiles.LANES`.
        tables: int64 [B, most pages], each sequence's pages in order.
        cached: int64 [B], keys before this pass.
        starts: int64 [B + 1], where each sequence's new tokens begin.
        window: a query sees itself and the `window - 1` keys before it.
        scale: of the scores.
        out: [N, heads, D], written.
        number: address of an int64, 0 at first: which piece of work is next, for the threads that share it.
    """
    kv_heads = keys.shape[1]
    block = max(1, _BLOCK_ROWS * kv_heads // queries.shape[1])
    item, b, before = take_number(number), 0, 0
    while b < len(cached):
        blocks = (starts[b + 1] - starts[b] + block - 1) // block
        while item < (before + blocks) * kv_heads:
            first = (item // kv_heads - before) * block
            attend_one(
                queries,
                keys,
                values,
                tables,
                cached[b] + first,
                starts[b] + first,
                min(starts[b] + first + block, starts[b + 1]),
                b,
                item % kv_heads,
                window,
                np.float32(scale),
                out,
            )
            item = take_number(number)
        before += blocks
        b += 1


@njit(fastmath=FAST, cache=True)
def attend_one(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: np.ndarray,
    cached: int,
    start: int,
    stop: int,
    b: int,
    kv: int,
    window: int,
    scale: float,
    out: np.ndarray,
) -> None:
    """Consecutive new tokens of one sequence, one KV head; `cached` keys are before them."""
    kv_heads, dimension, page = keys.shape[1:]
    group = queries.shape[1] // kv_heads
    rows, length = (stop - start) * group, cached + stop - start
    first_page = max(0, cached - window + 1) // page
    last_page = (length - 1) // page
    offset = first_page * page
    query = np.empty((rows, dimension), np.float32)
    for r in range(rows):
        for d in range(dimension):
            query[r, d] = widen(queries[start + r // group, kv * group + r % group, d]) * scale
    weights = np.empty((rows, (last_page + 1) * page - offset), np.float32)
    for index in range(first_page, last_page + 1):
        fetch_tile(values, tables[b, index] * kv_heads + kv)
        if index < last_page:
            fetch_tile(keys, tables[b, index + 1] * kv_heads + kv)
        page_dots(query, keys, tables[b, index] * kv_heads + kv, weights, index * page - offset)
    for r in range(rows):
        newest = cached + r // group
        _softmax(weights, r, max(0, newest - window + 1) - offset, newest + 1 - offset)
    result = np.zeros((rows, dimension), np.float32)
    for index in range(first_page, last_page + 1):
        page_sums(weights, index * page - offset, values, tables[b, index] * kv_heads + kv, result)
    for r in range(rows):
        for d in range(dimension):
            out[start + r // group, kv * group + r % group, d] = narrow(result[r, d], queries[0, 0, 0])


@njit(fastmath=FAST, inline="always")
def _softmax(weights: np.ndarray, r: int, begin: int, end: int) -> None:
    """In place over weights[r, begin:end]; the rest of the row becomes 0.

    Every loop begins at 0: of another index numba asks whether it counts from the end, number by number.
    """
    for k in range(begin):
        weights[r, k] = -np.inf
    greatest = highest(weights[r, :end])
    total = np.float32(0)
    for k in range(end):
        weights[r, k] = exponential(weights[r, k] - greatest)
        total += weights[r, k]
    inverse = np.float32(1) / total
    for k in range(end):
        weights[r, k] *= inverse
    for k in range(begin):
        weights[r, k] = 0
    for k in range(weights.shape[1] - end):
        weights[r, end + k] = 0


_ARGUMENTS = 18


def attend_in_parallel(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: np.ndarray,
    cached: np.ndarray,
    starts: np.ndarray,
    window: int,
    scale: float,
    out: np.ndarray,
) -> None:
    """`attend` on all of torch's threads; arrays must be contiguous."""
    run = team()
    number = np.zeros(1, np.int64)
    if run is None:
        attend(queries, keys, values, tables, cached, starts, window, scale, out, number.ctypes.data)
        return
    packed = np.empty(_ARGUMENTS, np.int64)
    packed[:9] = [
        queries.ctypes.data, keys.ctypes.data, values.ctypes.data, tables.ctypes.data, cached.ctypes.data,
        starts.ctypes.data, out.ctypes.data, number.ctypes.data, window,
    ]  # fmt: skip
    packed[9:17] = [*queries.shape, *values.shape[:3], *tables.shape]
    packed[17:].view(np.float64)[0] = scale
    run(_part(queries.dtype == np.int16), packed.ctypes.data)


@cache
def _part(bfloat16: bool) -> int:
    """Address of a C function that does what one thread gets of `attend`; its argument is `packed` above."""
    kind = np.int16 if bfloat16 else np.float32

    @cfunc(types.void(types.CPointer(types.int64)))
    def part(address: Any) -> None:
        a = carray(address, (_ARGUMENTS,))
        tokens, heads, dimension, pages, kv_heads, page = a[9], a[10], a[11], a[12], a[13], a[14]
        rows, columns = a[15], a[16]
        attend(
            carray(pointer(a[0]), (tokens, heads, dimension), kind),
            carray(pointer(a[1]), (pages, kv_heads, dimension, page), kind),
            carray(pointer(a[2]), (pages, kv_heads, page, dimension), kind),
            carray(pointer(a[3]), (rows, columns), np.int64),
            carray(pointer(a[4]), (rows,), np.int64),
            carray(pointer(a[5]), (rows + 1,), np.int64),
            a[8],
            a[17:18].view(np.float64)[0],
            carray(pointer(a[6]), (tokens, heads, dimension), kind),
            a[7],
        )

    compiled: int = part.address
    _kept.append(part)
    return compiled


_kept: list[Any] = []
"""Compiled functions whose address is in use."""
