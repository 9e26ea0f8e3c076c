"""What `engine.generator = "vllm"` cannot do, said before anything starts. Torch-free, and free of vLLM."""

from collections.abc import Mapping
from typing import Any

from pipeline.config.types import Config
from pipeline.errors import UsageError

OURS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "engine.dtype",
    "max_num_seqs": "engine.max_sequences",
    "max_model_len": "sampling.max_prompt_tokens and sampling.max_new_tokens",
    "logprobs_mode": "nothing else: training needs processed_logprobs",
    "max_logprobs": "the generator itself",
    "generation_config": "the generator itself, which samples as [sampling] says",
    "load_format": "the generator itself, whose loader reads checkpoints with and without draft heads",
    "additional_config": "the generator itself, which tells its drafter by it",
    "worker_extension_cls": "the generator itself",
    "skip_tokenizer_init": "the generator itself",
    "spec_method": "engine.vllm.speculative_config",
    "spec_model": "engine.vllm.speculative_config",
    "spec_tokens": "engine.vllm.speculative_config",
}
"""vLLM's engine arguments that follow from other options"""
INEXACT = ("logits_processors", "watermark_config")
"""vLLM's engine arguments by which something else is sampled than the distribution that [sampling] describes"""
EXACT_VERIFICATION = ("standard", "block")
"""vLLM's ways to verify drafts under which the distribution stays as it is"""
LONGEST_DRAFT = 128
"""tokens; vLLM's rejection sampler, and the worker with it, ends at a longer one"""
COLDEST = 0.01
"""vLLM samples at this where a lower temperature above 0 is asked for"""
HOTTEST = 2.0
"""the highest temperature that vLLM takes"""


def drafts(drafter: Mapping[str, Any], options: Mapping[str, Any], max_draft_tokens: int) -> bool:
    """Whether vLLM speculates: with a drafter of ours, or by `speculative_config` with one of its own."""
    return "speculative_config" in options or (drafter.get("name") != "none" and max_draft_tokens > 0)


def check_exact(options: Mapping[str, Any]) -> None:
    """
    Args:
        options: of `engine.vllm`.

    Raises:
        UsageError: one of them changes what is sampled.
    """
    for key in INEXACT:
        if options.get(key):
            raise UsageError(
                f"engine.vllm.{key} = {options[key]!r} changes what is sampled in a way that drafting and learner do "
                "not follow; remove it"
            )
    speculative = options.get("speculative_config")
    method = speculative.get("rejection_sample_method") if isinstance(speculative, dict) else None
    if method is not None and method not in EXACT_VERIFICATION:
        raise UsageError(
            f"engine.vllm.speculative_config.rejection_sample_method = {method!r} accepts drafts whatever the model's "
            'distribution is; use "standard"'
        )


def check_speculation(options: Mapping[str, Any]) -> None:
    """
    Args:
        options: of `engine.vllm`.

    Raises:
        UsageError: a name that vLLM reads as another, drafts longer than it verifies, or a model that is no name.
    """
    name, speculative = "engine.vllm.speculative_config", options.get("speculative_config")
    if not isinstance(speculative, dict):
        return
    for key in speculative:
        if "-" in key:
            raise UsageError(f"{name} has {key!r}, which vLLM reads as {key.replace('-', '_')!r}; write it so")
    most, model = speculative.get("num_speculative_tokens", 1), speculative.get("model", "")
    if not (isinstance(most, int) and 1 <= most <= LONGEST_DRAFT):
        raise UsageError(
            f"{name}.num_speculative_tokens = {most!r} is no length of drafts that vLLM verifies; choose 1 to "
            f"{LONGEST_DRAFT}"
        )
    if not isinstance(model, str):
        raise UsageError(f"{name}.model = {model!r} is no text; give the folder of a Hugging Face checkpoint")


def check_stages(drafter: Mapping[str, Any], options: Mapping[str, Any], max_draft_tokens: int) -> None:
    """
    Raises:
        UsageError: pipeline parallelism together with drafting; all stages of vLLM 0.32 but the last end at the start.
    """
    stages = options.get("pipeline_parallel_size", 1)
    if stages != 1 and drafts(drafter, options, max_draft_tokens):
        raise UsageError(
            f"engine.vllm.pipeline_parallel_size = {stages!r} does not work together with drafting in vLLM; set "
            'engine.drafter = "none", or use tensor_parallel_size'
        )


