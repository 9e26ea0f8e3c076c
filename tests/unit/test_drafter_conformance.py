"""The kit that strangers test their drafters with: ours pass it, and every kind of mistake fails it."""

import functools
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from drafters.base import BaseDrafter, Proposal
from drafters.mtp.head import FILE
from drafters.none import NoDrafter
from drafters.prompt_lookup import PromptLookupDrafter
from drafters.registry import available, build
from drafters.rehearsal import VOCABULARY, tiny_target
from drafters.suffix_automaton import SuffixAutomatonDrafter
from drafters.testing import NotADrafter, check_drafter
from drafters.token_recycling import TokenRecyclingDrafter
from pipeline.weights.filesystem import save_tensors
from tests.unit.generation import Sampled as _Sampled
from tests.unit.test_mtp import module_for
from tests.unit.tiny_models import save_like_the_kits


@functools.cache
def draft_checkpoint() -> str:
    return str(save_like_the_kits(Path(tempfile.mkdtemp())))


@functools.cache
def head() -> str:
    """Folder of a head for the kit's model."""
    folder = Path(tempfile.mkdtemp())
    save_tensors(module_for(tiny_target().config).weights(), folder / FILE)
    return str(folder)


EXAMPLE = Path(__file__).resolve().parents[1] / "example_drafter"


class Sampled(_Sampled):
    """Draws from a fixed random law of the kit's vocabulary."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.law = torch.softmax(torch.randn(8, VOCABULARY, generator=self.generator), -1)


MAKERS = {
    "none": NoDrafter,
    "suffix-automaton": SuffixAutomatonDrafter,
    "suffix-automaton and token-recycling": lambda: build(
        {"name": "suffix-automaton", "auxiliary": "token-recycling", "auxiliary_below": 3}
    ),
    "prompt-lookup": lambda: PromptLookupDrafter(PromptLookupDrafter.Options(min_ngram=1)),
    "token-recycling": TokenRecyclingDrafter,
    "sampled": Sampled,
    "draft-model": lambda: build({"name": "draft-model", "path": draft_checkpoint()}),
    "layer-skip": lambda: build({"name": "layer-skip", "stop_below": 0.3, "refresh_every": 5}),
    "suffix-automaton and layer-skip": lambda: build(
        {"name": "suffix-automaton", "auxiliary": {"name": "layer-skip", "stop_below": 0.3, "refresh_every": 5}}
    ),
    "arbiter of a draft model that stops early": lambda: build(
        {
            "name": "arbiter",
            "measure": False,
            "drafters": [{"name": "draft-model", "path": draft_checkpoint(), "stop_below": 0.3}],
        }
    ),
    "arbiter of models": lambda: build(
        {
            "name": "arbiter",
            "measure": False,
            "drafters": ["suffix-automaton", "layer-skip", {"name": "draft-model", "path": draft_checkpoint()}],
        }
    ),
    "arbiter of mtp": lambda: build(
        {"name": "arbiter", "measure": False, "drafters": ["suffix-automaton", {"name": "mtp", "path": head()}]}
    ),
    "suffix-automaton and mtp": lambda: build(
        {"name": "suffix-automaton", "auxiliary": {"name": "mtp", "path": head()}}
    ),
    "suffix-automaton and draft-model": lambda: build(
        {
            "name": "suffix-automaton",
            "auxiliary": {"name": "draft-model", "path": draft_checkpoint()},
        }
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_drafters_keep_to_the_protocol(name):
    check_drafter(MAKERS[name], samples=1000)


class Lying(Sampled):
    """States a flatter distribution than it draws from."""

    def __init__(self):
        super().__init__()
        self.law = torch.softmax(4 * torch.randn(8, VOCABULARY, generator=self.generator), -1)

    def propose(self, request):
        proposal = super().propose(request)
        return Proposal(proposal.token_ids, proposal.lengths, torch.softmax(proposal.probabilities.log() / 4, -1))


class OverBudget(BaseDrafter):
    name = "over-budget"

    def propose(self, request):
        return Proposal(np.zeros((len(request.ids), 99), np.int64), request.budgets + 1)


class Forgetful(SuffixAutomatonDrafter):
    """Drops what is preempted and does not take it up again."""

    def preempt(self, ids):
        self.end(ids)

    def restore(self, sequences):
        pass


class Aliasing(SuffixAutomatonDrafter):
    """Hands out one buffer again and again; the kit copies, an engine may not: so the drafts must not change later."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def observe(self, verified):
        super().observe(verified)
        self.count += sum(int(e.sum()) for e in verified.emitted)

    def propose(self, request):
        Aliasing.leak = (getattr(Aliasing, "leak", 0) + self.count) % VOCABULARY
        return Proposal(np.full((len(request.ids), 1), Aliasing.leak), np.minimum(request.budgets, 1))


