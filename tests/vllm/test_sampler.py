"""The installed vLLM's rejection sampler, as it comes and corrected, and the guard at engine start."""

import subprocess
import sys

import pytest

from benchmarks.exactness_suite.model import random_checkpoint
from benchmarks.exactness_suite.vllm import HEAD, make, sampler_p_values
from pipeline.engine.vllm import rejection
from pipeline.engine.vllm.install import installed_version, needs_correction
from pipeline.errors import RunFailed


def test_the_stock_sampler_is_wrong_and_the_corrected_one_is_not():
    found = sampler_p_values(50_000)
    assert needs_correction(installed_version(), "cpu")
    assert min(found["stock"].values()) < rejection.CHECK_LEVEL
    assert min(found["wrong probabilities"].values()) < rejection.CHECK_LEVEL
    for drafts in ("unlikely drafts", "missing drafts", "drawn drafts"):
        assert set(found[drafts]) == set(rejection.SETTINGS)
        assert min(found[drafts].values()) > 1e-4, found[drafts]


def test_a_step_in_which_no_draft_has_a_token_ends_the_stock_sampler_and_not_the_corrected_one():
    assert step_without_drafts("stock") == "RuntimeError"
    assert step_without_drafts("corrected") == "(0, 6)"


def step_without_drafts(which: str) -> str:
    """Of two sequences with a top-k, in a process of its own: what is corrected stays so."""
    code = f"""
import torch
from pipeline.engine.vllm import rejection
rejection.prepare()
from types import SimpleNamespace
from vllm.v1.sample import rejection_sampler as sampler
if {which!r} == "corrected":
    rejection.correct(sampler)
metadata = SimpleNamespace(all_greedy=False, temperature=torch.ones(2), top_k=torch.tensor([3, 3]), top_p=None)
ends = torch.zeros(2, dtype=torch.int32)
try:
    print(tuple(sampler.apply_sampling_constraints(torch.zeros(0, 6), ends, metadata).shape))
except RuntimeError:
    print("RuntimeError")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_an_engine_whose_sampler_follows_its_drafts_is_refused_by_version(tmp_path, monkeypatch):
    folder = random_checkpoint(tmp_path / "model", 12, sharpness=0.6, head_dim=HEAD)
    monkeypatch.setenv(rejection.STOCK, "1")
    with pytest.raises(RunFailed, match=rf"vLLM {installed_version()} does not sample .* temperature"):
        make(folder, "suffix-automaton")
