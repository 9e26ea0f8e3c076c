"""The learner process: groups in, policy versions out.

Leases go out and trajectories come in on other threads (`learner.hub`); this one takes whole batches, trains on them,
publishes the new policy, writes the metrics line, and now and then a checkpoint. A checkpoint holds weights, optimizer,
random state and the ledger of leases together, so a killed learner continues as if the steps after it had not been.
"""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from msgspec import Struct

from learner import checkpoint, parts, ranks, replay
from learner.audit import TrainedSamples
from learner.co_training import HeadCoTraining
from learner.collapse import CollapseWatch
from learner.composition import build_objective, idle_gate, uncorrected_sampler
from learner.distillation import Distillation
from learner.followers import Begin, Leave, NoBatchYet, Publish, SaveCheckpoint, follow, tell, tell_batch
from learner.hub import Limits
from learner.journal import Journal
from learner.leases import Batch, LedgerState
from learner.objective import Objective
from learner.observer import LearnerObserver
from learner.policy import gathered_state, resolve_device
from learner.stall import Loneliness, dump_state
from learner.startup import check_startup, shared_prompts
from learner.step_metrics import Metrics
from learner.step_record import step_metrics
from learner.trainer import build_trainer
from pipeline.config import Config, check_against_model, check_config, resolve_threads
from pipeline.errors import RunFailed
from pipeline.failpoints import failpoint
from pipeline.models.chat import chat_template
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import Tokenizer
from pipeline.run_directory import RunDirectory
from pipeline.stop import INTERRUPTED, StopSignal
from pipeline.tasks import load_task
from pipeline.telemetry import Log, MetricsWriter
from pipeline.telemetry.metrics import as_row
from pipeline.watchdog import Watchdog
from pipeline.weights import FilesystemPublisher

POLL_SECONDS = 0.5
DRAIN_SECONDS = 20.0
DISK_RETRY_SECONDS = 2.0
JOURNAL_SEGMENTS = 16
REMEDIES = {
    "no_signal": "every group's rewards are all equal: change the task's difficulty, raise learner.group_size, "
    "or set learner.dynamic_sampling = false",
    "reward_timeout": "raise task.reward_seconds, or see the engine's log for the samples",
    "reward_died": "raise task.reward_memory_mb, or see the engine's log for the samples",
    "reward_error": "the reward function fails: the engine's log names the samples",
    "too_large": "raise transport.max_message_bytes",
    "stale": "raise learner.max_age or lower learner.max_staleness",
}


