"""What drafters that run a model are worth: acceptance by layers skipped, fixed sets beside it, speed and prediction.

    rollahead bench model-drafters --model DIR --prompts FILE --draft-model DIR --out DIR

Parts: `sets` (acceptance of the program's set, against fixed sets of the same size: layers left out evenly, at the end,
at the beginning, in the middle) and `speed` (against plain decoding, in turns, beside the speed that the measured costs
of a verification, a layer and a head predict for the acceptance found).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.options import SEED, Parser, at_least, integers, temperature
from benchmarks.results import spread, write_results
from drafters.base import Drafter, DraftRequest, Verified
from drafters.calibration import verification_step
from drafters.draft_model import DraftModelDrafter
from drafters.drawing import Drawing
from drafters.layer_skip import LayerSkipDrafter, Set
from drafters.none import NoDrafter
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import GeneratorStats, NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache
from pipeline.models.tokenizer import Tokenizer

Row = dict[str, Any]
_ROUNDS = 60
"""in which what a prediction rests on is measured"""
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


def _run(
    decoder: Decoder, drafter: Drafter, prompts: Sequence[np.ndarray], batch: int, options: argparse.Namespace
) -> tuple[float, GeneratorStats]:
    """Seconds and counts of a response to each prompt; drafting in the clock, start-up not."""
    generator = NativeGenerator(
        decoder, drafter=drafter, max_sequences=batch, max_draft_tokens=options.draft_tokens, max_length=512,
        tokenizer=Tokenizer(options.model), stop_token_ids=(),
    )  # fmt: skip
    sampling = SamplingParams(temperature=options.temperature, max_new_tokens=options.tokens)
    clock = CLOCKS[options.clock]
    began = clock()
    for i, prompt in enumerate(prompts[: max(batch, options.count)]):
        generator.add(GroupRequest(i, prompt, sampling, (options.seed + i,)))
    while generator.has_work():
        generator.step()
    seconds, stats = clock() - began, generator.stats()
    generator.close()
    return seconds, stats


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
        _, stats = _run(decoder, chosen, prompts, 1, options)
        seconds = time.perf_counter() - began  # the drafter's own clock is the wall's, too
        fixed = {}
        for name, skipped in fixed_sets(layers, count).items():
            if len(skipped) == count:
                _, other = _run(decoder, FixedSkip(settings, skipped), prompts, 1, options)
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
    makers: dict[str, Callable[[], Drafter]] = {"none": NoDrafter}
    steps: dict[str, Callable[[int], Callable[[], None]]] = {}
    layers = len(decoder.layers)
    common = {"max_tokens": options.draft_tokens, "stop_below": options.stop_below}
    for count in _counts(layers, options):
        name = f"layer-skip {count}/{layers}"
        settings = LayerSkipDrafter.Options(skip=count / layers, **common)
        makers[name] = lambda settings=settings: LayerSkipDrafter(settings)  # type: ignore[misc]
        left = [i * layers // (layers - count) for i in range(layers - count)]
        steps[name] = lambda rows, left=left: _draft(decoder, left, rows, options)  # type: ignore[misc]
    if options.draft_model:
        smaller = load_decoder(options.draft_model, decoder.dtype)
        own = DraftModelDrafter.Options(path=str(options.draft_model), **common)
        makers["draft-model"] = lambda: DraftModelDrafter(own)
        steps["draft-model"] = lambda rows: _draft(smaller, None, rows, options)
    rows: list[Row] = []
    for batch in options.batch:
        speeds: dict[str, list[float]] = {name: [] for name in makers}
        last: dict[str, GeneratorStats] = {}
        for repeat in range(options.repeats + 1):
            for name in makers if repeat % 2 else reversed(makers):
                seconds, last[name] = _run(decoder, makers[name](), prompts, batch, options)
                if repeat:  # the first round warms up
                    speeds[name].append(last[name].generated_tokens / seconds)
        predicted = _predicted(decoder, last, batch, {name: step(batch) for name, step in steps.items()}, options)
        for name in makers:
            ratios = [a / b for a, b in zip(speeds[name], speeds["none"], strict=True)]
            row: Row = {
                "drafter": name, "batch": batch, "temperature": options.temperature,
                "tokens_per_second": statistics.median(speeds[name]), "ratio_to_plain": spread(ratios),
            }  # fmt: skip
            rows.append(row | predicted.get(name, {}))
    return rows


def _predicted(
    decoder: Decoder, stats: Mapping[str, GeneratorStats], batch: int, steps: Mapping[str, Callable[[], None]],
    options: argparse.Namespace,
) -> dict[str, Row]:  # fmt: skip
    """Of each drafter E[L] t(B, 1) / (t(B, 1 + n) + n d): n tokens drafted a verification, d seconds a draft step; t
    and d are measured side by side."""
    drafted = {name: stats[name].drafted / stats[name].verifications for name in steps}
    widths = {1} | {width + int(n) for n in drafted.values() for width in (1, 2)}
    verifying = {width: verification_step(decoder, batch, width, 128) for width in sorted(widths)}
    taken = _medians({**verifying, **steps}, options)
    taken |= {name: taken[name] / options.draft_tokens for name in steps}
    found = {}
    for name, n in drafted.items():
        plain, low, high = taken[1], taken[1 + int(n)], taken[2 + int(n)]
        emitted = stats[name].generated_tokens / stats[name].verifications
        seconds = low + (n - int(n)) * (high - low) + n * taken[name]
        found[name] = {
            "acceptance_rate": stats[name].accepted / max(1, stats[name].drafted),
            "tokens_per_verification": emitted,
            "drafted_per_verification": n,
            "draft_step_of_plain_step": taken[name] / plain,
            "predicted_ratio": emitted * plain / seconds,
        }
    return found


def _medians(steps: Mapping[Any, Callable[[], None]], options: argparse.Namespace) -> dict[Any, float]:
    """Seconds of each step, one after the other and again: what else the machine does meets all of them alike. Each is
    made twice, and the second counts, as in a run others like it have gone before."""
    clock = CLOCKS[options.clock]
    taken: dict[Any, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            step()
            began = clock()
            step()
            taken[name].append(clock() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


@torch.no_grad()
def _draft(
    decoder: Decoder, layers: Sequence[int] | None, rows: int, options: argparse.Namespace
) -> Callable[[], None]:  # fmt: skip
    """A draft for `rows` sequences of 128 tokens, through some layers, or all."""
    cache = KVCache(decoder.config, decoder.dtype, decoder.device, rows * (128 // PAGE + 1))
    tables = np.array(cache.take(cache.free), np.int64).reshape(rows, -1)
    cached, ones = np.full(rows, 128, np.int64), np.ones(rows, np.int64)
    temperatures = np.full(rows, options.temperature, np.float32)
    request = DraftRequest(list(range(rows)), options.draft_tokens * ones, temperatures)

    @torch.no_grad()
    def step() -> None:
        drawing = Drawing(request, request.budgets, ones, ones, vocab_size=decoder.config.vocab_size)
        tokens = np.zeros(rows, np.int64)
        for _ in range(options.draft_tokens):
            plan = cache.plan(tables, cached, ones)
            hidden = decoder.forward(torch.from_numpy(tokens), plan, cache, only=layers)
            tokens = drawing.draw(decoder.logits(hidden))
        drawing.proposal()

    return step
