"""What each policy keeps, against its definition written as loops."""

import math
import sys

import numpy as np
import pytest
import torch

from pipeline.cli import main
from pipeline.config.types import Section
from pipeline.engine.native.compression import KVCompression
from pipeline.engine.native.eviction import build
from pipeline.engine.native.eviction.base import EvictionPolicy, kept
from pipeline.errors import RunFailed, UsageError

KV_HEADS, GROUP, TOKENS, WIDTH, WINDOW = 2, 3, 23, 8, 4


@pytest.fixture(scope="module")
def scene():
    rng = torch.Generator().manual_seed(3)
    keys = torch.randn(2, KV_HEADS, TOKENS, WIDTH, generator=rng)
    keys[:, :, 9] = keys[:, :, 4] * 1.5  # says what an older one says
    keys[:, 0, 15] = keys[:, 0, 4] * 0.7
    queries = torch.randn(2, KV_HEADS * GROUP, WINDOW, WIDTH, generator=rng)
    return keys, queries


def products(keys, queries, row, kv):
    """[GROUP, WINDOW, TOKENS], float64"""
    heads = queries[row, kv * GROUP : (kv + 1) * GROUP].double().numpy()
    return np.einsum("gwd,td->gwt", heads, keys[row, kv].double().numpy()) / math.sqrt(WIDTH)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def pooled(values, kernel, how):
    half = kernel // 2
    return [how(values[max(0, j - half) : j + half + 1]) for j in range(len(values))]


def test_sinks_and_window_keep_the_first_and_the_latest(scene):
    keys, queries = scene
    stay = kept(build({"name": "sinks-window", "sinks": 3}), keys, queries, 8)
    assert (stay == torch.tensor([0, 1, 2, *range(TOKENS - 5, TOKENS)])).all()


def test_snapkv_adds_up_the_attention_of_the_latest_queries(scene):
    keys, queries = scene
    policy = build({"name": "snapkv", "window": WINDOW, "kernel": 3})
    scores = policy.scores(keys, queries)
    for row in range(2):
        for kv in range(KV_HEADS):
            votes = np.zeros(TOKENS)
            for of_head in products(keys, queries, row, kv):
                for w, of_query in enumerate(of_head):
                    seen = TOKENS - WINDOW + w + 1
                    votes[:seen] += softmax(of_query[:seen])
            assert np.allclose(scores[row, kv], pooled(votes, 3, np.mean), atol=1e-5)


@pytest.mark.parametrize("spared", [0, 1, 2])
def test_r_kv_weighs_importance_against_redundancy(scene, spared):
    keys, queries = scene
    options = {"window": WINDOW, "kernel": 5, "importance": 0.3, "threshold": 0.3, "spared": spared}
    policy = build({"name": "r-kv", **options})
    scores = policy.scores(keys, queries)
    for row in range(2):
        for kv in range(KV_HEADS):
            logits = products(keys, queries, row, kv).max(0)[:, : TOKENS - WINDOW]
            attention = np.mean([softmax(of_query) for of_query in logits], 0)
            importance = np.array(pooled(attention, 5, np.max) + [0.0] * WINDOW)
            unit = [k / np.linalg.norm(k) for k in keys[row, kv].double().numpy()]
            similarity = np.zeros((TOKENS, TOKENS))
            for i in range(TOKENS):
                for j in range(TOKENS):
                    similarity[i, j] = unit[i] @ unit[j] if i != j else 0.0
                alike = [j for j in range(TOKENS) if similarity[i, j] > 0.3]
                similarity[i, alike[len(alike) - spared :] if spared <= len(alike) else alike] = 0.0
            expected = 0.3 * importance - 0.7 * softmax(similarity.mean(0))
            assert np.allclose(scores[row, kv], expected, atol=1e-5)


def test_of_tokens_that_say_the_same_r_kv_drops_the_older_ones(scene):
    keys, _ = scene
    policy = build({"name": "r-kv", "window": WINDOW, "importance": 0.0, "threshold": 0.9})
    redundancy = policy.redundancy(keys)
    assert (redundancy[:, 0, 4] > redundancy[:, 0, 9]).all() and (redundancy[:, 0, 9] > redundancy[:, 0, 15]).all()


@pytest.mark.parametrize("name", ["snapkv", "r-kv"])
def test_each_head_keeps_its_own_and_all_keep_the_latest(scene, name):
    keys, queries = scene
    policy = build({"name": name, "window": WINDOW})
    stay = kept(policy, keys, queries, 9)
    assert stay.shape == (2, KV_HEADS, 9)
    assert (stay.diff(dim=-1) > 0).all()
    assert (stay[..., -WINDOW:] == torch.arange(TOKENS - WINDOW, TOKENS)).all()
    assert not torch.equal(stay[:, 0], stay[:, 1])
    past = policy.scores(keys, queries)[..., : TOKENS - WINDOW]
    for row in range(2):
        for kv in range(KV_HEADS):
            best = sorted(range(TOKENS - WINDOW), key=lambda j: -past[row, kv, j])[: 9 - WINDOW]
            assert stay[row, kv, :-WINDOW].tolist() == sorted(best)


