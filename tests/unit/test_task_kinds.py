"""Tasks from Hugging Face datasets and of one's own, and TRL's reward functions on them."""

import numpy as np
import pytest

from pipeline.config import check_config, load_config
from pipeline.config.types import TaskSection
from pipeline.engine.generator import FinishedSample
from pipeline.engine.rewarding import BuiltInScorer, FinishedGroup, RewardWorker
from pipeline.errors import UsageError
from pipeline.messages import Lease, SamplingParams
from pipeline.tasks import load_task
from pipeline.tasks.rewards import load_reward, score_group

ROWS = {"prompt": ["Add 1 and 2:", "Add 3 and 4:"], "solution": ["3", "7"], "level": [1, 2]}
COLUMNS = {"question_field": "prompt", "answer_field": "solution", "prompt_template": "{question}"}


@pytest.fixture
def folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets (pip install rollahead[datasets])")
    data = datasets.Dataset.from_dict(ROWS)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "both")
    data.save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    data.to_json(tmp_path / "files" / "train.jsonl")
    return tmp_path


@pytest.mark.parametrize("place", ["both", "one", "files"])
def test_a_dataset_of_trl_is_read_with_its_columns(folder, place):
    task = load_task(TaskSection(kind="datasets", path=str(folder / place), **COLUMNS), seed=0)
    assert [example.prompt for example in task.train] == ROWS["prompt"]
    assert task.train[1].columns == {"prompt": ROWS["prompt"][1], "solution": "7", "level": 2, "reference": "7"}


def test_held_out_rows_come_from_their_own_split(folder):
    task = load_task(TaskSection(kind="datasets", path=str(folder / "both"), held_out_split="test", **COLUMNS), 0)
    assert [example.prompt for example in task.held_out] == ["Add 3 and 4:"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"question_field": "text"}, "task.question_field"),
        ({"split": "validation"}, "validation"),
        ({"path": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said_at_start(folder, options, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    section = TaskSection(**({"kind": "datasets", "path": str(folder / "both")} | COLUMNS | options))
    with pytest.raises(UsageError, match=said):
        load_task(section, 0)


def test_rows_without_an_answer_serve_a_reward_that_needs_none(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"prompt": "Write."}\n')
    columns = COLUMNS | {"answer_field": "", "reward": "mine:it"}
    task = load_task(TaskSection(kind="jsonl", path=str(tmp_path / "lines.jsonl"), **columns), 0)
    assert task.train[0].columns == {"prompt": "Write.", "reference": ""}


@pytest.mark.parametrize("text", ["class Mine:\n    pass\n", "raise ValueError('broken')\n", ""])
def test_a_task_of_ones_own_that_is_none_is_named(tmp_path, monkeypatch, text):
    (tmp_path / "own_task_of_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_task_of_test", raising=False)
    with pytest.raises(UsageError, match="own_task_of_test:Mine"):
        load_task(TaskSection(kind="own_task_of_test:Mine"), 0)


def test_a_dataset_needs_a_model_and_a_path():
    for settings, said in ((["model.path=x"], "task.path"), (["task.path=x"], "model.path")):
        with pytest.raises(UsageError, match=said):
            check_config(load_config(None, ["task.kind=datasets", *settings]))


def test_trl_reward_functions_are_called_as_trl_calls_them(tmp_path, monkeypatch):
    (tmp_path / "trl_rewards_of_test.py").write_text(
        "def by_ids(completion_ids, **kwargs):\n"
        "    return [float(len(ids)) for ids in completion_ids]\n\n\n"
        "def by_solution(prompts, completions, solution, **kwargs):\n"
        "    return [float(s in c) for c, s in zip(completions, solution)]\n"
    )
    monkeypatch.chdir(tmp_path)
    columns = {"solution": ["3", "7"], "completion_ids": [[1, 2], [3]]}
    for name, expected in (("by_ids", [2.0, 1.0]), ("by_solution", [1.0, 0.0])):
        scored = score_group(load_reward(f"trl_rewards_of_test:{name}"), ["p", "p"], ["is 3", "no"], columns)
        assert [score.reward for score in scored] == expected


def test_trl_s_own_reward_functions_score():
    pytest.importorskip("trl.rewards", reason="needs trl (pip install rollahead[trl])")
    reward = load_reward("trl.rewards:think_format_reward")
    completions = [[{"role": "assistant", "content": "<think>a</think>b"}], [{"role": "assistant", "content": "b"}]]
    assert [s.reward for s in score_group(reward, ["p", "p"], completions, {})] == [1.0, 0.0]


def test_the_engine_hands_over_the_token_ids():
    seen = []

    class Recording(BuiltInScorer):
        def score(self, prompts, completions, columns):
            seen.append(columns)
            return super().score(prompts, completions, columns)

    lease = Lease(
        id=0, epoch=0, kind="train", prompt="p", prompt_ids=(1,), columns={"reference": "1"}, group_size=1,
        sampling=SamplingParams(), seeds=(0,), version=0,
    )  # fmt: skip
    ids = np.array([4, 5])
    sample = FinishedSample(0, 0, ids, np.zeros(2), None, np.zeros(2), np.zeros(2, np.uint8), "stop", 2)
    worker = RewardWorker([Recording("numeric-answer")], lambda ids: "#### 1")
    worker.submit(FinishedGroup(lease, [sample]))
    worker.close()
    assert worker.scored()[0].scores[0].reward == 1.0 and worker.seconds > 0
    assert seen[0]["completion_ids"] == [[4, 5]]
