"""An engine process that does nothing but follow weights, with the real link, main loop and native generator.

    python -m tests.integration.receiving_engine ADDRESS SPOOL WEIGHTS SECONDS

Prints a line of JSON for every version loaded: its number, the generator's weights as one checksum, and what was said
since the line before.
"""

import hashlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec

from benchmarks.synthetic import make_link
from pipeline.config import load_config
from pipeline.engine.link import Drained, VersionHint
from pipeline.engine.live_weights import LiveWeights
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.service import Engine
from pipeline.models.decoder import Decoder
from pipeline.weights import FilesystemFollower, WeightsError


def checksum(decoder: Decoder) -> str:
    """Of all weights, as they are computed with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.tensors().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def first(follower: FilesystemFollower) -> NativeGenerator:
    deadline = time.monotonic() + 20.0
    while True:
        try:
            folder, publication = follower.fetch(follower.newest())
            return NativeGenerator(folder, dtype="float32", device="cpu", version=publication.version)
        except WeightsError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def main(address: str, spool: Path, weights: Path, seconds: float) -> None:
    said: list[str] = []
    link = make_link(address, spool, on_event=said.append, on_weights=lambda message: live.receive(message))
    live = LiveWeights(link.ask_for_weights, lambda: link.broadcasts, lambda: link.connections, seconds, said.append)
    follower = FilesystemFollower(weights)
    engine = Engine(
        load_config(None, []), link, follower, [], None, said.append, lambda: None,  # type: ignore[arg-type]
        SimpleNamespace(enter=lambda state: None), live,  # type: ignore[arg-type]
    )  # fmt: skip
    engine.generator = generator = first(follower)
    link.start()
    told, ended = -1, False
    while not ended:
        for event in link.poll(0.01):
            if isinstance(event, VersionHint):
                engine.wanted_version = max(engine.wanted_version, event.version)
            ended = ended or isinstance(event, Drained)
        engine._follow_weights()
        link.update((), 0, generator.version, 0, 0.0)
        if generator.version != told or any("weights come over" in line for line in said):
            told = generator.version
            line = {"version": told, "checksum": checksum(generator.decoder), "said": list(said)}
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
            sys.stdout.flush()
            said.clear()
    link.leave(())
    link.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
