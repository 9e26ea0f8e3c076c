"""A draft head trained beside the policy: nothing of it reaches the policy, and both are published together."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file

from drafters.mtp.head import FILE
from drafters.mtp.training import CHECKPOINT
from drafters.registry import build
from learner import checkpoint
from learner.co_training import HeadCoTraining
from learner.policy import policy_state
from learner.trainer import adamw
from pipeline.cli import main
from pipeline.config import check_config
from pipeline.config.load import load_config
from pipeline.config.types import DrafterSection, LearnerSection
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.failpoints import arm
from pipeline.models.config import ModelConfig
from pipeline.weights.filesystem import FilesystemFollower, FilesystemPublisher, save_tensors
from tests.unit.generation import finish, group
from tests.unit.learner_samples import batch, tiny_folder, tiny_policy
from tests.unit.test_trainer import parameters_of, trainer_of

SECTION = DrafterSection(co_train=True, depths=2, co_learning_rate=1e-3, batch_tokens=200)


def head_for(folder, model, **options):
    return HeadCoTraining(model, ModelConfig.from_folder(folder), SECTION, [], 0, **options)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_policy_and_its_gradients_are_bitwise_those_without_a_head(tmp_path, compute):
    folder = tiny_folder(tmp_path / "model")
    alone, beside = tiny_policy(tmp_path / "a"), tiny_policy(tmp_path / "b")
    head = head_for(folder, beside, compute=compute)
    begun = copy.deepcopy(head.training.module.weights())
    trainers = trainer_of(alone), trainer_of(beside)
    for step in range(3):
        groups = batch(np.random.default_rng(step))
        expected = trainers[0].train(groups, step)
        state = torch.get_rng_state()
        # gradients that are there at the time stay as they are
        kept = [torch.full_like(p, 7.0) for p in beside.parameters()]
        for p, g in zip(beside.parameters(), kept, strict=True):
            p.grad = g.clone()
        metrics = head.train(groups)
        assert all(torch.equal(p.grad, g) for p, g in zip(beside.parameters(), kept, strict=True))
        assert torch.equal(torch.get_rng_state(), state)
        beside.zero_grad(set_to_none=True)
        assert metrics["draft_head_loss"] > 0 and 0 < metrics["draft_head_acceptance_1"] < 1
        found = trainers[1].train(groups, step)
        assert found["grad_norm"] == expected["grad_norm"] and found["loss"] == expected["loss"]
        for (name, a), b in zip(parameters_of(alone).items(), parameters_of(beside).values(), strict=True):
            assert torch.equal(a, b), name
    changed = [not torch.equal(begun[n], w) for n, w in head.training.module.weights().items()]
    assert all(changed)


def test_head_learns_from_the_batch_and_goes_on_from_a_checkpoint(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    model = tiny_policy(tmp_path / "a")
    groups = batch(np.random.default_rng(0))
    head = head_for(folder, model)
    losses = [head.train(groups)["draft_head_loss"] for _ in range(12)]
    assert losses[-1] < losses[0]
    again = head_for(folder, model)
    for _ in range(5):
        again.train(groups)
    arm("tensors.write=enospc*1")
    with pytest.raises(OSError, match="No space"):
        again.save(tmp_path / "draft-head", 5, keep=1)
    assert not head_for(folder, model).restore(tmp_path / "draft-head", 5), "a part is no head"
    arm("")
    again.save(tmp_path / "draft-head", 5, keep=1)
    resumed = head_for(folder, model)
    assert not resumed.restore(tmp_path / "draft-head", 4) and resumed.restore(tmp_path / "draft-head", 5)
    assert [resumed.train(groups)["draft_head_loss"] for _ in range(7)] == losses[5:]
    for step in (6, 7, 8):
        again.save(tmp_path / "draft-head", step, keep=1)
    assert {path.name for path in (tmp_path / "draft-head").iterdir()} == {"step-7", "step-8"}


def test_a_head_saved_before_its_first_step_and_a_damaged_one_are_no_end(tmp_path):
    folder, model = tiny_folder(tmp_path / "model"), tiny_policy(tmp_path / "a")
    root, groups = tmp_path / "draft-head", batch(np.random.default_rng(0))
    head = head_for(folder, model)
    head.save(root, 0, keep=1)
    resumed = head_for(folder, model)
    assert resumed.restore(root, 0)
    assert resumed.train(groups) == head.train(groups)
    head.save(root, 1, keep=1)
    os.truncate(root / "step-1" / CHECKPOINT, 1000)
    assert not head_for(folder, model).restore(root, 1)


@pytest.mark.parametrize("shape", [None, (3, 4)])
def test_a_checkpoint_of_another_head_is_none(tmp_path, shape):
    folder, model = tiny_folder(tmp_path / "model"), tiny_policy(tmp_path / "a")
    head = head_for(folder, model)
    head.save(tmp_path / "draft-head", 0, keep=1)
    path = tmp_path / "draft-head" / "step-0" / CHECKPOINT
    tensors = load_file(path)
    del tensors["mtp.fc.weight"]
    save_tensors(tensors | ({"mtp.fc.weight": torch.zeros(shape)} if shape else {}), path)
    before = copy.deepcopy(head.training.module.weights())
    assert not head.restore(tmp_path / "draft-head", 0)
    assert all(torch.equal(before[name], w) for name, w in head.training.module.weights().items())


def test_publication_brings_policy_and_head_together(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    model = tiny_policy(tmp_path / "model")
    head = head_for(folder, model)
    publisher = FilesystemPublisher(tmp_path / "weights", 3, folder)

    def publish(step):
        tensors = {n: t.contiguous().clone() for n, t in policy_state(model).items()}
        return publisher.publish(tensors | head.tensors(torch.float32), step)

    publish(0)
    follower = FilesystemFollower(tmp_path / "weights")
    first, _ = follower.fetch(0)
    generator = NativeGenerator(first, drafter=build({"name": "mtp"}), max_sequences=4, stop_token_ids=(), version=0,
                                dtype="float32", device="cpu")  # fmt: skip
    generator.add(group(samples=4, max_new_tokens=40))
    for _ in range(3):
        generator.step()
    head.train(batch(np.random.default_rng(1)))
    publish(1)
    generator.load_weights(*reversed((1, follower.fetch(1)[0])))
    drafter = generator._drafting._drafter
    torch.testing.assert_close(drafter._head.final_norm, head.training.module.norm.weight.detach())
    finish(generator)
    assert generator.stats().drafter_failures == 0 and generator.stats().drafted > 0
    assert isinstance(first, Path)


def test_an_exported_run_brings_its_head(tmp_path, capsys):
    folder, run = tiny_folder(tmp_path / "model"), tmp_path / "run"
    model = tiny_policy(tmp_path / "model")
    head = head_for(folder, model)
    for step in (1, 2):
        head.train(batch(np.random.default_rng(step)))
        head.save(run / "draft-head", step, keep=2)
        checkpoint.save(run / "checkpoints", step, model, adamw(model, LearnerSection()), {"step": step})
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "step-2, with its draft head in mtp.safetensors" in capsys.readouterr().out
    generator = NativeGenerator(out, drafter=build({"name": "mtp"}), max_sequences=4, stop_token_ids=(),
                                dtype="float32", device="cpu")  # fmt: skip
    generator.add(group(samples=4, max_new_tokens=20))
    finish(generator)
    assert generator.stats().drafter_failures == 0 and generator.stats().drafted > 0
    loaded = generator._drafting._drafter._head
    torch.testing.assert_close(loaded.final_norm, head.training.module.norm.weight.detach())
    assert main(["export", str(run), "--step", "1", "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "half" / FILE).values()} == {torch.bfloat16}
    os.truncate(run / "draft-head" / "step-1" / FILE, 100)
    assert main(["export", str(run), "--step", "1", "--out", str(tmp_path / "damaged")]) == 2
    assert "mtp.safetensors is truncated" in capsys.readouterr().err
    assert not list(tmp_path.glob("*damaged*"))


def test_a_head_is_warmed_up_before_the_loss_that_needs_it(tmp_path):
    folder, model = tiny_folder(tmp_path / "model"), tiny_policy(tmp_path / "a")
    section = structs.replace(SECTION, loss="tv", warm_up_loss="ce", warm_up=0.5, steps=6)
    head = HeadCoTraining(model, ModelConfig.from_folder(folder), section, [], 0)
    asked, fit = [], head.training.fit

    def fitted(batch, name):
        asked.append(name)
        return fit(batch, name)

    head.training.fit = fitted
    for step in range(6):
        head.train(batch(np.random.default_rng(step)))
    assert asked == ["ce"] * 3 + ["tv"] * 3


def test_the_warm_up_is_a_part_of_the_runs_steps_and_a_missing_head_is_refused(tmp_path):
    folder, model = tiny_folder(tmp_path / "model"), tiny_policy(tmp_path / "model")
    config = load_config(None, ["drafter.co_train=true", "run.steps=40"])
    head = HeadCoTraining.from_config(config, model, folder)
    head.training.step = 20
    assert head.training.objective == "lk-lambda"
    head.training.step = 21
    assert head.training.objective == "e2e-tv"
    config.drafter.start = str(folder)
    with pytest.raises(UsageError, match=r"drafter\.start = .* holds no head"):
        HeadCoTraining.from_config(config, model, folder)


@pytest.mark.parametrize("drafter", ["none", '{name = "suffix-automaton"}', '{name = "arbiter", drafters = ["none"]}'])
def test_a_head_that_nobody_drafts_with_is_not_trained(drafter):
    with pytest.raises(UsageError, match=r"engine\.drafter \(.*\) does not draft with"):
        check_config(load_config(None, ["drafter.co_train=true", f"engine.drafter={drafter}"]))


@pytest.mark.parametrize(
    "drafter",
    [
        "mtp", '{name = "arbiter", drafters = ["none", {name = "mtp", max_tokens = 2}]}',
        '{name = "suffix-automaton", auxiliary = "mtp"}', "mine:Drafter",
    ],
)  # fmt: skip
def test_a_head_that_a_drafter_or_a_part_of_one_reads_is_trained(drafter):
    check_config(load_config(None, ["drafter.co_train=true", f"engine.drafter={drafter}"]))
