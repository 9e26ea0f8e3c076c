"""Checks that need more than one option: combinations that cannot work are refused before anything starts."""

import os
from typing import Any

import msgspec

from pipeline.config.check_vllm import check_vllm
from pipeline.config.types import LEAST_TEMPERATURE, Config, KVCompressionSection, SamplingSection, SwitchingSection
from pipeline.errors import UsageError


def check_config(config: Config) -> None:
    """Refuse impossible combinations.

    Raises:
        UsageError: one sentence naming keys, values and the remedy.
    """
    learner, sampling, task = config.learner, config.sampling, config.task
    if learner.batch_size % learner.group_size:
        raise UsageError(
            f"learner.batch_size = {learner.batch_size} is not a multiple of learner.group_size = "
            f"{learner.group_size}; a batch is made of whole groups"
        )
    if learner.group_size < 2:
        raise UsageError("learner.group_size = 1 gives no advantage within a group; use at least 2")
    if learner.minibatches > learner.batch_size:
        raise UsageError(
            f"learner.minibatches = {learner.minibatches} is more than learner.batch_size = {learner.batch_size}; "
            "every optimiser step needs a sample"
        )
    if config.engine.max_sequences < learner.group_size:
        raise UsageError(
            f"engine.max_sequences = {config.engine.max_sequences} is less than learner.group_size = "
            f"{learner.group_size}; an engine leases whole groups, so raise engine.max_sequences"
        )
    if sampling.temperature == 0:
        raise UsageError("sampling.temperature = 0 (greedy) gives nothing to learn from; use for example 1.0")
    for name, value in (
        ("sampling.temperature", sampling.temperature),
        ("learner.eval_temperature", learner.eval_temperature),
    ):
        if 0 < value < LEAST_TEMPERATURE:
            raise UsageError(f"{name} = {value:g} is too small to divide logits by; use at least {LEAST_TEMPERATURE:g}")
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise UsageError(
            f"sampling.min_new_tokens = {sampling.min_new_tokens} is more than sampling.max_new_tokens = "
            f"{sampling.max_new_tokens}; lower the one or raise the other"
        )
    check_vllm(config)
    _check_co_training(config)
    _check_replay(sampling)
    _check_switching(config)
    _check_kv_compression(config)
    if task.kind == "jsonl" and not task.path:
        raise UsageError('task.kind = "jsonl" needs task.path, a file with one JSON object a line')
    if task.kind == "datasets" and not task.path:
        raise UsageError('task.kind = "datasets" needs task.path, a name on the hub or a folder')
    if task.kind in ("jsonl", "datasets") and not config.model.path:
        raise UsageError(f'task.kind = "{task.kind}" needs model.path: the embedded model knows only how to add')
    if 0 < learner.max_age <= learner.max_staleness:
        raise UsageError(
            f"learner.max_age = {learner.max_age} drops what learner.max_staleness = {learner.max_staleness} lets run "
            "ahead; raise learner.max_age above it, or set it to 0"
        )
    if learner.eval_temperature == 0 and learner.eval_samples > 1:
        raise UsageError(
            f"learner.eval_temperature = 0 gives the same response learner.eval_samples = {learner.eval_samples} "
            "times; set learner.eval_samples = 1, or a temperature"
        )
    if learner.eval_samples > config.engine.max_sequences:
        raise UsageError(
            f"learner.eval_samples = {learner.eval_samples} is more than engine.max_sequences = "
            f"{config.engine.max_sequences}; an engine leases whole groups, so raise engine.max_sequences"
        )
    transport = config.transport
    if transport.lease_seconds < 3 * transport.heartbeat_seconds:
        raise UsageError(
            f"transport.lease_seconds = {transport.lease_seconds} is less than three times "
            f"transport.heartbeat_seconds = {transport.heartbeat_seconds}; leases would expire between two heartbeats"
        )
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    if learner.micro_batch_tokens < longest:
        raise UsageError(
            f"learner.micro_batch_tokens = {learner.micro_batch_tokens} is less than one sample can be "
            f"(sampling.max_prompt_tokens + sampling.max_new_tokens = {longest}); raise it"
        )


def _check_replay(sampling: SamplingSection) -> None:
    """The learner recomputes the probability of every sampled token. Of what changes it beside the temperature, it can
    follow truncation, by the ids that were kept; a stop string changes where a response ends, and no probability."""
    default = SamplingSection()
    for key in (
        "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids",
        "bad_token_ids", "min_new_tokens",
    ):  # fmt: skip
        value, off = getattr(sampling, key), getattr(default, key)
        if value != off:
            raise UsageError(
                f"sampling.{key} = {value!r} changes probabilities in a way that the learner cannot recompute; "
                f"leave it at {off!r} for training"
            )


def _check_co_training(config: Config) -> None:
    if not config.drafter.co_train:
        return
    names = _drafters(config.engine.drafter)
    if "mtp" not in names and not any(":" in name for name in names):  # a user's own may read the head
        raise UsageError(
            f"drafter.co_train = true trains a head that engine.drafter ({', '.join(names)}) does not draft with; set "
            'engine.drafter = {name = "arbiter", drafters = ["suffix-automaton", "mtp"]}, or drafter.co_train = false'
        )


