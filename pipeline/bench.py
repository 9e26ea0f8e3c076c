"""`rollahead bench WHAT`: finds a script of the repository's `benchmarks/` folder and runs it."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

from pipeline.errors import UsageError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def available() -> dict[str, str]:
    """What can be measured -> the first line of its script's documentation; empty where there is no folder."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def bench(what: str, arguments: list[str]) -> int:
    """Runs a benchmark with its own arguments; returns its exit code.

    Raises:
        UsageError: the folder or the script is not there.
    """
    known = available()
    if not known:
        raise UsageError(
            f"benchmarks are not part of an installed package ({FOLDER} does not exist); "
            "clone the repository and install it with pip install --editable"
        )
    if what not in known:
        near = difflib.get_close_matches(what, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no benchmark {what!r}; {hint}there are {', '.join(known)}")
    if str(FOLDER.parent) not in sys.path:
        sys.path.insert(0, str(FOLDER.parent))
    module = importlib.import_module(f"benchmarks.{what.replace('-', '_')}")
    code: int = module.main(arguments)
    return code


def overview() -> str:
    """One line a benchmark, for `rollahead bench --help`."""
    lines = [f"  {name:<12} {text}" for name, text in available().items()]
    return "benchmarks:\n" + "\n".join(lines) if lines else "benchmarks: none; they come with the repository"