def run_learner(config: Config, *, evaluate_only: bool = False) -> int:
    """Train until `run.steps` batches are done, or evaluate once; returns the exit code."""
    check_config(config)
    objective = build_objective(config)
    ranks.start(resolve_device(config.learner.device).type, config.transport.stall_seconds)
    threads = resolve_threads(config.learner.threads, config)
    torch.set_num_threads(threads if config.learner.threads else max(1, threads // ranks.on_this_machine()))
    if ranks.rank() > 0:
        return follow(config, objective)
    check_startup(config, evaluate_only)  # of rank 0 alone, which has the socket and its keys
    stop, log = StopSignal(), Log("learner")
    for warning in filter(None, (uncorrected_sampler(objective, config), idle_gate(objective, config))):
        log(warning)
    Log.structured = config.telemetry.log_format == "json"
    run = RunDirectory(Path(config.run.out))
    run.lock()
    if evaluate_only and run.holds_a_run():
        run.check_resumable(config)
    else:
        run.prepare(config)
    learner = Learner(config, run, objective, stop, log, evaluate_only=evaluate_only)
    try:
        if evaluate_only:
            return 0 if learner.evaluate_only() else INTERRUPTED
        learner.start()
        learner.train()
        return 0 if learner.done else INTERRUPTED
    except Exception as error:
        if ranks.is_loss_of_a_rank(error):
            # engines wait for the learner to come back, as after the loss of this process
            raise ranks.lost() from error
        learner.hub.fail(str(error), traceback.format_exc())
        raise
    finally:
        learner.close()


T = TypeVar("T")


class LearnerState(Struct, kw_only=True):
    """state.json of a checkpoint."""

    step: int
    ledger: LedgerState
    objective: dict[str, dict[str, float]] = {}
    """what the objective's pieces remember"""


class Learner:
    """State of the learner's main loop."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        objective: Objective,
        stop: StopSignal,
        log: Log,
        *,
        evaluate_only: bool = False,
    ) -> None:
        self.config, self.run, self.stop, self.log = config, run, stop, log
        self.model_folder = parts.model_folder(config, stop)
        tokenizer = Tokenizer(self.model_folder)
        model_config = ModelConfig.from_folder(self.model_folder)
        check_against_model(config, model_config.max_positions)
        task = load_task(config.task, config.run.seed, chat_template(self.model_folder))
        if warning := shared_prompts(config, task):
            log(warning)
        source = parts.lease_source(config, task, tokenizer, objective)
        evaluates = evaluate_only or config.learner.eval_every > 0
        self.eval_leases = parts.eval_leases(config, task, tokenizer) if evaluates else None

        tell(Begin(str(self.model_folder)))
        self.trainer = build_trainer(config, objective, self.model_folder)
        model, optimizer = self.trainer.model, self.trainer.optimizer
        restored = checkpoint.restore(run.checkpoints, model, optimizer, LearnerState, warn=log)
        self.step = self.trainer.step = restored.state.step if restored else 0
        self.saved_step = self.step if restored else -1
        if restored:
            objective.restore(restored.state.objective)
            log(f"resumed at step {self.step} from {restored.folder}")
        self.draft_head = HeadCoTraining.from_config(config, model, self.model_folder)
        if self.draft_head and restored and not self.draft_head.restore(run.draft_head, self.step):
            log(f"{run.draft_head} has no intact head of step {self.step}; it is trained anew from where it began")

        self.distillation = Distillation.from_config(config, model, self.model_folder)
        if self.distillation and restored and not self.distillation.restore(run.small_model, self.step):
            log(f"{run.small_model} has no intact model of step {self.step}; it is distilled anew from where it began")

        self.publisher = FilesystemPublisher(run.weights, config.weights.keep, self.model_folder)
        self.publish_dtype = parts.publish_dtype(config, model_config)
        # An evaluation leaves the records as they are: opening them cuts them back to the checkpoint.
        self.metrics = None if evaluate_only else MetricsWriter(run.metrics, self.step)
        self.audit = None if evaluate_only else TrainedSamples(run.trained, self.step)
        self.observer = LearnerObserver(config, run, self.step, tokenizer.decode, log, cut_back=not evaluate_only)
        self.collapse = CollapseWatch()
        transport = config.transport
        segment_bytes = max(1, min(16 << 20, transport.journal_bytes // JOURNAL_SEGMENTS))
        self.journal = Journal(run.journal, segment_bytes, fsync=transport.fsync)
        limits = Limits(
            prompt_tokens=config.sampling.max_prompt_tokens,
            response_tokens=config.sampling.max_new_tokens,
            vocab_size=model_config.vocab_size,
            window_bytes=transport.window_bytes,
            stall_seconds=transport.stall_seconds or float("inf"),
        )
        self.hub = parts.build_hub(config, run, objective, self.journal, source, limits, log)
        self.hub.restore(restored.state.ledger if restored else None)
        self.stats_before = self.hub.stats()
        self.watchdog = Watchdog(transport.stall_seconds, self._stalled)
        self.loneliness = Loneliness(log, self.hub, time.monotonic())
        self.step_ended = time.perf_counter()

    @property
    def done(self) -> bool:
        return self.step >= self.config.run.steps

    def start(self) -> None:
        """Open for engines, with a first version for them to load."""
        self.hub.start()
        self.log(f"listening on {self.hub.address}, waiting for engines")
        self._publish()
        self.step_ended = time.perf_counter()

    def train(self) -> None:
        """The run: batch after batch."""
        while not self.done and not self.stop.requested:
            waiting = time.perf_counter()
            self.observer.enter("waiting for samples")
            batch = self._next_batch()
            if batch is None:
                break
            began = time.perf_counter()
            groups = [group.trajectories for group in batch.groups]
            if keep := self.config.learner.dump_batches:
                dump = partial(replay.dump, self.run.batches, self.step + 1, self.publisher.version, groups, keep)
                self._patiently(self.run.batches, dump)
            tell_batch(groups, self.publisher.version)
            self.observer.enter("learning")
            measured = self.trainer.train(groups, self.publisher.version)
            self.step += 1
            if self.draft_head:
                measured |= self.draft_head.train(groups)
            if self.distillation:
                measured |= self.distillation.train(groups)
            for warning in self.collapse.look(measured):
                self.log(f"warning: {warning}")
            failpoint("step.trained")
            self.observer.enter("publishing weights")
            self._publish()
            failpoint("publish.announced")
            evaluated = self._evaluate() if self._evaluation_due() else {}
            self.hub.trained(batch)
            failpoint("step.counted")
            self.hub.check()
            self._write_records(measured, batch, began - waiting, began, evaluated)
            failpoint("step.recorded")
            self.observer.enter("writing")
            if self._checkpoint_due():
                self._checkpoint()
        if self.step != self.saved_step:
            self._checkpoint()
        tell(Leave())
        if self.done:
            self.hub.drain(DRAIN_SECONDS)

    def evaluate_only(self) -> dict[str, float]:
        """Evaluate the policy as it is, instead of training; written to evaluation.json. Of the run nothing changes
        but the number of its publications.

        Returns:
            The metrics; empty when a stop was asked for.
        """
        self.hub.grant_no_training()
        self.start()
        found = self._evaluate()
        tell(Leave())
        if found:
            content = {"step": self.step, "policy_version": self.publisher.version, **found}
            text = msgspec.json.format(msgspec.json.encode(content)) + b"\n"
            self._patiently(self.run.evaluation, partial(_write_record, self.run.evaluation, text))
            self.hub.drain(DRAIN_SECONDS)
        return found

    def close(self) -> None:
        """Let go of sockets and files; what is on disk is complete."""
        self.watchdog.close()
        self.observer.close()
        self.hub.stop()
        self.journal.close()
        for records in (self.metrics, self.audit):
            if records is not None:
                records.close()

    def _evaluation_due(self) -> bool:
        every = self.config.learner.eval_every
        return every > 0 and self.step % every == 0

    def _evaluate(self) -> dict[str, float]:
        """Metrics of the newest publication on held-out prompts; nothing when asked to stop."""
        assert self.eval_leases is not None
        self.observer.enter("evaluating")
        self.hub.begin_evaluation(self.eval_leases(self.publisher.version))
        while not self.stop.requested:
            self._beat()
            if (evaluation := self.hub.evaluated(POLL_SECONDS)) is not None:
                found = evaluation.metrics(self.config.learner.eval_success)
                self.log(
                    f"evaluation at step {self.step}: reward {found['eval_reward_mean']:.3f}, "
                    f"pass@1 {found['eval_pass_at_1']:.3f}"
                )
                return found
            self._check_that_engines_advance()
        return {}

    def _next_batch(self) -> Batch | None:
        """Wait for a whole batch of fresh groups; None when asked to stop.

        Raises:
            RunFailed: samples are left out (no signal, failed rewards) faster than a batch can ever fill.
        """
        wanted = self.config.learner.batch_size // self.config.learner.group_size
        ordered = self.config.learner.max_staleness == 0
        while not self.stop.requested:
            self._beat()
            batch = self.hub.take(wanted, ordered, POLL_SECONDS, self.config.learner.max_age)
            if batch is not None:
                return batch
            self._check_that_batches_can_fill()
            self._check_that_engines_advance()
        return None

    def _check_that_engines_advance(self) -> None:
        limit, stats = self.config.transport.stall_seconds, self.hub.stats()
        self.loneliness.look(stats.engines, time.monotonic())
        if limit and not stats.journal_stalled and self.hub.stalled_seconds() > limit:
            dumped = dump_state(self.run.stalled, self.hub.describe())
            raise RunFailed(
                f"no sample arrived for {limit:.0f} s (transport.stall_seconds) although {stats.engines} engines are "
                f"connected; {stats.account}; {dumped}, and the engines' logs say more"
            )

    def _stalled(self, why: str, where: str) -> None:
        """This process hangs in a step: engines are told, and it ends; the same command goes on."""
        sys.stderr.write(f"{where}\nrollahead: {why}\n")
        self.hub.fail(why, where)
        time.sleep(1.0)  # for the messages to leave
        os._exit(1)

    def _check_that_batches_can_fill(self) -> None:
        learner = self.config.learner
        lost = {
            reason: count - self.stats_before.dropped.get(reason, 0)
            for reason, count in self.hub.stats().dropped.items()
            if reason not in ("duplicate", "unknown_lease")
        }
        total = sum(lost.values())
        if total >= learner.max_filtered_batches * learner.batch_size:
            reason = max(lost, key=lambda key: lost[key])
            raise RunFailed(
                f"{total} samples in a row were left out ({lost[reason]} as {reason}) and no batch of "
                f"{learner.batch_size} came together; {REMEDIES.get(reason, 'see the learner log')} "
                f"(limit: learner.max_filtered_batches = {learner.max_filtered_batches})"
            )

    def _publish(self) -> None:
        tell(Publish(str(self.publish_dtype).removeprefix("torch.")))
        tensors = gathered_state(self.trainer.model, self.publish_dtype)
        if self.draft_head:
            tensors |= self.draft_head.tensors(self.publish_dtype)
        if self.distillation:
            tensors |= self.distillation.tensors(self.publish_dtype)
        publication = self._patiently(self.run.weights, lambda: self.publisher.publish(tensors, self.step))
        self.hub.publish(publication.version)
        self.publisher.retire(self.hub.oldest_loaded_version())

    def _checkpoint_due(self) -> bool:
        learner, transport = self.config.learner, self.config.transport
        return self.step % learner.checkpoint_every == 0 or self.journal.size > transport.journal_bytes

    def _checkpoint(self) -> None:
        ledger = self.hub.state()
        if head := self.draft_head:
            keep = self.config.learner.keep_checkpoints
            self._patiently(self.run.draft_head, lambda: head.save(self.run.draft_head, self.step, keep))
        if distillation := self.distillation:
            keep = self.config.learner.keep_checkpoints
            self._patiently(self.run.small_model, lambda: distillation.save(self.run.small_model, self.step, keep))
        self._patiently(self.run.checkpoints, lambda: self._save(ledger))
        self.journal.drop_before(ledger.journal_offset)
        self.saved_step = self.step

    def _save(self, ledger: LedgerState) -> None:
        tell(SaveCheckpoint())
        checkpoint.save(
            self.run.checkpoints,
            self.step,
            self.trainer.model,
            self.trainer.optimizer,
            LearnerState(step=self.step, ledger=ledger, objective=self.trainer.objective.state()),
            keep=self.config.learner.keep_checkpoints,
            tokenizer_folder=self.model_folder,
        )

    def _beat(self) -> None:
        """Nothing to do yet, and nothing wrong."""
        self.watchdog.beat()
        tell(NoBatchYet())

    def _patiently(self, folder: Path, write: Callable[[], T]) -> T:
        """Write; while the disk is full wait for space, unless a stop is asked for."""
        waited = 0.0
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self.stop.requested:
                    raise _unwritable(folder, error) from error
                if not waited:
                    self.log(f"no space to write {folder}; waiting for it (Ctrl-C stops, the same command goes on)")
            for _ in range(int(DISK_RETRY_SECONDS / POLL_SECONDS)):
                if self.stop.requested:
                    break
                time.sleep(POLL_SECONDS)
                self._beat()
            waited += DISK_RETRY_SECONDS

    def _write_records(
        self, measured: Metrics, batch: Batch, waited: float, began: float, evaluated: dict[str, float]
    ) -> None:
        """trained.jsonl and metrics.jsonl.

        Raises:
            RunFailed: they cannot be written; both are cut back to the checkpoint when the run goes on.
        """
        self.observer.enter("writing")
        try:
            failpoint("records.write")
            assert self.audit is not None
            self.audit.write(self.step, batch)
            self._record(measured, batch, waited, began, evaluated)
        except OSError as error:
            raise _unwritable(self.run.root, error) from error

    def _record(
        self, measured: Metrics, batch: Batch, waited: float, began: float, evaluated: dict[str, float]
    ) -> None:
        """One line of metrics.jsonl, and one of progress."""
        wall = time.perf_counter() - self.step_ended
        self.step_ended = time.perf_counter()
        row = step_metrics(
            measured,
            batch,
            self.hub.stats(),
            self.stats_before,
            step=self.step,
            policy_version=self.publisher.version,
            wait_seconds=waited,
            learner_seconds=time.perf_counter() - began,
            wall_seconds=wall,
            learner_time=self.observer.step_seconds(),
        )
        row.evaluation = evaluated
        self.stats_before = self.hub.stats()
        assert self.metrics is not None
        self.metrics.write(row)
        self.observer.step(as_row(row), batch)


def _write_record(path: Path, text: bytes) -> None:
    failpoint("records.write")
    path.write_bytes(text)


def _unwritable(folder: Path, error: OSError) -> RunFailed:
    return RunFailed(
        f"{folder} cannot be written ({error.strerror or error}); free space there, then the same command goes on"
    )
