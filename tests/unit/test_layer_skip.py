"""The program is checked against its recursion written out one state at a time, and against trying every set; the
drafter on a model some of whose layers do nothing, where the right set is known and its drafts are always accepted."""

import itertools

import numpy as np
import pytest
import torch

from drafters.base import BaseDrafter, Needs, Places, SequenceStart
from drafters.layer_skip import LayerSkipDrafter
from drafters.registry import build
from drafters.rehearsal import Rehearsal
from drafters.skip_program import Probe, cosines, solve
from pipeline.engine.native.compression import KVCompression
from pipeline.engine.native.eviction import build as build_policy
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.models.checkpoint import load_decoder
from pipeline.models.kv_cache import PAGE, KVCache
from tests.unit.generation import finish, group, texts
from tests.unit.tiny_models import VOCABULARY, reference, save_tiny

IDLE = (1, 3, 4, 6)
"""layers of the model below that do nothing"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Eight layers, all of which matter."""
    decoder = load_decoder(save_tiny(tmp_path_factory.mktemp("deep"), num_hidden_layers=8), "float32", "cpu")
    tensors = decoder.tensors()
    for name, weight in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            weight.mul_(1.5)
    decoder.load(tensors.__getitem__)
    return decoder


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """Eight layers, four of which add nothing to the residual stream."""
    decoder = load_decoder(save_tiny(tmp_path_factory.mktemp("idle"), num_hidden_layers=8), "float32", "cpu")
    tensors = decoder.tensors()
    for layer in IDLE:
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"].zero_()
    decoder.load(tensors.__getitem__)
    return decoder


