"""Sampling settings against their definitions, token by token in float64."""

import msgspec
import numpy as np
import pytest
import torch

from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.sampling.exactness import processed_law
from pipeline.sampling.processors import Processors
from pipeline.sampling.truncation import Truncation, truncate
from pipeline.sampling.verification import packed_rows

CPU = torch.device("cpu")
VOCABULARY, STOP = 40, (3, 7)
SETTINGS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "greedy": SamplingParams(temperature=0.0),
    "top-k": SamplingParams(top_k=5),
    "top-k of one": SamplingParams(top_k=1, temperature=1.3),
    "top-k of more than there are": SamplingParams(top_k=1000),
    "top-p": SamplingParams(top_p=0.8, temperature=1.2),
    "hardly any top-p": SamplingParams(top_p=1e-6),
    "min-p": SamplingParams(min_p=0.1),
    "all truncation": SamplingParams(temperature=1.4, top_k=9, top_p=0.7, min_p=0.02),
    "repetition": SamplingParams(repetition_penalty=1.5),
    "reward for repetition": SamplingParams(repetition_penalty=0.5, temperature=0.8),
    "presence": SamplingParams(presence_penalty=0.9),
    "frequency": SamplingParams(frequency_penalty=-0.5),
    "bias": SamplingParams(logit_bias=((4, 2.5), (9, -3.0)), temperature=0.7),
    "allowed": SamplingParams(allowed_token_ids=(1, 5, 9, 30), top_k=3),
    "bad": SamplingParams(bad_token_ids=(0, 1, 2, 3, 4)),
    "minimum length": SamplingParams(min_new_tokens=6),
    "greedy with settings": SamplingParams(temperature=0.0, top_p=0.5, repetition_penalty=3.0, logit_bias=((8, 3.0),)),
    "everything": SamplingParams(
        temperature=0.9, top_k=12, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, logit_bias=((2, 1.0), (7, 5.0)), allowed_token_ids=(*range(0, 40, 2), 7),
        bad_token_ids=(6, 8), min_new_tokens=5,
    ),
}  # fmt: skip


class Batch:
    """Sequences with settings, drafts of ragged lengths, and the logits of their scored positions."""

    def __init__(self, settings, seed=0, dtype=np.float32, vocabulary=VOCABULARY):
        rng = np.random.default_rng(seed)
        self.settings, self.processors = settings, Processors(vocabulary, CPU)
        self.prompts = [rng.integers(0, vocabulary, 6) for _ in settings]
        self.responses = [rng.integers(0, vocabulary, rng.integers(0, 8)) for _ in settings]
        self.slots = np.array(
            [self.processors.add(s, STOP, p) for s, p in zip(settings, self.prompts, strict=True)], np.int64
        )
        for part in range(2):
            self.processors.observe(self.slots, [response[part::2] for response in self.responses])
        self.lengths = rng.integers(0, 4, len(settings))
        self.drafts = rng.integers(0, vocabulary, (len(settings), 3))
        self.logits = rng.normal(0, 2, (int((self.lengths + 1).sum()), vocabulary)).astype(dtype)

    def target(self, **options):
        positions = np.array([len(r) for r in self.responses])
        logits = torch.from_numpy(self.logits)
        return self.processors.target(logits, self.slots, positions, self.drafts, self.lengths, **options)

    def law(self, n, **changes):
        """Of scored position n, by definition."""
        row, depth = (a[n] for a in packed_rows(self.lengths))
        response = [*self.responses[row].tolist(), *self.drafts[row, :depth].tolist()]
        params = msgspec.structs.replace(self.settings[row], **changes)
        return processed_law(self.logits[n].astype(np.float64), params, self.prompts[row].tolist(), response, STOP)


