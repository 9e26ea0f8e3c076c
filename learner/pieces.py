"""The registry of an objective's pieces: a piece is built from its table in the configuration.

A piece is a class with

- `Options`, a nested `pipeline.config.types.Section` whose defaults are the paper's values,
- `name` and `needs` (`learner.objective.Needs`),
- `__init__(options)` and `__call__`, whose signature is the Protocol of its kind in `learner.objective`.
"""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pipeline.config.types import Section
from pipeline.errors import UsageError
from pipeline.plugins import search_working_directory

BUILT_IN: dict[str, dict[str, str]] = {
    "advantage": {"grpo": "learner.advantages.grpo:GRPO"},
    "correction": {
        "none": "learner.corrections.none:NoCorrection",
        "tis": "learner.corrections.tis:TruncatedImportanceSampling",
    },
    "surrogate": {"ppo-clip": "learner.surrogates.ppo_clip:PPOClip"},
    "gate": {"erc": "learner.gates.erc:EntropyRatioClipping"},
    "regulariser": {"entropy-bonus": "learner.regularisers.entropy_bonus:EntropyBonus"},
}
"""kind -> name -> where its class is; loaded when used."""


def find(kind: str, name: str) -> type:
    """The class of a piece, by registered name or as "module:attribute".

    Raises:
        UsageError: no piece of this kind has the name, or the module or attribute is not there.
    """
    known = BUILT_IN[kind]
    if name in known:
        return _load(kind, known[name])
    if ":" in name:
        return _load(kind, name)
    raise UsageError(f"there is no {kind} named {name!r}{_nearest(name, known)}; known: {', '.join(sorted(known))}")


def build(kind: str, piece: Mapping[str, Any]) -> Any:
    """An instance of the piece that a configuration table describes.

    Args:
        kind: a key of `BUILT_IN`.
        piece: its `name` beside its own options.

    Raises:
        UsageError: no name, an unknown name or option, an option of the wrong type or out of bounds.
    """
    name = piece.get("name")
    if not isinstance(name, str):
        raise UsageError(f"the {kind} {dict(piece)!r} has no name; known: {', '.join(sorted(BUILT_IN[kind]))}")
    cls = find(kind, name)
    given = {key: value for key, value in piece.items() if key != "name"}
    fields = [field.encode_name for field in msgspec.structs.fields(cls.Options)]  # type: ignore[attr-defined]
    for key in given:
        if key not in fields:
            raise UsageError(f"the {kind} {name!r} has no option {key!r}{_nearest(key, fields)}")
    try:
        options = msgspec.convert(given, cls.Options)  # type: ignore[attr-defined]
    except msgspec.ValidationError as error:
        raise UsageError(f"the {kind} {name!r}: {error}") from error
    return cls(options)


def _load(kind: str, target: str) -> type:
    module_name, _, attribute = target.partition(":")
    search_working_directory()
    try:
        cls = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"the {kind} {target!r} cannot be loaded ({error}); name it as module:Class") from error
    options = getattr(cls, "Options", None)
    if not (isinstance(cls, type) and isinstance(options, type) and issubclass(options, Section)):
        raise UsageError(
            f"the {kind} {target!r} is not a piece: give its class a nested Options(pipeline.config.types.Section)"
        )
    if not {"__call__", "name", "needs"} <= set(dir(cls)):
        raise UsageError(f"the {kind} {target!r} is not a piece: give its class name, needs and __call__")
    return cls


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"; did you mean {matches[0]!r}?" if matches else ""
