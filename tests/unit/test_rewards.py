"""Reward functions: what counts as the answer, and that one failing sample costs no other its reward."""

import math
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.tasks.rewards import (
    Rewards,
    Scored,
    answer_number,
    load_reward,
    numeric_answer,
    reference_number,
    score_group,
)


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("2+2=4\n#### 4", "#### 4"),
        ("#### 1,234", "#### 1234"),
        ("#### $18", "step\n#### 18"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 42.", "42"),
        ("#### 42.0", "42"),
        ("####42", "#### 42"),
        ("#### 1\n#### 7 apples", "7"),
        ("#### .5", "0.50"),
        ("#### 7", 7),
        ("#### +5", "5"),
        ("#### 1e3", "1,000"),
        ("#### 2.5E-3", "0.0025"),
        ("**#### 42**", "42"),
        ("#### 7: because", "7"),
        ("#### $5/hour", "5"),
        ("#### -123456789012345678901234567891", "-123456789012345678901234567891"),
        ("#### 123456789012345678901234567891", "123456789012345678901234567891"),
    ],
)
def test_numeric_answer_accepts_the_same_number_however_written(completion: str, reference: str) -> None:
    assert numeric_answer(["p"], [completion], reference=[str(reference)]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("", "4"),
        ("4", "4"),
        ("#### ", "4"),
        ("#### four", "4"),
        ("#### 4\n#### 5", "4"),
        ("#### 4\n####", "4"),
        ("#### 42", "4"),
        ("#### -4", "4"),
        ("#### 4.5", "4"),
        ("#### 1/2", "1"),
        ("#### 12/5", "12"),
        ("#### 2^{10}", "2"),
        ("#### 3*4", "3"),
        ("#### 2**4", "2"),
        ("#### 12:30", "12"),
        ("#### 1e3", "1"),
        ("#### 1e99999999999999999999999", "1"),
        ("#### -123456789012345678901234567890", "-123456789012345678901234567891"),
        ("#### 123456789012345678901234567890", "123456789012345678901234567891"),
    ],
)
def test_numeric_answer_refuses_anything_else(completion: str, reference: str) -> None:
    assert numeric_answer(["p"], [completion], reference=[reference]) == [0.0]


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("42", "42"), (" 42.\n", "42"), ("-$1,234.50", "-1234.50"), ("+7", "7"), ("1e-05", "0.00001"), ("50%", "50"),
        ("50 %.", "50"), ("90°", "90"), ("12 apples", "12"), ("5 km/h", "5"), ("5kg", "5"), ("9 a.m.", "9"),
        ("3 square feet.", "3"), ("half: #### 6 and more", "6"),
    ],
)  # fmt: skip
def test_a_bare_reference_is_a_number_with_its_unit(reference: str, value: str) -> None:
    assert reference_number(reference) == Decimal(value)


@pytest.mark.parametrize(
    "reference",
    ["", "four", "3/4", "2^{10}", "12:30", "10-12", "5x+3", "5x", "5 x + 3", "1 or 2", "3 + 4", "1.2.3", "#### 3/4"],
)
def test_what_is_more_than_a_number_is_no_reference(reference: str) -> None:
    assert reference_number(reference) is None


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{:d}", "{:,}", "{:.1f}", "{:d}.", " {:d} eggs"]))
def test_answer_number_reads_back_formatted_integers(value: int, form: str) -> None:
    assert answer_number("so\n####" + form.format(value)) == Decimal(value)


def test_numeric_answer_names_a_reference_without_number() -> None:
    with pytest.raises(ValueError, match="'unknown' states no number"):
        numeric_answer(["p"], ["#### 1"], reference=["unknown"])


def test_rewards_load_by_name_and_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "length_reward.py").write_text("def short(prompts, completions, **columns):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward("numeric-answer") is numeric_answer
    assert load_reward("length_reward:short")(prompts=["p"], completions=["c"]) == [1.0]


def test_reward_that_cannot_be_loaded_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward.py").write_text("raise RuntimeError('half done')\n")
    (tmp_path / "empty_reward.py").write_text("value = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in {
        "numeric": "'numeric' is unknown; use numeric-answer or module:function",
        "missing_reward_module:f": "importing module 'missing_reward_module' failed",
        "broken_reward:f": "RuntimeError: half done",
        "empty_reward:f": "module 'empty_reward' has no function 'f'",
        "empty_reward:value": "module 'empty_reward' has no function 'value'",
    }.items():
        with pytest.raises(UsageError, match=text):
            load_reward(name)


def test_group_is_scored_in_one_call_with_columns_as_lists() -> None:
    calls: list[dict[str, Any]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, **columns})
        return [float(len(text)) for text in completions]

    assert score_group(reward, ["p", "p"], ["a", "bb"], {"hint": [3, 3]}) == [Scored(1.0), Scored(2.0)]
    assert calls == [{"prompts": ["p", "p"], "completions": ["a", "bb"], "hint": [3, 3]}]


def test_numbers_of_other_libraries_are_rewards() -> None:
    scored = score_group(lambda prompts, completions: np.array([0.5, 1], np.float32), ["p"] * 2, ["a", "b"], {})
    assert scored == [Scored(0.5), Scored(1.0)]
    assert all(type(score.reward) is float for score in scored)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1.0", [1.0], 10**400, 1e39, -1e31])
def test_a_value_that_is_no_finite_number_costs_only_its_sample(bad: Any) -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[Any]:
        return [bad if text == "bad" else 1.0 for text in completions]

    first, second, third = score_group(reward, ["p"] * 3, ["a", "bad", "c"], {})
    assert (first, third) == (Scored(1.0), Scored(1.0))
    assert second.reward is None
    assert second.error.startswith("sample 1: reward function reward returned")


def test_a_weighted_sum_that_is_too_large_costs_only_its_sample() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [1e17 if text == "bad" else 1.0 for text in completions]

    good, bad = score_group(Rewards(("r",), (100.0,), (reward,)), ["p"] * 2, ["a", "bad"], {})
    assert good.reward == 100.0 and bad.reward is None and "beyond 1e+18" in bad.error


def test_a_sample_that_raises_costs_only_itself_and_keeps_its_own_columns() -> None:
    def reward(prompts: list[str], completions: list[str], limit: list[int]) -> list[float]:
        return [1.0 / (len(text) - allowed) for text, allowed in zip(completions, limit, strict=True)]

    scored = score_group(reward, ["p"] * 3, ["aa", "bb", "cc"], {"limit": [1, 2, 0]})
    assert [score.reward for score in scored] == [1.0, None, 0.5]
    assert scored[1].error.startswith("sample 1: reward function reward raised ZeroDivisionError: ")


def test_a_wrong_count_is_found_sample_by_sample() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0 for text in completions if text]

    scored = score_group(reward, ["p"] * 2, ["a", ""], {})
    assert scored[0] == Scored(1.0)
    assert scored[1].error == "sample 1: reward function reward returned 0 values for 1 completions"


def test_a_reward_that_always_fails_names_every_sample() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyError("answer")

    scored = score_group(reward, ["p"] * 2, ["a", "b"], {})
    assert [score.reward for score in scored] == [None, None]
    assert ["sample 0" in scored[0].error, "sample 1" in scored[1].error] == [True, True]
