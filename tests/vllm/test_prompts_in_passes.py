"""Prompts longer than a pass, with seeds: the installed vLLM ends at them on a CPU; corrected it does not, and a text
depends on its seed alone."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.exactness_suite.generators import generate
from benchmarks.exactness_suite.model import random_checkpoint
from benchmarks.exactness_suite.vllm import HEAD
from pipeline.engine.generator import GeneratorLost, GroupRequest
from pipeline.engine.vllm import rejection
from pipeline.engine.vllm.generator import VllmGenerator
from pipeline.engine.vllm.install import installed_version, needs_correction
from pipeline.messages import SamplingParams

VOCABULARY, PASS = 12, 32


def texts(folder: Path, tokens_a_pass: int, drafter: str = "none") -> list[list[int]]:
    """Of two prompts, one longer than a short pass, with three seeds each."""
    generator = VllmGenerator(
        folder, drafter={"name": drafter}, max_sequences=8, max_draft_tokens=3, max_length=200, dtype="float32",
        stop_token_ids=(), options={"enforce_eager": True, "max_num_batched_tokens": tokens_a_pass},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, size) for size in (3 * PASS + 5, 6)]
    requests = [
        GroupRequest(index, prompt, SamplingParams(max_new_tokens=40), (10 * index, 10 * index + 1, 10 * index + 2))
        for index, prompt in enumerate(prompts)
    ]
    try:
        samples = generate(generator, requests)
    finally:
        generator.close()
    return [s.token_ids.tolist() for s in sorted(samples, key=lambda s: (s.group, s.sample))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(
        tmp_path_factory.mktemp("model") / "model", VOCABULARY, sharpness=0.6, head_dim=HEAD, tied=True
    )


def test_a_seeds_text_does_not_depend_on_how_its_prompt_was_cut(folder):
    assert needs_correction(installed_version(), "cpu")
    whole, cut = texts(folder, 1024), texts(folder, PASS)
    assert len(whole) == 6 and len({tuple(text) for text in whole}) == 6
    assert cut == whole
    assert [len(text) for text in texts(folder, PASS, "suffix-automaton")] == [40] * 6


def test_the_stock_runner_ends_at_such_a_prompt(folder, monkeypatch):
    monkeypatch.setenv(rejection.STOCK, "1")
    with pytest.raises(GeneratorLost):
        texts(folder, PASS)
