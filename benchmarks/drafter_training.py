"""What a draft head should be trained for: losses at equal steps from one warm start, paired over seeds.

    rollahead bench drafter-training --model DIR --texts FILE --out DIR

For each seed a head is made and warmed up by cross-entropy; then each loss goes on from a copy of it, on the same
batches in the same order, at the learning rates of train-drafter. Figures are of texts held out: expected accepted
tokens over drafted ones by teacher forcing, what the generator counts with the head as its drafter at temperature 1,
and how the chance of acceptance at depth 1 goes with the target's entropy (slope by least squares, a nat; entropy.png
where matplotlib is installed). The same command goes on after the last seed that was finished.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks import plots
from benchmarks.options import Parser, at_least
from benchmarks.results import earlier_rows, spread, write_results
from drafters.mtp.data import Rollout, TrainingTexts, read_rollouts
from drafters.mtp.drafter import MTPDrafter
from drafters.mtp.losses import LOSSES
from drafters.mtp.training import FrozenHead, HeadTraining, HeldOut, new_module
from pipeline.config.types import DrafterSection
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder
from pipeline.models.tokenizer import Tokenizer

_WHAT = "drafter-training"
_BINS = 12
"""stretches of entropy with equally many positions"""


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    for loss in options.losses:
        if loss not in LOSSES:
            raise UsageError(f"--losses {loss} is unknown; known are {', '.join(LOSSES)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    decoder = load_decoder(options.model)
    rollouts = read_rollouts(options.texts, Tokenizer(options.model), options.template, decoder.config.vocab_size)
    if len(rollouts) <= options.held_out:
        raise UsageError(f"{len(rollouts)} texts are not more than --held-out {options.held_out}; give more texts")
    kept, rest = rollouts[: options.held_out], rollouts[options.held_out :]
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("out", "seeds", "threads")}
    rows = earlier_rows(options.out, _WHAT, settings)
    known = {row["seed"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        texts, held_out = (TrainingTexts(decoder, part, Path(folder)) for part in (rest, kept))
        for seed in sorted(set(range(options.seeds)) - known):
            rows += _seed(decoder, texts, held_out, kept, options, seed)
            # After every seed: what half an hour has brought is not lost with a machine.
            write_results(options.out, _WHAT, rows, model=str(options.model), settings=settings)
    summary = {loss: _paired(rows, loss, options.losses[0]) for loss in options.losses[1:]}
    for loss, figures in summary.items():
        print(f"{loss} over {options.losses[0]}, points: {figures}")
    path = write_results(options.out, _WHAT, rows, model=str(options.model), settings=settings, paired=summary)
    _plot(rows, options.out / "entropy.png")
    print(f"{path}")
    return 0


def _seed(
    decoder: Decoder, texts: TrainingTexts, held_out: TrainingTexts, kept: Sequence[Rollout],
    options: argparse.Namespace, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each loss."""
    section = DrafterSection(
        depths=options.depths, batch_tokens=options.batch_tokens, optimizer=options.optimizer,
        matrix_learning_rate=options.matrix_learning_rate, learning_rate=options.learning_rate,
        steps=options.warm_steps + options.steps,
    )  # fmt: skip
    tensors = {name: tensor.float() for name, tensor in decoder.tensors().items()}
    frozen = FrozenHead.of(decoder, tensors, decoder.dtype)
    module = new_module(decoder.config, tensors, [], seed)
    order = _batches(texts, options, seed)
    warm = HeadTraining(module, frozen, section, seed, decoder.dtype)
    for index in order[: options.warm_steps]:
        warm.step += 1
        warm.fit(texts.batch(index, options.depths), "ce", warm.factor)
    begun = copy.deepcopy(module.state_dict()), copy.deepcopy(warm.optimizer.moments())
    rows = [_row(decoder, warm, held_out, kept, options, seed, "warm start")]
    for loss in options.losses:
        branch = HeadTraining(copy.deepcopy(module), frozen, section, seed, decoder.dtype)
        branch.module.load_state_dict(begun[0])
        branch.optimizer.load(begun[1])
        branch.step = warm.step
        for index in order[options.warm_steps :]:
            branch.step += 1
            branch.fit(texts.batch(index, options.depths), loss, branch.factor)
        rows.append(_row(decoder, branch, held_out, kept, options, seed, loss))
    return rows


def _batches(texts: TrainingTexts, options: argparse.Namespace, seed: int) -> list[list[int]]:
    order: list[list[int]] = []
    while len(order) < options.warm_steps + options.steps:
        order += texts.batches(options.batch_tokens, 1000 * seed + len(order))
    return order[: options.warm_steps + options.steps]


