"""What drafting costs and what the arbiter's choices are worth: memory, speed, regret.

    rollahead bench drafters --model DIR --train FILE,FILE --prompts FILE,FILE --out DIR

Parts: `stream` (time a token with a large memory, beside the arctic-inference package where it is installed), `build`
(a corpus), `arbiter` (against every single choice, in turns) and `replay` (the same on recorded texts and costs).
"""

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.drafter_choice import check, drafters, short_name
from benchmarks.drafter_streams import (
    LENGTH,
    ArcticDrafter,
    core_seconds_a_token,
    recorded,
    seconds_a_token,
    teach,
)  # fmt: skip
from benchmarks.options import SEED, Parser, at_least, files, integers, names, temperature
from benchmarks.results import resident_bytes, spread, write_results
from benchmarks.student import margin_95
from benchmarks.turns import take_turns
from drafters.arbiter import ArbiterDrafter
from drafters.base import BaseDrafter, Drafter, DraftRequest, Proposal
from drafters.calibration import measure_verifications
from drafters.cost_model import CostModel
from drafters.none import NoDrafter
from drafters.registry import build, piece_of
from drafters.replay import RecordedText, replay
from drafters.suffix.corpus import build_corpus, load_corpus
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder

Row = dict[str, Any]
GROUP, CAP = 8, 16
"""samples of a prompt, and longest draft"""
SINGLE = ("none", "suffix-automaton", "prompt-lookup", "token-recycling")


def main(arguments: list[str]) -> int:
    """Runs the parts, prints a line a row, writes `results.json`; the exit code."""
    options = _parser().parse_args(arguments)
    known = {"stream": _stream, "build": _build, "arbiter": _arbiter, "replay": _replay}
    for part in options.parts:
        if part not in known:
            raise UsageError(f"--parts {part} is unknown; there are {', '.join(known)}")
    rows: list[Row] = []
    for drafter in options.drafters:
        check(drafter)
    for part in options.parts:
        for row in known[part](options):
            rows.append({"part": part, **row})
            print(", ".join(f"{key} {_shown(value)}" for key, value in rows[-1].items()), flush=True)
    path = write_results(options.out, "drafters", rows, model=str(options.model), seed=options.seed)
    print(f"written {path}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench drafters", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--train", type=files, required=True, help=".jsonl files to learn from, comma between")
    parser.add_argument("--prompts", type=files, required=True, help=".jsonl files to draft for, comma between")
    parser.add_argument("--parts", type=names, default=["stream", "build", "arbiter", "replay"])
    parser.add_argument(
        "--drafters", type=drafters, default=list(SINGLE), help="single choices of the arbiter part, names or tables"
    )
    parser.add_argument("--memory-tokens", type=at_least(1), default=1_000_000)
    parser.add_argument("--build-tokens", type=at_least(1), default=10_000_000)
    parser.add_argument("--stream-texts", type=at_least(1), default=512)
    parser.add_argument("--batch", type=integers(), default=[1, 4, 16, 64])
    parser.add_argument("--temperature", type=temperature, default=1.0)
    parser.add_argument("--tokens", type=at_least(1), default=96, help="tokens a sample in the arbiter part")
    parser.add_argument(
        "--groups", type=at_least(0), default=0, help="prompts a run; 0: a quarter of the batch, at least 2"
    )
    parser.add_argument("--repeats", type=at_least(1), default=9)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-drafters"))
    return parser


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_shown(part)}" for key, part in value.items()) + ")"
    return str(value)


# ---- memory ---------------------------------------------------------------------------------------------------------


