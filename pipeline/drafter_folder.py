"""Whose a folder of a head's training is: drafter.toml says the configuration, policy.json the model it is for."""

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w

from pipeline.config import Config, render
from pipeline.digest import run_digest
from pipeline.durable import write_durably
from pipeline.errors import UsageError
from pipeline.models.checkpoint import weights_digest
from pipeline.telemetry.report.drafter import SETTINGS

POLICY = "policy.json"
_COMPARED = (("run", ("seed",)), ("model", ("path",)), ("task", None), ("sampling", None), ("drafter", None))
"""tables and, unless it is all of them, keys"""
_FREE = {
    "steps", "seconds", "eval_every", "checkpoint_every", "dtype", "learning_rate", "matrix_learning_rate",
}  # fmt: skip
"""keys of [drafter] that a resumed training may change"""
_Table = dict[str, Any]
T = TypeVar("T")


class _Settings(msgspec.Struct):
    """The tables of drafter.toml that are compared."""

    run: _Table
    model: _Table
    task: _Table
    sampling: _Table
    drafter: _Table


def check_folder(out: Path, config: Config) -> None:
    """The folder holds this training or none.

    Raises:
        UsageError: it holds another one, of other settings or of another model, or cannot be read.
    """
    settings = _read(out / SETTINGS, lambda text: msgspec.convert(tomllib.loads(text), _Settings))
    if settings and (differing := _differing(settings, config)):
        raise UsageError(f"{out} holds another training: {'; '.join(differing)}; choose another --out")
    policy = _read(out / POLICY, lambda text: msgspec.json.decode(text, type=dict[str, str]))
    if policy is None:  # a folder of an earlier version
        return
    if changed := [name for name, digest in _policy(config).items() if policy.get(name) != digest]:
        raise UsageError(
            f"{out} is of another model: {', '.join(changed)} of model.path = {config.model.path!r} changed since; "
            "put that model back, or choose another --out"
        )


def claim(out: Path, config: Config) -> None:
    """From now on the folder is of this training."""
    policy = msgspec.json.encode(_policy(config))
    with usable(out):
        out.mkdir(parents=True, exist_ok=True)
        write_durably(out / POLICY, policy)
        write_durably(out / SETTINGS, tomli_w.dumps(tomllib.loads(render(config))).encode())


@contextmanager
def usable(out: Path) -> Iterator[None]:
    """
    Raises:
        UsageError: what is done with the folder meanwhile fails.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"--out {out} cannot be used: {error}; choose another") from error


def _differing(before: _Settings, config: Config) -> list[str]:
    """Keys on which the two do not agree and would have to, with both values."""
    now: dict[str, _Table] = tomllib.loads(render(config))
    return [
        f"{section}.{key} ({getattr(before, section).get(key)!r} before, {value!r} now)"
        for section, keys in _COMPARED
        for key, value in now[section].items()
        if (keys is None or key in keys) and not (section == "drafter" and key in _FREE)
        if getattr(before, section).get(key) != value
    ]


def _policy(config: Config) -> dict[str, str]:
    """Hashes of the model, by what they are of."""
    digest = run_digest(config)
    return {
        "config.json": digest["model"], "tokenizer.json": digest["tokenizer"],
        "weights": weights_digest(Path(config.model.path)),
    }  # fmt: skip


def _read(path: Path, parse: Callable[[str], T]) -> T | None:
    """None where there is no such file."""
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.MsgspecError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}; delete it if the folder is of this training, or choose another --out"
        ) from error
