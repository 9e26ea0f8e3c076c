"""The parts of `rollahead bench drafters` run on a small model and write their rows."""

import json

import pytest

from pipeline.cli import main
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny


@pytest.mark.slow
def test_every_part_writes_its_rows(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    _write_tokenizer(model, VOCABULARY)
    lines = [json.dumps({"question": f"{i} + {i}", "answer": f"{i} and {i} is {2 * i}."}) for i in range(80)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = str(tmp_path / "data.jsonl")
    code = main(
        ["bench", "drafters", "--model", str(model), "--train", data, "--prompts", data, "--out", str(tmp_path / "out"),
         "--memory-tokens", "500", "--build-tokens", "4000", "--stream-texts", "64", "--batch", "2", "--repeats", "2",
         "--tokens", "12"]
    )  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["what"] == "drafters"
    parts = {row["part"]: row for row in results["rows"]}
    assert parts.keys() == {"stream", "build", "arbiter", "replay"}
    stream = results["rows"][0]
    assert stream["microseconds_a_token_core"] > 0 and 0 < stream["accepted"] <= stream["drafted"]
    assert parts["build"]["tokens"] >= 4000 and parts["build"]["bytes_a_token"] > 30
    arbiter = [row for row in results["rows"] if row["part"] == "arbiter"]
    assert {row["prompts"] for row in arbiter} == {tmp_path.name, "random"}
    assert all(0 < row["ratio_to_best"]["min"] <= row["ratio_to_best"]["max"] for row in arbiter)
    for row in arbiter:  # two repeats: Student's t of one degree of freedom
        ratio = row["ratio_to_best"]
        lower = ratio["median"] - 6.314 * (ratio["max"] - ratio["min"]) / 2
        assert row["ratio_lower_95"] == pytest.approx(lower)
    assert any("regret" in row for row in results["rows"])


def test_an_unknown_part_is_refused(tmp_path, capsys):
    arguments = ["--model", "m", "--train", "t", "--prompts", "p", "--parts", "strem", "--out", str(tmp_path)]
    assert main(["bench", "drafters", *arguments]) == 2
    assert "--parts strem is unknown" in capsys.readouterr().err
