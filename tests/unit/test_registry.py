import sys
from typing import Annotated

import pytest
from msgspec import Meta, Struct

from drafters.arbiter import ArbiterDrafter
from drafters.base import BaseDrafter, Drafter
from drafters.composite import CompositeDrafter, Ensemble
from drafters.none import NoDrafter
from drafters.registry import available, build, written
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.cli import main
from pipeline.errors import UsageError


class OwnDrafter(BaseDrafter):
    """A stranger's drafter."""

    name = "own"

    class Options(Struct, forbid_unknown_fields=True):
        depth: Annotated[int, Meta(ge=1)] = 4

    def __init__(self, options):
        self.options = options


class NotADrafter:
    pass


class Arguments(BaseDrafter):
    def __init__(self, depth):
        self.depth = depth


class Raises(BaseDrafter):
    def __init__(self):
        raise RuntimeError("boom")


class Leaves(BaseDrafter):
    def __init__(self):
        sys.exit(3)


class Numbered(BaseDrafter):
    name = 3


class Needy(BaseDrafter):
    needs = "hidden"


class Demanding(OwnDrafter):
    class Options(Struct):
        depth: int


class Untyped(OwnDrafter):
    Options = dict


class HasArbiter(CompositeDrafter):
    name = "has-arbiter"

    def __init__(self):
        super().__init__(Ensemble([ArbiterDrafter(ArbiterDrafter.Options(drafters=["none"]))]))


def test_installed_drafters_are_listed_with_where_they_come_from():
    by_name = {info.name: info for info in available()}
    assert {"none", "suffix-automaton"} <= set(by_name)
    info = by_name["suffix-automaton"]
    assert info.target == "drafters.suffix_automaton:SuffixAutomatonDrafter"
    assert info.source.startswith("rollahead ")
    assert info.needs == "nothing" and "min_match" in info.options and info.summary


def test_drafters_are_built_by_entry_point_with_their_options():
    assert isinstance(build({"name": "none"}), NoDrafter)
    drafter = build({"name": "suffix-automaton", "min_match": 3, "factor": 2})
    assert isinstance(drafter, SuffixAutomatonDrafter) and isinstance(drafter, Drafter)
    assert (drafter.options.min_match, drafter.options.factor) == (3, 2.0)


