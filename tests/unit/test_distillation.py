"""The small model of switching, distilled beside the policy: nothing of it reaches the policy, the engine gets it."""

import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.distillation import FILE, Distillation
from learner.policy import load_policy, policy_state
from pipeline.config import check_config, load_config
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.native.switching import SwitchingRule
from pipeline.errors import UsageError
from pipeline.failpoints import arm
from pipeline.messages import Role, Sampler
from pipeline.models.checkpoint import load_decoder
from pipeline.weights.filesystem import FilesystemFollower, FilesystemPublisher
from tests.unit.generation import finish, group
from tests.unit.learner_samples import batch, tiny_folder, tiny_policy
from tests.unit.test_trainer import parameters_of, trainer_of
from tests.unit.tiny_models import reference, reference_logits, save_tiny

VOCABULARY = 64


@pytest.fixture
def small_folder(tmp_path):
    return save_tiny(tmp_path / "small", seed=5, num_hidden_layers=1, vocab_size=VOCABULARY)


@pytest.fixture
def policy(tmp_path):
    return tiny_policy(tmp_path / "policy")


def distillation(policy, small_folder, tokens=10_000, learning_rate=1e-3):
    return Distillation(policy, load_policy(small_folder, "cpu"), learning_rate, tokens)


def by_hand(policy_folder, small_folder, samples, width=VOCABULARY):
    """Mean KL in nats over generated tokens, one sequence at a time, in float64."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for folder in (policy_folder, small_folder)
    ]
    terms = []
    for sample in samples:
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))
        logs = []
        for model in models:
            known = ids.clamp(max=model.config.vocab_size - 1)
            logits = model(known[None]).logits[0, len(sample.prompt_ids) - 1 : -1, :width]
            logs.append(logits.detach().log_softmax(-1))
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        terms.append(kl[torch.from_numpy(sample.roles == Role.GENERATED)])
    return float(torch.cat(terms).mean())


def test_the_loss_is_the_divergence_of_generated_tokens_and_falls(policy, tmp_path, small_folder, monkeypatch):
    monkeypatch.setattr("learner.distillation.CHUNK", 7)
    groups, trained = batch(0), distillation(policy, small_folder)
    samples = [sample for group in groups for sample in group]
    first = trained.train(groups)
    assert first["small_model_kl"] == pytest.approx(by_hand(tmp_path / "policy", small_folder, samples), rel=1e-4)
    assert first["small_model_tokens"] == sum(int((s.roles == Role.GENERATED).sum()) for s in samples)
    losses = [first["small_model_kl"], *(trained.train(groups)["small_model_kl"] for _ in range(10))]
    assert losses[-1] < 0.8 * losses[0]


def test_of_a_batch_only_as_much_is_read_as_was_allowed(policy, tmp_path, small_folder):
    groups = batch(0)
    samples = [sample for group in groups for sample in group]
    length = len(samples[0].prompt_ids) + len(samples[0].token_ids)
    found = distillation(policy, small_folder, tokens=length).train(groups)
    assert found["small_model_kl"] == pytest.approx(by_hand(tmp_path / "policy", small_folder, samples[:1]), rel=1e-4)
    assert distillation(policy, small_folder, tokens=3).train(groups) == {}


def test_vocabularies_that_are_padded_differently_are_compared_where_both_have_ids(policy, tmp_path):
    small_folder = save_tiny(tmp_path / "narrow", seed=5, num_hidden_layers=1, vocab_size=60)
    groups = batch(0)
    found = distillation(policy, small_folder).train(groups)["small_model_kl"]
    samples = [sample for group in groups for sample in group]
    assert max(int(s.token_ids.max()) for s in samples) >= 60
    assert found == pytest.approx(by_hand(tmp_path / "policy", small_folder, samples, 60), rel=1e-4)


def test_policy_and_its_gradients_are_bitwise_those_without_distillation(tmp_path, small_folder):
    alone, beside = tiny_policy(tmp_path / "a"), tiny_policy(tmp_path / "b")
    trained = distillation(beside, small_folder)
    trainers = trainer_of(alone), trainer_of(beside)
    for step in range(2):
        groups = batch(step)
        expected = trainers[0].train(groups, step)
        state = torch.get_rng_state()
        trained.train(groups)
        assert torch.equal(torch.get_rng_state(), state)
        assert trainers[1].train(groups, step)["grad_norm"] == expected["grad_norm"]
    for (name, a), b in zip(parameters_of(alone).items(), parameters_of(beside).values(), strict=True):
        assert torch.equal(a, b), name


def test_it_goes_on_from_a_checkpoint(policy, tmp_path, small_folder):
    groups, trained = batch(0), distillation(policy, small_folder)
    for _ in range(3):
        trained.train(groups)
    arm("tensors.write=enospc*1")
    with pytest.raises(OSError, match="No space"):
        trained.save(tmp_path / "kept", 3, keep=1)
    arm("")
    assert not distillation(policy, small_folder).restore(tmp_path / "kept", 3), "a part is no model"
    trained.save(tmp_path / "kept", 3, keep=1)
    expected = [trained.train(groups)["small_model_kl"] for _ in range(3)]
    resumed = distillation(policy, small_folder)
    assert not resumed.restore(tmp_path / "kept", 2) and resumed.restore(tmp_path / "kept", 3)
    assert [resumed.train(groups)["small_model_kl"] for _ in range(3)] == expected
    for step in (4, 5):
        trained.save(tmp_path / "kept", step, keep=1)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"step-4", "step-5"}


def test_a_small_model_saved_before_its_first_step_and_a_damaged_one_are_no_end(policy, tmp_path, small_folder):
    groups, trained = batch(0), distillation(policy, small_folder)
    trained.save(tmp_path / "kept", 0, keep=1)
    resumed = distillation(policy, small_folder)
    assert resumed.restore(tmp_path / "kept", 0)
    assert resumed.train(groups) == trained.train(groups)
    os.truncate(tmp_path / "kept" / "step-0" / FILE, 1000)
    assert not distillation(policy, small_folder).restore(tmp_path / "kept", 0)


def test_an_engine_samples_with_the_small_model_of_the_publication_it_stamps(policy, tmp_path, small_folder):
    folder, trained = tmp_path / "policy", distillation(policy, small_folder, learning_rate=1e-2)
    publisher = FilesystemPublisher(tmp_path / "weights", 3, folder)

    def publish():
        tensors = {name: t.contiguous().clone() for name, t in policy_state(policy).items()}
        return publisher.publish(tensors | trained.tensors(torch.float32), publisher.version + 1).version

    publish()
    follower = FilesystemFollower(tmp_path / "weights")
    rule = SwitchingRule(threshold=3.0, window=1, min_run=1)
    decoder = load_decoder(small_folder, "float32", "cpu")
    generator = NativeGenerator(
        follower.fetch(0)[0], dtype="float32", device="cpu", max_sequences=8, max_length=100, stop_token_ids=(),
        small_model=decoder, switching=rule, version=0,
    )  # fmt: skip
    generator.load_weights(follower.fetch(0)[0], 0)
    request = group(samples=4, max_new_tokens=40)
    generator.add(request)
    for _ in range(10):
        generator.step()
    for step in range(3):
        trained.train(batch(step))
    assert publish() == 1
    generator.load_weights(follower.fetch(1)[0], 1)
    for name, tensor in policy_state(trained._small).items():
        assert torch.equal(generator.small.decoder.tensors()[name], tensor), name
    finish(generator)
    # of sequences that begin now, every token of the small model is from the new one
    generator.add(group(7, samples=4, max_new_tokens=40))
    trained._small.save_pretrained(tmp_path / "after")
    after = reference(tmp_path / "after")
    for sample in finish(generator).values():
        ids = [*group(7).prompt_ids.tolist(), *sample.token_ids.tolist()]
        law = torch.log_softmax(reference_logits(after, ids)[len(ids) - 41 : -1].double(), -1)
        rows = np.flatnonzero(sample.samplers == Sampler.SWITCHED_MODEL)
        expected = law[torch.from_numpy(rows), torch.from_numpy(sample.token_ids[rows])]
        assert len(rows) and np.allclose(sample.logprobs[rows], expected.numpy(), atol=1e-4)
        assert (sample.versions == 1).all()


def test_a_small_model_of_another_shape_is_refused_and_nothing_changes(policy, tmp_path, small_folder):
    other = save_tiny(tmp_path / "other", seed=5, num_hidden_layers=2, vocab_size=VOCABULARY)
    tensors = {n: t.contiguous().clone() for n, t in policy_state(policy).items()}
    tensors |= distillation(policy, other).tensors(torch.float32)
    FilesystemPublisher(tmp_path / "weights", 3, tmp_path / "policy").publish(tensors, 0)
    generator = NativeGenerator(
        tmp_path / "policy", max_length=64, stop_token_ids=(), small_model=load_decoder(small_folder),
        switching=SwitchingRule(1.0),
    )  # fmt: skip
    before = generator.small.decoder.tensors()
    with pytest.raises(UsageError, match=r"small_model\.model\.layers\.1"):
        generator.load_weights(tmp_path / "weights" / "v0", 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.small.decoder.tensors().items())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.switching.distill=true"], "engine.switching.distill = True without engine.switching.small_model"),
        (["engine.switching.policy_share=0.4"], "switches to nothing"),
        (
            [
                "model.path=y",
                "engine.switching.small_model=x",
                "engine.switching.distill=true",
                "engine.switching.distill_tokens=9",
            ],
            "distill_tokens = 9 is less than one sample",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides, said):
    with pytest.raises(UsageError, match=said):
        check_config(load_config(None, overrides))


def test_ranks_are_refused(monkeypatch, policy, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_config(None, ["engine.switching.small_model=x", "engine.switching.distill=true"])
    with pytest.raises(UsageError, match="without torchrun"):
        Distillation.from_config(config, policy, tiny_folder(tmp_path / "again"))
