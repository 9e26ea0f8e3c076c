"""The drafter: where its drafts come from, how long they are, what it keeps."""

import numpy as np
import pytest

from drafters.base import Drafter, DraftRequest, SequenceStart, Verified
from drafters.suffix.corpus import build_corpus
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.errors import UsageError


def ids(tokens):
    return np.array(tokens, np.int64)


def start(id, prompt, group=0, response=()):
    return SequenceStart(id, ids(prompt), group, 1.0, 0, ids(response))


def observe(drafter, **emitted):
    """`_3=[7, 8]`: sequence 3 goes on with 7, 8."""
    sequences = [int(name[1:]) for name in emitted]
    drafter.observe(Verified(sequences, [ids(t) for t in emitted.values()], np.zeros(len(sequences), np.int64)))


def drafts(drafter, sequences, budgets):
    proposal = drafter.propose(DraftRequest(sequences, ids(budgets), np.ones(len(sequences), np.float32)))
    assert proposal.probabilities is None
    return [row[:n].tolist() for row, n in zip(proposal.token_ids, proposal.lengths, strict=True)]


def make(**options):
    return SuffixAutomatonDrafter(SuffixAutomatonDrafter.Options(**options))


def test_draft_grows_with_the_match_within_budget_and_limits():
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert isinstance(make(), Drafter)
    for options, budget, expected in (
        ({"base": 1.0, "factor": 1.0}, 10, [4, 5, 6, 7]),
        ({"base": 0.0, "factor": 1.0}, 10, [4, 5, 6]),
        ({"base": 0.5, "factor": 0.5}, 10, [4, 5]),
        ({"base": 9.0, "factor": 1.0, "max_tokens": 5}, 10, [4, 5, 6, 7, 8]),
        ({"base": 1e300, "factor": 1.0, "max_tokens": 5}, 10, [4, 5, 6, 7, 8]),
        ({"base": 9.0}, 2, [4, 5]),
        ({"base": 9.0}, 0, []),
        ({"min_match": 4}, 10, []),
    ):
        drafter = make(**options)
        drafter.begin([start(1, prompt)])
        assert drafts(drafter, [1], [budget]) == [expected], options


def test_matches_and_confidences_are_told():
    drafter = make()
    drafter.begin([start(1, [1, 2, 3, 4, 1, 2]), start(2, [5, 6, 7])])
    proposal = drafter.propose(DraftRequest([1, 2], ids([9, 9]), np.ones(2, np.float32)))
    assert proposal.matches.tolist() == [2, 0]
    np.testing.assert_allclose(proposal.confidences[0, :2], [1.5 / 3, 1.5 / 2])


def test_a_sequence_learns_from_its_siblings_and_from_itself():
    drafter = make(base=4.0)
    drafter.begin([start(1, [1, 2, 3]), start(2, [1, 2, 3])])
    assert drafts(drafter, [1, 2], [4, 4]) == [[], []]
    observe(drafter, _1=[10, 11, 12, 13])
    assert drafts(drafter, [1, 2], [4, 4]) == [[], [10, 11, 12, 13]]
    observe(drafter, _2=[20])
    assert drafts(drafter, [2], [4]) == [[]]
    observe(drafter, _2=[11])  # another way to the same place
    assert drafts(drafter, [2], [4]) == [[12, 13]]
    observe(drafter, _1=[20, 11])
    assert drafts(drafter, [2], [2]) == [[12, 13]]  # the sibling stands where it stands: what comes next is not known
    observe(drafter, _1=[14])
    assert drafts(drafter, [2], [2]) == [[14]]


def test_what_a_sequence_will_emit_is_not_known_before_it_does():
    """Siblings that stand at the same place: the first one's draft cannot hold what the second emits later."""
    drafter = make()
    drafter.begin([start(1, [1, 2]), start(2, [1, 2])])
    observe(drafter, _1=[5], _2=[5])
    assert drafts(drafter, [1, 2], [3, 3]) == [[], []]


def test_earlier_epochs_of_a_prompt_are_remembered_by_its_content():
    drafter = make(base=4.0)
    drafter.begin([start(1, [1, 2, 3], group=7)])
    observe(drafter, _1=[10, 11, 12])
    drafter.end([1])
    drafter.begin([start(2, [1, 2, 3], group=900), start(3, [7, 8, 9], group=901)])
    assert drafts(drafter, [2, 3], [4, 4]) == [[10, 11, 12], []]


def test_other_prompts_recent_texts_are_used_where_the_own_knows_less():
    drafter = make(base=2.0, factor=0.0)
    drafter.begin([start(1, [1, 2, 3]), start(2, [4, 5, 6])])
    observe(drafter, _1=[10, 11, 12, 13], _2=[10, 11])
    assert drafts(drafter, [2], [4]) == [[12, 13]]
    drafter.end([1, 2])
    drafter.begin([start(3, [7, 11, 77, 7, 7])])
    observe(drafter, _3=[11])
    assert drafts(drafter, [3], [1]) == [[77]]  # equally long matches: the own prompt's comes first
    observe(drafter, _3=[12])
    assert drafts(drafter, [3], [1]) == [[13]]


