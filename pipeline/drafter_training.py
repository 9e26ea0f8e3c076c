"""`rollahead train-drafter`: rollouts of a frozen policy, or texts, and a multi-token-prediction head trained on them.

Files of the folder: rollouts.jsonl (the policy's own, used again by the next call), mtp.safetensors (the head),
training.safetensors (what training goes on from), metrics.jsonl; drafter.toml and policy.json (`drafter_folder`).
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from drafters.mtp.data import PIECE, Rollout, TrainingTexts, load_rollouts, read_rollouts
from drafters.mtp.fitting import trainable_head
from drafters.mtp.head import FILE
from drafters.mtp.training import CHECKPOINT, DamagedCheckpoint, FrozenHead, HeadTraining, Progress, new_module
from drafters.registry import build
from pipeline.config import Config
from pipeline.config.check import check_against_model
from pipeline.drafter_folder import check_folder, claim, usable
from pipeline.durable import write_durably
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.chat import chat_template
from pipeline.models.checkpoint import load_decoder
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import Decoder
from pipeline.models.tokenizer import Tokenizer
from pipeline.stop import INTERRUPTED, StopSignal
from pipeline.tasks import Task, load_task
from pipeline.tasks.prompts import PromptOrder, check_prompts, rollout_sampling, sample_seed
from pipeline.telemetry.metrics import cut_back

ROLLOUTS, METRICS = "rollouts.jsonl", "metrics.jsonl"


def train_drafter(config: Config) -> int:
    """Trains to the end; returns the exit code.

    Raises:
        UsageError: no model, texts or head that can be used, or the folder holds another training.
        RunFailed: training diverged.
    """
    known = check_training(config)
    folder, out = Path(config.model.path), Path(config.run.out)
    decoder = load_decoder(folder, config.engine.dtype, config.engine.device)
    tokenizer = Tokenizer(folder)
    stop, console = StopSignal(), Console(file=sys.stderr)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    training = _training(config, decoder)
    resumed = _resumed(training, out)
    if known is None:
        claim(out, config)  # what is generated belongs to this configuration
        known = _generate(config, decoder, tokenizer, out, console, stop)
    if stop.requested:
        return INTERRUPTED
    held_out, rest = _split(known, config.drafter.held_out)
    _say(console, f"hidden states of {len(known)} texts")
    with usable(out):
        out.mkdir(parents=True, exist_ok=True)
    texts, measured = TrainingTexts(decoder, rest, out), TrainingTexts(decoder, held_out, out)
    claim(out, config)
    _say(console, f"{'going on at' if resumed else 'training from'} step {training.step}, {texts.tokens:,} tokens")
    with _View(console, out / METRICS, config.drafter.steps, training.step) as view:

        def on_step(progress: Progress) -> bool:
            view.show(progress)
            return not stop.requested

        if training.step < config.drafter.steps:
            training.run(texts, measured, on_step, lambda: training.save(out, decoder.dtype))
    if stop.requested:
        return INTERRUPTED
    _say(console, f'{out / FILE} is the head; use it with engine.drafter = {{name = "mtp", path = "{out}"}}')
    return 0


def check_training(config: Config) -> list[Rollout] | None:
    """Refuses what can be refused without the model's weights; nothing is written.

    Returns:
        The texts to train on; None where the policy is to generate them.

    Raises:
        UsageError: as `train_drafter`.
    """
    if not config.model.path:
        raise UsageError("train-drafter needs model.path, the policy's checkpoint directory; give --set model.path=DIR")
    folder, out, section = Path(config.model.path), Path(config.run.out), config.drafter
    model, tokenizer = ModelConfig.from_folder(folder), Tokenizer(folder)
    trainable_head(section.start, folder, model)
    check_folder(out, config)
    known: list[Rollout] | None = None
    if section.texts:
        files = [Path(file) for file in section.texts]
        known = read_rollouts(files, tokenizer, section.template, model.vocab_size)
    elif (out / ROLLOUTS).exists():
        known = _kept_rollouts(out / ROLLOUTS, section.rollouts, model.vocab_size)
    else:
        _prompts(config, model.max_positions, tokenizer)
        build(config.engine.drafter)
    if (count := section.rollouts if known is None else len(known)) <= section.held_out:
        remedy = "give more or longer texts" if section.texts else "raise drafter.rollouts"
        cut = f" (a text file is cut into pieces of up to {PIECE} tokens)" if section.texts else ""
        raise UsageError(
            f"{count} {'texts are' if count > 1 else 'text is'} not more than drafter.held_out = {section.held_out}; "
            f"{'lower it, or ' if count > 1 else ''}{remedy}{cut}"
        )
    return known


def own_rollouts(
    config: Config, decoder: Decoder, tokenizer: Tokenizer, stop: StopSignal | None, console: Console
) -> list[Rollout]:
    """`drafter.rollouts` responses of the policy to the task's prompts, in their training order, one a prompt."""
    task, usable, sampling = _prompts(config, decoder.config.max_positions, tokenizer)
    order = PromptOrder(len(usable), config.run.seed)
    generator = NativeGenerator(
        decoder, drafter=build(config.engine.drafter), max_sequences=config.engine.max_sequences,
        max_draft_tokens=config.engine.max_draft_tokens, kv_bytes=config.engine.kv_bytes, entropy=False,
        max_length=config.sampling.max_prompt_tokens + config.sampling.max_new_tokens, tokenizer=tokenizer,
    )  # fmt: skip
    prompts: dict[int, list[int]] = {}
    for index in range(config.drafter.rollouts):
        epoch, number = order(index)
        prompts[index] = tokenizer.encode(task.train[usable[number]].prompt)
        seed = sample_seed(config.run.seed, epoch, index, 0)
        generator.add(GroupRequest(index, np.array(prompts[index], np.int64), sampling, (seed,)))
    found: dict[int, Rollout] = {}
    with _bar(console, "rollouts", len(prompts)) as bar:
        while generator.has_work() and not (stop is not None and stop.requested):
            for sample in generator.step():
                prompt = prompts[sample.group]
                found[sample.group] = Rollout([*prompt, *sample.token_ids.tolist()], len(prompt))
            bar.update(bar.task_ids[0], completed=len(found))
    return [found[index] for index in sorted(found)]


