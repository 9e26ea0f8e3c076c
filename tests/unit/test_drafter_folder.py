"""What `rollahead train-drafter` finds in files: whose a folder is, what is damaged, what a diverged head leaves."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers

from drafters.mtp.data import PIECE, read_rollouts
from drafters.mtp.head import FILE
from drafters.mtp.training import CHECKPOINT
from pipeline.cli import main
from pipeline.drafter_folder import POLICY
from pipeline.models.checkpoint import weights_digest
from pipeline.models.tokenizer import Tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny

TEXTS = [{"token_ids": [1, *range(3 + n, 15 + n)], "prompt_tokens": 3} for n in range(12)]
SETTINGS = (
    "drafter.rollouts=12", "drafter.held_out=4", "drafter.batch_tokens=60", "drafter.eval_every=1",
    "drafter.checkpoint_every=1", "drafter.dtype=float32", "drafter.steps=2",
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    folder = save_tiny(tmp_path / "model")
    characters = [chr(60 + index) for index in range(VOCABULARY - 3)]
    vocabulary = {word: id for id, word in enumerate(["<unk>", "<s>", "</s>", *characters])}
    words = Words(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def train(tmp_path, model, capfd):
    """Runs the command; exit code and what it said. The policy's responses are there already."""
    out = tmp_path / "out"
    out.mkdir()
    write_lines(out / "rollouts.jsonl", TEXTS)

    def run(*settings):
        given = (f"model.path={model}", *SETTINGS, *settings)
        code = main(["train-drafter", "--out", str(out), *(x for s in given for x in ("--set", s))])
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return code, said

    return run


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_of(length):
    return "".join(chr(60 + n) for n in np.random.default_rng(0).integers(0, VOCABULARY - 3, length))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def refused(train, tmp_path):
    """Asserts that the command is refused in one sentence that has all of `parts`, and changes nothing."""

    def run(*parts, settings=()):
        before = files_of(tmp_path / "out")
        code, said = train(*settings)
        assert code == 2 and said.splitlines()[-1].startswith("rollahead: ")
        for part in parts:
            assert part in said
        assert files_of(tmp_path / "out") == before

    return run


def test_a_text_file_is_cut_into_pieces_that_begin_as_texts_do(model, tmp_path):
    path, length = tmp_path / "book.txt", 5 * PIECE + 1
    path.write_text(text_of(length))
    tokenizer = Tokenizer(model)
    whole = tokenizer.encode(path.read_text())
    pieces = [rollout.token_ids for rollout in read_rollouts([path], tokenizer, "{text}", VOCABULARY)]
    assert [id for piece in pieces for id in piece[1:]] == [*whole[1:], 2] and {piece[0] for piece in pieces} == {1}
    assert {len(piece) - 1 for piece in pieces} <= {(length + 1) // 6, (length + 1) // 6 + 1} and len(pieces) == 6
    path.write_text(text_of(100))
    assert len(read_rollouts([path], tokenizer, "{text}", VOCABULARY)) == 1


def test_a_head_is_trained_on_a_text_file(train, tmp_path):
    book = tmp_path / "book.txt"
    texts = f'drafter.texts=["{book}"]'
    book.write_text(text_of(5 * PIECE))
    code, said = train(texts, "drafter.held_out=128")
    assert code == 2 and "6 texts are not more than drafter.held_out = 128; lower it, or give more or longer" in said
    assert "cut into pieces of up to 256 tokens" in said
    assert train(texts, "drafter.held_out=1", "drafter.steps=1")[0] == 0
    book.write_text("short")
    code, said = train(texts, "drafter.held_out=1")
    assert code == 2 and "1 text is not more than drafter.held_out = 1; give more or longer texts" in said


def test_a_model_that_changed_is_refused(train, refused, model, tmp_path):
    assert train()[0] == 0
    assert train("drafter.steps=3")[0] == 0
    shutil.copytree(model, tmp_path / "copy")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] += 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused("is of another model: weights of model.path", "put that model back", settings=["drafter.steps=4"])
    wide = save_tiny(tmp_path / "wide", hidden_size=48)
    for path in wide.iterdir():
        shutil.copy(path, model)
    refused("is of another model: config.json, weights of model.path", settings=["drafter.steps=4"])
    shutil.copytree(tmp_path / "copy", model, dirs_exist_ok=True)
    (tmp_path / "out" / POLICY).unlink()
    assert train("drafter.steps=4")[0] == 0, "a folder of an earlier version"
    assert (tmp_path / "out" / POLICY).exists()


