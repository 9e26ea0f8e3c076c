"""The folder a run lives in: who writes what where, and whether an existing one may be resumed. Torch-free."""

import fcntl
import os
import tomllib
from pathlib import Path
from typing import TextIO

import msgspec

from pipeline.config import Config, changed_keys, render
from pipeline.config.load import convert
from pipeline.durable import write_durably
from pipeline.errors import UsageError


class RunState(msgspec.Struct, kw_only=True):
    """run.json: what identifies a run for as long as its folder lives."""

    run_id: str


class RunDirectory:
    """Paths of a run directory (architecture: config.toml, metrics.jsonl, checkpoints/, weights/, spool/, journal/)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.toml"
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = root / "checkpoints"
        self.weights = root / "weights"
        self.draft_head = root / "draft-head"
        self.small_model = root / "small-model"
        self.spool = root / "spool"
        self.received = root / "received-weights"
        self.journal = root / "journal"
        self.logs = root / "logs"
        self.batches = root / "batches"
        self.evaluation = root / "evaluation.json"
        self.trained = root / "trained.jsonl"
        self.samples = root / "samples.jsonl"
        self.tensorboard = root / "tensorboard"
        self.trace = root / "trace"
        self.environment = root / "environment.json"
        self.evaluation_config = root / "evaluation.toml"
        """options of an evaluation of a run that was there"""
        self.stalled = root / "stalled.txt"
        """who held what when no sample came any more"""
        self.report = root / "report.html"
        self._lock: TextIO | None = None

    def holds_a_run(self) -> bool:
        """Whether a policy was published here; a start that failed before that leaves nothing to agree with."""
        return self.config.exists() and any(self.weights.glob("v*"))

    def check_resumable(self, config: Config) -> None:
        """Refuse to go on with a run whose configuration meant something else.

        Raises:
            UsageError: names every key that differs, with both values.
        """
        if not self.holds_a_run():
            return
        try:
            before = convert(tomllib.loads(self.config.read_text()))
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{self.config} is not valid TOML ({error}); choose another --out") from error
        changed = changed_keys(before, config)
        if changed:
            raise UsageError(
                f"{self.root} holds a run with another configuration: {'; '.join(changed)}; "
                "use the same values or another --out"
            )

    def prepare(self, config: Config, path: Path | None = None) -> Path:
        """Create the folder and write the resolved configuration into it; the learner locks it first.

        Args:
            path: of the file; None: config.toml.

        Returns:
            The file.

        Raises:
            UsageError: another run lives there, or a learner is at work in it, or it cannot be written.
        """
        try:
            self.check_resumable(config)
            self.root.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self.lock()
                self.unlock()
            temporary = self.root / ".config.toml"
            temporary.write_text(render(config))
            os.replace(temporary, path or self.config)
            return path or self.config
        except OSError as error:
            raise self._unwritable(error) from error

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def lock(self) -> None:
        """One learner a run directory; the lock goes with the process, however it ends.

        Raises:
            UsageError: another has it, or the folder cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / "learner.lock").open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if not isinstance(error, BlockingIOError):
                raise self._unwritable(error) from error
            raise UsageError(f"another learner is running in {self.root}; stop it or choose another run.out") from None
        self._lock = file

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(f"run directory {self.root} cannot be written: {error}; choose another run.out")

    def run_id(self) -> str:
        """Stable identity of the run, made at the first start.

        Raises:
            UsageError: it cannot be written.
        """
        run_id = self.known_run_id() or os.urandom(8).hex()
        try:
            write_durably(self.root / "run.json", msgspec.json.encode(RunState(run_id=run_id)))
        except OSError as error:
            raise UsageError(f"{self.root} cannot be written ({error.strerror or error}); free space there") from error
        return run_id

    def known_run_id(self) -> str | None:
        """None where no learner has been yet, or the file was lost to a crash."""
        try:
            return msgspec.json.decode((self.root / "run.json").read_bytes(), type=RunState).run_id
        except (OSError, msgspec.MsgspecError):
            return None
