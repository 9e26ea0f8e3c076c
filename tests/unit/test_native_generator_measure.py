import pytest

from pipeline.engine.measure import drafting_speedup
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from tests.unit.tiny_models import save_tiny


def test_drafting_is_measured_on_equal_work(tmp_path):
    folder = save_tiny(tmp_path)
    sampling = SamplingParams(temperature=0.5, max_new_tokens=30, stop_token_ids=(4, 5))
    measured = drafting_speedup(
        folder, [[1, 5, 9], [1, 2, 1, 2]], sampling, 3, {"name": "suffix-automaton"}, repeats=3, max_sequences=4
    )
    assert measured["repeats"] == 3 and measured["drafter"] == "suffix-automaton"
    assert 6 <= measured["tokens"] <= 6 * 30
    ratio = measured["ratio"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert measured["tokens_per_second"]["plain"] > 0 and measured["tokens_per_second"]["drafted"] > 0
    assert 0 < measured["acceptance_rate"] <= 1 and measured["drafter_failures"] == 0
    assert 1 < measured["tokens_per_verification"] <= 9


def test_without_drafts_there_is_no_acceptance_rate(tmp_path):
    sampling = SamplingParams(max_new_tokens=5)
    measured = drafting_speedup(save_tiny(tmp_path), [[1]], sampling, 2, {"name": "none"}, repeats=1)
    assert measured["acceptance_rate"] is None and measured["tokens_per_verification"] == 1


def test_nothing_to_measure_is_refused(tmp_path):
    with pytest.raises(UsageError, match="needs a prompt"):
        drafting_speedup(save_tiny(tmp_path), [], SamplingParams(), 2, {"name": "none"})
