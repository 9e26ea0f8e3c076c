"""Keys of the transport: who the learner is, and which engines it lets in (CURVE, as ZeroMQ specifies it).

A folder made by `rollahead keygen` holds `learner.secret`, `learner.public`, one `NAME.secret` an engine, and
`engines.allow`: a public key and a name a line. The learner's machine needs the first and the last, an engine's machine
`learner.public` and its own secret. Keys are Z85 text, as ZeroMQ writes them.
"""

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from pipeline.durable import write_durably
from pipeline.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_LENGTH = 40
LEARNER = "learner"
DEFAULT_ENGINE = "engine"


def fingerprint(public_key: bytes) -> str:
    """16 hexadecimal digits that stand for a public key (Z85); a producer's id begins with them."""
    return hashlib.sha256(public_key).hexdigest()[:16]


class AllowList:
    """The public keys in `engines.allow`; a changed file counts from the next connection on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._names: dict[bytes, str] = {}
        self.problem = ""
        """why the list allows nobody at the moment"""
        self._refresh()

    def name(self, public_key: bytes) -> str | None:
        """The name beside a key; None when it is not listed. A list that cannot be read any more allows nobody."""
        try:
            self._refresh()
            self.problem = ""
        except UsageError as error:
            self._stamp, self._names, self.problem = None, {}, str(error)
        return self._names.get(public_key)

    def __len__(self) -> int:
        return len(self._names)

    def _refresh(self) -> None:
        try:
            status = self.path.stat()
            _check_writers(self.path, status)
            if (status.st_mtime_ns, status.st_size) != self._stamp:
                self._names = _parse_allow_list(self.path)
                self._stamp = status.st_mtime_ns, status.st_size
        except OSError as error:
            raise _unreadable(self.path, error) from error


@dataclass(frozen=True, slots=True)
class LearnerKeys:
    """What the listening side needs."""

    secret: bytes
    allowed: AllowList


@dataclass(frozen=True, slots=True)
class EngineKeys:
    """What the connecting side needs."""

    learner_public: bytes
    public: bytes
    secret: bytes

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public)


def load_learner_keys(folder: Path) -> LearnerKeys:
    """Keys of a learner.

    Raises:
        UsageError: a file is missing, not a key, or open to other users.
    """
    return LearnerKeys(_read_secret(folder / f"{LEARNER}.secret"), AllowList(folder / "engines.allow"))


def load_engine_keys(folder: Path, name: str = DEFAULT_ENGINE) -> EngineKeys:
    """Keys of the engine called `name`.

    Raises:
        UsageError: a file is missing, not a key, or open to other users.
    """
    secret = _read_secret(folder / f"{name}.secret")
    public = folder / f"{LEARNER}.public"
    try:
        _check_writers(public, public.stat())  # who can exchange it can pass for the learner
    except OSError as error:
        raise _unreadable(public, error) from error
    return EngineKeys(_read_key(public), zmq.curve_public(secret), secret)


def keygen(folder: Path, engines: list[str]) -> list[str]:
    """Make a folder of keys, or add engines to one; existing keys stay as they are.

    Returns:
        A line a file written.

    Raises:
        UsageError: a name cannot be a file's, is taken, or the folder cannot be written.
    """
    for name in engines:
        if not _NAME.fullmatch(name) or name == LEARNER:
            raise UsageError(f"--engine {name!r} cannot be a key's name; use letters, digits, '.', '_' and '-'")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder for the keys")
    lines = []
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / f"{LEARNER}.secret").exists():
            public, secret = zmq.curve_keypair()
            _write_new(folder / f"{LEARNER}.secret", secret)
            _write_new(folder / f"{LEARNER}.public", public)
            lines.append(f"{folder / LEARNER}.secret  the learner's own; never copy it to an engine")
            lines.append(f"{folder / LEARNER}.public  for the learner and every engine")
        path = folder / "engines.allow"
        listed = path.read_bytes() if path.exists() else b""
        for name in dict.fromkeys(engines):
            public, secret = zmq.curve_keypair()
            _write_new(folder / f"{name}.secret", secret)
            listed += public + b" " + name.encode() + b"\n"
            lines.append(f"{folder / name}.secret  for the machine of engine {name}")
        write_durably(path, listed)
        path.chmod(0o600)
    except FileExistsError as error:
        raise UsageError(f"{error.filename} exists; give the new engine another name") from error
    except OSError as error:
        raise UsageError(f"keys cannot be written to {folder}: {error.strerror or error}") from error
    return [*lines, f"{path}  for the learner: take a line out to lock an engine out"]


def _write_new(path: Path, key: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key + b"\n")


def _check_writers(path: Path, status: os.stat_result) -> None:
    """Raises UsageError when somebody else could write a file that decides who is trusted."""
    if status.st_mode & 0o022:
        raise UsageError(f"{path} can be written by others; run chmod 600 {path}")
    if status.st_uid not in (os.geteuid(), 0):
        raise UsageError(f"{path} belongs to another user (id {status.st_uid}); use a copy of your own")


def _read_secret(path: Path) -> bytes:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise UsageError(f"{path} is open to other users (mode {mode:o}); run chmod 600 {path}")
    if status.st_uid != os.geteuid():
        raise UsageError(f"{path} belongs to another user (id {status.st_uid}); use a key of your own")
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    try:
        return _checked(path.read_bytes().strip(), path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _parse_allow_list(path: Path) -> dict[bytes, str]:
    names = {}
    for line in path.read_bytes().splitlines():
        key, _, name = line.partition(b" ")
        if key not in (b"", b"#"):  # a key may begin with #, a comment has a space behind it
            names[_checked(key, path)] = name.decode(errors="replace").strip()
    return names


def _checked(key: bytes, path: Path) -> bytes:
    try:
        if len(key) != _KEY_LENGTH:
            raise ValueError
        z85.decode(key)
    except (ValueError, KeyError):
        raise UsageError(f"{path} does not hold a key (40 signs of Z85); make one with rollahead keygen") from None
    return key


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"the key file {path} cannot be read ({error.strerror or error}); make keys with `rollahead keygen` and set "
        "transport.keys to their folder"
    )
