"""What `engine.dtype = auto` stands for."""

import json

import pytest
import torch

from pipeline.models import precision
from pipeline.models.checkpoint import load_decoder
from pipeline.models.config import ModelConfig
from tests.unit.tiny_models import save_tiny

CPU = torch.device("cpu")


def saved(folder, kind):
    """A checkpoint that says it is of that type."""
    path = save_tiny(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": kind}))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ModelConfig.from_folder(saved(tmp_path_factory.mktemp("model"), "bfloat16"))


@pytest.fixture
def stated(monkeypatch):
    """Steps take stated times."""

    def state(**seconds):
        precision.choose.cache_clear()
        monkeypatch.setattr(precision, "_decoding", lambda config, dtype: lambda: seconds[str(dtype).split(".")[1]])

    yield state
    precision.choose.cache_clear()


def test_the_type_of_a_bfloat16_model_is_what_was_measured_to_be_faster(config, stated):
    stated(bfloat16=2.0, float32=1.0)
    choice = precision.choose(config, CPU)
    assert choice.dtype == torch.float32 and "float32 1000.00 ms" in str(choice)
    stated(bfloat16=1.0, float32=2.0)
    assert precision.choose(config, CPU).dtype == torch.bfloat16


def test_a_machine_that_could_go_either_way_keeps_the_checkpoints_type(config, stated):
    stated(bfloat16=1.0, float32=0.9)
    assert precision.choose(config, CPU).dtype == torch.bfloat16


def test_both_types_are_measured_on_this_machine_and_the_decoder_has_the_chosen_one(config, tmp_path):
    precision.choose.cache_clear()
    choice = precision.choose(config, CPU)
    seconds = dict(choice.seconds)
    assert seconds.keys() == {"bfloat16", "float32"} and min(seconds.values()) > 0
    faster = seconds["float32"] < precision._CLEARLY * seconds["bfloat16"]
    assert choice.dtype == (torch.float32 if faster else torch.bfloat16)
    folder = saved(tmp_path, "bfloat16")
    assert load_decoder(folder, device="cpu").dtype == choice.dtype
    assert load_decoder(folder, "bfloat16", "cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_no_weights_are_rounded_unasked(tmp_path, kind, stated):
    stated(bfloat16=1.0, float32=9.0)
    folder = saved(tmp_path, kind)
    assert load_decoder(folder, device="cpu").dtype == torch.float32
    assert str(precision.choose(ModelConfig.from_folder(folder), CPU)) == "float32, as the checkpoint"
