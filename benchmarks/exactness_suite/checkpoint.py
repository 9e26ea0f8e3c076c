"""The drafter on a checkpoint of the user's: first tokens of one prompt, and what is recorded of longer responses."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.exactness_suite.generators import generate
from benchmarks.exactness_suite.model import FreshForward
from benchmarks.exactness_suite.rollouts import GROUP, LOGPROB_BOUND, recorded_errors
from pipeline.engine.generator import FinishedSample, Generator, GroupRequest
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.sampling.exactness import Check, bound_check, chi_square_check, processed_law

PROMPT = (4, 7, 4, 7, 5, 4, 7, 4, 7)
"""repeats itself, so that drafters which copy have something to copy"""
FIRST, LONG = 3, 24
"""tokens of the responses that are counted, and of those whose log-probs are compared"""


def checkpoint_checks(
    start: Callable[[Callable[[str], None]], Generator], name: str, folder: Path, samples: int, recorded: int, seed: int
) -> Iterator[Check]:
    """
    Args:
        start: a generator on the checkpoint with the drafter, which tells its argument when that is switched off.
        name: of the drafter.
        folder: the checkpoint.
        samples: responses behind the counts.
        recorded: responses whose log-probs are compared with a fresh forward.
        seed: of the first response.

    Raises:
        UsageError: a vocabulary that does not have the prompt; before anything is counted: a drafter that does not fit.
    """
    events: list[str] = []
    generator = start(events.append)
    try:
        model, params = FreshForward(folder), SamplingParams(max_new_tokens=FIRST)
        if model.vocabulary <= max(PROMPT):
            raise UsageError(f"--model {folder} has {model.vocabulary} tokens; the suite needs {max(PROMPT) + 1}")
        seeds = range(seed, seed + samples)
        asked = [request(i, params, tuple(seeds[at : at + GROUP])) for i, at in enumerate(range(0, samples, GROUP))]
        long = msgspec.structs.replace(params, max_new_tokens=LONG)
        found = generate(generator, [*asked, request(len(asked), long, tuple(range(recorded)))])
        yield from _counted(f"{name} on {folder.name}", [s for s in found if s.group < len(asked)], model, params)
        errors = [recorded_errors(s, params, model, PROMPT) for s in found if s.group == len(asked)]
        worst = max(float(error.max()) for error in errors)
        drafted = sum(counts.drafted for sample in found for counts in sample.drafters.values())
        accepted = sum(counts.accepted for sample in found for counts in sample.drafters.values())
        yield bound_check(
            f"{name} on {folder.name}, recorded log-probs", worst, LOGPROB_BOUND, sum(map(len, errors)),
            f"in nats; {accepted} of {drafted} draft tokens accepted",
        )  # fmt: skip
        yield bound_check(f"{name} on {folder.name}, never switched off", len(events), 1, detail="; ".join(events))
    finally:
        generator.close()


def request(id: int, params: SamplingParams, seeds: tuple[int, ...]) -> GroupRequest:
    return GroupRequest(id, np.array(PROMPT, np.int64), params, seeds)


def _counted(name: str, samples: list[FinishedSample], model: FreshForward, params: SamplingParams) -> Iterator[Check]:
    """First tokens, then the tokens after the most frequent first one."""
    first = np.array([sample.token_ids[0] for sample in samples], np.int64)
    yield chi_square_check(f"first token, {name}", first, _law(model, params, ()))
    most = int(np.bincount(first).argmax())
    second = np.array([sample.token_ids[1] for sample in samples if sample.token_ids[0] == most], np.int64)
    yield chi_square_check(f"token after {most}, {name}", second, _law(model, params, (most,)))


def _law(model: FreshForward, params: SamplingParams, response: tuple[int, ...]) -> np.ndarray:
    logits = model.logits([[*PROMPT, *response]])[0, -1]
    return processed_law(logits, params, PROMPT, response, ())
