"""The embedded model's warm start: supervised training on worked answers, ended while there is much left to learn.

First it learns from right answers until it can add; then from answers with slips, until samples at temperature 1 earn
no more than `model.warm_start_reward` on held-out prompts. So reinforcement learning starts from a policy that knows
the steps and is unreliable at them, as one is that learnt from what people wrote. The result is kept in the user's
cache folder under a digest of everything it depends on.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import torch
from msgspec import Struct
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from learner.answers import AnswerSampler, ProbeSet, training_batch
from learner.embedded import Architecture, build_model, build_tokenizer, cache_folder, save_model
from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.tasks.arithmetic import ArithmeticTask
from pipeline.tasks.prompts import mix64

RECORD = "warm_start.json"
_MAX_THREADS = 8
_FINAL_LOSS = 0.08
"""Nats a character at about the usual target; only the progress bar uses it."""
_ADDING_SHARE = 0.85
"""of the time limit, at most, goes to learning to add"""
_POLL_SECONDS = 0.5


class Recipe(Struct, kw_only=True, frozen=True):
    """Everything the weights depend on beside the machine."""

    digits: int
    operands: int
    seed: int
    target_reward: float
    time_limit: float
    """seconds of computing"""
    architecture: Architecture = Architecture()
    competent_reward: float = 0.6
    """at which it can add, and begins to learn from answers with slips"""
    slip_rate: float = 0.5
    """share of wrong columns in those answers"""
    slip_learning_rate: float = 3e-4
    slip_probe_every: int = 3
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 30
    beta2: float = 0.98
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    probe_prompts: int = 256
    probe_every: int = 15
    probe_below_loss: float = 5.0
    """nats an answer; a probe before that costs time and finds nothing"""
    max_steps: int = 1 << 30
    revision: int = 3
    """raised when the code changes what comes out"""

    @staticmethod
    def from_config(config: Config) -> "Recipe":
        return Recipe(
            digits=config.task.digits,
            operands=config.task.operands,
            seed=config.run.seed,
            target_reward=config.model.warm_start_reward,
            time_limit=config.model.warm_start_seconds,
        )

    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class WarmStartProgress:
    """Where the warm start is, once a step; the last one has fraction 1."""

    fraction: float
    """of the way, an estimate in [0, 1] that never falls"""
    step: int
    loss: float
    """nats a character of the answers, smoothed"""
    reward: float
    """mean on the probe prompts at temperature 1 when last measured; 0 before"""
    seconds: float
    message: str = ""
    """one sentence for the user, where there is something to say"""


OnProgress = Callable[[WarmStartProgress], None]


class WarmStartRecord(Struct, kw_only=True, frozen=True):
    """warm_start.json beside the weights."""

    recipe: Recipe
    steps: int
    loss: float
    reward: float
    seconds: float
    reached: bool
    """whether the reward came near the target, from above, before the time limit"""
    curve: list[tuple[int, float, float, float]]
    """(step, seconds, loss, reward) of every probe"""


def ensure_embedded_model(config: Config, on_progress: OnProgress) -> Path:
    """The embedded model's checkpoint directory, trained first if the cache has none.

    `on_progress` is called once a step and may raise to abandon the warm start; the cache is then as it was.

    Raises:
        UsageError: the cache folder cannot be written.
    """
    return ensure_model(Recipe.from_config(config), on_progress, config.learner.threads)


def ensure_model(recipe: Recipe, on_progress: OnProgress, threads: int = 0) -> Path:
    """As `ensure_embedded_model`, for any recipe; `threads` torch threads, 0 for all cores."""
    root = cache_folder()
    folder = root / recipe.digest()
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f"{folder.name}.lock").open("w")
    with lock:
        _wait_for(lock, on_progress)
        if not (folder / RECORD).exists():
            _train_into(folder, recipe, on_progress, threads)
    on_progress(_closing(folder))
    return folder


def _train_into(folder: Path, recipe: Recipe, on_progress: OnProgress, threads: int) -> None:
    """Train, save beside `folder` and rename, so that a folder of that name is always whole."""
    with _threads(threads), torch.random.fork_rng(devices=[]):
        model, record = WarmStart(recipe).run(on_progress)
    with _writing(folder.parent), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        unnamed = Path(temporary) / "model"
        save_model(model, unnamed)
        (unnamed / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        os.rename(unnamed, folder)


class WarmStart:
    """One supervised training from fresh weights."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(mix64(recipe.seed) >> 1)
        self._recipe = recipe
        self._task = ArithmeticTask(recipe.digits, recipe.operands, recipe.seed)
        self._tokenizer = build_tokenizer()
        self._model = build_model(recipe.architecture)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
        )
        self._probe = ProbeSet(self._task, self._tokenizer, recipe.probe_prompts)
        self._sampler = AnswerSampler(self._model, bfloat16=computes_in_bfloat16())
        self._first_loss = self._loss = self._reward = self._fraction = self._began = self._began_computing = 0.0
        self._step = 0
        self._curve: list[tuple[int, float, float, float]] = []

    def run(self, on_progress: OnProgress) -> tuple[Qwen3ForCausalLM, WarmStartRecord]:
        """Learn to add, then learn to slip; each ends by its reward, both by the time limit or the last step."""
        recipe, self._on_progress = self._recipe, on_progress
        self._began, self._began_computing = time.perf_counter(), time.process_time()
        self._train(
            recipe.competent_reward, lambda reward: reward >= recipe.competent_reward, recipe.probe_every, False
        )
        if self._reward > recipe.target_reward:
            self._train(
                recipe.target_reward, lambda reward: reward <= recipe.target_reward, recipe.slip_probe_every, True
            )
        if not self._curve or self._curve[-1][0] != self._step:
            self._measure()
        record = WarmStartRecord(
            recipe=recipe, steps=self._step, loss=self._loss, reward=self._reward, seconds=self._seconds(),
            reached=self._reward >= recipe.target_reward / 2, curve=self._curve,
        )  # fmt: skip
        return self._model, record

    def _train(self, goal: float, done: Callable[[float], bool], probe_every: int, slips: bool) -> None:
        """One phase, until a probe of the reward says it is done."""
        recipe = self._recipe
        limit = recipe.time_limit * (1.0 if slips else _ADDING_SHARE)
        while self._step < recipe.max_steps and self._computing() < limit:
            self._step += 1
            latest = self._train_step(slips)
            self._loss = latest if self._step == 1 else self._loss + 0.1 * (latest - self._loss)
            self._first_loss = self._first_loss or self._loss
            promising = slips or self._loss * self._probe.answer_length < recipe.probe_below_loss
            if self._step % probe_every == 0 and promising:
                self._measure()
                if done(self._reward):
                    break
            self._report(goal, slips)

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _computing(self) -> float:
        """Seconds for the time limit: what other programs take of a busy machine does not count, up to three quarters
        of the time that passes."""
        own = (time.process_time() - self._began_computing) / torch.get_num_threads()
        return max(own, self._seconds() / 4)

    def _measure(self) -> None:
        generator = torch.Generator().manual_seed(mix64(self._recipe.seed, self._step) >> 1)
        self._reward = self._probe.reward(self._sampler, generator)
        self._curve.append((self._step, self._seconds(), self._loss, self._reward))

    def _report(self, goal: float, slips: bool) -> None:
        """The bar: most of it is learning to add, guessed from loss, reward and time."""
        recipe = self._recipe
        if slips:
            now = 0.95
        else:
            fallen = torch.tensor([self._first_loss / max(self._loss, 1e-9), self._first_loss / _FINAL_LOSS]).log()
            by_loss = (fallen[0] / fallen[1]).clamp(0, 1).item() if self._first_loss > _FINAL_LOSS else 0.0
            now = 0.9 * min(1.0, max(by_loss, self._reward / goal, self._computing() / recipe.time_limit))
        self._fraction = max(self._fraction, now)
        self._on_progress(WarmStartProgress(self._fraction, self._step, self._loss, self._reward, self._seconds()))

    def _train_step(self, slips: bool) -> float:
        """One AdamW step on the answers' cross-entropy (nats a character), which it returns."""
        recipe = self._recipe
        rate = recipe.slip_learning_rate if slips else recipe.learning_rate
        for group in self._optimizer.param_groups:
            group["lr"] = rate * min(1.0, self._step / recipe.warmup_steps)
        first = (self._step - 1) * recipe.batch_size
        examples = [self._task.train[first + offset] for offset in range(recipe.batch_size)]
        slip_rate = recipe.slip_rate if slips else 0.0
        ids_BT, targets_BT = training_batch(examples, self._tokenizer, slip_rate, recipe.seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16()):
            logits_BTV = self._model(input_ids=ids_BT, use_cache=False).logits
        loss = functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), recipe.max_grad_norm)
        self._optimizer.step()
        return loss.item()


