"""A user's reward function cannot hold up, kill or fill the engine; the sample that makes it try is named."""

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.config.types import TaskSection
from pipeline.engine.rewarding import BuiltInScorer, build_scorers
from pipeline.errors import UsageError
from pipeline.tasks import reward_process
from pipeline.tasks.reward_process import ProcessScorer

REWARDS = """
import os, signal, time

def odd(prompts, completions, *, limit, **columns):
    print("this is no answer")
    for text in completions:
        if text == "hang":
            time.sleep(60)
        if text == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if text == "exit":
            os._exit(3)
        if text == "grow":
            keep = bytearray(512 << 20)
        if text == "raise":
            raise ValueError("no")
    return [len(text) / top for text, top in zip(completions, limit)]

def starts(prompts, completions, **columns):
    import subprocess
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with open("child", "w") as file:
        file.write(str(child.pid))
    if completions[0] == "hang":
        time.sleep(60)
    if completions[0] == "exit":
        os._exit(3)
    return [0.0] * len(completions)

def whoami(prompts, completions, **columns):
    return [float(os.getpid())] * len(completions)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_rewards"


def scores(scorer, *completions):
    columns = {"limit": [10.0] * len(completions)}
    return scorer.score(["p"] * len(completions), list(completions), columns)


def test_groups_are_scored_in_another_process(module):
    scorer = ProcessScorer(f"{module}:whoami", 10.0, 0)
    (first,), (again,) = scores(scorer, "a"), scores(scorer, "b")
    assert first == again and first.reward not in (None, float(os.getpid()))
    scorer.close()


@pytest.mark.parametrize(
    ("bad", "reason", "said"),
    [
        ("hang", "reward_timeout", "took longer than 1.5 s"),
        ("die", "reward_died", "SIGSEGV"),
        ("exit", "reward_died", "exit code 3"),
        ("grow", "reward_error", "MemoryError"),
        ("raise", "reward_error", "ValueError"),
    ],
)
def test_only_the_sample_that_misbehaves_is_lost_and_it_is_named(module, bad, reason, said):
    scorer = ProcessScorer(f"{module}:odd", 1.5, 256)
    first, second, third = scores(scorer, "abc", bad, "abcde")
    assert (first.reward, third.reward) == (0.3, 0.5)
    assert second.reward is None and second.reason == reason
    assert second.error.startswith("sample 1") and said in second.error
    assert [score.reward for score in scores(scorer, "ab")] == [0.2], "the next group is scored as ever"
    scorer.close()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_a_process_that_died_while_idle_costs_no_sample(module):
    scorer = ProcessScorer(f"{module}:odd", 10.0, 0)
    scores(scorer, "a")
    for restarts in (2, 3):
        kill(scorer._process)
        assert [score.reward for score in scores(scorer, "ab")] == [0.2]
        assert scorer.restarts == restarts
    scorer.close()


def test_a_process_that_dies_before_it_has_read_a_request_is_started_anew(module, monkeypatch):
    scorer = ProcessScorer(f"{module}:odd", 10.0, 0)
    scores(scorer, "a")
    write = reward_process._write

    def write_to_nobody(pipe, data):
        monkeypatch.setattr(reward_process, "_write", write)
        kill(scorer._process)
        write(pipe, data)

    monkeypatch.setattr(reward_process, "_write", write_to_nobody)
    (score,) = scores(scorer, "ab")
    assert score.reason == "reward_died" and "SIGKILL" in score.error
    assert [score.reward for score in scores(scorer, "ab")] == [0.2]
    scorer.close()


def test_nothing_outlives_the_scorer(module):
    scorer = ProcessScorer(f"{module}:odd", 60.0, 0)
    scores(scorer, "a")
    pid = scorer._process.pid
    scorer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("end", ["hang", "exit", "close"])
def test_what_the_function_started_does_not_outlive_it(module, tmp_path, end):
    scorer = ProcessScorer(f"{module}:starts", 1.0, 0)
    scores(scorer, end)
    scorer.close()
    pid = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5.0
    while _lives(pid):
        assert time.monotonic() < deadline, f"process {pid} lives still"
        time.sleep(0.02)


def _lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # one that nobody has waited for yet


def test_a_function_that_cannot_be_loaded_is_a_usage_error(module):
    for name, text in {
        f"{module}:missing": "has no function 'missing'",
        "no_such_rewards:f": "importing module 'no_such_rewards' failed",
    }.items():
        with pytest.raises(UsageError, match=text):
            build_scorers(TaskSection(reward=name))


def test_our_own_rewards_need_no_process(module):
    (scorer,) = build_scorers(TaskSection())
    assert isinstance(scorer, BuiltInScorer)
    scorers = build_scorers(TaskSection(reward=f"{module}:odd", reward_workers=2))
    assert [type(scorer) for scorer in scorers] == [ProcessScorer] * 2
    for scorer in scorers:
        scorer.close()


def test_a_limit_of_time_is_kept(module):
    scorer = ProcessScorer(f"{module}:odd", 0.5, 0)
    scorer.start()
    began = time.monotonic()
    scores(scorer, "hang")
    assert time.monotonic() - began < 1.5
    scorer.close()
