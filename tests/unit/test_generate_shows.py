"""What `rollahead generate` shows of who drafted what."""

import re

from pipeline.cli import main
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny


def test_accepted_drafts_are_marked_by_who_made_them_and_every_decision_is_counted(tmp_path, capsys):
    folder = save_tiny(tmp_path)
    _write_tokenizer(folder, VOCABULARY)
    arbiter = '{name = "arbiter", measure = false, drafters = ["suffix-automaton", "prompt-lookup"]}'
    command = ["generate", str(folder), "--prompt", "1212121212", "--drafter", arbiter, "--temperature", "0"]
    assert main([*command, "--max-new-tokens", "80", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    drafted = {name: (int(d), int(a)) for name, d, a in re.findall(r"([\w-]+) (\d+) drafted, (\d+) accepted", out)}
    assert "suffix-automaton" in drafted and all(0 <= accepted <= tried for tried, accepted in drafted.values())
    assert re.search(r"‹(\d:)?[^‹›]+›", out), "accepted drafts are marked"
    reasons = dict(re.findall(r"(drafted|nothing known|does not pay|no room|resting) (\d+)", out.splitlines()[-1]))
    assert {"drafted", "nothing known", "does not pay", "no room", "resting"} <= set(reasons)
    assert int(reasons["drafted"]) > 0
    assert sum(map(int, reasons.values())) > 0 and "suffix-automaton.memory_tokens" in out
