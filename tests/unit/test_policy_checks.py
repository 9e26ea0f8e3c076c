"""Drafters that cannot fit the policy are refused before anything is loaded (rollahead run --dry-run)."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from drafters.mtp.head import FILE
from drafters.mtp.module import MTPModule
from pipeline.cli import main
from pipeline.config.load import load_config
from pipeline.engine.startup import check_pieces
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig
from pipeline.weights.filesystem import save_tensors
from tests.unit.tiny_models import save_tiny


@pytest.fixture
def policy(tmp_path):
    return with_words(save_tiny(tmp_path / "policy"), ["a", "b"])


def with_words(folder, words):
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def check(policy, drafter, *more):
    check_pieces(load_config(None, [f"model.path={policy}", f"engine.drafter={drafter}", *more]))


IN_AN_ARBITER = '{{name = "arbiter", drafters = ["none", {}]}}'
AS_AUXILIARY = '{{name = "suffix-automaton", memory_mb = 0, auxiliary = {}}}'


@pytest.mark.parametrize("form", ["{}", IN_AN_ARBITER, AS_AUXILIARY])
def test_a_head_is_there_and_fits_or_comes_with_publications(policy, tmp_path, form):
    def mtp(path=""):
        return form.format(f'{{name = "mtp", path = "{path}"}}')

    with pytest.raises(UsageError, match="needs a head, since publications bring none"):
        check(policy, mtp())
    check(policy, mtp(), "drafter.co_train=true")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        check(policy, mtp(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="holds no multi-token-prediction head"):
        check(policy, mtp(policy))
    head = tmp_path / "head"
    head.mkdir()
    save_tensors(MTPModule(ModelConfig.from_folder(policy)).weights(), head / FILE)
    check(policy, mtp(head))
    other = save_tiny(tmp_path / "other", hidden_size=64)
    with pytest.raises(UsageError, match=r"does not fit the model: mtp\."):
        check(other, mtp(head))


@pytest.mark.parametrize("given", [True, False])
def test_the_head_that_co_training_begins_with_is_there_and_fits(policy, tmp_path, capsys, given):
    """Also where the policy is made at the start, as far as that can be seen."""
    empty, other = tmp_path / "empty", save_tiny(tmp_path / "other", hidden_size=64)
    empty.mkdir()
    save_tensors(MTPModule(ModelConfig.from_folder(other)).weights(), tmp_path / "other" / FILE)

    def dry_run(start):
        settings = [
            "drafter.co_train=true", "engine.drafter=mtp", f"drafter.start={start}", "task.digits=1",
            "sampling.max_prompt_tokens=64", "sampling.max_new_tokens=64", *([f"model.path={policy}"] if given else []),
        ]  # fmt: skip
        code = main(["run", "--dry-run", *(x for s in settings for x in ("--set", s))])
        return code, capsys.readouterr().err

    code, said = dry_run(tmp_path / "nowhere")
    assert code == 2 and "drafter.start = " in said and "nowhere' is no folder; give that of a head" in said
    code, said = dry_run(empty)
    assert code == 2 and said.count("\n") == 1 and "empty" in said
    code, said = dry_run(other)
    assert code == (2 if given else 0) and ("does not fit the model: mtp." in said) == given


def refusals_of(command, capsys, settings):
    """What `rollahead run` writes on stderr before it ends."""
    assert main(["run", *command, *(part for setting in settings for part in ("--set", setting))]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", [["--dry-run"], []])
def test_what_an_engine_would_refuse_is_refused_before_one_is_started(policy, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("pipeline.launcher.ProcessGroup", None)
    task = [
        "task.kind=jsonl", f"task.path={tmp_path / 'train.jsonl'}", f"run.out={tmp_path / 'run'}",
        "sampling.max_prompt_tokens=16", "sampling.max_new_tokens=100",
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text('{"question": "a b", "answer": "#### 1"}\n')
    windowed = with_words(save_tiny(tmp_path / "windowed", family="Mistral", sliding_window=16), ["a", "b"])
    said = refusals_of(command, capsys, [*task, f"model.path={windowed}", "engine.kv_compression.policy=r-kv"])
    assert "sliding window of 16 tokens" in said
    task.append(f"model.path={policy}")
    short = with_words(save_tiny(tmp_path / "short", max_position_embeddings=64), ["a", "b"])
    said = refusals_of(command, capsys, [*task, f"engine.switching.small_model={short}"])
    assert "prompt and response of 116 tokens exceed the small model's 64 positions" in said
    (tmp_path / "long.jsonl").write_text('{"question": "%s", "answer": "#### 1"}\n' % ("a " * 40))
    for name, remedy in (("nowhere", "cannot be read"), ("long", "max_prompt_tokens = 16 tokens; raise that")):
        switching = [f"engine.switching.small_model={policy}", "engine.switching.policy_share=0.5"]
        path = f"engine.switching.calibration_path={tmp_path / name}.jsonl"
        said = refusals_of(command, capsys, [*task, *switching, path])
        assert "engine.switching.calibration_path" in said and remedy in said
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_a_draft_model_has_the_policys_tokenizer(policy, tmp_path):
    same = with_words(save_tiny(tmp_path / "same"), ["a", "b"])
    other = with_words(save_tiny(tmp_path / "other"), ["a", "c"])
    check(policy, f'{{name = "draft-model", path = "{same}"}}')
    with pytest.raises(UsageError, match="first token that differs is 1, 'c' there"):
        check(policy, f'{{name = "draft-model", path = "{other}"}}')


def test_layer_skip_leaves_out_a_layer_and_not_all(policy):
    check(policy, '{name = "layer-skip", skip = 0.5}')
    for skip, count in ((0.05, 0), (0.95, ModelConfig.from_folder(policy).layers)):
        with pytest.raises(UsageError, match=rf"leaves out {count} of"):
            check(policy, f'{{name = "layer-skip", skip = {skip}}}')


def test_the_dry_run_says_so(policy, capsys):
    drafter = '{name = "layer-skip", skip = 0.05}'
    settings = (f"model.path={policy}", f"engine.drafter={drafter}")
    assert main(["run", "--dry-run", *(x for s in settings for x in ("--set", s))]) == 2
    assert "of drafter layer-skip leaves out 0 of" in capsys.readouterr().err
