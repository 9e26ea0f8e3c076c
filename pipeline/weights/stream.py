"""Versions for engines that cannot read the learner's folder: asked for over the engine's connection, piece by piece.

The engine asks for the list of a version's files, then for their pieces in order, a few ahead; a piece that does not
come is asked for again, and what is on disk already is not, also after either side was restarted. A version becomes
visible (under its own name, beside older ones) when every file has its checksum.
"""

import contextlib
import errno
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.durable import sync, write_durably
from pipeline.messages import (
    LARGEST_CHUNK,
    BadMessage,
    LearnerMessage,
    WeightsChunk,
    WeightsFile,
    WeightsFiles,
    WeightsRequest,
)
from pipeline.weights.base import Publication, WeightsPending
from pipeline.weights.filesystem import FilesystemFollower, sha256_of, versions

_AHEAD = 16
"""pieces asked for and not here yet"""
_REQUESTS = 64
"""of one engine that may wait for an answer"""
_ANSWER_SECONDS = 3.0
"""until what did not come is asked for again, at first; on a slow connection it takes longer to come"""
_PATIENCE = 4.0
"""times as long as the last answer took"""
_MOST_PATIENT_SECONDS = 60.0
_ROOM = 16 * LARGEST_CHUNK
"""bytes queued for a peer beyond which it is not answered"""
_POLL_SECONDS = 0.02
_RETRY_SECONDS = 1.0
_LOCAL_VERSIONS = 2
_CHUNK = LARGEST_CHUNK
_RUN = "run"
"""file beside the versions received: whose they are"""


