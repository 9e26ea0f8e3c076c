"""What benchmarks of generation refuse: one line, exit code 2, and nothing measured."""

import json

import pytest

from benchmarks.drafter_choice import and_length, drafters, short_name
from pipeline.cli import main
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    _write_tokenizer(save_tiny(folder / "model"), VOCABULARY)
    line = json.dumps({"question": "1 + 2", "answer": "3"})
    for name, text in (
        ("good", line + "\n"),
        ("empty", ""),
        ("number", '{"question": 3}'),
        ("field", '{"text": "a"}'),
        ("list", "[1]"),
    ):
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def refused(command, inputs, tmp_path, capsys):
    arguments = [argument.replace("IN/", f"{inputs}/") for argument in command]
    assert main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rollahead: ") and captured.err.count("\n") == 1, captured.err
    assert captured.out == "" and not (tmp_path / "results.json").exists()
    return captured.err


ROLLOUTS = ["rollouts", "--model", "IN/model", "--batch", "1", "--repeats", "1", "--tokens", "8"]
DRAFTERS = ["drafters", "--model", "IN/model", "--train", "IN/good.jsonl", "--prompts", "IN/good.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "argument --repeats: 0 is too small; give at least 1"),
        (["--group-size", "0"], "argument --group-size: 0 is too small"),
        (["--threads", "-1"], "argument --threads: -1 is too small"),
        (["--batch", "0"], "argument --batch: 0 is too small"),
        (["--tokens", "0"], "argument --tokens: 0 is too small"),
        (["--tokens", "99999999"], "--tokens 99999999 behind the longest prompt"),
        (["--tokens", "99999999999"], "99999999999 is too large"),
        (["--temperature", "nan"], "argument --temperature: nan is no temperature"),
        (["--temperature", "-1"], "argument --temperature: -1 is no temperature"),
        (["--temperature", "1e-40"], "argument --temperature: 1e-40 is no temperature"),
        (["--max-draft-tokens", "0"], "argument --max-draft-tokens: 0 is too small"),
        (["--seed", "99999999999999999999"], "is too large"),
        (["--model", "random-0x0x0"], "model random-0x0x0 has no layers"),
        (["--model", "random-2x130x64"], "a width that heads do not divide"),
        (["--prompts", "IN/empty.jsonl"], "empty.jsonl is empty"),
        (["--prompts", "IN/missing.jsonl"], "missing.jsonl"),
        (["--prompts", "IN/number.jsonl"], "give lines of JSON with a text as field question"),
        (["--prompts", "IN/field.jsonl"], "missing required field `question`"),
        (["--prompts", ""], "argument --prompts: '' names no file"),
        (["--drafters", ""], "argument --drafters: '' names no drafter"),
        (["--drafters", "none,sufix-automaton"], "did you mean suffix-automaton?"),
        (["--drafters", "none,suffix-automaton@x"], "after @ goes the longest draft"),
        (["--drafters", 'none,{name = "suffix-automaton", memory_mb = -1}@4'], "memory_mb = -1 is not valid"),
        (["--drafters", "draft-model"], "needs a checkpoint"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_rollouts_refuse(inputs, tmp_path, capsys, arguments, said):
    assert said in refused([*ROLLOUTS, *arguments], inputs, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "argument --batch: 0 is too small"),
        (["--batch", "x"], "argument --batch: 'x' is not a whole number"),
        (["--repeats", "0"], "argument --repeats: 0 is too small"),
        (["--train", "IN/empty.jsonl"], "empty.jsonl is empty"),
        (["--train", "IN/list.jsonl"], "list.jsonl cannot be used"),
        (["--parts", "speed"], "--parts speed is unknown"),
        (["--drafters", "nobody"], "drafter 'nobody' is unknown"),
    ],
)
def test_drafters_refuse(inputs, tmp_path, capsys, arguments, said):
    assert said in refused([*DRAFTERS, *arguments], inputs, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["queue", "--batch", "0"], "argument --batch: 0 is too small"),
        (["queue", "--drafters", "nobody"], "drafter 'nobody' is unknown"),
        (["exactness", "--model", "/nope"], "model folder /nope does not exist"),
        (["exactness", "--drafter", "nobody"], "drafter 'nobody' is unknown"),
    ],
)
def test_queue_and_exactness_refuse(inputs, tmp_path, capsys, arguments, said):
    assert said in refused(arguments, inputs, tmp_path, capsys)


SWITCHING = ["switching", "--model", "m", "--small-model", "s", "--prompts", "p"]
MODEL_DRAFTERS = ["model-drafters", "--model", "m", "--prompts", "p"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SWITCHING, "--threads", "0"], "argument --threads: 0 is too small; give at least 1"),
        ([*SWITCHING, "--shares", "0.1,1.5"], "argument --shares: 1.5 is no share; give a number between 0 and 1"),
        ([*SWITCHING, "--thresholds", "nan"], "argument --thresholds: nan cannot be used"),
        ([*SWITCHING, "--share", "0"], "argument --share: 0 is no share"),
        ([*SWITCHING, "--rules", ""], "argument --rules: '' holds no rule; write for example 5:10"),
        ([*SWITCHING, "--shares", ""], "--shares and --thresholds are both empty"),
        (["compiled-decode", "--batch", "x"], "argument --batch: 'x' is not a whole number"),
        (["compiled-decode", "--batch", "1,0"], "argument --batch: 0 is too small"),
        (["decode-bandwidth", "--batch", "x"], "argument --batch: 'x' is not a whole number"),
        ([*MODEL_DRAFTERS, "--batch", "x"], "argument --batch: 'x' is not a whole number"),
        ([*MODEL_DRAFTERS, "--skips", "x"], "argument --skips: 'x' is not a whole number"),
    ],
)
def test_lists_and_counts_of_other_benchmarks_are_refused(inputs, tmp_path, capsys, arguments, said):
    assert said in refused(arguments, inputs, tmp_path, capsys)


def test_a_drafter_that_does_not_fit_the_model_is_one_line_from_its_worker(inputs, tmp_path, capfd):
    arguments = [argument.replace("IN/", f"{inputs}/") for argument in ROLLOUTS]
    assert main(["bench", *arguments, "--drafters", "mtp", "--threads", "1", "--out", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and sum(line.startswith("rollahead: ") for line in said.splitlines()) == 1


def test_several_drafters_with_options_are_one_option():
    head, both = '{name = "mtp", path = "/a/b@c/head"}', '{name = "arbiter", drafters = ["suffix-automaton", "mtp"]}'
    assert drafters(f"none, suffix-automaton@8,{head}@4,{both}") == ["none", "suffix-automaton@8", f"{head}@4", both]
    assert and_length(f"{head}@4") == (head, 4) and and_length(both) == (both, None)
    names = [short_name(text) for text in ("none@8", head, f"{head}@4", both)]
    assert names == ["none@8", "mtp(path=head)", "mtp(path=head)@4", "arbiter[suffix-automaton mtp]"]
    assert short_name('{name = "suffix-automaton", auxiliary = "mtp"}') == "suffix-automaton[mtp]"
