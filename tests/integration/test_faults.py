"""The fault harness in its short form, and that it would notice what it looks for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LAB = """
import sys
from pathlib import Path
import torch
from benchmarks.fault_kills import Lab, make_model, run_with_kills
from benchmarks.synthetic import free_address
torch.set_num_threads(1)
root = Path(sys.argv[1])
lab = Lab(root / "lab", make_model(root / "model"), free_address(), max_staleness=0)
run_with_kills(lab, 1, [], 0.0)
"""


def test_short_form_of_the_fault_harness_finds_nothing_lost_or_repeated(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "bench", "faults", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["part"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert list(rows) == ["kills", "disk", "network", "fuzz", "soak"]
    assert rows["kills"]["kills"] >= 8 and rows["kills"]["failpoints_left"] == []
    assert rows["fuzz"]["mutated"] == 20_000 and rows["fuzz"]["outcomes"]["refused"] > 5000
    assert all(row["recovery_seconds"] < 5 for row in rows["network"]["rows"])


def test_the_independent_ledger_notices_repeats_losses_and_another_curve(tmp_path):
    from benchmarks.fault_kills import Lab, audit

    subprocess.run([sys.executable, "-c", LAB, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=120)
    lab = Lab(tmp_path / "lab", tmp_path / "model", "tcp://127.0.0.1:1", max_staleness=0)
    reference = lab.rows()
    assert len({row["loss"] for row in reference}) > 6, "the run trains"
    assert audit(lab, reference).clean

    path = lab.run / "trained.jsonl"
    lines = path.read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    last["samples"][0] = first["samples"][0]
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    found = audit(lab, reference)
    assert found.repeats == 1 and found.unaccounted == 1
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert len(audit(lab, reference).differences) == 3
    path.write_text("\n".join(lines) + "\n")

    with (lab.root / "committed.log").open("a") as file:
        file.write("99999 0\n")
    assert audit(lab, reference).committed_and_lost == 1
    changed = [row | {"loss": row["loss"] + (1e-9 if row["step"] == 7 else 0)} for row in reference]
    assert audit(lab, changed).differences == ["step 7 differs from the uninterrupted run"]
    shutil.rmtree(lab.run / "journal")
    assert audit_fails(lab, reference)


def audit_fails(lab, reference) -> bool:
    from benchmarks.fault_kills import audit

    try:
        return not audit(lab, reference).clean
    except ValueError:  # there is no record at all
        return True
