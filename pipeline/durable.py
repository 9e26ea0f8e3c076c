"""Files that are whole or absent after a power cut. Torch-free."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Push a file, or the names inside a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file by `content`: the old one or the new one survives, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