def _row(
    decoder: Decoder, training: HeadTraining, held_out: TrainingTexts, kept: Sequence[Rollout],
    options: argparse.Namespace, seed: int, loss: str,
) -> dict[str, Any]:  # fmt: skip
    measured = training.evaluate(held_out, options.depths)
    if measured.accepted_share is None:
        raise UsageError(
            f"held-out texts are all too short for --depths {options.depths}; lower it, or give longer ones"
        )
    slope, bins = _against_entropy(measured)
    drafted, accepted = _generated(decoder, training, kept, options)
    row = {
        "seed": seed, "loss": loss, "accepted_share": measured.accepted_share, "acceptance_by_depth": measured.by_depth,
        "generated": {"drafted": drafted, "accepted": accepted, "acceptance_rate": accepted / max(1, drafted)},
        "entropy_slope": slope, "acceptance_by_entropy": bins,
    }  # fmt: skip
    depths = " ".join(f"{alpha:.3f}" for alpha in measured.by_depth)
    print(
        f"seed {seed}  {loss:<10}  by depth {depths}  share {measured.accepted_share:.4f}  "
        f"generated {accepted}/{drafted}  slope {slope:+.3f} a nat",
        flush=True,
    )
    return row


def _generated(
    decoder: Decoder, training: HeadTraining, kept: Sequence[Rollout], options: argparse.Namespace
) -> tuple[int, int]:
    """Drafted and accepted tokens of responses to the held-out prompts."""
    prompts = [r.token_ids[: r.prompt_tokens] for r in kept if r.prompt_tokens][: options.prompts]
    if not prompts:
        return 0, 0
    drafter = MTPDrafter(MTPDrafter.Options(max_tokens=options.depths), training.module.weights())
    generator = NativeGenerator(
        decoder, drafter=drafter, max_sequences=16, max_draft_tokens=options.depths, entropy=False
    )
    sampling = SamplingParams(temperature=1.0, max_new_tokens=options.new_tokens)
    for index, prompt in enumerate(prompts):
        generator.add(GroupRequest(index, np.array(prompt, np.int64), sampling, (index,)))
    while generator.has_work():
        generator.step()
    stats = generator.stats()
    return stats.drafted, stats.accepted


def _against_entropy(measured: HeldOut) -> tuple[float, list[dict[str, float]]]:
    """Slope of the chance of acceptance at depth 1 against the target's entropy, and means of stretches of it."""
    alphas, entropies = measured.alphas[:, 0].double().numpy(), measured.entropies[:, 0].double().numpy()
    slope = float(np.polyfit(entropies, alphas, 1)[0])
    parts = np.array_split(np.argsort(entropies, kind="stable"), min(_BINS, len(entropies)))
    means = [{"entropy": float(entropies[p].mean()), "acceptance": float(alphas[p].mean())} for p in parts]
    return slope, means


def _paired(rows: Sequence[dict[str, Any]], loss: str, against: str) -> dict[str, dict[str, float]]:
    """Differences seed by seed, in points."""

    def differences(value: str) -> list[float]:
        def of(name: str) -> dict[int, float]:
            found = {r["seed"]: msgspec.to_builtins(r) for r in rows if r["loss"] == name}
            return {
                s: r["generated"]["acceptance_rate"] if value == "generated" else r[value] for s, r in found.items()
            }

        ours, theirs = of(loss), of(against)
        return [100 * (ours[seed] - theirs[seed]) for seed in ours]

    return {value: spread(differences(value)) for value in ("accepted_share", "generated")}


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    pyplot = plots.pyplot()
    if pyplot is None:
        return

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for number, loss in enumerate(dict.fromkeys(row["loss"] for row in rows)):
        for row in (r for r in rows if r["loss"] == loss):
            bins = row["acceptance_by_entropy"]
            label = f"{loss} ({row['entropy_slope']:+.2f} a nat)" if row["seed"] == 0 else None
            axes.plot(
                [b["entropy"] for b in bins],
                [b["acceptance"] for b in bins],
                "o-",
                ms=3,
                color=f"C{number}",
                label=label,
            )
    axes.set_xlabel("entropy of the target (nats)")
    axes.set_ylabel("chance of acceptance at depth 1")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench drafter-training", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint directory")
    add("--texts", type=Path, nargs="+", required=True, help="rollouts.jsonl of train-drafter, or texts")
    add("--template", default="{text}", help="text of a .jsonl line; {field} is replaced")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for results.json and entropy.png")
    add("--losses", nargs="+", default=["ce", "e2e-tv"], help="the first is what the others are compared with")
    add("--seeds", type=at_least(1), default=3, metavar="N")
    add("--warm-steps", type=at_least(0), default=100, metavar="N")
    add("--steps", type=at_least(1), default=700, metavar="N", help="of each loss after the warm start")
    add("--optimizer", choices=["muon", "adamw"], default="muon")
    add("--matrix-learning-rate", type=float, default=0.1, help="of Muon")
    add("--learning-rate", type=float, default=1e-3, help="of AdamW")
    add("--batch-tokens", type=at_least(1), default=4096, metavar="N")
    add("--depths", type=at_least(1), default=3, metavar="K", help="drafted tokens")
    add("--held-out", type=at_least(1), default=64, metavar="N", help="texts")
    add("--prompts", type=at_least(1), default=64, metavar="N", help="held-out prompts that are answered")
    add("--new-tokens", type=at_least(1), default=160, metavar="N")
    add("--threads", type=at_least(0), default=0, metavar="N", help="0: torch's own choice")
    return parser
