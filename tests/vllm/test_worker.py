"""What our mixin of vLLM's worker answers, on a model runner that is made up."""

from types import SimpleNamespace
from typing import Any

import torch


def worker(speculative: Any = None) -> Any:
    from pipeline.engine.vllm.worker import RollaheadWorker

    made = RollaheadWorker()
    made.model_runner = SimpleNamespace(
        reload_weights=lambda weights_path: None,
        get_model=lambda: torch.nn.Module(),
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace()),
        vllm_config=SimpleNamespace(speculative_config=speculative),
    )
    return made


def test_new_weights_are_loaded_beside_a_drafter_of_vllms_without_a_model(tmp_path):
    for speculative in (None, SimpleNamespace(method="suffix", draft_model_config=None)):
        worker(speculative).rollahead_load_weights(str(tmp_path), 1)
