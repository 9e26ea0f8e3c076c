"""Sampling settings through the whole native generator."""

import msgspec
import numpy as np
import pytest
import tokenizers
import torch

from drafters.arbiter import ArbiterDrafter
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.engine.generator import GroupRequest, TokenOrigin
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.tokenizer import Tokenizer
from pipeline.sampling.exactness import processed_law
from tests.unit.generation import Sampled, Scripted, finish, hostile, oracle, texts
from tests.unit.test_processors import SETTINGS
from tests.unit.tiny_models import VOCABULARY, reference, reference_logits, save_tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [LETTERS[i % 26] + LETTERS[(i * 7 + i // 26) % 26] for i in range(VOCABULARY - 1)] + ["."]
"""text of each token: two letters, so that strings can begin and end inside tokens"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    vocabulary = {f"{piece}{'' if PIECES.index(piece) == i else i}": i for i, piece in enumerate(PIECES)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="."))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return reference(folder)


def text_of(folder, token_ids):
    return Tokenizer(folder).decode(token_ids)


def request(id, params, samples=2, prompt=(1, 5, 9, 3), **changes):
    params = msgspec.structs.replace(params, **{"max_new_tokens": 24, **changes})
    return GroupRequest(id, np.array(prompt, np.int64), params, tuple(range(100 * id, 100 * id + samples)))


def build(folder, drafter=None, **options):
    return NativeGenerator(folder, drafter=drafter, **{"max_sequences": 60, "stop_token_ids": (), **options})


REQUESTS = [request(i, params) for i, params in enumerate(SETTINGS.values())]


@pytest.mark.parametrize("drafter", [SuffixAutomatonDrafter, Sampled, hostile])
def test_what_is_recorded_of_every_token_equals_a_fresh_forward_with_its_settings(folder, model, drafter):
    generator = build(folder, drafter(), max_draft_tokens=4, verification="block" if drafter is Sampled else "standard")
    for r in REQUESTS:
        generator.add(r)
    done, origins = finish(generator), set()
    for r in REQUESTS:
        prompt, params = r.prompt_ids.tolist(), r.sampling
        for sample in (done[r.id, s] for s in range(len(r.seeds))):
            text = sample.token_ids.tolist()
            logits = reference_logits(model, prompt + text)[len(prompt) - 1 : -1].double().numpy()
            left = 0
            for n, token in enumerate(text):
                law = processed_law(logits[n], params, prompt, text[:n])
                plain = msgspec.structs.replace(
                    params, temperature=params.temperature or 1.0, top_k=0, top_p=1.0, min_p=0.0
                )
                untruncated = processed_law(logits[n], plain, prompt, text[:n])
                recorded = untruncated if params.temperature == 0 else law
                assert sample.logprobs[n] == pytest.approx(np.log(recorded[token]), abs=2e-4), (params, n)
                entropy = -sum(p * np.log(p) for p in untruncated if p > 0)
                assert sample.entropies[n] == pytest.approx(entropy, abs=2e-4)
                if params.truncates:
                    ids = sample.kept.ids[left : left + sample.kept.counts[n]]
                    left += len(ids)
                    assert ids.tolist() == np.flatnonzero(law).tolist()
            assert params.truncates == (sample.kept is not None)
            origins |= set(sample.origins.tolist())
    assert origins >= {TokenOrigin.SAMPLED, TokenOrigin.ACCEPTED}
    assert generator.stats().drafter_failures == 0


def test_deterministic_drafts_change_no_text_whatever_the_settings(folder):
    plain = build(folder)
    drafted = build(folder, SuffixAutomatonDrafter(), max_draft_tokens=5, max_sequences=7)
    for r in REQUESTS:
        plain.add(r)
        drafted.add(r)
    expected = texts(finish(plain))
    assert texts(finish(drafted)) == expected
    oracles = build(folder, oracle({r.seeds[s]: expected[r.id, s] for r in REQUESTS for s in range(2)}))
    for r in REQUESTS:
        oracles.add(r)
    assert texts(finish(oracles)) == expected
    assert oracles.stats().accepted > 0.8 * oracles.stats().generated_tokens * 8 / 9


class Told(Scripted):
    """Notes each sequence's truncation, and writes over what it is shown."""

    def __init__(self):
        super().__init__(lambda start, emitted, budget: [3] * budget)
        self.told = {}

    def propose(self, request):
        if request.truncation is not None:
            for i, *row in zip(request.ids, *request.truncation, strict=True):
                self.told.setdefault(self.starts[i].seed, set()).add(tuple(row))
            for setting in request.truncation:
                setting[:] = 1
        return super().propose(request)


@pytest.mark.parametrize("around", [None, "auxiliary", "arbiter"])
def test_a_drafter_is_told_what_truncates_each_row(folder, around):
    if around == "auxiliary":
        drafter = SuffixAutomatonDrafter(SuffixAutomatonDrafter.Options(auxiliary=f"{__name__}:Told"))
        (told,) = drafter.ensemble.drafters
    else:
        told = drafter = Told()
        if around:
            drafter = ArbiterDrafter(ArbiterDrafter.Options(measure=False), drafters=[told])
    generator = build(folder, drafter)
    for r in REQUESTS:
        generator.add(r)
    finish(generator)
    greedy = (0, 1.0, 0.0)
    assert told.told and generator.stats().drafter_failures == 0
    for seed, rows in told.told.items():
        params = REQUESTS[seed // 100].sampling
        assert rows == {(params.top_k, params.top_p, params.min_p) if params.temperature else greedy}
    plain = build(folder, told)
    plain.add(request(0, SamplingParams(temperature=0.0, top_k=5)))
    told.told.clear()
    finish(plain)
    assert not told.told, "nothing is truncated"


def test_a_response_is_as_long_as_asked_before_it_stops(folder):
    stop = tuple(range(0, VOCABULARY, 2))
    for drafter in (None, Scripted(lambda start, emitted, budget: [4] * budget)):
        generator = build(folder, drafter, stop_token_ids=stop)
        generator.add(request(0, SamplingParams(), samples=20, min_new_tokens=7))
        for sample in finish(generator).values():
            tokens = sample.token_ids.tolist()
            assert len(tokens) > 7 and not set(tokens[:7]) & set(stop)
            assert sample.finish_reason == ("stop" if tokens[-1] in stop else "length")


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_stop_string_ends_the_response_with_the_token_that_completes_it(folder, most):
    whole = build(folder)
    whole.add(request(0, SamplingParams(), samples=8))
    expected = texts(finish(whole))
    text = text_of(folder, expected[0, 0])
    strings = {"inside a token": text[14], "across two": text[13:15], "across four": text[11:17], "never": "A"}
    for string in strings.values():
        generator = build(folder, oracle({s: expected[0, s] for s in range(8)}), max_draft_tokens=most)
        generator.add(request(0, SamplingParams(), samples=8, stop_strings=("zzzzzz", string)))
        for (_, s), sample in finish(generator).items():
            tokens = expected[0, s]
            ends = [n for n in range(1, len(tokens) + 1) if string in text_of(folder, tokens[:n])]
            n = min(ends, default=len(tokens))
            assert sample.token_ids.tolist() == tokens[:n]
            assert sample.finish_reason == ("stop" if ends else "length")
            assert len(sample.logprobs) == len(sample.origins) == n


def test_a_stop_string_before_the_minimum_length_does_not_count(folder):
    whole = build(folder)
    whole.add(request(0, SamplingParams()))
    expected = texts(finish(whole))[0, 0]
    early = text_of(folder, expected)[4:10]
    generator = build(folder)
    generator.add(request(0, SamplingParams(), stop_strings=(early,), min_new_tokens=8))
    assert texts(finish(generator))[0, 0] == expected


def test_stop_strings_need_a_tokenizer(folder):
    decoder = load_decoder(folder, "float32", "cpu")
    wanted = request(0, SamplingParams(), stop_strings=("a",))
    with pytest.raises(UsageError, match="tokenizer"):
        build(decoder).add(wanted)
    generator = build(decoder, tokenizer=Tokenizer(folder))
    generator.add(wanted)
    assert len(finish(generator)) == 2


def test_settings_that_cannot_be_are_refused_when_asked_for(folder):
    with pytest.raises(UsageError, match="outside the vocabulary"):
        build(folder).add(request(0, SamplingParams(bad_token_ids=(VOCABULARY,))))
    with pytest.raises(UsageError, match="verification 'fast' is unknown"):
        build(folder, verification="fast")


def test_cancelled_and_finished_sequences_leave_no_settings_behind(folder):
    generator = build(folder, max_sequences=5)
    for round in range(3):
        for r in REQUESTS:
            generator.add(r)
        for _ in range(4):
            generator.step()
        for r in REQUESTS[::2]:
            generator.cancel(r.id)
        assert finish(generator) or round
    settings = generator._processors
    assert len(settings._free) == len(settings._settings) and not settings._bias._users
    assert len(settings._counts._free) == len(settings._counts._response) <= 8


def test_a_seed_that_comes_again_meets_the_same_numbers_only_while_no_draft_is_sampled(folder):
    """A drafter that remembers a seed's text could otherwise state distributions that depend on the numbers."""
    plain, drafted = build(folder), build(folder, Sampled(sharpness=0.2))
    for generator, same in ((plain, True), (drafted, False)):
        pair = []
        for _ in range(2):
            generator.add(request(0, SamplingParams(), samples=4))
            pair.append(texts(finish(generator)))
        assert (pair[0] == pair[1]) == same


def test_an_update_in_flight_records_what_sampled_and_not_what_a_fresh_forward_says(folder, tmp_path):
    """Keys and values of the old weights stay: the log-prob that was recorded is the one to correct by."""
    other = save_tiny(tmp_path, seed=5)
    generator = build(folder, SuffixAutomatonDrafter())
    generator.add(request(0, SamplingParams(), samples=6, max_new_tokens=30))
    generator.load_weights(folder, 1)
    for _ in range(4):
        generator.step()
    generator.load_weights(other, 2)
    old, new = reference(folder), reference(other)
    for sample in finish(generator).values():
        assert sample.kv_kept_across_update
        ids = [1, 5, 9, 3, *sample.token_ids.tolist()]
        target = torch.from_numpy(sample.token_ids)[:, None]
        fresh = [
            torch.log_softmax(reference_logits(m, ids)[3:-1], -1).gather(1, target)[:, 0].numpy() for m in (old, new)
        ]
        first = sample.versions == 1
        assert 0 < first.sum() < len(first)
        np.testing.assert_allclose(sample.logprobs[first], fresh[0][first], atol=1e-4)
        assert np.abs(sample.logprobs[~first] - fresh[1][~first]).max() > 0.01
