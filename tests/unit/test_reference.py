"""docs/objectives.md is what the pieces say."""

from pathlib import Path

from learner.pieces import BUILT_IN
from learner.reference import page
from pipeline.config.recipes import recipe_names

DOCS = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def test_the_page_is_current():
    assert DOCS.read_text() == page(), "run `python -m learner.reference > docs/objectives.md`"


def test_every_piece_and_every_recipe_is_on_it():
    text = page()
    for name in [name for names in BUILT_IN.values() for name in names] + recipe_names():
        assert f"\n### {name}\n" in text
    assert text.count("**Reconstructed.**") == 4