class Theirs(EvictionPolicy):
    """A policy as a user may write it: two sinks, three latest tokens, and whatever scores a test gives it."""

    class Options(Section):
        pass

    sinks, recent, queries = 2, 3, 0

    def __init__(self, give=None, **counts):
        super().__init__(self.Options())
        self.give = give
        for key, value in counts.items():
            setattr(self, key, value)

    def scores(self, keys, queries):
        return self.give(torch.arange(TOKENS).expand(keys.shape[:3]))


def mostly(value):
    """Scores of this value but for the last few, which are the least."""
    return lambda age: torch.where(age < TOKENS - 8, value, -age.double())


@pytest.mark.parametrize(
    "give",
    [
        lambda age: age,
        lambda age: torch.full(age.shape, torch.inf),
        lambda age: torch.full(age.shape, -torch.inf),
        mostly(torch.inf),
        mostly(1e300),
    ],
)
def test_the_first_and_the_latest_stay_whatever_their_scores_are(scene, give):
    stay = kept(Theirs(give), *scene, 9)
    assert (stay[..., :2] == torch.tensor([0, 1])).all()
    assert (stay[..., -3:] == torch.arange(TOKENS - 3, TOKENS)).all()
    assert (stay.diff(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("give", "said"),
    [
        (lambda age: torch.full(age.shape, torch.nan), f"returned {4 * TOKENS} scores of {4 * TOKENS} that are NaN"),
        (lambda age: torch.where(age == 5, torch.nan, 1.0), f"returned 4 scores of {4 * TOKENS} that are NaN"),
        (lambda age: age[..., 3:], f"scores of shape [2, 2, {TOKENS - 3}]; give a tensor of float32 [2, 2, {TOKENS}]"),
        (lambda age: age[:, :1], f"scores of shape [2, 1, {TOKENS}]"),
        (lambda age: age[:, 0], f"scores of shape [2, {TOKENS}]"),
        (lambda age: None, "returned None for scores"),
        (lambda age: age / "two", "raised TypeError("),
        (lambda age: sys.exit("enough"), "raised SystemExit('enough') for scores (" + __file__),
    ],
)
def test_what_orders_nothing_is_refused_by_the_policys_name(scene, give, said):
    with pytest.raises(RunFailed) as refusal:
        kept(Theirs(give), *scene, 9)
    assert f"eviction policy {__name__}:Theirs" in str(refusal.value) and said in str(refusal.value)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"sinks": -5}, "has sinks = -5; give a whole number of at least 0"),
        ({"recent": 0}, "has recent = 0; give a whole number of at least 1"),
        ({"recent": 2.5}, "has recent = 2.5; give a whole number"),
        ({"queries": None}, "has queries = None; give a whole number"),
        ({"queries": 8}, "asks for queries = 8 of its recent = 3 latest tokens"),
    ],
)
def test_counts_that_a_policy_cannot_keep_to_are_refused(counts, said):
    with pytest.raises(UsageError) as refusal:
        KVCompression(Theirs(**counts), 16, 8)
    assert f"eviction policy {__name__}:Theirs {said}" in str(refusal.value)


def test_counts_that_a_policy_fails_to_say_are_refused():
    class Failing(Theirs):
        @property
        def recent(self):
            raise KeyError("window")

    with pytest.raises(UsageError, match=r"Failing raised KeyError\('window'\) instead of saying its sinks, recent"):
        KVCompression(Failing(), 16, 8)


STRANGERS = """
from pipeline.config.types import Section
from pipeline.engine.native.eviction.base import EvictionPolicy

class NoOptions(EvictionPolicy):
    recent = 2
    def scores(self, keys, queries): return keys[..., 0]

class Abstract(EvictionPolicy):
    class Options(Section): pass

class InitRaises(NoOptions):
    class Options(Section): pass
    def __init__(self, options): raise KeyError("x")
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raising:Policy", "raising:Policy cannot be imported: RuntimeError('at import'); mend it"),
        ("leaving:Policy", "leaving:Policy cannot be imported: SystemExit(3); mend it"),
        ("unreadable:Policy", "unreadable:Policy cannot be imported: SyntaxError("),
        ("strangers:Missing", "strangers:Missing cannot be imported: AttributeError("),
        ("strangers:NoOptions", "strangers:NoOptions declares no Options; nest a class Options("),
        ("strangers:Abstract", "strangers:Abstract leaves recent and scores out; define"),
        ("strangers:InitRaises", "strangers:InitRaises cannot be made: its constructor raised KeyError('x')"),
        (":Policy", "':Policy' is unknown"),
        ("strangers:", "'strangers:' is unknown"),
    ],
)
def test_classes_that_are_no_policies_are_refused_in_a_sentence(tmp_path, monkeypatch, capsys, name, said):
    sources = {"raising": "raise RuntimeError('at import')", "leaving": "raise SystemExit(3)", "unreadable": "def ("}
    for module, source in (sources | {"strangers": STRANGERS}).items():
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["run", "--dry-run", "--set", f"engine.kv_compression.policy={name}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rollahead: eviction policy ") and captured.err.count("\n") == 1, captured.err
    assert said in captured.err
