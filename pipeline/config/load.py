"""Reads a configuration: TOML file, then `--set a.b=c`, then types and bounds. Torch-free."""

import math
import re
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import tomli_w

from pipeline.config.recipes import LISTS, SINGLE, apply_recipe, nearest
from pipeline.config.types import Config, Section
from pipeline.errors import UsageError, check_text

EMBEDDED = Path(__file__).with_name("embedded.toml")
"""What is trained when neither a configuration nor a model is given."""
_PASSED_THROUGH = "engine.vllm."
"""options that are another program's"""


def load_config(path: Path | None, overrides: list[str]) -> Config:
    """The configuration of `path` (None: all defaults) with overrides applied.

    Raises:
        UsageError: the file is missing or not TOML, a key is unknown, a value has the wrong type or is out of bounds.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise UsageError(f"configuration file {path} does not exist; check the path") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"configuration file {path} cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"configuration file {path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return convert(tree)


def convert(tree: dict[str, Any]) -> Config:
    """A typed configuration from plain tables; errors name the key, the value and the remedy."""
    _refuse_unknown_keys(tree)
    _expand_piece_names(tree)
    apply_recipe(tree)
    _refuse_not_finite("", tree)
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise UsageError(_explain(str(error), tree)) from error


def render(config: Config) -> str:
    """The resolved configuration as TOML; reading it back gives the same configuration."""
    return tomli_w.dumps(msgspec.to_builtins(config))


def _apply(tree: dict[str, Any], override: str) -> None:
    check_text(override, "--set")
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UsageError(f"--set {override!r} is not of the form section.key=value, for example learner.batch_size=32")
    table = tree
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override!r}: {part!r} is a value, not a table; set it as a whole")
    table[parts[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value; bare words are strings so that `--set model.path=DIR` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sections() -> dict[str, type[msgspec.Struct]]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(Config)}


def _refuse_unknown_keys(tree: dict[str, Any]) -> None:
    sections = _sections()
    for name, table in tree.items():
        if name not in sections:
            raise UsageError(f"unknown table [{name}] in the configuration{nearest(name, list(sections))}")
        if not isinstance(table, dict):
            raise UsageError(f"{name} = {table!r} must be a table of options, written [{name}]")
        _refuse_unknown(name, table, sections[name])


def _refuse_unknown(name: str, table: dict[str, Any], section: type[msgspec.Struct]) -> None:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(section)}
    for key, value in table.items():
        if key not in fields:
            raise UsageError(f"unknown key {name}.{key} = {value!r}{nearest(key, list(fields))}")
        if isinstance(fields[key], type) and issubclass(fields[key], Section):
            if not isinstance(value, dict):
                raise UsageError(f"{name}.{key} = {value!r} must be a table of options, written [{name}.{key}]")
            _refuse_unknown(f"{name}.{key}", value, fields[key])


def _refuse_not_finite(key: str, value: Any) -> None:
    """TOML has inf and nan, which bounds such as "above 0" let through; no option means anything by them."""
    if isinstance(value, dict):
        for name, inside in value.items():
            _refuse_not_finite(f"{key}.{name}" if key else name, inside)
    elif isinstance(value, list):
        for index, inside in enumerate(value):
            _refuse_not_finite(f"{key}[{index}]", inside)
    elif isinstance(value, float) and not math.isfinite(value) and not key.startswith(_PASSED_THROUGH):
        section, _, name = key.rpartition(".")
        raise UsageError(f"{key} = {value!r} is not valid: set a finite number ({help_of(section, name)})")


def _expand_piece_names(tree: dict[str, Any]) -> None:
    """`drafter = "none"` is short for `drafter = {name = "none"}`, also inside lists of pieces; a list of one needs no
    brackets; options given without a name are those of the default piece, or of the recipe's."""
    drafter = tree.get("engine", {}).get("drafter")
    if drafter is not None:
        tree["engine"]["drafter"] = _piece(drafter)
        if isinstance(drafter, dict):
            tree["engine"]["drafter"] = {**Config().engine.drafter, **drafter} if "name" not in drafter else drafter
    compression = tree.get("engine", {}).get("kv_compression", {})
    if "policy" in compression:
        compression["policy"] = _piece(compression["policy"])
    objective = tree.get("objective", {})
    for key in SINGLE:
        if key in objective:
            objective[key] = _piece(objective[key])
    for key in LISTS:
        value = objective.get(key)
        if isinstance(value, str) or (isinstance(value, dict) and "name" in value):
            value = [value]
        if isinstance(value, list):
            objective[key] = [_piece(item) for item in value]


def _piece(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _explain(message: str, tree: dict[str, Any]) -> str:
    """msgspec says `Expected `int` >= 1 - at `$.learner.batch_size``; add the value and the option's help."""
    found = re.search(r"^(?P<what>.*) - at `\$\.(?P<key>[^`]+)`", message)
    if found is None:
        return f"the configuration is not valid: {message}"
    key, what = found["key"], found["what"].replace("`", "")
    section, _, name = key.rpartition(".")
    table = tree
    for part in section.split("."):
        table = table.get(part, {})
    value = table.get(name.partition("[")[0])
    what = what[0].lower() + what[1:]
    return f"{key} = {value!r} is not valid: {what} ({help_of(section, name)})"


def help_of(section: str, name: str) -> str:
    """The one line of help of an option."""
    table, *nested = section.split(".")
    kind: Any = _sections()[table]
    for part in nested:
        kind = get_type_hints(kind).get(part)
    if not isinstance(kind, type) or not issubclass(kind, Section):
        return "see the configuration reference"
    hint = get_type_hints(kind, include_extras=True).get(name.partition("[")[0])
    texts = [meta.description for meta in get_args(hint)[1:] if isinstance(meta, msgspec.Meta) and meta.description]
    return texts[-1] if texts else "see the configuration reference"
