import numpy as np
import pytest
import torch

from drafters.base import Needs
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.engine.generator import Generator, TokenOrigin
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.models.checkpoint import load_decoder
from tests.unit.generation import Sampled, Scripted, finish, group, hostile, oracle, texts
from tests.unit.tiny_models import VOCABULARY, reference, reference_logits, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return reference(folder)


@pytest.fixture
def make(folder):
    def make(drafter=None, **options):
        return NativeGenerator(folder, drafter=drafter, **{"max_sequences": 8, "stop_token_ids": (), **options})

    return make


def plain_texts(make, *requests, **options):
    generator = make(**options)
    for request in requests:
        generator.add(request)
    return texts(finish(generator))


MIXED = (
    group(0, samples=3, temperature=1.0, max_new_tokens=30),
    group(1, prompt=[7], samples=2, temperature=0.0, max_new_tokens=17),
    group(2, prompt=range(40), samples=4, temperature=0.4, max_new_tokens=40),
    group(3, prompt=[3, 3, 4, 3, 3], samples=2, temperature=0.7, max_new_tokens=1),
)


@pytest.mark.parametrize(
    ("build", "accepted"), [(SuffixAutomatonDrafter, 20), (hostile, 1)], ids=["suffix-automaton", "hostile"]
)
def test_deterministic_drafts_leave_every_text_as_it_is(make, build, accepted):
    expected = plain_texts(make, *MIXED)
    generator = make(build(), max_draft_tokens=5, max_sequences=5)
    for request in MIXED:
        generator.add(request)
    done = finish(generator)
    assert texts(done) == expected
    stats = generator.stats()
    assert stats.accepted >= accepted and stats.drafter_failures == 0
    assert stats.generated_tokens == sum(map(len, expected.values()))
    assert stats.accepted == sum(c.accepted for s in done.values() for c in s.drafters.values())
    assert stats.drafted == sum(c.drafted for s in done.values() for c in s.drafters.values())
    assert stats.verifications == sum(s.verifications for s in done.values()) < stats.generated_tokens


def test_a_text_depends_on_its_seed_alone(make):
    expected = plain_texts(make, *MIXED)
    for request in MIXED:
        alone = plain_texts(make, request, max_sequences=2)
        assert alone == {key: text for key, text in expected.items() if key[0] == request.id}
    assert len({tuple(text) for (g, _), text in expected.items() if g == 0}) == 3


@pytest.mark.parametrize(
    "build", [SuffixAutomatonDrafter, Sampled, hostile], ids=["suffix-automaton", "sampled", "hostile"]
)
def test_log_probs_and_entropies_equal_a_fresh_forward_of_transformers(make, model, build):
    generator = make(build(), max_draft_tokens=4)
    for request in MIXED:
        generator.add(request)
    prompts = {r.id: (r.prompt_ids.tolist(), r.sampling.temperature) for r in MIXED}
    seen = set()
    for sample in finish(generator).values():
        prompt, temperature = prompts[sample.group]
        logits = reference_logits(model, prompt + sample.token_ids.tolist())[len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits / (temperature or 1.0), -1)
        expected = logp.gather(1, torch.from_numpy(sample.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=1e-4)
        np.testing.assert_allclose(sample.entropies, -(logp.exp() * logp).sum(-1).numpy(), atol=1e-4)
        seen |= set(sample.origins.tolist())
        assert (sample.versions == -1).all() and (sample.samplers == 0).all() and not sample.kv_kept_across_update
    assert seen == set(TokenOrigin) - ({TokenOrigin.BONUS} if build is hostile else set())


def test_greedy_text_is_that_of_transformers(make, model):
    prompt = list(range(3, 15))
    generator = make(SuffixAutomatonDrafter())
    generator.add(group(prompt=prompt, temperature=0.0, max_new_tokens=40))
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None)
    assert texts(finish(generator))[0, 0] == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 2, 7, 20])
