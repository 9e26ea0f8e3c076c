"""Products of a few rows of bfloat16 with weights in bfloat16, by the instruction that multiplies pairs of them.

oneDNN's call takes some 20 microseconds whatever its size, which for one row and a small layer is longer than reading
the weights; and between calls threads come together through the system. These products are called from within one
compiled pass (`pipeline.models.cpu_layers`). They read the weights where oneDNN keeps them, so that nothing exists
twice: blocks of `BLOCK` outputs, in each for every two inputs the outputs' two weights beside each other; or as in a
checkpoint, a row an output.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from pipeline.models.openmp import pointer

BLOCK = 64
"""outputs"""
INPUTS = 32
"""what the number of inputs must be a multiple of"""
_LANES, _STREAMS = 16, 4
"""Floats of a vector; rows of a plain weight at once."""
_TOGETHER = 6
"""Rows of x at once: their sums and four vectors of a block fill 28 of 32 registers."""
_AHEAD = 32
"""Pairs, 8 KiB of a block: as far ahead weights are asked for."""
_INDEX, _WORD = ir.IntType(64), ir.IntType(32)
_FLOATS, _PAIRS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(_WORD, _LANES)


binding.initialize_native_asmparser()  # for `_multiply_add`; numba compiles without one


@cache
def supported() -> bool:
    """Whether this processor multiplies pairs of bfloat16."""
    return bool(binding.get_host_cpu_features().get("avx512bf16"))


def packed_address(weight: Tensor) -> int:
    """Where a packed weight [outputs, inputs] lies that `block_products` can read; 0: it cannot."""
    outputs, inputs = weight.shape
    if not weight.is_mkldnn or weight.dtype != torch.bfloat16 or outputs % BLOCK or inputs % INPUTS:
        return 0
    return int(torch.ops.mkldnn.data_ptr(weight)) if _in_blocks(outputs, inputs) else 0


@cache
def _in_blocks(outputs: int, inputs: int) -> bool:
    """Whether oneDNN lays a weight of this shape out as `block_products` reads it; tried, since it does not say."""
    numbers = np.random.default_rng(0).integers(0x100, 0x3F80, (outputs, inputs)).astype(np.int16)
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.from_numpy(numbers).view(torch.bfloat16), None)
    size = int(torch.ops.mkldnn._nbytes(packed))
    if size != numbers.nbytes:
        return False
    found = np.ctypeslib.as_array((ctypes.c_int16 * numbers.size).from_address(torch.ops.mkldnn.data_ptr(packed)))
    expected = numbers.reshape(outputs // BLOCK, BLOCK, inputs // 2, 2).transpose(0, 2, 1, 3)
    return bool(np.array_equal(found.reshape(expected.shape), expected))


def _at(builder: Any, base: Any, count: Any, size: int) -> Any:
    return builder.add(base, builder.mul(count, ir.Constant(_INDEX, size)))


def _load(builder: Any, address: Any, kind: ir.Type, align: int = 4) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _spread(builder: Any, word: Any) -> Any:
    """<16 x i32>, all the same."""
    undefined = ir.Constant(_PAIRS, ir.Undefined)
    first = builder.insert_element(undefined, word, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_PAIRS, [0] * _LANES))


def _multiply_add(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    """sums + the products of both bfloat16 of each pair; as text, since LLVM renamed its own name for it."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
    return builder.call(ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v"), [sums, left, right])


def _zeros(builder: Any, count: int) -> list[Any]:
    sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(count)]
    for place in sums:
        builder.store(ir.Constant(_FLOATS, [0.0] * _LANES), place)
    return sums


