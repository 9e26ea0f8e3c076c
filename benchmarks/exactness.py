"""Whether drafting leaves what is sampled as it is: enumerated, counted, and compared with fresh forwards."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.drafter_choice import short_name
from benchmarks.exactness_suite.checkpoint import checkpoint_checks
from benchmarks.exactness_suite.counts import count_checks, repetition_checks
from benchmarks.exactness_suite.enumeration import enumeration_checks
from benchmarks.exactness_suite.fitting import Piece, belongs, build_fitted
from benchmarks.exactness_suite.generators import GENERATORS
from benchmarks.exactness_suite.model import FreshForward, random_checkpoint
from benchmarks.exactness_suite.rollouts import rollout_checks
from benchmarks.exactness_suite.scale import FULL, SHORT, Scale
from benchmarks.exactness_suite.vllm import make as make_vllm
from benchmarks.exactness_suite.vllm import sampler_checks, vllm_checks
from benchmarks.options import Parser
from benchmarks.results import write_results
from drafters.registry import build, piece_of
from pipeline.engine.generator import Generator
from pipeline.engine.vllm.install import require_vllm
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig
from pipeline.sampling.exactness import Check, holm
from pipeline.sampling.exactness.statistics import LEVEL

SEED = 20240607
"""One fixed seed: a run says the same every time, and nothing is tried again."""


def main(arguments: list[str]) -> int:
    """Runs the suite; 1 when a check fails.

    Raises:
        UsageError: an unknown drafter, or a generator or checkpoint that cannot be used.
    """
    parser = Parser(prog="rollahead bench exactness", description=__doc__)
    parser.add_argument(
        "--drafter",
        default="suffix-automaton",
        help="drafter by name, module:Class, or a table {name = ..., option = ...}",
    )
    parser.add_argument("--generator", choices=[*sorted(GENERATORS), "vllm"], default="native", help="what generates")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="count on this checkpoint's logits, and run the drafter on it"
    )
    parser.add_argument("--short", action="store_true", help="a tenth of it, in seconds")
    parser.add_argument("--out", type=Path, default=Path("bench/exactness"), metavar="DIR", help="for results.json")
    options = parser.parse_args(arguments)
    piece = _piece(options.drafter, options.model)
    if options.generator == "vllm":
        require_vllm()
    checks = suite(
        SHORT if options.short else FULL, options.generator, piece, short_name(options.drafter), options.model, print
    )
    failed = failures(checks)
    path = write_results(
        options.out, "exactness", [asdict(check) | {"passed": check not in failed} for check in checks],
        model=str(options.model or "random"), seed=SEED, drafter=options.drafter, generator=options.generator,
        level=LEVEL,
    )  # fmt: skip
    for check in failed:
        print(f"FAILED {_line(check)}")
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed; {path}")
    return 1 if failed else 0


def suite(
    scale: Scale,
    generator: str,
    piece: Piece,
    name: str,
    model: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Check]:
    """All checks of the drafter of `piece`; what verifies and samples is ours with the native generator only, and
    tested by itself there."""
    checks: list[Check] = []

    def done(more: Iterable[Check]) -> None:
        for check in more:
            checks.append(check)
            tell(_line(check))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if model is not None:  # first, so that what does not fit is refused before anything is counted
            start = _starter(generator, piece, model)
            done(checkpoint_checks(start, name, model, scale.rollouts, scale.recorded, SEED))
        if generator == "native":
            done(enumeration_checks(scale))
            counted = model or random_checkpoint(folder / "counted", scale.vocabulary, sharpness=1.0, seed=SEED)
            done(count_checks(real_logits(counted, scale.draft_tokens), scale, SEED))
            done(repetition_checks(SEED))
        if belongs(piece):  # to the model it ran on: it fits no other
            done(sampler_checks(scale.draws) if generator == "vllm" else ())
        elif generator == "vllm":
            done(vllm_checks(piece, name, scale, SEED, folder))
        else:
            build = partial(build_fitted, piece)
            done(rollout_checks(GENERATORS[generator], build, name, scale, SEED, folder))
    return checks


def _piece(text: str, model: Path | None) -> Piece:
    """
    Raises:
        UsageError: no such drafter, or one that cannot be tested here.
    """
    piece = piece_of(text)
    if model is not None:
        ModelConfig.from_folder(model)
    if belongs(piece) and model is None:
        raise UsageError(f"drafter {text} has a path, which belongs to one model; give that one as --model DIR")
    with tempfile.TemporaryDirectory() as folder:
        if belongs(piece):
            build(piece)
        else:
            tiny = random_checkpoint(Path(folder) / "tiny", 12, sharpness=1.0)
            build_fitted(piece, tiny)
    return piece


def _starter(generator: str, piece: Piece, model: Path) -> Callable[[Callable[[str], None]], Generator]:
    if generator == "vllm":
        return lambda told: make_vllm(model, piece, on_event=told)
    return lambda told: GENERATORS[generator](model, build(piece), on_event=told)


def real_logits(checkpoint: Path, draft_tokens: int) -> np.ndarray:
    """[K+1, V], a model's at consecutive positions of a text; tokens renamed so that low ids are the likely ones, which
    the settings name."""
    logits = FreshForward(checkpoint).logits([[1, 4, 6, 4, 3, 5, 7]])[0, -draft_tokens - 1 :]
    return logits[:, np.argsort(-logits[0])]


def failures(results: Iterable[Check]) -> list[Check]:
    """Those that did not hold: chi-square tests by Holm's correction over all of them, the others each by its bound."""
    checks = list(results)
    tested = [check for check in checks if check.bound is None]
    rejected = [check for check, no in zip(tested, holm([c.value for c in tested]), strict=True) if no]
    return [check for check in checks if check in rejected or (check.bound is not None and not check.passed)]


def _line(check: Check) -> str:
    if check.bound is None:
        value = f"p = {check.value:.3g}"
    else:
        value = f"{check.value:.3g} < {check.bound:g}" if check.passed else f"{check.value:.3g}, bound {check.bound:g}"
    samples = f"  N = {check.samples:,}" if check.samples else ""
    return f"{check.name:<72} {value}{samples}"
