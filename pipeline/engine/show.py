"""`rollahead generate`: one response, with the tokens a drafter guessed right marked."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.text import Text

from drafters.base import check_policy
from drafters.registry import written
from pipeline.engine.generator import FinishedSample, GroupRequest, TokenOrigin
from pipeline.engine.native.compression import KVCompression
from pipeline.engine.native.eviction import build as build_policy
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.native.switching import parse_rule
from pipeline.errors import UsageError, check_text, complaint
from pipeline.messages import Sampler, SamplingParams
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import Tokenizer
from pipeline.sampling.processors import check_temperature

COLOURS = ("green", "yellow", "magenta", "blue", "red")
"""of the drafters, in the order in which each had a first draft"""
BONUS = "cyan"


def generate(
    folder: Path,
    prompt: str,
    *,
    drafter: str,
    sampling: Mapping[str, Any],
    seed: int,
    samples: int = 1,
    small_model: Path | None = None,
    threshold: float | None = None,
    rule: str | None = None,
    kv_compression: tuple[str | None, int | None, int | None] = (None, None, None),
) -> int:
    """Sample from the checkpoint in `folder` and print the responses; returns the exit code.

    Args:
        sampling: fields of `SamplingParams`, those that are not None; other keys are not read.
        seed: of the first response; the others have the seeds that follow.
        small_model: checkpoint that samples where entropy is low.
        threshold: nats, of the rolling mean that is low; None: 0.1.
        rule: window and least run, as `parse_rule` reads it; None: 5:10.
        kv_compression: policy (None: none), budget (None: 512) and tokens between two compressions (None: 128).
    """
    if small_model is None:
        _refuse_given("--small-model DIR", {"--threshold": threshold, "--rule": rule})
    check_text(prompt, "--prompt")
    tokenizer = Tokenizer(folder)
    params = sampling_params(sampling, tokenizer.eos_token_ids)
    max_new_tokens = params.max_new_tokens
    prompt_ids = tokenizer.encode(prompt)
    limit = ModelConfig.from_folder(folder).max_positions
    if len(prompt_ids) + max_new_tokens > limit:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens} with a prompt of {len(prompt_ids)} tokens must "
            f"stay within the model's {limit} positions"
        )
    if samples < 1:
        raise UsageError(f"--samples {samples} must be at least 1")
    if not -(2**63) <= seed <= 2**63 - samples:
        raise UsageError(f"--seed {seed} with {samples} samples is outside 64 bits; use a smaller number")
    check_temperature("--temperature", params.temperature)
    asked = written(drafter)
    check_policy(asked, folder, brings_head=True)  # a head that is not named is looked for in the folder
    generator = NativeGenerator(
        folder,
        drafter=asked,
        kv_compression=_compression(*kv_compression),
        max_sequences=min(samples, 64),
        max_length=len(prompt_ids) + max_new_tokens,
        small_model=small_model,
        switching=parse_rule(rule or "5:10", 0.1 if threshold is None else threshold) if small_model else None,
    )
    seeds = tuple(range(seed, seed + samples))
    generator.add(GroupRequest(0, np.asarray(prompt_ids, np.int64), params, seeds))
    finished: list[FinishedSample] = []
    while generator.has_work():
        finished += generator.step()
    for sample in sorted(finished, key=lambda sample: sample.sample):
        _print(sample, tokenizer)
    if kv_compression[0]:
        tokens = sum(int((s.samplers == Sampler.COMPRESSED_KV).sum()) for s in finished)
        print(
            f"{generator.stats().compressions} compressions by {kv_compression[0]}; {tokens} tokens sampled from a "
            f"compressed cache; {generator.kv_bytes:,} bytes of keys and values at the most"
        )
    if counters := generator.drafter_counters():
        print("; ".join(f"{name} {value:,.6g}" for name, value in counters.items()))
    return 0


def _refuse_given(needed: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} {value} without {needed} does nothing; give both, or leave it out")


def _compression(policy: str | None, budget: int | None, every: int | None) -> KVCompression | None:
    if policy is None:
        _refuse_given("--kv-compression POLICY", {"--kv-budget": budget, "--kv-every": every})
        return None
    budget, every = 512 if budget is None else budget, 128 if every is None else every
    if min(budget, every) < 1:
        raise UsageError(f"--kv-budget {budget} and --kv-every {every} must be at least 1")
    return KVCompression(build_policy({"name": policy}), budget, every)


def sampling_params(options: Mapping[str, Any], eos_token_ids: Sequence[int]) -> SamplingParams:
    """Sampling parameters from command-line options by field name; the model's end-of-text ids stop a response too.

    Raises:
        UsageError: an option that cannot be used.
    """
    given = {key: options[key] for key in SamplingParams.__struct_fields__ if options.get(key) is not None}
    given["stop_token_ids"] = [*dict.fromkeys([*eos_token_ids, *given.get("stop_token_ids", ())])]
    given["logit_bias"] = [_bias(text) for text in given.get("logit_bias", ())]
    try:
        return msgspec.convert(given, SamplingParams)
    except msgspec.ValidationError as error:
        key, what = complaint(str(error))
        name = key.partition("[")[0]
        value = options.get(name)
        if isinstance(value, list) and (index := re.match(r"\[(\d+)\]", key.removeprefix(name))):
            value = value[int(index[1])] if int(index[1]) < len(value) else value
        raise UsageError(f"--{name.replace('_', '-')} {value} is not valid: {what}") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UsageError(f"--logit-bias {text} is not ID=X; write for example 13=-2.5") from None


def _print(sample: FinishedSample, tokenizer: Tokenizer) -> None:
    """Accepted drafts have their drafter's colour on a terminal and stand in ‹ › elsewhere, with its number where there
    are several. What a small model sampled is underlined on a terminal and stands in ⟨ ⟩ elsewhere."""
    console = Console(highlight=False, soft_wrap=True)
    nothing = np.zeros(len(sample.token_ids), np.uint8)
    origins = sample.origins if sample.origins is not None else nothing
    sources = sample.draft_sources if sample.draft_sources is not None else nothing
    several = len(sample.drafters) > 1
    text = Text()
    small = sample.samplers == Sampler.SWITCHED_MODEL
    for begin, end in _stretches((origins.astype(np.int64) * 2 + small) * 256 + sources):
        piece = tokenizer.decode(sample.token_ids[begin:end].tolist())
        source = int(sources[begin])
        if small[begin]:
            text.append(piece if console.is_terminal else f"⟨{piece}⟩", style="underline")
        elif not source:
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
            f"; the small model sampled {int(small.sum())} tokens" if small.any() else "",
            f"; log-prob {float(sample.logprobs.sum()):.2f} nats; ended by {sample.finish_reason}",
        )
    )


def _colour(number: int) -> str:
    return f"bold {COLOURS[(number - 1) % len(COLOURS)]}"


def _stretches(origins: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of runs of equal entries."""
    borders = [0, *(np.flatnonzero(np.diff(origins)) + 1).tolist(), len(origins)]
    return [(a, b) for a, b in itertools.pairwise(borders) if b > a]
