import json
import math
import re

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare

from drafters.base import BaseDrafter, Needs
from drafters.draft_model import DraftModelDrafter
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.cli import main
from pipeline.config import check_config, load_config
from pipeline.engine.generator import GroupRequest, Stopped
from pipeline.engine.native.calibration import calibrate, calibrate_for_run, policy_share, rolling_mean
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.native.small_model import Copy, SmallModel
from pipeline.engine.native.switching import SwitchingRule, SwitchState, in_nats, parse_rule
from pipeline.engine.startup import check_pieces
from pipeline.errors import UsageError
from pipeline.messages import Sampler, SamplingParams
from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import PAGE, page_bytes
from pipeline.models.tokenizer import Tokenizer
from pipeline.tasks.jsonl import read_examples
from pipeline.weights.filesystem import save_tensors
from tests.unit.generation import Sampled, finish, group, hostile, oracle, texts
from tests.unit.tiny_models import VOCABULARY, reference, reference_logits, save_tiny

RULE = SwitchingRule(threshold=2.0, window=3, min_run=4)
BEFORE = SwitchingRule(threshold=2.2, window=2, min_run=2, before_sampling=True)
LONG = tuple(
    group(i, prompt=[t % 60 for t in range(n)], samples=3, max_new_tokens=60) for i, n in enumerate((40, 70, 1, 33))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return save_tiny(tmp_path_factory.mktemp("small"), seed=5, **shape)


@pytest.fixture(scope="module")
def models(folder, small_folder):
    """By sampler, in transformers."""
    return {Sampler.POLICY: reference(folder), Sampler.SWITCHED_MODEL: reference(small_folder)}


@pytest.fixture
def make(folder, small_folder, monkeypatch):
    # Random checkpoints have no tokenizer to compare.
    monkeypatch.setattr("pipeline.engine.native.small_model.check_same_tokenizer", lambda *_: None)

    def make(drafter=None, rule=RULE, **options):
        options = {
            "max_sequences": 8, "stop_token_ids": (), "max_length": 160, "small_model": small_folder, **options,
        }  # fmt: skip
        return NativeGenerator(folder, drafter=drafter, switching=rule, **options)

    return make


def run(generator, requests=LONG):
    for request in requests:
        generator.add(request)
    return finish(generator)


def by_definition(entropies, rule):
    """Who samples each token, written down from the definition: token t's model is decided by what came before it."""
    small, last_switch, trace = False, 0, []
    for t in range(len(entropies) + 1):
        if t - last_switch >= rule.min_run:
            window = entropies[max(0, t - rule.window) : t]
            wanted = not sum(window) / len(window) > rule.threshold
            if wanted != small:
                small, last_switch = wanted, t
        trace.append(small)
    return trace[:-1]


# ---- the rule ----------------------------------------------------------------------------------------------------


def test_forced_entropies_give_the_trace_worked_out_by_hand():
    rule = SwitchingRule(threshold=1.0, window=2, min_run=3)
    state = SwitchState(rule)
    trace = []
    for entropy in (0, 0, 0, 0, 3, 3, 3, 0, 0, 0, 1, 1):
        trace.append(state.small)
        state.step(entropy)
    #                0 1 2  -> small after three; from 3 on 0,3 = 1.5 > 1 at the third token of its run (index 5)
    assert trace == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("min_run", [1, 3, 10])
def test_traces_of_random_entropies_equal_the_definition(window, min_run):
    rng = np.random.default_rng(window * 100 + min_run)
    rule = SwitchingRule(0.5, window, min_run)
    for _ in range(20):
        entropies = rng.random(60).tolist()
        state, trace = SwitchState(rule), []
        for entropy in entropies:
            trace.append(state.small)
            state.step(entropy)
        assert trace == by_definition(entropies, rule)
        runs = np.diff(np.flatnonzero(np.diff([int(s) for s in trace])))
        assert (runs >= min_run).all()


def before_sampling_by_definition(small_entropies, large_entropies, rule):
    """Who samples each token: entropies are of either model at each position, [T] each."""
    small, last_switch, own, trace = False, 0, [], []

    def uncertain(entropies):
        window = entropies[max(0, len(entropies) - rule.window) :]
        return sum(window) / len(window) > rule.threshold

    for t, (h_small, h_large) in enumerate(zip(small_entropies, large_entropies, strict=True)):
        if t - last_switch >= rule.min_run:
            here = uncertain([*own, h_small])
            wanted = not here if small else not uncertain(own) and not here
            if wanted != small:
                small, last_switch = wanted, t
        trace.append(small)
        own.append(h_small if small else h_large)
    return trace


def test_before_sampling_the_uncertain_token_is_the_large_models():
    state = SwitchState(SwitchingRule(1.0, 1, 1, before_sampling=True))
    trace = []
    # the small and the large model's entropy at each position
    for h_small, h_large in [(0, 0), (0, 0), (3, 0), (0, 0), (3, 3), (0, 3), (3, 0), (2, 0), (0.5, 9)]:
        state.hand_over(h_small)
        trace.append("SL"[not state.small])
        state.step(h_small if state.small else h_large)
    # the large one first, then the small one until it is uncertain, and the large one until both are certain
    assert "".join(trace) == "LSLSLLLLS"


def test_nothing_is_handed_over_by_the_papers_rule_or_before_min_run():
    paper, held = SwitchState(SwitchingRule(1.0, 1, 3)), SwitchState(SwitchingRule(1.0, 1, 3, before_sampling=True))
    for state in (paper, held):
        for _ in range(3):
            state.step(0.0)
        assert state.small
    assert not paper.hand_over(9.0) and paper.small
    for _ in range(3):
        assert not held.hand_over(0.0)
        held.step(9.0)  # no switch once the token has been sampled
        assert held.small
    assert held.hand_over(9.0) and not held.small


def test_a_large_model_that_does_not_leave_goes_on_as_if_it_had_not_been_about_to():
    state = SwitchState(SwitchingRule(1.0, 1, 3, before_sampling=True))
    for _ in range(3):
        state.step(0.0)
    assert state.small and state.hand_over(9.0)
    assert state.step(0.0) and state.small  # at once again, not after three more tokens
    assert not state.hand_over(0.0) and not state.step(0.0)
    assert not state.hand_over(9.0)  # one token of three


def test_a_mean_equal_to_the_threshold_means_the_small_model():
    state = SwitchState(SwitchingRule(1.0, 1, 1))
    assert state.step(1.0) and state.small
    assert state.step(math.nextafter(1.0, 2)) and not state.small


def test_following_stops_at_the_first_switch():
    state = SwitchState(SwitchingRule(1.0, 1, 2))
    assert state.follow([0, 0, 0, 0]) == 2
    assert state.small
    assert state.follow([0.5] * 3) == 3


def test_bits_are_the_papers_unit():
    assert in_nats(1.0, "bits") == pytest.approx(math.log(2)) and in_nats(1.0, "nats") == 1.0


# ---- the generator -----------------------------------------------------------------------------------------------


def forward(models, sequence_ids, prompt):
    """Log-probs [T, V] of each model over the response's positions."""
    return {
        sampler: torch.log_softmax(reference_logits(model, sequence_ids)[prompt - 1 : -1].double(), -1)
        for sampler, model in models.items()
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("drafter", ["none", "suffix-automaton", "sampled", "draft-model"])
def test_samplers_follow_the_definition_and_log_probs_are_a_fresh_forward_of_who_sampled(
    make, models, small_folder, drafter, temperature
):
    build = {
        "none": lambda: None, "suffix-automaton": SuffixAutomatonDrafter, "sampled": Sampled,
        "draft-model": lambda: DraftModelDrafter(DraftModelDrafter.Options(path=str(small_folder))),
    }[drafter]  # fmt: skip
    requests = [group(i, prompt=range(i, i + 9), samples=3, temperature=temperature, max_new_tokens=60) for i in (0, 1)]
    generator = make(build())
    done = run(generator, requests)
    assert generator.stats().drafter_failures == 0 and (drafter == "none" or generator.stats().drafted > 0)
    switches = 0
    for sample in done.values():
        prompt = requests[sample.group].prompt_ids.tolist()
        laws = forward(models, prompt + sample.token_ids.tolist(), len(prompt))
        who = sample.samplers
        raw = torch.stack([laws[Sampler(s)][t] for t, s in enumerate(who)])
        entropies = -(raw.exp() * raw).sum(-1)
        assert [s == Sampler.SWITCHED_MODEL for s in who] == by_definition(entropies.tolist(), RULE)
        tempered = torch.log_softmax(raw / temperature, -1)
        expected = tempered[torch.arange(len(who)), torch.from_numpy(sample.token_ids)]
        assert np.allclose(sample.logprobs, expected.numpy(), atol=1e-4)
        assert np.allclose(sample.entropies, -(tempered.exp() * tempered).sum(-1).numpy(), atol=1e-4)
        switches += int(np.abs(np.diff(who.astype(int))).sum())
    assert switches >= 10


@pytest.mark.parametrize("rule", [BEFORE, SwitchingRule(2.2, 1, 1, before_sampling=True)], ids=["mean", "each"])
@pytest.mark.parametrize("drafter", ["none", "suffix-automaton", "sampled"])
def test_before_sampling_samplers_follow_the_definition_and_log_probs_are_a_fresh_forward(make, models, drafter, rule):
    build = {"none": lambda: None, "suffix-automaton": SuffixAutomatonDrafter, "sampled": Sampled}[drafter]
    requests = [group(i, prompt=range(i, i + 9), samples=3, temperature=0.7, max_new_tokens=60) for i in (0, 1)]
    generator = make(build(), rule=rule)
    switches = 0
    for sample in run(generator, requests).values():
        prompt = requests[sample.group].prompt_ids.tolist()
        laws = forward(models, prompt + sample.token_ids.tolist(), len(prompt))
        h = {who: -(law.exp() * law).sum(-1) for who, law in laws.items()}
        trace = before_sampling_by_definition(h[Sampler.SWITCHED_MODEL].tolist(), h[Sampler.POLICY].tolist(), rule)
        assert [s == Sampler.SWITCHED_MODEL for s in sample.samplers] == trace
        if rule.window == 1:
            assert (h[Sampler.SWITCHED_MODEL][torch.tensor(trace)] <= rule.threshold).all() and any(trace)
        raw = torch.stack([laws[Sampler(s)][t] for t, s in enumerate(sample.samplers)])
        tempered = torch.log_softmax(raw / 0.7, -1)
        expected = tempered[torch.arange(len(raw)), torch.from_numpy(sample.token_ids)]
        assert np.allclose(sample.logprobs, expected.numpy(), atol=1e-4)
        switches += int(np.abs(np.diff(sample.samplers.astype(int))).sum())
    assert switches >= 10 and generator.small.handed_over >= 5


@pytest.mark.parametrize("rule", [RULE, BEFORE], ids=["paper", "before"])
@pytest.mark.parametrize("build", [lambda: hostile(3), SuffixAutomatonDrafter], ids=["hostile", "suffix-automaton"])
def test_drafting_leaves_texts_and_samplers_as_they_are(make, build, rule):
    expected = run(make(rule=rule))
    done = run(make(build(), rule=rule))
    assert texts(done) == texts(expected)
    assert all((done[key].samplers == expected[key].samplers).all() for key in done)
    assert {int(s) for sample in done.values() for s in sample.samplers} == {0, 1}


def test_a_whole_draft_that_is_right_is_cut_at_the_switch_and_never_stands_on_the_small_model(make):
    expected = run(make())
    by_seed = {LONG[g].seeds[s]: sample.token_ids.tolist() for (g, s), sample in expected.items()}
    generator = make(oracle(by_seed))
    done = run(generator)
    assert texts(done) == texts(expected)
    assert generator.stats().accepted > 100
    for sample in done.values():
        assert (sample.origins[sample.samplers == Sampler.SWITCHED_MODEL] == 0).all()


@pytest.mark.parametrize("build", [lambda: None, SuffixAutomatonDrafter], ids=["plain", "suffix-automaton"])
@pytest.mark.parametrize("rule", [RULE, BEFORE], ids=["paper", "before"])
@pytest.mark.parametrize("budget", [6, 9, 14])
def test_texts_are_the_same_when_both_caches_run_out(make, folder, small_folder, budget, build, rule):
    expected = run(make(build(), rule=rule))
    bytes_ = budget * sum(page_bytes(ModelConfig.from_folder(f), torch.float32) for f in (folder, small_folder))
    tight = make(build(), rule=rule, kv_bytes=bytes_)
    done = run(tight)
    assert texts(done) == texts(expected)
    assert all(np.allclose(done[key].logprobs, expected[key].logprobs, atol=1e-4) for key in done)
    assert tight.stats().preemptions > 0 or budget > 9
    assert tight.kv_bytes <= bytes_
    assert tight._memory.cache.free == tight.small.memory.cache.free == budget


def test_a_sequence_starts_only_where_both_caches_have_room_for_all(make, folder, small_folder):
    """What a model at rest has missed is room that its cache will need, although nothing of it is taken yet."""
    requests = [group(i, prompt=range(20 + i), max_new_tokens=10 + 10 * i) for i in range(6)]
    rule = SwitchingRule(threshold=math.inf, window=1, min_run=6)  # all go to the small model for good
    bytes_ = 8 * sum(page_bytes(ModelConfig.from_folder(f), torch.float32) for f in (folder, small_folder))
    generator = make(rule=rule, kv_bytes=bytes_)
    running, admit = generator._running, generator._running.admit
    waited = 0

    def checked():
        nonlocal waited
        before = len(running)
        admit()
        waited += len(generator._scheduler) > 0
        held = [*running.starting, *running.batch]
        if before < len(held) > 1:
            copies = [s.copy or Copy(s, rule, False, VOCABULARY) for s in held]
            for memory, sequences in ((generator._memory, held), (generator.small.memory, copies)):
                missing = sum(max(0, -(-(s.target + 1) // PAGE) - len(s.pages)) for s in sequences)
                assert missing <= memory.cache.free

    running.admit = checked
    done = run(generator, requests)
    assert waited > 0
    assert texts(done) == texts(run(make(rule=rule), requests))


def test_cancelling_frees_both_caches(make):
    generator = make(SuffixAutomatonDrafter())
    free = generator._memory.cache.free
    for request in LONG:
        generator.add(request)
    for _ in range(25):
        generator.step()
    assert generator.small.memory.cache.free < free
    for request in LONG:
        generator.cancel(request.id)
    assert generator._memory.cache.free == generator.small.memory.cache.free == free and not generator.has_work()


def test_a_catch_up_is_one_prefill_of_the_missed_tokens_and_equal_to_a_full_recompute(make, models):
    rule = SwitchingRule(threshold=math.inf, window=1, min_run=6)  # the small model from the seventh token on
    generator = make(rule=rule)
    passes, forward = [], generator.small.decoder.forward
    generator.small.decoder.forward = lambda ids, *rest: passes.append(len(ids)) or forward(ids, *rest)
    generator.add(group(0, prompt=range(20), max_new_tokens=12))
    sample = finish(generator)[0, 0]
    assert passes == [20 + 5, 1, 1, 1, 1, 1, 1]
    fresh = reference_logits(models[Sampler.SWITCHED_MODEL], [*range(20), *sample.token_ids.tolist()])
    law = torch.log_softmax(fresh[25:-1], -1)
    expected = law[torch.arange(6), torch.from_numpy(sample.token_ids[6:])]
    assert np.allclose(sample.logprobs[6:], expected.numpy(), atol=1e-5)


def test_requests_for_the_policy_alone_are_not_switched(make, folder):
    requests = [GroupRequest(r.id, r.prompt_ids, r.sampling, r.seeds, policy_only=True) for r in LONG]
    plain = NativeGenerator(folder, max_sequences=8, stop_token_ids=(), max_length=160)
    done = run(make(), requests)
    assert texts(done) == texts(run(plain, LONG))
    assert all((sample.samplers == Sampler.POLICY).all() for sample in done.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_new_weights_are_the_policys_and_switching_goes_on(make, models, tmp_path, recompute):
    other = save_tiny(tmp_path / "other", seed=9)
    generator = make(recompute_on_update=recompute)
    request = group(0, prompt=range(10, 40), samples=4, max_new_tokens=60)
    generator.add(request)
    for _ in range(20):
        generator.step()
    generator.load_weights(other, 7)
    done = finish(generator)
    after = {**models, Sampler.POLICY: reference(other)}
    for sample in done.values():
        laws = forward(after, request.prompt_ids.tolist() + sample.token_ids.tolist(), 30)
        small = np.flatnonzero(sample.samplers == Sampler.SWITCHED_MODEL)
        new = np.flatnonzero((sample.samplers == Sampler.POLICY) & (sample.versions == 7))
        for rows, who in ((small, Sampler.SWITCHED_MODEL), (new if recompute else new[:0], Sampler.POLICY)):
            expected = laws[who][torch.from_numpy(rows), torch.from_numpy(sample.token_ids[rows])]
            assert np.allclose(sample.logprobs[rows], expected.numpy(), atol=1e-4)
        assert len(new) and sample.kv_kept_across_update != recompute


def test_penalties_and_truncation_apply_to_both_models_and_entropy_is_taken_before_them(make, models):
    sampling = SamplingParams(max_new_tokens=50, repetition_penalty=1.3, frequency_penalty=0.5, top_k=8)
    request = GroupRequest(0, np.arange(9), sampling, (1, 2, 3))
    plain, drafted = run(make(), [request]), run(make(SuffixAutomatonDrafter()), [request])
    assert texts(plain) == texts(drafted)
    for sample in plain.values():
        laws = forward(models, [*range(9), *sample.token_ids.tolist()], 9)
        raw = torch.stack([laws[Sampler(s)][t] for t, s in enumerate(sample.samplers)])
        trace = by_definition((-(raw.exp() * raw).sum(-1)).tolist(), RULE)
        assert [s == Sampler.SWITCHED_MODEL for s in sample.samplers] == trace and any(trace)
        for t in range(50):
            counts = np.bincount(sample.token_ids[:t], minlength=VOCABULARY)
            seen = torch.from_numpy((counts > 0) | np.isin(np.arange(VOCABULARY), range(9)))
            exact = reference_logits(models[Sampler(sample.samplers[t])], [*range(9), *sample.token_ids[:t].tolist()])
            logits = exact[-1].double()
            logits = torch.where(seen, torch.where(logits > 0, logits / 1.3, logits * 1.3), logits)
            logits = logits - 0.5 * torch.from_numpy(counts)
            kept = logits >= logits.topk(8).values[-1]
            law = torch.log_softmax(logits.masked_fill(~kept, -torch.inf), -1)
            assert sample.logprobs[t] == pytest.approx(float(law[sample.token_ids[t]]), abs=1e-4)


# ---- the law -----------------------------------------------------------------------------------------------------

FAST = SwitchingRule(threshold=2.6, window=1, min_run=1)


@torch.no_grad()
def law_of_third_token(models, prompt):
    """Exact, float64 [V]: all pairs of tokens before it, each token from the model that the rule names."""

    def step(texts, small):
        logits = {who: model(texts).logits[:, -1].double() for who, model in models.items()}
        logp = torch.where(small[:, None], *(torch.log_softmax(logits[w], -1) for w in (Sampler(1), Sampler(0))))
        return logp.exp(), -(logp.exp() * logp).sum(-1) <= FAST.threshold

    texts = torch.tensor([prompt])
    weight, small = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bool)
    whos = []
    for _ in range(2):
        law, small_next = step(texts, small)
        whos.append(small)
        weight = (weight[:, None] * law).flatten()
        small = small_next.repeat_interleave(VOCABULARY)
        texts = torch.cat(
            [texts.repeat_interleave(VOCABULARY, 0), torch.arange(VOCABULARY).repeat(len(texts))[:, None]], 1
        )
    law, _ = step(texts, small)
    assert 0.1 < float((weight * small).sum()) < 0.9, "both models are meant to sample the third token"
    return (weight[:, None] * law).sum(0)


def chi_square_p(counts, law):
    rare = law * counts.sum() < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(law[~rare], law[rare].sum()) * counts.sum()
    return float(chisquare(observed[expected > 0], expected[expected > 0]).pvalue)


@pytest.mark.parametrize("broken", [False, True])
def test_third_tokens_have_the_law_of_the_switching_policy_and_a_draft_that_is_not_cut_shows(
    make, models, monkeypatch, broken
):
    prompt = [1, 5, 9, 3]
    if broken:
        monkeypatch.setattr(SmallModel, "cut", lambda self, sequence, emission, logits: uncut(sequence, emission))
    generator = make(Sampled(sharpness=0.5), rule=FAST, max_sequences=500, max_length=16, max_draft_tokens=3)
    generator.add(group(0, prompt=prompt, samples=5000, max_new_tokens=3))
    third = np.array([sample.token_ids[2] for sample in finish(generator).values()])
    p = chi_square_p(np.bincount(third, minlength=VOCABULARY), law_of_third_token(models, prompt).numpy())
    assert p < 1e-4 if broken else p > 1e-3


def uncut(sequence, emission):
    for entropy in emission.entropies:
        sequence.copy.state.step(float(entropy))
    return emission


# ---- refused -----------------------------------------------------------------------------------------------------


class Reader(BaseDrafter):
    name = "reader"
    needs = Needs.HIDDEN_STATES


def test_a_drafter_that_must_read_hidden_states_is_refused(make):
    with pytest.raises(UsageError, match=r"drafter reader needs .*hidden states.*use suffix-automaton"):
        make(Reader())


def test_a_budget_for_no_sequence_in_both_caches_is_refused(make, folder):
    with pytest.raises(UsageError, match=r"raise engine\.kv_bytes"):
        make(kv_bytes=6 * page_bytes(ModelConfig.from_folder(folder), torch.float32))


def with_tokenizer(folder, vocabulary):
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")).save(
        str(folder / "tokenizer.json")
    )
    return folder


def test_another_tokenizer_is_refused_and_said_where_it_differs(tmp_path):
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 60)}}
    large = with_tokenizer(save_tiny(tmp_path / "large"), words)
    same = with_tokenizer(save_tiny(tmp_path / "same", seed=5), words)
    other = with_tokenizer(save_tiny(tmp_path / "other", seed=5), {**words, "w7": 8, "w8": 7})
    NativeGenerator(large, small_model=same, switching=RULE)
    with pytest.raises(UsageError, match=r"token id 7 is 'w8' there and 'w7' here; give a model"):
        NativeGenerator(large, small_model=other, switching=RULE)
    config = load_config(None, [f"model.path={large}", f"engine.switching.small_model={other}"])
    with pytest.raises(UsageError, match=r"token id 7"):
        check_pieces(config)
    config = load_config(None, [f"model.path={large}", f"engine.switching.small_model={tmp_path / 'missing'}"])
    with pytest.raises(UsageError, match="missing"):
        check_pieces(config)


def test_a_small_model_with_too_few_positions_is_refused(folder, tmp_path, make, monkeypatch):
    short = save_tiny(tmp_path, max_position_embeddings=64)
    with pytest.raises(UsageError, match=r"160 tokens exceed the small model's 64 positions"):
        make(small_model=short)


def test_vocabularies_that_are_padded_differently_go_together(folder, tmp_path, make):
    for size in (VOCABULARY - 3, VOCABULARY + 3):
        small = save_tiny(tmp_path / str(size), seed=5, vocab_size=size)
        for sample in run(make(small_model=small), LONG[:1]).values():
            ids = sample.token_ids[sample.samplers == Sampler.SWITCHED_MODEL]
            assert len(ids) and ids.max() < min(size, VOCABULARY)
            assert np.isfinite(sample.logprobs).all() and np.isfinite(sample.entropies).all()


@pytest.mark.slow
def test_calibration_hits_a_share_and_more_share_needs_a_lower_threshold(make):
    requests = [group(100 + i, prompt=range(i, i + 9), max_new_tokens=60) for i in range(12)]
    found = {}
    for share in (0.3, 0.7):
        generator = make()
        found[share] = calibrate(generator, requests, share)
        assert found[share].share == pytest.approx(share, abs=0.12)
        assert generator.small.rule.threshold == found[share].threshold
        done = run(generator, LONG)
        assert policy_share(list(done.values())) == pytest.approx(share, abs=0.2)
    assert found[0.3].threshold > found[0.7].threshold


def test_a_calibration_ends_with_the_step_in_which_it_is_asked_to(make):
    generator, steps = make(), []
    step = generator.step
    generator.step = lambda: (steps.append(generator.has_work()), step())[1]
    with pytest.raises(Stopped):
        calibrate(generator, LONG, 0.5, lambda: len(steps) < 5)
    assert len(steps) == 5


def test_a_run_calibrates_on_the_file_that_is_named(tmp_path, make):
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 60)}}
    folder = with_tokenizer(save_tiny(tmp_path / "policy"), words)
    for name, word in (("train", "w3"), ("other", "w9")):
        lines = [json.dumps({"question": f"{word} w{i}", "answer": "#### 1"}) for i in range(1, 5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    config = load_config(None, [
        f"model.path={folder}", f"engine.switching.small_model={folder}", "engine.switching.policy_share=0.5",
        "task.kind=jsonl", f"task.path={tmp_path / 'train.jsonl'}", "engine.switching.calibration_prompts=3",
        f"engine.switching.calibration_path={tmp_path / 'other.jsonl'}", "sampling.max_new_tokens=8",
    ])  # fmt: skip
    generator, said, seen = make(), [], []
    add, distilled = generator.add, {name: 2 * t for name, t in generator.small.decoder.tensors().items()}
    small = {f"small_model.{name}": t.contiguous() for name, t in distilled.items()}
    save_tensors(load_file(folder / "model.safetensors") | small, folder / "model.safetensors")
    generator.add = lambda request: (seen.append(tuple(request.prompt_ids.tolist())), add(request))
    calibrate_for_run(generator, config, folder, said.append)
    for name, tensor in generator.small.decoder.tensors().items():
        torch.testing.assert_close(tensor, distilled[name], msg="the publication's small model is calibrated")
    tokenizer = Tokenizer(folder)
    texts = [e.prompt for e in read_examples(tmp_path / "other.jsonl", config.task)][:3]
    assert set(seen) == {tuple(tokenizer.encode(text)) for text in texts}
    assert "3 prompts, 9 times" in said[0] and "after 3 prompts" in said[1]


@pytest.mark.parametrize("text", ["5", "0:1", "5:10:after", "five:ten", ""])
def test_a_rule_that_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match=r"is no rule of switching; write window and least run as 5:10"):
        parse_rule(text)


def test_a_rule_is_read_as_it_is_written():
    assert parse_rule("1:2:before", 0.3) == SwitchingRule(0.3, 1, 2, before_sampling=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["engine.switching.small_model=x"], "needs model.path"),
        (
            ["engine.switching.small_model=x", "model.path=y", "engine.switching.policy_share=0.2",
             "engine.switching.threshold=0.5"],
            "engine.switching.threshold = 0.5 beside engine.switching.policy_share = 0.2",
        ),
        (["engine.switching.small_model=x", "model.path=y", "engine.switching.calibration_path=z"],
         "engine.switching.calibration_path = 'z' without engine.switching.policy_share does nothing"),
        (["engine.switching.small_model=x", "model.path=y", "engine.switching.calibration_prompts=3"],
         "engine.switching.calibration_prompts = 3 without engine.switching.policy_share does nothing"),
        (["engine.switching.small_model=x", "model.path=y", "engine.switching.distill_tokens=9000"],
         "engine.switching.distill_tokens = 9000 without engine.switching.distill does nothing"),
        (["engine.switching.small_model=x", "model.path=y", "engine.switching.distill_learning_rate=0.1"],
         "engine.switching.distill_learning_rate = 0.1 without engine.switching.distill does nothing"),
        (["engine.kv_compression.budget=64"], "without engine.kv_compression.policy compresses nothing"),
    ],
)  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(settings, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        check_config(load_config(None, settings))


@pytest.mark.parametrize("key", ["window", "min_run", "distill_tokens"])
def test_counts_of_tokens_that_no_machine_holds_are_refused(key):
    with pytest.raises(
        UsageError, match=rf"^engine\.switching\.{key} = {10**20} is not valid: expected int <= 2147483647"
    ):
        load_config(None, [f"engine.switching.{key}={10**20}"])
    assert SwitchState(SwitchingRule(0.1, window=2**31 - 1, min_run=2**31 - 1)).step(1.0) is False


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        ("threshold", "0.5", "small-model DIR"), ("rule", "5:10", "small-model DIR"),
        ("kv-budget", "512", "kv-compression POLICY"), ("kv-every", "32", "kv-compression POLICY"),
    ],
)  # fmt: skip
def test_options_of_generate_that_would_do_nothing_are_refused(tmp_path, capsys, option, value, needed):
    folder = with_tokenizer(save_tiny(tmp_path), {"<unk>": 0, "w1": 1})
    assert main(["generate", str(folder), "--prompt", "w1", "--max-new-tokens", "4", f"--{option}", value]) == 2
    said = capsys.readouterr().err
    assert f"--{option} {value} without --{needed} does nothing; give both, or leave it out" in said


def test_a_share_that_is_none_is_refused(make):
    with pytest.raises(UsageError, match=r"share of 1\.5"):
        calibrate(make(), [group(0)], 1.5)


def test_rolling_means_equal_means_of_slices():
    values = np.random.default_rng(0).random(12)
    expected = [values[max(0, t - 4) : t + 1].mean() for t in range(12)]
    assert np.allclose(rolling_mean(values, 5), expected)