class Text:
    """A text of which all tokens but the last are cached, the last cached one's states known: a target in small."""

    def __init__(self, decoder, tokens, seed=0, pages=40):
        self.decoder, self.tokenizer, self.tokens, self.fresh = decoder, None, tokens, None
        rng = np.random.default_rng(seed)
        self.ids = torch.from_numpy(rng.integers(3, VOCABULARY, tokens))
        self.cache = KVCache(decoder.config, decoder.dtype, decoder.device, pages)
        self.pages = self.cache.take(tokens // PAGE + 1)
        states = []
        decoder.forward(self.ids, self.plan(0, tokens), self.cache, states)
        self.states = torch.stack(states)[:, -1:]

    def plan(self, cached, count):
        return self.cache.plan(np.array([self.pages]), np.array([cached]), np.array([count]))

    def places(self, ids):
        return Places(np.array([self.pages]), np.array([self.tokens]))

    def through(self, layer, state):
        """One state [H] through a layer, over a cache that ends before the token."""
        if self.fresh is None:
            self.fresh = KVCache(self.decoder.config, self.decoder.dtype, self.decoder.device, 40)
            if self.tokens > 1:
                self.decoder.forward(self.ids[:-1], self.plan(0, self.tokens - 1), self.fresh)
        plan = self.plan(self.tokens - 1, 1)
        return self.decoder.block(layer, state[None], plan, self.fresh)[0]


def serial(text, most):
    """The recursion as the paper states it, cell by cell."""
    x, layers = text.states[:, 0], len(text.states) - 1
    cosine = torch.nn.functional.cosine_similarity
    g, skips = {(0, 0): x[0]}, {}
    for i in range(1, layers + 1):
        g[i, 0] = x[i]
        for j in range(1, min(i, most) + 1):
            skipped = g[i - 1, j - 1]
            if i == j:
                g[i, j], skips[i, j] = skipped, True
                continue
            ran = text.through(i - 1, g[i - 1, j])
            skips[i, j] = bool(cosine(x[i], skipped, dim=0) > cosine(x[i], ran, dim=0))
            g[i, j] = skipped if skips[i, j] else ran
    return skips, [float(cosine(g[layers, j], x[layers], dim=0)) for j in range(most + 1)]


def similarity(text, skipped):
    """Of the last state without some layers."""
    state = text.states[0, 0]
    for layer in range(len(text.states) - 1):
        if layer not in skipped:
            state = text.through(layer, state)
    return float(torch.nn.functional.cosine_similarity(state, text.states[-1, 0], dim=0))


@pytest.mark.parametrize(("tokens", "pages"), [(1, 40), (20, 40), (PAGE + 1, 40), (2 * PAGE, 40), (20, 3)])
def test_states_run_together_give_what_they_give_one_by_one(deep, tokens, pages):
    text = Text(deep, tokens, pages=pages)
    before, free = text.cache.store[:, :, text.pages].clone(), text.cache.free
    with Probe(text, [0], 5) as run:
        table = solve(text.states, run, 5)
    skips, similarities = serial(text, 5)
    np.testing.assert_allclose(table.similarities, similarities, atol=1e-5)
    for (i, j), skip in skips.items():
        assert table.skips[i, j] == skip, (i, j)
    assert torch.equal(text.cache.store[:, :, text.pages], before), "the target's own keys and values changed"
    assert text.cache.free == free


@pytest.mark.parametrize("tokens", [9, 30])
def test_the_program_comes_near_the_best_set_of_all(deep, tokens):
    text = Text(deep, tokens)
    with Probe(text, [0], 4) as run:
        table = solve(text.states, run, 4)
    better = []
    for count in (1, 2, 3, 4):
        tried = sorted(similarity(text, chosen) for chosen in itertools.combinations(range(8), count))
        found = similarity(text, table.skipped(count))
        assert len(table.skipped(count)) == count
        assert found == pytest.approx(table.similarities[count], abs=1e-5)  # the set is the one the state came from
        assert found > tried[-1] - 0.1
        better.append(np.mean(np.array(tried) <= found))
    assert np.mean(better) > 0.8


def every_set(text):
    """Similarities of the last states, by the set of skipped layers, for all sets; a state is carried on once for all
    that begin alike."""
    states = {(): text.states[0, 0]}
    for layer in range(len(text.states) - 1):
        ran = {chosen: text.through(layer, state) for chosen, state in states.items()}
        states = ran | {(*chosen, layer): state for chosen, state in states.items()}
    truth = text.states[-1, 0]
    cosine = torch.nn.functional.cosine_similarity
    return {chosen: float(cosine(state, truth, dim=0)) for chosen, state in states.items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_program_is_near_brute_force_over_ten_layers_at_every_count(tmp_path, seed):
    decoder = load_decoder(save_tiny(tmp_path, num_hidden_layers=10, seed=seed), "float32", "cpu")
    text = Text(decoder, 20, seed=seed)
    with torch.no_grad(), Probe(text, [0], 9) as run:
        table, tried = solve(text.states, run, 9), every_set(text)
    assert len(tried) == 2**10 and tried[()] == pytest.approx(1.0, abs=1e-5)
    ranks = []
    for count in range(1, 10):
        chosen = table.skipped(count)
        others = [found for other, found in tried.items() if len(other) == count]
        assert len(chosen) == count and tried[chosen] == pytest.approx(table.similarities[count], abs=1e-5)
        # A cell keeps one state only, which tells most where a single layer is left of ten.
        assert tried[chosen] > max(others) - (0.1 if count < 9 else 0.2), (count, chosen)
        ranks.append(np.mean(np.array(others) <= tried[chosen] + 1e-6))
    assert np.mean(ranks) > 0.8, ranks


def test_several_tokens_choose_together_by_the_mean_of_their_cosines():
    x = torch.eye(3)[[0, 1]].expand(3, 2, 3)
    states = torch.stack([x[0], x[1]])
    assert cosines(states, torch.eye(3)[[0, 2]]).tolist() == [0.5, 0.5]


# ---- the drafter -------------------------------------------------------------------------------------------------


def drafter(**options):
    return LayerSkipDrafter(LayerSkipDrafter.Options(**{"stop_below": 0.0, "max_tokens": 5} | options))


def generator(decoder, drafter, **options):
    return NativeGenerator(decoder, drafter=drafter, max_draft_tokens=5, stop_token_ids=(), **options)


REQUESTS = [
    group(0, samples=3, max_new_tokens=85),
    group(1, prompt=tuple(range(3, 60)), samples=4, temperature=0.6, max_new_tokens=30),
    group(2, prompt=(7,), samples=2, temperature=0.0, max_new_tokens=85),
]


@pytest.mark.parametrize("options", [{}, {"own_sets": 0}, {"own_sets": 20, "refresh_every": 3}])
@pytest.mark.parametrize("pages", [200, 6])
def test_layers_that_do_nothing_are_found_and_skipped_without_a_loss(idle, options, pages):
    """With 6 pages, sequences are preempted, and there is little memory to choose a set in."""
    ours = drafter(**options)
    kv_bytes = pages * 8 * 2 * 2 * PAGE * 8 * 4
    made = generator(idle, ours, max_sequences=8, max_length=90, kv_bytes=kv_bytes)
    for request in REQUESTS:
        made.add(request)
    assert len(finish(made)) == 9
    stats = made.stats()
    assert (stats.preemptions > 0) == (pages == 6)
    assert ours._shared == IDLE and ours.counters()["sets_chosen"] >= 1
    assert stats.drafter_failures == 0 and stats.accepted == stats.drafted > 40
    assert made._memory.cache.free == made._memory.cache.pages


def test_sequences_with_sets_of_their_own_draft_in_one_pass_what_each_would_draft_alone(deep):
    starts = [SequenceStart(i, np.arange(3 + i, 12 + i), i, 0.0, i) for i in range(3)]
    sets = [(1, 2, 5, 6), (0, 3, 4, 7), (1, 2, 5, 6)]

    def proposals(which):
        ours = drafter(own_sets=8)
        rehearsal = Rehearsal(ours, deep, budget=0)
        rehearsal.begin([starts[i] for i in which], limit=20)
        for i in which:
            ours._texts[i].skipped = sets[i]
        rehearsal.budget = 4
        rehearsal.live.sort(key=lambda text: text.start.id)
        rehearsal.step()
        return rehearsal.proposals[0]

    together = proposals([0, 1, 2])
    assert any(together.values())
    for i in range(3):
        assert proposals([i])[i] == together[i]


def test_greedy_text_stays_as_it_is(deep):
    requests = [group(i, prompt=(1, 5 + i), temperature=0.0, max_new_tokens=40) for i in range(4)]
    found = []
    for made in (generator(deep, None), generator(deep, drafter(skip=0.25))):
        for request in requests:
            made.add(request)
        found.append(texts(finish(made)))
    assert found[0] == found[1]
    assert 0 < made.stats().accepted < made.stats().drafted


def test_it_drafts_in_a_cache_that_has_dropped_tokens(idle):
    policy = build_policy({"name": "sinks-window"})
    made = generator(idle, drafter(refresh_every=10), max_length=200, kv_compression=KVCompression(policy, 64, 32))
    for request in (group(0, samples=2, max_new_tokens=150), group(1, prompt=range(3, 53), max_new_tokens=140)):
        made.add(request)
    assert len(finish(made)) == 3
    stats = made.stats()
    assert stats.compressions > 3 and stats.drafter_failures == 0 and stats.accepted == stats.drafted > 100


def test_drafts_are_truncated_as_the_target_is(idle):
    made = generator(idle, drafter(refresh_every=10))
    for id, own in enumerate([{"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.2}, {}]):
        made.add(group(id, samples=2, max_new_tokens=50, **own))
    finish(made)
    assert made.stats().accepted == made.stats().drafted > 100 and made.stats().drafter_failures == 0


class Seeing(BaseDrafter):
    name = "seeing"
    needs = Needs.LAYER_STATES

    def __init__(self):
        self.seen = []

    def observe(self, verified):
        self.seen.append(verified.layers[:, int(verified.starts[0]) + len(verified.emitted[0]) - 1])


def test_layer_states_are_those_of_the_model(tmp_path):
    folder, ours = save_tiny(tmp_path, num_hidden_layers=3), Seeing()
    made = NativeGenerator(folder, drafter=ours, dtype="float32", device="cpu", stop_token_ids=())
    made.add(group(max_new_tokens=6))
    text = [1, 5, 9, 3, *finish(made)[0, 0].token_ids.tolist()]
    model = reference(folder)
    with torch.no_grad():
        found = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    for n, seen in enumerate(ours.seen):
        assert seen.shape == (4, 24)
        for layer in range(3):  # transformers gives the last one after the final norm
            torch.testing.assert_close(seen[layer], found[layer][0, 3 + n], atol=1e-4, rtol=0)


def test_a_part_that_leaves_out_no_layer_or_all_is_refused(tmp_path):
    folder = save_tiny(tmp_path)
    with pytest.raises(UsageError, match=r"skip 0\.1 of drafter layer-skip leaves out 0 of 2 layers"):
        NativeGenerator(folder, drafter=build({"name": "layer-skip", "skip": 0.1}))
    with pytest.raises(UsageError, match="leaves out 2 of 2"):
        NativeGenerator(folder, drafter=build({"name": "layer-skip", "skip": 0.9}))
