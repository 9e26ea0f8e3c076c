"""Refuses objectives whose pieces cannot work together, before anything starts."""

from typing import Any

from learner.objective import Objective
from learner.pieces import build, trait
from learner.tokens import Needs
from pipeline.capabilities import capabilities_of
from pipeline.config.recipes import LISTS, SINGLE
from pipeline.config.types import Config
from pipeline.errors import UsageError


def build_objective(config: Config) -> Objective:
    """The objective that a configuration names.

    Raises:
        UsageError: an unknown piece or option, or pieces that cannot work together.
    """
    objective = Objective.from_config(config.objective)
    check_composition(objective, config)
    return objective


def check_composition(objective: Objective, config: Config) -> None:
    """Raises UsageError: one sentence with what does not fit, why, and the remedy."""
    _check_importance_weights(objective)
    _check_inputs(objective)
    for piece in objective.pieces():
        _check_given(piece, config)
    _check_proximal(objective, config)
    _check_aggregation(objective)
    _check_rewards(objective, config)
    _check_steps(objective)
    _check_order(objective)
    _check_lengths(objective, config)
    if not config.objective.reconstructed:
        for piece in objective.pieces():
            if trait(piece, "reconstructed"):
                raise UsageError(
                    f"{piece.name} is reconstructed: its formula or a value of it is not known to be the paper's; "
                    "set objective.reconstructed = true (--set objective.reconstructed=true) to use it all the same"
                )


def check_engine_gives(config: Config) -> None:
    """Raises UsageError where a built-in piece needs what the configured engine does not record. For an engine alone:
    a user's own pieces need not be installed beside it, and what they need is asked for when it connects."""
    if capabilities_of(config).entropy and not _other_samplers(config):
        return
    for key in (*SINGLE, *LISTS):
        value = getattr(config.objective, key)
        for table in value if isinstance(value, list) else [value]:
            if ":" not in str(table.get("name")):
                _check_given(build(key.rstrip("s"), table), config)


def uncorrected_sampler(objective: Objective, config: Config) -> str | None:
    """A sentence for the log where engines sample from something else than the policy and nothing looks at it."""
    looks = objective.proximal != "recompute" or Needs.BEHAVIOUR_LOGPROBS in objective.needs
    other = _other_samplers(config)
    if not other or looks:
        return None
    compressed = config.engine.kv_compression.policy["name"] != "none"
    return (
        f"WARNING: {' and '.join(other)} changes what is sampled, and no piece of the objective looks at the sampler's "
        f"log-probs; add corrections, for example objective.recipe = {'sparse-rl' if compressed else 'tis'}"
    )


def idle_gate(objective: Objective, config: Config) -> str | None:
    """A sentence for the log where a gate on the entropy's change sees none."""
    erc = any(gate.name == "erc" for gate in objective.gates)
    if not erc or config.learner.minibatches > 1 or objective.proximal != "recompute":
        return None
    return (
        "WARNING: erc does nothing with learner.minibatches = 1: the policy has not changed since the start of the "
        "batch, where its entropies are from; set learner.minibatches to 2 or more"
    )


def _check_importance_weights(objective: Objective) -> None:
    """pi_old / mu may enter the loss once."""
    weighing = [piece.name for piece in objective.corrections if trait(piece, "weighs")]
    if len(weighing) > 1:
        raise UsageError(
            f"objective.corrections weigh by pi_old / mu more than once ({', '.join(weighing)}); keep one of them, "
            "masks may be added"
        )
    if weighing and trait(objective.surrogate, "weighs"):
        raise UsageError(
            f"the surrogate {objective.surrogate.name} weighs by pi / mu itself, so {weighing[0]} would count the "
            "importance weight twice; leave it out of objective.corrections"
        )
    if weighing and objective.proximal == "behaviour":
        raise UsageError(
            f'objective.proximal = "behaviour" makes the surrogate\'s ratio pi / mu, so {weighing[0]} would count the '
            'importance weight twice; leave it out of objective.corrections or set objective.proximal = "recompute"'
        )


def _check_inputs(objective: Objective) -> None:
    for piece in objective.pieces():
        if Needs.OLD_ENTROPY in piece.needs and objective.proximal == "interpolate":
            raise UsageError(
                f"{piece.name} needs entropies of the policy at the start of the batch, and objective.proximal = "
                '"interpolate" computes none; set objective.proximal = "recompute", or "behaviour" for the engine\'s'
            )
    nuclei = {trait(piece, "nucleus") for piece in objective.pieces()} - {0.0}
    if len(nuclei) > 1:
        raise UsageError(f"nucleus entropies of different mass ({', '.join(map(str, sorted(nuclei)))}); take one")


