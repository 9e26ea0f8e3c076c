"""The registry of an objective's pieces: a piece is built from its table in the configuration.

A piece is a class with

- `Options`, a nested `pipeline.config.types.Section` whose defaults are the paper's values,
- `name` and `needs` (`learner.tokens.Needs`),
- `__init__(options)` and `__call__`, whose signature is the Protocol of its kind in `learner.protocols`,

or a function with that signature, whose keyword-only arguments are its options. `Piece` is the base of the built-in
ones and holds what else a piece may declare. `learner.testing.check_piece` tests what a piece must keep to.
"""

import difflib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, get_type_hints

import msgspec

from learner.tokens import Needs
from pipeline.config.types import Section
from pipeline.errors import UsageError
from pipeline.plugins import search_working_directory

BUILT_IN: dict[str, dict[str, str]] = {
    "shaping": {
        "overlong": "learner.shaping.overlong:OverlongPunishment",
        "signed": "learner.shaping.signed:SignedRewards",
    },
    "advantage": {
        "grpo": "learner.advantages.grpo:GRPO",
        "leave-one-out": "learner.advantages.leave_one_out:LeaveOneOut",
        "reward": "learner.advantages.reward:Reward",
        "token-group": "learner.advantages.token_group:TokenGroup",
    },
    "modulator": {
        "aepo": "learner.modulators.aepo:AEPO",
        "attention-entropy": "learner.modulators.attention_entropy:AttentionEntropyWeights",
        "d3s": "learner.modulators.d3s:D3S",
        "empg": "learner.modulators.empg:EMPG",
        "entrocraft": "learner.modulators.entrocraft:Entrocraft",
        "entropic": "learner.modulators.entropic:EntroPIC",
        "overlong-filter": "learner.modulators.overlong_filter:OverlongFilter",
    },
    "correction": {
        "age-mask": "learner.corrections.age_mask:AgeMask",
        "batch-normalisation": "learner.corrections.batch_normalisation:BatchNormalisation",
        "geometric-mask": "learner.corrections.geometric_mask:GeometricMask",
        "icepop": "learner.corrections.icepop:IcePop",
        "mis": "learner.corrections.mis:MaskedImportanceSampling",
        "product-mask": "learner.corrections.product_mask:ProductMask",
        "rejection": "learner.corrections.rejection:DivergenceRejection",
        "tis": "learner.corrections.tis:TruncatedImportanceSampling",
        "token-mask": "learner.corrections.token_mask:TokenMask",
        "veto": "learner.corrections.veto:Veto",
    },
    "surrogate": {
        "ce-gppo": "learner.surrogates.ce_gppo:CEGPPO",
        "cispo": "learner.surrogates.cispo:CISPO",
        "dppo": "learner.surrogates.dppo:DPPO",
        "gmpo": "learner.surrogates.gmpo:GMPO",
        "gppo": "learner.surrogates.gppo:GPPO",
        "gspo": "learner.surrogates.gspo:GSPO",
        "hapo": "learner.surrogates.hapo:HAPO",
        "m2po": "learner.surrogates.m2po:M2PO",
        "ppo-clip": "learner.surrogates.ppo_clip:PPOClip",
        "reinforce": "learner.surrogates.reinforce:Reinforce",
        "sapo": "learner.surrogates.sapo:SAPO",
        "topr": "learner.surrogates.topr:TOPR",
        "unclipped": "learner.surrogates.unclipped:Unclipped",
    },
    "gate": {
        "clip-b": "learner.gates.clip_b:ClipB",
        "clip-cov": "learner.gates.clip_cov:ClipCov",
        "clip-v": "learner.gates.clip_v:ClipV",
        "earl": "learner.gates.earl:EARL",
        "erc": "learner.gates.erc:EntropyRatioClipping",
        "high-entropy": "learner.gates.high_entropy:HighEntropyTokens",
        "kl-cov": "learner.gates.kl_cov:KLCov",
        "opsm": "learner.gates.opsm:OffPolicySequenceMask",
        "spine": "learner.gates.spine:SPINE",
        "steer": "learner.gates.steer:STEER",
    },
    "regulariser": {
        "adaptive-entropy": "learner.regularisers.adaptive_entropy:AdaptiveEntropy",
        "entropy-bonus": "learner.regularisers.entropy_bonus:EntropyBonus",
        "kl": "learner.regularisers.kl:KLToReference",
        "log-ratio": "learner.regularisers.log_ratio:SquaredLogRatio",
        "positive-nll": "learner.regularisers.positive_nll:PositiveNLL",
        "siren": "learner.regularisers.siren:SIREN",
    },
    "aggregation": {
        "constant-horizon": "learner.aggregations.constant_horizon:ConstantHorizon",
        "prompt-mean": "learner.aggregations.prompt_mean:PromptMean",
        "sequence-mean": "learner.aggregations.sequence_mean:SequenceMean",
        "sequence-sum": "learner.aggregations.sequence_sum:SequenceSum",
        "token-mean": "learner.aggregations.token_mean:TokenMean",
    },
}
"""kind -> name -> where its class is, in the order a training step applies the kinds; loaded when used."""

_SINGLE = ("advantage", "surrogate", "aggregation")
_WITH_TWO = ("correction", "gate")
"""kinds whose pieces are given two arguments: what the pieces before left, and the tensors"""


class Piece:
    """Base of the built-in pieces. A user's own piece need not inherit from it: what it does not have is as here."""

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs.NOTHING
    reconstructed: ClassVar[bool] = False
    """the formula, or a value of it, is our reconstruction: needs `objective.reconstructed = true`"""
    weighs: ClassVar[bool] = False
    """correction: multiplies the loss by pi_old / mu; surrogate: its own weight goes down to mu"""
    batch_statistics: ClassVar[bool] = False
    """correction: looks at tokens beyond a sample, so it cannot act on a micro-batch"""
    sequence_ratio: ClassVar[bool] = False
    """surrogate: one ratio a sample"""
    aggregations: ClassVar[tuple[str, ...]] = ()
    """surrogate: the aggregations it is defined for; empty: any"""
    plans_from_policy: ClassVar[bool] = True
    """its `plan` looks at the policy now, which costs a forward pass over the mini-batch"""
    nucleus: float = 0.0
    """probability mass that `Needs.NUCLEUS_ENTROPY` is taken on"""
    signed_rewards: ClassVar[bool] = False
    """does nothing useful where no reward is below zero"""
    one_step: ClassVar[bool] = False
    """acts on the steps of an agent, and its options say no border between them"""

    class Options(Section):
        pass

    def __init__(self, options: Any) -> None:
        self.options = options


class FunctionPiece(Piece):
    """A user's function as a piece; it may carry `needs` as an attribute, and may return metrics beside its result."""

    needs = Needs.BEHAVIOUR_LOGPROBS | Needs.OLD_ENTROPY | Needs.ENTROPY

    def __init__(self, function: Callable[..., Any], keywords: dict[str, Any], has_metrics: bool) -> None:
        super().__init__(keywords)
        self.function, self.has_metrics = function, has_metrics
        self.name = getattr(function, "__name__", type(function).__name__)  # type: ignore[misc]
        self.needs = getattr(function, "needs", type(self).needs)  # type: ignore[misc]

    def __call__(self, *tensors: Any) -> Any:
        result = self.function(*tensors, **self.options)
        return (result, {}) if self.has_metrics and not isinstance(result, tuple) else result


def find(kind: str, name: str) -> Any:
    """The class or function of a piece, by registered name or as "module:attribute".

    Raises:
        UsageError: no piece of this kind has the name, or the module or attribute is not there.
    """
    known = BUILT_IN[kind]
    if name in known:
        return _load(kind, known[name])
    if ":" in name:
        return _load(kind, name)
    raise UsageError(f"there is no {kind} named {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}")


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
    where = f"objective.{kind if kind in (*_SINGLE, 'shaping') else kind + 's'}: "
    if not isinstance(cls, type):
        has_metrics = kind not in ("shaping", "advantage", "aggregation")
        return FunctionPiece(cls, keywords_of(cls, name, given, 2 if kind in _WITH_TWO else 1, where), has_metrics)
    _refuse_unknown(where, name, given, [field.encode_name for field in msgspec.structs.fields(cls.Options)])  # type: ignore[attr-defined]
    _refuse_not_finite(where, name, given)
    try:
        options = msgspec.convert(given, cls.Options)  # type: ignore[attr-defined]
    except msgspec.ValidationError as error:
        raise UsageError(where + _explained(str(error), name, given, cls.Options)) from error  # type: ignore[attr-defined]
    try:
        return cls(options)
    except UsageError as error:
        raise UsageError(f"{where}{error}") from error


