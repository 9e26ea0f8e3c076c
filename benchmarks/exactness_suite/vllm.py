"""The installed vLLM: its rejection sampler as it comes and corrected, and whole responses through its engine."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.exactness_suite.drafters import Guessing
from benchmarks.exactness_suite.fitting import Piece, fitted
from benchmarks.exactness_suite.generators import generate
from benchmarks.exactness_suite.model import STOP, FreshForward, random_checkpoint
from benchmarks.exactness_suite.rollouts import (
    LOGPROB_BOUND,
    PROMPT,
    VOCABULARY,
    JointLaw,
    joint_checks,
    recorded_errors,
    requests,
)
from benchmarks.exactness_suite.scale import Scale
from benchmarks.exactness_suite.settings import chosen
from pipeline.engine.generator import FinishedSample, GroupRequest
from pipeline.engine.vllm import rejection
from pipeline.engine.vllm.generator import VllmGenerator
from pipeline.engine.vllm.install import installed_version
from pipeline.engine.vllm.sampling import refusal
from pipeline.errors import RunFailed
from pipeline.messages import SamplingParams
from pipeline.sampling.exactness import Check, bound_check

HEAD = 32
"""width of an attention head: the smallest that vLLM computes on a CPU"""
TOKENS = 24


class ConstantToken(Guessing):
    """Always token 0."""

    def __init__(self) -> None:
        super().__init__("constant token", lambda start, emitted, budget: [0] * budget)


class RandomTokens(Guessing):
    """Any token, by the text so far."""

    def __init__(self) -> None:
        super().__init__(
            "random tokens",
            lambda start, emitted, budget: [
                (start.seed + 7 * len(emitted) + 5 * k) % VOCABULARY for k in range(budget)
            ],
        )


def settings(vocabulary: int, every: bool) -> dict[str, SamplingParams]:
    """Those that vLLM has together with drafting; of all at once, what it has of them."""
    found = {}
    for name, params in chosen(vocabulary, every).items():
        if name == "everything":
            params = msgspec.structs.replace(params, min_p=0.0, logit_bias=())
        if refusal(params, speculating=True) is None:
            found[name] = params
    return found


def vllm_checks(piece: Piece, name: str, scale: Scale, seed: int, folder: Path) -> Iterator[Check]:
    """Everything, with the drafter of `piece`, called `name`; `folder` is an empty one for checkpoints."""
    yield from sampler_checks(scale.draws)
    tiny = random_checkpoint(folder / "tiny", VOCABULARY, sharpness=0.6, seed=seed, head_dim=HEAD)
    law = JointLaw(tiny)
    chosen = settings(VOCABULARY, scale.every_rule)
    yield from rollout_checks(fitted(piece, tiny), name, tiny, law, chosen, scale, seed)
    for hostile in (ConstantToken, RandomTokens):
        some = {"temperature 0.8": SamplingParams(temperature=0.8)}
        named = f"{__name__}:{hostile.__name__}"
        yield from rollout_checks({"name": named}, named, tiny, law, some, scale, seed + 1)


def sampler_checks(rows: int) -> Iterator[Check]:
    """vLLM's rejection sampler by itself, as it comes and corrected.

    Raises:
        RunFailed: the process that tests it failed.
    """
    found, tested = installed_version() or "", sampler_p_values(rows)
    if "stock" in tested:
        detail = ", ".join(f"{name}: p = {p:.2g}" for name, p in tested["stock"].items())
        least = min(tested["stock"].values())
        yield bound_check(f"vLLM {found} as it comes is seen to be wrong", least, rejection.CHECK_LEVEL, rows, detail)
    least = min(tested["wrong probabilities"].values())
    yield bound_check("drafts with wrong probabilities are seen to be wrong", least, rejection.CHECK_LEVEL, rows, "")
    for drafts in ("unlikely drafts", "missing drafts", "drawn drafts"):
        for name, p in tested[drafts].items():
            yield Check(f"rejection sampler, {drafts}, {name}", p > rejection.CHECK_LEVEL, p, None, rows)


def sampler_p_values(rows: int) -> dict[str, dict[str, float]]:
    """By what was tested, then by setting. In a process of its own: vLLM looks for kernels in everything imported, and
    stumbles over some of it."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.exactness_suite.vllm_sampler", str(rows)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RunFailed(f"vLLM's sampler could not be tested: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(folder: Path, drafter: str | Piece, **options: Any) -> VllmGenerator:
    """On a float32 checkpoint, for many short responses; the model's end of text does not end them."""
    piece = {"name": drafter} if isinstance(drafter, str) else drafter
    return VllmGenerator(
        folder, drafter=piece, options={"enforce_eager": True}, max_sequences=128, max_draft_tokens=3,
        max_length=64, dtype="float32", stop_token_ids=(), version=0, **options,
    )  # fmt: skip


def rollout_checks(
    piece: Piece,
    name: str,
    tiny: Path,
    law: JointLaw,
    chosen: Mapping[str, SamplingParams],
    scale: Scale,
    seed: int,
) -> list[Check]:
    """All settings in one batch, so that rows of different ones stand beside each other."""
    events: list[str] = []
    generator = make(tiny, piece, on_event=events.append)
    try:
        checks = list(settings_checks(generator, name, tiny, law, chosen, scale.rollouts, scale.recorded, seed))
        checks.append(bound_check(f"{name} was never switched off", len(events), 1, detail="; ".join(events)))
        return checks
    finally:
        generator.close()


def settings_checks(
    generator: VllmGenerator,
    drafter: str,
    tiny: Path,
    law: JointLaw,
    chosen: Mapping[str, SamplingParams],
    rollouts: int,
    recorded: int,
    seed: int,
) -> Iterator[Check]:
    """Joint law and recorded log-probs of every setting.

    Args:
        generator: on the checkpoint `tiny`, whose law is `law`.
        drafter: its drafter's name.
        chosen: settings by name.
        rollouts: responses behind each joint test.
        recorded: responses of each setting whose log-probs are compared with fresh forwards.
        seed: of the first response.
    """
    asked: list[GroupRequest] = []
    of: dict[int, str] = {}
    for name, params in chosen.items():
        params = msgspec.structs.replace(params, stop_token_ids=(STOP,) if params.min_new_tokens else ())
        long = GroupRequest(0, np.array(PROMPT, np.int64), msgspec.structs.replace(params, max_new_tokens=TOKENS), (1,))
        for request in (*requests(params, rollouts, seed), *[long] * recorded):
            of[len(asked)] = name
            asked.append(_numbered(request, len(asked)))
        seed += rollouts
    found = generate(generator, asked)
    by_setting: dict[str, list[FinishedSample]] = {name: [] for name in chosen}
    errors, drafted, accepted = [0.0], 0, 0
    model = FreshForward(tiny)
    for sample in found:
        params = asked[sample.group].sampling
        drafted += sum(counts.drafted for counts in sample.drafters.values())
        accepted += sum(counts.accepted for counts in sample.drafters.values())
        if params.max_new_tokens == TOKENS:
            errors += recorded_errors(sample, params, model).tolist()
        else:
            by_setting[of[sample.group]].append(sample)
    for name, samples in by_setting.items():
        params = next(r.sampling for r in asked if of[r.id] == name)
        yield from joint_checks(f"vllm, {drafter}, {name}", samples, law.joint(params))
    yield bound_check(f"vllm, {drafter}, recorded log-probs", max(errors), LOGPROB_BOUND, len(errors) - 1, "in nats")
    yield bound_check(
        f"vllm, {drafter}, drafts verified", 1 / max(1, drafted), 1.0, drafted, f"{accepted} of {drafted} accepted"
    )


def _numbered(request: GroupRequest, number: int) -> GroupRequest:
    return GroupRequest(number, request.prompt_ids, request.sampling, request.seeds)
