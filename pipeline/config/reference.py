"""The configuration reference, from the types: `python -m pipeline.config.reference > docs/configuration.md`."""

import types
import typing
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import tomli_w

from pipeline.config.load import help_of
from pipeline.config.types import Config, Section

HEADER = """\
# Configuration

Generated from the types: `python -m pipeline.config.reference > docs/configuration.md`.

A TOML file holds as many options as you like; `--set section.key=value` overrides one; `--dry-run` prints what came of
it. A key that does not exist is refused with the nearest name, a value out of bounds with its bounds. The options of
drafters and of the objective's pieces are in [drafting.md](drafting.md) and [objectives.md](objectives.md).
"""


def reference() -> str:
    """The whole document."""
    parts = [HEADER]
    for section in msgspec.structs.fields(Config):
        parts += [f"## [{section.name}]\n", "| option | type | default | meaning |", "|---|---|---|---|"]
        parts += [*_rows(section.name, section.type), ""]
    return "\n".join(parts)


def _rows(name: str, kind: Any, within: str = "") -> list[str]:
    """The options of a section; those of a table in it stand as `table.option`."""
    rows: list[str] = []
    hints = get_type_hints(kind, include_extras=True)
    for option in msgspec.structs.fields(kind):
        hint, own = hints[option.name], within + option.name
        if isinstance(hint, type) and issubclass(hint, Section):
            rows += _rows(name, hint, f"{own}.")
            continue
        default = _default(option)
        cells = (f"`{own}`", describe(hint), f"`{default}`" if default != '""' else "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, _meaning(name, own))) + " |")
    return rows


def _meaning(section: str, option: str) -> str:
    table, _, last = option.rpartition(".")
    return help_of(f"{section}.{table}" if table else section, last)


def describe(hint: Any) -> str:
    """A type in words, with its bounds."""
    bounds = []
    while get_origin(hint) is Annotated:
        hint, *metas = get_args(hint)
        bounds += [text for meta in metas if isinstance(meta, msgspec.Meta) for text in _bounds(meta)]
    text = _plain(hint)
    return f"{text}, {', '.join(bounds)}" if bounds else text


def _plain(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"list of {describe(arguments[0])}"
    if origin is dict:
        return "table"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _bounds(meta: msgspec.Meta) -> list[str]:
    signs = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
    bounds = [(words, getattr(meta, name)) for name, words in signs]
    return [f"{words} {'2^63 - 1' if n == 2**63 - 1 else f'{n:g}'}" for words, n in bounds if n is not None]


def _default(option: msgspec.structs.FieldInfo) -> str:
    """As it stands in a TOML file."""
    value = option.default if option.default is not msgspec.NODEFAULT else option.default_factory()
    return _inline(msgspec.to_builtins(value))


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    return tomli_w.dumps({"v": value}).partition(" = ")[2].strip()


if __name__ == "__main__":
    print(reference(), end="")
