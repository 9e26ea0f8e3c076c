"""Recipes train the embedded task from the command line."""

import tomllib

import pytest

from tests.e2e.conftest import SMALL
from tests.e2e.runs import rollahead, rows, settings

pytestmark = pytest.mark.slow


def test_recipes_train_what_they_say(tmp_path, cache):
    """DAPO with entropy-ratio clipping; and AEPO, whose leases explore at another temperature."""
    runs = {"dapo-erc": {"objective__gates__erc__high": 1.1}, "aepo": {}}
    for recipe, more in runs.items():
        run = tmp_path / recipe
        more |= {"run__steps": 4, "objective__recipe": recipe, "task__reward": "tests.e2e.rewards:checksum"}
        options = settings(**SMALL, **more)
        done = rollahead("run", *options, "--out", str(run), cache=cache)
        assert done.returncode == 0, done.stderr
        assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
        assert all(row["tokens_trained"] > 0 and row["grad_norm"] > 0 for row in rows(run))
    resolved = tomllib.loads((tmp_path / "dapo-erc" / "config.toml").read_text())
    assert resolved["objective"]["gates"] == [{"name": "erc", "low": 0.95, "high": 1.1}]
    assert resolved["learner"]["dynamic_sampling"] is True
    assert any(row["extra"]["positive-nll/right"] > 0 for row in rows(tmp_path / "dapo-erc"))
    assert any(row["extra"]["aepo/explored"] > 0 for row in rows(tmp_path / "aepo"))
    for row in rows(tmp_path / "aepo"):
        assert row["mismatch_k3"] is None or row["mismatch_k3"] < 1e-4


def test_a_recipe_that_cannot_be_is_refused_in_one_sentence(tmp_path, cache):
    options = settings(**SMALL, objective__recipe="bypass", objective__corrections="tis")
    done = rollahead("run", *options, "--out", str(tmp_path / "run"), cache=cache)
    assert done.returncode == 2
    assert "count the importance weight twice" in done.stderr and "Traceback" not in done.stderr
