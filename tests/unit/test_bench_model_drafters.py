import json
import re

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Builder
from tokenizers import models, pre_tokenizers

from benchmarks.deep_model import grown, left_out
from benchmarks.model_drafters import fixed_sets
from pipeline.bench import bench
from pipeline.errors import UsageError
from tests.unit.tiny_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_tiny(tmp_path_factory.mktemp("target"), num_hidden_layers=6, max_position_embeddings=600)
    builder = Builder(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    builder.pre_tokenizer = pre_tokenizers.Whitespace()
    builder.save(str(path / "tokenizer.json"))
    (path / "prompts.jsonl").write_text("\n".join(json.dumps({"question": f"w{i} w9", "answer": ""}) for i in range(4)))
    return path


@pytest.mark.slow
def test_sets_and_speeds_are_measured(folder, tmp_path):
    code = bench("model-drafters", [
        "--model", str(folder), "--prompts", str(folder / "prompts.jsonl"), "--draft-model", str(folder),
        "--skips", "3", "--tokens", "16", "--count", "2", "--repeats", "1", "--dtype", "float32",
        "--out", str(tmp_path),
    ])  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    chosen = next(row for row in rows if row["part"] == "sets")
    assert chosen["skipped"] == 3 == len(chosen["last_set"]) and 0 <= chosen["acceptance"] <= 1
    assert chosen["best_fixed"] in chosen["fixed"] and 0 < chosen["choosing_share"] < 1
    speeds = {row["drafter"]: row for row in rows if row["part"] == "speed"}
    assert list(speeds) == ["none", "layer-skip 3/6", "draft-model"]
    own = speeds["draft-model"]
    assert own["acceptance_rate"] == 1  # it is the target itself
    assert own["predicted_ratio"] > 0 and own["ratio_to_plain"]["median"] > 0
    with pytest.raises(UsageError, match="no file of questions"):
        bench("model-drafters", ["--model", str(folder), "--prompts", str(folder / "config.json")])


def test_fixed_sets_have_the_size_asked_for():
    for name, skipped in fixed_sets(12, 5).items():
        assert len(skipped) == 5 and max(skipped) < 12, name
        assert "uniform" not in name or 0 not in skipped


def test_a_grown_model_without_its_new_layers_is_its_base(tmp_path):
    base = save_tiny(tmp_path, num_hidden_layers=3)
    model, added = grown(base, 8)
    assert len(added) == 5 and {0, 7}.isdisjoint(added)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 60, (2, 9)))
    source = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected = source(ids).logits
        with left_out(model, set(added)):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
        assert (model(ids).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--base", "/nowhere"], "/nowhere"),
        (["--texts", "/nowhere"], "/nowhere is no .jsonl file of questions and answers"),
        (["--texts", "empty.jsonl"], "empty.jsonl is empty"),
        (["--texts", "other.jsonl"], "other.jsonl:1 has no question and answer"),
        (["--texts", "list.jsonl"], "list.jsonl:1 has no question and answer"),
        (["--layers", "6"], "--layers 6 adds none to the 6 of"),
    ],
)
def test_a_deep_model_is_not_made_of_what_is_not_there(folder, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr("benchmarks.deep_model.grown", None)
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty", ""), ("other", '{"text": "a"}\n'), ("list", "[1]\n")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    given = {"--base": str(folder), "--texts": str(folder / "prompts.jsonl"), "--out": "out", change[0]: change[1]}
    with pytest.raises(UsageError, match=re.escape(said)):
        bench("deep-model", [part for pair in given.items() for part in pair])


def test_prompts_without_questions_are_refused(folder, tmp_path):
    (tmp_path / "lines.jsonl").write_text("[1]\n")
    with pytest.raises(UsageError, match="is no file of questions"):
        bench("model-drafters", ["--model", str(folder), "--prompts", str(tmp_path / "lines.jsonl")])
