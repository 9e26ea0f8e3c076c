"""What the vLLM generator cannot do is said in one sentence before anything starts; none of it needs vLLM."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from drafters.draft_model import DraftModelDrafter
from drafters.mtp.drafter import MTPDrafter
from pipeline.config import check_config
from pipeline.config.load import load_config
from pipeline.engine.vllm import arguments, install, rejection
from pipeline.engine.vllm.own_drafters import speculative_config
from pipeline.engine.vllm.refusals import reason
from pipeline.engine.vllm.sampling import allowed_tokens, refusal
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from tests.unit.tiny_models import save_tiny

VLLM = 'engine.generator="vllm"'


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.vllm.enforce_eager=true"], "engine.generator"),
        ([VLLM, 'engine.vllm.model="x"'], r"engine\.vllm\.model is decided by model\.path"),
        ([VLLM, "engine.vllm.max_num_seqs=3"], r"engine\.max_sequences"),
        ([VLLM, 'engine.vllm.speculative_config={method = "ngram"}'], "both draft"),
        ([VLLM, "engine.drafter=none", 'engine.vllm.speculative_config="ngram"'], "no table"),
        ([VLLM, 'engine.verification="block"'], "token by token"),
        ([VLLM, "sampling.top_p=0.9"], r"sampling\.top_p = 0\.9 .*native"),
        ([VLLM, 'engine.generator="vlm"'], "engine.generator"),
        ([VLLM, "engine.device=cuda:1"], "start the engine with CUDA_VISIBLE_DEVICES"),
        ([VLLM, "engine.prefill_tokens=64"], r"engine\.vllm\.max_num_batched_tokens = 64"),
        ([VLLM, "engine.stagger=false"], r"engine\.stagger = False is the native"),
        ([VLLM, "engine.kv_bytes=7", "engine.vllm.kv_cache_memory_bytes=5"], "say the same thing"),
        ([VLLM, 'engine.vllm.load_format="dummy"'], r"engine\.vllm\.load_format is decided by the generator"),
        ([VLLM, "engine.vllm.max_logprobs=0"], r"engine\.vllm\.max_logprobs is decided"),
        ([VLLM, 'engine.vllm.generation_config="auto"'], r"engine\.vllm\.generation_config is decided"),
        ([VLLM, 'engine.vllm.additional_config="x"'], r"engine\.vllm\.additional_config is decided"),
        (
            [VLLM, 'engine.vllm.logits_processors=["a:B"]'],
            r"engine\.vllm\.logits_processors = .* changes what is sampled",
        ),
        (
            [VLLM, "engine.vllm.watermark_config={key = 1}"],
            r"engine\.vllm\.watermark_config = .* changes what is sampled",
        ),
        (
            [
                VLLM,
                "engine.drafter=none",
                'engine.vllm.speculative_config={method = "ngram", rejection_sample_method = "synthetic"}',
            ],
            r"rejection_sample_method = 'synthetic' accepts drafts whatever",
        ),
        (
            [VLLM, "engine.drafter=none", 'engine.vllm.speculative_config={method = "draft_model", model = 5}'],
            r"speculative_config\.model = 5 is no text; give the folder",
        ),
        (
            [VLLM, "engine.drafter=none", "engine.vllm.speculative_config={num_speculative_tokens = 200}"],
            r"speculative_config\.num_speculative_tokens = 200 is no length of drafts .* choose 1 to 128",
        ),
        (
            [VLLM, "engine.drafter=none", 'engine.vllm.speculative_config={num_speculative_tokens = "200"}'],
            r"speculative_config\.num_speculative_tokens = '200' is no length of drafts",
        ),
        (
            [VLLM, "engine.drafter=none", 'engine.vllm.speculative_config={rejection-sample-method = "synthetic"}'],
            "'rejection-sample-method', which vLLM reads as 'rejection_sample_method'; write it so",
        ),
        (
            [VLLM, "engine.drafter=none", "engine.vllm.spec_method=ngram"],
            r"engine\.vllm\.spec_method is decided by engine\.vllm\.speculative_config; remove it",
        ),
        ([VLLM, "engine.vllm.pipeline_parallel_size=2"], "does not work together with drafting"),
        ([VLLM, "sampling.temperature=0.005"], r"sampling\.temperature = 0\.005 is below 0\.01"),
        ([VLLM, "learner.eval_temperature=0.009"], r"learner\.eval_temperature = 0\.009 is below 0\.01"),
        ([VLLM, "sampling.temperature=2.5"], r"sampling\.temperature = 2\.5 is above 2, the most that vLLM takes"),
        ([VLLM, "learner.eval_temperature=3"], r"learner\.eval_temperature = 3 is above 2, the most that vLLM takes"),
    ],
)
def test_configurations_that_cannot_work_are_refused(overrides, said):
    with pytest.raises(UsageError, match=said):
        check_config(load_config(None, overrides))


def test_a_configuration_for_vllm_is_taken():
    check_config(load_config(None, [VLLM, "engine.vllm.enforce_eager=true", "engine.vllm.tensor_parallel_size=2"]))
    for own in ('{method = "ngram"}', '{method = "ngram", num_speculative_tokens = 128}'):
        check_config(load_config(None, [VLLM, "engine.drafter=none", f"engine.vllm.speculative_config={own}"]))
    check_config(load_config(None, [VLLM, "engine.drafter=none", "engine.vllm.pipeline_parallel_size=2"]))


@pytest.mark.parametrize(
    ("dtype", "options", "item"),
    [("auto", {}, 2), ("float32", {}, 4), ("bfloat16", {}, 2), ("float32", {"kv_cache_dtype": "auto"}, 4),
     ("auto", {"kv_cache_dtype": "fp8_e4m3"}, 1), ("auto", {"kv_cache_dtype": 3}, 2)],
)  # fmt: skip
def test_keys_and_values_are_sized_in_the_type_that_is_computed_in(dtype, options, item):
    of_float32 = SimpleNamespace(
        dtype=torch.float32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64
    )
    found = arguments._needed([of_float32], {"dtype": dtype, "max_model_len": 200, **options})
    assert found == 256 * 3 * 2 * 2 * 16 * item


def test_a_missing_or_another_vllm_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"rollahead\[vllm\]"):
        install.require_vllm()
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(install, "installed_version", lambda: "0.11.0")
    with pytest.raises(UsageError, match=r"vLLM 0\.11\.0 is installed"):
        install.require_vllm()


@pytest.mark.parametrize(
    ("params", "speculating", "said"),
    [
        (SamplingParams(min_p=0.1), True, "min_p = 0.1"),
        (SamplingParams(min_p=0.1), False, None),
        (SamplingParams(logit_bias=((3, 1.0),)), True, "logit_bias"),
        (SamplingParams(logit_bias=((3, 1.0),)), False, None),
        (SamplingParams(logit_bias=((3, 200.0),)), False, "clip"),
        (SamplingParams(frequency_penalty=-2.5), False, "frequency_penalty"),
        (SamplingParams(temperature=0.005), False, "sampling.temperature = 0.005 is below 0.01"),
        (SamplingParams(temperature=2.5), False, "sampling.temperature = 2.5 is above 2"),
        (SamplingParams(temperature=0.0), True, None),
        (SamplingParams(temperature=2.0), True, None),
        (SamplingParams(temperature=0.01), True, None),
        (SamplingParams(top_k=5, top_p=0.9, repetition_penalty=1.2, min_new_tokens=3), True, None),
    ],
)
def test_sampling_settings_that_vllm_does_not_have_are_named(params, speculating, said):
    why = refusal(params, speculating)
    assert why is None if said is None else said in (why or "")


@pytest.mark.parametrize(
    ("allowed", "bad", "left"),
    [
        ((), (), None),
        ((3, 1), (), [1, 3]),
        ((), (0, 2), [1, 3, 4]),
        ((1, 2), (2,), [1]),
        ((1,), (1,), ()),
        ((), range(5), ()),
    ],
)
def test_forbidden_tokens_leave_those_allowed_or_are_refused(allowed, bad, left):
    params = SamplingParams(allowed_token_ids=tuple(allowed), bad_token_ids=tuple(bad))
    if left == ():
        with pytest.raises(UsageError, match="no token can be drawn"):
            allowed_tokens(params, 5)
    else:
        assert allowed_tokens(params, 5) == left


def test_the_base_install_imports_no_vllm():
    code = "import sys, pipeline.engine.service, pipeline.engine.vllm.generator; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_expanding_rows_is_repeating_them():
    x, counts = torch.tensor([0.0, 0.5, 2.0]), [2, 0, 3]
    cumulative = torch.tensor(counts).cumsum(0).int()
    expected = [0.0, 0.0, 2.0, 2.0, 2.0]
    assert rejection.expand_batch_to_tokens(x, cumulative, 5).tolist() == expected
    assert rejection.expand_batch_to_tokens(x, cumulative, 5, 0, 1).tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert install.needs_correction("0.32.0", "cpu") and not install.needs_correction("0.32.0", "cuda")
    assert not install.needs_correction("0.33.1", "cpu")


def test_of_vllms_own_refusals_option_value_and_reason_are_said_and_no_lists():
    pydantic = pytest.importorskip("pydantic")

    class ParallelConfig(pydantic.BaseModel):
        tensor_parallel_size: int = 1

        @pydantic.model_validator(mode="after")
        def even(self):
            if self.tensor_parallel_size % 2:
                raise ValueError("odd sizes do not work.")
            return self

    class CompilationConfig(pydantic.BaseModel):
        mode: int = 0

    known = ("tensor_parallel_size", "compilation_config")

    def said(kind, **given):
        with pytest.raises(pydantic.ValidationError) as caught:
            kind(**given)
        return reason(caught.value, known)

    assert said(ParallelConfig, tensor_parallel_size="two").startswith(
        'engine.vllm.tensor_parallel_size = "two" is not valid: Input should be a valid integer'
    )
    assert said(ParallelConfig, tensor_parallel_size=3) == "odd sizes do not work"
    assert said(CompilationConfig, mode="x").startswith('engine.vllm.compilation_config.mode = "x" is not valid: ')
    long = ValueError(
        "Model architectures ['Foo'] are not supported for now. Supported architectures: dict_keys([...])"
    )
    assert reason(long) == "Model architectures ['Foo'] are not supported for now"
    assert reason(RuntimeError("no model. [type=value_error, input_value=x]")) == "no model"
    assert reason(RuntimeError()) == "RuntimeError" and len(reason(ValueError("word " * 1000))) < 420


def test_what_vllm_has_no_counterpart_for_in_a_drafter_it_runs_itself_is_refused(tmp_path):
    options = {"stop_below": 0.5}
    drafter = MTPDrafter(MTPDrafter.Options(path=str(tmp_path), **options))
    with pytest.raises(UsageError, match=r"stop_below = 0.5 of drafter mtp is the native generator's"):
        speculative_config(drafter, options, tmp_path, 4, tmp_path / "scratch")


def test_a_draft_model_of_another_tokenizer_is_refused(tmp_path):
    for name, words in (("policy", ["a", "b"]), ("draft", ["a", "c"])):
        save_tiny(tmp_path / name)
        tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="a"))
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    drafter = DraftModelDrafter(DraftModelDrafter.Options(path=str(tmp_path / "draft")))
    with pytest.raises(UsageError, match="first token that differs is 1, 'c' there"):
        speculative_config(drafter, {}, tmp_path / "policy", 4, tmp_path / "scratch")
