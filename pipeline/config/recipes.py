"""Recipes: named TOML files with a paper's objective, which a configuration builds on key by key. Torch-free."""

import difflib
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from pipeline.config.types import Config
from pipeline.errors import UsageError

SINGLE = ("advantage", "surrogate", "aggregation")
"""keys of `objective` that hold one piece"""
LISTS = ("shaping", "modulators", "corrections", "gates", "regularisers")
"""keys of `objective` that hold pieces in order"""


def recipe_names() -> list[str]:
    """Of all recipes, sorted."""
    folder = files("learner").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> dict[str, Any]:
    """The tables of a recipe: `objective` and `learner` are applied, `paper` says where the values come from and which
    of the paper's settings (batch, learning rate, lengths) belong to its models and are left to the user.

    Raises:
        UsageError: there is no such recipe.
    """
    names = recipe_names()
    if name not in names:
        raise UsageError(f"there is no recipe {name!r}{nearest(str(name), names)}")
    return tomllib.loads(files("learner").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8"))


def apply_recipe(tree: dict[str, Any]) -> None:
    """Fills in what `objective.recipe` says and the tables do not; names of pieces are expanded already.

    A key given replaces the recipe's. Options of a piece without its name change the recipe's piece, and so does a
    table of options under a piece's name in place of a list (`objective.gates.erc.low = 0.9`); without a recipe, the
    default's.
    """
    objective = tree.get("objective", {})
    name = objective.get("recipe", "")
    base = _base(name)
    for key in SINGLE:
        given = objective.get(key)
        if isinstance(given, dict) and given.get("name", base[key]["name"]) == base[key]["name"]:
            objective[key] = {**base[key], **given} if name or "name" not in given else given
    for key in LISTS:
        if isinstance(objective.get(key), dict):
            objective[key] = _changed(key, base[key], objective[key], name)
    if name:
        recipe = load_recipe(name)
        tree["objective"] = {**base, **objective}
        tree["learner"] = {**recipe.get("learner", {}), **tree.get("learner", {})}


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or all that are known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def _base(name: str) -> dict[str, Any]:
    """The objective that a configuration's keys are laid over: the recipe's, which has no piece that it does not name,
    or the default."""
    defaults = Config().objective
    if not name:
        return {key: getattr(defaults, key) for key in (*SINGLE, *LISTS)}
    base: dict[str, Any] = {key: getattr(defaults, key) for key in SINGLE} | {key: [] for key in LISTS}
    return base | load_recipe(name)["objective"]


def _changed(key: str, pieces: list[dict[str, Any]], changes: dict[str, Any], recipe: str) -> list[dict[str, Any]]:
    names = [piece["name"] for piece in pieces]
    for name, options in changes.items():
        if name not in names or not isinstance(options, dict):
            whose = f"recipe {recipe}" if recipe else "default objective"
            raise UsageError(
                f"objective.{key}.{name} = {options!r}: the {whose} has no such piece there "
                f"(it has {', '.join(names) or 'none'}); give objective.{key} as a list to replace it"
            )
    return [{**piece, **changes.get(piece["name"], {})} for piece in pieces]
