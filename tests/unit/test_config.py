"""Configuration: what is accepted, what is refused, and in which words."""

import tomllib

import pytest

from pipeline.config import Config, changed_keys, check_against_model, check_config, load_config, render
from pipeline.config.load import convert
from pipeline.errors import UsageError


def test_defaults_are_valid_and_survive_a_round_trip():
    config = load_config(None, [])
    check_config(config)
    assert convert(tomllib.loads(render(config))) == config


def test_file_and_overrides_are_merged_with_the_override_on_top(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[learner]\nbatch_size = 32\ngroup_size = 4\n[model]\npath = "a"\n')
    config = load_config(path, ["learner.batch_size=16", "model.path=/some/dir", "sampling.temperature=0.5"])
    assert (config.learner.batch_size, config.learner.group_size) == (16, 4)
    assert config.model.path == "/some/dir"
    assert config.sampling.temperature == 0.5


def test_a_piece_may_be_given_by_its_name_alone():
    config = load_config(None, ["engine.drafter=none", 'objective.gates=["erc"]', "objective.surrogate.clip_low=0.1"])
    assert config.engine.drafter == {"name": "none"}
    assert config.objective.gates == [{"name": "erc"}]
    assert config.objective.surrogate == {"name": "ppo-clip", "clip_low": 0.1}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("learner.bacth_size=3", ["learner.bacth_size", "3", "batch_size"]),
        ("lerner.batch_size=3", ["lerner", "learner"]),
        ("learner.batch_size=0", ["learner.batch_size", "0", ">= 1"]),
        ("learner.batch_size=many", ["learner.batch_size", "many", "int"]),
        ("learner.beta1=1.5", ["learner.beta1", "1.5", "< 1"]),
        ("learner.learning_rate=nan", ["learner.learning_rate", "nan"]),
        ("learner.learning_rate=inf", ["learner.learning_rate = inf", "set a finite number", "AdamW learning rate"]),
        ("transport.heartbeat_seconds=inf", ["transport.heartbeat_seconds = inf", "progress messages"]),
        ("sampling.presence_penalty=-inf", ["sampling.presence_penalty = -inf"]),
        ("sampling.logit_bias={5=nan}", ["sampling.logit_bias.5 = nan"]),
        ("task.reward_weights=[1, inf]", ["task.reward_weights[1] = inf", "weight of each"]),
        ("objective.surrogate.clip_low=inf", ["objective.surrogate.clip_low = inf"]),
        ("task.kind=chess", ["task.kind", "chess"]),
        ("engine.switching.treshold=1", ["engine.switching.treshold", "did you mean threshold"]),
        ("engine.switching.window=0", ["engine.switching.window", "= 0", "rolling mean"]),
        ("batch_size=3", ["section.key=value"]),
        ("learner.batch_size", ["section.key=value"]),
    ],
)
def test_errors_name_key_value_and_remedy(override, parts):
    with pytest.raises(UsageError) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_what_is_passed_through_to_another_program_may_be_infinite():
    assert load_config(None, ["engine.vllm.swap_space=inf"]).engine.vllm == {"swap_space": float("inf")}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["learner.batch_size=30", "learner.group_size=8"], ["30", "8", "multiple"]),
        (["learner.group_size=1", "learner.batch_size=4"], ["group_size = 1"]),
        (["engine.max_sequences=4"], ["engine.max_sequences = 4", "learner.group_size"]),
        (["sampling.temperature=0"], ["sampling.temperature = 0"]),
        (["task.kind=jsonl", "model.path=x"], ["task.path"]),
        (["task.kind=jsonl", "task.path=x"], ["model.path"]),
        (["learner.micro_batch_tokens=100"], ["learner.micro_batch_tokens = 100", "1024"]),
        (["learner.minibatches=65"], ["learner.minibatches = 65"]),
        (["learner.max_age=2", "learner.max_staleness=2"], ["learner.max_age = 2", "learner.max_staleness = 2"]),
        (["transport.lease_seconds=2"], ["transport.lease_seconds = 2", "heartbeat_seconds = 1.0"]),
    ],
)
def test_impossible_combinations_are_refused(overrides, parts):
    with pytest.raises(UsageError) as caught:
        check_config(load_config(None, overrides))
    for part in parts:
        assert part in str(caught.value)


def test_sequence_limits_are_checked_against_the_model():
    config = load_config(None, ["sampling.max_new_tokens=900"])
    with pytest.raises(UsageError, match="1024 positions"):
        check_against_model(config, 1024)
    check_against_model(config, 2048)


def test_missing_and_malformed_files_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_config(tmp_path / "none.toml", [])
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml", [])


def test_resume_compares_what_matters_and_names_it():
    before, after = Config(), Config()
    after.run.steps += 100
    after.engine.threads = 3
    assert changed_keys(before, after) == []
    after.learner.learning_rate = 1.0
    (changed,) = changed_keys(before, after)
    assert changed.startswith("learner.learning_rate (") and "1.0 now" in changed
