"""`rollahead run`: a learner and engines as processes of this machine, watched until the run is done.

Children write to files under logs/; the launcher draws what metrics.jsonl says. A child killed by a signal is started
again (run.restarts times): the learner from its checkpoint and journal, an engine with its spool. Ctrl-C reaches this
process alone, which asks the children once to stop cleanly; a second one stops everything now.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Config, check_config
from pipeline.errors import RunFailed, UsageError
from pipeline.run_directory import RunDirectory
from pipeline.stop import INTERRUPTED, StopSignal
from pipeline.telemetry import Log
from pipeline.telemetry.live import RunView
from pipeline.telemetry.metrics import NewRows

POLL_SECONDS = 0.25
STOP_SECONDS = 60.0
_WARNING = re.compile(r"^\S+ \w+: warning\b|\"level\": \"warning\"", re.IGNORECASE)


def run(config: Config, demo: bool, *, evaluate_only: bool = False) -> int:
    """Run to the end; returns the exit code."""
    check_config(config)
    _check_parts(config, evaluate_only)
    # The processes share the cores: threads that spin while they wait for one another would take them from the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _choose_address(config)
    directory = RunDirectory(Path(config.run.out))
    written = directory.evaluation_config if evaluate_only and directory.holds_a_run() else None
    path = directory.prepare(config, written)
    stop = StopSignal()
    if not config.model.path:
        _warm_start(config, stop)
    group = ProcessGroup(config, directory, stop, path, ["--eval-only"] if evaluate_only else [])
    stop.before_exit = group.kill
    began = time.monotonic()
    try:
        code = group.watch()
    finally:
        group.close()
    if code == 0 and evaluate_only:
        print(directory.evaluation.read_text(), end="")
    elif code == 0 and not stop.requested:
        from pipeline.summary import print_summary

        print_summary(config, directory, time.monotonic() - began, demo=demo)
    else:
        Log("run")(f"interrupted; state is kept in {directory.root}, the same command goes on from it")
    return code


def _check_parts(config: Config, evaluate_only: bool) -> None:
    """What learner and engines would refuse: before minutes of warm start, not after."""
    from learner.composition import build_objective
    from learner.startup import check_startup
    from pipeline.engine.startup import check_pieces

    build_objective(config)
    check_startup(config, evaluate_only)
    check_pieces(config)


def _choose_address(config: Config) -> None:
    """The default address is one port; runs beside each other need one each."""
    if config.transport.address != type(config.transport)().address:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config.transport.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _warm_start(config: Config, stop: StopSignal) -> None:
    from learner.warm_start import ensure_embedded_model
    from pipeline.telemetry.progress import WarmStartView

    with WarmStartView() as view:
        ensure_embedded_model(config, lambda p: view.show(p, stop))


class Child:
    """One process of the run."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self._command, self.log = name, command, log
        self.restarts = 0
        self._read = log.stat().st_size if log.exists() else 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as file:
            self._log_begin = file.tell()
            # a session of its own: the terminal's Ctrl-C must reach the launcher only
            return subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def restart(self) -> None:
        self.restarts += 1
        self.process = self._start()

    def new_warnings(self) -> list[str]:
        """Lines with warnings since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        return [text for text in whole.decode(errors="replace").splitlines() if _WARNING.search(text)]

    def reason(self) -> str:
        """The line by which the process said why it failed, else its last one."""
        written = self.log.read_bytes()[self._log_begin :].decode(errors="replace")
        lines = [text for text in written.splitlines() if text.strip()]
        said = [text.removeprefix("rollahead: ") for text in lines if text.startswith("rollahead: ")]
        return (said or lines or ["it said nothing"])[-1]


class ProcessGroup:
    """Starts the children, shows progress, ends with the learner."""

    def __init__(
        self, config: Config, directory: RunDirectory, stop: StopSignal, path: Path, learner_options: Sequence[str] = ()
    ) -> None:
        """
        Args:
            path: of the file that the children read.
        """
        self.config, self.directory, self.stop, self.path = config, directory, stop, path
        self.log = Log("run")
        self.rows, self.samples = NewRows(directory.metrics), NewRows(directory.samples)
        self.view = RunView(config.run.steps, len(self.rows.read()))
        self.samples.read()
        self.alone_since = time.monotonic()
        self.learner = Child("learner", self._command("learner", *learner_options), directory.logs / "learner.log")
        engine = self._command("engine", "--connect-timeout", "0")  # the launcher watches the learner itself
        self.engines = [
            Child(f"engine-{index}", engine, directory.logs / f"engine-{index}.log")
            for index in range(config.run.engines)
        ]

    def _command(self, name: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "pipeline.cli", name, str(self.path), *options]

    def watch(self) -> int:
        """Until the learner is done; returns its exit code."""
        while True:
            self._show_warnings()
            self._show_new_rows()
            if self.stop.requested:
                return self._stop_all()
            code = self.learner.process.poll()
            if code is not None and not self._restarted(self.learner, code):
                self._show_new_rows()
                return self._learner_ended(code)
            self._tend_engines()
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Nothing outlives the launcher."""
        self.view.close()
        deadline = time.monotonic() + STOP_SECONDS
        for child in (*self.engines, self.learner):
            if child.process.poll() is None:
                child.process.terminate()
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    def kill(self) -> None:
        """At once, nothing saved."""
        for child in (self.learner, *self.engines):
            if child.process.poll() is None:
                child.process.kill()

    def _show_new_rows(self) -> None:
        rows = self.rows.read()
        for sample in self.samples.read() if rows else ():
            self.view.sample(sample)
        for row in rows:
            self.view.show(row)

    def _show_warnings(self) -> None:
        """What the processes warned of, whose logs nobody looks at."""
        for child in (self.learner, *self.engines):
            for text in child.new_warnings():
                self.view.warn(text)

    def _tend_engines(self) -> None:
        codes = [engine.process.poll() for engine in self.engines]
        if any(code is None for code in codes):
            self.alone_since = time.monotonic()
        elif time.monotonic() - self.alone_since > STOP_SECONDS:
            raise RunFailed(f"no engine is left and the learner still waits; see {self.directory.logs}")
        for engine, code in zip(self.engines, codes, strict=True):
            if code is None or code == 0 or self._restarted(engine, code):
                continue
            if self.learner.process.poll() is None:
                raise _failure(engine, code)

    def _restarted(self, child: Child, code: int) -> bool:
        """Killed from outside (a signal) is worth another start; an error of its own is not."""
        if code >= 0 or child.restarts >= self.config.run.restarts:
            return False
        self.log(f"{child.name} was killed ({signal.Signals(-code).name}); starting it again")
        child.restart()
        return True

    def _learner_ended(self, code: int) -> int:
        if code in (0, INTERRUPTED):
            return code
        raise _failure(self.learner, code)

    def _stop_all(self) -> int:
        self.view.close()
        self.log("stopping: state is being saved (once more to stop at once)")
        for child in (self.learner, *self.engines):
            if child.process.poll() is None:
                os.kill(child.process.pid, signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        for child in (self.learner, *self.engines):
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.log(f"{child.name} did not stop within {STOP_SECONDS:.0f} s and is killed")
                child.process.kill()
        return INTERRUPTED


def _failure(child: Child, code: int) -> RunFailed | UsageError:
    message = f"the {child.name} ended with exit code {code}: {child.reason()} (log: {child.log})"
    return UsageError(message) if code == UsageError.exit_code else RunFailed(message)
