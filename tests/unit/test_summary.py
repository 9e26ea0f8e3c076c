"""The last screen says what the metrics say."""

from pipeline.config import Config
from pipeline.run_directory import RunDirectory
from pipeline.summary import _trained, _transport

STATES = {"generating": 40.0, "transport": 1.0, "waiting for leases": 9.0}


def test_transport_is_told_as_a_share_of_the_engines_time():
    rows = [{"engine_time": STATES | {"sending": 0.1, "reward": 70.0}}, {"engine_time": STATES | {"sending": 0.3}}]
    assert _transport(rows).startswith("0.40% of the engines' time in CPU seconds (0.40 of 100 s)")
    assert _transport(rows).endswith("were at it for 2.00%")


def test_transport_that_no_engine_told_of_is_not_measured():
    assert _transport([{"engine_time": STATES}]) == "not measured"
    assert _transport([{"engine_time": {}}]) == "not measured"


def test_steps_without_a_finite_reward_are_left_out_of_the_averages(tmp_path):
    row = {
        "step": 1, "tokens_trained": 5, "reward_mean": None, "staleness_mean": None, "mismatch_k3": None,
        "dropped_total": {}, "engine_time": {},
    }  # fmt: skip
    config, directory = Config(), RunDirectory(tmp_path)
    shown = _trained(config, directory, [row, row | {"step": 2, "reward_mean": 0.5, "staleness_mean": 1.0}], 1.0)
    assert any("0.500 -> 0.500" in line for line in shown) and any("1.00 publications" in line for line in shown)
    assert any("none was finite" in line for line in _trained(config, directory, [row], 1.0))