def _fetch(builder: Any, address: Any) -> None:
    """Has the 64 bytes at an address brought near."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    read, near, data = (ir.Constant(_WORD, n) for n in (0, 3, 1))
    builder.call(prefetch, [builder.inttoptr(address, byte), read, near, data])


def _block_product(rows: int, fetches: bool) -> Callable:
    """An intrinsic: out[r, :BLOCK] += x[r] W^T for some inputs of one packed block W.

    Its arguments: addresses of x, of the block's part, of out float32 [rows, BLOCK]; bytes between rows of x; input
    pairs; and address of as many bytes as the part has that are brought near meanwhile, with `fetches`.
    """

    @intrinsic
    def product(context: Any, x: Any, weights: Any, out: Any, x_step: Any, pairs: Any, ahead: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, weights, out, x_step, pairs, ahead = arguments
            vectors = BLOCK // _LANES
            sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(rows * vectors)]
            targets = [
                builder.inttoptr(_at(builder, out, ir.Constant(_INDEX, i), 64), _FLOATS.as_pointer())
                for i in range(rows * vectors)
            ]
            for target, place in zip(targets, sums, strict=True):
                builder.store(builder.load(target, align=4), place)
            starts = [builder.add(x, builder.mul(x_step, ir.Constant(_INDEX, r))) for r in range(rows)]
            with cgutils.for_range(builder, pairs) as loop:
                here = _at(builder, weights, loop.index, 4 * BLOCK)
                columns = [
                    _load(builder, _at(builder, here, ir.Constant(_INDEX, v), 64), _PAIRS) for v in range(vectors)
                ]
                for v in range(vectors if fetches else 0):
                    _fetch(
                        builder, builder.add(_at(builder, ahead, loop.index, 4 * BLOCK), ir.Constant(_INDEX, 64 * v))
                    )
                for r in range(rows):
                    pair = _spread(builder, _load(builder, _at(builder, starts[r], loop.index, 4), _WORD, 2))
                    for v in range(vectors):
                        place = sums[r * vectors + v]
                        builder.store(_multiply_add(builder, builder.load(place), pair, columns[v]), place)
            for target, place in zip(targets, sums, strict=True):
                builder.store(builder.load(place), target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), build

    return product


def _row_product(rows: int) -> Callable:
    """An intrinsic: out[r, :4] = x[r] W^T for four rows W of a plain weight.

    Its arguments: addresses of x, of the first of the four and of out float32; bytes between rows of x, of W, of out;
    inputs divided by INPUTS.
    """

    @intrinsic
    def product(
        context: Any, x: Any, weights: Any, out: Any, x_step: Any, w_step: Any, out_step: Any, terms: Any
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, weights, out, x_step, w_step, out_step, terms = arguments
            sums = _zeros(builder, rows * _STREAMS)
            number = [ir.Constant(_INDEX, i) for i in range(max(rows, _STREAMS))]
            starts = [builder.add(x, builder.mul(x_step, number[r])) for r in range(rows)]
            streams = [builder.add(weights, builder.mul(w_step, number[s])) for s in range(_STREAMS)]
            with cgutils.for_range(builder, terms) as loop:
                several = [_load(builder, _at(builder, stream, loop.index, 64), _PAIRS, 2) for stream in streams]
                for r in range(rows):
                    one = _load(builder, _at(builder, starts[r], loop.index, 64), _PAIRS, 2)
                    for s in range(_STREAMS):
                        place = sums[r * _STREAMS + s]
                        builder.store(_multiply_add(builder, builder.load(place), one, several[s]), place)
            kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
            add_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
            for r in range(rows):
                for s in range(_STREAMS):
                    total = builder.call(
                        add_up, [ir.Constant(ir.FloatType(), 0.0), builder.load(sums[r * _STREAMS + s])],
                        fastmath=("reassoc", "nsz"),
                    )  # fmt: skip
                    place = builder.add(builder.add(out, builder.mul(out_step, number[r])), ir.Constant(_INDEX, 4 * s))
                    builder.store(total, builder.inttoptr(place, ir.FloatType().as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), build

    return product


_first_6, _first_5, _first_4, _first_3, _first_2, _first_1 = (_block_product(rows, True) for rows in (6, 5, 4, 3, 2, 1))
_more_6, _more_5, _more_4, _more_3, _more_2, _more_1 = (_block_product(rows, False) for rows in (6, 5, 4, 3, 2, 1))
_rows_6, _rows_5, _rows_4, _rows_3, _rows_2, _rows_1 = (_row_product(rows) for rows in (6, 5, 4, 3, 2, 1))


@njit(cache=True)
def _first(rows: int, x: int, weights: int, out: int, x_step: int, pairs: int, ahead: int) -> None:
    """Up to six rows times a part of a block, which comes from memory; another part is brought near."""
    if rows == 6:
        _first_6(x, weights, out, x_step, pairs, ahead)
    elif rows == 5:
        _first_5(x, weights, out, x_step, pairs, ahead)
    elif rows == 4:
        _first_4(x, weights, out, x_step, pairs, ahead)
    elif rows == 3:
        _first_3(x, weights, out, x_step, pairs, ahead)
    elif rows == 2:
        _first_2(x, weights, out, x_step, pairs, ahead)
    else:
        _first_1(x, weights, out, x_step, pairs, ahead)


@njit(cache=True)
def _more(rows: int, x: int, weights: int, out: int, x_step: int, pairs: int) -> None:
    """Up to six rows times a part of a block, which is near."""
    if rows == 6:
        _more_6(x, weights, out, x_step, pairs, weights)
    elif rows == 5:
        _more_5(x, weights, out, x_step, pairs, weights)
    elif rows == 4:
        _more_4(x, weights, out, x_step, pairs, weights)
    elif rows == 3:
        _more_3(x, weights, out, x_step, pairs, weights)
    elif rows == 2:
        _more_2(x, weights, out, x_step, pairs, weights)
    else:
        _more_1(x, weights, out, x_step, pairs, weights)


@njit(cache=True)
def block_products(x: int, x_step: int, rows: int, weights: int, pairs: int, out: int, ahead: int) -> None:
    """Rows times one packed block.

    Up to six rows are multiplied at once, which takes no longer than the block takes to come from memory. More take
    turns at parts of it that the nearest cache holds, so that memory goes on delivering meanwhile.

    Args:
        x: address of bfloat16 rows.
        x_step: bytes between them.
        rows: how many.
        weights: address of the block.
        pairs: of inputs.
        out: address of float32 [rows, BLOCK].
        ahead: address of the block that is wanted next.
    """
    if rows == 0:
        return
    carray(pointer(out), (rows, BLOCK), np.float32)[:] = 0
    turns = (rows + _TOGETHER - 1) // _TOGETHER
    some, rest = rows // turns, rows % turns
    near = pairs - _AHEAD
    done = 0
    while done < pairs:
        count = min(near if turns == 1 and done < near else _AHEAD, pairs - done)
        here, a, b = weights + 4 * BLOCK * done, x + 4 * done, out
        next_part = here + 4 * BLOCK * _AHEAD if done < near else ahead + 4 * BLOCK * (done - near)
        for turn in range(turns):
            now = some + (turn < rest)
            if turn:
                _more(now, a, here, b, x_step, count)
            else:
                _first(now, a, here, b, x_step, count, next_part)
            a, b = a + now * x_step, b + now * 4 * BLOCK
        done += count


@njit(cache=True)
def row_products(
    x: int, x_step: int, rows: int, weights: int, inputs: int, first: int, last: int, out: int, out_step: int
) -> None:
    """Rows times outputs `first` to `last` of a plain weight; both are multiples of four.

    Args:
        x: address of bfloat16 rows.
        x_step: bytes between them.
        rows: how many.
        weights: address of the weight, bfloat16 [outputs, inputs].
        inputs: a multiple of INPUTS.
        first, last: outputs.
        out: address of float32 rows of all outputs.
        out_step: bytes between them.
    """
    for output in range(first, last, 4):
        w, left, a, b = weights + 2 * inputs * output, rows, x, out + 4 * output
        while left >= 6:
            _rows_6(a, w, b, x_step, 2 * inputs, out_step, inputs // INPUTS)
            left, a, b = left - 6, a + 6 * x_step, b + 6 * out_step
        if left == 5:
            _rows_5(a, w, b, x_step, 2 * inputs, out_step, inputs // INPUTS)
        elif left == 4:
            _rows_4(a, w, b, x_step, 2 * inputs, out_step, inputs // INPUTS)
        elif left == 3:
            _rows_3(a, w, b, x_step, 2 * inputs, out_step, inputs // INPUTS)
        elif left == 2:
            _rows_2(a, w, b, x_step, 2 * inputs, out_step, inputs // INPUTS)
        elif left == 1:
            _rows_1(a, w, b, x_step, 2 * inputs, out_step, inputs // INPUTS)
