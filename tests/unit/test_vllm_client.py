"""The calls into vLLM's engine, on one that is made up; none of it needs vLLM."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.vllm.client import EngineClient
from pipeline.errors import RunFailed


class Engine:
    """vLLM's `AsyncLLM` as far as an update sees it: what every worker answers, and what it was asked."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.calls = answers, []

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append(method)
        return self.answers

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **named: Any) -> None:
            self.calls.append(name)

        return call


def client(engine: Engine) -> EngineClient:
    made = EngineClient.__new__(EngineClient)
    made._engine = engine
    return made


def test_a_publication_that_a_worker_cannot_load_ends_in_one_sentence():
    engine = Engine(["", "model.safetensors is cut short"])
    with pytest.raises(RunFailed, match=r"^publication 7 cannot be loaded: model\.safetensors is cut short$"):
        asyncio.run(client(engine)._update(Path("weights"), 7, True))
    assert "resume_generation" not in engine.calls


def test_generation_goes_on_where_every_worker_has_loaded_a_publication():
    engine = Engine(["", ""])
    asyncio.run(client(engine)._update(Path("weights"), 7, True))
    assert engine.calls == [
        "pause_generation", "rollahead_load_weights", "update_weight_version", "resume_generation"
    ]  # fmt: skip
