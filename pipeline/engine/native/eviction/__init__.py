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
        UsageError: unknown name or option, a value of the wrong type, or a class that is no policy or cannot be made.
    """
    options = dict(piece)
    name = str(options.pop("name", ""))
    kind = POLICIES.get(name) or _outside(name)
    declared = _declared(name, kind)
    for key in options:
        if key not in declared.__struct_fields__:
            raise UsageError(
                f"eviction policy {name} has no option {key!r}{nearest(key, list(declared.__struct_fields__))}"
            )
    try:
        values = msgspec.convert(options, declared)
    except msgspec.ValidationError as error:
        raise UsageError(f"eviction policy {name}: {error}") from error
    try:
        return kind(values)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's constructor may raise anything, and is the user's to mend
        raise UsageError(f"eviction policy {name} cannot be made: its constructor raised {error!r}; mend it") from error


def _declared(name: str, kind: type[EvictionPolicy]) -> type[msgspec.Struct]:
    """The options of a class that can be made."""
    if missing := sorted(kind.__abstractmethods__):
        raise UsageError(f"eviction policy {name} leaves {' and '.join(missing)} out; define what its base class asks")
    options = getattr(kind, "Options", None)
    if not (isinstance(options, type) and issubclass(options, msgspec.Struct)):
        raise UsageError(
            f"eviction policy {name} declares no Options; nest a class Options(pipeline.config.types.Section) in it, "
            "empty if it has none"
        )
    return options


def _outside(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise UsageError(f"eviction policy {name!r} is unknown{nearest(name, list(POLICIES))}; or give module:Class")
    search_working_directory()
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever a stranger's module does is the user's to mend
        raise UsageError(
            f"eviction policy {name} cannot be imported: {error!r}; mend it, or name the module and class that hold it"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, EvictionPolicy)):
        raise UsageError(f"{name} is not an eviction policy; derive it from {EvictionPolicy.__module__}.EvictionPolicy")
    return kind