def _prompts(config: Config, positions: int, tokenizer: Tokenizer) -> tuple[Task, Sequence[int], SamplingParams]:
    """Of the policy's own rollouts: the task, indices of the prompts that can be used, and how they are sampled."""
    sampling = rollout_sampling(config.sampling, tokenizer.eos_token_ids)
    check_against_model(config, positions)
    task = load_task(config.task, config.run.seed, chat_template(config.model.path))
    limit = config.sampling.max_prompt_tokens
    return task, check_prompts(task, tokenizer.encode, limit, config.task.long_prompts), sampling


def _kept_rollouts(path: Path, count: int, vocabulary: int) -> list[Rollout]:
    """What was generated before, all of it."""
    kept = load_rollouts(path, vocabulary, "delete it to generate new ones")
    if len(kept) < count:
        raise UsageError(
            f"{path} holds {len(kept)} texts where drafter.rollouts = {count}; delete it to generate new ones, or name "
            "it in drafter.texts with another --out"
        )
    return kept


def _generate(
    config: Config, decoder: Decoder, tokenizer: Tokenizer, out: Path, console: Console, stop: StopSignal
) -> list[Rollout]:
    path, began = out / ROLLOUTS, time.monotonic()
    rollouts = own_rollouts(config, decoder, tokenizer, stop, console)
    if not stop.requested:
        write_durably(path, msgspec.json.Encoder().encode_lines(rollouts))
        tokens = sum(len(r.token_ids) - r.prompt_tokens for r in rollouts)
        _say(console, f"{len(rollouts)} responses of {tokens:,} tokens in {time.monotonic() - began:.0f} s ({path})")
    return rollouts


def _split(rollouts: list[Rollout], held_out: int) -> tuple[list[Rollout], list[Rollout]]:
    """Held-out texts, spread over all, and the rest."""
    chosen = set(np.linspace(0, len(rollouts) - 1, held_out).astype(int).tolist())
    return [r for i, r in enumerate(rollouts) if i in chosen], [r for i, r in enumerate(rollouts) if i not in chosen]


def _training(config: Config, decoder: Decoder) -> HeadTraining:
    section = config.drafter
    files = trainable_head(section.start, Path(config.model.path), decoder.config)
    compute = _compute_dtype(section.dtype)
    tensors = {name: tensor.float() for name, tensor in decoder.tensors().items()}
    module = new_module(decoder.config, tensors, files, config.run.seed).to(decoder.device)
    return HeadTraining(module, FrozenHead.of(decoder, tensors, compute), section, config.run.seed, compute)


def _resumed(training: HeadTraining, out: Path) -> bool:
    try:
        with usable(out):
            return training.resume(out)
    except DamagedCheckpoint as error:
        raise UsageError(f"{out / CHECKPOINT} is damaged ({error}); delete it to train from the beginning") from error


def _compute_dtype(name: str) -> torch.dtype:
    capabilities = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or any(capabilities.get(n) for n in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and fast) else torch.float32


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _bar(console: Console, name: str, total: int) -> Bar:
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    bar = Bar(*columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), console=console, transient=True,
              disable=not console.is_terminal)  # fmt: skip
    bar.add_task(name, total=total, note="")
    return bar


@dataclass
class _View:
    """A bar on a terminal, a line a measurement elsewhere, and metrics.jsonl."""

    console: Console
    metrics: Path
    steps: int
    done: int

    def __enter__(self) -> "_View":
        # what a training that went on from its checkpoint does again is not there twice
        cut_back(self.metrics, self.done)
        self._file = self.metrics.open("ab")
        self._bar = _bar(self.console, "training", self.steps)
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._file.close()

    def show(self, now: Progress) -> None:
        row: dict[str, Any] = {
            "step": now.step, "loss": now.loss, "objective": now.objective, "acceptance_by_depth": now.alphas,
            "learning_rate": now.learning_rate, "seconds": now.seconds,
        }  # fmt: skip
        if now.held_out is not None:
            measured = now.held_out
            row["held_out_by_depth"] = measured.by_depth
            depths = " ".join(f"{alpha:.3f}" for alpha in measured.by_depth)
            note = f"held-out acceptance by depth {depths}"
            if (share := measured.accepted_share) is not None:
                row["held_out_accepted_share"] = share
                note += f", {share:.3f} of drafted tokens"
            self._bar.update(self._bar.task_ids[0], note=f"accepted {depths}")
            if not self.console.is_terminal:
                _say(
                    self.console,
                    f"step {now.step}/{self.steps}  {now.objective} {now.loss:.4f}  {note}  {now.seconds:.0f} s",
                )
        self._bar.update(self._bar.task_ids[0], completed=now.step)
        self._file.write(msgspec.json.encode(row) + b"\n")
        self._file.flush()
