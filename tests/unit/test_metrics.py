"""metrics.jsonl: stable keys, honest nulls, cut back on resume."""

import json

from msgspec import structs

from pipeline.telemetry import MetricsWriter, StepMetrics, read_metrics
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


def test_plain_line_copes_with_nothing_drafted():
    row = structs.asdict(_row(3, acceptance_rate=None))
    assert "step 3/9" in line(row, 9) and "no drafts" in line(row, 9)
    assert "accepted 50%" in line(row | {"acceptance_rate": 0.5}, 9)
    assert "entropy -" in line(row | {"entropy": None}, 9)


def test_sparkline_rises_with_its_values():
    text = sparkline([0.0, 0.5, 1.0], width=3)
    assert len(text) == 3 and text[0] < text[1] < text[2]
    assert sparkline([]) == ""
