"""`metrics.jsonl`: one object an optimiser batch, with stable keys. Torch-free."""

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from msgspec import Struct, field, structs

from pipeline.errors import UsageError


class StepMetrics(Struct, kw_only=True):
    """One line of metrics.jsonl. Counts are for the step unless the key ends in `_total`; None becomes null."""

    step: int
    policy_version: int
    loss: float
    grad_norm: float
    learning_rate: float
    reward_mean: float
    reward_std: float
    reward_mean_unfiltered: float
    """before groups without signal were left out"""
    groups_without_signal: int
    response_length_mean: float
    truncated_fraction: float
    tokens_trained: int
    tokens_per_second: float
    """tokens trained / wall_seconds"""
    staleness_mean: float
    """publications between a trained token's policy and the newest, over tokens"""
    staleness_max: float
    entropy: float
    """nats a token, of the policy at the start of the batch"""
    entropy_ratio_kept: float
    clip_fraction: float
    importance_weight_mean: float
    importance_weight_ess: float
    """effective sample size of the token weights as a share of their number"""
    mismatch_k3: float | None
    """k3 between learner and engine log-probs over tokens of the newest version; None when there were none"""
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_total: dict[str, int] = field(default_factory=dict)
    acceptance_rate: float | None = None
    tokens_per_verification: float = 1.0
    drafters: dict[str, dict[str, int]] = field(default_factory=dict)
    engine_seconds: float = 0.0
    """seconds engines spent generating since the step before"""
    learner_seconds: float = 0.0
    wait_seconds: float = 0.0
    """seconds the learner waited for a batch"""
    wall_seconds: float = 0.0
    learner_time: dict[str, float] = field(default_factory=dict)
    """seconds of the learner's main thread since the step before, by state"""
    engine_time: dict[str, float] = field(default_factory=dict)
    """seconds of engines' main threads since the step before, by state, summed over engines; beside them `reward`, and
    `sending`: CPU seconds, in whatever thread, of spooling samples and speaking with the learner"""
    acceptance_by_depth: dict[str, list[float]] = field(default_factory=dict)
    """drafter -> share of its drafts' first tokens that were accepted, of second ones after an accepted first, ..."""
    response_length_max: float | None = None
    engines: int = 0
    reissued_total: int = 0
    skipped_steps: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    """leased, and where they are: trained, dropped, buffered, in_flight; cumulative, the first is the others' sum"""
    transport: dict[str, float] = field(default_factory=dict)
    """counters and sizes of streaming, cumulative (docs/reliability.md)"""
    evaluation: dict[str, float] = field(default_factory=dict)
    """`eval_*` of an evaluation step, written as keys of the line itself"""
    extra: dict[str, float] = field(default_factory=dict)
    """metrics of the objective's pieces, under their names"""


class MetricsWriter:
    """Appends lines; a resumed run's file is cut back to its checkpoint first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_back(path, resume_step)
        self._file: TextIO = path.open("a")

    def write(self, metrics: StepMetrics) -> None:
        self._file.write(json.dumps(as_row(metrics)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def as_row(metrics: StepMetrics) -> dict[str, Any]:
    """The line as an object."""
    line = {key: _plain(value) for key, value in structs.asdict(metrics).items()}
    return line | line.pop("evaluation")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a damaged one and one still being written are left out."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The same, and how many complete lines are damaged."""
    return _rows(path.read_bytes()) if path.exists() else ([], 0)


class NewRows:
    """The lines of a file that grows, each once. One that took its place, as `cut_back` puts it there, is read from the
    beginning, and as many lines as were read before are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self._offset, self._rows = -1, 0, 0

    def read(self) -> list[dict[str, Any]]:
        """Complete lines since the last call."""
        try:
            with self._path.open("rb") as file:
                status, known = os.fstat(file.fileno()), 0
                if status.st_ino != self._file or status.st_size < self._offset:
                    known, self._file, self._offset, self._rows = self._rows, status.st_ino, 0, 0
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        rows, _ = _rows(whole)
        self._offset += len(whole)
        self._rows += len(rows)
        return rows[known:]


def cut_back(path: Path, step: int) -> None:
    """Leaves out the lines after a step, and one that was cut short.

    Raises:
        UsageError: the file cannot be rewritten.
    """
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    if not path.exists():
        return
    temporary = path.with_suffix(".cut")
    try:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"metrics file {path} cannot be rewritten: {error}; check its permissions") from error


def _rows(lines: bytes) -> tuple[list[dict[str, Any]], int]:
    """Those that are whole, and how many complete ones are damaged."""
    rows, damaged = [], 0
    for line in lines.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += line.endswith(b"\n")
    return rows, damaged


def _plain(value: Any) -> Any:
    """JSON has no NaN; a value that is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
