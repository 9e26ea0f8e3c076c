"""Files of questions and answers as benchmarks read them."""

import argparse

import pytest

from benchmarks import deep_model, drafter_streams, model_drafters
from pipeline.errors import UsageError
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny

READERS = [
    lambda file, model: drafter_streams.recorded([file], model),
    lambda file, model: model_drafters._prompts(argparse.Namespace(prompts=file, model=model)),
    lambda file, model: deep_model.answered(file),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    _write_tokenizer(folder, VOCABULARY)
    return folder


@pytest.mark.parametrize("read", READERS)
def test_a_byte_order_mark_and_unicodes_line_separators_are_part_of_no_line(tmp_path, model, read):
    lines = '{"question": "1\u20282\u00853", "answer": "4"}\r\n{"question": "5", "answer": "6"}\n'
    (tmp_path / "f.jsonl").write_text("\ufeff" + lines, encoding="utf-8", newline="")
    assert len(read(tmp_path / "f.jsonl", model)) == 2


@pytest.mark.parametrize("read", READERS)
def test_a_line_that_is_nested_too_deep_is_refused(tmp_path, model, read):
    (tmp_path / "f.jsonl").write_text("[" * 2000 + "]" * 2000)
    with pytest.raises(UsageError, match=r"f\.jsonl .*RecursionError|f\.jsonl .*recursion depth"):
        read(tmp_path / "f.jsonl", model)