def _check_given(piece: Any, config: Config) -> None:
    """What a piece needs from the engine, which records entropies or does not, or those of something else."""
    if other := _other_samplers(config):
        _check_entropies_are_pi_olds(piece, config, " and ".join(other))
    if capabilities_of(config).entropy:
        return
    generator, proximal = config.engine.generator, config.objective.proximal
    if Needs.ENGINE_ENTROPY in piece.needs:
        raise UsageError(
            f"{piece.name} needs the entropy that the engine sampled each token at, and engine.generator = "
            f'"{generator}" records none; leave it out, or set engine.generator = "native"'
        )
    if Needs.OLD_ENTROPY in piece.needs and proximal == "behaviour":
        raise UsageError(
            f'{piece.name} needs entropies of pi_old, which objective.proximal = "behaviour" takes from the engine, '
            f'and engine.generator = "{generator}" records none; set objective.proximal = "recompute", or '
            'engine.generator = "native"'
        )


def _other_samplers(config: Config) -> list[str]:
    """Options of the engine that have something else than the policy draw tokens."""
    switching, policy = config.engine.switching.small_model, config.engine.kv_compression.policy["name"]
    found = [f"engine.kv_compression.policy = {policy}"] if policy != "none" else []
    return [*found, f"engine.switching.small_model = {switching}"] if switching else found


def _check_entropies_are_pi_olds(piece: Any, config: Config, other: str) -> None:
    if Needs.OLD_ENTROPY in piece.needs and config.objective.proximal == "behaviour":
        raise UsageError(
            f'{piece.name} needs entropies of pi_old, and with objective.proximal = "behaviour" those of {other} would '
            'stand in for them; set objective.proximal = "recompute"'
        )


def _check_proximal(objective: Objective, config: Config) -> None:
    if objective.proximal != "interpolate":
        return
    if other := _other_samplers(config):
        raise UsageError(
            f'objective.proximal = "interpolate" takes what sampled for an older policy, and {" and ".join(other)} '
            'samples from something else; set objective.proximal = "recompute"'
        )
    for piece in objective.corrections:
        if trait(piece, "batch_statistics"):
            raise UsageError(
                f'{piece.name} looks at the whole batch, and objective.proximal = "interpolate" knows weights only '
                'micro-batch by micro-batch; set objective.proximal = "recompute"'
            )


def _check_aggregation(objective: Objective) -> None:
    allowed, chosen = trait(objective.surrogate, "aggregations"), objective.aggregation.name
    if allowed and chosen not in allowed:
        raise UsageError(
            f"the surrogate {objective.surrogate.name} is defined as {' or '.join(allowed)}, not {chosen}; set "
            f"objective.aggregation = {allowed[0]}"
        )


def _check_steps(objective: Objective) -> None:
    for piece in objective.modulators:
        if trait(piece, "one_step"):
            raise UsageError(
                f"{piece.name} needs the borders between an agent's steps, and no engine here records environment "
                f"tokens; set objective.modulators.{piece.name}.ends to the ids of tokens that end a step, or "
                f"objective.modulators.{piece.name}.turns = true for an engine of your own that records them"
            )


def _check_order(objective: Objective) -> None:
    for index, piece in enumerate(objective.corrections[:-1]):
        if trait(piece, "batch_statistics"):
            raise UsageError(
                f"objective.corrections: {piece.name} stands before {objective.corrections[index + 1].name}, which "
                f"changes the weights that it has normalised; put {piece.name} last"
            )
    for key in LISTS:
        pieces = getattr(objective, key)
        for index, piece in enumerate(pieces):
            if any(type(piece) is type(other) and _same(piece, other) for other in pieces[:index]):
                raise UsageError(f"objective.{key} has {piece.name} twice with the same options; leave one of them out")


def _same(piece: Any, other: Any) -> bool:
    return piece.name == other.name and getattr(piece, "options", None) == getattr(other, "options", None)


def _check_lengths(objective: Objective, config: Config) -> None:
    longest = config.sampling.max_new_tokens
    for piece in objective.pieces():
        if piece.name == "overlong" and not piece.options.limit and piece.options.buffer > longest:
            raise UsageError(
                f"objective.shaping: overlong.buffer = {piece.options.buffer} is above the limit, "
                f"sampling.max_new_tokens = {longest}; lower it, or set it to 0 for a fifth of the limit"
            )


def _check_rewards(objective: Objective, config: Config) -> None:
    """Pieces that look at the sign of raw rewards, with a reward that is 0 or 1."""
    if config.task.reward != "numeric-answer" or any(piece.name == "signed" for piece in objective.shaping):
        return
    wanting = [piece.name for piece in objective.pieces() if trait(piece, "signed_rewards")]
    if objective.surrogate.name == "topr" and objective.advantage.name == "reward":
        wanting.append("topr with the advantage reward")
    if wanting:
        raise UsageError(
            f'{wanting[0]} needs rewards below zero for wrong answers, and task.reward = "numeric-answer" gives 0 and '
            '1; add "signed" to objective.shaping'
        )