def _stream(options: argparse.Namespace) -> list[Row]:
    train, test = recorded(options.train, options.model), recorded(options.prompts, options.model)
    test = test[: options.stream_texts]
    rows: list[Row] = []
    for label in ("suffix-automaton", "arctic-inference", "suffix-automaton in arctic-inference's bytes"):
        before, limit = resident_bytes(), 4 << 30
        drafter: Drafter
        if label == "arctic-inference":
            try:
                drafter = ArcticDrafter()
            except UsageError as error:
                print(f"left out: {error}")
                break
        else:
            if rows:
                limit = rows[-1]["memory_bytes"]
            drafter = SuffixAutomatonDrafter(SuffixAutomatonDrafter.Options(memory_mb=limit / 2**20))
        began = time.perf_counter()
        count = teach(drafter, train, options.memory_tokens)
        taught = time.perf_counter() - began
        row: Row = {
            "drafter": label,
            "memory_tokens": sum(len(t.prompt_ids) + len(t.response_ids) for t in train[:count]),
            "memory_bytes": resident_bytes() - before,
            "teach_seconds": taught,
        }
        # A group of one sample: what is drafted comes from the memory and the sequence itself.
        totals = replay(
            drafter,
            [dataclasses.replace(t, group=-1 - i) for i, t in enumerate(test)],
            slots=16,
            max_draft_tokens=LENGTH,
        )
        row |= {"accepted": totals.accepted, "drafted": totals.drafted, "of_tokens": totals.tokens}
        row |= {f"microseconds_a_token_batch_{b}": 1e6 * seconds_a_token(drafter, test[:256], b) for b in (1, 16, 64)}
        if isinstance(drafter, SuffixAutomatonDrafter):
            core_seconds_a_token(drafter, test[:2])  # compiles
            row["microseconds_a_token_core"] = 1e6 * core_seconds_a_token(drafter, test)
            row |= drafter.counters()
        rows.append(row)
    return rows


def _build(options: argparse.Namespace) -> list[Row]:
    texts = recorded(options.train, options.model)
    rng = np.random.default_rng(options.seed)
    documents: list[np.ndarray] = []
    tokens = 0
    while tokens < options.build_tokens:
        text = texts[len(documents) % len(texts)]
        document = np.concatenate([text.prompt_ids, text.response_ids])
        if len(documents) >= len(texts):  # the files are used up: the same again with words changed
            document = np.where(rng.random(len(document)) < 0.15, rng.choice(document, len(document)), document)
        documents.append(document)
        tokens += len(document)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        size = build_corpus(documents, Path(folder) / "corpus")
        built = time.perf_counter() - began
        began = time.perf_counter()
        load_corpus(Path(folder) / "corpus")
        loaded = time.perf_counter() - began
    return [
        {
            "tokens": size.tokens, "documents": size.documents, "build_seconds": built, "load_seconds": loaded,
            "bytes_a_token": size.bytes / size.tokens,
        }
    ]  # fmt: skip


# ---- choices --------------------------------------------------------------------------------------------------------


