"""The calls into vLLM's engine, on one that is made up; none of it needs vLLM."""

import asyncio
import queue
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from pipeline.engine.generator import GroupRequest
from pipeline.engine.vllm import generator as vllm_generator
from pipeline.engine.vllm.client import Ended, EngineClient
from pipeline.engine.vllm.generator import VllmGenerator
from pipeline.errors import RunFailed, UsageError
from pipeline.messages import SamplingParams, WeightsGroup, WeightsManifest
from pipeline.weights.group import TransferFailed

MANIFEST = WeightsManifest(group=1, version=7, bucket_bytes=1024, tensors=())


class Engine:
    """vLLM's `AsyncLLM` as far as an update sees it: what the workers of each engine answer, and what was asked."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers, self.calls, self.engine_core = answers, [], self

    async def call_utility_all_async(self, utility: str, method: str, *rest: Any) -> list[list[Any]]:
        assert utility == "collective_rpc"
        self.calls.append(method)
        return list(self.answers)

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **named: Any) -> None:
            self.calls.append(name)

        return call


def client(engine: Engine) -> EngineClient:
    made = EngineClient.__new__(EngineClient)
    made._engine = engine
    made._call = asyncio.run  # type: ignore[method-assign]
    return made


def test_a_publication_that_a_worker_cannot_load_ends_in_one_sentence():
    engine = Engine(["", ""], ["", "model.safetensors is cut short"])
    with pytest.raises(RunFailed, match=r"^publication 7 cannot be loaded: model\.safetensors is cut short$"):
        client(engine).load_weights(Path("weights"), 7, keep_cache=True)
    assert "resume_generation" not in engine.calls


def test_a_broadcast_that_a_worker_has_not_all_of_leaves_generation_paused():
    engine = Engine(["", ""], ["", "Connection reset by peer"])
    with pytest.raises(TransferFailed, match=r"^Connection reset by peer$"):
        client(engine).receive_weights(MANIFEST, keep_cache=True)
    assert "resume_generation" not in engine.calls


@pytest.mark.parametrize("how", ["load", "receive"])
def test_generation_goes_on_where_every_worker_has_a_publication(how):
    engine = Engine(["", ""])
    if how == "load":
        client(engine).load_weights(Path("weights"), 7, keep_cache=True)
    else:
        client(engine).receive_weights(MANIFEST, keep_cache=True)
    assert engine.calls == [
        "pause_generation", f"rollahead_{how}_weights", "update_weight_version", "resume_generation"
    ]  # fmt: skip


def test_workers_of_all_engines_are_members_of_one_group_each_with_its_rank():
    made, joined = EngineClient.__new__(EngineClient), []

    def workers(method: str, *arguments: Any) -> list[Any]:
        if method == "rollahead_receiver":
            return [("1.0", "cuda c"), ("0.1", "cuda b"), ("0.0", "cuda a")]
        joined.append(arguments)
        return ["", "", "" if len(joined) == 1 else "it is not reached"]

    made.workers = workers  # type: ignore[method-assign]
    group = WeightsGroup(group=3, address="tcp://127.0.0.1:1", backend="nccl", size=4, seconds=1.0)
    made.join_group(group)
    assert tuple(made.receivers().values()) == ("cuda a", "cuda b", "cuda c")
    assert joined[0][1] == {"0.0": 1, "0.1": 2, "1.0": 3}
    assert msgspec.msgpack.decode(joined[0][0], type=WeightsGroup) == group
    with pytest.raises(TransferFailed, match="not reached"):
        made.join_group(group)


def generator(*answers: Any) -> VllmGenerator:
    made = VllmGenerator.__new__(VllmGenerator)
    made._client = SimpleNamespace(workers=lambda *_: list(answers))
    return made


def test_drafters_of_parallel_engines_are_heard_and_counted_wherever_they_are():
    early_stage, counts = None, {"drafted": 3, "accepted": 2}
    first = (["one is switched off"], {"asked": 4.0}, [{"suffix": counts}, {}])
    second = (["another is"], {"asked": 2.0, "slept": 1.0}, [{}, {"suffix": counts}])
    events, counters, drafts = generator(early_stage, first, None, early_stage, second)._ask_drafters([[0, 1], [0, 2]])
    assert events == ["one is switched off", "another is"]
    assert counters == {"asked": 6.0, "slept": 1.0}
    assert drafts == [{"suffix": counts}, {"suffix": counts}]


def test_a_sampler_that_is_wrong_in_any_engine_ends_the_start():
    with pytest.raises(RunFailed, match=r"where it drafts \(top-p\)"):
        generator({"top-p": 0.3}, {"top-p": 0.0})._check_sampler("0.32.0")


class Requests:
    """`EngineClient` as far as requests see it."""

    errored = False

    def __init__(self) -> None:
        self.ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self.submitted: list[Any] = []
        self.cancelled: list[Any] = []

    def submit(self, key: Any, *rest: Any) -> None:
        self.submitted.append(key)

    def cancel(self, key: Any) -> None:
        self.cancelled.append(key)

    def died(self) -> bool:
        return False


@pytest.fixture
def requests(monkeypatch):
    """A generator of 8 tokens on requests that nothing answers."""
    monkeypatch.setattr(vllm_generator, "translated", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions", SimpleNamespace(EngineDeadError=EOFError))
    made = VllmGenerator.__new__(VllmGenerator)
    made._client, made._groups, made._stop = Requests(), {}, frozenset()
    made.version, made.max_length, made._vocab_size, made._times, made._speculating = 0, 64, 8, 0, False
    return made


def group(number: int, **sampling: Any) -> GroupRequest:
    return GroupRequest(number, np.array([1, 2]), SamplingParams(**sampling), (1, 2))


@pytest.mark.parametrize("key", ["stop_token_ids", "allowed_token_ids", "bad_token_ids"])
def test_a_token_that_the_model_does_not_have_is_refused_before_anything_is_submitted(requests, key):
    with pytest.raises(UsageError, match=f"sampling.{key} has token id 8, outside the vocabulary of 8"):
        requests.add(group(1, **{key: (3, 8)}))
    assert not requests.has_work() and not requests._client.submitted
    requests.add(group(1, **{key: (3, 7)}))
    assert requests.has_work()


def test_a_group_of_which_a_request_failed_is_gone(requests):
    for number in (1, 2):
        requests.add(group(number))
    client = requests._client
    for key in client.submitted[:2]:
        client.ended.put(Ended(key, None, ValueError("no such token")))
    with pytest.raises(RunFailed, match="no such token"):
        requests.step()
    assert set(client.cancelled) == set(client.submitted[:2])
    assert requests.step() == [] and requests.running() == 2
    requests.cancel(2)
    assert not requests.has_work()