@pytest.fixture
def corpus(tmp_path):
    build_corpus([ids([1, 2, 3, 4, 5, 6, 7]), ids([20, 21, 22, 23])], tmp_path / "corpus")
    return str(tmp_path / "corpus")


def test_a_corpus_is_followed_from_the_prompt_on_and_must_match_longer(corpus):
    for bias, expected in ((0, [4, 5]), (2, [4, 5]), (3, [])):
        drafter = make(corpora=[corpus], corpus_bias=bias, base=2.0, factor=0.0)
        drafter.begin([start(1, [9, 1, 2, 3])])
        assert drafts(drafter, [1], [8]) == [expected], bias
        observe(drafter, _1=[4, 20, 21])
        assert drafts(drafter, [1], [8]) == [[22, 23] if bias < 2 else []], bias
    drafter = make(corpora=[corpus], corpus_bias=1, base=1.0, factor=0.0)
    drafter.begin([start(1, [3, 30, 2, 3])])
    assert drafts(drafter, [1], [8]) == [[30]]  # 1 token of the prompt against 2 - 1 of the corpus
    drafter = make(corpora=[corpus], corpus_bias=0, base=1.0, factor=0.0)
    drafter.begin([start(1, [3, 30, 2, 3])])
    assert drafts(drafter, [1], [8]) == [[4]]


def test_what_is_no_corpus_is_refused_with_the_remedy(corpus, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere is not a corpus .*rollahead corpus build"):
        make(corpora=[str(tmp_path / "nowhere")])
    path = tmp_path / "corpus" / "states.npy"
    states = np.load(path)
    states[3, 0] = 1_000_000
    np.save(path, states)
    with pytest.raises(UsageError, match="is damaged"):
        make(corpora=[corpus])


def test_memory_stays_within_its_bytes_and_gives_up_the_oldest_prompts_first():
    drafter = make(memory_mb=0.3, base=8.0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, 20) for _ in range(60)]
    texts = [rng.integers(0, 1000, 100) for _ in range(60)]

    def follow(n, i):
        drafter.begin([start(i, prompts[n])])
        observe(drafter, **{f"_{i}": texts[n][:2]})
        found = drafts(drafter, [i], [8])[0] == texts[n][2:10].tolist()
        observe(drafter, **{f"_{i}": texts[n][2:]})
        drafter.end([i])
        return found

    drafter.begin([start(1000, prompts[0])])  # lives through it all
    for n in range(60):
        follow(n, n)
        assert drafter.memory.held_bytes <= 0.3 * 2**20
    counters = drafter.counters()
    assert counters["evicted"] > 10 and 50 < counters["bytes_a_token"] < 200
    assert follow(59, 100) and follow(0, 101)
    assert not follow(1, 102)
    observe(drafter, _1000=[1, 2, 3])
    assert drafter.propose(DraftRequest([1000], ids([3]), np.ones(1, np.float32))).lengths.shape == (1,)


def test_many_interleaved_sequences_keep_every_draft_true():
    """Whatever is shared, grown and given up meanwhile: a draft always continues a known occurrence of its match."""
    drafter = make(memory_mb=0.05, base=4.0)
    rng = np.random.default_rng(1)
    live, text, next_id, drafted = {}, {}, 0, 0
    said = []
    for _ in range(400):
        while len(live) < 6:
            prompt = rng.integers(0, 3, 4).tolist()
            drafter.begin([start(next_id, prompt, group=next_id)])
            live[next_id], text[next_id] = prompt, list(prompt)
            said.append(text[next_id])
            next_id += 1
        order = list(live)
        proposal = drafter.propose(DraftRequest(order, ids([4] * 6), np.ones(6, np.float32)))
        for row, i in enumerate(order):
            n, match = proposal.lengths[row], proposal.matches[row]
            if n:
                drafted += 1
                context = text[i][len(text[i]) - match :] + proposal.token_ids[row, :1].tolist()
                assert any(context == t[a : a + match + 1] for t in said for a in range(len(t) - match))
        new = {f"_{i}": rng.integers(0, 3, rng.integers(1, 4)).tolist() for i in order}
        observe(drafter, **new)
        for i in order:
            text[i] += new[f"_{i}"]
            if len(text[i]) > 40:
                drafter.end([i])
                del live[i]
    assert drafted > 1500 and drafter.counters()["evicted"] > 0


def test_ending_forgets_the_sequence_and_a_restored_one_goes_on():
    drafter = make(base=2.0, factor=0.0)
    drafter.begin([start(1, [1, 2, 1]), start(2, [5, 5])])
    drafter.end([1, 99])
    assert drafts(drafter, [2], [1]) == [[5]]
    drafter.preempt([2])
    observe_nothing = drafts(drafter, [2], [1])
    drafter.restore([start(2, [5, 5])])
    assert drafts(drafter, [2], [1]) == observe_nothing
    fresh = make(base=2.0, factor=0.0)
    fresh.restore([start(8, [1, 2], response=[3, 4, 1, 2])])
    assert drafts(fresh, [8], [4]) == [[3, 4]]
