import math

import pytest

from learner.gates.erc import EntropyRatioClipping
from learner.objective import Objective
from learner.pieces import BUILT_IN, build, find
from learner.testing import random_batch, random_tokens
from learner.tokens import Layout, Needs
from pipeline.cli import main
from pipeline.config.types import ObjectiveSection, Section
from pipeline.errors import UsageError
from tests.unit.objectives.scenes import objective


class HalfGate:
    """A user's own gate."""

    name = "half"
    needs = Needs.NOTHING

    class Options(Section):
        share: float = 0.5

    def __init__(self, options):
        self.share = options.share

    def __call__(self, loss, tokens):
        return loss * self.share, {}


class NotAPiece:
    pass


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BUILT_IN.items() for name in names])
def test_every_built_in_piece_builds_with_its_defaults_and_says_where_it_comes_from(kind, name):
    piece = build(kind, {"name": name})
    assert piece.name == name
    assert isinstance(piece.needs, Needs)
    assert piece.__doc__


def test_the_default_objective_has_the_papers_values_and_asks_engines_for_no_entropy():
    objective = Objective.from_config(ObjectiveSection())
    clip = objective.surrogate.options
    assert (clip.clip_low, clip.clip_high, clip.dual_clip) == (0.2, 0.28, 10.0)
    assert objective.corrections[0].options.cap == 2.0
    assert (objective.gates[0].options.low, objective.gates[0].options.high) == (0.95, 1.05)
    assert not objective.needs_entropy_from_engine
    assert Needs.OLD_ENTROPY in objective.needs
    assert Needs.ENTROPY_GRADIENT not in objective.needs


def test_options_of_a_table_reach_the_piece_and_integers_count_as_numbers():
    assert build("correction", {"name": "tis", "cap": 3}).options.cap == 3.0


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"no surrogate named 'ppo-clp'; did you mean 'ppo-clip'\?"):
        build("surrogate", {"name": "ppo-clp"})


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"no option 'clip_hihg' \(= 0.3\); did you mean 'clip_high'\?"):
        build("surrogate", {"name": "ppo-clip", "clip_hihg": 0.3})


@pytest.mark.parametrize(
    ("kind", "piece"),
    [
        ("correction", {"name": "tis", "cap": -1}),
        ("correction", {"name": "tis", "cap": "two"}),
        ("surrogate", {"name": "ppo-clip", "dual_clip": 1.1}),
        ("gate", {"name": "erc", "low": 1.2}),
        ("gate", {}),
        ("gate", {"name": 3}),
    ],
)
def test_values_that_cannot_work_are_refused(kind, piece):
    with pytest.raises(UsageError):
        build(kind, piece)


def test_a_users_own_piece_is_named_by_module_and_class():
    gate = build("gate", {"name": f"{__name__}:HalfGate", "share": 0.25})
    assert gate.share == 0.25
    assert find("gate", "learner.gates.erc:EntropyRatioClipping") is EntropyRatioClipping


@pytest.mark.parametrize("name", [f"{__name__}:NotAPiece", f"{__name__}:Missing", "no.such.module:X", ":X", "a:"])
def test_what_is_not_a_piece_is_refused(name):
    with pytest.raises(UsageError):
        build("gate", {"name": name})


def must_be_told(loss, tokens, *, threshold, share=0.5, times=1, kind="a", sharp: bool = False):
    return loss


def one_tensor_only(tokens):
    return tokens


MINE = f"{__name__}:must_be_told"


