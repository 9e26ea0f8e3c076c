"""Checks that what is emitted is distributed as plain sampling would be: by enumeration, and by counting.

For the exactness suite (`rollahead bench exactness`), the conformance kit for drafters and the tests.
"""

from pipeline.sampling.exactness.constant import Drawn, draw_constant, draw_repeatedly
from pipeline.sampling.exactness.reference import processed_law
from pipeline.sampling.exactness.statistics import (
    Check,
    acceptance_check,
    bound_check,
    chi_square_check,
    chi_square_p_value,
    holm,
)
from pipeline.sampling.exactness.table_law import TableModel, law_error

__all__ = [
    "Check", "Drawn", "TableModel", "acceptance_check", "bound_check", "chi_square_check", "chi_square_p_value",
    "draw_constant", "draw_repeatedly", "holm", "law_error", "processed_law",
]  # fmt: skip
