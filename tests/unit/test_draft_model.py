"""A draft model that is the policy itself has every draft accepted, whatever happens to the sequences: then what it has
read is what they say."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Builder
from tokenizers import models, pre_tokenizers

from drafters.base import DraftRequest, SequenceStart
from drafters.draft_model import DraftModelDrafter
from drafters.drawing import Drawing
from drafters.registry import build
from drafters.rehearsal import Rehearsal
from drafters.testing import check_distribution
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.kv_cache import PAGE
from pipeline.sampling.exactness import processed_law
from pipeline.sampling.truncation import Truncation
from tests.unit.generation import finish, group, texts
from tests.unit.tiny_models import save_like_the_kits, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model with the same vocabulary, of another shape."""
    return save_tiny(tmp_path_factory.mktemp("draft"), seed=1, num_hidden_layers=1, num_key_value_heads=1)


def drafter(path, **options):
    return DraftModelDrafter(DraftModelDrafter.Options(path=str(path), **options))


def generator(folder, drafter, **options):
    options = {"max_sequences": 8, "max_draft_tokens": 5, "stop_token_ids": (), "device": "cpu"} | options
    return NativeGenerator(folder, drafter=drafter, dtype="float32", **options)


MIXED = [
    group(0, samples=3, max_new_tokens=85),
    group(1, prompt=tuple(range(3, 60)), samples=4, temperature=0.6, max_new_tokens=30),
    group(2, prompt=(7,), samples=2, temperature=0.0, max_new_tokens=85),
    group(3, prompt=tuple(range(2, 34)), samples=3, max_new_tokens=25),
]


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"stop_below": 0.5, "max_tokens": 3}])
@pytest.mark.parametrize("pages", [200, 6])
def test_the_policy_as_its_own_draft_model_is_always_right(folder, options, pages):
    """With 6 pages, sequences are preempted again and again."""
    ours = drafter(folder, **options)
    kv_bytes = pages * 2 * 2 * 2 * PAGE * 8 * 4
    made = generator(folder, ours, max_length=90, kv_bytes=kv_bytes)
    for request in MIXED:
        made.add(request)
    done = finish(made)
    stats = made.stats()
    assert len(done) == 12 and stats.drafter_failures == 0
    assert (stats.preemptions > 0) == (pages == 6)
    assert stats.drafted > 100
    if options.get("greedy"):
        assert stats.accepted < stats.drafted  # at temperature 1 the likeliest token is one of many
    else:
        assert stats.accepted == stats.drafted
    assert ours._own.cache.free == ours._own.cache.pages  # nothing is held when all have ended


TRUNCATED = [{"top_k": 1}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}]


@pytest.mark.parametrize("settings", [*([one] for one in TRUNCATED), [{}, {"temperature": 0.0}, *TRUNCATED]], ids=str)
def test_the_policy_as_its_own_draft_model_is_right_under_truncation(folder, settings):
    made = generator(folder, drafter(folder, stop_below=0.0))
    for id, own in enumerate(settings):
        made.add(group(id, samples=4, max_new_tokens=25, **own))
    assert len(finish(made)) == 4 * len(settings)
    stats = made.stats()
    assert stats.accepted == stats.drafted >= 75 * len(settings) and stats.drafter_failures == 0


def test_greedy_text_is_the_same_with_another_model_drafting(folder, other):
    requests = [group(i, prompt=(1, 5 + i), temperature=0.0, max_new_tokens=40) for i in range(5)]
    found = []
    for made in (generator(folder, None), generator(folder, drafter(other))):
        for request in requests:
            made.add(request)
        found.append(texts(finish(made)))
    assert found[0] == found[1]
    assert 0 < made.stats().accepted < made.stats().drafted


def test_the_prompt_of_a_group_is_read_once(folder):
    ours, prompt = drafter(folder), tuple(1 + i % 50 for i in range(90))
    made = generator(folder, ours)
    made.add(group(0, prompt=prompt, samples=6, max_new_tokens=6))
    finish(made)
    once, rest = 89, 6 * (1 + 6 + 5)
    assert once < ours.counters()["tokens_read"] <= once + rest


def test_a_sequence_that_was_not_drafted_for_is_caught_up_with(folder, monkeypatch):
    """Budgets come and go; the policy itself is right all the same after any pause."""
    monkeypatch.setattr("drafters.rehearsal.STOP", -1)
    ours = drafter(folder, stop_below=0.0)
    rehearsal = Rehearsal(ours, load_decoder(folder, "float32", "cpu"), budget=4)
    rehearsal.begin([SequenceStart(i, np.arange(1, 20 + i), i, 1.0, i) for i in range(6)], limit=60)
    for step in range(25):
        rehearsal.budget = (4, 0, 0, 0, 0, 3)[step % 6]
        if rehearsal.live:
            rehearsal.step()
    assert rehearsal.drafted > 20 and rehearsal.accepted == rehearsal.drafted


