"""What `rollahead generate` and the native generator refuse, each in one sentence."""

import pytest

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.config.check import check_config
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError, complaint
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    _write_tokenizer(folder, VOCABULARY)
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999 with 1 samples is outside 64 bits"),
        (["--seed", str(2**63 - 1), "--samples", "2"], "outside 64 bits"),
        (["--stop-token-ids", "61"], "stop_token_ids has token id 61, outside the vocabulary of 61"),
        (["--min-new-tokens", "9", "--max-new-tokens", "8"], "min_new_tokens = 9 is more than"),
        (["--temperature", "1e-40"], "--temperature = 1e-40 is too small to divide logits by"),
        (["--logit-bias", "4=1", "--logit-bias", "5=nan"], "--logit-bias 5=nan is not valid: expected float"),
        (["--prompt", "a\udcfb"], r"--prompt 'a\udcfb' is not UTF-8 at character 2"),
        (["--top-k", "-1"], "--top-k -1 is not valid: expected int >= 0"),
        (["--drafter", '{name = "suffix-automaton", memory_mb = -1}'], "memory_mb = -1 is not valid"),
    ],
)
def test_generate_says_what_cannot_be_in_one_line(model, capsys, arguments, said):
    command = ["generate", str(model), "--prompt", "12", "--drafter", "none", "--max-new-tokens", "8"]
    assert main([*command, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("rollahead: ") and captured.err.count("\n") == 1
    assert said in captured.err and "`" not in captured.err


def test_the_largest_seeds_are_fine(model, capsys):
    for seed in (2**63 - 1, -(2**63)):
        arguments = ["generate", str(model), "--prompt", "12", "--seed", str(seed), "--max-new-tokens", "2"]
        assert main([*arguments, "--drafter", "none", "--temperature", "1e-5"]) == 0


@pytest.mark.parametrize(
    "options", [{"prefill_tokens": 0}, {"max_draft_tokens": -1}, {"max_sequences": 0}, {"kv_bytes": -5}]
)
def test_counts_that_cannot_work_are_refused_before_anything_is_loaded(options):
    ((name, value),) = options.items()
    with pytest.raises(UsageError, match=f"{name} = {value} is too small"):
        NativeGenerator("nowhere", **options)


@pytest.mark.parametrize(
    "setting",
    ["sampling.temperature=1e-40", "learner.eval_temperature=1e-7", "sampling.min_new_tokens=9999"],
)
def test_a_run_refuses_the_same(setting):
    with pytest.raises(UsageError, match=setting.partition("=")[0].replace(".", r"\.")):
        check_config(load_config(None, [setting]))


def test_what_msgspec_says_is_taken_apart():
    assert complaint("Expected `int` >= 1 - at `$.tokens`") == ("tokens", "expected int >= 1")
    assert complaint("Object missing required field `depth`") == ("", "object missing required field depth")
    assert complaint("Expected `float`, got `str` - at `$.bias[1][0]`") == ("bias[1][0]", "expected float, got str")
