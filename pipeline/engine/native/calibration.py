"""The threshold of model switching at which the policy samples a wanted share of the tokens, found by generating."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.config.types import Config
from pipeline.engine.generator import FinishedSample, GroupRequest, Stopped
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import Sampler
from pipeline.models.chat import chat_template
from pipeline.models.tokenizer import Tokenizer
from pipeline.tasks import load_task
from pipeline.tasks.jsonl import Chat, read_examples
from pipeline.tasks.prompts import PromptOrder, check_prompts, rollout_sampling, sample_seed

TRIES = 7
"""Thresholds that are tried; each halves what is left of the range."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold and what it gave."""

    threshold: float
    """nats"""
    share: float
    """of the tokens that the policy sampled"""


def calibrate(
    generator: NativeGenerator, requests: Items[GroupRequest], share: float, goes_on: Callable[[], bool] = lambda: True
) -> Calibration:
    """Bisects over quantiles of the rolling mean of the two models' entropies, each tried on all requests with the same
    seeds; the try whose share is nearest wins. The generator's rule has that threshold from then on.

    Args:
        generator: with a small model, and nothing to do.
        requests: of prompts other than those that are to be generated later, so that the share is no memory of them.
        share: wanted share of tokens that the policy samples, in (0, 1).
        goes_on: asked before every step.

    Raises:
        Stopped: it does not go on.
        UsageError: a share outside that range, no request, or a generator without a small model or without entropies.
    """
    small = generator.small
    if small is None or not generator.capabilities.entropy or not requests or not 0 < share < 1:
        raise UsageError(
            f"calibrating to a policy share of {share} needs a share between 0 and 1, prompts, and a generator with "
            "engine.switching.small_model that records entropies"
        )
    rule = small.rule
    samples: list[FinishedSample] = []
    for extreme in (float("-inf"), float("inf")):  # what either model's entropies are like
        small.rule = replace(rule, threshold=extreme)
        samples += _generate(generator, requests, goes_on)
    means = np.sort(np.concatenate([rolling_mean(s.entropies, rule.window) for s in samples]))
    tried: list[Calibration] = []
    low, high = 0.0, 1.0
    for _ in range(TRIES):
        middle = (low + high) / 2
        threshold = float(means[min(int(middle * len(means)), len(means) - 1)])
        small.rule = replace(rule, threshold=threshold)
        tried.append(Calibration(threshold, policy_share(_generate(generator, requests, goes_on))))
        low, high = (middle, high) if tried[-1].share > share else (low, middle)
    best = min(tried, key=lambda c: abs(c.share - share))
    small.rule = replace(rule, threshold=best.threshold)
    return best


def rolling_mean(entropies: np.ndarray | None, window: int) -> np.ndarray:
    """float64 [T], means over the last `window` of the T entropies so far, fewer at the start."""
    if entropies is None:
        return np.zeros(0)
    sums = np.concatenate([[0.0], np.cumsum(entropies, dtype=np.float64)])
    end = np.arange(1, len(sums))
    begin = np.maximum(0, end - window)
    return (sums[end] - sums[begin]) / (end - begin)


def policy_share(samples: Items[FinishedSample]) -> float:
    """Share of all tokens that the policy sampled."""
    samplers = np.concatenate([sample.samplers for sample in samples])
    return float((samplers == Sampler.POLICY).mean())


def _generate(
    generator: NativeGenerator, requests: Items[GroupRequest], goes_on: Callable[[], bool]
) -> list[FinishedSample]:
    for request in requests:
        generator.add(request)
    done: list[FinishedSample] = []
    while generator.has_work():
        if not goes_on():
            raise Stopped
        done += generator.step()
    return done


def calibrate_for_run(
    generator: NativeGenerator,
    config: Config,
    folder: Path,
    log: Callable[[str], None],
    goes_on: Callable[[], bool] = lambda: True,
) -> None:
    """As `engine.switching` asks for.

    Raises:
        Stopped: as `calibrate`.
        UsageError: as `calibrate`, or the task cannot be loaded.
    """
    switching, tokenizer = config.engine.switching, Tokenizer(folder)
    if generator.small is not None:
        generator.small.load_weights(folder)  # of a run that goes on: it may have been distilled
    sampling = rollout_sampling(config.sampling, tokenizer.eos_token_ids)
    requests = []
    for number, text in enumerate(_prompts(config, tokenizer, chat_template(folder))):
        seed = sample_seed(config.run.seed + 1, 0, number, 0)
        requests.append(GroupRequest(number, np.array(tokenizer.encode(text), np.int64), sampling, (seed,)))
    log(
        f"switching: looking for the threshold at which the policy samples {switching.policy_share:.1%} of the tokens: "
        f"{len(requests)} prompts, {TRIES + 2} times"
    )
    found = calibrate(generator, requests, switching.policy_share, goes_on)
    log(
        f"switching: at a threshold of {found.threshold:.4g} nats the policy samples {found.share:.1%} of the tokens "
        f"after {len(requests)} prompts (engine.switching.policy_share = {switching.policy_share:g})"
    )


def check_calibration(config: Config) -> None:
    """Refuse a file of calibration prompts that cannot be used, before a model is loaded.

    Raises:
        UsageError: a sentence that names the option, and file or line.
    """
    switching, folder = config.engine.switching, config.model.path
    if switching.small_model and switching.policy_share and switching.calibration_path:
        _prompts_of_file(config, Tokenizer(folder), chat_template(folder))


def _prompts_of_file(config: Config, tokenizer: Tokenizer, chat: Chat) -> list[str]:
    path, longest = config.engine.switching.calibration_path, config.sampling.max_prompt_tokens
    try:
        examples = read_examples(Path(path), config.task, chat)
    except UsageError as error:
        raise UsageError(f"engine.switching.calibration_path: {error}") from error
    fitting = [e.prompt for e in examples if len(tokenizer.encode(e.prompt)) <= longest]
    if not fitting:
        raise UsageError(
            f"engine.switching.calibration_path {path!r} has no prompt within sampling.max_prompt_tokens = {longest} "
            "tokens; raise that, or give a file of shorter prompts"
        )
    return fitting[: config.engine.switching.calibration_prompts]


def _prompts(config: Config, tokenizer: Tokenizer, chat: Chat) -> list[str]:
    """Of the file that is named; else training prompts in the order of another seed than the run's."""
    switching, section = config.engine.switching, config.task
    if switching.calibration_path:
        return _prompts_of_file(config, tokenizer, chat)
    task = load_task(section, config.run.seed, chat)
    usable = check_prompts(task, tokenizer.encode, config.sampling.max_prompt_tokens, section.long_prompts)
    order = PromptOrder(len(usable), config.run.seed + 1)
    return [
        task.train[usable[order(number)[1]]].prompt for number in range(min(switching.calibration_prompts, len(usable)))
    ]