class Deaf(BaseDrafter):
    """Does not survive new weights."""

    name = "deaf"

    def weights_changed(self, version):
        raise RuntimeError("weights are for ever")


class Tilted(Sampled):
    """Draws one of two dozen tokens more often than its probabilities say, which moves few of the texts."""

    def propose(self, request):
        stated = torch.full((len(request.ids), 1, VOCABULARY), 1 / VOCABULARY)
        weights = torch.ones(VOCABULARY)
        weights[3] = 20
        drawn = torch.multinomial(weights, len(request.ids), replacement=True, generator=self.generator)
        return Proposal(drawn.numpy()[:, None], np.minimum(request.budgets, 1), stated)


class Picky(Sampled):
    """Leaves out the second token that it draws where it does not like it."""

    def propose(self, request):
        stated = torch.full((len(request.ids), 2, VOCABULARY), 1 / VOCABULARY)
        drawn = torch.randint(0, VOCABULARY, (len(request.ids), 2), generator=self.generator).numpy()
        return Proposal(drawn, np.minimum(request.budgets, np.where(drawn[:, 1] < 12, 2, 1)), stated)


class Unaccountable(BaseDrafter):
    name = "unaccountable"

    def counters(self):
        raise RuntimeError("lost count")


class Overwriting(BaseDrafter):
    """Writes into what it has proposed once it knows better."""

    name = "overwriting"

    def propose(self, request):
        self.tokens = np.full((len(request.ids), 1), 5)
        return Proposal(self.tokens, np.minimum(request.budgets, 1))

    def observe(self, verified):
        self.tokens[:] = 7


class Panicking(BaseDrafter):
    """Raises what is no Exception, as extensions in Rust do."""

    name = "panicking"

    def propose(self, request):
        raise BaseException("panicked")


class Wordless:
    name = "wordless"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Lying, "distribution: .*do not follow the target"),
        (OverBudget, "ragged batches: BadProposal: lengths"),
        (Forgetful, "ends and preemption: KeyError"),
        (Aliasing, "past alone: .*same past"),
        (Deaf, "new weights: RuntimeError: weights are for ever"),
        (Tilted, "distribution: .*token 1 of its drafts does not follow the probabilities stated for it"),
        (Picky, "distribution: .*token 2 of its drafts does not follow the probabilities stated for it"),
        (Unaccountable, "counters: RuntimeError: lost count"),
        (Overwriting, "ragged batches: .*writes into a proposal that it has handed out"),
        (Panicking, "ragged batches: BaseException: panicked"),
        (Wordless, "protocol: AssertionError: it lacks a method"),
    ],
)
def test_mistakes_are_found_and_named(make, message):
    with pytest.raises(NotADrafter, match=message):
        check_drafter(make, samples=1000)


def test_a_strangers_package_is_installed_found_and_passes(tmp_path, monkeypatch):
    lines = sum(len(path.read_text().splitlines()) for path in EXAMPLE.iterdir() if path.is_file())
    assert lines < 60
    source = tmp_path / "source"
    source.mkdir()
    for path in EXAMPLE.iterdir():
        if path.is_file():
            (source / path.name).write_text(path.read_text())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--target", str(tmp_path / "site"), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    info = next(i for i in available() if i.name == "repeat-last")
    assert info.source == "example-drafter 0.3" and info.options == ("times",)
    check_drafter(lambda: build({"name": "repeat-last", "times": 3}), samples=500)
