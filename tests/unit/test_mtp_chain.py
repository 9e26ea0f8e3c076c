"""Whole drafts in one compiled call are bit for bit what the parts give one by one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from drafters.base import DraftRequest, SequenceStart, Verified
from drafters.mtp.drafter import MTPDrafter
from pipeline.messages import SamplingParams
from pipeline.models import cpu_products
from pipeline.models.checkpoint import load_decoder
from pipeline.models.kv_cache import KVCache
from pipeline.sampling.truncation import Truncation
from tests.unit.test_mtp import module_for
from tests.unit.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(
    not cpu_products.supported(), reason="this processor does not multiply pairs of bfloat16"
)
VOCABULARY = 384


@pytest.fixture(params=[True, False], ids=["tied", "a head of its own"])
def decoder(request, tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": VOCABULARY}
    folder = save_tiny(tmp_path, "Qwen3", num_hidden_layers=2, tie_word_embeddings=request.param, **shape)
    decoder = load_decoder(folder, dtype="bfloat16")
    decoder.most_compiled_rows = 1000
    return decoder


class Follower:
    """A drafter, fed with the same texts whatever it drafts."""

    PROMPTS = ([5, 9, 5, 9, 3], [1], [7, 8] * 20, [7, 8] * 20)
    GROUPS = (0, 1, 2, 2)

    def __init__(self, decoder, whole, options):
        self.decoder, self.texts = decoder, [list(prompt) for prompt in self.PROMPTS]
        self.drafter = MTPDrafter(MTPDrafter.Options(**options), module_for(decoder.config).weights())
        self.drafter.attach(SimpleNamespace(decoder=decoder))
        head = self.drafter._head
        head.most_compiled_rows = 1000
        assert head.chains(4)
        if not whole:
            head.chains = lambda rows: False
        self.drafter.begin([
            SequenceStart(i, np.array(text), self.GROUPS[i], 1.0, i, hidden=self.states(text)[:-1])
            for i, text in enumerate(self.texts)
        ])  # fmt: skip

    def states(self, tokens):
        """[T, H]"""
        cache = KVCache(self.decoder.config, self.decoder.dtype, self.decoder.device, 8)
        plan = cache.plan(np.array([cache.take(8)]), np.array([0]), np.array([len(tokens)]))
        return self.decoder.forward(torch.tensor(tokens), plan, cache)

    def steps(self, truncation=None):
        """The first two by a truncation, if there is one."""
        rng = np.random.default_rng(3)
        for step, budgets in enumerate(([4, 4, 4, 4], [4, 1, 0, 3], [0, 2, 4, 1], [1, 1, 1, 1], [4, 3, 2, 1])):
            temperatures = np.array([1.0, 0.5, 0.0, 2.0], np.float32)
            request = DraftRequest([0, 1, 2, 3], np.array(budgets), temperatures, truncation if step < 2 else None)
            yield self.drafter.propose(request)
            counts = rng.integers(1, 6, 4)
            emitted = [rng.integers(0, VOCABULARY, n) for n in counts]
            hidden = []
            for text, tokens in zip(self.texts, emitted, strict=True):
                text += tokens.tolist()
                hidden.append(self.states(text)[-len(tokens) - 1 : -1])
            starts = np.cumsum([0, *counts[:-1]])
            self.drafter.observe(Verified([0, 1, 2, 3], emitted, counts - 1, torch.cat(hidden), None, starts))


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"stop_below": 0.02}, {"max_tokens": 1}], ids=str)
def test_whole_drafts_are_those_of_the_parts(decoder, threads, options):
    whole, parts = (Follower(decoder, way, options) for way in (True, False))
    assert max(compared(whole.steps(), parts.steps())) == (1 if options.get("max_tokens") else 4)


def test_what_is_too_much_to_read_in_the_call_is_read_before_it(decoder, threads, monkeypatch):
    whole, parts = (Follower(decoder, way, {}) for way in (True, False))
    head, made = whole.drafter._head, []
    chained, fits = MTPDrafter._chained, head.chains
    monkeypatch.setattr(head, "chains", lambda rows: rows <= 4 and fits(rows))
    monkeypatch.setattr(MTPDrafter, "_chained", lambda self, *given: made.append(1) or chained(self, *given))
    assert max(compared(whole.steps(), parts.steps())) == 4 and len(made) == 5


def test_drafts_by_truncated_laws_and_whole_ones_follow_each_other(decoder, threads):
    truncation = Truncation.of([SamplingParams(top_k=k) for k in (3, 0, 0, 5)])
    whole, parts = (Follower(decoder, way, {}) for way in (True, False))
    assert max(compared(whole.steps(truncation), parts.steps(truncation))) == 4
    q = next(Follower(decoder, True, {}).steps(truncation)).probabilities[[0, 2, 3]]
    assert ((q > 0).sum(-1) == torch.tensor([[3], [VOCABULARY], [5]])).all()


def compared(steps, others):
    """Lengths of the drafts, which agree bit for bit."""
    lengths = []
    for found, expected in zip(steps, others, strict=True):
        assert found.lengths.tolist() == expected.lengths.tolist()
        inside = np.arange(found.token_ids.shape[1]) < found.lengths[:, None]
        np.testing.assert_array_equal(found.token_ids[inside], expected.token_ids[inside])
        np.testing.assert_array_equal(found.confidences[inside], expected.confidences[inside])
        assert (found.probabilities is None) == (expected.probabilities is None)
        if found.probabilities is not None:
            drafted = found.lengths > 0
            np.testing.assert_array_equal(found.sampled[drafted], expected.sampled[drafted])
            drawn = torch.from_numpy(inside & found.sampled[:, None])
            torch.testing.assert_close(found.probabilities[drawn], expected.probabilities[drawn], rtol=0, atol=0)
        lengths += found.lengths.tolist()
    assert len({*lengths}) > 1
    return lengths


def test_new_weights_of_the_target_are_drafted_with(decoder):
    follower = Follower(decoder, True, {})
    next(follower.steps())
    before = follower.drafter._head.chain()
    tensors = decoder.tensors()
    decoder.load(lambda name: 1.5 * tensors[name])
    assert follower.drafter._head.chain() is not before
