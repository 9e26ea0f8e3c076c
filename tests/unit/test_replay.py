import json
import math

import numpy as np
import pytest

from learner import checkpoint, replay
from learner.collapse import PATIENCE, CollapseWatch
from learner.composition import build_objective
from learner.policy import load_policy
from learner.trainer import Trainer
from pipeline.config import load_config, render
from pipeline.errors import RunFailed
from tests.unit.learner_samples import batch, tiny_folder


@pytest.fixture
def run(tmp_path):
    """Four steps, a checkpoint after the second, the batches dumped, as the learner's loop does it."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = tiny_folder(tmp_path / "model")
    settings = [f"model.path={model}", "learner.learning_rate=1e-3", "learner.threads=1", "learner.device=cpu"]
    config = load_config(None, settings)
    (folder / "config.toml").write_text(render(config))
    trainer = Trainer(load_policy(model, "cpu"), build_objective(config), config.learner, 1.0, seed=config.run.seed,
                      max_response_tokens=config.sampling.max_new_tokens)  # fmt: skip
    lines = []
    for step in range(1, 5):
        groups = batch(seed=step, version=step - 1)
        replay.dump(folder / "batches", step, step - 1, groups, keep=3)
        lines.append({"step": step, **trainer.train(groups, step - 1)})
        if step == 2:
            state = {"step": step, "objective": trainer.objective.state()}
            checkpoint.save(folder / "checkpoints", step, trainer.model, trainer.optimizer, state)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_trained_once_more_is_the_same_to_the_last_bit(run, step, capsys):
    assert replay.main([str(run), "--step", str(step)]) == 0
    assert "the same to the last bit" in capsys.readouterr().out


def test_a_skipped_step_has_no_loss_in_either(run, capsys, monkeypatch):
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[3])
    again = {key: line[key] for key in replay.COMPARED} | {"loss": math.nan, "grad_norm": math.inf}
    monkeypatch.setattr(replay, "replay", lambda *_: (again, line | {"loss": None, "grad_norm": None}))
    assert replay.main([str(run), "--step", "4"]) == 0
    monkeypatch.setattr(replay, "replay", lambda *_: (again, line))
    assert replay.main([str(run), "--step", "4"]) == 1
    assert "not the same" in capsys.readouterr().out


def test_another_batch_is_noticed(run, capsys):
    replay.dump(run / "batches", 4, 3, batch(seed=99, version=3), keep=9)
    assert replay.main([str(run), "--step", "4"]) == 1
    assert "not the same" in capsys.readouterr().out


def test_what_is_missing_is_said(run, tmp_path, capsys):
    assert replay.main([str(tmp_path), "--step", "1"]) == 2
    assert replay.main([str(run), "--step", "1"]) == 1, "the first batch is not kept any more"
    assert "learner.dump_batches" in capsys.readouterr().err
    (run / "batches" / "step-3.batch").write_bytes(b"\x00")
    with pytest.raises(RunFailed, match="damaged"):
        replay.replay(run, 3)


def test_dumped_batches_come_back_whole_and_only_the_newest_are_kept(tmp_path):
    groups = batch(seed=5)
    for step in (9, 10, 11):
        replay.dump(tmp_path, step, 7, groups, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10.batch", "step-11.batch"]
    dumped, found = replay.load(tmp_path / "step-11.batch")
    assert (dumped.step, dumped.publication) == (11, 7)
    for group, expected in zip(found, groups, strict=True):
        for a, b in zip(group, expected, strict=True):
            assert a.header == b.header
            for name in ("prompt_ids", "token_ids", "logprobs", "versions", "samplers", "roles"):
                assert np.array_equal(getattr(a, name), getattr(b, name))


HEALTHY = {"entropy": 1.0, "importance_weight_ess": 0.9, "reward_std": 0.4}


@pytest.mark.parametrize(("metric", "value"), [("entropy", 0.05), ("importance_weight_ess", 0.01), ("reward_std", 0.0)])
def test_a_collapse_is_named_once_and_again_after_it_was_over(metric, value):
    watch = CollapseWatch()
    assert not any(watch.look(HEALTHY) for _ in range(10))
    ill = HEALTHY | {metric: value}
    warnings = [watch.look(ill) for _ in range(3 * PATIENCE)]
    assert [bool(said) for said in warnings] == [n == PATIENCE - 1 for n in range(3 * PATIENCE)]
    assert warnings[PATIENCE - 1][0].startswith(metric)
    watch.look(HEALTHY)
    assert [len(watch.look(ill)) for _ in range(PATIENCE)] == [0] * (PATIENCE - 1) + [1]


def test_nothing_measured_is_no_collapse():
    watch = CollapseWatch()
    empty = {"entropy": None, "importance_weight_ess": float("nan"), "reward_std": None}
    assert not any(watch.look(empty) for _ in range(2 * PATIENCE))
