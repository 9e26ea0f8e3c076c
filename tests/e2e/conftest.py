"""One embedded model, made once for all end-to-end tests."""

from pathlib import Path

import pytest

from tests.e2e.runs import rollahead, settings

SMALL = {
    "model__warm_start_seconds": 20,
    "learner__batch_size": 16,
    "learner__group_size": 4,
    "engine__max_sequences": 16,
    "sampling__max_new_tokens": 64,
    "run__measure_drafting": "false",
}
"""Quick settings; the reward does not matter to most tests."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the small warm start has been done."""
    folder = tmp_path_factory.mktemp("cache")
    out = tmp_path_factory.mktemp("warm") / "run"
    done = rollahead("run", *settings(**SMALL, run__steps=1), "--out", str(out), cache=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder
