"""docs/objectives.md from the pieces and recipes themselves: `python -m learner.reference > docs/objectives.md`."""

import inspect
import re
import sys
from typing import Any, get_type_hints

import msgspec

from learner.pieces import BUILT_IN, Piece, find
from learner.tokens import Needs
from pipeline.config.load import load_config
from pipeline.config.recipes import LISTS, SINGLE, load_recipe, recipe_names
from pipeline.config.types import Config

INTRODUCTION = """\
# Objectives

Written by `python -m learner.reference` from the pieces' own documentation; a test sees that it is current.

A training step is shaping -> advantage -> modulators -> corrections -> surrogate -> gates -> regularisers ->
aggregation. Each is a list of pieces, or one piece, in the table `[objective]` of the configuration:

    [objective]
    corrections = ["geometric-mask", { name = "tis", cap = 3.0 }]
    surrogate = { name = "ppo-clip", clip_high = 0.3 }
    gates = ["erc"]

A **recipe** is such a table with a paper's values: `--set objective.recipe=dapo-erc`. Keys given beside it win, one by
one: `--set objective.surrogate.clip_high=0.3`, `--set objective.gates.erc.low=0.9`, `--set objective.gates=[]`. What a
recipe does not name is empty. Batch sizes, learning rates and lengths of the papers belong to their models and are not
applied; they stand below the recipe. Compositions that cannot work are refused at start with the reason.

**pi_old** (`objective.proximal`) is the learner's own evaluation at the start of the batch ("recompute"), the engine's
log-probs ("behaviour": one forward pass less; the ratio then holds the whole importance weight), or lies between them
and the policy now by version ("interpolate", AReaL). Symbols: pi the policy now, mu what sampled, r = pi / pi_old,
rho = pi_old / mu, A the advantage, H the full-vocabulary entropy in nats at the sampling temperature, sg stop-gradient.

**Global statistics.** Means, quantiles and choices "over the whole mini-batch" are the same for any size of
micro-batches and any number of ranks. Where they depend on the policy now, they cost one more forward pass from the
second mini-batch of a batch on. Tokens that a gate or a correction takes out stay in the denominator.

**A piece of your own** is `module:name` in place of a registered name: a function with the signature of its kind
(`learner/protocols.py`; its keyword-only arguments are its options), or a class like those in `learner/gates/`. The
tensors it gets are in `learner/tokens.py`; `learner.testing.check_piece` holds it to the contract:

```python
# my_gates.py
import torch


def only_certain(loss, tokens, *, nats=0.5):
    kept = tokens.entropy.detach() < nats
    return torch.where(kept, loss, torch.zeros_like(loss)), {"kept": kept}
```

    rollahead run --set 'objective.gates=["erc", {name="my_gates:only_certain", nats=0.3}]'

**Left out**, because their formulas are not known to us: ERPO (arXiv 2603.28204), KPop. HAPO's temperature
T(1 + 0.05 h) is known, but changes from token to token with the entropy there, which a lease's temperature, one for a
whole sample, cannot say: no engine samples with it. **Reconstructed** pieces, marked below, need
`objective.reconstructed = true` of you, also in a recipe.

**A target curve** (`{start, end, hold, steps}`) moves the target of entropic and adaptive-entropy and the corridor of
entrocraft. CE-GPPO's betas take none: no rule from the entropy's error to the betas is known to us. AEPO's target is
one number, as in its paper.
"""
KINDS = {
    "shaping": ("Reward shaping", "objective.shaping, a list"),
    "advantage": ("Advantages", "objective.advantage"),
    "modulator": ("Modulators: changes of tokens' advantages", "objective.modulators, a list"),
    "correction": ("Off-policy corrections", "objective.corrections, a list"),
    "surrogate": ("Surrogates", "objective.surrogate"),
    "gate": ("Gates", "objective.gates, a list"),
    "regulariser": ("Regularisers", "objective.regularisers, a list"),
    "aggregation": ("Aggregation", "objective.aggregation"),
}
NEEDS = {
    Needs.BEHAVIOUR_LOGPROBS: "log-probs of the sampler",
    Needs.OLD_ENTROPY: "entropies of pi_old",
    Needs.ENTROPY: "entropies of pi",
    Needs.ENTROPY_GRADIENT: "entropies of pi, differentiated",
    Needs.ENGINE_ENTROPY: "entropies from the engine",
    Needs.EXPECTED_SCORE: "a further sum over the vocabulary",
    Needs.NUCLEUS_ENTROPY: "entropies of pi's nucleus, differentiated",
    Needs.REFERENCE: "a reference model",
    Needs.ATTENTION_ENTROPY: "attention entropies of one layer",
}


def page() -> str:
    """The whole page, Markdown."""
    used = _recipes_by_piece()
    parts = [INTRODUCTION]
    for kind, (title, key) in KINDS.items():
        parts.append(f"## {title}\n\n`{key}`\n")
        parts += [_piece(kind, name, used.get((kind, name), [])) for name in BUILT_IN[kind]]
    parts.append("## Recipes\n")
    parts += [_recipe(name) for name in recipe_names()]
    return "\n".join(parts)


def _piece(kind: str, name: str, recipes: list[str]) -> str:
    cls = find(kind, name)
    lines = [f"### {name}", "", _linked(inspect.cleandoc(cls.__doc__)), ""]
    facts = []
    needs = [text for flag, text in NEEDS.items() if flag in cls.needs]
    if needs:
        facts.append(f"Needs {', '.join(needs)}.")
    if _plans_from_policy(cls):
        facts.append("Looks at the whole mini-batch under the policy now.")
    if cls.aggregations:
        facts.append(f"Only with the aggregation {', '.join(cls.aggregations)}.")
    if cls.signed_rewards:
        facts.append("Needs rewards below zero for wrong answers.")
    if cls.reconstructed:
        facts.append("**Reconstructed.**")
    if recipes:
        facts.append(f"Recipes: {', '.join(recipes)}.")
    lines += [" ".join(facts), ""] if facts else []
    lines += _options(cls)
    return "\n".join(lines)


def _plans_from_policy(cls: type[Piece]) -> bool:
    return hasattr(cls, "plan") and cls.plans_from_policy


def _options(cls: type[Piece]) -> list[str]:
    fields = msgspec.structs.fields(cls.Options)
    if not fields:
        return []
    hints = get_type_hints(cls.Options, include_extras=True)
    rows = ["| option | default | |", "|---|---|---|"]
    for field in fields:
        texts = [meta.description for meta in hints[field.name].__metadata__ if meta.description]
        text = texts[-1].replace("|", "&#124;")
        rows.append(f"| `{field.encode_name}` | {_shown(field.default)} | {text} |")
    return [*rows, ""]


def _shown(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        return "{" + ", ".join(f"{key} = {_shown(item)}" for key, item in msgspec.to_builtins(value).items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


def _recipe(name: str) -> str:
    recipe = load_recipe(name)
    lines = [
        f"### {name}",
        "",
        _linked(recipe["paper"]["source"]) + ". Not applied: " + recipe["paper"]["setting"] + ".",
    ]
    lines += ["", "    [objective]"]
    for key, value in recipe["objective"].items():
        lines.append(f"    {key} = {_toml(value)}")
    if "learner" in recipe:
        lines += ["    [learner]", *(f"    {key} = {_toml(value)}" for key, value in recipe["learner"].items())]
    return "\n".join([*lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _shown(value)


def _recipes_by_piece() -> dict[tuple[str, str], list[str]]:
    kinds = {key: key.rstrip("s") for key in (*SINGLE, *LISTS)}
    found: dict[tuple[str, str], list[str]] = {}
    defaults = Config().objective
    for name in recipe_names():
        objective = load_config(None, [f"objective.recipe={name}"]).objective
        for key, kind in kinds.items():
            value = getattr(objective, key)
            named = load_recipe(name)["objective"]
            for piece in value if isinstance(value, list) else [value]:
                # The advantage and aggregation that everybody has would list every recipe.
                if key in named and not (key in ("advantage", "aggregation") and piece == getattr(defaults, key)):
                    found.setdefault((kind, piece["name"]), []).append(name)
    return found


def _linked(text: str) -> str:
    return re.sub(r"arXiv\s+(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


if __name__ == "__main__":
    sys.stdout.write(page())
