import hashlib
import json

import pytest
import transformers
from tokenizers import Tokenizer as Builder
from tokenizers import decoders, models, pre_tokenizers, processors

from pipeline.errors import UsageError
from pipeline.models.chat import chat_template
from pipeline.models.tokenizer import Tokenizer
from tests.unit.tiny_models import SHAPE


@pytest.fixture
def folder(tmp_path):
    builder = Builder(models.WordLevel({"[unk]": 0, "x": 1, "y": 2, "a": 3, "b": 4, "c": 5}, unk_token="[unk]"))
    builder.pre_tokenizer = pre_tokenizers.Whitespace()
    builder.add_special_tokens(["<bos>", "<eos>"])
    builder.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path, "config.json", SHAPE | {"architectures": ["Qwen3ForCausalLM"], "bos_token_id": 6, "eos_token_id": 7}
    )
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def test_text_starts_with_bos_and_comes_back(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("a c b") == [6, 3, 5, 4]
    assert tokenizer.decode([6, 3, 5, 4, 7]) == "a c b"
    assert tokenizer.decode([6, 3, 7], skip_special=False) == "<bos> a <eos>"


def test_bos_is_not_doubled(folder):
    builder = Builder.from_file(str(folder / "tokenizer.json"))
    builder.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 6)])
    builder.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder).encode("a b") == [6, 3, 4]
    assert Tokenizer(folder).encode("<bos> a b") == [6, 3, 4]


@pytest.mark.parametrize("settings", [{"bos_token": None}, {"bos_token": "<bos>", "add_bos_token": False}])
def test_tokenizer_config_can_say_that_texts_have_no_bos(folder, settings):
    write(folder, "tokenizer_config.json", settings)
    assert Tokenizer(folder).encode("a b") == [3, 4]
    assert Tokenizer(folder, add_bos=True).encode("a b") == [6, 3, 4]


END, BEGIN = 256, 257
"""ids in the folders below, whose config.json calls END the begin-of-text token, as Qwen's does"""
DEEPSEEK = {
    "tokenizer_class": "LlamaTokenizerFast", "bos_token": {"__type": "AddedToken", "content": "<begin>"},
    "add_bos_token": True,
}  # fmt: skip


def save_bytes(folder, settings, *, puts_bos):
    """A tokenizer of bytes; `puts_bos`: its own post-processor puts <begin> first."""
    builder = Builder(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    builder.pre_tokenizer, builder.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    builder.add_special_tokens(["<end>", "<begin>"])
    if puts_bos:
        builder.post_processor = processors.TemplateProcessing("<begin> $A", special_tokens=[("<begin>", BEGIN)])
    builder.save(str(folder / "tokenizer.json"))
    model = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 258, "bos_token_id": END}
    write(folder, "config.json", SHAPE | model)
    write(folder, "tokenizer_config.json", {"eos_token": "<end>"} | settings)
    return folder


@pytest.mark.parametrize(
    ("settings", "puts_bos"),
    [
        (DEEPSEEK, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>"}, True),
        ({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<begin>"}, False),
        ({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False}, False),
    ],
)
def test_texts_start_as_in_transformers(tmp_path, settings, puts_bos):
    folder = save_bytes(tmp_path, settings, puts_bos=puts_bos)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert Tokenizer(folder).encode("some text") == theirs("some text").input_ids
    assert (theirs("some text").input_ids[0] == BEGIN) == puts_bos


def test_conversations_start_as_in_transformers(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = save_bytes(tmp_path, DEEPSEEK | {"chat_template": template}, puts_bos=True)
    messages = [{"role": "user", "content": "hi"}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(messages)["input_ids"]
    assert Tokenizer(folder).encode(chat_template(folder)(messages)) == theirs


def test_bos_is_the_tokenizers_before_the_models(tmp_path):
    folder = save_bytes(tmp_path, DEEPSEEK, puts_bos=False)
    assert Tokenizer(folder).encode("x")[0] == BEGIN
    write(folder, "tokenizer_config.json", {"bos_token": "<start>", "add_bos_token": True})
    with pytest.raises(UsageError, match=r"bos_token '<start>' is not in tokenizer\.json"):
        Tokenizer(folder)


def test_bos_can_be_turned_off(folder):
    assert Tokenizer(folder, add_bos=False).encode("a b") == [3, 4]


def test_eos_comes_from_generation_config_first(folder):
    assert Tokenizer(folder).eos_token_ids == (7,)
    write(folder, "generation_config.json", {"eos_token_id": [7, 2]})
    assert Tokenizer(folder).eos_token_ids == (7, 2)


def test_size_and_digest_describe_the_file(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size == 8
    assert tokenizer.digest == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_tokenizer_larger_than_the_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", config | {"vocab_size": 7})
    with pytest.raises(UsageError, match="tokenizer does not match the model: its largest token id is 7"):
        Tokenizer(folder)


def test_missing_or_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be used"):
        Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json is missing"):
        Tokenizer(folder)
