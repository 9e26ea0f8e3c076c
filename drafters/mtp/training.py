"""Fitting a head to a frozen policy."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from drafters.mtp.data import Batch, TrainingTexts
from drafters.mtp.fitting import misfit
from drafters.mtp.head import FILE, head_tensors
from drafters.mtp.losses import NEEDS_WARM_UP, Objective, expected_accepted
from drafters.mtp.module import MTPModule
from drafters.mtp.optimizer import HeadOptimizer
from pipeline.config.types import DrafterSection
from pipeline.errors import RunFailed
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import Decoder
from pipeline.weights.filesystem import replace_tensors

CHECKPOINT = "training.safetensors"
_MOMENTS = "optimizer."
"""before the names of moments among its tensors"""
_ELEMENTS = 1 << 22
"""logits computed at once; rows are taken in parts of so many"""
_LOWER = "lower drafter.matrix_learning_rate and drafter.learning_rate, in co-training drafter.co_learning_rate"


class DamagedCheckpoint(Exception):
    """A file that training cannot go on from; the text says why."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How drafts of K tokens do on texts that are not trained on, at temperature 1, by teacher forcing."""

    alphas: Tensor
    """[N, K], chance of acceptance of each depth given the text up to it"""
    entropies: Tensor
    """[N, K], of the target there, in nats"""
    valid: Tensor
    """bool [N, K]"""

    @property
    def by_depth(self) -> list[float]:
        """Mean chance of acceptance, of as many depths as the texts reach."""
        reached = int(self.valid.any(0).sum())
        return [float(self.alphas[:, d][self.valid[:, d]].mean()) for d in range(reached)]

    @property
    def accepted_share(self) -> float | None:
        """Expected accepted tokens over drafted ones, of positions where the whole draft is in the text; None where
        there is no such position."""
        whole = self.valid.all(-1)
        return float(expected_accepted(self.alphas[whole]).mean()) if whole.any() else None


class FrozenHead:
    """What training takes of the policy: embedding and output head."""

    def __init__(self, embedding: Tensor, head: Tensor) -> None:
        """
        Args:
            embedding: [V, H]
            head: [V, H]
        """
        self.embedding, self.head = embedding, head

    @staticmethod
    def of(target: Decoder, tensors: dict[str, Tensor], dtype: torch.dtype) -> "FrozenHead":
        name = "model.embed_tokens.weight" if target.config.tied_head else "lm_head.weight"
        return FrozenHead(target.embedding.float(), tensors[name].to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.head.dtype), self.head)