def check_vllm(config: Config) -> None:
    """
    Raises:
        UsageError: an option that this generator cannot follow, with the remedy.
    """
    engine, sampling = config.engine, config.sampling
    if engine.generator != "vllm":
        if engine.vllm:
            raise UsageError(
                f'engine.vllm is set and engine.generator = "{engine.generator}"; set engine.generator = "vllm", or '
                "remove the table"
            )
        return
    for key, home in OURS.items():
        if key in engine.vllm:
            raise UsageError(f"engine.vllm.{key} is decided by {home}; remove it")
    speculative = engine.vllm.get("speculative_config")
    if speculative is not None and engine.drafter.get("name") != "none":
        raise UsageError(
            f"engine.vllm.speculative_config and engine.drafter = {engine.drafter.get('name')!r} both draft; set "
            'engine.drafter = "none" to use vLLM\'s own drafter'
        )
    if speculative is not None and not isinstance(speculative, dict):
        raise UsageError(
            f"engine.vllm.speculative_config = {speculative!r} is no table; write for example "
            '{method = "ngram", prompt_lookup_max = 4}'
        )
    check_exact(engine.vllm)
    check_speculation(engine.vllm)
    check_stages(engine.drafter, engine.vllm, engine.max_draft_tokens)
    if engine.verification != "standard":
        raise UsageError(
            f'engine.verification = "{engine.verification}" is the native generator\'s; vLLM verifies token by token, '
            'so leave it at "standard"'
        )
    if engine.device != "auto":
        raise UsageError(
            f'engine.device = "{engine.device}" is the native generator\'s; vLLM takes the devices that it sees, so '
            "leave it out and start the engine with CUDA_VISIBLE_DEVICES, for example CUDA_VISIBLE_DEVICES=1"
        )
    if engine.prefill_tokens != type(engine)().prefill_tokens:
        raise UsageError(
            f"engine.prefill_tokens = {engine.prefill_tokens} is the native generator's; set "
            f"engine.vllm.max_num_batched_tokens = {engine.prefill_tokens} for the tokens of one of vLLM's steps"
        )
    if engine.kv_bytes and "kv_cache_memory_bytes" in engine.vllm:
        raise UsageError(
            f"engine.kv_bytes = {engine.kv_bytes} and engine.vllm.kv_cache_memory_bytes = "
            f"{engine.vllm['kv_cache_memory_bytes']!r} say the same thing; remove one"
        )
    for key in ("kv_compression", "switching", "stagger"):
        value, off = getattr(engine, key), getattr(type(engine)(), key)
        if value != off:
            raise UsageError(
                f'engine.{key} = {value!r} is the native generator\'s; remove it, or use engine.generator = "native"'
            )
    for name, temperature in (
        ("sampling.temperature", sampling.temperature),
        ("learner.eval_temperature", config.learner.eval_temperature),
    ):
        if (why := temperature_refusal(name, temperature)) is not None:
            raise UsageError(why)
    for key in ("top_k", "top_p", "min_p"):
        value, off = getattr(sampling, key), getattr(type(sampling)(), key)
        if value != off:
            raise UsageError(
                f"sampling.{key} = {value} needs to know which tokens were left to draw from, which vLLM does not say; "
                f'leave it at {off} for training, or use engine.generator = "native"'
            )


def temperature_refusal(name: str, temperature: float) -> str | None:
    """Why vLLM does not sample at this temperature, in one sentence; None where it does."""
    if temperature > HOTTEST:
        return (
            f"{name} = {temperature:g} is above {HOTTEST:g}, the most that vLLM takes; choose at most {HOTTEST:g}, or "
            'use engine.generator = "native"'
        )
    if not 0 < temperature < COLDEST:
        return None
    return (
        f"{name} = {temperature:g} is below {COLDEST:g}, which vLLM would sample at instead; choose at least "
        f'{COLDEST:g}, or use engine.generator = "native"'
    )
