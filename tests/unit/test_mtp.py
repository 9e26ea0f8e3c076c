"""The multi-token-prediction head and the drafter that runs it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from drafters.base import DraftRequest, SequenceStart, Verified
from drafters.mtp import texts as texts_module
from drafters.mtp.drafter import MTPDrafter
from drafters.mtp.head import FILE, MTPHead, load_head
from drafters.mtp.module import MTPModule
from drafters.registry import build
from drafters.rehearsal import tiny_target
from drafters.testing import check_drafter
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.models.checkpoint import load_decoder
from pipeline.models.kv_cache import KVCache
from pipeline.weights.filesystem import save_tensors
from tests.unit.generation import finish, group, texts
from tests.unit.tiny_models import save_tiny


def module_for(config, seed=0):
    """A head whose distributions are not flat."""
    torch.manual_seed(seed)
    module = MTPModule(config)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.normal_(0, 1.2 / p.shape[1] ** 0.5)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return module


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def weights(target):
    return module_for(target.config).weights()


def hidden_states(target, tokens):
    """[T, H]"""
    cache = KVCache(target.config, target.dtype, target.device, 8)
    tables = np.array([cache.take(8)])
    plan = cache.plan(tables, np.array([0]), np.array([len(tokens)]))
    return target.forward(torch.tensor(tokens), plan, cache)


def module_logits(target, module, tokens, depths):
    """[depths, T - 1, V] by the training form, for rows of a text of T tokens."""
    hidden, embedded = hidden_states(target, tokens)[:-1], target.embedding[torch.tensor(tokens[1:])]
    return torch.stack([target.logits(h[0]) for h in module(embedded[None], hidden[None], depths)])


def drafter_for(weights, target, **options):
    drafter = MTPDrafter(MTPDrafter.Options(**options), weights)
    drafter.attach(SimpleNamespace(decoder=target))
    return drafter


def start(target, prompt, response=(), id=0, group=0):
    hidden = hidden_states(target, [*prompt, *response])[:-1]
    return SequenceStart(id, np.array(prompt), group, 1.0, id, np.array(response, np.int64), hidden)


def request(ids, budget, temperature=1.0):
    return DraftRequest(ids, np.full(len(ids), budget), np.full(len(ids), temperature, np.float32))


def test_drafts_have_the_training_modules_distributions(target, weights):
    """Prompt in one pass, then verifications of several tokens with true hidden states, then drafts: the same numbers
    as the teacher-forced module gives for the text with the draft appended."""
    drafter, module = drafter_for(weights, target, max_tokens=5), module_for(target.config)
    text = [1, 5, 9, 5, 9, 3, 8, 8, 4, 17, 20]
    drafter.begin([start(target, text[:5])])
    for known, count in ((5, 1), (6, 3), (9, 2)):
        proposal = drafter.propose(request([0], 5))
        drafted = proposal.token_ids[0].tolist()
        # the chain that begins at the last row but depths - 1 is fed the drafts as if they were text
        expected = module_logits(target, module, text[:known] + drafted, 5)[:, known - 2]
        torch.testing.assert_close(proposal.probabilities[0], torch.softmax(expected, -1), rtol=1e-4, atol=1e-6)
        hidden = hidden_states(target, text[: known + count])[known - 1 : -1]
        emitted = np.array(text[known : known + count])
        drafter.observe(Verified([0], [emitted], np.array([count - 1]), hidden, None, np.array([0])))


def test_groups_read_their_prompt_once_and_draft_as_alone(target, weights):
    prompt = [1, *([7, 3, 11] * 15)]
    alone, shared = drafter_for(weights, target, greedy=True), drafter_for(weights, target, greedy=True)
    alone.begin([start(target, prompt)])
    shared.begin([start(target, prompt, id=i) for i in range(4)] + [start(target, [4, 4], id=4, group=1)])
    rows = []
    forward = shared._head.forward
    shared._head.forward = lambda *a: (rows.append(len(a[0])), forward(*a))[1]
    expected = alone.propose(request([0], 3))
    found = shared.propose(request([0, 1, 2, 3, 4], 3))
    assert rows[0] == len(prompt) - 1 + 1 and rows[1:] == [5, 5]
    assert (found.token_ids[:4] == expected.token_ids).all()
    # each goes on in pages of its own
    hidden = torch.randn(5, target.config.hidden_size)
    verified = Verified(list(range(5)), [np.array([i]) for i in range(5)], np.zeros(5, int), hidden, None, np.arange(5))
    shared.observe(verified)
    alone.observe(Verified([0], [np.array([0])], np.zeros(1, int), hidden[:1], None, np.zeros(1, int)))
    assert (shared.propose(request([0, 1, 2, 3, 4], 3)).token_ids[0] == alone.propose(request([0], 3)).token_ids).all()


def test_pages_are_given_back(target, weights):
    drafter = drafter_for(weights, target)
    for round in range(3):
        ids = list(range(100 * round, 100 * round + 40))
        drafter.begin([start(target, [1, *range(3, 20), *range(3, 20)], id=i, group=i // 4) for i in ids])
        drafter.propose(request(ids, 4))
        drafter.preempt(ids[:10])
        drafter.restore([start(target, [1, *range(3, 20)], [3, 4], id=i, group=i // 4) for i in ids[:5]])
        drafter.propose(request(ids[:5], 4))
        drafter.weights_changed(round)
        drafter.end(ids)
        assert drafter._texts.cache.free == drafter._texts.cache.store.shape[2]


@pytest.mark.parametrize(
    "options",
    [{}, {"greedy": True, "stop_below": 0.3}, {"max_tokens": 1}],
    ids=["probabilistic", "greedy", "one token"],
)
def test_mtp_keeps_to_the_protocol(weights, options):
    check_drafter(lambda: MTPDrafter(MTPDrafter.Options(**options), weights), samples=1500)


def test_drawn_drafts_are_accepted_as_often_as_the_overlap_says(tmp_path):
    """Chance sum_v min(p, q) at depth 1, of what the generator counts."""
    folder = save_tiny(tmp_path / "model")
    decoder = load_decoder(folder, "float32", "cpu")
    module = module_for(decoder.config)
    save_tensors(module.weights(), folder / FILE)
    generator = NativeGenerator(folder, drafter=build({"name": "mtp"}), max_sequences=64, max_draft_tokens=1,
                                stop_token_ids=(), dtype="float32", device="cpu")  # fmt: skip
    generator.add(group(prompt=[1, 5, 9, 3], samples=300, max_new_tokens=12))
    done = finish(generator)
    stats = generator.stats()
    assert stats.drafter_failures == 0
    overlap = []
    for text in list(texts(done).values())[:60]:
        tokens = [1, 5, 9, 3, *text]
        q = torch.softmax(module_logits(decoder, module, tokens, 1)[0], -1)[:-1]
        p = torch.softmax(decoder.logits(hidden_states(decoder, tokens)), -1)[1:-1]
        overlap += torch.minimum(p, q).sum(-1)[2:].tolist()
    assert abs(stats.accepted / stats.drafted - np.mean(overlap)) < 0.04
    assert 0.1 < np.mean(overlap) < 0.9


def test_generator_preempts_restores_and_updates_under_mtp(tmp_path):
    folder, newer = save_tiny(tmp_path / "a"), save_tiny(tmp_path / "b", seed=1)
    config = load_decoder(folder, "float32", "cpu").config
    for seed, where in enumerate((folder, newer)):
        save_tensors(module_for(config, seed).weights(), where / FILE)
    generator = NativeGenerator(folder, drafter=build({"name": "mtp"}), max_sequences=8, max_draft_tokens=3,
                                stop_token_ids=(), dtype="float32", device="cpu", max_length=120,
                                recompute_on_update=True, kv_bytes=8 * 2 * 2 * 32 * 8 * 2 * 4)  # fmt: skip
    for i in range(3):
        generator.add(group(i, prompt=range(40), samples=4, max_new_tokens=70))
    for _ in range(6):
        generator.step()
    generator.load_weights(newer, 1)
    done = finish(generator)
    stats = generator.stats()
    assert stats.drafter_failures == 0 and stats.preemptions > 0 and stats.accepted > 0
    assert len(done) == 12 and all(len(s.token_ids) == 70 for s in done.values())
    drafter = generator._drafting._drafter
    torch.testing.assert_close(drafter._head.final_norm, module_for(config, 1).weights()["mtp.norm.weight"])


def test_heads_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    folder, other = save_tiny(tmp_path / "a"), save_tiny(tmp_path / "b", hidden_size=32)
    target = load_decoder(folder, "float32", "cpu")
    with pytest.raises(UsageError, match="no multi-token-prediction head; train one with rollahead train-drafter"):
        load_head(MTPHead(target), folder)
    save_tensors(module_for(load_decoder(other, "float32", "cpu").config).weights(), other / FILE)
    with pytest.raises(UsageError, match=r"does not fit the model: .*mtp.* has shape \(32,\) where the model needs"):
        load_head(MTPHead(target), other)


def test_states_of_texts_that_nobody_drafts_for_are_read_before_they_are_too_many(target, weights, monkeypatch):
    text, drafts = [1, 5, 9, 5, 9, 3, 8, 8, 4, 17, 20], []
    for most in (1 << 30, 3 * target.config.hidden_size * 4):
        monkeypatch.setattr(texts_module, "MOST_UNREAD_BYTES", most)
        drafter = drafter_for(weights, target, max_tokens=5, greedy=True)
        drafter.begin([start(target, text[:4], id=id) for id in (0, 1)])
        states = hidden_states(target, text)
        for t in range(4, len(text)):
            hidden = states[[t - 1, t - 1]]
            drafter.observe(Verified([0, 1], [np.array(text[t : t + 1])] * 2, np.zeros(2), hidden, None, np.arange(2)))
            unread = sum(len(part) for i in (0, 1) for part in drafter._texts[i].hidden)
            assert unread <= 2 * (t + 1) if most == 1 << 30 else unread <= 4
        drafts.append(drafter.propose(request([0, 1], 5)).token_ids.tolist())
    assert drafts[0] == drafts[1]