def computes_in_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware; emulated, they are slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _closing(folder: Path) -> WarmStartProgress:
    record = msgspec.json.decode((folder / RECORD).read_bytes(), type=WarmStartRecord)
    message = f"embedded model: reward {record.reward:.2f} after {record.steps} supervised steps ({folder})"
    if not record.reached:
        message = (
            f"the warm start ended at reward {record.reward:.2f}, far from model.warm_start_reward = "
            f"{record.recipe.target_reward:g}, after {record.seconds:.0f} s; it is used as it is: "
            f"to train it anew, raise model.warm_start_seconds, or delete {str(folder)!r} when the machine is less busy"
        )
    return WarmStartProgress(1.0, record.steps, record.loss, record.reward, record.seconds, message)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the embedded model cannot be kept in {str(root)!r} ({error.strerror or error}); "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error


def _wait_for(lock: IO[str], on_progress: OnProgress) -> None:
    """Take the lock, held until the file is closed: two processes that want the same model train it once."""
    began = time.perf_counter()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.perf_counter() - began
            on_progress(WarmStartProgress(0.0, 0, 0.0, 0.0, waited, "waiting for another process's warm start"))
            time.sleep(_POLL_SECONDS)


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """As many torch threads as asked for; else all cores, because nothing else of the run computes yet."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    torch.set_num_threads(wanted or min(cores, _MAX_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
