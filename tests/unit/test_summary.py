"""The last screen says what the metrics say."""

from pipeline.summary import _transport

STATES = {"generating": 40.0, "transport": 1.0, "waiting for leases": 9.0}


def test_transport_is_told_as_a_share_of_the_engines_time():
    rows = [{"engine_time": STATES | {"sending": 0.1, "reward": 70.0}}, {"engine_time": STATES | {"sending": 0.3}}]
    assert _transport(rows).startswith("0.40% of the engines' time in CPU seconds (0.40 of 100 s)")
    assert _transport(rows).endswith("were at it for 2.00%")


def test_transport_that_no_engine_told_of_is_not_measured():
    assert _transport([{"engine_time": STATES}]) == "not measured"
    assert _transport([{"engine_time": {}}]) == "not measured"
