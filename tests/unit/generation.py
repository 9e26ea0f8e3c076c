"""Drafters and helpers for tests of the native generator."""

import numpy as np
import torch

from drafters.base import BaseDrafter, Proposal
from pipeline.engine.generator import GroupRequest
from pipeline.messages import SamplingParams
from tests.unit.tiny_models import VOCABULARY


def group(id=0, prompt=(1, 5, 9, 3), samples=1, temperature=1.0, max_new_tokens=20, stop=(), seed=None, **settings):
    first = 1000 * id if seed is None else seed
    sampling = SamplingParams(
        temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=tuple(stop), **settings
    )
    return GroupRequest(id, np.array(prompt, np.int64), sampling, tuple(range(first, first + samples)))


def finish(generator):
    """Everything the generator has to do, by (group, sample)."""
    done = {}
    while generator.has_work():
        for sample in generator.step():
            assert (sample.group, sample.sample) not in done
            done[sample.group, sample.sample] = sample
    return done


def texts(done):
    return {key: sample.token_ids.tolist() for key, sample in done.items()}


class Scripted(BaseDrafter):
    """Deterministic drafts from a function of (sequence start, tokens so far, budget)."""

    name = "scripted"

    def __init__(self, guess):
        self.guess, self.starts, self.emitted = guess, {}, {}

    def begin(self, sequences):
        for start in sequences:
            self.starts[start.id], self.emitted[start.id] = start, []

    def propose(self, request):
        rows = zip(request.ids, request.budgets, strict=True)
        drafts = [list(self.guess(self.starts[i], self.emitted[i], int(budget)))[:budget] for i, budget in rows]
        token_ids = np.zeros((len(drafts), max(map(len, drafts)) + 2), np.int64)
        for row, draft in enumerate(drafts):
            token_ids[row, : len(draft)] = draft
        return Proposal(token_ids, np.array([len(d) for d in drafts]))

    def observe(self, verified):
        for i, tokens in zip(verified.ids, verified.emitted, strict=True):
            self.emitted[i] += tokens.tolist()

    def end(self, ids):
        for i in ids:
            del self.starts[i], self.emitted[i]


def oracle(by_seed):
    """Drafts the text that each seed is going to sample."""
    return Scripted(lambda start, emitted, budget: by_seed[start.seed][len(emitted) : len(emitted) + budget])


def hostile(seed=0):
    """Random tokens, random lengths, the vocabulary's ends often."""
    rng = np.random.default_rng(seed)

    def guess(start, emitted, budget):
        return rng.choice([0, VOCABULARY - 1, *range(VOCABULARY)], rng.integers(0, budget + 1))

    return Scripted(guess)


class Sampled(BaseDrafter):
    """Draws drafts from a fixed random distribution for each depth, with its own generator; sometimes fewer."""

    name = "sampled"

    def __init__(self, seed=0, sharpness=1.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.law = torch.softmax(sharpness * torch.randn(8, VOCABULARY, generator=self.generator), -1)

    def propose(self, request):
        budgets = torch.from_numpy(request.budgets)
        lengths = (torch.rand(len(budgets), generator=self.generator) * (budgets + 1)).long()
        q = self.law[: max(1, int(lengths.max()))].expand(len(budgets), -1, -1)
        drawn = torch.multinomial(q.flatten(0, 1), 1, generator=self.generator).view(q.shape[:2])
        return Proposal(drawn.numpy(), lengths.numpy(), q)
