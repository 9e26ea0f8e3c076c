"""Intervals of benchmarks, against another implementation."""

import math

import pytest
from scipy import stats

from benchmarks.student import margin_95, quantile_95, standard_error


def test_quantiles_are_students_and_never_too_narrow():
    for freedom in range(1, 300):
        exact = stats.t.ppf(0.95, freedom)
        assert -0.0006 < quantile_95(freedom) - exact < 0.015, freedom
    for freedom in (*range(1, 31), 40, 60, 120):
        assert quantile_95(freedom) == pytest.approx(stats.t.ppf(0.95, freedom), abs=6e-4)


def test_a_standard_error_needs_two_values():
    assert standard_error([1.0, 2.0, 4.0]) == pytest.approx(stats.sem([1.0, 2.0, 4.0]))
    assert math.isnan(standard_error([1.0]))


@pytest.mark.parametrize("values", [(1.0, 1.2), (0.9, 1.0, 1.1), (1.0, 2.0, 3.0, 4.0, 5.0)])
def test_a_margin_is_half_of_the_90_percent_interval(values):
    low, high = stats.t.interval(0.9, len(values) - 1, stats.tmean(values), stats.sem(values))
    assert margin_95(values) == pytest.approx((high - low) / 2, rel=1e-3)
