"""Runs numba kernels on torch's own OpenMP threads, and lets those meet.

A pool of numba's beside torch's would fight with it: threads of the one wait actively for work while those of the other
have it. GNU OpenMP's entry point, which torch has already loaded, takes any C function, and a numba `cfunc` is one.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Kernel = Callable[[int, int], None]
"""Runs a C function (its address) on a struct (its address) in all threads of a team; returns when all have."""


@cache
def team() -> Kernel | None:
    """None where torch uses another OpenMP runtime than GNU's."""
    assert torch.get_num_threads() > 0  # torch, and with it the runtime, is loaded
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    def run(function: int, data: int) -> None:
        parallel(function, data, torch.get_num_threads(), 0)

    return run


def on_all_threads(
    kernel: Callable[[np.ndarray, int, int], None], part: Callable[[], int], arguments: np.ndarray
) -> None:
    """`kernel(arguments, thread, threads)` in every thread of a team; what its addresses are of must outlive the call.

    Args:
        kernel: compiled; called as it is where there is one thread.
        part: gives the address of a C function that calls it with its thread.
        arguments: int64, contiguous.
    """
    run = team() if torch.get_num_threads() > 1 else None
    if run is None:
        kernel(arguments, 0, 1)
    else:
        run(part(), arguments.ctypes.data)


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """An int64 address as a pointer, for `numba.carray`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def take_number(context: Any, address: Any) -> Any:
    """The int64 at an address, which becomes one more: no two threads get the same."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(word, 1), "monotonic")

    return types.int64(types.int64), build


@intrinsic
def _arrived(context: Any, address: Any) -> Any:
    """The int64 at an address, which others add to."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), build


@intrinsic
def _arrive(context: Any, address: Any) -> Any:
    """Adds one to the int64 at an address; what was written before is seen by whoever sees it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        builder.atomic_rmw("add", place, ir.Constant(word, 1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), build


thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
"""In a function that a team runs; a team may be smaller than was asked for."""

_SPINS = 2000
"""Looks, some ten microseconds, before the processor is offered to others: a thread that waits for one which does not
run keeps it from running where there are more threads than cores."""
_give_way = types.ExternalFunction("sched_yield", types.int32())


@njit(cache=True)
def meet(address: int, goal: int) -> None:
    """Waits until the int64 at an address, to which every thread adds one here, is `goal`."""
    _arrive(address)
    spins = 0
    while _arrived(address) < goal:
        spins += 1
        if spins > _SPINS:
            _give_way()