def batch_backward(
    module: MTPModule, frozen: FrozenHead, batch: Batch, objective: Objective, depths: int, backward: bool = True
) -> tuple[float, Tensor, Tensor]:
    """One batch, with gradients of the mean loss where `backward`.

    Logits exist for a part of the rows at a time: gradients with respect to h' are gathered first, and go through the
    head in one pass.

    Returns:
        The loss, alphas [N, K] and the target's entropies [N, K].
    """
    embedded = frozen.embedding[batch.tokens[:, 1:]]
    outputs = [h.flatten(0, 1) for h in module(embedded, batch.hidden[:, :-1], depths)]
    leaves = [h.detach().requires_grad_(backward) for h in outputs]
    length = batch.tokens.shape[1]
    # rows count places of texts of T tokens; the head's outputs have T - 1 rows a text
    place = batch.rows - batch.rows // length
    hidden, tokens = batch.hidden.flatten(0, 1), batch.tokens.flatten()
    counts = batch.valid.float().sum(0)
    loss, alphas, entropies = 0.0, [], []
    part = max(1, _ELEMENTS // frozen.head.shape[0])
    for begin in range(0, len(batch.rows), part):
        rows, valid = batch.rows[begin : begin + part], batch.valid[begin : begin + part]
        ahead = [(rows + d + 1).clamp_max(len(tokens) - 2) for d in range(depths)]
        with torch.no_grad():  # neighbours' drafts are over the same places
            places, which = torch.stack(ahead).unique(return_inverse=True)
            log_p = F.log_softmax(frozen.logits(hidden[places]).float(), -1)
            laws = log_p.exp()
            entropies.append(-(laws * log_p).sum(-1)[which.T])
            p = [laws[index] for index in which]
        own = place[begin : begin + part]
        logits = [frozen.logits(leaf[own]) for leaf in leaves]
        value, alpha = objective(logits, p, [tokens[at + 1] for at in ahead], valid, counts)
        if backward:
            value.backward()
        loss += float(value.detach())
        alphas.append(alpha)
    if backward:
        used = [(h, leaf.grad) for h, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([h for h, _ in used], [g for _, g in used])
    return loss, torch.cat(alphas), torch.cat(entropies)


@dataclass(frozen=True, slots=True)
class Progress:
    """After a step."""

    step: int
    loss: float
    objective: str
    alphas: list[float]
    """mean chance of acceptance by depth, in the step's batch, of as many depths as its texts reach"""
    learning_rate: float
    seconds: float
    """of training, over all runs of it"""
    held_out: HeldOut | None = None


@dataclass
class HeadTraining:
    """A head, its optimizer and where it stands."""

    module: MTPModule
    frozen: FrozenHead
    section: DrafterSection
    seed: int
    compute: torch.dtype
    """of the head's matrix products"""
    step: int = 0
    seconds: float = 0.0
    optimizer: HeadOptimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = HeadOptimizer(self.module, self.section)

    @property
    def device(self) -> torch.device:
        """Where the head is, and batches are taken to."""
        return next(self.module.parameters()).device

    def run(
        self,
        texts: TrainingTexts,
        held_out: TrainingTexts,
        on_step: Callable[[Progress], bool],
        save: Callable[[], None],
    ) -> None:
        """Trains to the last step, `section.seconds`, or until `on_step` returns False; `save` is called now and then,
        and at the end, with a head that can be trained further.

        Raises:
            RunFailed: training diverged.
        """
        section = self.section
        for batch in self._batches(texts):
            began = time.perf_counter()
            self.step += 1
            name = self.objective
            loss, alphas = self.fit(batch, name, self.factor)
            self.seconds += time.perf_counter() - began
            last = self.step >= section.steps or 0 < section.seconds <= self.seconds
            evaluate = last or self.step % section.eval_every == 0
            progress = Progress(
                self.step, loss, name, alphas, self.factor * self._learning_rate, self.seconds,
                self.evaluate(held_out) if evaluate else None,
            )  # fmt: skip
            ends = not on_step(progress) or last
            if ends or self.step % section.checkpoint_every == 0:
                self._check(held_out)
                save()
            if ends:
                return

    def _check(self, texts: TrainingTexts) -> None:
        """A batch's loss and gradients are numbers: weights can be finite and too large to go on from.

        Raises:
            RunFailed: they are not.
        """
        chosen = next(texts.batches(self.section.batch_tokens, 0))
        self._backward(texts.batch(chosen, self.section.depths).to(self.device), self.objective)
        self.module.zero_grad()

    def _batches(self, texts: TrainingTexts) -> Iterator[Batch]:
        """From the next step on, as if there had been no interruption."""
        done, epoch = 0, 0
        while True:
            for chosen in texts.batches(self.section.batch_tokens, self.seed + epoch):
                if done >= self.step:
                    yield texts.batch(chosen, self.section.depths)
                done += 1
            epoch += 1

    def fit(self, batch: Batch, name: str, factor: float = 1.0) -> tuple[float, list[float]]:
        """One optimiser step, at `factor` times the section's learning rates; the loss, and mean chances of acceptance
        of as many depths as the batch's texts reach.

        Raises:
            RunFailed: the loss or the gradient is no number; the step is not taken.
        """
        batch = batch.to(self.device)
        loss, alphas = self._backward(batch, name)
        self.optimizer.step(factor)
        counts = batch.valid.sum(0)
        return loss, (alphas.sum(0) / counts)[counts > 0].tolist()

    def _backward(self, batch: Batch, name: str) -> tuple[float, Tensor]:
        """Clipped gradients of the loss; the loss and alphas [N, K].

        Raises:
            RunFailed: the loss or the gradient is no number.
        """
        with self._autocast():
            loss, alphas, _ = batch_backward(
                self.module, self.frozen, batch, Objective(name, self.section.depth_decay), self.section.depths
            )
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.section.max_grad_norm))
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise RunFailed(f"the draft head's {what} is {value} at step {self.step}; {_LOWER}")
        return loss, alphas

    @property
    def objective(self) -> str:
        """The loss of the step under way."""
        section = self.section
        warm = section.loss in NEEDS_WARM_UP and self.step <= section.warm_up * section.steps
        return section.warm_up_loss if warm else section.loss

    @property
    def _learning_rate(self) -> float:
        """What is told of the learning rates: that of the matrices."""
        section = self.section
        return section.matrix_learning_rate if section.optimizer == "muon" else section.learning_rate

    @property
    def factor(self) -> float:
        """Of the learning rates in the step under way: linear warm-up over 3% of the steps, then a cosine to a tenth"""
        total, warm = self.section.steps, max(1, round(0.03 * self.section.steps))
        if self.step <= warm:
            return self.step / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (self.step - warm) / max(1, total - warm)))

    def _autocast(self) -> Any:
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.frozen.head.device.type, self.compute)

    @torch.no_grad()
    def evaluate(self, texts: TrainingTexts, depths: int = 0) -> HeldOut:
        """On texts that are not trained on, to `depths`; 0: as trained.

        Raises:
            RunFailed: what the head drafts is no distribution.
        """
        depths = depths or self.section.depths
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        with self._autocast():
            for chosen in texts.batches(self.section.batch_tokens, 0):
                batch = texts.batch(chosen, depths).to(self.device)
                _, alphas, entropies = batch_backward(
                    self.module, self.frozen, batch, Objective("tv"), depths, backward=False
                )
                parts.append((alphas, entropies, batch.valid))
        measured = HeldOut(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if not measured.alphas.isfinite().all():
            raise RunFailed(f"the draft head's acceptance is no number at step {self.step}; {_LOWER}")
        return measured

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """The head, in the policy's type, and what training goes on from; each file is whole or the one before.

        Raises:
            RunFailed: a value is not finite; nothing is written.
            OSError: a file cannot be written.
        """
        weights = self.module.weights()
        head = {name: w.to(dtype).contiguous() for name, w in weights.items()}
        state = {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        state |= {_MOMENTS + name: value for name, value in self.optimizer.moments().items()}
        if name := _not_finite(head) or _not_finite(state):
            raise RunFailed(f"the draft head's {name} is not finite at step {self.step}; {_LOWER}")
        replace_tensors(head, folder / FILE)
        replace_tensors(weights | state, folder / CHECKPOINT)

    def resume(self, folder: Path) -> bool:
        """Goes on from a checkpoint, if there is one.

        Raises:
            DamagedCheckpoint: it is not one of this head and optimizer; nothing has changed.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return False
        tensors = self._read(path)
        self.step, self.seconds = int(tensors["step"]), float(tensors["seconds"])
        self.module.load_weights(tensors)
        self.optimizer.load({n.removeprefix(_MOMENTS): t for n, t in tensors.items() if n.startswith(_MOMENTS)})
        return True

    def _read(self, path: Path) -> dict[str, Tensor]:
        """A checkpoint's tensors.

        Raises:
            DamagedCheckpoint: the file is cut off, one is missing, too much, of another shape, or not finite.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise DamagedCheckpoint(str(error)) from error
        wanted: dict[str, tuple[int, ...]] = {"step": (), "seconds": ()}
        wanted |= {name: tuple(w.shape) for name, w in self.module.weights().items()}
        if "step" not in tensors or tensors["step"].any():  # before the first step there are no moments
            wanted |= {_MOMENTS + name: shape for name, shape in self.optimizer.shapes().items()}
        if wrong := misfit({name: tuple(t.shape) for name, t in tensors.items()}, wanted):
            raise DamagedCheckpoint(wrong)
        if name := _not_finite(tensors):
            raise DamagedCheckpoint(f"{name} is not finite")
        return tensors


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The first tensor's name that holds what is no finite number; empty: none does."""
    return next((name for name, t in tensors.items() if not t.float().isfinite().all()), "")


def new_module(config: ModelConfig, tensors: dict[str, Tensor], start: Sequence[Path], seed: int) -> MTPModule:
    """The head to begin with: of the files `start`, or one made of the last layer among the target's `tensors`."""
    module = MTPModule(config)
    if start:
        module.load_weights({name: tensor.float() for name, tensor in head_tensors(start).items()})
    else:
        module.start_from(tensors, torch.Generator().manual_seed(seed))
    return module
