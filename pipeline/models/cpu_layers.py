"""All layers of a decoder for a few rows of bfloat16 on a CPU in one compiled call, which all threads go through.

Decoding a handful of sequences reads every weight once and computes little: what takes time beside that is calling (a
matrix product of oneDNN's some 20 microseconds whatever its size) and threads that come together through the system
between the calls. Here threads share out the outputs of each product and meet in memory.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.cpu_kernels import FAST, attend_one, exponential, narrow, prepare_head, rms_norm, widen
from pipeline.models.cpu_products import BLOCK, INPUTS, block_products, packed_address, row_products, supported
from pipeline.models.kv_cache import PAGE, AttentionPlan, KVCache
from pipeline.models.linear import Linear
from pipeline.models.openmp import meet, on_all_threads, pointer, take_number, thread_count, thread_number
from pipeline.models.rope import RopeTable

if TYPE_CHECKING:
    from pipeline.models.decoder import Layer

_FIELDS = 13
"""Addresses of a layer: input norm, qkv, its bias, norms of queries and keys, output, its bias, norm after attention,
gate, up, down, keys, values; and its window. 0: there is none."""


@njit(fastmath=FAST, inline="always")
def project(
    x: np.ndarray, weight: int, bias: np.ndarray, out: np.ndarray, adding: bool, first: int, last: int, sums: np.ndarray
) -> None:
    """Blocks `first` to `last` of x W^T + bias into int16 `out` [N, outputs], or added to it."""
    rows, inputs = x.shape
    for block in range(first, last):
        here = weight + block * inputs * 2 * BLOCK
        ahead = here + inputs * 2 * BLOCK if block + 1 < last else here
        block_products(x.ctypes.data, 2 * inputs, rows, here, inputs // 2, sums.ctypes.data, ahead)
        for r in range(rows):
            part = out[r, block * BLOCK : (block + 1) * BLOCK]
            if bias.shape[0]:
                for j in range(BLOCK):
                    sums[r, j] += widen(bias[block * BLOCK + j])
            if adding:
                for j in range(BLOCK):
                    part[j] = narrow(widen(part[j]) + sums[r, j], part[j])
            else:
                for j in range(BLOCK):
                    part[j] = narrow(sums[r, j], part[j])


@njit(fastmath=FAST, inline="always")
def _gated(
    x: np.ndarray, gate: int, up: int, out: np.ndarray, first: int, last: int, sums: np.ndarray, others: np.ndarray
) -> None:
    """Blocks `first` to `last` of silu(x G^T) * (x U^T) into int16 `out` [N, outputs]."""
    rows, inputs = x.shape
    e = np.empty(BLOCK, np.float32)
    for block in range(first, last):
        left, right = gate + block * inputs * 2 * BLOCK, up + block * inputs * 2 * BLOCK
        ahead = left + inputs * 2 * BLOCK if block + 1 < last else right
        block_products(x.ctypes.data, 2 * inputs, rows, left, inputs // 2, sums.ctypes.data, right)
        block_products(x.ctypes.data, 2 * inputs, rows, right, inputs // 2, others.ctypes.data, ahead)
        for r in range(rows):
            part = out[r, block * BLOCK : (block + 1) * BLOCK]
            z, factor = sums[r], others[r]
            for j in range(len(e)):  # loops of one thing each: together they become no vector instructions
                e[j] = exponential(-np.abs(z[j]))
            for j in range(len(e)):
                e[j] = z[j] * (np.float32(1) if z[j] >= 0 else e[j]) / (np.float32(1) + e[j]) * factor[j]
            for j in range(len(e)):
                part[j] = narrow(e[j], part[j])


_X, _TABLE, _LAYERS, _ROWS, _HIDDEN, _HEADS, _KV_HEADS, _DIMENSION, _INNER, _PAGES = range(10)
_POSITION, _PLACE, _TOKEN_PAGE, _TABLES, _COLUMNS, _CACHED, _STARTS, _SEQUENCES = range(10, 18)
_COS, _SIN, _ANGLES, _WORK, _SUMS, _COUNTERS, _NORM, _STATES, _REALS = range(18, 27)
ARGUMENTS = 28
"""int64 addresses and sizes in this order; the last two are float64: epsilon of the norms, scale of the scores."""


@njit(fastmath=FAST, cache=True)
def through_layers(a: np.ndarray, thread: int, threads: int) -> None:
    """What one thread of several does of a pass; `a` int64 [ARGUMENTS]."""
    n, hidden, inner, counters = a[_ROWS], a[_HIDDEN], a[_INNER], a[_COUNTERS]
    heads, kv_heads, dimension = a[_HEADS], a[_KV_HEADS], a[_DIMENSION]
    reals = a[_REALS : _REALS + 2].view(np.float64)
    epsilon, scale = reals[0], np.float32(reals[1])
    width, wide = heads * dimension, (heads + 2 * kv_heads) * dimension
    x = carray(pointer(a[_X]), (n, hidden), np.int16)
    table = carray(pointer(a[_TABLE]), (a[_LAYERS], _FIELDS), np.int64)
    position = carray(pointer(a[_POSITION]), (n,), np.int64)
    place = carray(pointer(a[_PLACE]), (n,), np.int64)
    page = carray(pointer(a[_TOKEN_PAGE]), (n,), np.int64)
    sequences = a[_SEQUENCES]
    tables = carray(pointer(a[_TABLES]), (sequences, a[_COLUMNS]), np.int64)
    cached = carray(pointer(a[_CACHED]), (sequences,), np.int64)
    starts = carray(pointer(a[_STARTS]), (sequences + 1,), np.int64)
    cos = carray(pointer(a[_COS]), (a[_ANGLES], dimension // 2), np.float32)
    sin = carray(pointer(a[_SIN]), (a[_ANGLES], dimension // 2), np.float32)
    # One workspace: what all threads write parts of, and behind it each one's normalised rows.
    work = a[_WORK]
    flat = carray(pointer(work), (n, wide), np.int16)
    qkv = carray(pointer(work), (n, heads + 2 * kv_heads, dimension), np.int16)
    work += 2 * n * wide
    queries = carray(pointer(work), (n, heads, dimension), np.int16)
    work += 2 * n * width
    attended = carray(pointer(work), (n, heads, dimension), np.int16)
    flat_attended = carray(pointer(work), (n, width), np.int16)
    work += 2 * n * width
    gated = carray(pointer(work), (n, inner), np.int16)
    work += 2 * n * inner
    normed = carray(pointer(work + 2 * n * hidden * thread), (n, hidden), np.int16)
    sums = carray(pointer(a[_SUMS] + 8 * n * BLOCK * thread), (n, BLOCK), np.float32)
    others = carray(pointer(a[_SUMS] + 8 * n * BLOCK * thread + 4 * n * BLOCK), (n, BLOCK), np.float32)
    keeps = a[_STATES] != 0 and thread == 0
    states = carray(pointer(a[_STATES]), (a[_LAYERS] + 1 if keeps else 0, n, hidden), np.int16)
    met = 0

    for layer in range(a[_LAYERS]):
        row = table[layer]
        if keeps:  # nobody writes to the rows before threads have met twice
            states[layer] = x
        norm = carray(pointer(row[0]), (hidden,), np.float32)
        rms_norm(x, norm, epsilon, normed)
        blocks = wide // BLOCK
        bias = carray(pointer(row[2]), (wide if row[2] else 0,), np.int16)
        project(normed, row[1], bias, flat, False, blocks * thread // threads, blocks * (thread + 1) // threads, sums)
        met += threads
        if threads > 1:
            meet(counters, met)

        qk_norm = carray(pointer(row[3]), (2 if row[3] else 0, dimension), np.float32)
        keys = carray(pointer(row[10]), (a[_PAGES], kv_heads, dimension, PAGE), np.int16)
        values = carray(pointer(row[11]), (a[_PAGES], kv_heads, PAGE, dimension), np.int16)
        item = take_number(counters + 8 + 8 * layer)
        while item < sequences * kv_heads:
            b, kv = item // kv_heads, item % kv_heads
            first, last = starts[b], starts[b + 1]
            prepare_head(qkv, qk_norm, epsilon, cos, sin, position, place, page, queries, keys, values, first, last, kv)
            attend_one(queries, keys, values, tables, cached[b], first, last, b, kv, row[12], scale, attended)
            item = take_number(counters + 8 + 8 * layer)
        met += threads
        if threads > 1:
            meet(counters, met)

        blocks = hidden // BLOCK
        mine, end = blocks * thread // threads, blocks * (thread + 1) // threads
        bias = carray(pointer(row[5]), (hidden if row[5] else 0,), np.int16)
        project(flat_attended, row[4], bias, x, True, mine, end, sums)
        met += threads
        if threads > 1:
            meet(counters, met)

        norm = carray(pointer(row[6]), (hidden,), np.float32)
        rms_norm(x, norm, epsilon, normed)
        many = inner // BLOCK
        _gated(normed, row[7], row[8], gated, many * thread // threads, many * (thread + 1) // threads, sums, others)
        met += threads
        if threads > 1:
            meet(counters, met)

        project(gated, row[9], carray(pointer(row[9]), (0,), np.int16), x, True, mine, end, sums)
        met += threads
        if threads > 1:
            meet(counters, met)

    if keeps:
        states[-1] = x
    if a[_NORM] and thread == 0:
        rms_norm(x, carray(pointer(a[_NORM]), (hidden,), np.float32), epsilon, x)


@cache
def _layers_part() -> int:
    """Address of `through_layers` as a C function."""

    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def part(address: Any) -> None:
        through_layers(carray(address, (ARGUMENTS,)), thread_number(), thread_count())

    return _address(part)


FACTS = 9
"""int64: address of x, its rows and inputs; of the weight, its outputs and whether they are in blocks; of float32
[rows, outputs]; of a norm's weight for x, or 0; and the bits of its epsilon, float64."""


