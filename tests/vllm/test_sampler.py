"""The installed vLLM's rejection sampler, as it comes and corrected, and the guard at engine start."""

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


def test_an_engine_whose_sampler_follows_its_drafts_is_refused_by_version(tmp_path, monkeypatch):
    folder = random_checkpoint(tmp_path / "model", 12, sharpness=0.6, head_dim=HEAD)
    monkeypatch.setenv(rejection.STOCK, "1")
    with pytest.raises(RunFailed, match=rf"vLLM {installed_version()} does not sample .* temperature"):
        make(folder, "suffix-automaton")
