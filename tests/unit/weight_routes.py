"""The ways in which a publication reaches a generator, each between a publisher and an engine's main loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.config import load_config
from pipeline.engine.live_weights import LiveWeights
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.service import Engine
from pipeline.messages import WeightsJoin, WeightsRequest, WeightsWanted
from pipeline.weights import FilesystemFollower, FilesystemPublisher, StreamFollower, WeightsServer
from pipeline.weights.group import Meeting
from pipeline.weights.sending import WeightsBroadcaster

ROUTES = ("filesystem", "stream", "collective")
SECONDS = 3.0


def altered(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with other numbers."""
    generator = torch.Generator().manual_seed(seed)
    found = load_file(folder / "model.safetensors")
    return {name: t + 0.1 * torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in found.items()}


class Learner:
    """Publishes, and answers an engine; a peer's connection has a number that tests may raise."""

    def __init__(self, root: Path, model: Path, bucket_bytes: int, device: str = "cpu") -> None:
        self.events: list[str] = []
        self.publisher = FilesystemPublisher(root, 2, model)
        self.server = WeightsServer(root)
        self.broadcaster = WeightsBroadcaster(
            root, Meeting("tcp://127.0.0.1:0"), torch.device(device), SECONDS, self.events.append, bucket_bytes
        )
        self.answer: Callable[[Any], None] = lambda message: None
        self.connections = 1
        self.asked: list[Any] = []

    def start(self) -> None:
        self.server.start(lambda peer, message: self.answer(message), lambda peer: 0)
        self.broadcaster.start(lambda peer, message: self.answer(message))

    def ask(self, message: Any) -> bool:
        self.asked.append(message)
        peer = f"peer {self.connections}".encode()
        if isinstance(message, WeightsRequest):
            self.server.request(peer, message)
        else:
            assert isinstance(message, (WeightsJoin, WeightsWanted))
            self.broadcaster.handle(peer, message)
        return True

    def stop(self) -> None:
        self.server.stop()
        self.broadcaster.stop()


class Following:
    """An engine's main loop, as far as weights go, around a native generator that has the first version."""

    def __init__(self, route: str, folder: Path, learner: Learner, generator: NativeGenerator) -> None:
        self.events: list[str] = []
        self.learner, self.generator = learner, generator
        follower: Any = FilesystemFollower(learner.publisher.root)
        if route == "stream":
            follower = StreamFollower(folder / "received", learner.ask, self.events.append)
            learner.answer = follower.receive
        self.follower = follower
        self.live: LiveWeights | None = None
        if route == "collective":
            self.live = LiveWeights(
                learner.ask, lambda: True, lambda: learner.connections, SECONDS, self.events.append
            )  # fmt: skip
            learner.answer = self.live.receive
        link, observer = SimpleNamespace(run=""), SimpleNamespace(enter=lambda state: None)
        self.engine = Engine(
            load_config(None, []), link, follower, [], None, self.events.append, lambda: None, observer, self.live
        )  # type: ignore[arg-type]
        self.engine.generator = generator

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.events, self.learner.events)
            self.engine._follow_weights()
            time.sleep(0.002)

    def get(self, version: int) -> None:
        """Have it loaded."""
        self.engine.wanted_version = version
        self.until(lambda: self.generator.version >= version)

    def ready(self) -> None:
        """As an engine that has been there for a while."""
        if self.live is not None:
            self.until(lambda: self.live._group is not None)  # type: ignore[union-attr]

    def close(self) -> None:
        self.generator.close()
        if isinstance(self.follower, StreamFollower):
            self.follower.close()


@contextmanager
def following(
    route: str, folder: Path, model: Path, bucket_bytes: int = 4096, **options: Any
) -> Iterator[tuple[Learner, Following]]:
    """A learner that has published the model as version 0, and an engine that has loaded it."""
    learner = Learner(folder / "weights", model, bucket_bytes)
    learner.start()
    learner.publisher.publish(load_file(model / "model.safetensors"), 0)
    options = {"max_sequences": 4, "max_draft_tokens": 2, "device": "cpu"} | options
    generator = NativeGenerator(folder / "weights" / "v0", version=0, **options)
    engine = Following(route, folder, learner, generator)
    try:
        engine.ready()
        yield learner, engine
    finally:
        engine.close()
        learner.stop()
