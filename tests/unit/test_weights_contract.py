"""What holds of every way in which weights travel: the generator computes with exactly what was published."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.models.checkpoint import load_decoder
from tests.unit.generation import finish, group
from tests.unit.tiny_models import save_tiny
from tests.unit.weight_routes import ROUTES, altered, following

pytestmark = pytest.mark.parametrize("route", ROUTES)


@pytest.mark.parametrize(
    ("tied", "dtype", "published"),
    [(True, "float32", None), (False, "float32", torch.bfloat16), (True, "bfloat16", torch.bfloat16)],
)
def test_versions_arrive_bit_by_bit_also_over_a_version_that_was_left_out(tmp_path, route, tied, dtype, published):
    model = save_tiny(tmp_path / "model", tie_word_embeddings=tied, num_hidden_layers=11)
    with following(route, tmp_path, model, dtype=dtype) as (learner, engine):
        for step in (1, 2, 4):
            for each in range(step - learner.publisher.version):
                tensors = {n: t.to(published or t.dtype) for n, t in altered(model, 10 * step + each).items()}
                learner.publisher.publish(tensors, step)
            engine.get(step)
            assert engine.generator.version == step
            wanted = load_decoder(tmp_path / "weights" / f"v{step}", dtype, "cpu").tensors()
            found = engine.generator.decoder.tensors()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert not [line for line in engine.events if "files" in line]
        if engine.live is not None:
            fetched = [m for m in learner.asked if type(m).__name__ == "WeightsWanted"]
            assert len(fetched) == 3, "every version came by broadcast"


def test_a_sample_under_way_has_the_version_of_each_token_and_its_log_prob_is_that_version_s(tmp_path, route):
    model = save_tiny(tmp_path / "model", seed=3)
    with following(route, tmp_path, model, dtype="float32", recompute_on_update=True) as (learner, engine):
        engine.generator.add(group(1, samples=2, max_new_tokens=40))
        for _ in range(8):
            engine.generator.step()
        learner.publisher.publish(altered(model, 1), 1)
        engine.get(1)
        samples = list(finish(engine.generator).values())
    assert any(set(sample.versions.tolist()) == {0, 1} for sample in samples)
    for version in (0, 1):
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "weights" / f"v{version}", dtype=torch.float32)
        for sample in samples:
            text = torch.tensor([[1, 5, 9, 3, *sample.token_ids.tolist()]])
            with torch.no_grad():
                rows = policy(text).logits[0, 3:-1].log_softmax(-1)
            wanted = rows.gather(1, text[0, 4:, None])[:, 0].numpy()
            mine = sample.versions == version
            assert np.abs(sample.logprobs - wanted)[mine].max(initial=0.0) < 1e-4


def test_a_newer_version_is_as_good_as_one_that_is_gone(tmp_path, route):
    model = save_tiny(tmp_path / "model", seed=4)
    with following(route, tmp_path, model) as (learner, engine):
        for step in range(1, 5):
            learner.publisher.publish(altered(model, step), step)
        learner.publisher.retire(None)
        engine.engine.wanted_version = 2
        for _ in range(20):
            engine.engine._follow_weights()
        engine.get(4)
        assert engine.generator.version == 4