def keywords_of(
    function: Callable[..., Any], name: str, given: Mapping[str, Any], tensors: int, where: str
) -> dict[str, Any]:
    """The options of a function's piece, of the types that its annotations, or else its defaults, say.

    Raises:
        UsageError: one that is missing, unknown or of another type; or the function does not take its kind's tensors.
    """
    parameters = {
        parameter.name: parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    _refuse_unknown(where, name, given, list(parameters), "; a function's options are its keyword-only arguments")
    _refuse_not_finite(where, name, given)
    for key, parameter in parameters.items():
        if key not in given and parameter.default is inspect.Parameter.empty:
            raise UsageError(f"{where}{name}.{key} is missing and has no default; set it in the piece's table")
    try:
        inspect.signature(function).bind(*[None] * tensors, **given)
    except TypeError as error:
        raise UsageError(
            f"{where}{name} cannot be called with {tensors} positional argument{'s' * (tensors > 1)} and its options "
            f"({error}); give it the signature of its kind in learner/protocols.py, its options keyword-only"
        ) from error
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):
        hints = {}
    return {key: _as_typed(value, parameters[key], hints, f"{where}{name}.{key}") for key, value in given.items()}


def _as_typed(value: Any, parameter: inspect.Parameter, hints: Mapping[str, Any], option: str) -> Any:
    # An integer default stands for any number: `scale=1` is how people write 1.0.
    of_default = {bool: bool, int: float, float: float, str: str}.get(type(parameter.default), Any)
    try:
        return msgspec.convert(value, hints.get(parameter.name, of_default))
    except msgspec.ValidationError as error:
        what = str(error).replace("`", "")
        raise UsageError(f"{option} = {value!r} is not valid: {what[0].lower()}{what[1:]}; set it to one") from error
    except TypeError:  # a hint that msgspec knows no values of
        return value


def _explained(message: str, name: str, given: Mapping[str, Any], options: type[Section]) -> str:
    """msgspec's message on a piece's options with key, value and help, as that on a section's."""
    found = re.search(r"^(?P<what>.*?)(?: - at `\$\.(?P<path>[^`]+)`)?$", message)
    assert found is not None
    what = found["what"].replace("`", "")
    what = what[0].lower() + what[1:]
    if found["path"] is None:
        return f"{name} is not valid: {what}; set it in the piece's table"
    parts = re.findall(r"[^.\[\]]+", found["path"])
    value: Any = given
    for part in parts:
        if isinstance(value, list | Mapping):
            value = value[int(part)] if isinstance(value, list) else value.get(part)
    hint = get_type_hints(options, include_extras=True).get(parts[0])
    texts = [meta.description for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    help_ = [text for text in texts if text][-1:] or ["see docs/objectives.md"]
    return f"{name}.{found['path']} = {value!r} is not valid: {what} ({help_[0]})"


def _refuse_not_finite(where: str, name: str, given: Any) -> None:
    """A number that is infinite or not a number would pass every bound from below."""
    for key, value in given.items():
        if isinstance(value, Mapping):
            _refuse_not_finite(where, f"{name}.{key}", value)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"{where}{name}.{key} = {value!r} is not valid: set a finite number")


def trait(piece: Any, name: str) -> Any:
    """What a piece declares under a name of `Piece`, or the default there."""
    return getattr(piece, name, getattr(Piece, name))


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the known word that is closest."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _load(kind: str, target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    search_working_directory()
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"the {kind} {target!r} cannot be loaded ({error}); name it as module:attribute") from error
    if inspect.isfunction(found):
        return found
    options = getattr(found, "Options", None)
    if not (isinstance(found, type) and isinstance(options, type) and issubclass(options, Section)):
        raise UsageError(
            f"the {kind} {target!r} is not a piece: name a function, or a class with a nested "
            "Options(pipeline.config.types.Section)"
        )
    if not {"__call__", "name", "needs"} <= set(dir(found)):
        raise UsageError(f"the {kind} {target!r} is not a piece: give its class name, needs and __call__")
    return found


def _refuse_unknown(where: str, name: str, given: Mapping[str, Any], known: list[str], remedy: str = "") -> None:
    for key, value in given.items():
        if key not in known:
            raise UsageError(f"{where}{name} has no option {key!r} (= {value!r}){nearest(key, known)}{remedy}")
