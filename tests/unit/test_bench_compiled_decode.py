"""What `rollahead bench compiled-decode` takes the time of."""

import argparse
import time

import torch

from benchmarks import compiled_decode
from pipeline.models.checkpoint import load_decoder
from tests.unit.tiny_models import save_tiny


def test_a_step_takes_the_seconds_that_pass_whatever_its_threads_compute(tmp_path, monkeypatch):
    def waiting(seconds):
        def step(tokens):
            time.sleep(seconds)  # no CPU time
            return torch.zeros(len(tokens), 1)

        return lambda decoder, batch, length: step

    monkeypatch.setattr(compiled_decode, "native_step", waiting(0.01))
    monkeypatch.setattr(compiled_decode, "compiled_step", waiting(0.02))
    options = argparse.Namespace(length=8, repeats=2, steps=2)
    row = compiled_decode._row(load_decoder(save_tiny(tmp_path), "float32"), 1, options)
    assert row["native_seconds"]["min"] >= 0.01 and row["compiled_seconds"]["min"] >= 0.02