@pytest.mark.parametrize("seed", range(3))
def test_every_verified_row_of_a_mixed_batch_has_its_own_settings_and_context(seed):
    batch = Batch(list(SETTINGS.values()), seed)
    before = batch.logits.copy()
    target = batch.target()
    assert (batch.logits == before).all()
    row, _ = packed_rows(batch.lengths)
    for n in range(len(row)):
        params, law = batch.settings[row[n]], batch.law(n)
        np.testing.assert_allclose(target.probabilities[n], law, atol=2e-6, err_msg=str(params))
        recorded = batch.law(n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) if params.temperature == 0 else law
        np.testing.assert_allclose(target.logprobs[n].exp(), recorded, atol=2e-6)
        full = batch.law(n, temperature=params.temperature or 1.0, top_k=0, top_p=1.0, min_p=0.0)
        nats = -sum(p * np.log(p) for p in full if p > 0)
        assert target.entropies[n].item() == pytest.approx(nats, abs=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_alone_is_what_it_is_among_others(name):
    batch = Batch([SETTINGS[name]] * 5, dtype=np.float64)
    target = batch.target()
    for n in range(len(batch.logits)):
        np.testing.assert_allclose(target.probabilities[n], batch.law(n), atol=1e-7)


def test_kept_ids_are_the_tokens_that_can_be_drawn():
    names = ["all truncation", "plain", "top-p", "greedy", "allowed"]
    batch = Batch([SETTINGS[name] for name in names], seed=4)
    target = batch.target()
    row, _ = packed_rows(batch.lengths)
    counts, ids = target.kept.of(torch.ones(len(row), dtype=torch.bool))
    start = 0
    for n, count in enumerate(counts.tolist()):
        if batch.settings[row[n]].truncates:
            assert ids[start : start + count].tolist() == np.flatnonzero(batch.law(n)).tolist()
        else:
            assert count == 0
        start += count
    assert start == len(ids)
    some = torch.tensor([n % 2 == 0 for n in range(len(row))])
    fewer, _ = target.kept.of(some)
    assert fewer.tolist() == counts[some].tolist()
    assert Batch([SETTINGS["repetition"], SETTINGS["greedy"]]).target().kept is None


@pytest.mark.parametrize("mass", [0.5, 0.99, 0.999999])
def test_a_nucleus_wider_than_the_candidates_is_found(mass):
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 0.3, (4, 3000)))
    logits[3, 0] = 20.0
    logp = torch.log_softmax(logits, -1)
    mask = truncate(logp, Truncation(np.zeros(4, np.int64), np.array([mass, 1.0, mass, mass]), np.zeros(4)))
    for n, p in enumerate((mass, 1.0, mass, mass)):
        law = processed_law(logits[n].numpy(), SamplingParams(top_p=p))
        assert mask[n].tolist() == (law > 0).tolist()
    assert mask.sum(1)[0] > 256 and mask.sum(1)[3] < mask.sum(1)[0]


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    logp = torch.log_softmax(torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 1.0]]), -1)
    for k, kept in ((1, 1), (2, 4), (4, 4), (5, 6)):
        assert truncate(logp, Truncation(np.array([k]), np.ones(1), np.zeros(1))).sum() == kept
    first_two = float(logp[0, :2].exp().sum())
    assert truncate(logp, Truncation(np.array([0]), np.array([first_two - 0.01]), np.zeros(1))).sum() == 4


def test_slots_are_reused_and_counts_start_anew():
    processors = Processors(VOCABULARY, CPU)
    penalised, biased = SETTINGS["presence"], SETTINGS["bias"]
    for _ in range(40):
        slots = np.array(
            [processors.add(s, (), np.array([1])) for s in (penalised, biased, penalised, SamplingParams())]
        )
        assert sorted(slots) == [0, 1, 2, 3]
        logits = torch.zeros(4, VOCABULARY)
        args = (slots, np.zeros(4, np.int64), np.zeros((4, 0), np.int64), np.zeros(4, np.int64))
        fresh = processors.target(logits, *args).probabilities
        assert torch.equal(fresh[0], fresh[3]) and not torch.equal(fresh[1], fresh[3])
        processors.observe(slots, [np.array([4, 4]), np.array([4]), np.array([], np.int64), np.array([4])])
        grown = processors.target(logits, *args).probabilities
        assert grown[0, 4] < fresh[0, 4] and torch.equal(grown[2], fresh[2])
        for slot in slots.tolist():
            processors.remove(slot)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": ((40, 1.0),)}, r"logit_bias has token id 40, outside the vocabulary of 40"),
        ({"allowed_token_ids": (99,)}, "allowed_token_ids"),
        ({"bad_token_ids": (5, 41)}, "bad_token_ids has token id 41"),
        ({"allowed_token_ids": (5,), "bad_token_ids": (5,)}, "no token can be drawn"),
        ({"allowed_token_ids": STOP, "min_new_tokens": 1}, "no token can be drawn"),
        ({"stop_token_ids": (3, 40)}, "stop_token_ids has token id 40, outside the vocabulary of 40"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens = 9 is more than sampling.max_new_tokens = 8"),
        ({"temperature": 1e-40}, r"temperature = 1e-40 is too small .* 0 \(greedy\) or at least 1e-05"),
    ],
)
def test_settings_that_no_response_can_have_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        Processors(VOCABULARY, CPU).check(SamplingParams(**changes), STOP)
