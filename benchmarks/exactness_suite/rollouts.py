"""Whole responses through a generator: their joint distribution, and what is recorded of every token."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.exactness_suite import drafters
from benchmarks.exactness_suite.generators import MakeGenerator, generate
from benchmarks.exactness_suite.model import STOP, FreshForward, random_checkpoint
from benchmarks.exactness_suite.scale import Scale
from benchmarks.exactness_suite.settings import chosen
from drafters.base import Drafter
from drafters.mtp.drafter import MTPDrafter
from drafters.registry import build as build_drafter
from pipeline.engine.generator import FinishedSample, GroupRequest, TokenOrigin
from pipeline.messages import SamplingParams
from pipeline.sampling.exactness import Check, bound_check, chi_square_check, processed_law

VOCABULARY, TOKENS, TESTED, GROUP = 12, 4, 3, 100
"""Responses of TOKENS tokens, the first TESTED of which are tested together."""
PROMPT = (4, 7, 4, 7, 4, 1)
LOGPROB_BOUND = 2e-4

Laws = dict[tuple[int, ...], np.ndarray]


class JointLaw:
    """Probability of every sequence of TESTED tokens after PROMPT, from forwards of every prefix alone."""

    def __init__(self, folder: Path) -> None:
        model = FreshForward(folder)
        self._logits: Laws = {}
        for n in range(TESTED):
            prefixes = list(itertools.product(range(VOCABULARY), repeat=n))
            rows = model.logits([[*PROMPT, *prefix] for prefix in prefixes])[:, -1]
            self._logits |= dict(zip(prefixes, rows, strict=True))

    def laws(self, params: SamplingParams) -> Laws:
        """Of the next token after each prefix."""
        return {
            prefix: processed_law(logits, params, PROMPT, prefix, params.stop_token_ids)
            for prefix, logits in self._logits.items()
        }

    def joint(self, params: SamplingParams) -> np.ndarray:
        """float64 [VOCABULARY ** TESTED]."""
        laws = self.laws(params)
        law = np.ones(1)
        for n in range(TESTED):
            rows = np.stack([laws[prefix] for prefix in itertools.product(range(VOCABULARY), repeat=n)])
            law = (law[:, None] * rows).ravel()
        return law


def joint_checks(name: str, samples: list[FinishedSample], law: np.ndarray) -> list[Check]:
    """The first token alone, where deviations are least diluted, and the first TESTED ones together.

    Args:
        law: `JointLaw.joint`.
    """
    tokens = np.array([sample.token_ids[:TESTED] for sample in samples], np.int64)
    cells = tokens @ (VOCABULARY ** np.arange(TESTED - 1, -1, -1))
    first = law.reshape(VOCABULARY, -1).sum(1)
    return [
        chi_square_check(f"first token, {name}", tokens[:, 0], first),
        chi_square_check(f"joint law of {TESTED} tokens, {name}", cells, law),
    ]


def requests(params: SamplingParams, samples: int, first_seed: int) -> list[GroupRequest]:
    """Groups of one prompt, with seeds of their own."""
    params = msgspec.structs.replace(params, max_new_tokens=TOKENS)
    seeds = range(first_seed, first_seed + samples)
    return [
        GroupRequest(i, np.array(PROMPT, np.int64), params, tuple(seeds[start : start + GROUP]))
        for i, start in enumerate(range(0, samples, GROUP))
    ]


def rollout_checks(
    make: MakeGenerator, build: Callable[[Path], Drafter], name: str, scale: Scale, seed: int, folder: Path
) -> Iterator[Check]:
    """Joint tests and recorded values.

    Args:
        make: the generator.
        build: the drafter that the suite was asked to test, for a checkpoint's folder; `name` is its name.
        folder: an empty folder for checkpoints.
    """
    tiny = random_checkpoint(folder / "tiny", VOCABULARY, sharpness=0.6, seed=seed)
    law = JointLaw(tiny)
    events: list[str] = []
    for setting, params in chosen(VOCABULARY, scale.every_rule).items():
        params = msgspec.structs.replace(params, stop_token_ids=(STOP,) if params.min_new_tokens else ())
        generator = make(tiny, build(tiny), on_event=events.append)
        found = generate(generator, requests(params, scale.rollouts, seed))
        yield from joint_checks(f"{name}, {setting}", found, law.joint(params))
        seed += scale.rollouts
    yield bound_check(f"{name} was never switched off", len(events), 1, detail="; ".join(events))
    yield from hostile_checks(make, law, tiny, scale, seed)
    yield from model_checks(make, law, tiny, scale, seed, folder)
    yield from history_checks(make, law, tiny, scale, seed)
    yield from recorded_checks(make, build, name, scale, seed, folder)


def hostile_checks(make: MakeGenerator, law: JointLaw, tiny: Path, scale: Scale, seed: int) -> Iterator[Check]:
    """Drafters that would move the distribution if they could."""
    params = SamplingParams(temperature=0.8)
    asked, joint = requests(params, scale.rollouts, seed), law.joint(params)
    plain = generate(make(tiny, None), asked)
    seeds = [s for request in asked for s in request.seeds]
    texts = {s: sample.token_ids.tolist() for s, sample in zip(seeds, plain, strict=True)}
    worst: list[tuple[Drafter, str]] = [
        (drafters.constant(0), "standard"),
        (drafters.least_likely(law.laws(params)), "standard"),
        (drafters.random_tokens(VOCABULARY, seed), "standard"),
        (drafters.too_long(after=scale.rollouts // 2), "standard"),
        (drafters.future(texts), "standard"),
        (drafters.Drawn(VOCABULARY, seed), "standard"),
        (drafters.Drawn(VOCABULARY, seed, sharpness=3.0), "block"),
        (MTPDrafter(weights=drafters.random_head(tiny, seed)), "standard"),
        (MTPDrafter(weights=drafters.random_head(tiny, seed + 1)), "block"),
        (drafters.Mixed(VOCABULARY, seed), "standard"),
        (drafters.Mixed(VOCABULARY, seed), "block"),
    ]
    yield from joint_checks("no drafts", plain, joint)
    for index, (drafter, rule) in enumerate(worst):
        same = drafter.name == "copies of the future"
        new = asked if same else requests(params, scale.rollouts, seed + (index + 1) * scale.rollouts)
        found = generate(make(tiny, drafter, verification=rule), new)
        yield from joint_checks(f"hostile: {drafter.name}, {rule}", found, joint)
    yield from overwriting_checks(make, law, tiny, scale.rollouts, seed + (len(worst) + 1) * scale.rollouts)


def overwriting_checks(make: MakeGenerator, law: JointLaw, tiny: Path, samples: int, seed: int) -> Iterator[Check]:
    """With a penalty, which a prompt that a drafter had changed would act on."""
    params, drafter, events = SamplingParams(repetition_penalty=3.0), drafters.Overwriting(), list[str]()
    generator = make(tiny, drafter, on_event=events.append)
    found = generate(generator, requests(params, samples, seed))
    yield from joint_checks(f"hostile: {drafter.name}, standard", found, law.joint(params))
    yield bound_check(f"hostile: {drafter.name}, never switched off", len(events), 1, detail="; ".join(events))


def model_checks(
    make: MakeGenerator, law: JointLaw, tiny: Path, scale: Scale, seed: int, folder: Path
) -> Iterator[Check]:
    """Drafts that a model draws: of another model, of the target without a layer, and chosen among these."""
    other = random_checkpoint(folder / "draft", VOCABULARY, sharpness=0.6, seed=seed + 1)
    own: dict[str, Any] = {"name": "draft-model", "path": str(other), "stop_below": 0.3}
    skip: dict[str, Any] = {"name": "layer-skip", "stop_below": 0.3, "refresh_every": 4}
    both: dict[str, Any] = {"name": "arbiter", "drafters": ["suffix-automaton", own, skip], "measure": False}
    params = SamplingParams(temperature=0.8)
    joint = law.joint(params)
    for piece in (own, skip, both):
        for rule in ("standard", "block") if scale.every_rule else ("standard",):
            seed += scale.rollouts
            name, events = f"models: {piece['name']}, {rule}", list[str]()
            generator = make(tiny, build_drafter(piece), verification=rule, on_event=events.append)
            yield from joint_checks(name, generate(generator, requests(params, scale.rollouts, seed)), joint)
            yield bound_check(f"{name}, never switched off", len(events), 1, detail="; ".join(events))


def history_checks(make: MakeGenerator, law: JointLaw, tiny: Path, scale: Scale, seed: int) -> Iterator[Check]:
    """The same seeds again, with a drafter that remembers what each led to."""
    params = SamplingParams()
    asked, joint = requests(params, scale.rollouts, seed), law.joint(params)
    for rule in ("standard", "block") if scale.every_rule else ("standard",):
        generator = make(tiny, drafters.Remembering(VOCABULARY, seed), verification=rule)
        generate(generator, asked)
        again = generate(generator, asked)
        yield from joint_checks(f"{drafters.Remembering.name}, {rule}", again, joint)


def recorded_checks(
    make: MakeGenerator, build: Callable[[Path], Drafter], name: str, scale: Scale, seed: int, folder: Path
) -> list[Check]:
    """Log-prob and entropy of every token against a forward of the whole text, by how the token came to be."""
    vocabulary = 64
    checkpoint = random_checkpoint(folder / "small", vocabulary, sharpness=2.0, seed=seed + 3)
    model, errors = FreshForward(checkpoint), {origin: [0.0] for origin in TokenOrigin}
    settings = chosen(vocabulary, scale.every_rule)
    for rule, drafter in (("standard", build(checkpoint)), ("standard", drafters.Drawn(vocabulary, seed)),
                          ("block", drafters.Drawn(vocabulary, seed + 1, sharpness=2.0))):  # fmt: skip
        generator = make(checkpoint, drafter, max_draft_tokens=4, verification=rule)
        asked = [
            GroupRequest(
                i, np.array(PROMPT, np.int64), msgspec.structs.replace(params, max_new_tokens=24),
                tuple(range(scale.recorded)),
            )
            for i, params in enumerate(settings.values())
        ]  # fmt: skip
        for sample in generate(generator, asked):
            _compare(sample, asked[sample.group].sampling, model, errors)
    return [
        bound_check(
            f"recorded log-prob and entropy, {origin.name.lower()} tokens", max(found), LOGPROB_BOUND, len(found) - 1,
            f"largest error in nats; {name} and drawn drafts",
        )
        for origin, found in errors.items()
        if len(found) > 1 or origin in (TokenOrigin.ACCEPTED, TokenOrigin.RESIDUAL, TokenOrigin.BONUS)
    ]  # fmt: skip


def _compare(
    sample: FinishedSample, params: SamplingParams, model: FreshForward, errors: dict[TokenOrigin, list[float]]
) -> None:
    assert sample.origins is not None and sample.entropies is not None
    for origin, error in zip(sample.origins.tolist(), recorded_errors(sample, params, model), strict=True):
        errors[TokenOrigin(origin)].append(float(error))


def recorded_errors(
    sample: FinishedSample, params: SamplingParams, model: FreshForward, prompt: Sequence[int] = PROMPT
) -> np.ndarray:
    """How far each token's recorded log-prob and entropy, where there is one, are from a fresh forward's: the larger of
    the two in nats, float64 [T]."""
    text = sample.token_ids.tolist()
    logits = model.logits([[*prompt, *text]])[0, len(prompt) - 1 : -1]
    untruncated = msgspec.structs.replace(params, top_k=0, top_p=1.0, min_p=0.0)
    errors = np.zeros(len(text))
    for n, token in enumerate(text):
        law = processed_law(logits[n], params, prompt, text[:n], params.stop_token_ids)
        with np.errstate(divide="ignore"):
            errors[n] = abs(float(sample.logprobs[n]) - np.log(law[token]))
        if sample.entropies is not None:
            whole = processed_law(logits[n], untruncated, prompt, text[:n], params.stop_token_ids)
            entropy = -float((whole[whole > 0] * np.log(whole[whole > 0])).sum())
            errors[n] = max(errors[n], abs(float(sample.entropies[n]) - entropy))
    return errors
