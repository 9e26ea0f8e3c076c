"""What our mixin of vLLM's worker answers, on a model runner that is made up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import UsageError


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
        assert not worker(speculative).rollahead_load_weights(str(tmp_path), 1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("the head does not fit; train another"), "the head does not fit; train another"),
        (OSError("no such file"), "no such file"),
        (KeyError("lm_head.weight"), "KeyError: 'lm_head.weight'"),
        (AssertionError("shapes differ\nin many lines"), "AssertionError: shapes differ"),
    ],
)
def test_why_weights_cannot_be_loaded_is_an_answer_not_a_traceback(error, said, tmp_path):
    def fail(weights_path: str) -> None:
        raise error

    made = worker()
    made.model_runner.reload_weights = fail
    assert made.rollahead_load_weights(str(tmp_path), 1) == said


def test_of_the_workers_that_share_tensors_the_first_speaks_for_the_drafter(monkeypatch):
    from pipeline.engine.vllm.proposer import DrafterProposer

    drafter = DrafterProposer.__new__(DrafterProposer)
    drafter.events, drafter.counters, drafter.taken_drafts = [], lambda: {"asked": 1.0}, lambda samples: [{}]
    made = worker()
    assert made.rollahead_drafter([[0, 1]]) is None
    made.model_runner.drafter = drafter
    for first, said in ((True, (["slow"], {"asked": 1.0}, [{}])), (False, None)):
        drafter.events.append("slow")
        monkeypatch.setattr(made, "_rollahead_is_first", lambda first=first: first)
        assert made.rollahead_drafter([[0, 1]]) == said and not drafter.events
