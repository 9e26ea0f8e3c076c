"""vLLM's engine arguments from our configuration; what users pass through is checked by vLLM's own types."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from drafters.guard import CALL_SECONDS
from drafters.registry import build
from pipeline.config.check_vllm import check_exact, check_speculation, check_stages, drafts
from pipeline.engine.vllm import own_drafters, proposer
from pipeline.engine.vllm.refusals import reason
from pipeline.errors import UsageError

WORKER = "pipeline.engine.vllm.worker.RollaheadWorker"
"""by name: importing it is for vLLM's workers"""
MIN_BLOCK = 128
"""tokens of a block of vLLM's cache on a CPU"""
_ITEM_BYTES = {"auto": 2, "half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}
"""of vLLM's names of types; the others are quantised"""


def engine_arguments(
    folder: Path,
    *,
    drafter: Mapping[str, Any],
    options: Mapping[str, Any],
    max_sequences: int,
    max_draft_tokens: int,
    max_length: int,
    scratch: Path,
    drafter_seconds: float = CALL_SECONDS,
    dtype: str = "auto",
    kv_bytes: int = 0,
) -> Any:
    """`vllm.AsyncEngineArgs` for the checkpoint in `folder`.

    Args:
        folder: Hugging Face checkpoint directory.
        drafter: of `engine.drafter`.
        options: of `engine.vllm`.
        max_sequences: running at once.
        max_draft_tokens: longest draft; 0: none.
        max_length: tokens of prompt and response.
        scratch: folder for files that vLLM reads, as long as its engine lives.
        drafter_seconds: longest call of a drafter of ours.
        dtype: compute type.
        kv_bytes: memory for keys and values; 0: on a CPU for `max_sequences`, at most half of what is free; elsewhere
            vLLM's own choice.

    Raises:
        UsageError: an option that vLLM does not have or does not take, a drafter that cannot work here, a model whose
            configuration cannot be read, too little memory.
    """
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    known = {field.name for field in fields(AsyncEngineArgs)}
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UsageError(f"engine.vllm.{key} is no argument of vLLM's engine; did you mean {near[0]}?")
    check_exact(options)
    check_speculation(options)
    check_stages(drafter, options, max_draft_tokens)
    config = _model_config(folder)
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    # With room for a draft after the last token, vLLM does not stop drafting for a whole batch near the longest's end.
    arguments: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": not (folder / "tokenizer.json").exists(),
        "max_model_len": min(limit, max_length + max_draft_tokens + 1),
        "max_num_seqs": max_sequences,
        "dtype": dtype,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "generation_config": "vllm",
        "worker_extension_cls": WORKER,
        "disable_log_stats": True,
        "load_format": "rollahead",
        **options,
    }
    arguments |= speculation(drafter, options, max_draft_tokens, folder, scratch, drafter_seconds)
    configs = [config]
    if "speculative_config" in arguments:
        arguments["per_request_spec_decode_metrics"] = "summary"
        configs += _drafting_config(arguments["speculative_config"])
    if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        wanted = kv_bytes or _kv_bytes(_needed(configs, arguments), max_sequences)
        if wanted and "kv_cache_memory_bytes" not in options:
            arguments["kv_cache_memory_bytes"] = wanted
    elif kv_bytes:
        arguments["kv_cache_memory_bytes"] = kv_bytes
    _check_memory(configs, arguments, _device_memory())
    try:
        return AsyncEngineArgs(**arguments)
    except Exception as error:  # whatever one of vLLM's types raises at a value that it did not expect
        raise UsageError(f"vLLM does not take engine.vllm = {dict(options)!r}: {reason(error, known)}") from error


def speculation(
    drafter: Mapping[str, Any],
    options: Mapping[str, Any],
    most: int,
    folder: Path,
    scratch: Path,
    seconds: float = CALL_SECONDS,
) -> dict[str, Any]:
    """The drafter as vLLM takes it: a proposer of ours around it, a method of vLLM's with its model, or vLLM's own by
    `engine.vllm.speculative_config`."""
    own = options.get("speculative_config")
    extra = {proposer.KEY: {"drafter": dict(drafter), "seconds": seconds}}
    if own is not None:
        return {"speculative_config": {"num_speculative_tokens": most, **own}, "additional_config": extra}
    if not drafts(drafter, options, most):
        return {"additional_config": extra}
    built = build(drafter)
    proposer.check_needs(built)
    if own_drafters.runs_itself(built):
        speculative = own_drafters.speculative_config(built, drafter, folder, most, scratch)
        return {"speculative_config": speculative, "additional_config": extra}
    return {"speculative_config": proposer.speculative_config(most), "additional_config": extra}


def _model_config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"the model configuration in {folder} cannot be read: {reason(error)}") from error


def _device_memory() -> int:
    """Bytes of the machine on a CPU, of the first device elsewhere; 0: not known."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(current_platform.get_device_total_memory()) if current_platform.is_cuda() else 0


def _drafting_config(speculative: Any) -> list[Any]:
    """Of the model that drafts with keys and values of its own, if one does."""
    method = speculative.get("method") if isinstance(speculative, dict) else None
    if method not in ("mtp", "draft_model") or "model" not in speculative:
        return []
    config = _model_config(Path(speculative["model"]))
    if method == "mtp":
        config.num_hidden_layers = getattr(config, "num_nextn_predict_layers", None) or 1
    return [config]


def _item_bytes(dtype: str, cache: Any) -> int:
    """Of one number in vLLM's cache: of `kv_cache_dtype` (`cache`) where that is set, else of `dtype`, which a draft
    model has, too. "auto" is a 16-bit type, also for a float32 checkpoint."""
    kind = cache if isinstance(cache, str) and cache != "auto" else dtype
    return _ITEM_BYTES.get(kind, 1)


def _sequence_bytes(configs: Sequence[Any], length: int, item: int) -> int:
    """Keys and values of one sequence in all models, in whole blocks, with `item` bytes a number; 0 where one has no
    cache that we can size."""
    found = 0
    try:
        for config in configs:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            found += int(-(-length // MIN_BLOCK) * MIN_BLOCK * config.num_hidden_layers * 2 * heads * width * item)
    except AttributeError:
        return 0
    return found


def _needed(configs: Sequence[Any], arguments: Mapping[str, Any]) -> int:
    """Bytes of one sequence of the greatest length."""
    item = _item_bytes(str(arguments["dtype"]), arguments.get("kv_cache_dtype"))
    return _sequence_bytes(configs, int(arguments["max_model_len"]), item)


def _kv_bytes(sequence: int, sequences: int) -> int:
    """For all sequences, of so many bytes each, and two more, at most half of the free memory."""
    wanted = sequence * (sequences + 2)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted, free // 2)


def _check_memory(configs: Sequence[Any], arguments: Mapping[str, Any], there_is: int) -> None:
    given = arguments.get("kv_cache_memory_bytes")
    if not isinstance(given, int):  # none, or a value that vLLM's types refuse
        return
    needed = _needed(configs, arguments)
    if given < needed:
        raise UsageError(
            f"{given:,} bytes for keys and values do not hold one sequence of {arguments['max_model_len']} tokens, "
            f"which takes {needed:,}; raise engine.kv_bytes, or lower sampling.max_prompt_tokens or "
            "sampling.max_new_tokens"
        )
    if there_is and given >= there_is:
        raise UsageError(
            f"{given:,} bytes for keys and values are more than the {there_is:,} bytes of memory there are; lower "
            "engine.kv_bytes, or set it to 0 to have it chosen"
        )
