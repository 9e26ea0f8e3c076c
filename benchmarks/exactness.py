"""Whether drafting leaves what is sampled as it is: enumerated, counted, and compared with fresh forwards."""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.exactness_suite.counts import count_checks, repetition_checks
from benchmarks.exactness_suite.enumeration import enumeration_checks
from benchmarks.exactness_suite.generators import GENERATORS
from benchmarks.exactness_suite.model import FreshForward, random_checkpoint
from benchmarks.exactness_suite.rollouts import rollout_checks
from benchmarks.exactness_suite.scale import FULL, SHORT, Scale
from benchmarks.exactness_suite.vllm import vllm_checks
from benchmarks.results import write_results
from drafters.base import Drafter
from drafters.registry import build
from pipeline.engine.vllm.install import require_vllm
from pipeline.sampling.exactness import Check, holm
from pipeline.sampling.exactness.statistics import LEVEL

SEED = 20240607
"""One fixed seed: a run says the same every time, and nothing is tried again."""


def main(arguments: list[str]) -> int:
    """Runs the suite; 1 when a check fails.

    Raises:
        UsageError: an unknown drafter, or a generator or checkpoint that cannot be used.
    """
    parser = argparse.ArgumentParser(prog="rollahead bench exactness", description=__doc__)
    parser.add_argument("--drafter", default="suffix-automaton", help="drafter by name or module:Class")
    parser.add_argument("--generator", choices=[*sorted(GENERATORS), "vllm"], default="native", help="what generates")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="count on this checkpoint's logits, not on random ones"
    )
    parser.add_argument("--short", action="store_true", help="a tenth of it, in seconds")
    parser.add_argument("--out", type=Path, default=Path("bench/exactness"), metavar="DIR", help="for results.json")
    options = parser.parse_args(arguments)
    build({"name": options.drafter})
    if options.generator == "vllm":
        require_vllm()
    checks = suite(
        SHORT if options.short else FULL,
        options.generator,
        lambda: build({"name": options.drafter}),
        options.drafter,
        options.model,
        print,
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
    drafter: Callable[[], Drafter],
    name: str,
    model: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Check]:
    """All checks; what verifies and samples is ours with the native generator only, and tested by itself there."""
    checks: list[Check] = []

    def done(more: Iterable[Check]) -> None:
        for check in more:
            checks.append(check)
            tell(_line(check))

    with tempfile.TemporaryDirectory() as folder:
        if generator == "native":
            done(enumeration_checks(scale))
            checkpoint = model or random_checkpoint(
                Path(folder) / "counted", scale.vocabulary, sharpness=1.0, seed=SEED
            )
            done(count_checks(real_logits(checkpoint, scale.draft_tokens), scale, SEED))
            done(repetition_checks(SEED))
        if generator == "vllm":
            done(vllm_checks(name, scale, SEED, Path(folder)))
        else:
            done(rollout_checks(GENERATORS[generator], drafter, name, scale, SEED, Path(folder)))
    return checks


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
