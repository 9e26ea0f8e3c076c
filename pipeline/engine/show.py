"""`rollahead generate`: one response, with the tokens a drafter guessed right marked."""

import itertools
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from drafters.registry import build
from pipeline.engine.generator import FinishedSample, GroupRequest, TokenOrigin
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import Tokenizer

COLOURS = ("green", "yellow", "magenta", "blue", "red")
"""of the drafters, in the order in which each had a first draft"""
BONUS = "cyan"


def generate(folder: Path, prompt: str, *, drafter: str, max_new_tokens: int, temperature: float, seed: int) -> int:
    """Sample once from the checkpoint in `folder` and print the response; returns the exit code."""
    tokenizer = Tokenizer(folder)
    prompt_ids = tokenizer.encode(prompt)
    limit = ModelConfig.from_folder(folder).max_positions
    if max_new_tokens < 1 or len(prompt_ids) + max_new_tokens > limit:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens} with a prompt of {len(prompt_ids)} tokens must be at least 1 and "
            f"stay within the model's {limit} positions"
        )
    if temperature < 0:
        raise UsageError(f"--temperature {temperature} is negative; use 0 (greedy) or more")
    generator = NativeGenerator(
        folder, drafter=build({"name": drafter}), max_sequences=1, max_length=len(prompt_ids) + max_new_tokens
    )
    sampling = SamplingParams(
        temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=tuple(tokenizer.eos_token_ids)
    )
    generator.add(GroupRequest(0, np.asarray(prompt_ids, np.int64), sampling, (seed,)))
    finished: list[FinishedSample] = []
    while generator.has_work():
        finished += generator.step()
    _print(finished[0], tokenizer, generator.drafter_counters())
    return 0


def _print(sample: FinishedSample, tokenizer: Tokenizer, counters: dict[str, float]) -> None:
    """Accepted drafts have their drafter's colour on a terminal and stand in ‹ › elsewhere, with its number where there
    are several."""
    console = Console(highlight=False, soft_wrap=True)
    nothing = np.zeros(len(sample.token_ids), np.uint8)
    origins = sample.origins if sample.origins is not None else nothing
    sources = sample.draft_sources if sample.draft_sources is not None else nothing
    several = len(sample.drafters) > 1
    text = Text()
    for begin, end in _stretches(origins.astype(np.int64) * 256 + sources):
        piece = tokenizer.decode(sample.token_ids[begin:end].tolist())
        source = int(sources[begin])
        if not source:
            text.append(piece, style=BONUS if origins[begin] == TokenOrigin.BONUS else "")
        elif console.is_terminal:
            text.append(piece, style=_colour(source))
        else:
            text.append(f"‹{source}:{piece}›" if several else f"‹{piece}›")
    console.print(text)
    drafts = Text(", ").join(
        Text(f"{number}: {name}" if several else name, style=_colour(number)).append(
            f" {counts.drafted} drafted, {counts.accepted} accepted", style=""
        )
        for number, (name, counts) in enumerate(sample.drafters.items(), 1)
    )
    console.print(
        Text.assemble(
            f"{len(sample.token_ids)} tokens in {sample.verifications} verifications "
            f"({len(sample.token_ids) / max(1, sample.verifications):.2f} each); ",
            drafts if sample.drafters else "nothing drafted",
            f"; log-prob {float(sample.logprobs.sum()):.2f} nats; ended by {sample.finish_reason}",
        )
    )
    if counters:
        console.print("; ".join(f"{name} {value:,.6g}" for name, value in counters.items()))


def _colour(number: int) -> str:
    return f"bold {COLOURS[(number - 1) % len(COLOURS)]}"


def _stretches(origins: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of runs of equal entries."""
    borders = [0, *(np.flatnonzero(np.diff(origins)) + 1).tolist(), len(origins)]
    return [(a, b) for a, b in itertools.pairwise(borders) if b > a]
