"""What vLLM drafts with by itself: our head in its form, a draft model, n-gram lookup."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.exactness import failures
from benchmarks.exactness_suite.generators import generate
from benchmarks.exactness_suite.model import random_checkpoint
from benchmarks.exactness_suite.rollouts import VOCABULARY, JointLaw
from benchmarks.exactness_suite.vllm import HEAD, settings_checks
from drafters.mtp.drafter import MTPDrafter
from drafters.mtp.head import FILE
from drafters.mtp.module import MTPModule
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.vllm.generator import VllmGenerator
from pipeline.errors import RunFailed
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.config import ModelConfig
from tests.unit.tiny_models import add_mimos_head, save_tiny
from tests.vllm.mtp_drafts import DEPTH, PROMPTS, TOKENS


def with_head(folder: Path, model: Path, seed: int) -> Path:
    """A head that guesses right now and then: the model's last layer, fed what the model itself reads."""
    torch.manual_seed(seed)
    module, decoder = MTPModule(ModelConfig.from_folder(model)), load_decoder(model, torch.float32)
    module.start_from(decoder.tensors(), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    folder.mkdir(exist_ok=True)
    save_file(module.weights(), folder / FILE)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = random_checkpoint(folder / "model", VOCABULARY, sharpness=1.0, seed=3, head_dim=HEAD, tied=True)
    newer = random_checkpoint(folder / "newer", VOCABULARY, sharpness=1.0, seed=4, head_dim=HEAD, tied=True)
    with_head(newer, newer, 6)
    return made, with_head(folder / "head", made, 5), newer


class Recorded(MTPDrafter):
    """Keeps what it drafted."""

    def __init__(self, options: MTPDrafter.Options) -> None:
        super().__init__(options)
        self.drafts: list[list[int]] = []

    def propose(self, request):
        proposal = super().propose(request)
        self.drafts += [row[:n].tolist() for row, n in zip(proposal.token_ids, proposal.lengths, strict=True)]
        return proposal


def native_drafts(model: Path, head: Path, prompt: list[int]) -> tuple[list[int], list[list[int]]]:
    drafter = Recorded(MTPDrafter.Options(path=str(head), max_tokens=DEPTH, greedy=True))
    generator = NativeGenerator(
        load_decoder(model, torch.float32), drafter=drafter, max_sequences=1, max_draft_tokens=DEPTH,
        max_length=len(prompt) + TOKENS, stop_token_ids=(),
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS)
    generator.add(GroupRequest(0, np.array(prompt), params, (1,)))
    tokens: list[int] = []
    while generator.has_work():
        for sample in generator.step():
            tokens = sample.token_ids.tolist()
    return tokens, drafter.drafts


def placed(tokens: list[int], drafts: list[list[int]], first: int) -> dict[int, tuple[int, ...]]:
    """Drafts of a whole length by the tokens that were known before them, `first` before the first."""
    found = {}
    for draft in drafts:
        if len(draft) == DEPTH:
            found[first] = tuple(draft)
        right = [mine == true for mine, true in zip(draft, tokens[first:], strict=False)]
        first += 1 + (right.index(False) if False in right else len(right))
    return found


def compared_drafts(
    model: Path, head: Path, *newer: Path, how: str = "files"
) -> list[list[tuple[tuple[int, ...], ...]]]:
    """(ours, vLLM's) wherever both drafted after the same text, of the model and of what it is updated to, which holds
    its own head."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.mtp_drafts", *map(str, (model, head, *newer)), *([how] if newer else [])],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = msgspec.json.decode(done.stdout.splitlines()[-1])
    found = []
    for answers, (target, folder) in zip(theirs, [(model, head), *zip(newer, newer, strict=True)], strict=True):
        pairs: list[tuple[tuple[int, ...], ...]] = []
        for prompt, (tokens, drafts) in zip(PROMPTS, answers, strict=True):
            ours, wanted = native_drafts(target, folder, prompt)
            assert tokens == ours
            # vLLM's first draft comes after a token, ours together with it
            mine, its = placed(ours, wanted, 0), placed(tokens, drafts, 1)
            pairs += [(mine[place], its[place]) for place in mine.keys() & its.keys()]
        assert len(pairs) > 20 and len(set(pairs)) > 5
        found.append(pairs)
    return found


@pytest.mark.parametrize("how", ["files", "broadcast"])
def test_both_generators_give_the_same_greedy_drafts_also_after_an_update(model, how):
    old, head, newer = model
    before, after = compared_drafts(old, head, newer, how=how)
    assert all(mine == its for mine, its in before + after)
    assert set(before) != set(after)


def test_both_generators_give_the_same_greedy_drafts_of_a_head_of_mimos(tmp_path):
    model = add_mimos_head(
        save_tiny(tmp_path, "Qwen2", head_dim=None, hidden_size=2 * HEAD, num_attention_heads=2, num_key_value_heads=1)
    )
    (pairs,) = compared_drafts(model, model)
    assert all(mine == its for mine, its in pairs)


def test_a_heads_probabilistic_drafts_keep_the_distribution_and_are_accepted(model):
    old, head, newer = model
    generator = VllmGenerator(
        old, drafter={"name": "mtp", "path": str(head), "max_tokens": DEPTH}, max_sequences=64, max_draft_tokens=8,
        max_length=64, dtype="float32", stop_token_ids=(), version=0, options={"enforce_eager": True},
    )  # fmt: skip
    try:
        some = {"temperature 0.8": SamplingParams(temperature=0.8), "top-k 3": SamplingParams(top_k=3)}
        checks = list(settings_checks(generator, "mtp", old, JointLaw(old), some, 500, 1, seed=5))
        assert not failures(checks), failures(checks)
        samples = generate(generator, [request(SamplingParams(max_new_tokens=40), 8)])
        counts = [sample.drafters["mtp"] for sample in samples]
        assert 0 < sum(c.accepted for c in counts) < sum(c.drafted for c in counts)
        generator.load_weights(newer, 1)
        checks = list(settings_checks(generator, "mtp", newer, JointLaw(newer), some, 500, 1, seed=7))
        assert not failures(checks), failures(checks)
    finally:
        generator.close()


@pytest.mark.parametrize(
    ("drafter", "own"),
    [
        ({"name": "draft-model", "max_tokens": 3}, None),
        ({"name": "none"}, {"method": "ngram", "prompt_lookup_max": 3, "num_speculative_tokens": 3}),
    ],
    ids=["draft model", "n-gram"],
)
def test_vllms_own_methods_keep_the_distribution(model, drafter, own, tmp_path):
    old = model[0]
    if drafter["name"] == "draft-model":
        drafter = {**drafter, "path": str(old)}  # its own draft model: nearly all is accepted
    options = {"enforce_eager": True} | ({"speculative_config": own} if own else {})
    generator = VllmGenerator(
        old, drafter=drafter, max_sequences=64, max_draft_tokens=8, max_length=64, dtype="float32", stop_token_ids=(),
        version=0, options=options,
    )  # fmt: skip
    try:
        some = {"temperature 0.8": SamplingParams(temperature=0.8)}
        checks = list(settings_checks(generator, drafter["name"], old, JointLaw(old), some, 500, 1, seed=5))
        assert not failures(checks), failures(checks)
        samples = generate(generator, [request(SamplingParams(max_new_tokens=40), 8)])
        drafted = [counts for sample in samples for counts in sample.drafters.values()]
        assert sum(c.accepted for c in drafted) > 0
        if drafter["name"] == "draft-model":
            assert sum(c.accepted for c in drafted) > 0.9 * sum(c.drafted for c in drafted)
        generator.load_weights(model[2], 1)
        (sample,) = generate(generator, [request(SamplingParams(max_new_tokens=5), 1)])
        assert (sample.versions == 1).all()
        (tmp_path / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(RunFailed, match=r"^publication 2 cannot be loaded: [^\n]*$"):
            generator.load_weights(tmp_path, 2)
    finally:
        generator.close()


def request(params: SamplingParams, seeds: int) -> GroupRequest:
    return GroupRequest(10**6, np.array(PROMPTS[0]), params, tuple(range(seeds)))