def test_memory_that_runs_out_costs_drafts_and_nothing_else(folder):
    ours = drafter(folder, kv_mb=5 * 2 * 2 * 2 * PAGE * 8 * 4 / 2**20)
    made = generator(folder, ours)
    for request in MIXED:
        made.add(request)
    assert len(finish(made)) == 12
    assert ours.counters()["no_room"] > 0 and made.stats().accepted == made.stats().drafted > 0
    with pytest.raises(UsageError, match="kv_mb"):
        generator(folder, drafter(folder, kv_mb=1e-6))


def test_a_draft_does_not_go_beyond_what_the_model_was_made_for(folder, tmp_path):
    short = save_tiny(tmp_path, max_position_embeddings=16)
    made = generator(folder, drafter(short))
    made.add(group(max_new_tokens=40))
    finish(made)
    assert 0 < made.stats().drafted <= 16


# ---- what cannot draft -------------------------------------------------------------------------------------------


def with_tokenizer(source, folder, words):
    shutil.copytree(source, folder)
    builder = Builder(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    builder.pre_tokenizer = pre_tokenizers.Whitespace()
    builder.save(str(folder / "tokenizer.json"))
    return folder


def test_another_tokenizer_is_refused_naming_the_first_token(folder, other, tmp_path):
    words = [f"w{i}" for i in range(60)]
    policy = with_tokenizer(folder, tmp_path / "policy", words)
    same = with_tokenizer(other, tmp_path / "same", words)
    swapped = with_tokenizer(other, tmp_path / "swapped", [*words[:17], "w18", "w17", *words[19:]])
    shorter = with_tokenizer(other, tmp_path / "shorter", words[:50])
    generator(policy, drafter(same))
    with pytest.raises(UsageError, match="first token that differs is 17, 'w18' there and 'w17' in the policy's"):
        generator(policy, drafter(swapped))
    with pytest.raises(UsageError, match="differs is 50, none there and 'w50'"):
        generator(policy, drafter(shorter))
    piece = {"name": "draft-model", "path": str(swapped)}
    arbiter = build({"name": "arbiter", "drafters": ["suffix-automaton", piece]})
    with pytest.raises(UsageError, match="differs is 17"):
        generator(policy, arbiter)


def test_a_padded_vocabulary_is_no_other_tokenizer(folder, tmp_path):
    words = [f"w{i}" for i in range(60)]
    policy = with_tokenizer(folder, tmp_path / "policy", words)
    for size in (60, 64):
        wide = save_tiny(tmp_path / f"{size}", seed=2, vocab_size=size)
        ours = drafter(with_tokenizer(wide, tmp_path / f"{size} tokens", words))
        made = generator(policy, ours)
        made.add(group(samples=4))
        finish(made)
        assert made.stats().drafter_failures == 0 and made.stats().drafted > 0


def test_a_token_of_the_policys_padding_is_read_as_another(folder, tmp_path):
    words = [f"w{i}" for i in range(60)]
    policy = with_tokenizer(folder, tmp_path / "policy", words)
    narrow = with_tokenizer(save_tiny(tmp_path / "60", seed=2, vocab_size=60), tmp_path / "narrow", words)
    made = generator(policy, drafter(narrow))
    made.add(group(prompt=(5, 60, 60), samples=2))
    finish(made)
    assert made.stats().drafter_failures == 0 and made.stats().drafted > 0


def test_what_is_no_checkpoint_is_refused_in_one_sentence(folder, tmp_path):
    with pytest.raises(UsageError, match="needs a checkpoint"):
        build({"name": "draft-model"})
    with pytest.raises(UsageError, match="does not exist"):
        drafter(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="vocabulary of 40 tokens, the policy one of 61"):
        generator(folder, drafter(save_tiny(tmp_path / "a", vocab_size=40)))
    broken = shutil.copytree(folder, tmp_path / "b")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UsageError, match="no tensor"):
        generator(folder, drafter(broken))


# ---- drawing -----------------------------------------------------------------------------------------------------


def request(rows, temperature=1.0):
    return DraftRequest(list(range(rows)), np.full(rows, 3), np.full(rows, temperature, np.float32))


