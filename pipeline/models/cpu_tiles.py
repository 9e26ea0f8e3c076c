"""The two products of attention on one page of keys and values, in vector instructions.

They are written in LLVM's own terms, whole vectors of a page's tokens (or of a value's dimensions) for several query
heads at once: of a loop over numba arrays LLVM cannot know that they do not overlap, and keeps no sum in a register.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.models.kv_cache import PAGE

LANES = 16
"""what the dimension of a head must be a multiple of"""
_FLAGS = ("contract", "reassoc", "nsz")
_INDEX, _FLOAT = ir.IntType(64), ir.FloatType()


def _vector(builder: Any, address: Any, kind: ir.Type, lanes: int) -> Any:
    """float32 <lanes> of stored numbers, which need not be aligned."""
    pointer = builder.inttoptr(address, ir.VectorType(kind, lanes).as_pointer())
    stored = builder.load(pointer, align=kind.width // 8 if isinstance(kind, ir.IntType) else 4)
    if kind == _FLOAT:
        return stored
    word = ir.VectorType(ir.IntType(32), lanes)
    shift = ir.Constant(word, [16] * lanes)
    return builder.bitcast(builder.shl(builder.zext(stored, word), shift), ir.VectorType(_FLOAT, lanes))


def _spread(builder: Any, address: Any, lanes: int) -> Any:
    """float32 <lanes>, all the float at an address."""
    value = builder.load(builder.inttoptr(address, _FLOAT.as_pointer()), align=4)
    kind = ir.VectorType(_FLOAT, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def _at(builder: Any, base: Any, *steps: tuple[Any, int]) -> Any:
    """Address `base` plus counts of bytes."""
    for count, size in steps:
        base = builder.add(base, builder.mul(count, ir.Constant(_INDEX, size)))
    return base


def _product(rows: int, lanes: int) -> Callable:
    """An intrinsic: `out[r, :lanes] (+)= sum_i left[r, i] * right[i, :lanes]` for `rows` rows.

    Its arguments: addresses of left, right and out; the sum's terms; floats between rows of left and of out; numbers
    between rows of right; whether to add to what is there; and a number of right's type, for its type alone.
    """

    @intrinsic
    def product(
        context: Any, left: Any, right: Any, out: Any, terms: Any, left_step: Any, out_step: Any, right_step: Any,
        adding: Any, like: Any,
    ) -> Any:  # fmt: skip
        kind = ir.IntType(16) if like == types.int16 else _FLOAT
        size = 2 if like == types.int16 else 4
        vector = ir.VectorType(_FLOAT, lanes)

        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right, out, terms, left_step, out_step, right_step, adding, _ = arguments
            sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
            row = [ir.Constant(_INDEX, r) for r in range(rows)]
            outs = [_at(builder, out, (builder.mul(row[r], out_step), 4)) for r in range(rows)]
            with builder.if_else(builder.trunc(adding, ir.IntType(1))) as (then, otherwise):
                with then:
                    for r in range(rows):
                        builder.store(_vector(builder, outs[r], _FLOAT, lanes), sums[r])
                with otherwise:
                    for r in range(rows):
                        builder.store(ir.Constant(vector, [0.0] * lanes), sums[r])
            with cgutils.for_range(builder, terms) as loop:
                many = _vector(builder, _at(builder, right, (builder.mul(loop.index, right_step), size)), kind, lanes)
                for r in range(rows):
                    place = builder.add(builder.mul(row[r], left_step), loop.index)
                    one = _spread(builder, _at(builder, left, (place, 4)), lanes)
                    term = builder.fmul(one, many, flags=_FLAGS)
                    builder.store(builder.fadd(builder.load(sums[r]), term, flags=_FLAGS), sums[r])
            for r in range(rows):
                pointer = builder.inttoptr(outs[r], vector.as_pointer())
                builder.store(builder.load(sums[r]), pointer, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8, like), build

    return product


@intrinsic
def _fetch(context: Any, address: Any, size: Any) -> Any:
    """Has so many bytes from an address on brought near."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        lines = builder.udiv(arguments[1], ir.Constant(_INDEX, 64))
        read, near, data = (ir.Constant(word, n) for n in (0, 3, 1))
        with cgutils.for_range(builder, lines) as loop:
            place = builder.inttoptr(_at(builder, arguments[0], (loop.index, 64)), byte)
            builder.call(prefetch, [place, read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@njit(inline="always")
def fetch_tile(store: np.ndarray, tile: int) -> None:
    """Has a page's keys or values [pages, kv_heads, ...] brought near: pages lie anywhere, and the processor does not
    guess which comes next."""
    size = store.shape[2] * store.shape[3] * store.itemsize
    _fetch(store.ctypes.data + tile * size, size)


_six, _four, _three, _two, _one = (_product(rows, PAGE) for rows in (6, 4, 3, 2, 1))
_narrow_one = _product(1, LANES)


@njit(inline="always")
def _wide_rows(
    left: int, right: int, out: int, rows: int, terms: int, a: int, b: int, c: int, add: int, x: Any
) -> None:
    """`_product` for any number of rows."""
    while rows >= 6:
        _six(left, right, out, terms, a, b, c, add, x)
        rows, left, out = rows - 6, left + 24 * a, out + 24 * b
    if rows >= 4:
        _four(left, right, out, terms, a, b, c, add, x)
        rows, left, out = rows - 4, left + 16 * a, out + 16 * b
    if rows == 3:
        _three(left, right, out, terms, a, b, c, add, x)
    elif rows == 2:
        _two(left, right, out, terms, a, b, c, add, x)
    elif rows == 1:
        _one(left, right, out, terms, a, b, c, add, x)


@njit(inline="always")
def page_dots(query: np.ndarray, keys: np.ndarray, tile: int, weights: np.ndarray, at: int) -> None:
    """Queries times the keys of a page.

    Args:
        query: float32 [R, D].
        keys: [pages, kv_heads, D, PAGE], float32 or the bits of bfloat16.
        tile: page * kv_heads + KV head.
        weights: float32 [R, L]; columns `at` to `at + PAGE` are written.
        at: column.
    """
    rows, dimension = query.shape
    right = keys.ctypes.data + tile * dimension * PAGE * keys.itemsize
    _wide_rows(
        query.ctypes.data, right, weights.ctypes.data + 4 * at, rows, dimension, dimension, weights.shape[1], PAGE, 0,
        keys[0, 0, 0, 0],
    )  # fmt: skip


@njit(inline="always")
def page_sums(weights: np.ndarray, at: int, values: np.ndarray, tile: int, result: np.ndarray) -> None:
    """Adds the values of a page, weighted.

    Args:
        weights: float32 [R, L], of which columns `at` to `at + PAGE` are the page's.
        at: column.
        values: [pages, kv_heads, PAGE, D], float32 or the bits of bfloat16; D a multiple of LANES.
        tile: page * kv_heads + KV head.
        result: float32 [R, D], added to.
    """
    rows, dimension = result.shape
    right = values.ctypes.data + tile * dimension * PAGE * values.itemsize
    left, out = weights.ctypes.data + 4 * at, result.ctypes.data
    d, stride = 0, weights.shape[1]
    while d + PAGE <= dimension:
        _wide_rows(
            left, right + d * values.itemsize, out + 4 * d, rows, PAGE, stride, dimension, dimension, 1,
            values[0, 0, 0, 0],
        )  # fmt: skip
        d += PAGE
    while d < dimension:
        for r in range(rows):
            _narrow_one(
                left + 4 * r * stride, right + d * values.itemsize, out + 4 * (d + r * dimension), PAGE, stride,
                dimension, dimension, 1, values[0, 0, 0, 0],
            )  # fmt: skip
        d += LANES
