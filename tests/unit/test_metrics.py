"""metrics.jsonl: stable keys, honest nulls, cut back on resume."""

import json
from types import SimpleNamespace

from msgspec import structs

from pipeline.launcher import ProcessGroup
from pipeline.telemetry import MetricsWriter, StepMetrics, read_metrics
from pipeline.telemetry.metrics import NewRows
from pipeline.telemetry.progress import line, sparkline

# What readers of metrics.jsonl build on; new keys may come, these stay.
STABLE = """
step policy_version loss grad_norm learning_rate reward_mean reward_std reward_mean_unfiltered groups_without_signal
response_length_mean truncated_fraction tokens_trained tokens_per_second staleness_mean staleness_max entropy
entropy_ratio_kept clip_fraction importance_weight_mean importance_weight_ess mismatch_k3 dropped acceptance_rate
tokens_per_verification drafters engine_seconds learner_seconds wait_seconds wall_seconds
""".split()


def _row(step: int, **changes) -> StepMetrics:
    values = {field.name: 1.0 for field in structs.fields(StepMetrics) if field.required}
    values |= {"step": step, "policy_version": step, "groups_without_signal": 0, "tokens_trained": 5}
    return StepMetrics(**(values | changes))


def test_every_stable_key_is_written(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 0)
    writer.write(_row(1))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert set(STABLE) <= set(row)


def test_values_that_are_not_finite_become_null(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 0)
    writer.write(_row(1, grad_norm=float("nan"), mismatch_k3=None, extra={"a": float("inf")}))
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: 1 / 0)
    assert row["grad_norm"] is None and row["mismatch_k3"] is None and row["extra"] == {"a": None}


def test_resume_cuts_back_to_the_checkpoint_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, 0)
    for step in (1, 2, 3, 4):
        writer.write(_row(step))
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 5, "loss"')
    writer = MetricsWriter(path, 2)
    writer.write(_row(3))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_rows_of_a_growing_file_are_read_once(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    rows = NewRows(path)
    assert rows.read() == []
    writer = MetricsWriter(path, 0)
    for step in range(1, 5):
        writer.write(_row(step))
    assert [row["step"] for row in rows.read()] == [1, 2, 3, 4]
    parsed = []
    monkeypatch.setattr("pipeline.telemetry.metrics.json.loads", lambda text: parsed.append(text) or {"step": 5})
    writer.write(_row(5))
    assert rows.read() == [{"step": 5}] and rows.read() == [] and len(parsed) == 1
    monkeypatch.undo()
    with path.open("a") as file:
        file.write('{"step": 6')
        file.flush()
        assert rows.read() == []
        file.write("}\n")
    assert rows.read() == [{"step": 6}]
    writer.close()
    writer = MetricsWriter(path, 3)
    assert rows.read() == [], "what is left of a file that was cut back was read before"
    writer.write(_row(4))
    assert [row["step"] for row in rows.read()] == [4]
    writer.close()


def test_a_run_shows_each_step_once_and_samples_with_it(tmp_path):
    shown = SimpleNamespace(rows=[], samples=[])
    view = SimpleNamespace(show=shown.rows.append, sample=shown.samples.append)
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    group = SimpleNamespace(rows=NewRows(metrics), samples=NewRows(samples), view=view)
    for step in (1, 2):
        with samples.open("a") as file:
            file.write(json.dumps({"sample": step}) + "\n")
        ProcessGroup._show_new_rows(group)
        assert len(shown.samples) == step - 1, "samples are shown with their step"
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        ProcessGroup._show_new_rows(group)
        ProcessGroup._show_new_rows(group)
    assert shown.rows == [{"step": 1}, {"step": 2}] and shown.samples == [{"sample": 1}, {"sample": 2}]


def test_plain_line_copes_with_nothing_drafted():
    row = structs.asdict(_row(3, acceptance_rate=None))
    assert "step 3/9" in line(row, 9) and "no drafts" in line(row, 9)
    assert "accepted 50%" in line(row | {"acceptance_rate": 0.5}, 9)
    assert "entropy -" in line(row | {"entropy": None}, 9)


def test_sparkline_rises_with_its_values():
    text = sparkline([0.0, 0.5, 1.0], width=3)
    assert len(text) == 3 and text[0] < text[1] < text[2]
    assert sparkline([]) == ""
