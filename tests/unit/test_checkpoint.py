import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from learner import checkpoint
from learner.objective import Objective
from learner.trainer import Trainer
from pipeline.config.types import LearnerSection, ObjectiveSection
from pipeline.errors import RunFailed
from tests.unit.learner_samples import batch, tiny_folder, tiny_policy, transformers_class


class State(msgspec.Struct):
    step: int
    consumed: list[int]


def trainer_of(folder):
    model = tiny_policy(folder)
    section = LearnerSection(learning_rate=1e-3, minibatches=2)
    return Trainer(model, Objective.from_config(ObjectiveSection()), section, temperature=1.0)


def save(root, trainer, **options):
    state = State(step=trainer.step, consumed=[1, 2])
    return checkpoint.save(root, trainer.step, trainer.model, trainer.optimizer, state, **options)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    folder, root = tiny_folder(tmp_path / "model"), tmp_path / "checkpoints"
    first = trainer_of(folder)
    for step in range(3):
        first.train(batch(seed=step), publication=step)
    save(root, first)
    noise = torch.rand(3)
    for step in (3, 4):
        first.train(batch(seed=step), publication=step)

    second = trainer_of(folder)
    second.train(batch(seed=9), publication=0)
    torch.manual_seed(123)
    restored = checkpoint.restore(root, second.model, second.optimizer, State)
    assert (restored.step, restored.state) == (3, State(step=3, consumed=[1, 2]))
    assert torch.equal(torch.rand(3), noise)
    second.step = restored.step
    for step in (3, 4):
        second.train(batch(seed=step), publication=step)

    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_a_checkpoint_before_the_first_step_restores_an_empty_optimiser(tmp_path):
    trainer = trainer_of(tiny_folder(tmp_path / "model"))
    save(tmp_path / "checkpoints", trainer)
    trainer.train(batch(), publication=0)
    checkpoint.restore(tmp_path / "checkpoints", trainer.model, trainer.optimizer, State)
    assert not trainer.optimizer.state


def test_a_checkpoint_is_a_complete_hugging_face_folder(tmp_path):
    source = tiny_folder(tmp_path / "model")
    (source / "tokenizer.json").write_text("{}")
    trainer = trainer_of(source)
    trainer.train(batch(), publication=0)
    folder = save(tmp_path / "checkpoints", trainer)
    assert folder.name == "step-1"
    assert (folder / "tokenizer.json").read_text() == "{}"
    loaded = transformers_class(True).from_pretrained(folder)
    ours = trainer.model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in loaded.state_dict().items())


def test_old_checkpoints_are_pruned_and_the_newest_by_number_is_found(tmp_path):
    root, trainer = tmp_path / "checkpoints", trainer_of(tiny_folder(tmp_path / "model"))
    assert checkpoint.latest(root) is None
    for step in (8, 9, 10):
        trainer.step = step
        save(root, trainer, keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["step-10", "step-9"]
    assert checkpoint.latest(root) == root / "step-10"


def test_latest_ignores_temporaries_and_incomplete_folders(tmp_path):
    root, trainer = tmp_path / "checkpoints", trainer_of(tiny_folder(tmp_path / "model"))
    good = save(root, trainer)
    (root / ".tmp-step-7").mkdir()
    (root / "step-5").mkdir()
    trainer.step = 6
    truncated = save(root, trainer, keep=5)
    os.truncate(truncated / "optimizer.safetensors", 3)
    assert checkpoint.latest(root) == good
    trainer.step = 7
    save(root, trainer, keep=9)
    assert not list(root.glob(".tmp-*"))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damage_is_found_and_the_checkpoint_before_is_restored_with_a_message(tmp_path, file):
    root, trainer = tmp_path / "checkpoints", trainer_of(tiny_folder(tmp_path / "model"))
    trainer.train(batch(), publication=0)
    save(root, trainer)
    expected = weights(trainer)
    trainer.train(batch(), publication=1)
    newest = save(root, trainer)
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 0x80
    (newest / file).write_bytes(content)

    messages = []
    restored = checkpoint.restore(root, trainer.model, trainer.optimizer, State, messages.append)
    assert restored.step == 1
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())
    assert len(messages) == 1
    assert "step-2" in messages[0]
    assert (root / "step-2.corrupt").is_dir()


def test_without_an_intact_checkpoint_nothing_starts_over_silently(tmp_path):
    root, trainer = tmp_path / "checkpoints", trainer_of(tiny_folder(tmp_path / "model"))
    assert checkpoint.restore(root, trainer.model, trainer.optimizer, State) is None
    for saves in (1, 0, 1):  # where nothing was saved since, it finds what the one before renamed
        if saves:
            (save(root, trainer) / "rng.safetensors").unlink()
        with pytest.raises(RunFailed, match=r"no checkpoint in .* is intact"):
            checkpoint.restore(root, trainer.model, trainer.optimizer, State, lambda text: None)
    assert checkpoint.restore(root, trainer.model, trainer.optimizer, State, before=0) is None
    save(root, trainer)
    assert checkpoint.restore(root, trainer.model, trainer.optimizer, State).step == 0


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(tmp_path):
    root = tmp_path / "checkpoints"
    save(root, trainer_of(tiny_folder(tmp_path / "tied")))
    other = tiny_policy(tmp_path / "untied", tied=False)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(RunFailed, match="another model"):
        checkpoint.restore(root, other, torch.optim.AdamW(other.parameters()), State)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())
    assert checkpoint.latest(root) is not None


def test_saving_a_step_again_replaces_it(tmp_path):
    root, trainer = tmp_path / "checkpoints", trainer_of(tiny_folder(tmp_path / "model"))
    save(root, trainer)
    trainer.train(batch(), publication=0)
    trainer.step = 0
    save(root, trainer)
    expected = weights(trainer)
    trainer.train(batch(), publication=0)
    checkpoint.restore(root, trainer.model, trainer.optimizer, State)
    assert [path.name for path in root.iterdir()] == ["step-0"]
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


KILLED_WHILE_SAVING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from learner import checkpoint
from tests.unit.test_checkpoint import save, trainer_of
trainer = trainer_of(Path(sys.argv[2]) / "model")
root = Path(sys.argv[2]) / "checkpoints"
save(root, trainer)
trainer.step = 1
sync, calls = os.fsync, []
def dying(descriptor):
    calls.append(descriptor)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    sync(descriptor)
os.fsync = dying
save(root, trainer, keep=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sync", [1, 9])
def test_a_process_killed_while_saving_leaves_a_checkpoint_that_can_be_used(tmp_path, sync):
    trainer = trainer_of(tiny_folder(tmp_path / "model"))
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(Path(__file__).parents[2]), str(tmp_path), str(sync)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == -9, process.stderr
    restored = checkpoint.restore(tmp_path / "checkpoints", trainer.model, trainer.optimizer, State)
    assert restored.step in (0, 1)
    trainer.step = 2
    save(tmp_path / "checkpoints", trainer)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
