"""`rollahead doctor`, shell completion, and the configuration reference."""

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pipeline import doctor
from pipeline.cli import main
from pipeline.config import Config
from pipeline.config.reference import reference
from pipeline.engine.vllm import install

ROOT = Path(__file__).resolve().parents[2]


def test_the_doctor_says_what_the_machine_is_and_ends_well(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "PRODUCT", 64)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("processor", "threads", "GFLOP/s", "GB/s", "GiB", "CUDA", "vllm", "open files", "ZeroMQ"):
        assert word in said


@pytest.mark.parametrize(
    ("version", "value", "advice"),
    [
        (None, "not installed (only for generation at scale)", ""),
        ("0.32.1", '0.32.1: fit for engine.generator = "vllm"', ""),
        ("0.29.0", '0.29.0, which engine.generator = "vllm" does not drive', "pip install 'vllm==0.32.*'"),
    ],
)
def test_vllms_version_and_fitness_are_said(monkeypatch, version, value, advice):
    monkeypatch.setattr(install, "installed_version", lambda: version)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: version if name == "vllm" else None)
    found = doctor.check_packages()[0]
    assert found.name == "vllm" and value in found.value and advice in found.advice


def test_too_many_threads_are_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert "more threads than cores" in doctor.check_threads()[0].advice


@pytest.mark.parametrize(("ratio", "advice"), [(2.0, 'learner.dtype = "bfloat16"'), (0.5, 'learner.dtype = "float32"')])
def test_the_faster_type_is_advised(ratio, advice, monkeypatch):
    times = iter((ratio, 1.0))
    monkeypatch.setattr(doctor, "_best", lambda work: next(times))
    assert advice in doctor.check_types()[0].advice


def test_completion_knows_commands_and_options(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "train-drafter" in script or "report" in script
    assert "--dry-run" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_the_reference_names_every_option_and_the_file_in_docs_is_up_to_date():
    text = reference()
    for section in msgspec.structs.fields(Config):
        for option in msgspec.structs.fields(section.type):
            assert re.search(rf"^\| `{option.name}(\.\w+)?` \|", text, re.MULTILINE), option.name
    assert "| `switching.small_model` |" in text
    assert "integer, at least 1, at most 12" in text
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == text, f"run {Path(sys.executable).name} -m pipeline.config.reference > docs/configuration.md"
