"""The learner process: groups in, policy versions out.

Leases go out and trajectories come in on other threads (`learner.hub`); this one takes whole batches, trains on them,
publishes the new policy, writes the metrics line, and now and then a checkpoint. A checkpoint holds weights, optimizer,
random state and the ledger of leases together, so a killed learner continues as if the steps after it had not been.
"""

import json
import time
import traceback
from pathlib import Path

import torch
from msgspec import Struct

from learner import checkpoint
from learner.hub import Hub, Limits
from learner.journal import Journal
from learner.leases import Batch, Group, Ledger, LedgerState
from learner.objective import Objective
from learner.policy import load_policy, policy_state
from learner.prompts import LeaseSource
from learner.trainer import Trainer
from learner.warm_start import ensure_embedded_model
from pipeline.config import Config, check_against_model, check_config, resolve_threads
from pipeline.digest import run_digest
from pipeline.errors import RunFailed
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import Tokenizer
from pipeline.run_directory import RunDirectory
from pipeline.stop import StopSignal
from pipeline.tasks import load_task
from pipeline.tasks.prompts import check_prompts
from pipeline.telemetry import Log, MetricsWriter, StepMetrics
from pipeline.telemetry.progress import StepView, warm_start_view
from pipeline.transport.zmq import ZmqLearnerSocket
from pipeline.weights import FilesystemPublisher

POLL_SECONDS = 0.5
DRAIN_SECONDS = 20.0


def run_learner(config: Config) -> int:
    """Train until `run.steps` batches are done or a stop is asked for; returns the exit code."""
    check_config(config)
    objective = Objective.from_config(config.objective)
    stop, log = StopSignal(), Log("learner")
    run = RunDirectory(Path(config.run.out))
    run.prepare(config)
    run.lock()
    torch.set_num_threads(resolve_threads(config.learner.threads, config))
    learner = Learner(config, run, objective, stop, log)
    try:
        learner.start()
        learner.train()
        return stop.exit_code if stop.requested and not learner.done else 0
    except Exception as error:
        learner.hub.fail(str(error), traceback.format_exc())
        raise
    finally:
        learner.close()


class LearnerState(Struct, kw_only=True):
    """state.json of a checkpoint."""

    step: int
    ledger: LedgerState


class Learner:
    """State of the learner's main loop."""

    def __init__(self, config: Config, run: RunDirectory, objective: Objective, stop: StopSignal, log: Log) -> None:
        self.config, self.run, self.stop, self.log = config, run, stop, log
        self.step = 0
        model_folder = _model_folder(config)
        tokenizer = Tokenizer.from_folder(model_folder)
        model_config = ModelConfig.from_folder(model_folder)
        check_against_model(config, model_config.max_positions)
        source = _lease_source(config, tokenizer)

        model = load_policy(model_folder, config.learner.device)
        self.trainer = Trainer(model, objective, config.learner, config.sampling.temperature, seed=config.run.seed)
        self.checkpoints = checkpoint.Checkpoints(run.checkpoints, config.learner.keep_checkpoints, model_folder)
        state = self.checkpoints.restore(self.trainer.model, self.trainer.optimizer, LearnerState, on_event=log)
        self.journal = Journal(run.journal)
        self.ledger = Ledger(
            batch_size=config.learner.batch_size,
            group_size=config.learner.group_size,
            max_staleness=config.learner.max_staleness,
            dynamic_sampling=config.learner.dynamic_sampling,
            lease_seconds=config.transport.lease_seconds,
        )
        if state is not None:
            self.step = state.step
            self.trainer.step = state.step
            self.log(f"resumed at step {self.step} in {run.root}")
        self.publisher = FilesystemPublisher(run.weights, config.weights.keep, model_folder)
        self.publish_dtype = _publish_dtype(config, model_config)
        self.metrics = MetricsWriter(run.metrics, self.step)
        self.audit = TrainedSamples(run.trained, self.step)
        self.view = StepView(config.run.steps, self.step)
        self.hub = Hub(
            ZmqLearnerSocket(
                config.transport.address,
                heartbeat_seconds=config.transport.heartbeat_seconds,
                max_message_bytes=config.transport.max_message_bytes,
            ),
            self.journal,
            self.ledger,
            source,
            run_id=run.run_id(),
            digest=run_digest(config),
            needs_entropy=objective.needs_entropy_from_engine,
            heartbeat_seconds=config.transport.heartbeat_seconds,
            lease_seconds=config.transport.lease_seconds,
            limits=Limits(
                prompt_tokens=config.sampling.max_prompt_tokens,
                response_tokens=config.sampling.max_new_tokens,
                vocab_size=model_config.vocab_size,
            ),
            on_event=log,
        )
        self.hub.restore(state.ledger if state is not None else None)

    @property
    def done(self) -> bool:
        return self.step >= self.config.run.steps

    def start(self) -> None:
        self.hub.start()
        self._publish()

    def train(self) -> None:
        """The run: batch after batch."""
        while not self.done and not self.stop.requested:
            began = time.perf_counter()
            batch = self._next_batch()
            if batch is None:
                break
            waited = time.perf_counter() - began
            measured = self.trainer.train([group.trajectories for group in batch.groups], self.publisher.version)
            self.step += 1
            publication = self.publisher.version
            self._publish()
            self.hub.trained(batch)
            self.audit.write(self.step, batch)
            self._record(batch, measured, publication, waited, time.perf_counter() - began)
            if self._checkpoint_due():
                self._checkpoint()
        self._checkpoint()
        if self.done:
            self.hub.drain(DRAIN_SECONDS)

    def close(self) -> None:
        self.view.close()
        self.hub.stop()
        self.journal.close()
        self.metrics.close()
        self.audit.close()

    def _next_batch(self) -> Batch | None:
        """Wait for a whole batch; None when asked to stop.

        Raises:
            RunFailed: groups are left out (no signal, failed rewards) faster than a batch can ever fill.
        """
        wanted = self.config.learner.batch_size // self.config.learner.group_size
        ordered = self.config.learner.max_staleness == 0
        while not self.stop.requested:
            batch = self.hub.take(wanted, ordered, POLL_SECONDS)
            if batch is not None:
                fresh = self._without_stale(batch)
                if fresh:
                    return batch
                continue
            self._check_that_batches_can_fill()
        return None