def test_length_limit_is_exact_whatever_is_accepted(make, most, tokens):
    request = group(samples=2, max_new_tokens=tokens)
    expected = plain_texts(make, request)
    drafter = oracle({seed: expected[0, seed] for seed in request.seeds})
    generator = make(drafter, max_draft_tokens=most)
    generator.add(request)
    done = finish(generator)
    assert texts(done) == expected
    for sample in done.values():
        assert sample.finish_reason == "length" and len(sample.token_ids) == tokens
        assert sample.verifications == -(-tokens // (most + 1))
    assert not drafter.starts


def test_response_ends_where_the_models_positions_end(make):
    generator = make(SuffixAutomatonDrafter(), max_length=24)
    generator.add(group(prompt=range(20), samples=2, max_new_tokens=100))
    assert [len(text) for text in texts(finish(generator)).values()] == [4, 4]


def test_samples_can_have_limits_of_their_own(make):
    generator = make(SuffixAutomatonDrafter())
    generator.add(group(samples=3, max_new_tokens=50), limits=[4, 9, 1])
    assert {key: len(text) for key, text in texts(finish(generator)).items()} == {(0, 0): 4, (0, 1): 9, (0, 2): 1}


@pytest.mark.parametrize("of_request", [True, False])
def test_stop_token_inside_an_accepted_draft_ends_the_response_there(make, of_request):
    request = group(samples=4, max_new_tokens=30)
    whole = plain_texts(make, request)
    stop = whole[0, 0][7]
    drafter = oracle({seed: whole[0, seed] for seed in request.seeds})
    generator = make(drafter, max_draft_tokens=6, stop_token_ids=() if of_request else (stop,))
    generator.add(group(samples=4, max_new_tokens=30, stop=(stop,) if of_request else ()))
    done = finish(generator)
    for key, text in whole.items():
        cut = text[: text.index(stop) + 1] if stop in text else text
        sample = done[key]
        assert sample.token_ids.tolist() == cut
        assert sample.finish_reason == ("stop" if stop in text else "length")
        assert all(len(a) == len(cut) for a in (sample.logprobs, sample.entropies, sample.versions, sample.origins))
        accepted = sample.drafters["scripted"].accepted
        assert accepted == (sample.origins == TokenOrigin.ACCEPTED).sum() <= sample.drafters["scripted"].drafted
    assert {s.finish_reason for s in done.values()} == {"stop", "length"}


def test_models_own_end_of_text_stops_by_default(folder):
    generator = NativeGenerator(folder, max_sequences=8)
    generator.add(group(samples=40, max_new_tokens=60, temperature=1.5))
    done = finish(generator)
    stopped = [s for s in done.values() if s.finish_reason == "stop"]
    assert stopped and all(s.token_ids[-1] == 2 and 2 not in s.token_ids[:-1] for s in stopped)
    assert all(2 not in s.token_ids for s in done.values() if s.finish_reason == "length")


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_more_samples_than_slots_all_arrive_with_their_text(make, slots):
    expected = plain_texts(make, *MIXED, max_sequences=16)
    generator = make(SuffixAutomatonDrafter(), max_sequences=slots)
    for request in MIXED:
        generator.add(request)
    assert generator.running() == 11
    assert texts(finish(generator)) == expected
    assert generator.running() == 0 and not generator.has_work()


def test_cancelled_groups_vanish_and_the_others_go_on(make):
    expected = plain_texts(make, *MIXED, max_sequences=16)
    drafter = hostile()
    generator = make(drafter, max_sequences=6)
    for request in MIXED:
        generator.add(request)
    for _ in range(3):
        assert not [s for s in generator.step() if s.group in (0, 2)]
    generator.cancel(0)
    generator.cancel(3)
    generator.cancel(12345)
    done = texts(finish(generator))
    assert done == {key: text for key, text in expected.items() if key[0] in (1, 2)}
    assert not drafter.starts
    generator.add(MIXED[0])
    assert texts(finish(generator)) == {key: text for key, text in expected.items() if key[0] == 0}


class Watching(Scripted):
    """Asks for all there is and keeps it."""

    name = "watching"
    needs = Needs.HIDDEN_STATES | Needs.LOGITS | Needs.TARGET_LAYERS

    def __init__(self, guess):
        super().__init__(guess)
        self.target, self.logits, self.hidden, self.versions = None, {}, {}, []

    def attach(self, target):
        self.target = target

    def observe(self, verified):
        for row, i in enumerate(verified.ids):
            n, at = len(verified.emitted[row]), int(verified.starts[row])
            self.logits.setdefault(self.starts[i].seed, []).append(verified.logits[at : at + n])
            self.hidden.setdefault(self.starts[i].seed, []).append(verified.hidden[at : at + n])
        super().observe(verified)

    def weights_changed(self, version):
        self.versions.append(version)


def test_a_drafter_gets_what_it_asks_for(make, model):
    request = group(samples=3, temperature=0.7)
    expected = plain_texts(make, request)
    rng = np.random.default_rng(0)
    drafter = Watching(
        lambda start, emitted, budget: expected[0, start.seed][len(emitted) :][: rng.integers(0, budget + 1)]
    )
    generator = make(drafter, max_draft_tokens=4)
    assert drafter.target.decoder is generator.decoder
    generator.add(request)
    assert texts(finish(generator)) == expected
    for seed in request.seeds:
        logits = reference_logits(model, [1, 5, 9, 3, *expected[0, seed]])[3:-1]
        torch.testing.assert_close(torch.cat(drafter.logits[seed]), logits, atol=1e-4, rtol=0)
        hidden = torch.cat(drafter.hidden[seed])
        torch.testing.assert_close(generator.decoder.logits(hidden), logits, atol=1e-4, rtol=0)


def test_entropy_can_be_left_out(make):
    assert make().capabilities.entropy
    generator = make(entropy=False)
    assert not generator.capabilities.entropy
    generator.add(group())
    assert finish(generator)[0, 0].entropies is None


def test_a_decoder_can_be_shared(folder, make):
    decoder = load_decoder(folder, "float32", "cpu")
    expected = plain_texts(make, *MIXED)
    for _ in range(2):
        generator = NativeGenerator(decoder, max_sequences=8, stop_token_ids=())
        for request in MIXED:
            generator.add(request)
        assert texts(finish(generator)) == expected


def test_the_generator_is_one_by_the_protocol(make):
    generator: Generator = make()
    for name in ("load_weights", "add", "cancel", "step", "has_work", "running", "close"):
        assert callable(getattr(generator, name))
    assert generator.version == -1
    assert generator.step() == []
    generator.add(MIXED[0])
    generator.close()
    assert not generator.has_work()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "0 tokens"), (range(32), "32 tokens"), ([1, VOCABULARY], f"id {VOCABULARY}"), ([-1], "vocabulary")],
)
def test_prompts_that_cannot_run_are_refused(make, prompt, message):
    with pytest.raises(UsageError, match=message):
        make(max_length=32).add(group(prompt=prompt))


def test_a_group_cannot_be_added_twice(make):
    generator = make()
    generator.add(group(5))
    with pytest.raises(ValueError, match="group 5"):
        generator.add(group(5))


def test_length_over_the_models_positions_is_refused(make):
    with pytest.raises(UsageError, match="300 tokens exceed the model's 256"):
        make(max_length=300)
