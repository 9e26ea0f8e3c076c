"""Finding and building drafters: installed ones by entry point, any other as `module:Class`."""

import difflib
import importlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec

from drafters.base import Drafter, Needs
from pipeline.errors import UsageError, complaint
from pipeline.plugins import search_working_directory

GROUP = "rollahead.drafters"
OWN = "rollahead"
"""the distribution whose names no other can take"""


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """An installed drafter, as `rollahead drafters` shows it."""

    name: str
    source: str
    """distribution and version it comes from"""
    needs: str
    """what it asks of the generator, in words"""
    summary: str
    """first line of its documentation; for one that cannot be used, why"""
    target: str
    """module:Class"""
    options: tuple[str, ...] = ()


def available() -> list[DrafterInfo]:
    """Every installed drafter by name; one that cannot be used is listed with the reason."""
    return [_describe(point, points) for _, points in sorted(_installed().items()) for point in points]


def written(text: str) -> Drafter:
    """The drafter that a command line names: a name, module:Class, or an inline table with name and options.

    Raises:
        UsageError: the table cannot be read, or as for `build`.
    """
    return build(piece_of(text))


def piece_of(text: str) -> dict[str, Any]:
    """Name and options of what a command line names.

    Raises:
        UsageError: the table cannot be read, or names no drafter.
    """
    if not text.startswith("{"):
        return {"name": text}
    try:
        piece: dict[str, Any] = tomllib.loads(f"drafter = {text}")["drafter"]
    except tomllib.TOMLDecodeError as error:
        example = '{name = "draft-model", path = "DIR"}'
        raise UsageError(f"drafter {text} is no inline table of TOML ({error}); write {example}") from None
    if not isinstance(piece.get("name"), str):
        raise UsageError('a drafter needs a name, for example {name = "suffix-automaton"}')
    return piece


def build(piece: Mapping[str, Any]) -> Drafter:
    """The drafter a piece of configuration names: `name` (entry point or module:Class) beside its own options.

    Raises:
        UsageError: unknown name or option, a value of the wrong type, a class that cannot be made or is no drafter.
    """
    options = dict(piece)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UsageError('a drafter needs a name, for example {name = "suffix-automaton"}')
    kind = _find(name)
    declared = getattr(kind, "Options", None)
    if declared is None and options:
        raise UsageError(f"drafter {name} takes no options; remove {', '.join(sorted(options))}")
    arguments = [] if declared is None else [_options(name, declared, options)]
    try:
        drafter = kind(*arguments)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's constructor may raise anything, and is the user's to mend
        raise UsageError(f"drafter {name} cannot be made: {error!r}") from error
    if not isinstance(drafter, Drafter):
        raise UsageError(f"{name} is not a drafter: it lacks a method of drafters.base.Drafter")
    if not isinstance(drafter.name, str) or not drafter.name:
        raise UsageError(f"drafter {name} has {drafter.name!r} for its name; give it a text that is not empty")
    if not isinstance(drafter.needs, Needs):
        raise UsageError(f"drafter {name} has {drafter.needs!r} for its needs; give members of drafters.base.Needs")
    return drafter


def _installed() -> dict[str, list[EntryPoint]]:
    """Who claims each name, ours first."""
    claims: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (not _is_ours(point), _source(point))):
        claims.setdefault(point.name, []).append(point)
    return claims


def _is_ours(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == OWN


def _source(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"


def _chosen(points: Sequence[EntryPoint]) -> EntryPoint:
    """The one that the name they claim stands for: ours, or the only one.

    Raises:
        UsageError: several packages claim it.
    """
    if len(points) > 1 and not _is_ours(points[0]):
        packages = " and ".join(map(_source, points))
        classes = " or ".join(point.value for point in points)
        raise UsageError(
            f"drafter {points[0].name} is claimed by the packages {packages}; uninstall all but one, or name the class "
            f"itself: {classes}"
        )
    return points[0]


def _describe(point: EntryPoint, claims: Sequence[EntryPoint]) -> DrafterInfo:
    source = _source(point)
    try:
        if _chosen(claims) is not point:
            raise UsageError(f"the name is that of {_source(claims[0])}; name the class itself: {point.value}")
        kind = point.load()
        declared = getattr(kind, "Options", None)
        return DrafterInfo(
            name=point.name,
            source=source,
            needs=", ".join((need.name or "").lower().replace("_", " ") for need in Needs(kind.needs)) or "nothing",
            summary=(kind.__doc__ or "").strip().partition("\n")[0],
            target=point.value,
            options=declared.__struct_fields__ if declared else (),
        )
    except UsageError as error:
        return DrafterInfo(point.name, source, "unknown", f"cannot be used: {error}", point.value)
    except (Exception, SystemExit) as error:  # whatever a stranger's package does must not hide the other drafters
        return DrafterInfo(point.name, source, "unknown", f"cannot be used: {error!r}", point.value)


def _find(name: str) -> Any:
    installed = _installed()
    if name in installed:
        point = _chosen(installed[name])
        try:
            return point.load()
        except (Exception, SystemExit) as error:  # a broken plug-in is the user's to mend: a usage error
            raise UsageError(f"drafter {name} ({point.value}) cannot be imported: {error!r}") from error
    module, _, attribute = name.partition(":")
    if not attribute:
        near = difflib.get_close_matches(name, installed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(sorted(installed))
        raise UsageError(f"drafter {name!r} is unknown; {hint}installed are {known}; or give module:Class")
    search_working_directory()
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # as above
        raise UsageError(f"drafter {name} cannot be imported: {error!r}") from error


def _options(name: str, declared: Any, options: dict[str, Any]) -> msgspec.Struct:
    if not (isinstance(declared, type) and issubclass(declared, msgspec.Struct)):
        raise UsageError(f"drafter {name} declares Options that are no msgspec.Struct")
    for key, value in options.items():
        if key not in declared.__struct_fields__:
            near = difflib.get_close_matches(key, declared.__struct_fields__, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"drafter {name} has no option {key!r}{hint}")
        if isinstance(value, float) and not math.isfinite(value):  # which bounds such as "at least 0" let through
            raise UsageError(f"drafter {name}: {key} = {value!r} is not valid: set a finite number")
    try:
        return msgspec.convert(options, declared)
    except msgspec.ValidationError as error:
        key, what = complaint(str(error))
        option = key.partition("[")[0].partition(".")[0]
        value = f"{option} = {options[option]!r} is not valid: " if option in options else ""
        raise UsageError(f"drafter {name}: {value}{what}") from None
