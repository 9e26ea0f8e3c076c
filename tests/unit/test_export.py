import pytest
import torch
from transformers import AutoModelForCausalLM

from learner import checkpoint
from learner.export import export
from learner.trainer import adamw
from pipeline.cli import main
from pipeline.config.types import LearnerSection
from pipeline.errors import RunFailed, UsageError
from pipeline.failpoints import arm
from pipeline.models.config import ModelConfig
from tests.unit.learner_samples import tiny_policy


@pytest.fixture
def saved(tmp_path):
    model = tiny_policy(tmp_path / "model")
    for step in (1, 3):
        checkpoint.save(tmp_path / "run" / "checkpoints", step, model, adamw(model, LearnerSection()), {"step": step})
    return tmp_path / "run", model


def test_an_exported_checkpoint_is_a_plain_model_folder(saved, tmp_path):
    run, model = saved
    assert export(run, None, tmp_path / "out").name == "step-3"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value), name
    export(run, 1, tmp_path / "half", "bfloat16")
    assert ModelConfig.from_folder(tmp_path / "half").dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(half.get_parameter("model.norm.weight"), model.get_parameter("model.norm.weight").bfloat16())


def test_a_full_disk_is_said_in_a_sentence_and_leaves_nothing_behind(saved, tmp_path):
    run, _ = saved
    arm("tensors.write=enospc*1")
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
        export(run, None, tmp_path / "out")
    arm("")
    assert not list(tmp_path.glob("*out*"))


def test_what_cannot_be_exported_is_said(saved, tmp_path):
    run, _ = saved
    with pytest.raises(UsageError, match="there are 1, 3"):
        export(run, 2, tmp_path / "out")
    with pytest.raises(UsageError, match="no checkpoint"):
        export(tmp_path, None, tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        export(run, 1, run)
    weights = run / "checkpoints" / "step-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RunFailed, match="damaged"):
        export(run, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--step", "3"), ("--dtype", "bfloat16")])
def test_options_of_a_run_are_refused_beside_a_head(tmp_path, capsys, option):
    arguments = ["export", str(tmp_path), "--drafter", str(tmp_path), "--out", str(tmp_path / "out"), *option]
    assert main(arguments) == 2
    assert f"{option[0]} {option[1]} is a run's" in capsys.readouterr().err
