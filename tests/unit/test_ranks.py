"""Several ranks train as one does. Real processes and gloo."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner import ranks
from learner.export import export
from tests.unit.learner_samples import tiny_folder
from tests.unit.rank_processes import run_ranks

TRAIN = """
import json, sys, torch
from learner import ranks
from learner.objective import Objective
from learner.policy import gathered_state, load_policy
from learner.trainer import Trainer
from pipeline.config.types import LearnerSection, ObjectiveSection
from pipeline.messages import Sampler
from tests.unit.learner_samples import batch
torch.set_num_threads(1)
ranks.start("cpu", 120)
folder, cases = sys.argv[1], json.loads(sys.argv[2])
def sampled(seed, groups, by_others):
    found = batch(seed=seed, groups=groups)
    for group in found[::2] if by_others else ():
        for sample in group:
            sample.samplers[::3] = Sampler.COMPRESSED_KV
    return found
found = {}
for name, (objective, learner, groups, *by_others) in cases.items():
    section = LearnerSection(learning_rate=1e-2, minibatches=2, micro_batch_tokens=40, **learner)
    composed = Objective.from_config(ObjectiveSection(**objective))
    reference = load_policy(folder, "cpu").requires_grad_(False) if "kl" in str(objective) else None
    trainer = Trainer(load_policy(folder, "cpu"), composed, section, 1.0, reference=reference)
    rows = [trainer.train(sampled(step, groups, by_others), publication=step) for step in range(3)]
    weights = gathered_state(trainer.model, torch.float32)
    found[name] = [rows, {key: value.double().norm().item() for key, value in weights.items()}]
local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters())
print(json.dumps([found, local]))
ranks.stop()
"""

CHECKPOINTS = """
import json, sys, torch
from pathlib import Path
from learner import checkpoint, ranks
from learner.objective import Objective
from learner.policy import load_policy
from learner.trainer import Trainer
from pipeline.config.types import LearnerSection, ObjectiveSection
from tests.unit.learner_samples import batch
torch.set_num_threads(1)
ranks.start("cpu", 120)
folder, root, wanted = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
section = LearnerSection(learning_rate=1e-2, minibatches=2, micro_batch_tokens=40, learning_rate_schedule="cosine")
trainer = Trainer(load_policy(folder, "cpu"), Objective.from_config(ObjectiveSection()), section, 1.0, steps=6)
restored = checkpoint.restore(root, trainer.model, trainer.optimizer)
trainer.step = restored.step if restored else 0
rows = []
while trainer.step < wanted:
    rows.append(trainer.train(batch(seed=trainer.step), publication=trainer.step))
    if trainer.step % 2 == 0:
        checkpoint.save(root, trainer.step, trainer.model, trainer.optimizer, {"by": ranks.rank()}, keep=9)
print(json.dumps([trainer.step - len(rows), rows, restored.state if restored else None]))
ranks.stop()
"""

CASES = {
    "default": [{}, {}, 4],
    "many statistics": [
        {
            "modulators": [{"name": "empg"}, {"name": "entropic"}],
            "corrections": [{"name": "tis"}, {"name": "batch-normalisation"}],
            "gates": [{"name": "clip-cov"}, {"name": "high-entropy"}],
            "regularisers": [{"name": "kl"}, {"name": "entropy-bonus", "coefficient": 0.01}],
            "aggregation": {"name": "prompt-mean"},
            "reconstructed": True,
        },
        {"gradient_checkpointing": True},
        4,
    ],
    "statistics of gates": [
        {
            "surrogate": {"name": "m2po", "second_moment": 0.001},
            "corrections": [],
            "gates": [
                {"name": "kl-cov", "fraction": 0.2},
                {"name": "steer"},
                {"name": "clip-b", "mu": 0.2},
                {"name": "clip-v", "mu": 0.2, "fraction": 0.2},
            ],
            "regularisers": [{"name": "siren"}, {"name": "positive-nll"}],
        },
        {},
        4,
    ],
    "statistics of a surrogate and of modulators": [
        {
            "advantage": {"name": "token-group"},
            "modulators": [{"name": "d3s"}, {"name": "aepo"}],
            "surrogate": {"name": "hapo"},
            "gates": [],
            "reconstructed": True,
        },
        {},
        4,
    ],
    "fewer samples than ranks and mini-batches": [{"corrections": [], "gates": []}, {}, 1],
    "tokens of another sampler": [{}, {}, 4, "others"],
    "behaviour": [{"proximal": "behaviour", "corrections": [], "gates": []}, {}, 3],
}


def assert_same_training(one, other):
    for name in one:
        for step, (row, again) in enumerate(zip(one[name][0], other[name][0], strict=True)):
            assert row.keys() == again.keys()
            assert {key for key, value in row.items() if value is None} == {k for k, v in again.items() if v is None}
            for key, value in row.items():
                if value is None:
                    continue
                assert again[key] == pytest.approx(value, rel=2e-5, abs=2e-6), (name, step, key)
            assert again["loss"] == pytest.approx(row["loss"], abs=1e-5)
        assert other[name][1] == pytest.approx(one[name][1], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_train_as_one_does(tmp_path, tied):
    folder = str(tiny_folder(tmp_path / "model", tied=tied))
    cases = json.dumps(CASES if tied else {"default": CASES["default"]})
    ((alone, parameters),) = run_ranks(TRAIN, 1, folder, cases)
    (leads, of_first), (_, of_second) = run_ranks(TRAIN, 2, folder, cases)
    assert_same_training(alone, leads)
    assert of_first + of_second == parameters
    assert of_first < 0.6 * parameters


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_with_another_number_of_ranks(tmp_path):
    folder = str(tiny_folder(tmp_path / "model"))
    ((_, whole, _),) = run_ranks(CHECKPOINTS, 1, folder, str(tmp_path / "alone"), "6")
    root, rows = tmp_path / "changing", []
    for ranks_now, until in ((2, 2), (1, 4), (2, 6)):
        (began, more, state), *others = run_ranks(CHECKPOINTS, ranks_now, folder, str(root), str(until))
        assert began == until - 2 and state == (None if until == 2 else {"by": 0})
        assert [other[1] for other in others] == [more] * (ranks_now - 1)
        rows += more
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], abs=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in whole], rel=1e-5)
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in whole]
    assert len(list((root / "step-2").glob("shard-*.safetensors"))) == 2
    assert (root / "step-4" / "model.safetensors").is_file()

    (tmp_path / "run").mkdir()
    root.rename(tmp_path / "run" / "checkpoints")
    export(tmp_path / "run", 6, tmp_path / "exported")
    exported, expected = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "exported", tmp_path / "alone" / "step-6")
    )
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-4, atol=1e-5)


def test_a_failure_to_write_is_one_of_every_rank():
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        ranks.together(full)
    assert ranks.together(lambda: 3) == 3


def test_one_rank_needs_no_process_group():
    values = torch.arange(3)
    assert (ranks.world_size(), ranks.rank()) == (1, 0)
    assert ranks.gathered(values) is values and ranks.exchanged(values[None], [3]).tolist() == [[0, 1, 2]]
    assert ranks.messages(b"a") == [b"a"] and ranks.own([1, 2]) == [1, 2]
    ranks.tell(lambda: 1 / 0)
