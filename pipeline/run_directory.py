"""The folder a run lives in: who writes what where, and whether an existing one may be resumed. Torch-free."""

import fcntl
import os
import tomllib
from pathlib import Path
from typing import TextIO

import msgspec

from pipeline.config import Config, changed_keys, render
from pipeline.config.load import convert
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
        self.spool = root / "spool"
        self.journal = root / "journal"
        self.logs = root / "logs"
        self.trained = root / "trained.jsonl"
        self._lock: TextIO | None = None

    def exists(self) -> bool:
        return self.config.exists()

    def check_resumable(self, config: Config) -> None:
        """Refuse to go on with a run whose configuration meant something else.

        Raises:
            UsageError: names every key that differs, with both values.
        """
        if not self.exists():
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

    def prepare(self, config: Config) -> None:
        """Create the folder and write the resolved configuration into it."""
        self.check_resumable(config)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = self.root / ".config.toml"
            temporary.write_text(render(config))
            os.replace(temporary, self.config)
        except OSError as error:
            raise UsageError(f"run directory {self.root} cannot be written: {error}; choose another run.out") from error

    def lock(self) -> None:
        """One learner a run directory; the lock goes with the process, however it ends."""
        file = (self.root / "learner.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UsageError(f"another learner is running in {self.root}; stop it or choose another run.out") from None
        self._lock = file

    def run_id(self) -> str:
        """Stable identity of the run, made at the first start."""
        path = self.root / "run.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=RunState).run_id
        run_id = os.urandom(8).hex()
        path.write_bytes(msgspec.json.encode(RunState(run_id=run_id)))
        return run_id