def test_tokens_are_drawn_from_what_is_stated():
    rows, logits = 4000, torch.tensor([0.5, 1.5, -1.0, 0.0, 9.0])
    drawing = Drawing(
        request(rows, 0.7), np.full(rows, 2), np.zeros(rows, np.int64), np.arange(rows), vocab_size=4
    )  # fmt: skip
    for _ in range(2):
        drawing.draw(logits.expand(rows, -1))
    proposal = drawing.proposal()
    law = torch.softmax(logits[:4] / 0.7, 0)
    torch.testing.assert_close(proposal.probabilities[7, 1], law)
    pairs = np.bincount(proposal.token_ids @ [4, 1], minlength=16) / rows
    np.testing.assert_allclose(pairs, np.outer(law, law).ravel(), atol=0.03)


def drawn(logits, truncation, temperatures, greedy=False):
    """A first token of each row."""
    rows = len(logits)
    drawing = Drawing(
        DraftRequest(list(range(rows)), np.full(rows, 1), temperatures, truncation),
        np.full(rows, 1), np.arange(rows), np.zeros(rows, np.int64), vocab_size=logits.shape[1], greedy=greedy,
    )  # fmt: skip
    drawing.draw(logits)
    return drawing.proposal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "any device"])
def test_what_truncation_leaves_out_is_never_drawn_and_other_rows_are_as_without_it(dtype):
    each = [SamplingParams(**own) for own in ({}, *TRUNCATED, {"temperature": 0.0, "top_k": 2}, {"top_p": 0.9})] * 300
    temperatures = np.array([params.temperature for params in each], np.float32)
    logits = 2 * torch.randn(len(each), 40, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found, plain = (drawn(logits, truncation, temperatures) for truncation in (Truncation.of(each), None))
    q, tokens = found.probabilities[:, 0], found.token_ids[:, 0]
    np.testing.assert_allclose(q.double().sum(1), 1, atol=1e-5)
    for row, params in enumerate(each):
        if params.truncates:
            law = processed_law(logits[row].double().numpy(), params)
            np.testing.assert_allclose(q[row], law, atol=1e-5)
            assert ((q[row] > 0).numpy() == (law > 0)).all() and law[tokens[row]] > 0
    others = np.array([not params.truncates for params in each])
    assert (q[others] == plain.probabilities[others, 0]).all() and (tokens == plain.token_ids[:, 0])[others].all()
    assert (found.confidences == plain.confidences)[others].all()


def test_greedy_drafts_know_no_truncation():
    logits, ones = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), np.ones(5, np.float32)
    truncation = Truncation.of([SamplingParams(top_k=2)] * 5)
    found, plain = (drawn(logits, t, ones, greedy=True) for t in (truncation, None))
    assert found.probabilities is None and (found.confidences == plain.confidences).all()
    assert (found.token_ids == plain.token_ids).all()


def test_a_draft_ends_with_the_first_uncertain_token_whatever_that_is():
    sure, unsure = torch.tensor([5.0, 0, 0]), torch.tensor([0.5, 0, 0])
    drawing = Drawing(
        request(3), np.array([3, 3, 0]), np.zeros(3, np.int64), np.zeros(3, np.int64), vocab_size=3, stop_below=0.6
    )
    drawing.draw(torch.stack([sure, unsure]))
    assert drawing.rows.tolist() == [0]
    drawing.draw(unsure[None])
    assert drawing.rows.tolist() == []
    proposal = drawing.proposal()
    assert proposal.lengths.tolist() == [2, 1, 0] and proposal.sampled.tolist() == [True, True, True]
    assert proposal.confidences[0, 0] == pytest.approx(torch.softmax(sure, 0)[0].item())


class PickyDrawing(Drawing):
    """Leaves a draft out whose first token is not likely: what is left is not drawn from what is stated."""

    def proposal(self):
        proposal = super().proposal()
        first = torch.from_numpy(proposal.token_ids[:, :1])
        unlikely = proposal.probabilities[:, 0].gather(1, first).squeeze(1).numpy() < 0.37
        proposal.lengths[unlikely] = 0
        return proposal


def test_leaving_out_what_looks_bad_is_caught(tmp_path, monkeypatch):
    path = save_like_the_kits(tmp_path)
    check_distribution(lambda: drafter(path, stop_below=0.0), 1500)
    monkeypatch.setattr("drafters.draft_model.Drawing", PickyDrawing)
    with pytest.raises(AssertionError, match="do not follow the target"):
        check_distribution(lambda: drafter(path, stop_below=0.0), 1500)
