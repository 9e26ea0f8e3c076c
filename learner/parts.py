"""What the learner's main loop is put together from, as the configuration says."""

from collections.abc import Callable
from pathlib import Path

import torch

from learner.evaluation import evaluation_source
from learner.hub import Hub, Limits
from learner.journal import Journal
from learner.leases import Ledger
from learner.objective import Objective
from learner.policy import resolve_device
from learner.prompts import LeaseSource
from learner.warm_start import ensure_embedded_model
from pipeline.config import Config
from pipeline.digest import run_digest
from pipeline.messages import Capabilities, Lease
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import Tokenizer
from pipeline.run_directory import RunDirectory
from pipeline.stop import StopSignal
from pipeline.tasks.base import Task
from pipeline.tasks.prompts import check_prompts, rollout_sampling
from pipeline.telemetry import Log
from pipeline.telemetry.progress import WarmStartView
from pipeline.transport.keys import load_learner_keys
from pipeline.transport.router import ZmqLearnerSocket
from pipeline.weights import WeightsServer
from pipeline.weights.group import Meeting, check_broadcasting
from pipeline.weights.sending import WeightsBroadcaster


def model_folder(config: Config, stop: StopSignal) -> Path:
    """The checkpoint the run starts from; the embedded model is built on first use."""
    if config.model.path:
        return Path(config.model.path)
    with WarmStartView() as view:
        return ensure_embedded_model(config, lambda p: view.show(p, stop))


def eval_leases(config: Config, task: Task, tokenizer: Tokenizer) -> Callable[[int], list[Lease]]:
    """Leases of the held-out prompts, pinned to a version."""
    sampling = rollout_sampling(config.sampling, tokenizer.eos_token_ids)
    return evaluation_source(task, tokenizer.encode, sampling, config)


def lease_source(config: Config, task: Task, tokenizer: Tokenizer, objective: Objective) -> LeaseSource:
    """Where leases of training prompts come from; prompts that are too long are refused or left out first."""
    usable = check_prompts(task, tokenizer.encode, config.sampling.max_prompt_tokens, config.task.long_prompts)
    return LeaseSource(
        task, usable, tokenizer.encode, tuple(tokenizer.eos_token_ids), config, objective.lease_temperature
    )


def publish_dtype(config: Config, model_config: ModelConfig) -> torch.dtype:
    """What weights are published in."""
    name = model_config.dtype if config.weights.dtype == "auto" else config.weights.dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def build_hub(
    config: Config,
    run: RunDirectory,
    objective: Objective,
    journal: Journal,
    source: LeaseSource,
    limits: Limits,
    log: Log,
) -> Hub:
    """Where leases go out and samples come in."""
    transport, learner = config.transport, config.learner
    return Hub(
        ZmqLearnerSocket(
            transport.address,
            heartbeat_seconds=transport.heartbeat_seconds,
            max_message_bytes=transport.max_message_bytes,
            keys=load_learner_keys(Path(transport.keys)) if transport.keys else None,
            insecure=transport.insecure,
            warn=log,
        ),
        journal,
        Ledger(
            batch_size=learner.batch_size,
            group_size=learner.group_size,
            max_staleness=learner.max_staleness,
            dynamic_sampling=learner.dynamic_sampling,
            lease_seconds=transport.lease_seconds,
        ),
        source,
        run_id=run.run_id(),
        digest=run_digest(config),
        needs=Capabilities(
            entropy=objective.needs_entropy_from_engine,
            kept_ids=rollout_sampling(config.sampling, ()).truncates,
        ),
        heartbeat_seconds=transport.heartbeat_seconds,
        lease_seconds=transport.lease_seconds,
        limits=limits,
        on_event=log,
        weights=WeightsServer(run.weights) if config.weights.transport == "stream" else None,
        broadcaster=_broadcaster(config, run, log),
    )


def _broadcaster(config: Config, run: RunDirectory, log: Log) -> WeightsBroadcaster | None:
    weights = config.weights
    if weights.transfer == "files":
        return None
    check_broadcasting(weights.address, config.transport.insecure)
    device = resolve_device(config.learner.device)
    return WeightsBroadcaster(
        run.weights, Meeting(weights.address), device, weights.transfer_seconds, log,
        max_message_bytes=config.transport.max_message_bytes,
    )  # fmt: skip
