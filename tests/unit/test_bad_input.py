"""What a user can get wrong about model and data: `rollahead learner` says so in one line, exit code 2."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.cli import main
from tests.unit.tiny_models import VOCABULARY, save_tiny


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint directory with nothing wrong: every test breaks one thing in a copy."""
    folder = save_tiny(tmp_path_factory.mktemp("sound"))
    _write_tokenizer(folder, VOCABULARY)
    return folder


def _write_tokenizer(folder, size):
    characters = [chr(32 + index) for index in range(size - 1)]
    vocabulary = {"<unk>": 0} | {character: index + 1 for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def attempt(tmp_path, sound, capsys):
    """Copies the sound inputs, lets `damage(model, data)` break them, and runs the learner on the result."""

    def run(damage, *overrides):
        model, data = tmp_path / "model", tmp_path / "data.jsonl"
        shutil.copytree(sound, model)
        data.write_text(json.dumps({"question": "1+1", "answer": "#### 2"}) + "\n")
        damage(model, data)
        path = tmp_path / "c.toml"
        path.write_text(
            f'run.out = "{tmp_path / "run"}"\nmodel.path = "{model}"\n'
            f'task = {{kind = "jsonl", path = "{data}"}}\n'
            "sampling = {max_prompt_tokens = 64, max_new_tokens = 64}\n"
        )
        settings = [text for override in overrides for text in ("--set", override)]
        code = main(["learner", str(path), *settings])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run"])
def test_a_run_directory_that_cannot_be_written_is_refused(attempt, folder):
    code, said = attempt(lambda model, data: None, f"run.out={folder}")
    assert code == 2 and said.count("\n") == 1
    assert f"run directory {folder} cannot be written" in said and "choose another run.out" in said


def _edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda model, data: shutil.rmtree(model), ["model", "does not exist"]),
        (lambda model, data: (model / "model.safetensors").unlink(), ["model"]),
        (lambda model, data: _truncate(model / "model.safetensors"), ["model"]),
        (lambda model, data: (model / "tokenizer.json").unlink(), ["tokenizer.json"]),
        (lambda model, data: _write_tokenizer(model, 90), ["tokenizer does not match", "89", str(VOCABULARY)]),
        (
            lambda model, data: (model / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}'),
            ["GPT2LMHeadModel", "Qwen3ForCausalLM"],
        ),
        (lambda model, data: data.unlink(), ["data.jsonl"]),
        (lambda model, data: data.write_text(""), ["data.jsonl"]),
        (lambda model, data: data.write_text(data.read_text() + '{"question": "2"}\n'), ["data.jsonl:2", "answer"]),
        (lambda model, data: data.write_text(data.read_text() + "not json\n"), ["data.jsonl:2"]),
        (
            lambda model, data: data.write_text(json.dumps({"question": "1" * 99, "answer": "#### 2"}) + "\n"),
            ["data.jsonl:1", "sampling.max_prompt_tokens = 64"],
        ),
    ],
    ids=[
        "no model", "no weights", "truncated weights", "no tokenizer", "tokenizer of another model",
        "architecture not supported", "no dataset", "empty dataset", "field missing", "not JSON", "prompt too long",
    ],
)  # fmt: skip
def test_bad_model_or_data_is_one_line_and_exit_code_2(attempt, damage, parts):
    code, said = attempt(damage)
    assert code == 2
    lines = [line for line in said.splitlines() if line.startswith("rollahead: ")]
    assert len(lines) == 1 and "Traceback" not in said
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sampling.max_new_tokens=1000", ["1064", "256 positions"]),
        ("transport.address=tcp://0.0.0.0:5757", ["0.0.0.0"]),
        ("transport.address=nonsense", ["nonsense"]),
    ],
)
def test_options_that_do_not_fit_are_one_line_and_exit_code_2(attempt, override, parts):
    code, said = attempt(lambda model, data: None, override)
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("rollahead: ")]
    for part in parts:
        assert part in line
