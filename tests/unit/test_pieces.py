import pytest

from learner.gates.erc import EntropyRatioClipping
from learner.objective import Objective
from learner.pieces import BUILT_IN, build, find
from learner.tokens import Needs
from pipeline.config.types import ObjectiveSection, Section
from pipeline.errors import UsageError


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
    with pytest.raises(UsageError, match=r"no option 'clip_hihg'; did you mean 'clip_high'\?"):
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
