"""Tasks from Hugging Face datasets and of one's own, and TRL's reward functions on them."""

import json
import time

import numpy as np
import pytest

from pipeline.config import check_config, load_config
from pipeline.config.types import TaskSection
from pipeline.engine.generator import FinishedSample
from pipeline.engine.rewarding import BuiltInScorer, FinishedGroup, RewardWorker, build_scorers
from pipeline.errors import UsageError
from pipeline.messages import Lease, SamplingParams
from pipeline.models.chat import chat_template
from pipeline.tasks import load_task
from pipeline.tasks.rewards import load_reward, reward_name, score_group
from tests.unit.tiny_models import save_tiny

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


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_model(folder, template=CHAT):
    """A checkpoint with a tokenizer of characters and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save_tiny(folder)
    words = {word: n for n, word in enumerate(["?", *"abcdefghijklmnopqrstuvwxyz<>/ 0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", chat_template=template or None)
    fast.save_pretrained(folder)
    return folder


def scored_by_the_engine(section, task, completions):
    """Rewards of one group as an engine computes them: in a process of its own, of a lease made from the task."""
    example = task.train[0]
    lease = Lease(
        id=0, epoch=0, kind="train", prompt=example.prompt, prompt_ids=(1,), columns=example.columns,
        group_size=len(completions), sampling=SamplingParams(), seeds=tuple(range(len(completions))), version=0,
    )  # fmt: skip
    ids = np.array([4, 5])
    samples = [
        FinishedSample(0, index, ids, np.zeros(2), None, np.zeros(2), np.zeros(2, np.uint8), "stop", 2)
        for index in range(len(completions))
    ]
    texts = iter(completions)
    scorers = build_scorers(section)
    worker = RewardWorker(scorers, lambda ids: next(texts))
    try:
        worker.submit(FinishedGroup(lease, samples))
        deadline = time.monotonic() + 120
        while not (done := worker.scored()) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        worker.close()
    return done[0].scores


@pytest.mark.slow
def test_trl_s_own_reward_functions_score_conversational_prompts_in_the_engine(tmp_path):
    pytest.importorskip("trl.rewards", reason="needs trl (pip install rollahead[trl])")
    line = {"prompt": [{"role": "user", "content": "what is 1+1"}], "answer": "2"}
    (tmp_path / "chats.jsonl").write_text(json.dumps(line) + "\n")
    section = TaskSection(
        kind="jsonl", path=str(tmp_path / "chats.jsonl"), question_field="prompt",
        reward=["trl.rewards:think_format_reward", "tests.e2e.rewards:judged"], reward_weights=[1.0, 0.5],
    )  # fmt: skip
    task = load_task(section, 0, chat_template(chat_model(tmp_path / "model")))
    assert task.train[0].prompt == "<user>what is 1+1</><assistant>"
    scores = scored_by_the_engine(section, task, ["<think>a</think>2", "no thought", "<think>b</think>7"])
    assert [s.reward for s in scores] == [1.5, 0.0, 1.0]
    names = section.reward
    assert [s.parts for s in scores] == [
        {names[0]: 1.0, names[1]: 1.0}, {names[0]: 0.0}, {names[0]: 1.0, names[1]: 0.0},
    ]  # fmt: skip


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "forms_of_test.py").write_text(
        "async def later(completions, **kwargs):\n"
        "    return [float(len(c)) for c in completions]\n\n\n"
        "def some(completions, **kwargs):\n"
        "    return [None if 'x' in c else 2.0 for c in completions]\n\n\n"
        "def messages(prompts, completions, **kwargs):\n"
        "    assert '_conversation' not in kwargs\n"
        "    return [float(p[-1]['content'] == 'q' and c[0] == {'role': 'assistant', 'content': 'a'})\n"
        "            for p, c in zip(prompts, completions)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "forms_of_test", raising=False)

    def score(reward, completions, columns=None, weights=()):
        section = TaskSection(reward=reward, reward_weights=list(weights))
        loaded = load_reward(reward_name(section))
        return score_group(loaded, ["p"] * len(completions), completions, columns or {})

    return score


def test_an_async_reward_is_awaited_and_none_judges_nothing(functions):
    assert [s.reward for s in functions("forms_of_test:later", ["abc", ""])] == [3.0, 0.0]
    kept, lost = functions("forms_of_test:some", ["a", "x"])
    assert kept.reward == 2.0 and lost.reward is None
    assert "sample 1: no reward function judged it" in lost.error


def test_several_rewards_are_a_weighted_sum_over_those_that_judged(functions):
    both = ["forms_of_test:later", "forms_of_test:some"]
    found = functions(both, ["abc", "x"], weights=[0.5, 10.0])
    assert [s.reward for s in found] == [0.5 * 3 + 10 * 2.0, 0.5 * 1]
    assert [s.parts for s in found] == [{both[0]: 3.0, both[1]: 2.0}, {both[0]: 1.0}]
    assert [s.reward for s in functions(both, ["a"])] == [3.0]
    assert [s.reward for s in functions(both[1], ["a"], weights=[0.25])] == [0.5]
    for reward, weights in ((both, [1.0]), ([], []), (both[0], [1.0, 2.0])):
        with pytest.raises(UsageError, match=r"task\.reward_weights"):
            reward_name(TaskSection(reward=reward, reward_weights=weights))


def test_a_conversation_reaches_the_reward_as_messages(functions):
    columns = {"_conversation": [[{"role": "user", "content": "q"}]] * 2}
    assert [s.reward for s in functions("forms_of_test:messages", ["a", "b"], columns)] == [1.0, 0.0]
    numbers = {**columns, "reference": ["4", "4"]}
    assert [s.reward for s in functions("numeric-answer", ["#### 4", "4"], numbers)] == [1.0, 0.0], "ours reads text"


@pytest.mark.parametrize(
    ("prompt", "template", "said"),
    [
        ([{"role": "user"}], CHAT, "is no message"),
        ([], CHAT, "is no message"),
        ([{"role": "user", "content": "a"}], "", "has no chat template"),
        ([{"role": "user", "content": "a"}], "{{ raise_exception('never') }}", r"does not take the messages .*never"),
    ],
)
def test_conversations_that_cannot_be_written_are_named_by_line(tmp_path, prompt, template, said):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "2"}) + "\n")
    section = TaskSection(kind="jsonl", path=str(tmp_path / "chats.jsonl"), question_field="prompt")
    chat = chat_template(chat_model(tmp_path / "model", template))
    with pytest.raises(UsageError, match=rf"chats\.jsonl:1: .*{said}"):
        load_task(section, 0, chat)


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
