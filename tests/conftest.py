"""Shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Forgets compiled functions once any source of theirs is newer: numba looks at the file a function stands in,
    not at those of the functions it has inlined."""
    root = Path(__file__).resolve().parents[1]
    folders = [root / part for part in ("benchmarks", "drafters", "learner", "pipeline")]
    sources = [path for folder in folders for path in folder.rglob("*.py") if "njit" in path.read_text()]
    newest = max(path.stat().st_mtime for path in sources)
    indices = [path for folder in folders for path in folder.rglob("*.nbi")]
    if any(path.stat().st_mtime < newest for path in indices):
        for path in indices:
            path.unlink(missing_ok=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run what takes many minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes many minutes: run with --long"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Common models and data beside the checkout; tests that want them skip where they are absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"{SHARED} with models and data is not on this machine")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tiny tensors run slower on several threads, and results should not depend on the machine's cores."""
    import torch

    torch.set_num_threads(1)
