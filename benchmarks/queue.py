"""What a long queue costs: the same sequences generated with few groups waiting behind them, and with many.

    rollahead bench queue --model DIR --queued 10000 --batch 16 --out DIR

Both run the same steps on the same sequences; what differs is who waits. Times are CPU times of stepping, pair by pair.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.drafter_choice import check, drafters, short_name
from benchmarks.options import Parser, at_least
from benchmarks.random_model import checkpoint
from benchmarks.results import spread, write_results
from drafters.registry import written
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder

PROMPT = 16


def main(arguments: list[str]) -> int:
    """Measures, prints a line a drafter, writes `results.json`; the exit code."""
    options = _parser().parse_args(arguments)
    for drafter in options.drafters:
        check(drafter)
    torch.set_num_threads(1)
    decoder = load_decoder(checkpoint(options.model, options.out / "models"))
    rows = []
    for drafter in options.drafters:
        rows.append(_row(decoder, drafter, options))
        cost = rows[-1]["cost"]
        print(
            f"{short_name(drafter)}: {options.queued} groups in the queue cost {cost['median']:.1%} "
            f"({cost['min']:.1%} to {cost['max']:.1%}) of {options.batch} sequences' time",
            flush=True,
        )
    print(f"written {write_results(options.out, 'queue', rows, model=str(options.model))}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench queue", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="random-4x256x4096", help="checkpoint folder, or random-LAYERSxHIDDENxVOCAB")
    parser.add_argument("--queued", type=at_least(1), default=10_000, help="groups that wait")
    parser.add_argument("--batch", type=at_least(1), default=16, help="sequences at once")
    parser.add_argument(
        "--drafters", type=drafters, default=["none", "suffix-automaton"], help="comma-separated names or tables"
    )
    parser.add_argument("--steps", type=at_least(1), default=200)
    parser.add_argument(
        "--tokens", type=at_least(1), default=48, help="of a sequence; others take the place of finished ones"
    )
    parser.add_argument("--group-size", type=at_least(1), default=8)
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-queue"))
    return parser


def _row(decoder: Decoder, drafter: str, options: argparse.Namespace) -> dict[str, Any]:
    # As many as the steps can start, so that both runs start the same ones.
    few = options.batch * (1 + options.steps * 8 // options.tokens)
    times: dict[int, list[float]] = {few: [], options.queued: []}
    tokens = 0
    for repeat in range(options.repeats + 1):
        for queued in times if repeat % 2 else reversed(times):
            seconds, tokens = _run(decoder, drafter, queued, options)
            if repeat:  # the first warms up
                times[queued].append(seconds)
    pairs = list(zip(times[options.queued], times[few], strict=True))
    return {
        "system": "rollahead", "generator": "native", "drafter": short_name(drafter), "batch": options.batch,
        "tokens": tokens,
        "queued": options.queued, "queued_few": few, "cpu_seconds": spread(many for many, _ in pairs),
        "cost": spread(1 - less / many for many, less in pairs),
    }  # fmt: skip


def _run(decoder: Decoder, drafter: str, queued: int, options: argparse.Namespace) -> tuple[float, int]:
    """CPU seconds of the steps, and tokens made in them."""
    generator = NativeGenerator(
        decoder, drafter=written(drafter), max_sequences=options.batch, max_draft_tokens=4,
        max_length=PROMPT + options.tokens, stop_token_ids=(), stagger=True,
    )  # fmt: skip
    prompts = np.random.default_rng(0).integers(3, decoder.config.vocab_size, (64, PROMPT))
    sampling = SamplingParams(max_new_tokens=options.tokens)
    for i in range(queued):
        seeds = tuple(range(i * options.group_size, (i + 1) * options.group_size))
        generator.add(GroupRequest(i, prompts[i % 64], sampling, seeds))
    start = time.process_time()
    for _ in range(options.steps):
        generator.step()
    return time.process_time() - start, generator.stats().generated_tokens
