"""Tasks from files: GSM8K's form by default, and errors that name file, line and remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config.types import TaskSection
from pipeline.errors import UsageError
from pipeline.tasks import load_task

GOOD = '{"question": "2 and {3}?", "answer": "2+3=5\\n#### 5", "level": 1}'

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(content: str | bytes, **options: Any) -> Any:
        path = tmp_path / "data.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_task(TaskSection(kind="jsonl", path=str(path), **options), seed=0)

    return load


def test_fields_travel_as_columns_and_fill_the_template(load: Load) -> None:
    task = load(GOOD + "\n\n" + GOOD + "\n", prompt_template="[{level}] Question: {question}\nAnswer:")
    assert len(task.train) == 2
    first, second = task.train
    assert first.prompt == "[1] Question: 2 and {3}?\nAnswer:"
    assert first.columns["reference"] == first.columns["answer"] == "2+3=5\n#### 5"
    assert first.columns["level"] == 1
    assert (first.origin[-12:], second.origin[-12:]) == ("data.jsonl:1", "data.jsonl:3")
    assert list(task.held_out) == []
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(first.columns)) == first.columns


def test_a_byte_order_mark_and_unicodes_line_separators_are_part_of_no_line(load: Load) -> None:
    task = load("\ufeff" + '{"question": "one\u2028two\u0085three", "answer": "1"}\r\n' + GOOD)
    assert [example.prompt[10:23] for example in task.train] == ["one\u2028two\u0085three", "2 and {3}?\nAn"]


def test_fields_have_configured_names(load: Load) -> None:
    task = load('{"problem": "1+1", "solution": 2}', question_field="problem", answer_field="solution")
    assert task.train[0].prompt == "Question: 1+1\nAnswer:"
    assert task.train[0].columns == {"problem": "1+1", "solution": 2, "reference": "2"}


@pytest.mark.parametrize(("number", "text"), [("1e-05", "0.00001"), ("1e3", "1000.0"), ("2.50", "2.5"), ("3", "3")])
def test_a_number_of_json_is_written_in_digits(load: Load, number: str, text: str) -> None:
    assert load(f'{{"question": "q", "answer": {number}}}').train[0].columns["reference"] == text


def test_held_out_comes_from_its_own_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(GOOD.replace("2 and", "7 and"))
    task = load(GOOD, held_out_path=str(tmp_path / "held.jsonl"))
    assert [example.prompt[10:15] for example in task.held_out] == ["7 and"]


@pytest.mark.parametrize(
    ("content", "options", "text"),
    [
        ("", {}, r"data.jsonl' is empty; it needs one JSON object a line"),
        ("\n \n", {}, r"data.jsonl' is empty"),
        (GOOD + "\n{oops\n", {}, r"data.jsonl:2: not a JSON object"),
        ('{"question": ' + "[" * 2000 + "]" * 2000 + "}", {}, r"data.jsonl:1: not a JSON object"),
        (GOOD + "\n[1]\n", {}, r"data.jsonl:2: not a JSON object"),
        (b'{"question": "\xff", "answer": "1"}', {}, r"data.jsonl:1: not a JSON object in UTF-8"),
        ('{"question": "q"}', {}, r"data.jsonl:1: no field 'answer'; set task.answer_field to one of question"),
        (GOOD, {"question_field": "q"}, r"data.jsonl:1: no field 'q'; set task.question_field to one of answer, level"),
        ('{"question": null, "answer": "1"}', {}, r"data.jsonl:1: field 'question' is NoneType, not text"),
        ('{"question": "q", "answer": "none"}', {}, r"data.jsonl:1: the answer 'none' states no number; end it in"),
        ('{"question": "q", "answer": "3/4"}', {}, r"data.jsonl:1: the answer '3/4' states no number"),
        (GOOD, {"prompt_template": "{question} {hint}"}, r"data.jsonl:1: task.prompt_template uses \{hint\}"),
        (GOOD, {"prompt_template": "no field"}, r"has no field; it needs \{question\}"),
        (GOOD, {"prompt_template": "{question"}, r"task.prompt_template = '\{question'"),
        (GOOD, {"prompt_template": "{question.__class__}"}, r"write plain field names in braces"),
        (GOOD, {"prompt_template": "{question:>{width}}"}, r"write plain field names in braces"),
        ('{"question": "q", "answer": "1", "prompts": 1}', {}, r"data.jsonl:1: a field named 'prompts'"),
        ('{"question": "q", "answer": "1", "reference": 1}', {}, r"data.jsonl:1: a field named 'reference'"),
        (f'{{"question": "q", "answer": "1", "id": {10**30}}}', {}, r"data.jsonl:1: a field holds an integer beyond"),
    ],
)
def test_bad_input_is_refused_with_its_place(load: Load, content: str | bytes, options: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        load(content, **options)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent.jsonl' cannot be read \(No such file or directory\)"):
        load_task(TaskSection(kind="jsonl", path=str(tmp_path / "absent.jsonl")), seed=0)


def test_answers_need_no_number_for_a_reward_of_the_users_own(load: Load) -> None:
    task = load('{"question": "q", "answer": "none"}', reward="mine:judge")
    assert task.train[0].columns["reference"] == "none"


@pytest.mark.parametrize(("name", "lines"), [("gsm8k/train.jsonl", 7473), ("wordproblems/hard_train.jsonl", 6000)])
def test_data_sets_load_whole(shared: Path, name: str, lines: int) -> None:
    task = load_task(TaskSection(kind="jsonl", path=str(shared / "data" / name)), seed=0)
    assert len(task.train) == lines
    assert all(example.prompt.startswith("Question: ") for example in task.train)