@pytest.mark.parametrize(
    ("kind", "table", "said"),
    [
        ("gate", {"name": "steer", "low": 1.5}, "gates: steer.low = 1.5 is not valid: expected float <= 1.0 (smallest"),
        ("correction", {"name": "tis", "cap": "two"}, "objective.corrections: tis.cap = 'two' is not valid: expected"),
        ("modulator", {"name": "entropic", "target": {"start": 0.4, "end": -1}}, "target.end = -1 is not valid"),
        ("modulator", {"name": "d3s", "tokens": [0.5, 2.0]}, "d3s.tokens[1] = 2.0 is not valid"),
        ("surrogate", {"name": "ppo-clip", "clip_hihg": 1}, "objective.surrogate: ppo-clip has no option 'clip_hihg'"),
        ("gate", {"name": "erc", "low": 1.2}, "objective.gates: erc: the band"),
        ("regulariser", {"name": "kl", "coefficient": math.inf}, "kl.coefficient = inf is not valid: set a finite"),
        ("shaping", {"name": "signed", "shift": math.nan}, "objective.shaping: signed.shift = nan is not valid"),
        ("modulator", {"name": "d3s", "tokens": [0.5, math.nan]}, "is not valid: set a finite number"),
        ("gate", {"name": MINE}, "must_be_told.threshold is missing and has no default; set it"),
        ("gate", {"name": MINE, "threshold": 1, "tims": 2}, "(= 2); did you mean 'times'?; a function's options are"),
        ("gate", {"name": MINE, "threshold": 1, "share": "half"}, ".share = 'half' is not valid: expected float"),
        ("gate", {"name": MINE, "threshold": 1, "sharp": 3}, "expected bool, got int"),
        ("gate", {"name": MINE, "threshold": 1, "kind": 3}, "expected str, got int"),
        ("gate", {"name": f"{__name__}:one_tensor_only"}, "cannot be called with 2 positional arguments"),
    ],
)
def test_a_pieces_options_are_refused_with_key_value_and_remedy(kind, table, said):
    with pytest.raises(UsageError) as refused:
        build(kind, table)
    assert said in str(refused.value) and str(refused.value).startswith("objective.")


def test_a_functions_options_of_the_right_types_are_taken():
    name = f"{__name__}:must_be_told"
    piece = build("gate", {"name": name, "threshold": [1], "share": 1, "times": 1.5, "sharp": True})
    assert piece.options == {"threshold": [1], "share": 1.0, "times": 1.5, "sharp": True}


def test_a_users_piece_is_refused_before_anything_starts(capsys):
    gate = f"objective.gates=[{{name='{__name__}:must_be_told'}}]"
    assert main(["run", "--dry-run", "--set", gate]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "objective.gates: " in error and "threshold is missing" in error


def summed(loss, tokens):
    return loss.sum()


def of_a_batch(loss, tokens):
    return loss, {"mean": loss.detach().mean()}


def one_number(samples):
    return samples.rewards.mean()


def bare(loss, tokens):
    return loss, 3, 4


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ({"gates": [{"name": f"{__name__}:summed"}]}, "summed: its result has shape []"),
        ({"gates": [{"name": f"{__name__}:of_a_batch"}]}, "of_a_batch: its metric mean has shape []"),
        ({"gates": [{"name": f"{__name__}:bare"}]}, "bare returns tuple"),
        ({"surrogate": {"name": f"{__name__}:one_advantage"}}, "one_advantage: its result has shape [1]"),
        ({"regularisers": [{"name": f"{__name__}:one_advantage"}]}, "one_advantage: its result has shape [1]"),
        ({"corrections": [{"name": f"{__name__}:summed"}]}, "summed: its result has shape []"),
        ({"modulators": [{"name": f"{__name__}:one_advantage"}]}, "one_advantage: its result has shape [1]"),
        ({"advantage": {"name": f"{__name__}:one_number"}}, "one_number: its result has shape []"),
        ({"shaping": [{"name": f"{__name__}:one_number"}]}, "one_number: its result has shape []"),
        ({"aggregation": {"name": f"{__name__}:a_share"}}, "a_share: its result has float"),
    ],
)
def test_a_result_of_another_shape_is_not_broadcast(pieces, said):
    batch = random_batch()
    _, tokens = random_tokens(batch)
    whole = objective(**pieces)
    with pytest.raises(UsageError) as refused:
        whole.advantages(whole.shaped(batch.samples))
        whole.modulated(batch)
        whole.weights(batch)
        whole.coefficients(Layout(batch.sequence, batch.sequence, 8))
        whole.loss(tokens)
    assert said in str(refused.value)


def one_advantage(tokens):
    return tokens.advantage[:1]


def a_share(layout):
    return 1 / len(layout.sequence)
