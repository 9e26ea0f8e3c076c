"""What the stability benchmark concludes from curves."""

import pytest

from benchmarks.learner import SETTINGS, fluctuation, held, main, summary
from learner.composition import build_objective
from pipeline.config import load_config
from pipeline.errors import UsageError


def test_fluctuation_is_the_size_of_steps_over_the_mean():
    assert fluctuation([2.0, 2.0, 2.0]) == 0.0
    assert fluctuation([1.0, 3.0, 1.0, 3.0]) == pytest.approx(1.0)
    assert fluctuation([1.0]) is None and fluctuation([]) is None


def test_a_target_is_held_within_a_tenth():
    found = held([9.0, 9.0, 0.21, 0.19, 0.2, 0.26], 0.2)
    assert found["target_mean_error"] == pytest.approx(0.0833, abs=1e-3)
    assert found["target_steps_inside"] == pytest.approx(2 / 3)
    assert found["target_windows_inside"] == 1.0


def test_windows_show_a_target_that_is_held_only_on_average():
    found = held([0.0] * 20 + [0.08] * 10 + [0.32] * 10, 0.2)
    assert found["target_mean_error"] == pytest.approx(0, abs=1e-9)
    assert found["target_windows_inside"] == pytest.approx(1 / 11) and found["target_steps_inside"] == 0


def test_a_run_is_summed_up_at_both_ends():
    row = {"loss": 0.0, "clip_fraction": 0.0, "importance_weight_ess": 1.0, "staleness_mean": 0.0, "skipped_steps": 0.0}
    curve = [row | {"reward_mean": r, "entropy": e, "grad_norm": g}
             for r, e, g in ((0.1, 1.0, 1.0), (0.5, 0.9, None), (0.7, 0.8, 3.0))]  # fmt: skip
    found = summary(curve)
    assert (found["reward_first"], found["reward_last"], found["entropy_last"]) == (0.1, 0.7, 0.8)
    assert found["grad_norm"] == {"median": 2.0, "min": 1.0, "max": 3.0}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be(name):
    assert build_objective(load_config(None, SETTINGS[name])).surrogate.name


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there are uncorrected"):
        main(["--settings", "nonsense", "--out", str(tmp_path)])
