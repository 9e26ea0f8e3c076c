"""Versions as folders of a shared file system: weights/vN/{model.safetensors, publication.json, config.json, ...}.

Each is a complete Hugging Face checkpoint directory: an engine, or anybody, can load it as it is. A version is written
under a temporary name, synced, and renamed; so a folder named vN is complete, and its checksum says whether it is still
intact. The newest number ever used is kept in weights/newest, so that numbers survive deletion.
"""

import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pipeline.durable import sync, write_durably
from pipeline.failpoints import failpoint
from pipeline.weights.base import Publication, WeightsError

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"^v(\d+)$")
COMPANION_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""Files that make a folder of weights and a config.json a complete Hugging Face model, where the source has them."""


_PINNED_AT_MOST = 4
"""times `keep` that versions are spared for engines; one that stays behind for longer takes the newest"""


def versions(root: Path) -> list[int]:
    """Numbers of the versions in a folder, rising."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for entry in root.iterdir() if (m := _NAME.match(entry.name)))


def save_tensors(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    """A safetensors file whose failure to be written is an OSError, as any other file's.

    Raises:
        OSError: ENOSPC when the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    failpoint("tensors.write")
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def replace_tensors(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    """As `save_tensors`; the file before or the new one survives a crash, never a part.

    Raises:
        OSError: as `save_tensors`; the file before is untouched.
    """
    temporary = path.with_name(f".{path.name}.new")
    save_tensors(tensors, temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def state_dtype(folder: Path, dtype: str) -> None:
    """Have the config.json of a folder say what type its weights are of."""
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_bytes(msgspec.json.encode(config | {"dtype": dtype}))


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FilesystemPublisher:
    """Writes versions; one publisher a run directory."""

    def __init__(self, root: Path, keep: int, model_folder: Path) -> None:
        self.root, self.keep, self.model_folder = root, keep, model_folder
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.version = max([*versions(root), self._recorded()], default=-1)
        self.timeline = self._newest_timeline() + 1

    def publish(self, tensors: "dict[str, torch.Tensor]", step: int) -> Publication:
        """Write the next version.

        Raises:
            OSError: the disk is full or not writable; nothing visible has changed.
        """
        version = self.version + 1
        folder = self.root / f".writing-{version}"
        try:
            folder.mkdir(exist_ok=True)
            weights = folder / "model.safetensors"
            save_tensors(tensors, weights)
            self._write_companions(folder, str(next(iter(tensors.values())).dtype).removeprefix("torch."))
            publication = Publication(
                version=version,
                timeline=self.timeline,
                step=step,
                sha256=sha256_of(weights),
                bytes=weights.stat().st_size,
            )
            (folder / "publication.json").write_bytes(msgspec.json.encode(publication))
            for path in (*folder.iterdir(), folder):
                sync(path)
            # before the rename: a number that was ever visible is never given out again
            write_durably(self.root / "newest", str(version).encode())
            failpoint("publish.written")
            folder.rename(self.root / f"v{version}")
            sync(self.root)
            failpoint("publish.renamed")
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.version = version
        return publication

    def retire(self, oldest_in_use: int | None) -> None:
        """Delete all but the newest `keep` versions, sparing for a while those a live engine has yet to leave behind.

        Nothing is lost by a deletion: an engine that looks for a version that is gone takes the newest.
        """
        present = versions(self.root)
        for index, version in enumerate(reversed(present)):
            spared = oldest_in_use is not None and version >= oldest_in_use and index < _PINNED_AT_MOST * self.keep
            if index >= self.keep and not spared:
                shutil.rmtree(self.root / f"v{version}", ignore_errors=True)

    def _write_companions(self, folder: Path, dtype: str) -> None:
        for name in ("config.json", *COMPANION_FILES):
            if (self.model_folder / name).exists():
                shutil.copyfile(self.model_folder / name, folder / name)
        state_dtype(folder, dtype)

    def _recorded(self) -> int:
        try:
            return int((self.root / "newest").read_text())
        except (FileNotFoundError, ValueError):
            return -1

    def _newest_timeline(self) -> int:
        for version in reversed(versions(self.root)):
            try:
                return msgspec.json.decode(
                    (self.root / f"v{version}" / "publication.json").read_bytes(), type=Publication
                ).timeline
            except (OSError, msgspec.MsgspecError):
                continue
        return 0


class FilesystemFollower:
    """Reads versions that a publisher on the same file system writes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def newest(self) -> int:
        return max(versions(self.root), default=-1)

    def fetch(self, version: int, patience: float = 0.5) -> tuple[Path, Publication]:
        """The folder of `version`, or of the newest one if that is gone; checked against its checksum.

        A version can be deleted while it is read, or be corrupt; then the newest is tried until `patience` seconds are
        over.
        """
        deadline = time.monotonic() + patience
        while True:
            wanted = version if (self.root / f"v{version}").is_dir() else self.newest()
            try:
                return self._verified(wanted)
            except (OSError, msgspec.MsgspecError, WeightsError) as error:
                if time.monotonic() > deadline:
                    raise WeightsError(f"weights version {wanted} in {self.root} cannot be used: {error}") from error
            time.sleep(0.1)
            version = max(version, self.newest())

    def _verified(self, version: int) -> tuple[Path, Publication]:
        folder = self.root / f"v{version}"
        publication = msgspec.json.decode((folder / "publication.json").read_bytes(), type=Publication)
        found = sha256_of(folder / "model.safetensors")
        if found != publication.sha256:
            raise WeightsError(f"checksum {found[:12]} differs from the published {publication.sha256[:12]}")
        return folder, publication
