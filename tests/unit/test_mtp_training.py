"""Fitting a head to a frozen policy, from the command line to the head that drafts."""

import io
import json
import os

import numpy as np
import pytest
import torch
from rich.console import Console

from drafters.mtp.data import Rollout, TrainingTexts
from drafters.mtp.fitting import trainable_head
from drafters.mtp.head import FILE
from drafters.mtp.losses import Objective
from drafters.mtp.module import MTPModule
from drafters.mtp.training import CHECKPOINT, FrozenHead, HeadTraining, Progress, batch_backward
from drafters.rehearsal import tiny_target
from pipeline.cli import main
from pipeline.config.types import DrafterSection
from pipeline.drafter_training import _View
from pipeline.errors import RunFailed, UsageError
from pipeline.models.config import ModelConfig
from pipeline.weights.filesystem import save_tensors
from tests.unit.test_mtp import hidden_states, module_for, module_logits
from tests.unit.tiny_models import add_mimos_head, save_tiny


@pytest.fixture(scope="module")
def target():
    return tiny_target()


TEXTS = [Rollout([1, 5, 9, 5, 9, 3, 8, 8, 2], 3), Rollout([1, 7, 3], 0), Rollout([1, 4, 4, 17, 20, 6], 5)]


def test_batches_hold_what_the_target_says_of_each_text(target, tmp_path):
    texts = TrainingTexts(target, TEXTS, tmp_path)
    assert not list(tmp_path.iterdir()) and texts.tokens == 18
    batch = texts.batch([0, 1, 2], 3)
    for b, text in enumerate(TEXTS):
        torch.testing.assert_close(batch.hidden[b, : len(text.token_ids)], hidden_states(target, text.token_ids))
    # rows whose next drafted token x_{t+2} is a token of the response
    assert batch.rows.tolist() == [1, 2, 3, 4, 5, 6, 9, 18 + 3]
    assert batch.valid.sum(-1).tolist() == [3, 3, 3, 3, 2, 1, 1, 1]