class WeightsServer:
    """Learner side: answers requests in a thread of its own, as the disk may be slow."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._requests: deque[tuple[bytes, WeightsRequest]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._lists: dict[int, tuple[WeightsFile, ...]] = {}
        self._thread = threading.Thread(target=self._work, name="weights", daemon=True)

    def start(self, send: Callable[[bytes, LearnerMessage], None], waiting: Callable[[bytes], int]) -> None:
        """
        Args:
            send: queues a message for a peer.
            waiting: bytes queued for a peer that it does not take at the moment; one with too many is not
                answered.
        """
        self._send, self._waiting = send, waiting
        self._thread.start()

    def request(self, peer: bytes, request: WeightsRequest) -> None:
        """Queue a request, unless it is queued already.

        Raises:
            BadMessage: the engine asks faster than it takes answers.
        """
        with self._changed:
            if (peer, request) in self._requests:
                return
            if sum(asking == peer for asking, _ in self._requests) >= _REQUESTS:
                raise BadMessage(f"more than {_REQUESTS} requests for weights at once")
            self._requests.append((peer, request))
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._stopped:
            with self._changed:
                found = next(((p, r) for p, r in self._requests if self._waiting(p) < _ROOM), None)
                if found is None:
                    self._changed.wait(_POLL_SECONDS if self._requests else None)
                    continue
                self._requests.remove(found)
            peer, request = found
            self._send(peer, self._answer(request))

    def _answer(self, request: WeightsRequest) -> LearnerMessage:
        files = self._list(request.version)
        if not request.file:
            return WeightsFiles(version=request.version, files=files)
        data = b""
        if request.file in {file.name for file in files}:  # so that no name leads out of the folder
            with contextlib.suppress(OSError), (self._folder(request.version) / request.file).open("rb") as file:
                file.seek(request.offset)
                data = file.read(_CHUNK)
        return WeightsChunk(version=request.version, file=request.file, offset=request.offset, data=data)

    def _list(self, version: int) -> tuple[WeightsFile, ...]:
        """Files of a version; none when it is gone."""
        folder = self._folder(version)
        if not folder.is_dir():
            self._lists.pop(version, None)
            return ()
        if version not in self._lists:
            for gone in [known for known in self._lists if not self._folder(known).is_dir()]:
                del self._lists[gone]
            try:
                self._lists[version] = tuple(
                    WeightsFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
                    for path in sorted(folder.iterdir())
                )
            except OSError:  # deleted meanwhile
                return ()
        return self._lists[version]

    def _folder(self, version: int) -> Path:
        return self._root / f"v{version}"


@dataclass(slots=True)
class _Download:
    version: int
    files: dict[str, WeightsFile] = field(default_factory=dict)
    listed: bool = False
    asked_at: float = 0.0
    """when something was asked for, or came, last; 0: nothing is to come"""
    asked_on: int = 0
    """number of the connection"""
    patience: float = 0.0
    asked_to: dict[str, int] = field(default_factory=dict)
    """file -> offset up to which pieces were asked for"""


class StreamFollower:
    """Engine side: a `WeightsFollower` over a folder of its own that it fills from the learner."""

    def __init__(
        self, root: Path, request: Callable[[WeightsRequest], bool], on_event: Callable[[str], None],
        connections: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        """
        Args:
            root: where versions are kept; the newest two stay.
            request: sends a request to the learner; False when it is away.
            on_event: gets a line about a version that arrived damaged, or that there is no space for.
            connections: how often the learner was connected to; what was asked before the last time is asked again.
        """
        self.root, self._request, self._on_event, self._connections = root, request, on_event, connections
        root.mkdir(parents=True, exist_ok=True)
        self._local = FilesystemFollower(root)
        self._messages: queue.Queue[WeightsFiles | WeightsChunk] = queue.Queue(2 * _AHEAD)
        self._wanted = -1
        self._download: _Download | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="weights", daemon=True)
        self._thread.start()

    def bind(self, run: str) -> None:
        """Versions are the run's from now on; what was received of another is deleted. Before the first `fetch`.

        Raises:
            OSError: the folder cannot be written.
        """
        owner = self.root / _RUN
        if owner.exists() and owner.read_bytes() == run.encode():
            return
        for path in self.root.iterdir():  # what says whose it is goes, too, and comes back last
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_durably(owner, run.encode())

    def newest(self) -> int:
        return self._local.newest()

    def fetch(self, version: int) -> tuple[Path, Publication]:
        """As `WeightsFollower.fetch`; a version that is not here is asked for.

        Raises:
            WeightsPending: it is on its way.
        """
        if self._local.newest() >= version:
            return self._local.fetch(version)
        self._wanted = max(self._wanted, version)
        raise WeightsPending(f"weights version {version} is on its way")

    def receive(self, message: WeightsFiles | WeightsChunk) -> None:
        """An answer of the learner; returns at once. What comes faster than the disk takes it is asked for again."""
        with contextlib.suppress(queue.Full):
            self._messages.put_nowait(message)

    def close(self) -> None:
        """What has arrived stays, and is gone on with by the next engine that uses the folder."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                with contextlib.suppress(queue.Empty):
                    self._take(self._messages.get(timeout=0.05))
                self._advance()
            except OSError as error:
                self._on_event(f"weights cannot be written to {self.root} ({error.strerror or error}); trying again")
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    self._give_up()
                self._stopped.wait(_RETRY_SECONDS)

    def _advance(self) -> None:
        """Ask for what is missing."""
        download = self._download
        if download is None:
            if self._wanted > self._local.newest():
                self._download = _Download(self._wanted)
            return
        if download.listed and all(self._size(download, file) == file.bytes for file in download.files.values()):
            self._complete(download)
            return
        now, connection = time.monotonic(), self._connections()
        patience = max(download.patience, _ANSWER_SECONDS)
        if download.asked_at and (now - download.asked_at > patience or download.asked_on != connection):
            if download.asked_on == connection:
                download.patience = min(2 * patience, _MOST_PATIENT_SECONDS)  # what is under way still must not pile up
            download.asked_to.clear()
            download.asked_at = 0.0
        if not download.listed:
            if not download.asked_at and self._request(WeightsRequest(version=download.version)):
                download.asked_at, download.asked_on = now, connection
            return
        file = next(f for f in download.files.values() if self._size(download, f) < f.bytes)
        size = self._size(download, file)
        begin = max(size, download.asked_to.get(file.name, 0))
        while begin < min(file.bytes, size + _AHEAD * _CHUNK):
            if not self._request(WeightsRequest(version=download.version, file=file.name, offset=begin)):
                return
            begin += _CHUNK
            download.asked_to[file.name], download.asked_at, download.asked_on = begin, now, connection

    def _take(self, message: WeightsFiles | WeightsChunk) -> None:
        download = self._download
        if download is None or message.version != download.version:
            return
        if isinstance(message, WeightsFiles):
            self._begin(download, message)
            return
        file = download.files.get(message.file)
        if file is None:
            return
        now = time.monotonic()
        if download.asked_at:
            slow = min(_PATIENCE * (now - download.asked_at), _MOST_PATIENT_SECONDS)
            download.patience = max(download.patience, slow)
            download.asked_at = now  # also by a repetition: what was asked for is under way
        if message.offset != self._size(download, file):
            return
        if not message.data or message.offset + len(message.data) > file.bytes:
            self._give_up()  # deleted by the learner, which has a newer one
            return
        with self._part(download, file).open("ab") as part:
            part.write(message.data)

    def _begin(self, download: _Download, message: WeightsFiles) -> None:
        if not message.files:
            self._give_up()
            return
        needed = sum(file.bytes for file in message.files)
        if needed > shutil.disk_usage(self.root).free + self._present(download):
            raise OSError(errno.ENOSPC, f"no space: version {download.version} takes {needed} bytes")
        folder = self._folder(download)
        folder.mkdir(exist_ok=True)
        download.files = {file.name: file for file in message.files}
        for path in folder.iterdir():
            if path.name not in download.files or path.stat().st_size > download.files[path.name].bytes:
                path.unlink()
        download.listed, download.asked_at = True, 0.0

    def _complete(self, download: _Download) -> None:
        """Every file has its length: it is a version if every file has its checksum."""
        folder = self._folder(download)
        for file in download.files.values():
            path = folder / file.name
            path.touch()
            if sha256_of(path) != file.sha256:
                self._on_event(f"weights version {download.version} arrived damaged ({file.name}); asking again")
                path.unlink()
                download.asked_to.pop(file.name, None)
                download.asked_at = 0.0
                return
        for path in (*folder.iterdir(), folder):
            sync(path)
        folder.rename(self.root / f"v{download.version}")
        sync(self.root)
        self._download = None
        for version in versions(self.root)[:-_LOCAL_VERSIONS]:
            shutil.rmtree(self.root / f"v{version}", ignore_errors=True)
        for leftover in self.root.glob(".receiving-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _give_up(self) -> None:
        """The version cannot be had; what is wanted by then is asked for next."""
        if self._download is not None:
            self._wanted = max(self._wanted, self._download.version)
            shutil.rmtree(self._folder(self._download), ignore_errors=True)
            self._download = None
            self._stopped.wait(0.1)

    def _folder(self, download: _Download) -> Path:
        return self.root / f".receiving-{download.version}"

    def _part(self, download: _Download, file: WeightsFile) -> Path:
        return self._folder(download) / file.name

    def _size(self, download: _Download, file: WeightsFile) -> int:
        try:
            return self._part(download, file).stat().st_size
        except FileNotFoundError:
            return 0

    def _present(self, download: _Download) -> int:
        folder = self._folder(download)
        return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
