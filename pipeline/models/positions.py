"""Where the tokens of a forward pass stand: what numpy computes in a dozen calls, in one."""

import numpy as np
from numba import njit

_NONE = np.zeros(0, np.int64)


def laid_out(
    tables: np.ndarray, cached: np.ndarray, counts: np.ndarray, evicted: np.ndarray | None, page_size: int
) -> tuple:
    """Of `pipeline.models.kv_cache.AttentionPlan`, whose arguments these are: width, keys, positions_end, starts, row,
    column, place, position, page."""
    found: tuple = _laid_out(tables, cached, counts, _NONE if evicted is None else evicted, page_size)
    return found


@njit(cache=True)
def _laid_out(tables: np.ndarray, cached: np.ndarray, counts: np.ndarray, evicted: np.ndarray, page_size: int) -> tuple:
    """As `laid_out`; `evicted` is empty where no row has any."""
    rows, width, keys, end = len(counts), 0, 0, 0
    starts = np.zeros(rows + 1, np.int64)
    for b in range(rows):
        starts[b + 1] = starts[b] + counts[b]
        length = cached[b] + counts[b]
        width, keys = max(width, counts[b]), max(keys, length)
        end = max(end, length + (evicted[b] if len(evicted) else 0))
    new = starts[rows]
    row, column, place = np.empty(new, np.int64), np.empty(new, np.int64), np.empty(new, np.int64)
    position, page = np.empty(new, np.int64), np.empty(new, np.int64)
    for b in range(rows):
        for k in range(counts[b]):
            n = starts[b] + k
            row[n], column[n], place[n] = b, k, cached[b] + k
            position[n] = place[n] + (evicted[b] if len(evicted) else 0)
            page[n] = tables[b, place[n] // page_size]
    return width, keys, end, starts, row, column, place, position, page
