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

STYLES = {TokenOrigin.SAMPLED: "", TokenOrigin.ACCEPTED: "bold green", TokenOrigin.BONUS: "cyan"}


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
    _print(finished[0], tokenizer)
    return 0


def _print(sample: FinishedSample, tokenizer: Tokenizer) -> None:
    """Accepted drafts are green on a terminal and stand in ‹ › elsewhere."""
    console = Console(highlight=False, soft_wrap=True)
    origins = sample.origins if sample.origins is not None else np.zeros(len(sample.token_ids), np.uint8)
    text = Text()
    for begin, end in _stretches(origins):
        piece = tokenizer.decode(sample.token_ids[begin:end].tolist())
        origin = TokenOrigin(int(origins[begin]))
        marked = origin is TokenOrigin.ACCEPTED and not console.is_terminal
        text.append(f"‹{piece}›" if marked else piece, style=STYLES[origin])
    console.print(text)
    drafts = ", ".join(
        f"{name}: {counts.drafted} drafted, {counts.accepted} accepted" for name, counts in sample.drafters.items()
    )
    console.print(
        f"{len(sample.token_ids)} tokens in {sample.verifications} verifications "
        f"({len(sample.token_ids) / max(1, sample.verifications):.2f} each); {drafts or 'nothing drafted'}; "
        f"log-prob {float(sample.logprobs.sum()):.2f} nats; ended by {sample.finish_reason}"
    )


def _stretches(origins: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of runs of equal origin."""
    borders = [0, *(np.flatnonzero(np.diff(origins)) + 1).tolist(), len(origins)]
    return [(a, b) for a, b in itertools.pairwise(borders) if b > a]
