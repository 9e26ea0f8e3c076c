"""What the suite generates with in this process; `vllm` has its checks in a module of their own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from drafters.base import Drafter
from pipeline.engine.generator import FinishedSample, Generator, GroupRequest
from pipeline.engine.native.generator import NativeGenerator


def ignore(event: str) -> None:
    """For drafters that are switched off on purpose."""


class MakeGenerator(Protocol):
    def __call__(
        self,
        folder: Path,
        drafter: Drafter | None,
        *,
        max_draft_tokens: int = 3,
        verification: str = "standard",
        on_event: Callable[[str], None] = ignore,
    ) -> Generator:
        """A generator on the float32 checkpoint in `folder`, for many short responses at once. The model's end of text
        does not end them unless a request says so; `on_event` hears when the drafter is switched off."""


def native(
    folder: Path,
    drafter: Drafter | None,
    *,
    max_draft_tokens: int = 3,
    verification: str = "standard",
    on_event: Callable[[str], None] = ignore,
) -> Generator:
    return NativeGenerator(
        folder, drafter=drafter, max_sequences=128, max_draft_tokens=max_draft_tokens, stop_token_ids=(),
        dtype="float32", device="cpu", verification=verification, on_event=on_event,
    )  # fmt: skip


GENERATORS: dict[str, MakeGenerator] = {"native": native}


def generate(generator: Generator, requests: Sequence[GroupRequest]) -> list[FinishedSample]:
    """All samples, by group and index."""
    for request in requests:
        generator.add(request)
    samples = []
    while generator.has_work():
        samples += generator.step()
    return sorted(samples, key=lambda sample: (sample.group, sample.sample))
