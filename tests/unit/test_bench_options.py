"""Command-line values of benchmarks."""

import argparse
import json

import pytest

from benchmarks.held_out import check_apart
from benchmarks.options import at_least, each, fraction, integers, minutes, names, not_negative, seconds
from pipeline.errors import UsageError


def test_values_are_read():
    assert names("a, b,,c") == ["a", "b", "c"]
    assert integers(0)("0,2") == [0, 2] and at_least(1)("3") == 3
    assert seconds("0.5") == 0.5 and minutes("0") == 0.0
    assert each(not_negative)("0.5,2,0") == [0.5, 2.0, 0.0] and each(fraction)("") == []


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (at_least(1), "0", "0 is too small; give at least 1"),
        (integers(0), "1,-1", "-1 is too small"),
        (integers(), "", "holds no number"),
        (integers(), "1,x", "'x' is not a whole number"),
        (each(fraction), "0.1,abc", "'abc' is not a number"),
        (each(fraction), "0.1,1.5", "1.5 is no share; give a number between 0 and 1"),
        (fraction, "0", "0 is no share"),
        (fraction, "nan", "nan is no share"),
        (not_negative, "-0.1", "-0.1 cannot be used"),
        (each(not_negative), "0.1,nan", "nan cannot be used; give a finite number"),
        (not_negative, "inf", "inf cannot be used"),
        (seconds, "0", "give more than 0"),
        (seconds, "inf", "give more than 0"),
        (minutes, "-3", "give 0 or more"),
        (minutes, "x", "'x' is not a number"),
    ],
)
def test_what_cannot_be_read_is_named(read, text, said):
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        read(text)


def test_held_out_prompts_may_not_be_trained_on(tmp_path):
    for name, questions in (("held.jsonl", ("a", "b")), ("train.jsonl", ("b", "c")), ("apart.jsonl", ("c",))):
        lines = [json.dumps({"question": text, "answer": "#### 1"}) for text in questions]
        (tmp_path / name).write_text("\n".join(lines))
    check_apart(tmp_path / "held.jsonl", tmp_path / "apart.jsonl")
    with pytest.raises(UsageError, match=r"1 prompts of .*held.jsonl are in .*train.jsonl too"):
        check_apart(tmp_path / "held.jsonl", tmp_path / "train.jsonl")
