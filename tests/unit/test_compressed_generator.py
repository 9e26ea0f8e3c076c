"""The native generator with a budget of keys and values a sequence."""

import numpy as np
import pytest
import torch

from pipeline.engine.native.compression import KVCompression
from pipeline.engine.native.eviction import build
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import Sampler
from pipeline.models.checkpoint import load_decoder
from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import PAGE, page_bytes
from tests.unit.compressed_sampler import expected_logprobs
from tests.unit.generation import Sampled, finish, group, hostile, oracle, texts
from tests.unit.tiny_models import save_tiny

POLICIES = {
    "sinks-window": {"name": "sinks-window", "sinks": 2},
    "snapkv": {"name": "snapkv", "window": 4, "kernel": 3},
    "r-kv": {"name": "r-kv", "window": 4, "kernel": 3},
}
REQUESTS = (
    group(0, prompt=[t % 60 for t in range(12)], samples=2, max_new_tokens=70),
    group(1, prompt=[7, 8, 9], samples=2, max_new_tokens=45, temperature=0.7),
    group(2, prompt=[(3 * t) % 60 for t in range(45)], samples=3, max_new_tokens=40),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def decoder(folder):
    return load_decoder(folder, "float32", "cpu")


def plan(name="r-kv", budget=16, every=8):
    return KVCompression(build(POLICIES[name]), budget, every)


@pytest.fixture
def make(folder):
    def make(drafter=None, compression=None, **options):
        defaults = {"max_sequences": 8, "stop_token_ids": (), "max_length": 120}
        return NativeGenerator(folder, drafter=drafter, kv_compression=compression, **{**defaults, **options})

    return make


def run(generator, requests=REQUESTS):
    for request in requests:
        generator.add(request)
    return finish(generator)


def check(decoder, compression, done, requests=REQUESTS, tolerance=2e-4):
    """Of each group's first sample; the greatest difference."""
    worst = 0.0
    for request in requests:
        sample = done[request.id, 0]
        expected, compressed = expected_logprobs(
            decoder, compression, request.prompt_ids, sample.token_ids, request.sampling.temperature
        )
        worst = max(worst, np.abs(sample.logprobs - expected).max())
        assert (sample.samplers == np.where(compressed, Sampler.COMPRESSED_KV, Sampler.POLICY)).all()
        assert compressed.sum() > 10
    assert worst < tolerance
    return worst


@pytest.mark.parametrize("name", POLICIES)
def test_log_probs_are_those_of_the_compressed_sampler(make, decoder, name):
    done = run(make(compression=plan(name)))
    check(decoder, plan(name), done)
    full = run(make())
    assert texts(full) != texts(done)
    assert all((sample.samplers == Sampler.POLICY).all() for sample in full.values())


def test_the_same_check_fails_when_another_token_is_kept(make, decoder, monkeypatch):
    done = run(make(compression=plan("snapkv")))
    other = plan("snapkv")
    original = other.policy.scores
    monkeypatch.setattr(other.policy, "scores", lambda keys, queries: original(keys, queries).flip(-1))
    with pytest.raises(AssertionError):
        check(decoder, other, done)


@pytest.mark.parametrize("name", ["sinks-window", "r-kv"])
def test_no_drafter_changes_a_text(make, name):
    expected = run(make(compression=plan(name)))
    by_seed = {
        request.seeds[s]: expected[request.id, s].token_ids.tolist()
        for request in REQUESTS
        for s in range(len(request.seeds))
    }
    for drafter in (oracle(by_seed), hostile()):
        generator = make(drafter, compression=plan(name), max_draft_tokens=6)
        done = run(generator)
        assert texts(done) == texts(expected)
        assert generator.stats().drafted > 100
        for key, sample in done.items():
            assert np.allclose(sample.logprobs, expected[key].logprobs, atol=2e-4)
            assert (sample.samplers == expected[key].samplers).all()


def test_drafts_that_were_sampled_leave_the_log_probs_the_compressed_samplers(make, decoder):
    generator = make(Sampled(), compression=plan(), max_draft_tokens=5)
    check(decoder, plan(), run(generator))
    assert generator.stats().accepted > 50


@pytest.mark.parametrize("drafter", [lambda: None, hostile], ids=["plain", "hostile"])
def test_texts_are_the_same_when_memory_runs_out(make, folder, drafter):
    expected = run(make(compression=plan()))
    tight = make(drafter(), compression=plan(), kv_bytes=5 * page_bytes(ModelConfig.from_folder(folder), torch.float32))
    done = run(tight)
    assert texts(done) == texts(expected)
    assert tight._memory.cache.free == 5


def test_a_preempted_sequence_is_compressed_again_as_it_was(make, decoder):
    generator = make(compression=plan())
    for request in REQUESTS:
        generator.add(request)
    done = {}
    for step in range(60):
        if step in (20, 30, 41):
            for _ in range(3):
                generator._running.preempt()
        done |= {(s.group, s.sample): s for s in generator.step()}
    done |= finish(generator)
    assert generator.stats().preemptions >= 6
    check(decoder, plan(), done)


def test_memory_that_was_freed_holds_other_sequences(make, folder):
    size = page_bytes(ModelConfig.from_folder(folder), torch.float32)
    requests = [group(0, prompt=[1, 2, 3], samples=16, max_new_tokens=110)]

    def most_at_once(compression):
        generator = make(compression=compression, max_sequences=16, kv_bytes=17 * size)
        generator.add(requests[0])
        most = 0
        while generator.has_work():
            generator.step()
            most = max(most, len(generator._running.batch))
        assert generator.kv_bytes <= 17 * size
        return most, generator.stats().preemptions

    compressed, preempted = most_at_once(plan(budget=16, every=16))
    assert compressed == 16 and preempted == 0
    assert most_at_once(None)[1] > 0


def test_pages_are_given_back_and_peak_memory_is_the_budgets(make, folder):
    generator = make(compression=plan(budget=40, every=24))
    samples = 6
    generator.add(group(0, prompt=[1, 2, 3], samples=samples, max_new_tokens=110))
    free = generator._memory.cache.free
    while generator.has_work():
        generator.step()
        for sequence in generator._running.batch:
            assert sequence.held <= 64 and len(sequence.pages) <= 2
    assert generator._memory.cache.free == free
    assert generator.kv_bytes == samples * 2 * page_bytes(generator.decoder.config, torch.float32)
    assert generator.stats().compressions == samples * ((111 - 40) // 24)  # nobody needs what is left at the end


def test_a_long_prompt_is_compressed_once_for_its_group(make, decoder):
    requests = (group(0, prompt=[(5 * t) % 60 for t in range(3 * PAGE)], samples=5, max_new_tokens=4),)
    generator = make(compression=plan())
    done = run(generator, requests)
    assert generator.stats().compressions == 1
    assert (done[0, 4].samplers == Sampler.COMPRESSED_KV).all()
    for sample in range(5):
        expected, _ = expected_logprobs(decoder, plan(), requests[0].prompt_ids, done[0, sample].token_ids)
        assert np.allclose(done[0, sample].logprobs, expected, atol=2e-4)


def test_a_group_that_asks_for_the_full_cache_gets_it(make):
    full = texts(run(make()))
    generator = make(compression=plan())
    whole = tuple(type(r)(r.id, r.prompt_ids, r.sampling, r.seeds, r.temperatures, r.id == 0) for r in REQUESTS)
    done = run(generator, whole)
    assert texts(done)[0, 1] == full[0, 1] and texts(done)[2, 0] != full[2, 0]
    assert (done[0, 0].samplers == Sampler.POLICY).all()


def test_new_weights_compute_the_compressed_cache_anew(make, folder, tmp_path):
    other = save_tiny(tmp_path / "other", seed=5)
    generator = make(compression=plan(), recompute_on_update=True, version=0)
    for request in REQUESTS:
        generator.add(request)
    for _ in range(30):
        assert generator.step() == []
    generator.load_weights(other, 1)
    done = finish(generator)
    decoder = load_decoder(other, "float32", "cpu")
    for request in REQUESTS:
        sample = done[request.id, 0]
        expected, _ = expected_logprobs(
            decoder, plan(), request.prompt_ids, sample.token_ids, request.sampling.temperature
        )
        new = sample.versions == 1
        assert new.sum() >= 10 and not sample.kv_kept_across_update
        assert np.allclose(sample.logprobs[new], expected[new], atol=2e-4)


def test_cancelled_sequences_give_their_pages_back(make):
    generator = make(compression=plan())
    free = generator._memory.cache.free
    for request in REQUESTS:
        generator.add(request)
    for _ in range(25):
        generator.step()
    for request in REQUESTS:
        generator.cancel(request.id)
    assert generator._memory.cache.free == free


@pytest.mark.parametrize(
    ("piece", "budget", "said"),
    [
        ({"name": "sinks-window", "sinks": 40}, 32, "raise it above 41"),
        ({"name": "snapkv", "window": 32}, 32, "raise it above 32"),
        ({"name": "r-kw"}, 32, "did you mean r-kv"),
        ({"name": "r-kv", "widnow": 3}, 32, "did you mean window"),
        ({"name": "r-kv", "window": 0}, 32, ">= 1"),
        ({"name": "r-kv", "kernel": 6}, 32, "kernel = 6 has no middle; take 5 or 7"),
        ({"name": "snapkv", "kernel": 4}, 32, "kernel = 4 has no middle; take 3 or 5"),
        ({"name": "nowhere:Policy"}, 32, "cannot be imported"),
        ({"name": "pathlib:Path"}, 32, "is not an eviction policy"),
    ],
)
def test_settings_that_cannot_work_are_refused(piece, budget, said):
    with pytest.raises(UsageError, match=said):
        KVCompression(build(piece), budget, 8)


def test_a_sliding_window_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model", family="Mistral", sliding_window=16)
    with pytest.raises(UsageError, match="sliding window of 16"):
        NativeGenerator(folder, kv_compression=plan())