@njit(fastmath=FAST, cache=True)
def product_part(a: np.ndarray, thread: int, threads: int) -> None:
    """What one thread of several does of x W^T, or norm(x) W^T, in float32; `a` as `FACTS` says."""
    x = carray(pointer(a[0]), (a[1], a[2]), np.int16)
    if a[7]:
        normed = np.empty_like(x)
        rms_norm(x, carray(pointer(a[7]), (a[2],), np.float32), a[8:].view(np.float64)[0], normed)
        _product_of(normed, a, thread, threads)
    else:
        _product_of(x, a, thread, threads)


@njit(fastmath=FAST, cache=True)
def _product_of(x: np.ndarray, a: np.ndarray, thread: int, threads: int) -> None:
    """`x` is an argument, not an address: an array that nothing but its address is used of any more is freed."""
    (rows, inputs), weights, outputs, packed, out = x.shape, a[3], a[4], a[5], a[6]
    if packed:
        blocks = outputs // BLOCK
        into = carray(pointer(out), (rows, outputs), np.float32)
        sums = np.empty((rows, BLOCK), np.float32)
        for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
            here = weights + block * inputs * 2 * BLOCK
            block_products(x.ctypes.data, 2 * inputs, rows, here, inputs // 2, sums.ctypes.data, here)
            for r in range(rows):
                into[r, block * BLOCK : (block + 1) * BLOCK] = sums[r]
        return
    fours = outputs // 4
    first, last = 4 * (fours * thread // threads), 4 * (fours * (thread + 1) // threads)
    row_products(x.ctypes.data, 2 * inputs, rows, weights, inputs, first, last, out, 4 * outputs)
    if thread == threads - 1 and last < outputs:
        # what is left of four: together with some that are done
        end = weights + 2 * inputs * (outputs - 4)
        row_products(x.ctypes.data, 2 * inputs, rows, end, inputs, 0, 4, out + 4 * (outputs - 4), 4 * outputs)


@cache
def _product_part() -> int:
    """Address of `product_part` as a C function."""

    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def part(address: Any) -> None:
        product_part(carray(address, (FACTS,)), thread_number(), thread_count())

    return _address(part)


_kept: list[Any] = []
"""Compiled functions whose address is in use."""


def _address(function: Any) -> int:
    _kept.append(function)
    address: int = function.address
    return address


class CompiledLayers:
    """The layers of one model, where they can be computed so.

    It holds addresses of their weights: it must not be called once any of them was replaced.
    """

    def __init__(self, config: ModelConfig, rope: RopeTable, table: np.ndarray) -> None:
        self._config, self._rope, self._table = config, rope, table
        c = config
        self._shape = np.array([c.hidden_size, c.heads, c.kv_heads, c.head_dim, c.intermediate_size])
        self._real = np.array([c.rms_norm_eps, c.head_dim**-0.5])
        self._place: tuple[int, ...] = ()
        """address and strides of the cache that the table is filled in for"""

    @classmethod
    def of(cls, config: ModelConfig, layers: Sequence["Layer"], rope: RopeTable) -> "CompiledLayers | None":
        """None where a weight is not packed as the products read it, or the processor lacks the instruction."""
        if not supported():
            return None
        table = np.zeros((len(layers), _FIELDS), np.int64)
        for index, layer in enumerate(layers):
            packed = [packed_address(lin.weight) for lin in (layer.qkv, layer.output, layer.gate, layer.up, layer.down)]
            if not all(packed) or layer.gate.bias is not None:
                return None
            table[index, [1, 4, 7, 8, 9]] = packed
            table[index, [0, 6]] = layer.input_norm.data_ptr(), layer.post_norm.data_ptr()
            for field, tensor in ((2, layer.qkv.bias), (3, layer.qk_norm), (5, layer.output.bias)):
                table[index, field] = 0 if tensor is None else tensor.data_ptr()
            table[index, 12] = config.window(index)
        return cls(config, rope, table)

    def __call__(
        self,
        x: Tensor,
        plan: AttentionPlan,
        cache: KVCache,
        layers: Sequence[int] | None = None,
        norm: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Some layers, one after the other, on bfloat16 rows [N, H], in place; their keys and values are cached.

        Args:
            x: of N packed tokens.
            plan: of this pass.
            cache: read and written.
            layers: by number; None: all.
            norm: weight float32 [H] of a norm behind them, if there is one.
            states: bfloat16 [layers + 1, N, H], filled with the rows and what each layer made of them.
        """
        table, *rest = self.parts(cache, len(x), plan.positions_end, torch.get_num_threads(), layers)
        counters, arguments = np.zeros(1 + len(table), np.int64), np.empty(ARGUMENTS, np.int64)
        kept = pack(
            arguments, x.data_ptr(), 0 if norm is None else norm.data_ptr(), cache.pages, plan.tables, plan.cached,
            plan.starts, plan.position, plan.place, plan.page, counters, table, *rest,
        )  # fmt: skip
        if states is not None:
            arguments[_STATES] = states.data_ptr()
        on_all_threads(through_layers, _layers_part, arguments)
        del kept, rest  # what the addresses are of has lived until here
        return x

    def parts(
        self, cache: KVCache, rows: int, end: int, threads: int, layers: Sequence[int] | None = None
    ) -> tuple[np.ndarray, ...]:
        """The last seven arguments of `pack`, for passes of up to `rows` tokens at positions before `end`."""
        c, store = self._config, cache.store
        place = store.data_ptr(), *store.stride()[:2]
        if place != self._place:
            self._place, (address, layer, values) = place, place
            self._table[:, 10] = address + 2 * layer * np.arange(len(self._table))
            self._table[:, 11] = self._table[:, 10] + 2 * values
        table = self._table if layers is None else self._table[np.asarray(layers, np.int64)]
        wide = (c.heads + 2 * c.kv_heads) * c.head_dim
        numbers = rows * (wide + 2 * c.heads * c.head_dim + c.intermediate_size + (threads + 1) * c.hidden_size)
        work, sums = np.empty(numbers, np.int16), np.empty(2 * threads * rows * BLOCK, np.float32)
        return table, self._shape, self._real, *self._rope.halves(end), work, sums


@njit(cache=True)
def pack(
    a: np.ndarray,
    x: int,
    norm: int,
    pages: int,
    tables: np.ndarray,
    cached: np.ndarray,
    starts: np.ndarray,
    position: np.ndarray,
    place: np.ndarray,
    page: np.ndarray,
    counters: np.ndarray,
    table: np.ndarray,
    shape: np.ndarray,
    real: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    work: np.ndarray,
    sums: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fills the arguments `a` of `through_layers`; arrays, perhaps copies, that some of them are the addresses of."""
    tables, cached, starts = np.ascontiguousarray(tables), np.ascontiguousarray(cached), np.ascontiguousarray(starts)
    a[_X], a[_NORM], a[_TABLE], a[_LAYERS], a[_ROWS] = x, norm, table.ctypes.data, len(table), len(position)
    a[_HIDDEN : _INNER + 1] = shape
    a[_PAGES], a[_SEQUENCES], a[_COLUMNS], a[_ANGLES] = pages, len(cached), tables.shape[1], len(cos)
    a[_TABLES], a[_CACHED], a[_STARTS] = tables.ctypes.data, cached.ctypes.data, starts.ctypes.data
    a[_POSITION], a[_PLACE], a[_TOKEN_PAGE] = position.ctypes.data, place.ctypes.data, page.ctypes.data
    a[_COS], a[_SIN], a[_WORK] = cos.ctypes.data, sin.ctypes.data, work.ctypes.data
    a[_SUMS], a[_COUNTERS], a[_STATES] = sums.ctypes.data, counters.ctypes.data, 0
    a[_REALS:] = real.view(np.int64)
    return tables, cached, starts


def takes_product(linear: Linear) -> bool:
    """Whether `product` can compute with these weights."""
    weight = linear.weight
    if not supported() or weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or linear.bias is not None:
        return False
    return bool(packed_address(weight)) if weight.is_mkldnn else weight.shape[1] % INPUTS == 0 and len(weight) >= 4


def product(x: Tensor, linear: Linear, norm: Tensor | None = None, epsilon: float = 0.0) -> Tensor:
    """float32 [N, outputs] of bfloat16 rows [N, inputs], which a norm (weight float32 [inputs]) may come before."""
    x = x.contiguous()
    out = torch.empty(len(x), len(linear.weight))
    arguments = product_facts(x.data_ptr(), len(x), linear, out.data_ptr(), norm, epsilon)
    on_all_threads(product_part, _product_part, arguments)
    return out


def product_facts(x: int, rows: int, linear: Linear, out: int, norm: Tensor | None, epsilon: float) -> np.ndarray:
    """int64 [FACTS], what `product_part` reads; `x` and `out` are addresses."""
    weight = linear.weight
    facts = np.array([
        x, rows, weight.shape[1], packed_address(weight) or weight.data_ptr(), len(weight), weight.is_mkldnn, out,
        0 if norm is None else norm.data_ptr(), 0,
    ])  # fmt: skip
    facts[8:].view(np.float64)[0] = epsilon
    return facts


def joined_product(
    first: Tensor, second: Tensor, norms: tuple[Tensor, Tensor], linear: Linear, epsilon: float
) -> Tensor:
    """bfloat16 [N, outputs] of [norm(first), norm(second)] W^T, rows bfloat16 [N, inputs / 2] each; W is packed."""
    out = first.new_empty(len(first), len(linear.weight))
    join(
        first.view(torch.int16).numpy(), second.contiguous().view(torch.int16).numpy(), norms[0].numpy(),
        norms[1].numpy(), epsilon, packed_address(linear.weight), out.view(torch.int16).numpy(), 0, 1,
    )  # fmt: skip
    return out


@njit(fastmath=FAST, cache=True)
def join(
    first: np.ndarray,
    second: np.ndarray,
    first_norm: np.ndarray,
    second_norm: np.ndarray,
    epsilon: float,
    weight: int,
    out: np.ndarray,
    thread: int,
    threads: int,
) -> None:
    """What one thread of several does of `joined_product`."""
    rows, width = first.shape
    joined, part = np.empty((rows, 2 * width), np.int16), np.empty((rows, width), np.int16)
    for half in range(2):
        rms_norm(second if half else first, second_norm if half else first_norm, epsilon, part)
        joined[:, half * width : (half + 1) * width] = part
    sums, no_bias, blocks = np.empty((rows, BLOCK), np.float32), np.zeros(0, np.int16), out.shape[1] // BLOCK
    mine, end = blocks * thread // threads, blocks * (thread + 1) // threads
    project(joined, weight, no_bias, out, False, mine, end, sums)
