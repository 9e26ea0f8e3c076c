"""Drafters that cannot fit the policy are refused before anything is loaded (rollahead run --dry-run)."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

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
