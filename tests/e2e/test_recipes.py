"""Recipes train the embedded task from the command line."""

import hashlib
import tomllib

import pytest
import torch

from learner.embedded import Architecture, build_model, save_model
from pipeline.config.recipes import recipe_names
from tests.e2e.conftest import SMALL
from tests.e2e.runs import rollahead, rows, settings
from tests.unit.test_recipes import ACTS, ASKED

pytestmark = pytest.mark.slow

OFF_POLICY = {
    # Synchronous, so that nothing but the recipe makes two runs differ, and yet off-policy: what is sampled is sampled
    # with a small cache.
    "learner__max_staleness": 0,
    "learner__batch_size": 8,
    "learner__group_size": 4,
    "learner__minibatches": 4,
    "learner__learning_rate": 1e-2,
    "learner__threads": 1,
    "engine__threads": 1,
    "engine__max_sequences": 8,
    "engine__drafter": "none",
    "engine__kv_compression__policy": "sinks-window",
    "engine__kv_compression__budget": 8,
    "engine__kv_compression__every": 4,
    "sampling__max_new_tokens": 24,
    "task__reward": "tests.e2e.rewards:checksum",
    "run__measure_drafting": "false",
    "run__steps": 2,
}
TINY = Architecture(hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=48)


def test_recipes_train_what_they_say(tmp_path, cache):
    """DAPO with entropy-ratio clipping; and AEPO, whose leases explore at another temperature."""
    runs = {"dapo-erc": {"objective__gates__erc__high": 1.1}, "aepo": {}}
    for recipe, more in runs.items():
        run = tmp_path / recipe
        more |= {"run__steps": 4, "objective__recipe": recipe, "task__reward": "tests.e2e.rewards:checksum"}
        more |= {"sampling__temperature": 1.5}  # a group's samples differ, however far the warm start came
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


@pytest.fixture(scope="module")
def trained_weights(tmp_path_factory):
    """Digest of the weights that a recipe's run ends with; each recipe is run once, on a model of random weights."""
    known: dict[str, str] = {}
    cache = tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    model = build_model(TINY)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10.0)  # entropies of language, not of noise
    save_model(model, cache / "tiny")

    def weights(recipe: str, again: str = "") -> str:
        if recipe + again not in known:
            run = tmp_path_factory.mktemp("recipes") / "run"
            more = [text for change in (*ASKED.get(recipe, []), *ACTS.get(recipe, [])) for text in ("--set", change)]
            options = [*settings(**OFF_POLICY, model__path=cache / "tiny", objective__recipe=recipe), *more]
            done = rollahead("run", *options, "--out", str(run), cache=cache, timeout=900)
            assert done.returncode == 0, done.stderr
            assert [row["step"] for row in rows(run)] == [1, 2]
            assert all(row["tokens_trained"] > 0 and row["grad_norm"] > 0 for row in rows(run))
            assert all(row["skipped_steps"] == 0 and row["staleness_max"] == 0 for row in rows(run))
            assert all(row["extra"].get("compressed/k3", 1) > 1e-4 for row in rows(run))
            saved = run / "checkpoints" / "step-2" / "model.safetensors"
            known[recipe + again] = hashlib.sha256(saved.read_bytes()).hexdigest()
        return known[recipe + again]

    return weights


@pytest.mark.long
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_trains_from_the_command_line(recipe, trained_weights):
    trained_weights(recipe)


@pytest.mark.long
def test_the_same_recipe_ends_in_the_same_place_and_others_elsewhere(trained_weights):
    """Some recipes are alike in a synchronous run, `bypass` and `areal-interpolated` for one; that every pair differs
    on rollouts made for it is in tests/unit/test_recipes.py."""
    assert trained_weights("grpo", "again") == trained_weights("grpo")
    apart = ["grpo", "dapo", "gspo", "cispo", "ce-gppo-7b", "sparse-rl", "topr", "sapo", "high-entropy"]
    assert len({trained_weights(name) for name in apart}) == len(apart)


def test_a_recipe_that_cannot_be_is_refused_in_one_sentence(tmp_path, cache):
    options = settings(**SMALL, objective__recipe="bypass", objective__corrections="tis")
    done = rollahead("run", *options, "--out", str(tmp_path / "run"), cache=cache)
    assert done.returncode == 2
    assert "count the importance weight twice" in done.stderr and "Traceback" not in done.stderr