def test_a_digest_of_weights_is_that_of_any_shards_and_of_every_tensor(model, tmp_path):
    digest, tensors = weights_digest(model), load_file(model / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(tensors)
    parts = {"b.safetensors": names[:5], "a.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, shards / file)
    where = {name: file for file, own in parts.items() for name in own}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert weights_digest(shards) == digest
    found = {digest}
    for name in names:
        changed = tensors | {name: tensors[name] + 1}
        save_file(changed, model / "model.safetensors")
        found.add(weights_digest(model))
    assert len(found) == len(names) + 1


def test_a_checkpoint_of_another_head_is_damaged_and_changes_nothing(train, refused, tmp_path):
    assert train()[0] == 0
    path = tmp_path / "out" / CHECKPOINT
    whole = load_file(path)
    nan = torch.full_like(whole["mtp.norm.weight"], torch.nan)
    for tensors, said in (
        ({n: t for n, t in whole.items() if n != "mtp.fc.weight"}, "mtp.fc.weight is not there where 24x48"),
        (whole | {"mtp.fc.weight": torch.zeros(3, 4)}, "mtp.fc.weight is 3x4 where 24x48 is needed"),
        ({n: t for n, t in whole.items() if n != "step"}, "step is not there where a number is needed"),
        ({n: t for n, t in whole.items() if "buffer" not in n}, "optimizer.momentum_buffer.fc.weight is not there"),
        (whole | {"optimizer.exp_avg.norm.weight": torch.zeros(3)}, "optimizer.exp_avg.norm.weight is 3 where 24"),
        (whole | {"mtp.norm.weight": nan}, "mtp.norm.weight is not finite"),
    ):
        save_file(tensors, path)
        refused(f"{CHECKPOINT} is damaged ({said}", "delete it to train", settings=["drafter.steps=3"])
    path.unlink()
    assert train("drafter.steps=3")[0] == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"token_ids": [3, 4, VOCABULARY]}, f"text 12 has token {VOCABULARY}, outside the model's vocabulary"),
        ({"token_ids": [3, 4, 5], "prompt_tokens": -1}, "Expected `int` >= 0"),
        ({"token_ids": [3, 4, 5], "prompt_tokens": 4}, "text 12 has prompt_tokens = 4, more than its 3 tokens"),
        (None, "holds 11 texts where drafter.rollouts = 12"),
    ],
)
def test_rollouts_that_are_not_the_models_are_refused(refused, tmp_path, line, said):
    path = tmp_path / "out" / "rollouts.jsonl"
    write_lines(path, [*TEXTS[:-1], *([line] if line else [])])
    refused(said, str(path), "delete it to generate new ones")
    if line:
        given = shutil.copy(path, tmp_path)
        refused(said, "give another file", settings=[f'drafter.texts=["{given}"]'])


@pytest.mark.parametrize("name", ["drafter.toml", POLICY])
@pytest.mark.parametrize("content", [b"model = 3\n", b"\xff\xfe", b"", b"[model\n"])
def test_a_damaged_record_of_whose_the_folder_is_is_refused(train, refused, tmp_path, name, content):
    assert train()[0] == 0
    (tmp_path / "out" / name).write_bytes(content)
    refused(f"{name} cannot be read", "delete it if the folder is of this training", settings=["drafter.steps=3"])
    (tmp_path / "out" / name).unlink()
    assert train("drafter.steps=3")[0] == 0


def test_another_seed_is_another_training(train, refused):
    assert train()[0] == 0
    refused("run.seed (0 before, 7 now)", settings=["run.seed=7"])


def test_a_head_that_diverges_leaves_the_last_good_one_from_which_a_lower_rate_goes_on(train, tmp_path):
    out = tmp_path / "out"
    assert train()[0] == 0
    good = {name: (out / name).read_bytes() for name in (FILE, CHECKPOINT)}
    # at 1e25 weights are finite after the step, and no loss can be computed of them
    for rate, eval_every in (("1e25", 1), ("1e25", 50), ("1e38", 50)):
        rates = (f"drafter.matrix_learning_rate={rate}", f"drafter.learning_rate={rate}")
        code, said = train("drafter.steps=40", f"drafter.eval_every={eval_every}", *rates)
        assert code == 1 and "lower drafter.matrix_learning_rate and drafter.learning_rate" in said
        assert {name: (out / name).read_bytes() for name in good} == good
    assert "NaN" not in (out / "metrics.jsonl").read_text() and "null" not in (out / "metrics.jsonl").read_text()
    code, said = train("drafter.steps=4", "drafter.matrix_learning_rate=0.01", "drafter.learning_rate=1e-4")
    assert code == 0 and "going on at step 2" in said
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_held_out_texts_that_are_too_short_show_what_is_known(train, tmp_path):
    write_lines(tmp_path / "out" / "rollouts.jsonl", [{"token_ids": [1, 5 + n, 9, 4]} for n in range(12)])
    code, said = train("drafter.depths=3")
    assert code == 0 and "nan" not in said and "of drafted tokens" not in said
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert len(row["held_out_by_depth"]) == len(row["acceptance_by_depth"]) == 2
        assert "held_out_accepted_share" not in row and "null" not in line
    assert main(["report", str(tmp_path / "out")]) == 0
