"""The command line is a contract: what it offers, and how it fails."""

import argparse
import resource
import subprocess
import sys
import tomllib

import pytest

from pipeline.cli import main
from pipeline.command_line import build_parser
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny

COMMAND_LINE = {
    "run": ["[config]", "--set", "--dry-run", "--out", "--insecure", "--eval-only"],
    "learner": ["config", "--set", "--dry-run", "--insecure", "--eval-only"],
    "keygen": ["folder", "--engine"],
    "engine": ["config", "--connect", "--connect-timeout", "--set", "--dry-run"],
    "generate": [
        "model", "--prompt", "--drafter", "--small-model", "--threshold", "--rule", "--max-new-tokens", "--temperature",
        "--seed", "--samples", "--top-k", "--kv-compression", "--kv-budget", "--kv-every", "--top-p", "--min-p",
        "--repetition-penalty", "--presence-penalty", "--frequency-penalty", "--logit-bias",
        "--allowed-token-ids", "--bad-token-ids", "--stop-token-ids", "--stop-strings", "--min-new-tokens",
    ],
    "corpus": ["action", "files", "--out", "--tokenizer", "--template"],
    "drafters": [],
    "train-drafter": ["[config]", "--set", "--dry-run", "--out"],
    "export": ["run", "--step", "--out", "--dtype", "--drafter"],
    "report": ["folder", "--out"],
    "doctor": [],
    "completion": ["shell"],
    "bench": ["what", "arguments"],
}  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> list[str]:
    names = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = action.option_strings[-1] if action.option_strings else action.dest
        names.append(f"[{name}]" if action.nargs == "?" else name)
    return names


JSONL = [
    "run", "--dry-run", "--set", "task.kind=jsonl", "--set", "task.path=x", "--set", "model.path=x",
]  # fmt: skip


def test_an_engine_is_told_which_option_is_wrong(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text("")
    for arguments, said in (
        (["--connect", "foo"], "--connect 'foo' is not an address"),
        (["--connect", "tcp://host:port"], "--connect 'tcp://host:port' is not an address"),
        (["--set", "transport.keys=/nope"], "/nope/engine.secret"),
    ):
        assert main(["engine", str(config), "--dry-run", *arguments]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["engine", str(config), "--connect-timeout", "-1"])
    assert ended.value.code == 2 and "'-1' is no length of time" in capsys.readouterr().err
    assert main(["engine", str(config), "--dry-run", "--connect", "tcp://[::1]:5757"]) == 0


def test_command_line_is_frozen():
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert {name: sorted(_options(parser)) for name, parser in commands.choices.items()} == {
        name: sorted(options) for name, options in COMMAND_LINE.items()
    }


def test_dry_run_prints_the_resolved_configuration(capsys):
    assert main(["run", "--set", "learner.batch_size=16", "--dry-run", "--out", "x"]) == 0
    resolved = tomllib.loads(capsys.readouterr().out)
    assert resolved["learner"]["batch_size"] == 16 and resolved["run"]["out"] == "x"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--dry-run", "--set", "learner.btach_size=1"], "did you mean batch_size"),
        (["run", "--dry-run", "--set", "engine.drafter=sufix-automaton"], "suffix-automaton"),
        (["run", "--dry-run", "--set", "engine.drafter.name=no_such_module:Drafter"], "no_such_module"),
        (["run", "--dry-run", "--set", "objective.surrogate=ppo"], "ppo-clip"),
        (["run", "--dry-run", "--set", "objective.surrogate.clip_hgh=1"], "clip_high"),
        (["run", "--dry-run", "--set", "objective.recipe=5"], "there is no recipe 5; known: "),
        (["run", "--dry-run", "--set", "model.path=a\udcff"], "is not UTF-8 at character 13"),
        (["run", "--dry-run", "--set", "task.reward=nowhere:nothing"], "nowhere"),
        (["learner", "nowhere.toml"], "nowhere.toml"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["bench", "nonsense"], "benchmark"),
        (["run", "--dry-run", "--set", "engine.kv_compression.policy=rkv"], "r-kv"),
        (["run", "--dry-run", "--set", 'engine.kv_compression={policy = "r-kv", budget = 8}'], "raise it above 8"),
        (["run", "--dry-run", "--set", "engine.kv_compression.bugdet=8"], "did you mean budget"),
        (["run", "--dry-run", "--set", "engine.kv_compression.every=0"], "tokens from one compression to the next"),
        (["run", "--dry-run", "--set", "engine.kv_compression=r-kv"], "[engine.kv_compression]"),
        (["run", "--dry-run", "--set", "transport.address=foo"], "'foo' is not an address; write tcp://HOST:PORT"),
        (["run", "--dry-run", "--set", "transport.address=tcp://0.0.0.0:5757"], "needs keys"),
        (["run", "--dry-run", "--set", "transport.keys=/nope"], "/nope/learner.secret"),
        (["run", "--dry-run", "--set", "learner.device=cuda:99"], "learner.device 'cuda:99'"),
        (["run", "--dry-run", "--set", "learner.device=meta"], "learner.device 'meta' is unknown"),
        (["run", "--dry-run", "--set", "learner.reference_path=/nope"], "learner.reference_path '/nope'"),
        (["run", "--dry-run", "--set", "model.path=/nope"], "model folder /nope does not exist"),
        (["run", "--dry-run", "--set", "task.kind=no_such_module:Task"], "No module named 'no_such_module'"),
        (["run", "--dry-run", "--set", "engine.device=tpu"], "engine.device 'tpu' is unknown; use auto, cpu, cuda"),
        (["run", "--dry-run", "--set", "engine.device=meta"], "engine.device 'meta' is unknown"),
        (["run", "--dry-run", "--set", f"run.seed={2**63}"], f"run.seed = {2**63} is not valid"),
        ([*JSONL, "--eval-only"], "--eval-only needs task.held_out_path"),
        ([*JSONL, "--set", "learner.eval_every=5", "--set", "task.held_out_path=/nope"], "'/nope' is not a file"),
        (["keygen", __file__], f"{__file__} is a file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_exit_code_2(arguments, said, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rollahead: ") and captured.err.count("\n") == 1
    assert said in captured.err


def test_a_dry_run_reads_model_and_task(tmp_path, capsys):
    model, task = save_tiny(tmp_path / "model", max_position_embeddings=2048), tmp_path / "task.jsonl"
    given = ["task.kind=jsonl", f"task.path={task}", f"model.path={model}"]
    arguments = ["run", "--dry-run", *(part for setting in given for part in ("--set", setting))]
    assert main(arguments) == 2 and "tokenizer.json is missing" in capsys.readouterr().err
    _write_tokenizer(model, VOCABULARY)
    assert main(arguments) == 2 and "task.jsonl' cannot be read" in capsys.readouterr().err
    task.write_text('{"question": "12", "answer": "3"}\n')
    (model / "model.safetensors").unlink()  # weights are not looked at
    assert main(arguments) == 0
    assert main([*arguments, "--set", "sampling.max_new_tokens=4096"]) == 2


def test_help_is_quick_because_it_imports_nothing_heavy():
    seconds = []
    for _ in range(3):
        began = _children_seconds()
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(_children_seconds() - began)
        assert "examples:" in done.stdout
    assert min(seconds) < 0.3


def _children_seconds() -> float:
    """Of processor time: what other programs do meanwhile does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