@pytest.mark.parametrize("name", ["ce", "e2e-tv", "lk-lambda"])
def test_batch_loss_and_gradient_are_those_of_whole_logits(target, tmp_path, monkeypatch, name):
    """Row by row from texts computed alone, and without parts."""
    monkeypatch.setattr("drafters.mtp.training._ELEMENTS", 3 * 24)
    module, texts = module_for(target.config), TrainingTexts(target, TEXTS, tmp_path)
    frozen = FrozenHead.of(target, target.tensors(), torch.float32)
    batch = texts.batch([0, 1, 2], 3)
    loss, alphas, entropies = batch_backward(module, frozen, batch, Objective(name), 3)
    logits, p, tokens = [[] for _ in range(3)], [[] for _ in range(3)], [[] for _ in range(3)]
    for text in TEXTS:
        ids = text.token_ids
        hidden = hidden_states(target, ids)
        embedded = frozen.embedding[torch.tensor(ids[1:])]
        drafted = [frozen.logits(h[0]) for h in module(embedded[None], hidden[None, :-1], 3)]
        torch.testing.assert_close(torch.stack(drafted), module_logits(target, module, ids, 3))
        for t in range(max(0, text.prompt_tokens - 2), len(ids) - 2):
            for d in range(3):
                at = min(t + 1 + d, len(ids) - 2)
                logits[d].append(drafted[d][t])
                p[d].append(torch.softmax(frozen.logits(hidden[at]), -1))
                tokens[d].append(ids[at + 1])
    stacked = [[torch.stack(x) for x in logits], [torch.stack(x) for x in p], [torch.tensor(x) for x in tokens]]
    expected, expected_alphas = Objective(name)(*stacked, batch.valid, batch.valid.float().sum(0))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(alphas, expected_alphas.detach(), rtol=1e-4, atol=1e-5)
    q = stacked[1][0]
    torch.testing.assert_close(entropies[:, 0], -(q * q.log()).sum(-1), rtol=1e-4, atol=1e-5)
    found = {n: w.grad.clone() for n, w in module.named_parameters()}
    module.zero_grad()
    expected.backward()
    for n, w in module.named_parameters():
        torch.testing.assert_close(found[n], w.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*meta parameter")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_batches_and_what_is_resumed_go_where_the_head_is(target, tmp_path, monkeypatch, optimizer):
    def training(module):
        frozen = FrozenHead.of(target, target.tensors(), torch.float32)
        return HeadTraining(module, frozen, DrafterSection(optimizer=optimizer), 0, torch.float32)

    module, texts = module_for(target.config), TrainingTexts(target, TEXTS, tmp_path)
    here = training(module)
    here.step += 1
    here.fit(texts.batch([0, 1, 2], 3), "ce")
    here.save(tmp_path, torch.float32)
    elsewhere = training(MTPModule(target.config).to("meta"))
    assert elsewhere.resume(tmp_path)
    moments = elsewhere.optimizer.moments()
    assert moments.keys() == here.optimizer.moments().keys() and {t.device.type for t in moments.values()} == {"meta"}
    found = []

    def given(module, frozen, batch, *rest, **options):
        found.append({t.device.type for t in (batch.tokens, batch.hidden, batch.rows, batch.valid)})
        raise RunFailed("seen")

    monkeypatch.setattr("drafters.mtp.training.batch_backward", given)
    with pytest.raises(RunFailed, match="seen"):
        elsewhere.fit(texts.batch([0, 1, 2], 3), "ce")
    with pytest.raises(RunFailed, match="seen"):
        elsewhere.evaluate(texts)
    assert found == [{"meta"}, {"meta"}]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_whose_gradient_is_no_number_is_not_taken_and_no_such_head_is_saved(
    target, tmp_path, monkeypatch, value
):
    module, texts = module_for(target.config), TrainingTexts(target, TEXTS, tmp_path)
    frozen = FrozenHead.of(target, target.tensors(), torch.float32)
    training = HeadTraining(module, frozen, DrafterSection(), 0, torch.float32)
    batch = texts.batch([0, 1, 2], 3)
    training.step += 1
    training.fit(batch, "ce")
    training.save(tmp_path, torch.float32)
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = {name: w.clone() for name, w in module.weights().items()}

    def spoilt(*arguments, **options):
        found = batch_backward(*arguments, **options)
        module.norm.weight.grad[3] = value
        return found

    monkeypatch.setattr("drafters.mtp.training.batch_backward", spoilt)
    with pytest.raises(RunFailed, match=r"gradient norm is .* at step 1; lower drafter\.matrix_learning_rate"):
        training.fit(batch, "ce")
    assert all(torch.equal(before[name], w) for name, w in module.weights().items())
    module.norm.weight.data[3] = value
    with pytest.raises(RunFailed, match=r"mtp\.norm\.weight is not finite"):
        training.save(tmp_path, torch.float32)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == saved


SETTINGS = (
    "task.digits=1", "task.operands=2", "sampling.max_new_tokens=12", "drafter.rollouts=48", "drafter.held_out=8",
    "drafter.batch_tokens=300", "drafter.eval_every=5", "drafter.checkpoint_every=5", "drafter.dtype=float32",
    "sampling.max_prompt_tokens=40", "drafter.learning_rate=0.01",
)  # fmt: skip


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A small character-level model of the arithmetic task."""
    from learner.embedded import Architecture, build_model, save_model

    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    model = build_model(Architecture())
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    save_model(model, folder)
    return folder


def train(embedded, out, *settings, more=()):
    arguments = [f"model.path={embedded}", *SETTINGS, *settings]
    return main(["train-drafter", "--out", str(out), *more, *(x for s in arguments for x in ("--set", s))])


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_from_the_command_line_raises_acceptance_and_resumes(embedded, tmp_path, capfd):
    assert train(embedded, tmp_path / "a", "drafter.steps=20") == 0
    said = capfd.readouterr().err
    assert "48 responses" in said and "step 20/20" in said
    whole = rows(tmp_path / "a")
    assert [r["objective"] for r in whole] == ["lk-lambda"] * 10 + ["e2e-tv"] * 10
    measured = [r for r in whole if "held_out_by_depth" in r]
    assert [r["step"] for r in measured] == [5, 10, 15, 20]
    assert measured[-1]["held_out_by_depth"][0] > measured[0]["held_out_by_depth"][0]
    # cut off after 10 steps' worth of files, it goes on to the same numbers
    assert train(embedded, tmp_path / "b", "drafter.steps=20", "drafter.seconds=1e-9") == 0
    assert rows(tmp_path / "b")[-1]["step"] == 1
    assert train(embedded, tmp_path / "b", "drafter.steps=20") == 0
    again = rows(tmp_path / "b")
    assert [r["step"] for r in again] == list(range(1, 21))
    np.testing.assert_allclose([r["loss"] for r in again], [r["loss"] for r in whole], rtol=1e-4)


def test_a_training_goes_on_behind_a_torn_line_and_what_its_checkpoint_has_not_seen(tmp_path):
    path, console = tmp_path / "metrics.jsonl", Console(file=io.StringIO())
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    with _View(console, path, 4, done=2) as view:
        view.show(Progress(3, 0.5, "tv", [0.5], 1e-3, 1.0))
    assert [(row["step"], row.get("loss")) for row in rows(tmp_path)] == [(1, None), (2, None), (3, 0.5)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.path="], "train-drafter needs model.path"),
        (["drafter.loss=tvv"], "drafter.loss = 'tvv' is not valid"),
        (['drafter.texts=["nowhere.txt"]'], "nowhere.txt cannot be read"),
        (["drafter.start=/nowhere"], "drafter.start = '/nowhere' is no folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_a_sentence(embedded, tmp_path, capfd, settings, said):
    settings = [*settings, f'drafter.texts=["{embedded / "tokenizer.json"}"]'] if "start" in settings[0] else settings
    for more in ((), ("--dry-run",)):
        assert train(embedded, tmp_path / "out", "drafter.held_out=1", *settings, more=more) == 2
        assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists(), "a command that was refused stands in no other's way"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["drafter.rollouts=8"], "8 texts are not more than drafter.held_out = 8"),
        (["sampling.max_new_tokens=100000"], "is more than the model's"),
        (["sampling.max_prompt_tokens=3"], "the task's longest prompts have"),
        (["engine.drafter=suffix"], "drafter 'suffix' is unknown"),
    ],
)
def test_what_own_rollouts_cannot_be_made_of_is_refused_before_the_model_is_loaded(
    embedded, tmp_path, capfd, monkeypatch, settings, said
):
    monkeypatch.setattr("pipeline.drafter_training.load_decoder", None)
    assert train(embedded, tmp_path / "out", *settings) == 2
    assert said in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_training_that_passes_the_check_is_printed_and_writes_nothing(embedded, tmp_path, capfd):
    assert train(embedded, tmp_path / "out", more=("--dry-run",)) == 0
    assert "[drafter]" in capfd.readouterr().out and not (tmp_path / "out").exists()


def test_a_folder_that_is_another_trainings_or_damaged_is_refused_with_what_is_wrong(embedded, tmp_path, capfd):
    (tmp_path / "few.txt").write_text("12 + 34 = 46")
    assert train(embedded, tmp_path / "out", f'drafter.texts=["{tmp_path / "few.txt"}"]') == 2
    assert "1 text is not more than drafter.held_out = 8" in capfd.readouterr().err
    text = {"token_ids": list(range(1, 9))}
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(text) + "\n" for _ in range(12)))
    texts = f'drafter.texts=["{tmp_path / "rollouts.jsonl"}"]'
    assert train(embedded, tmp_path / "out", texts, "drafter.steps=1") == 0
    os.truncate(tmp_path / "out" / CHECKPOINT, 1000)
    capfd.readouterr()
    assert train(embedded, tmp_path / "out", texts, "drafter.steps=2") == 2
    assert "training.safetensors is damaged" in capfd.readouterr().err
    assert train(embedded, tmp_path / "out", texts, "drafter.steps=1", "drafter.loss=ce") == 2
    assert "holds another training: drafter.loss ('e2e-tv' before, 'ce' now)" in capfd.readouterr().err


def test_a_head_that_does_not_fit_or_is_mimos_is_refused(tmp_path):
    model = save_tiny(tmp_path / "model")
    config = ModelConfig.from_folder(model)
    assert trainable_head("", model, config) == []
    other = ModelConfig.from_folder(save_tiny(tmp_path / "wide", hidden_size=64))
    (tmp_path / "head").mkdir()
    save_tensors(MTPModule(other).weights(), tmp_path / "head" / FILE)
    with pytest.raises(UsageError, match=r"does not fit the model: mtp\..* is .* where .* is needed"):
        trainable_head(str(tmp_path / "head"), model, config)
    mimo = add_mimos_head(save_tiny(tmp_path / "mimo", "Qwen2", head_dim=None))
    with pytest.raises(UsageError, match="is MiMo's, which reads other states"):
        trainable_head("", mimo, ModelConfig.from_folder(mimo))
