"""Which cached tokens a compressed cache keeps: one policy a file, found by name or as `module:Class`."""

import importlib
from collections.abc import Mapping
from typing import Any

import msgspec

from pipeline.config.recipes import nearest
from pipeline.engine.native.eviction.base import EvictionPolicy
from pipeline.engine.native.eviction.r_kv import RKV
from pipeline.engine.native.eviction.sinks_window import SinksWindow
from pipeline.engine.native.eviction.snapkv import SnapKV
from pipeline.errors import UsageError
from pipeline.plugins import search_working_directory

POLICIES: dict[str, type[EvictionPolicy]] = {"sinks-window": SinksWindow, "snapkv": SnapKV, "r-kv": RKV}


def build(piece: Mapping[str, Any]) -> EvictionPolicy:
    """The policy a piece of configuration names, with its options.

    Raises:
        UsageError: unknown name or option, or a value of the wrong type.
    """
    options = dict(piece)
    name = str(options.pop("name", ""))
    kind = POLICIES.get(name) or _outside(name)
    declared = kind.Options
    for key in options:
        if key not in declared.__struct_fields__:
            raise UsageError(
                f"eviction policy {name} has no option {key!r}{nearest(key, list(declared.__struct_fields__))}"
            )
    try:
        return kind(msgspec.convert(options, declared))
    except msgspec.ValidationError as error:
        raise UsageError(f"eviction policy {name}: {error}") from error


def _outside(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(f"eviction policy {name!r} is unknown{nearest(name, list(POLICIES))}; or give module:Class")
    search_working_directory()
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"eviction policy {name} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, EvictionPolicy)):
        raise UsageError(f"{name} is not an eviction policy; derive it from {EvictionPolicy.__module__}.EvictionPolicy")
    return kind