def _drafters(piece: Any) -> list[str]:
    """Names of a drafter and of those that it is made of."""
    if isinstance(piece, str):
        return [piece]
    if not isinstance(piece, dict):  # the drafter itself refuses it
        return []
    listed = piece.get("drafters")
    parts = [*(listed if isinstance(listed, list) else []), piece.get("auxiliary")]
    return [str(piece.get("name")), *(name for part in parts for name in _drafters(part))]


def _check_kv_compression(config: Config) -> None:
    compression, default = config.engine.kv_compression, KVCompressionSection()
    if compression.policy.get("name") == default.policy["name"]:
        for key in ("budget", "every", "evaluation"):
            if (value := getattr(compression, key)) != getattr(default, key):
                raise UsageError(
                    f"engine.kv_compression.{key} = {value!r} without engine.kv_compression.policy compresses "
                    'nothing; set policy = "r-kv", say, or leave it out'
                )


def _check_switching(config: Config) -> None:
    switching, sampling = config.engine.switching, config.sampling
    if not switching.small_model:
        default = SwitchingSection()
        for key in SwitchingSection.__struct_fields__:
            if (value := getattr(switching, key)) != getattr(default, key):
                raise UsageError(
                    f"engine.switching.{key} = {value!r} without engine.switching.small_model switches to nothing; "
                    "name a smaller checkpoint with the policy's tokenizer, or leave it out"
                )
    if switching.policy_share:
        for key in ("threshold", "unit"):
            if (value := getattr(switching, key)) != getattr(SwitchingSection(), key):
                raise UsageError(
                    f"engine.switching.{key} = {value!r} beside engine.switching.policy_share = "
                    f"{switching.policy_share:g}, which an engine finds a threshold for; leave one of them out"
                )
    for needed, keys in (
        ("policy_share", ("calibration_prompts", "calibration_path")),
        ("distill", ("distill_learning_rate", "distill_tokens")),
    ):
        for key in keys:
            value = getattr(switching, key)
            if not getattr(switching, needed) and value != getattr(SwitchingSection(), key):
                raise UsageError(
                    f"engine.switching.{key} = {value!r} without engine.switching.{needed} does nothing; "
                    "set both, or leave it out"
                )
    if switching.small_model and not config.model.path:
        raise UsageError(
            f"engine.switching.small_model = {switching.small_model!r} needs model.path: the embedded model has a "
            "tokenizer of its own; name the policy's checkpoint"
        )
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    if switching.distill and switching.distill_tokens < longest:
        raise UsageError(
            f"engine.switching.distill_tokens = {switching.distill_tokens} is less than one sample can be "
            f"(sampling.max_prompt_tokens + sampling.max_new_tokens = {longest}); raise it"
        )


def check_against_model(config: Config, model_limit: int) -> None:
    """Sequence limits against what the model was made for (`max_position_embeddings`)."""
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    if longest > model_limit:
        raise UsageError(
            f"sampling.max_prompt_tokens + sampling.max_new_tokens = {longest} is more than the model's "
            f"{model_limit} positions; lower one of them"
        )


def resolve_threads(wanted: int, config: Config) -> int:
    """Torch threads of one process: as asked; else all cores when engine and learner take turns (synchronous), else a
    share, because more compute threads than cores slow both down."""
    if wanted:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if config.learner.max_staleness == 0:
        return cores
    return max(1, cores // (1 + config.run.engines))


# What may differ between a run and its resumption: it does not change what is learnt from which samples.
_FREE_TO_CHANGE = {
    "run": {"out", "steps", "engines", "restarts", "measure_drafting"},
    "task": {"held_out_path", "held_out_split", "reward_seconds", "reward_memory_mb", "reward_workers"},
    "engine": None,
    "drafter": None,
    "transport": None,
    "telemetry": None,
    "weights": {"keep", "transport", "transfer", "address", "transfer_seconds"},
    "objective": {"recipe", "reconstructed"},
    "learner": {
        "threads",
        "device",
        "checkpoint_every",
        "keep_checkpoints",
        "dump_batches",
        "eval_every",
        "eval_prompts",
        "eval_samples",
        "eval_temperature",
        "eval_success",
    },
}


def changed_keys(old: Config, new: Config) -> list[str]:
    """Keys on which a resumed run must agree with the run it resumes, and does not, with both values."""
    changed = []
    before: dict[str, Any] = msgspec.to_builtins(old)
    after: dict[str, Any] = msgspec.to_builtins(new)
    for section, options in after.items():
        free = _FREE_TO_CHANGE.get(section, set())
        if free is None:
            continue
        for key, value in options.items():
            if key not in free and before[section][key] != value:
                changed.append(f"{section}.{key} ({before[section][key]!r} before, {value!r} now)")
    return changed
