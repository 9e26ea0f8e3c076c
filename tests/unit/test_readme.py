"""What README and docs show is what runs."""

import re
import shlex
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from drafters.registry import build
from learner.testing import check_piece
from pipeline.bench import available
from pipeline.cli import main
from pipeline.command_line import COMMAND_EXAMPLES, EXAMPLES, build_parser
from pipeline.config.types import TaskSection
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.vllm import own_drafters
from pipeline.engine.vllm.proposer import check_needs
from pipeline.errors import UsageError
from pipeline.tasks import load_task
from pipeline.tasks.rewards import load_reward, score_group
from pipeline.transport.keys import keygen
from tests.unit.generation import finish, group, texts
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = DOCUMENTS["README.md"]
PYTHON_BLOCK = re.compile(r"```python\n# (\w+)\.py\n(.*?)```", re.DOTALL)


def commands(text):
    """The `rollahead` lines of a text, without comments, ellipses and the brackets of what may be left out."""
    joined = re.sub(r" *\\\n\s*", " ", text)
    for line in re.findall(r"^ {2,4}(rollahead .*?)(?:\s{2,}.*)?$", joined, re.MULTILINE):
        words = shlex.split(line, comments=True)[1:]
        yield [word.strip("[]") if word.startswith(("[--", "[-")) else word.rstrip("]") if word.isupper() or
               re.fullmatch(r"[A-Z]+\]", word) else word for word in words if word != "..."]  # fmt: skip


SHOWN = [(name, words) for name, text in DOCUMENTS.items() for words in commands(text)]
SHOWN += [("help", words) for text in (EXAMPLES, *COMMAND_EXAMPLES.values()) for words in commands(text)]


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """Every Python file that the documents show, where it can be imported."""
    for text in DOCUMENTS.values():
        for name, block in PYTHON_BLOCK.findall(text):
            (tmp_path / f"{name}.py").write_text(block)
            monkeypatch.delitem(sys.modules, name, raising=False)
    for folder in ("DIR", "MODEL"):  # whose configuration and tokenizer a dry run reads
        _write_tokenizer(save_tiny(tmp_path / folder, max_position_embeddings=1 << 20), VOCABULARY)
    for file in ("FILE", "hard_train.jsonl"):
        (tmp_path / file).write_text('{"question": "1", "answer": "1"}\n')
    (tmp_path / "c.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_are_short():
    for name, block in PYTHON_BLOCK.findall(README):
        assert len(block.splitlines()) < 40, name


def test_reward_example_scores_a_group(examples):
    scored = score_group(load_reward("my_rewards:brevity"), ["p"] * 2, ["a", "abc"], {"reference": ["1", "1"]})
    assert [score.reward for score in scored] == [0.5, 0.25]


def test_drafter_example_drafts_and_changes_nothing(examples):
    folder = save_tiny(examples / "model", sharpness=6.0)
    outcomes = {}
    for name in ("none", "my_drafter:RepeatLast"):
        generator = NativeGenerator(folder, drafter=build({"name": name}), max_sequences=3)
        generator.add(group(samples=5, max_new_tokens=30))
        outcomes[name] = texts(finish(generator))
        drafted, failures = generator.stats().drafted, generator.stats().drafter_failures
    assert outcomes["none"] == outcomes["my_drafter:RepeatLast"]
    assert drafted > 0 and failures == 0


def test_task_example_has_prompts_that_the_built_in_reward_scores(examples):
    task = load_task(TaskSection(kind="my_task:Doubling"), seed=0)
    assert task.train[21].prompt == "What is 21 + 21?\n" and len(task.held_out) == 50
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.held_out}
    assert all(len(e.prompt) <= len(task.longest_prompt) for e in (*task.train, *task.held_out))
    columns = {key: [value] for key, value in task.train[21].columns.items()}
    assert score_group(load_reward("numeric-answer"), ["p"], ["#### 42"], columns)[0].reward == 1.0


def test_objective_example_keeps_to_the_contract(examples):
    piece = check_piece("gate", {"name": "my_objective:certain_tokens", "nats": 0.3})
    assert piece.name == "certain_tokens"


def test_there_are_commands_in_readme_docs_and_help():
    assert len([name for name, _ in SHOWN if name == "README.md"]) >= 12
    assert len(SHOWN) >= 40 and {"help", "benchmarks.md", "reliability.md"} <= {name for name, _ in SHOWN}


@pytest.mark.parametrize(("document", "words"), SHOWN, ids=[" ".join(words)[:70] for _, words in SHOWN])
def test_every_command_shown_is_one_that_is_understood(document, words, examples, monkeypatch, capsys):
    options = build_parser().parse_args(words)
    if options.command in ("run", "learner", "engine"):
        if getattr(options, "eval_only", False):
            words = [word for word in words if word != "--eval-only"]
        if any(word.startswith("transport.keys=") for word in words):
            keygen(Path("keys"), ["engine", "gpu-1", "gpu-2"])
        # A folder nobody has, or vLLM in an environment without it: the refusal itself is tested elsewhere.
        refused = "does not exist" if any(word.endswith("=SMALL") for word in words) else ""
        if "engine.generator=vllm" in words and find_spec("vllm") is None:
            refused = "needs vLLM"
        status, text = main([*words, "--dry-run"]), capsys.readouterr().err
        assert (status == 2 and refused in text) if refused else status == 0, text
    elif options.command == "bench" and options.what != "list":
        assert options.what in available()
        source = (ROOT / "benchmarks" / f"{options.what.replace('-', '_')}.py").read_text()
        for word in options.arguments:
            if word.startswith("--") and word != "--help":
                assert f'"{word}"' in source, f"{document}: {options.what} has no {word}"
    elif options.command in ("drafters", "keygen"):
        assert main(words) == 0


def test_every_document_is_found_from_the_readme():
    for name in DOCUMENTS.keys() - {"README.md"}:
        assert f"docs/{name}" in README, name


def test_what_a_run_directory_holds_is_what_the_readme_says():
    from pipeline.run_directory import RunDirectory

    directory = RunDirectory(Path("run"))
    for path in vars(directory).values():
        if isinstance(path, Path) and path.name in ("metrics.jsonl", "samples.jsonl", "trained.jsonl", "report.html"):
            assert path.name in README
    assert np.all([word in README for word in ("tensorboard/", "trace/", "checkpoints/step-N/")])


def test_the_table_of_drafters_and_generators_is_true(tmp_path):
    rows = dict(re.findall(r"^\| `([a-z-]+)`[^|]*\| yes \| (yes|no)[^|]*\|$", README, re.MULTILINE))
    assert {"none", "suffix-automaton", "prompt-lookup", "arbiter", "token-recycling", "mtp"} <= rows.keys()
    kinds = {point.name: point.load() for point in entry_points(group="rollahead.drafters")}
    for name, in_vllm in rows.items():
        # an arbiter's needs are those of its drafters
        shown = name == "arbiter" or not kinds[name].needs or issubclass(kinds[name], own_drafters.KINDS)
        assert (in_vllm == "yes") == shown, name
    check_needs(build({"name": "arbiter"}))
    assert "| `arbiter` of drafters that do | yes | yes, but not of `mtp` or `draft-model` |" in README
    model = str(save_tiny(tmp_path))
    for kind in own_drafters.KINDS:
        parts = ["suffix-automaton", {"name": kind.name, "path": model}]
        with pytest.raises(UsageError, match="cannot give it here"):
            check_needs(build({"name": "arbiter", "drafters": parts}))
