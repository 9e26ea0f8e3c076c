"""What `rollahead bench switching` concludes from what it measures, and how interrupted benchmarks go on."""

import argparse
import json
from unittest.mock import MagicMock

import pytest

from benchmarks import plots, switching, switching_training
from benchmarks.results import earlier_rows, write_results
from benchmarks.switching import _rules, compared, conclusions, name_of, simulated_share
from benchmarks.switching_training import conclusions as training_conclusions
from pipeline.engine.native.switching import SwitchingRule
from pipeline.errors import UsageError


def test_rules_are_read_as_they_are_written():
    paper, ours = _rules("5:10,1:1:before")
    assert (paper.window, paper.min_run, paper.before_sampling) == (5, 10, False)
    assert (ours.window, ours.min_run, ours.before_sampling) == (1, 1, True)
    assert [name_of(rule) for rule in (paper, ours)] == ["5:10", "1:1:before"]
    with pytest.raises(argparse.ArgumentTypeError, match="as 5:10, or 1:1:before"):
        _rules("1:1:after")


def test_a_random_control_that_looks_at_each_token_has_the_share_of_its_threshold():
    # with one token a window and a run, a token is the large model's unless a uniform number is below the threshold,
    # and after a large one only if two are
    for threshold in (0.3, 0.8):
        rule = SwitchingRule(threshold, 1, 1, before_sampling=True, noise=True)
        to_large, to_small = 1 - threshold, threshold**2
        assert simulated_share(rule, 2000, 20) == pytest.approx(to_large / (to_large + to_small), abs=0.02)


def row(system, share, reward, rule="5:10"):
    return {"system": system, "rule": rule, "share": share, "reward": reward, "reward_error": 0.01}


def test_half_of_the_tokens_with_93_percent_is_said_and_its_absence_too():
    ends = [row("large", 1.0, 0.8), row("small", 0.0, 0.4)]
    good = [*ends, row("entropy", 0.2, 0.76), row("random", 0.2, 0.5)]
    compared(good)
    lines = conclusions(good)
    assert "50.0%" in lines[0] and "95.0% of the reward with 20.0% of the tokens" in lines[1]
    assert "difference +0.260" in lines[2]
    poor = [*ends, row("entropy", 0.6, 0.78), row("random", 0.6, 0.7)]
    compared(poor)
    assert conclusions(poor)[1].startswith("no point with at most half")


def test_a_large_model_that_earns_nothing_is_said():
    rows = [row("large", 1.0, 0.0), row("small", 0.0, 0.1), row("entropy", 0.2, 0.0), row("random", 0.2, 0.1)]
    compared(rows)
    lines = conclusions(rows)
    assert lines[0].startswith("the large model earns nothing here") and "difference -0.100" in lines[1]
    assert len(lines) == 2


class Curve:
    """What a curve measures where the large model earns nothing."""

    large = small = None

    def __init__(self, options):
        pass

    def alone(self, model, name, share):
        return row(name, share, 0.0)

    def point(self, rule, wanted):
        return row("random" if rule.noise else "entropy", 0.3, 0.1) | {"response_tokens": 9}

    def random_rule(self, rule, share, tokens):
        return SwitchingRule(0.5, noise=True)


COMMAND = ["--model", "m", "--small-model", "s", "--prompts", "p", "--shares", "", "--thresholds", "0.1"]


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(switching, "Curve", Curve)
    monkeypatch.setattr(switching, "check_same_tokenizer", lambda *folders: None)


def test_a_curve_of_a_large_model_that_earns_nothing_is_written(measured, tmp_path):
    assert switching.main([*COMMAND, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["rows"]) == 6 and len(content["verdicts"]) == 3


def test_what_was_measured_is_written_before_it_is_judged(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(switching, "conclusions", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        switching.main([*COMMAND, "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 6


@pytest.mark.parametrize(
    ("policy", "uncorrected", "words"),
    [
        ((0.80, 0.80, 0.80), (0.5, 0.5, 0.5), ["equivalent", "better"]),
        ((0.5, 0.9, 0.8), (0.9, 0.7, 0.8), ["not", "not"]),
    ],
)
def test_training_is_concluded_from_differences_seed_by_seed(policy, uncorrected, words):
    rows = [{"setting": "before", "seed": -1, "held_out": 0.1}]
    for seed in range(3):
        for name, values in (("policy", policy), ("corrected", (0.8, 0.81, 0.79)), ("uncorrected", uncorrected)):
            rows.append({"setting": name, "seed": seed, "held_out": values[seed]})
    lines = training_conclusions(rows, 0.05)
    assert len(lines) == 2
    for line, word in zip(lines, words, strict=True):
        assert line.partition("]: ")[2].startswith(word)


def test_rows_of_the_same_settings_are_taken_up_and_others_refused(tmp_path):
    assert earlier_rows(tmp_path, "what", {"steps": "3"}) == []
    write_results(tmp_path, "what", [{"a": 1}], settings={"steps": "3"})
    assert earlier_rows(tmp_path, "what", {"steps": "3"}) == [{"a": 1}]
    with pytest.raises(UsageError, match=r"of another run \(steps differ\); give another --out"):
        earlier_rows(tmp_path, "what", {"steps": "4"})
    with pytest.raises(UsageError, match="give another --out"):
        earlier_rows(tmp_path, "something", {"steps": "3"})
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        earlier_rows(tmp_path, "what", {})


@pytest.fixture
def drawn(monkeypatch):
    """Axes of a figure that nobody draws."""
    pyplot, axes = MagicMock(), [MagicMock(), MagicMock()]
    axes[0].get_legend_handles_labels.return_value = ([1, 2], ["policy", "corrected"])
    pyplot.subplots.return_value = (MagicMock(), [axes])
    monkeypatch.setattr(plots, "pyplot", lambda: pyplot)
    return axes


def test_training_under_switching_is_plotted(drawn, tmp_path, monkeypatch, capsys):
    class HeldOut:
        def __init__(self, options):
            pass

        def reward(self, weights):
            return 0.1

    def trained(options, held_out, name, seed):
        curve = {"reward_mean": [0.1, None]} | ({} if name == "policy" else {"k3/other_samplers": [0.3, 0.2]})
        return {"setting": name, "seed": seed, "held_out": 0.2, "reward_last": 0.1, "curve": curve, "seconds": 1.0}

    monkeypatch.setattr(switching_training, "HeldOut", HeldOut)
    monkeypatch.setattr(switching_training, "_row", trained)
    monkeypatch.setattr(switching_training, "check_apart", lambda *files: None)
    monkeypatch.setattr(switching, "check_same_tokenizer", lambda *folders: None)
    training = ["--train", "--train-prompts", "t", "--seeds", "2", "--out", str(tmp_path)]
    assert switching.main([*COMMAND, *training]) == 0
    assert f"written {tmp_path / 'switching-training.png'}" in capsys.readouterr().out
    reward, k3 = ([call.args[0] for call in axes.plot.call_args_list] for axes in drawn)
    assert len(reward) == len(k3) == 6  # three settings, two seeds
    assert reward[0] == pytest.approx([0.1, float("nan")], nan_ok=True)
    assert k3 == [[], [0.3, 0.2], [0.3, 0.2]] * 2