def test_a_strangers_class_is_built_by_module_and_name():
    drafter = build({"name": f"{__name__}:OwnDrafter", "depth": 7})
    assert isinstance(drafter, OwnDrafter) and drafter.options.depth == 7


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes packages that claim names of drafters for `OwnDrafter`."""

    def install(package, *names):
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {__name__}:OwnDrafter" for name in names]
        (folder / "entry_points.txt").write_text("\n".join(["[rollahead.drafters]", *lines]))

    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return install


def test_another_packages_drafter_never_hides_one_of_ours(installed):
    installed("stranger", "suffix-automaton", "theirs")
    assert isinstance(build({"name": "suffix-automaton"}), SuffixAutomatonDrafter)
    assert isinstance(build({"name": "theirs"}), OwnDrafter)
    ours, theirs = (info for info in available() if info.name == "suffix-automaton")
    assert ours.target == "drafters.suffix_automaton:SuffixAutomatonDrafter" and "cannot" not in ours.summary
    assert theirs.source == "stranger 1.0" and theirs.summary.startswith(
        "cannot be used: the name is that of rollahead"
    )


def test_a_name_that_two_packages_claim_is_listed_twice_and_refused(installed, capsys):
    installed("one", "theirs")
    installed("two", "theirs", "another")
    said = "drafter theirs is claimed by the packages one 1.0 and two 1.0; uninstall all but one"
    with pytest.raises(UsageError, match=said):
        build({"name": "theirs"})
    assert isinstance(build({"name": "another"}), OwnDrafter)
    assert main(["drafters"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("theirs ")]
    assert len(lines) == 2 and all(said in line for line in lines)


def test_a_command_line_can_give_options():
    assert written('{name = "prompt-lookup", min_ngram = 3}').options.min_ngram == 3
    assert written("none").name == "none"
    with pytest.raises(UsageError, match="no inline table of TOML"):
        written('{name = "prompt-lookup", min_ngram: 3}')


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ({"name": "sufix-automaton"}, "did you mean suffix-automaton.*installed are arbiter, .*none, prompt-lookup"),
        ({"name": "suffix-automaton", "min_macth": 3}, "no option 'min_macth'; did you mean min_match"),
        ({"name": "suffix-automaton", "min_match": 0}, "min_match = 0 is not valid: expected int >= 1$"),
        ({"name": "suffix-automaton", "factor": "much"}, "factor = 'much' is not valid: expected float, got str$"),
        ({"name": "suffix-automaton", "memory_mb": -1}, "memory_mb = -1 is not valid: expected float >= 0.0$"),
        ({"name": "suffix-automaton", "factor": float("inf")}, "factor = inf is not valid: set a finite number$"),
        ({"name": "suffix-automaton", "base": float("inf")}, "base = inf is not valid: set a finite number$"),
        ({"name": "suffix-automaton", "base": 1e300}, r"base = 1e\+300 is not valid: expected float <= 1000000"),
        ({"name": "suffix-automaton", "memory_mb": float("inf")}, "memory_mb = inf is not valid: set a finite number$"),
        ({"name": "suffix-automaton", "max_tokens": 10**20}, "max_tokens = 10+ is not valid: expected int <= 1000000$"),
        (
            {"name": "suffix-automaton", "corpus_bias": 10**20},
            "corpus_bias = 10+ is not valid: expected int <= 1000000$",
        ),
        ({"name": "draft-model", "kv_mb": float("inf")}, "draft-model: kv_mb = inf is not valid: set a finite number$"),
        ({"name": "suffix-automaton", "memory_mb": float("nan")}, "memory_mb = nan is not valid"),
        ({"name": f"{__name__}:Arguments"}, "Arguments cannot be made: TypeError.*'depth'"),
        ({"name": f"{__name__}:Raises"}, r"Raises cannot be made: RuntimeError\('boom'\)"),
        ({"name": f"{__name__}:Leaves"}, r"Leaves cannot be made: SystemExit\(3\)"),
        ({"name": f"{__name__}:Numbered"}, "has 3 for its name"),
        ({"name": f"{__name__}:Needy"}, "has 'hidden' for its needs; give members of drafters.base.Needs"),
        ({"name": f"{__name__}:Demanding"}, "Demanding: object missing required field depth$"),
        ({"name": f"{__name__}:Untyped"}, "Options that are no msgspec.Struct"),
        ({"name": "arbiter", "drafters": ["none", {"name": "arbiter"}]}, "arbiter is to hand out drafts of another"),
        (
            {"name": "arbiter", "drafters": [f"{__name__}:HasArbiter"]},
            "arbiter is to hand out drafts of another arbiter; name other drafters",
        ),
        (
            {"name": "suffix-automaton", "auxiliary": "arbiter"},
            "auxiliary = 'arbiter' of drafter suffix-automaton has an arbiter, .* put suffix-automaton into it",
        ),
        ({"name": "suffix-automaton", "auxiliary": f"{__name__}:HasArbiter"}, "put suffix-automaton into it"),
        ({"name": "suffix-automaton", "auxiliary": "suffix-automaton"}, "drafts of another suffix-automaton"),
        ({"name": "none", "depth": 3}, "takes no options; remove depth"),
        ({"name": f"{__name__}:NotADrafter"}, "is not a drafter"),
        ({"name": f"{__name__}:Absent"}, "cannot be imported"),
        ({"name": "no_such_module:Drafter"}, "cannot be imported.*no_such_module"),
        ({"depth": 3}, "needs a name"),
        ({"name": 3}, "needs a name"),
    ],
)
def test_mistakes_are_named_with_their_remedy(piece, message):
    with pytest.raises(UsageError, match=message):
        build(piece)


def install(tmp_path, monkeypatch, name, target):
    info = tmp_path / "strange_plugin-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-plugin\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[rollahead.drafters]\n{name} = {target}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def test_an_installed_plug_in_is_found_and_a_broken_one_does_not_hide_the_rest(tmp_path, monkeypatch):
    (tmp_path / "strange_plugin.py").write_text(
        "from drafters.base import BaseDrafter, Needs\n\n\nclass Strange(BaseDrafter):\n"
        "    name = 'strange'\n    needs = Needs.HIDDEN_STATES | Needs.LOGITS\n"
    )
    install(tmp_path, monkeypatch, "strange", "strange_plugin:Strange")
    info = next(i for i in available() if i.name == "strange")
    assert (info.source, info.needs) == ("strange-plugin 1.5", "hidden states, logits")
    assert build({"name": "strange"}).name == "strange"

    (tmp_path / "strange_plugin-1.5.dist-info" / "entry_points.txt").write_text(
        "[rollahead.drafters]\nbroken = absent_module:Strange\n"
    )
    by_name = {i.name: i for i in available()}
    assert "absent_module" in by_name["broken"].summary and "none" in by_name
    with pytest.raises(UsageError, match=r"drafter broken \(absent_module:Strange\) cannot be imported"):
        build({"name": "broken"})


@pytest.mark.parametrize(
    "source",
    ["class Strange:\n    'no drafter'\n", "class Strange:\n    needs = 'hidden'\n", "raise SystemExit(4)\n"],
)
def test_a_package_that_is_broken_otherwise_hides_nothing_either(tmp_path, monkeypatch, capsys, source):
    (tmp_path / "strange_plugin.py").write_text(source)
    monkeypatch.delitem(sys.modules, "strange_plugin", raising=False)
    install(tmp_path, monkeypatch, "a-drafter-with-a-very-long-name", "strange_plugin:Strange")
    assert main(["drafters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("a-drafter-with-a-very-long-name" in line and "cannot be used: " in line for line in lines)
    assert len({line.index(" needs ") for line in lines}) == 1 and any(line.startswith("none ") for line in lines)
    sys.modules.pop("strange_plugin", None)
