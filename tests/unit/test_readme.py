"""What the README shows is what runs."""

import re
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from drafters.base import Needs
from drafters.registry import build
from pipeline.cli import build_parser
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.vllm.proposer import check_needs
from pipeline.tasks.rewards import load_reward, score_group
from tests.unit.generation import finish, group, texts
from tests.unit.tiny_models import save_tiny

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Writes a Python block of the README, found by its first line, where it can be imported."""

    def write(name):
        (block,) = re.findall(rf"```python\n# {name}\.py\n(.*?)```", README, re.DOTALL)
        (tmp_path / f"{name}.py").write_text(block)
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_reward_example_scores_a_group(example):
    example("my_rewards")
    scored = score_group(load_reward("my_rewards:brevity"), ["p"] * 2, ["a", "abc"], {"reference": ["1", "1"]})
    assert [score.reward for score in scored] == [0.5, 0.25]


def test_drafter_example_drafts_and_changes_nothing(example, tmp_path):
    example("my_drafter")
    folder = save_tiny(tmp_path / "model", sharpness=6.0)
    outcomes = {}
    for name in ("none", "my_drafter:RepeatLast"):
        generator = NativeGenerator(folder, drafter=build({"name": name}), max_sequences=3)
        generator.add(group(samples=5, max_new_tokens=30))
        outcomes[name] = texts(finish(generator))
        drafted, failures = generator.stats().drafted, generator.stats().drafter_failures
    assert outcomes["none"] == outcomes["my_drafter:RepeatLast"]
    assert drafted > 0 and failures == 0


def test_every_command_shown_is_one_the_parser_knows():
    shown = re.findall(r"^    (rollahead .*?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
    assert len(shown) >= 5
    for line in shown:
        arguments = [word for word in shlex.split(line)[1:] if word != "..."]
        build_parser().parse_args(arguments)


def test_the_table_of_drafters_and_generators_is_true():
    rows = dict(re.findall(r"^\| `([a-z-]+)`[^|]*\| yes \| (yes|no)[^|]*\|$", README, re.MULTILINE))
    assert {"none", "suffix-automaton", "prompt-lookup", "arbiter", "token-recycling", "mtp"} <= rows.keys()
    kinds = {point.name: point.load() for point in entry_points(group="rollahead.drafters")}
    for name, in_vllm in rows.items():
        needs = Needs.NOTHING if name == "arbiter" else kinds[name].needs  # an arbiter's are those of its drafters
        assert (in_vllm == "yes") == (not needs), name
    check_needs(build({"name": "arbiter"}))