def _arbiter(options: argparse.Namespace) -> list[Row]:
    """Every choice in turns; the arbiter's ratio to the best single one, repeat by repeat, and its lower 95% bound."""
    decoder = load_decoder(options.model)
    rows = []
    single = list(dict.fromkeys(["none", *options.drafters]))
    choices = [piece_of(text) for text in single if text != "none"]
    pieces = {short_name(text): piece_of(text) for text in single}
    pieces["arbiter"] = {"name": "arbiter", "drafters": choices}
    build(pieces["arbiter"])  # refused before anything is measured
    for label, prompts in _prompt_sets(options):
        for batch in options.batch:
            groups = options.groups or max(2, batch // 4)
            speeds = _speeds(decoder, pieces, prompts, groups, batch, options)
            best = max(map(short_name, single), key=lambda name: statistics.median(speeds[name]))
            ratios = [a / b for a, b in zip(speeds["arbiter"], speeds[best], strict=True)]
            margin = margin_95(ratios) if len(ratios) > 1 else math.nan
            plain = [a / b for a, b in zip(speeds["arbiter"], speeds["none"], strict=True)]
            rows.append(
                {
                    "prompts": label, "batch": batch, "best_single": best, "ratio_to_best": spread(ratios),
                    "ratio_lower_95": statistics.fmean(ratios) - margin, "ratio_to_plain": spread(plain),
                    "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
                }
            )  # fmt: skip
            print(f"{label} batch {batch}: {best} best, arbiter {_shown(rows[-1]['ratio_to_best'])}", flush=True)
    return rows


def _prompt_sets(options: argparse.Namespace) -> list[tuple[str, list[np.ndarray]]]:
    """Each file, all of them mixed, and prompts of random tokens."""
    sets = [(path.parent.name, [t.prompt_ids for t in recorded([path], options.model)]) for path in options.prompts]
    if len(sets) > 1:
        sets.append(("mix", [t.prompt_ids for t in recorded(options.prompts, options.model)]))
    rng, largest = np.random.default_rng(options.seed), max(int(p.max()) for _, ps in sets for p in ps)
    return [*sets, ("random", [rng.integers(3, largest + 1, 48) for _ in range(64)])]


def _speeds(
    decoder: Decoder, pieces: Mapping[str, Row], prompts: Sequence[np.ndarray], groups: int, batch: int,
    options: argparse.Namespace,
) -> dict[str, list[float]]:  # fmt: skip
    """Tokens a second of each of the named pieces and of each repeat, in short turns; drafting in the clock.

    A repeat is `GROUP` samples of each of `groups` new prompts, each exactly `options.tokens` long.
    Drafters keep what they have seen and measured, as in an engine; the first repeat warms up and is not counted.
    """
    generators = [
        NativeGenerator(
            decoder, drafter=build(piece), max_sequences=batch, max_draft_tokens=CAP, stop_token_ids=(),
            stagger=True,
        )
        for piece in pieces.values()
    ]  # fmt: skip
    sampling = SamplingParams(temperature=options.temperature, max_new_tokens=options.tokens)
    speeds: dict[str, list[float]] = {name: [] for name in pieces}
    for repeat in range(options.repeats + 1):
        before = [generator.stats().generated_tokens for generator in generators]
        for i in range(repeat * groups, (repeat + 1) * groups):
            seeds = tuple(options.seed + i * GROUP + s for s in range(GROUP))
            for generator in generators:
                generator.add(GroupRequest(i, prompts[i % len(prompts)], sampling, seeds))
        turns = take_turns(generators)
        for name, generator, was, (seconds, _) in zip(pieces, generators, before, turns, strict=True):
            if repeat:
                speeds[name].append((generator.stats().generated_tokens - was) / seconds)
    for generator in generators:
        generator.close()
    return speeds


class _Capped(BaseDrafter):
    """Another drafter with a shorter draft."""

    def __init__(self, drafter: Drafter, most: int) -> None:
        self._drafter, self._most, self.name = drafter, most, f"{drafter.name} up to {most}"
        self.begin, self.observe, self.end = drafter.begin, drafter.observe, drafter.end  # type: ignore[method-assign]

    def propose(self, request: DraftRequest) -> Proposal:
        budgets = np.minimum(request.budgets, self._most)
        return self._drafter.propose(msgspec.structs.replace(request, budgets=budgets))


def _replay(options: argparse.Namespace) -> list[Row]:
    """Texts sampled here, costs measured here; then every choice at every length, and the arbiter, on paper."""
    decoder = load_decoder(options.model)
    costs = CostModel()
    measured = measure_verifications(decoder, 10.0, 64)
    costs.fit(measured)
    rows = []
    for label, prompts in _prompt_sets(options)[: len(options.prompts)]:
        for batch in options.batch:
            texts = _sampled(decoder, prompts[: options.groups or max(2, batch // 4)], options)
            speeds = {"none": _on_paper(NoDrafter(), texts, batch, costs)}
            for name in ("suffix-automaton", "prompt-lookup"):
                for most in (1, 2, 3, 4, 6, 8, CAP):
                    speeds[f"{name} up to {most}"] = _on_paper(
                        _Capped(build({"name": name}), most), texts, batch, costs
                    )
            pieces = ArbiterDrafter.Options(drafters=["suffix-automaton", "prompt-lookup"], urgency=0)
            # Asking costs nothing on paper, for the arbiter as for the others.
            ours = _on_paper(
                ArbiterDrafter(pieces, CostModel(costs.table, learns=False), clock=lambda: 0.0), texts, batch, costs
            )
            best = max(speeds, key=lambda name: speeds[name])
            rows.append({"prompts": label, "batch": batch, "best_single": best, "regret": 1 - ours / speeds[best]})
    milliseconds = {f"{b}x{n}": 1e3 * s for (b, n), s in measured.items()}
    return [*rows, {"verification_milliseconds": milliseconds}]


def _sampled(decoder: Decoder, prompts: Sequence[np.ndarray], options: argparse.Namespace) -> list[RecordedText]:
    generator = NativeGenerator(decoder, drafter=SuffixAutomatonDrafter(), max_sequences=64, max_draft_tokens=2)
    sampling = SamplingParams(temperature=options.temperature, max_new_tokens=options.tokens)
    for i, prompt in enumerate(prompts):
        generator.add(GroupRequest(i, prompt, sampling, tuple(options.seed + i * GROUP + s for s in range(GROUP))))
    texts = {}
    while generator.has_work():
        for sample in generator.step():
            texts[sample.sample, sample.group] = RecordedText(prompts[sample.group], sample.token_ids, sample.group)
    return [text for _, text in sorted(texts.items())]  # staggered: first samples first


def _on_paper(drafter: Drafter, texts: list[RecordedText], batch: int, costs: CostModel) -> float:
    totals = replay(drafter, texts, slots=batch, max_draft_tokens=CAP, costs=costs.seconds)
    return totals.tokens_per_second
