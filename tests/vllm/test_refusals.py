"""What vLLM's own types refuse ends in one sentence; nothing is started for it."""

import json

import pytest

from benchmarks.exactness_suite.model import random_checkpoint
from benchmarks.exactness_suite.vllm import HEAD
from pipeline.engine.vllm.generator import VllmGenerator
from pipeline.engine.vllm.sampling import translated
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("model"), 12, sharpness=0.6, head_dim=HEAD)


def refused(folder, said, **given):
    with pytest.raises(UsageError, match=said) as caught:
        VllmGenerator(folder, **{"drafter": {"name": "none"}, "max_length": 64, "max_sequences": 4, **given})
    text = str(caught.value)
    assert len(text) < 700 and "[type=" not in text and "validation error" not in text
    return text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": "two"}, r'engine\.vllm\.tensor_parallel_size = "two" is not valid: .*integer'),
        ({"gpu_memory_utilization": 7}, r"engine\.vllm\.gpu_memory_utilization = 7 is not valid"),
        ({"quantization": "foo"}, "Unknown quantization method: foo"),
        ({"speculative_config": {"method": "foo"}}, r'engine\.vllm\.speculative_config\.method = "foo" is not valid'),
        ({"speculative_config": {"method": "draft_model", "model": "/nowhere"}}, "/nowhere holds no config.json"),
        ({"speculative_config": {"method": "draft_model", "model": 5}}, r"speculative_config\.model = 5 is no text"),
        ({"speculative_config": {"num_speculative_tokens": 200}}, "num_speculative_tokens = 200 .* choose 1 to 128"),
        ({"tensor_paralel_size": 2}, "did you mean tensor_parallel_size"),
    ],
)
def test_an_option_that_vllm_does_not_take_is_named_with_its_value(folder, options, said):
    refused(folder, said, options=options)


def test_an_architecture_that_vllm_does_not_have_is_named_without_the_list_of_those_it_has(folder, tmp_path):
    copy = tmp_path / "foreign"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["FooForCausalLM"]}))
    assert "Supported architectures" not in refused(copy, r"FooForCausalLM.* not supported")


def test_more_memory_for_keys_and_values_than_there_is_is_refused(folder):
    refused(folder, r"bytes of memory there are; lower engine\.kv_bytes", kv_bytes=1 << 45)


def test_a_sampling_setting_that_vllm_does_not_take_is_named_with_its_value():
    def made(**changes):
        return translated(
            SamplingParams(**changes), seed=1, temperature=1.0, max_tokens=8, stop=(), vocab_size=12, speculating=False,
            extra={},
        )  # fmt: skip

    assert made(repetition_penalty=1.1).repetition_penalty == 1.1
    with pytest.raises(UsageError, match=r"does not take sampling = .*repetition_penalty.* got -1\.0$"):
        made(repetition_penalty=-1.0)
