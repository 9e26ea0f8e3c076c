"""What drafters that run a model are worth: acceptance by layers skipped, fixed sets beside it, speed and prediction.

    rollahead bench model-drafters --model DIR --prompts FILE --draft-model DIR --out DIR

Parts: `sets` (acceptance of the program's set, against fixed sets of the same size: layers left out evenly, at the end,
at the beginning, in the middle) and `speed` (against plain decoding, in turns, beside the speed that the measured costs
of verifications and of drafting predict for the acceptance found).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.options import SEED, Parser, at_least, integers, temperature
from benchmarks.results import spread, write_results
from drafters.base import Drafter, Verified
from drafters.calibration import verification_step
from drafters.draft_model import DraftModelDrafter
from drafters.layer_skip import LayerSkipDrafter, Set
from drafters.none import NoDrafter
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import GeneratorStats, NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder
from pipeline.models.tokenizer import Tokenizer

Row = dict[str, Any]
_ROUNDS = 60
"""in which what a prediction rests on is measured"""
_PLAIN, _PROMPTS = "none", "prompts"
"""runs without drafts, and those that end with a response's first token"""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main(arguments: list[str]) -> int:
    """Runs the parts, prints a line a row, writes `results.json`; the exit code."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    known = {"sets": _sets, "speed": _speed}
    rows: list[Row] = []
    decoder = load_decoder(options.model, options.dtype)
    prompts = _prompts(options)
    for part in options.parts.split(","):
        if part not in known:
            raise UsageError(f"--parts {part} is unknown; there are {', '.join(known)}")
        for row in known[part](decoder, prompts, options):
            rows.append({"part": part, **row})
            print(json.dumps(rows[-1]), flush=True)
    path = write_results(
        options.out, "model-drafters", rows, model=str(options.model), seed=options.seed, clock=options.clock
    )
    print(f"written {path}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench model-drafters", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory of the target")
    parser.add_argument("--prompts", type=Path, required=True, help=".jsonl with questions")
    parser.add_argument("--draft-model", type=Path, help="checkpoint directory of a smaller one")
    parser.add_argument("--parts", default="sets,speed")
    parser.add_argument(
        "--skips", type=integers(), default=[], help="layers to leave out, comma between; default: six counts"
    )
    parser.add_argument("--batch", type=integers(), default=[1], help="sequences at once, comma between")
    parser.add_argument("--draft-tokens", type=at_least(1), default=6)
    parser.add_argument("--stop-below", type=float, default=0.4)
    parser.add_argument("--temperature", type=temperature, default=1.0)
    parser.add_argument("--tokens", type=at_least(1), default=96, help="of each response")
    parser.add_argument("--count", type=at_least(1), default=4, help="prompts a run, at least the batch")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--threads", type=at_least(0), default=0, help="of torch; 0: as it is")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-model-drafters"))
    return parser


def _prompts(options: argparse.Namespace) -> list[np.ndarray]:
    tokenizer = Tokenizer(options.model)
    try:
        lines = options.prompts.read_bytes().splitlines()
        questions = [json.loads(line)["question"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"--prompts {options.prompts} is no file of questions: {error!r}") from None
    return [np.array(tokenizer.encode(f"Question: {q}\nAnswer:"), np.int64) for q in questions]


class Run(NamedTuple):
    """A response to each prompt."""

    seconds: float
    """drafting included, start-up not"""
    stats: GeneratorStats


def _run(
    decoder: Decoder, drafter: Drafter, prompts: Sequence[np.ndarray], batch: int, options: argparse.Namespace,
    tokens: int | None = None,
) -> Run:  # fmt: skip
    generator = NativeGenerator(
        decoder, drafter=drafter, max_sequences=batch, max_draft_tokens=options.draft_tokens, max_length=512,
        tokenizer=Tokenizer(options.model), stop_token_ids=(),
    )  # fmt: skip
    sampling = SamplingParams(temperature=options.temperature, max_new_tokens=tokens or options.tokens)
    clock = CLOCKS[options.clock]
    began = clock()
    for i, prompt in enumerate(prompts[: max(batch, options.count)]):
        generator.add(GroupRequest(i, prompt, sampling, (options.seed + i,)))
    while generator.has_work():
        generator.step()
    run = Run(clock() - began, generator.stats())
    generator.close()
    return run


# ---- sets -----------------------------------------------------------------------------------------------------------


class FixedSkip(LayerSkipDrafter):
    """Leaves out the same layers always."""

    def __init__(self, options: LayerSkipDrafter.Options, skipped: Set) -> None:
        super().__init__(options)
        self._fixed = skipped

    def _refresh(self, verified: Verified, rows: list[int]) -> None:
        self._shared = self._fixed


def fixed_sets(layers: int, count: int) -> dict[str, Set]:
    """Sets of a size that need no choosing. The first layer stays in an even one: it is what all others build on."""
    sets = {
        f"uniform {phase}": tuple(sorted({1 + int((i + phase / 3) * (layers - 1) / count) for i in range(count)}))
        for phase in range(3)
    }
    return sets | {
        "prefix kept": tuple(range(layers - count, layers)),
        "suffix kept": tuple(range(count)),
        "middle left out": tuple(range((layers - count) // 2, (layers - count) // 2 + count)),
    }


def _sets(decoder: Decoder, prompts: Sequence[np.ndarray], options: argparse.Namespace) -> list[Row]:
    layers, rows = len(decoder.layers), []
    for count in _counts(layers, options):
        settings = LayerSkipDrafter.Options(skip=count / layers, max_tokens=options.draft_tokens, stop_below=0.0)
        chosen = LayerSkipDrafter(settings)
        began = time.perf_counter()
        stats = _run(decoder, chosen, prompts, 1, options).stats
        seconds = time.perf_counter() - began  # the drafter's own clock is the wall's, too
        fixed = {}
        for name, skipped in fixed_sets(layers, count).items():
            if len(skipped) == count:
                other = _run(decoder, FixedSkip(settings, skipped), prompts, 1, options).stats
                fixed[name] = other.accepted / max(1, other.drafted)
        best = max(fixed, key=lambda name: fixed[name])
        ours = stats.accepted / max(1, stats.drafted)
        rows.append(
            {
                "layers": layers, "skipped": count, "acceptance": ours, "best_fixed": best, "fixed": fixed,
                "points_over_best_fixed": 100 * (ours - fixed[best]),
                "choosing_share": chosen.counters()["seconds_choosing"] / seconds, "last_set": chosen._shared,
            }
        )  # fmt: skip
    return rows


def _counts(layers: int, options: argparse.Namespace) -> list[int]:
    if options.skips:
        return list(options.skips)
    return sorted({max(1, round(layers * part)) for part in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)})


# ---- speed ----------------------------------------------------------------------------------------------------------


def _speed(decoder: Decoder, prompts: Sequence[np.ndarray], options: argparse.Namespace) -> list[Row]:
    makers: dict[str, Callable[[], Drafter]] = {_PLAIN: NoDrafter}
    layers = len(decoder.layers)
    common = {"max_tokens": options.draft_tokens, "stop_below": options.stop_below}
    for count in _counts(layers, options):
        name = f"layer-skip {count}/{layers}"
        settings = LayerSkipDrafter.Options(skip=count / layers, **common)
        makers[name] = lambda settings=settings: LayerSkipDrafter(settings)  # type: ignore[misc]
    if options.draft_model:
        own = DraftModelDrafter.Options(path=str(options.draft_model), **common)
        makers["draft-model"] = lambda: DraftModelDrafter(own)
    rows: list[Row] = []
    for batch in options.batch:
        runs: dict[str, list[Run]] = {name: [] for name in [*makers, _PROMPTS]}
        for repeat in range(options.repeats + 1):
            for name in runs if repeat % 2 else reversed(runs):
                tokens = 1 if name == _PROMPTS else options.tokens
                run = _run(decoder, makers.get(name, NoDrafter)(), prompts, batch, options, tokens)
                if repeat:  # the first round warms up
                    runs[name].append(run)
        predicted = {row["drafter"]: row for row in _predicted(decoder, runs, batch, options)}
        for name in makers:
            ratios = [plain.seconds / run.seconds for plain, run in zip(runs[_PLAIN], runs[name], strict=True)]
            row: Row = {
                "drafter": name, "batch": batch, "temperature": options.temperature,
                "tokens_per_second": statistics.median(run.stats.generated_tokens / run.seconds for run in runs[name]),
                "ratio_to_plain": spread(ratios),
            }  # fmt: skip
            rows.append(row | predicted.get(name, {}))
    return rows


def _predicted(
    decoder: Decoder, runs: Mapping[str, Sequence[Run]], batch: int, options: argparse.Namespace
) -> list[Row]:
    """Of each drafter (p + N (t(B, 1) + o)) / (p + N / E[L] (t(B, 1 + n) + d + o)) for N tokens: n tokens are drafted a
    verification, which takes d seconds by the engine's own clock; prompts take p seconds, and for all else the engine
    takes o seconds a step, both as they do in plain decoding. Medians of runs."""

    def median(name: str, of: Callable[[Run], float]) -> float:
        return statistics.median(map(of, runs[name]))

    drafters = [name for name in runs if name not in (_PLAIN, _PROMPTS)]
    counts = {name: runs[name][0].stats for name in drafters}
    drafted = {name: count.drafted / count.verifications for name, count in counts.items()}
    taken = _verifications(decoder, batch, {1, *(1 + round(n) for n in drafted.values())}, options)
    in_all, prompts = (median(name, lambda run: run.seconds) for name in (_PLAIN, _PROMPTS))
    plain_steps = (runs[_PLAIN][0].stats.verifications - runs[_PROMPTS][0].stats.verifications) / batch
    beside = max((in_all - prompts) / max(plain_steps, 1) - taken[1], 0.0)
    rows: list[Row] = []
    for name, n in drafted.items():
        drafting = median(name, lambda run: run.stats.drafter_seconds)
        steps = counts[name].verifications / batch
        seconds = prompts + steps * (taken[1 + round(n)] + beside) + drafting
        rows.append({
            "drafter": name,
            "acceptance_rate": counts[name].accepted / max(1, counts[name].drafted),
            "tokens_per_verification": counts[name].generated_tokens / counts[name].verifications,
            "drafted_per_verification": n,
            "draft_step_of_plain_step": drafting / max(1, counts[name].drafted) * batch / taken[1],
            "predicted_ratio": in_all / seconds,
        })  # fmt: skip
    return rows


def _verifications(decoder: Decoder, rows: int, widths: set[int], options: argparse.Namespace) -> dict[int, float]:
    """t(B, n), median seconds of verifications of so many tokens a sequence: every width is met twice in a row, of
    which the second counts, and all of them again and again, so that what else the machine does meets them alike."""
    clock, taken = CLOCKS[options.clock], {width: list[float]() for width in sorted(widths)}
    steps = {width: verification_step(decoder, rows, width, 128) for width in taken}
    for _ in range(_ROUNDS):
        for width, step in steps.items():
            step()
            began = clock()
            step()
            taken[width].append(clock() - began)
    return {width: statistics.median(seconds) for width, seconds in taken.items()}
