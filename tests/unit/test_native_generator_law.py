"""Drafts that were sampled change the text of a seed, never its distribution."""

import itertools

import numpy as np
import pytest
import torch

from drafters.draft_model import DraftModelDrafter
from pipeline.engine.native.generator import NativeGenerator
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.sampling.exactness import chi_square_p_value, processed_law
from tests.unit.broken_rules import SKIP_THE_RESIDUAL, change_the_compiled_pass
from tests.unit.generation import Sampled, finish, group, texts
from tests.unit.tiny_models import VOCABULARY, reference, reference_logits, save_tiny

PROMPT, SAMPLES, TEMPERATURE = [1, 5, 9, 3], 6000, 0.8
LEFT = {"top_k": 20, "top_p": 0.9, "min_p": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def pair_law(folder):
    """Probability of every pair of first tokens, by full forwards of transformers."""
    model = reference(folder)

    def p(prefix):
        logits = reference_logits(model, PROMPT + prefix)[-1].double()
        return torch.softmax(logits / TEMPERATURE, -1).numpy()

    first = p([])
    return first[:, None] * np.stack([p([x]) for x in range(VOCABULARY)])


@pytest.fixture(scope="module")
def truncated_pair_law(folder):
    """As `pair_law`, with `LEFT`, by its definition."""
    model, params = reference(folder), SamplingParams(temperature=TEMPERATURE, **LEFT)

    def p(prefix):
        return processed_law(reference_logits(model, PROMPT + prefix)[-1].double().numpy(), params)

    first = p([])
    return first[:, None] * np.stack([p([x]) for x in range(VOCABULARY)])


def p_value(folder, pair_law, drafter, **settings):
    generator = NativeGenerator(
        load_decoder(folder, "float32", "cpu"),
        drafter=drafter,
        max_sequences=500,
        max_draft_tokens=3,
        stop_token_ids=(),
    )
    generator.add(group(prompt=PROMPT, samples=SAMPLES, temperature=TEMPERATURE, max_new_tokens=4, **settings))
    observed = np.zeros_like(pair_law)
    for text in texts(finish(generator)).values():
        observed[text[0], text[1]] += 1
    expected = pair_law * SAMPLES
    assert (expected > 5).sum() > 20
    stats = generator.stats()
    assert stats.drafter_failures == 0 and stats.accepted > 500
    return chi_square_p_value(observed.ravel(), expected.ravel())


@pytest.mark.parametrize("own", [True, False], ids=["the policy itself", "another model"])
def test_pairs_of_tokens_follow_a_truncated_target_where_a_model_drafts(folder, tmp_path, truncated_pair_law, own):
    path = folder if own else save_tiny(tmp_path, seed=1, num_hidden_layers=1)
    drafter = DraftModelDrafter(DraftModelDrafter.Options(path=str(path), stop_below=0.0))
    assert p_value(folder, truncated_pair_law, drafter, **LEFT) > 1e-4


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_pairs_of_tokens_follow_the_target(folder, pair_law, sharpness):
    assert p_value(folder, pair_law, Sampled(seed=1, sharpness=sharpness)) > 1e-4


def test_the_same_test_fails_without_the_residual(folder, pair_law, monkeypatch):
    change_the_compiled_pass(monkeypatch, *SKIP_THE_RESIDUAL)
    assert p_value(folder, pair_law, Sampled(seed=1, sharpness=2.0)) < 1e-10


def test_the_same_test_fails_when_the_drafter_states_another_distribution(folder, pair_law):
    class Lying(Sampled):
        def propose(self, request):
            proposal = super().propose(request)
            flat = torch.softmax(proposal.probabilities.log() * 0.5, -1)
            return type(proposal)(proposal.token_ids, proposal.lengths, flat)

    assert p_value(folder, pair_law, Lying(seed=1, sharpness=2.0)) < 1e-10


def test_greedy_rows_ignore_sampled_drafts(folder):
    plain, drafted = (
        NativeGenerator(folder, drafter=drafter, max_sequences=4, stop_token_ids=()) for drafter in (None, Sampled())
    )
    for generator in (plain, drafted):
        generator.add(group(temperature=0.0, samples=2, max_new_tokens=40))
    first, second = texts(finish(plain)), texts(finish(drafted))
    assert first == second and first[0, 0] == first[0, 1]
    assert all(a in range(VOCABULARY) for a in itertools.chain(*first.values()))
