"""Packages import in one direction; configuration and messages stay free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    f"pipeline.{name}"
    for name in (
        "errors", "config", "messages", "codec", "capabilities", "digest", "stop", "plugins", "durable", "failpoints",
        "parent", "watchdog",
    )
}  # fmt: skip
STORES = BASE | {
    "pipeline.transport",
    "pipeline.weights",
    "pipeline.tasks",
    "pipeline.telemetry",
    "pipeline.run_directory",
}
MODELS = STORES | {"pipeline.models", "pipeline.sampling"}
ENGINE = MODELS | {"drafters", "pipeline.engine"}
ALLOWED = {
    "pipeline/errors.py": set(),
    "pipeline/config": {"pipeline.config", "pipeline.errors"},
    "pipeline/messages.py": set(),
    "pipeline/codec.py": {"pipeline.messages"},
    "pipeline/transport": STORES,
    "pipeline/weights": STORES,
    "pipeline/tasks": STORES,
    "pipeline/telemetry": STORES,
    "pipeline/models": MODELS,
    "pipeline/sampling": MODELS,
    "drafters": MODELS | {"drafters"},
    "pipeline/engine": ENGINE,
    "learner": MODELS | {"drafters", "learner"},
}


def _ours(path: Path) -> set[str]:
    """Modules of ours that a file imports, at any depth of the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            top = node.module in {"pipeline", "drafters", "learner"}
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if top else {node.module}
    return {name for name in names if name.split(".")[0] in {"pipeline", "drafters", "learner"}}


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_follow_the_rule(place):
    path = ROOT / place
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in _ours(file):
            allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[place])
            assert allowed, f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.config", "pipeline.messages", "pipeline.capabilities", "pipeline.transport.router",
        "pipeline.transport.dealer", "pipeline.transport.spool",
        "pipeline.weights", "pipeline.tasks", "pipeline.telemetry", "pipeline.telemetry.progress", "pipeline.cli",
        "learner.hub", "learner.leases", "pipeline.engine.link",
    ],
)  # fmt: skip
def test_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
