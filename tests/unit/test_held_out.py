"""Held-out prompts stay out of training: what a learner refuses, and what it warns of."""

import json

import pytest

from learner.startup import check_startup, shared_prompts
from pipeline.config import load_config
from pipeline.errors import UsageError
from pipeline.tasks import load_task


def configuration(**task):
    return load_config(None, [f"task.{key}={value}" for key, value in task.items()])


def write(path, *questions):
    path.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in questions))
    return path


def test_the_file_that_is_trained_on_is_no_held_out_one(tmp_path):
    path = write(tmp_path / "train.jsonl", "a")
    (tmp_path / "link.jsonl").symlink_to(path)
    for same in (path, tmp_path / "link.jsonl"):
        with pytest.raises(UsageError, match=r"held_out_path '.*jsonl' is task\.path, which is trained on"):
            check_startup(configuration(kind="jsonl", path=path, held_out_path=same))
    check_startup(configuration(kind="jsonl", path=path, held_out_path=write(tmp_path / "other.jsonl", "a")))


def test_the_split_that_is_trained_on_is_no_held_out_one(tmp_path):
    with pytest.raises(UsageError, match=r"held_out_split 'train' is task\.split, which is trained on"):
        check_startup(configuration(kind="datasets", path=tmp_path, held_out_split="train"))
    check_startup(configuration(kind="datasets", path=tmp_path, held_out_split="test"))
    (tmp_path / "state.json").touch()
    with pytest.raises(UsageError, match="is one dataset without splits"):
        check_startup(configuration(kind="datasets", path=tmp_path, held_out_split="test"))


def test_shared_prompts_are_counted_in_a_warning(tmp_path):
    train = write(tmp_path / "train.jsonl", "a", "b", "c")
    for questions, said in ((("b", "d", "a"), "WARNING: 2 of 3 prompts of task.held_out_path"), (("d",), None)):
        held_out = write(tmp_path / "held.jsonl", *questions)
        config = configuration(kind="jsonl", path=train, held_out_path=held_out)
        warning = shared_prompts(config, load_task(config.task, seed=0))
        assert (warning or "").startswith(said) if said else warning is None
