"""Broadcasts that fail: a sentence, the files instead, no half of a version, and another group later."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.mtp.drafter import MTPDrafter
from drafters.mtp.module import MTPModule
from pipeline.config import load_config
from pipeline.engine.generator import GeneratorLost
from pipeline.engine.live_weights import LiveWeights
from pipeline.engine.native.switching import SwitchingRule
from pipeline.errors import UsageError
from pipeline.failpoints import arm
from pipeline.messages import (
    WeightsClosed,
    WeightsGroup,
    WeightsJoin,
    WeightsManifest,
    WeightsTensor,
    WeightsWanted,
)
from pipeline.models.checkpoint import SMALL_MODEL, load_decoder
from pipeline.models.config import ModelConfig
from pipeline.weights.buckets import buckets
from pipeline.weights.group import Meeting, TransferFailed, backend_for, check_broadcasting, device_name, join
from pipeline.weights.receiving import Incoming
from tests.unit import weight_routes
from tests.unit.generation import finish, group
from tests.unit.tiny_models import save_tiny
from tests.unit.weight_routes import altered, following


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("pipeline.engine.live_weights._RETRY_SECONDS", 0.2)
    monkeypatch.setattr(weight_routes, "SECONDS", 1.0)
    yield
    arm("")


def same(generator, folder) -> bool:
    found, wanted = generator.decoder.tensors(), load_decoder(folder, generator.decoder.dtype, "cpu").tensors()
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_broadcast_that_ends_in_the_middle_leaves_files_and_another_group_to_come(tmp_path):
    model = save_tiny(tmp_path / "model")
    with following("collective", tmp_path, model, bucket_bytes=1024) as (learner, engine):
        real, pieces = engine.generator._receiver._group, []

        def broken(tensor, broadcast=real.broadcast):
            pieces.append(tensor)
            if len(pieces) == 5:
                real.close()
                raise TransferFailed("Connection reset by peer")
            broadcast(tensor)

        real.broadcast = broken
        learner.publisher.publish(altered(model, 1), 1)
        engine.get(1)
        assert len(pieces) == 5 and same(engine.generator, tmp_path / "weights" / "v1")
        (said,) = [line for line in engine.events if "Connection reset" in line]
        assert "read as files" in said
        engine.ready()
        learner.publisher.publish(altered(model, 2), 2)
        engine.get(2)
        assert same(engine.generator, tmp_path / "weights" / "v2") and not engine.engine._torn
        assert sum(isinstance(message, WeightsWanted) for message in learner.asked) == 2


def test_nothing_is_sampled_from_weights_of_two_versions(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model")
    with following("collective", tmp_path, model, bucket_bytes=1024) as (learner, engine):
        engine.generator.add(group(1, max_new_tokens=10))
        learner.publisher.publish(altered(model, 1), 1)
        arm("weights.sent=error@4")  # an OSError in the learner's thread
        monkeypatch.setattr(engine.follower, "fetch", lambda version: (_ for _ in ()).throw(weight_error()))
        engine.engine.wanted_version = 1
        engine.until(lambda: engine.engine._torn and bool(engine.events))
        stepped = []
        monkeypatch.setattr(engine.generator, "step", lambda: stepped.append(1) or [])
        engine.engine._generate()
        assert not stepped and engine.generator.version == 0
        monkeypatch.undo()
        arm("")
        engine.get(1)
        assert same(engine.generator, tmp_path / "weights" / "v1") and not engine.engine._torn
        assert finish(engine.generator)


def weight_error():
    from pipeline.weights import WeightsError

    return WeightsError("nothing is there now")


def test_an_engine_that_does_not_take_part_costs_its_own_thread_some_seconds(tmp_path):
    model = save_tiny(tmp_path / "model")
    with following("collective", tmp_path, model) as (learner, engine):
        learner.publisher.publish(altered(model, 1), 1)
        engine.engine.wanted_version = 1
        engine.engine._follow_weights()  # it asks, and then hangs
        began = time.monotonic()
        learner.publisher.publish(altered(model, 2), 2)
        assert time.monotonic() - began < 0.5
        deadline = time.monotonic() + 10
        while not learner.events[1:]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "broadcasting weights version" in learner.events[1] and "reads files instead" in learner.events[1]
        engine.get(2)
        assert same(engine.generator, tmp_path / "weights" / "v2")


def test_a_manifest_that_would_end_the_connection_is_not_sent(tmp_path):
    model = save_tiny(tmp_path / "model")
    with following("collective", tmp_path, model) as (learner, engine):
        learner.broadcaster._max_message_bytes = 1000
        learner.publisher.publish(altered(model, 1), 1)
        engine.get(1)
        assert any("transport.max_message_bytes = 1000" in line for line in engine.events)
        assert same(engine.generator, tmp_path / "weights" / "v1")


def test_a_learner_that_restarted_is_asked_for_a_group_again(tmp_path):
    model = save_tiny(tmp_path / "model")
    with following("collective", tmp_path, model) as (learner, engine):
        learner.broadcaster.gone(b"peer 1")
        learner.connections += 1
        engine.engine._follow_weights()
        assert engine.live._group is None
        engine.ready()
        learner.publisher.publish(altered(model, 1), 1)
        engine.get(1)
        assert sum(isinstance(message, WeightsJoin) for message in learner.asked) == 2
        assert same(engine.generator, tmp_path / "weights" / "v1")


def test_draft_head_and_small_model_come_with_the_policy(tmp_path):
    model, small = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "small", hidden_size=16, seed=7)
    drafter = MTPDrafter(MTPDrafter.Options(path=str(with_head(tmp_path / "head", model, 1))))
    options = {"small_model": load_decoder(small, "float32", "cpu"), "switching": SwitchingRule(threshold=1.0)}
    for name, more in (("head", {"drafter": drafter}), ("small", options)):
        with following("collective", tmp_path / name, model, dtype="float32", **more) as (learner, engine):
            tensors = altered(model, 1) | load_file(with_head(tmp_path / "newer", model, 2) / "mtp.safetensors")
            tensors |= {SMALL_MODEL + n: t for n, t in altered(small, 3).items()}
            learner.publisher.publish(tensors, 1)
            engine.get(1)
            assert same(engine.generator, tmp_path / name / "weights" / "v1")
            assert not engine.generator.decoder.beside, "it is not kept"
            found = drafter._head.tensors() if name == "head" else engine.generator.small.decoder.tensors()
            prefix = "" if name == "head" else SMALL_MODEL
            assert found and all(torch.equal(found[n], tensors[prefix + n]) for n in found)


def with_head(folder, model, seed):
    torch.manual_seed(seed)
    module = MTPModule(ModelConfig.from_folder(model))
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, 0.2)
    folder.mkdir(exist_ok=True)
    save_file(module.weights(), folder / "mtp.safetensors")
    return folder


def test_another_model_s_tensors_are_not_loaded(tmp_path):
    model = save_tiny(tmp_path / "model")
    other = save_tiny(tmp_path / "other", num_hidden_layers=3)
    with following("collective", tmp_path, model) as (learner, engine):
        learner.publisher.publish(altered(other, 1), 1)
        with pytest.raises(UsageError, match="no place in the model"):  # as of files, which say it last
            engine.get(1)
        assert "no place in the model" in engine.events[-1]


def test_a_bucket_that_is_not_the_announced_one_is_refused():
    tensors = (WeightsTensor(name="w", dtype="float32", shape=(3,)),)
    manifest = WeightsManifest(group=1, version=5, bucket_bytes=1024, tensors=tensors)
    (bucket,) = buckets(tensors, 1024)

    def content(tensor):
        tensor.zero_()
        tensor.view(torch.float32)[:3] = torch.tensor([1.0, 2.0, 3.0])

    made = SimpleNamespace(device=torch.device("cpu"), broadcast=content)
    with pytest.raises(TransferFailed, match=f"bucket {bucket.number} .* version 5"):
        list(Incoming(made, manifest))


def test_names_are_taken_in_any_order_and_as_often_as_said():
    tensors = tuple(WeightsTensor(name=name, dtype="float32", shape=(300,)) for name in "abcd")
    manifest = WeightsManifest(group=1, version=5, bucket_bytes=2048, tensors=tensors)
    incoming = Incoming(None, manifest, ["a", "c", "a"])
    incoming._received = lambda bucket: torch.full((bucket.bytes,), bucket.number, dtype=torch.uint8)
    assert incoming.shapes == dict.fromkeys("abcd", (300,))
    first = incoming.take("a")
    incoming.take("c")
    assert torch.equal(incoming.take("a"), first)
    with pytest.raises(KeyError):
        incoming.take("a")
    assert sorted(name for name, _ in incoming) == ["b", "d"]


@pytest.mark.parametrize(
    ("address", "insecure", "said"),
    [
        ("127.0.0.1:1", False, "is not an address"),
        ("ipc:///tmp/x", False, "is not an address"),
        ("tcp://0.0.0.0:1", False, "can be reached by other machines"),
        ("tcp://10.0.0.1:1", True, ""),
        ("tcp://127.0.0.1:0", False, ""),
    ],
)
def test_where_broadcasts_may_listen(address, insecure, said):
    if not said:
        check_broadcasting(address, insecure)
        return
    with pytest.raises(UsageError, match=said):
        check_broadcasting(address, insecure)


def test_a_port_in_use_and_an_address_elsewhere_are_refused_in_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"weights\.address tcp://127\.0\.0\.1:{port} .* port 0"):
            Meeting(f"tcp://127.0.0.1:{port}")
    with pytest.raises(UsageError, match=r"203\.0\.113\.1:0 cannot be listened on"):
        Meeting("tcp://203.0.113.1:0")
    message = WeightsGroup(group=1, address=f"tcp://127.0.0.1:{port}", backend="gloo", size=2, seconds=0.5)
    with pytest.raises(TransferFailed, match=rf"weights\.address tcp://127\.0\.0\.1:{port} is not reached"):
        join(message, 1, torch.device("cpu"))


def test_members_that_do_not_come_are_not_waited_for_for_ever():
    meeting = Meeting("tcp://127.0.0.1:0")
    one, other = (
        WeightsGroup(group=number, address=meeting.address, backend="gloo", size=2 + number, seconds=0.5)
        for number in range(2)
    )
    began = time.monotonic()
    with pytest.raises(TransferFailed, match="2 processes did not come together"):
        meeting.lead(one, torch.device("cpu"))
    with pytest.raises(TransferFailed, match="3 processes did not come together"):
        join(other, 1, torch.device("cpu"))
    assert time.monotonic() - began < 10


def test_gpus_alone_and_each_its_own_make_a_group_of_nccl_s():
    assert backend_for(("cuda a", "cuda b", "cuda c")) == "nccl"
    assert backend_for(("cuda a", "cuda a")) == backend_for(("cpu", "cuda a")) == backend_for(("cpu", "cpu")) == "gloo"
    assert device_name(torch.device("cpu")) == "cpu"


def test_an_engine_that_asks_for_one_group_after_the_other_gets_none_for_a_while(tmp_path):
    model = save_tiny(tmp_path / "model")
    with following("collective", tmp_path, model) as (learner, _):
        answers = []
        learner.answer = answers.append
        for _ in range(5):
            learner.ask(WeightsJoin(devices=("cpu",)))
        closed = [answer for answer in answers if isinstance(answer, WeightsClosed)]
        assert closed and all("have not ended yet" in answer.reason for answer in closed)


def test_an_engine_that_never_joins_its_group_keeps_no_other_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_routes, "SECONDS", 4.0)
    model = save_tiny(tmp_path / "model")
    with following("collective", tmp_path, model) as (learner, engine):
        learner.answer, heard = (lambda message: None), learner.answer
        learner.broadcaster.handle(b"another peer", WeightsJoin(devices=("cpu",)))
        time.sleep(0.2)
        learner.answer = heard
        learner.connections += 1
        began = time.monotonic()
        engine.engine._follow_weights()
        engine.ready()
        learner.publisher.publish(altered(model, 1), 1)
        engine.get(1)
        assert time.monotonic() - began < 3.0 and not [line for line in engine.events if "files" in line]


def test_a_learner_without_broadcasts_is_named_once_and_not_asked():
    events, generator = [], SimpleNamespace(version=0, receiving=lambda: pytest.fail("it asks"))
    live = LiveWeights(lambda message: True, lambda: False, lambda: 1, 1.0, events.append)
    assert not live.follow(generator, 3) and not live.follow(generator, 3) and live.follow(generator, 0)
    assert events == [events[0]] and '"files"' in events[0]


def test_a_generator_that_dies_while_it_receives_is_begun_again(tmp_path):
    model = save_tiny(tmp_path / "model")
    with following("collective", tmp_path, model) as (learner, engine):

        def die(manifest):
            raise GeneratorLost("it has died")

        engine.generator.receive_weights = die
        learner.publisher.publish(altered(model, 1), 1)
        engine.engine.wanted_version = 1
        with pytest.raises(GeneratorLost):
            engine.until(lambda: False)
        engine.engine._begin_again(GeneratorLost("it has died"))
        assert engine.engine.generator is None and not engine.engine._torn


def test_threads_of_broadcasts_end_with_their_engines(tmp_path):
    def broadcasting():
        return [thread for thread in threading.enumerate() if thread.name == "broadcast" and thread.is_alive()]

    model, before = save_tiny(tmp_path / "model"), len(broadcasting())
    with following("collective", tmp_path, model) as (learner, _):
        learner.broadcaster.gone(b"peer 1")
        deadline = time.monotonic() + 5
        while len(broadcasting()) > before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_options_of_a_transfer_may_change_when_a_run_is_resumed():
    from pipeline.config.check import changed_keys

    plain = load_config(None, [])
    other = load_config(None, ["weights.transfer=collective", "weights.address=tcp://127.0.0.1:7", "weights.keep=4"])
    assert plain.weights.transfer == "files" and not changed_keys(plain, other)
