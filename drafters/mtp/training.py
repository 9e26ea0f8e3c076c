"""Fitting a head to a frozen policy."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from drafters.mtp.data import Batch, TrainingTexts
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
        return [float(self.alphas[:, d][self.valid[:, d]].mean()) for d in range(self.alphas.shape[1])]

    @property
    def accepted_share(self) -> float:
        """Expected accepted tokens over drafted ones, of positions where the whole draft is in the text."""
        return float(expected_accepted(self.alphas[self.valid.all(-1)]).mean())


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
    """mean chance of acceptance by depth, in the step's batch"""
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
        """Trains to the last step, `section.seconds`, or until `on_step` returns False; `save` is called now and then.

        Raises:
            RunFailed: the loss is no number.
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
            if self.step % section.checkpoint_every == 0 or last:
                save()
            if not on_step(progress) or last:
                return

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
        by depth.

        Raises:
            RunFailed: the loss is no number.
        """
        batch = batch.to(self.device)
        with self._autocast():
            loss, alphas, _ = batch_backward(
                self.module, self.frozen, batch, Objective(name, self.section.depth_decay), self.section.depths
            )
        if not math.isfinite(loss):
            raise RunFailed(f"the draft head's loss is {loss} at step {self.step}; lower its learning rate")
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.section.max_grad_norm)
        self.optimizer.step(factor)
        return loss, (alphas.sum(0) / batch.valid.sum(0).clamp_min(1)).tolist()

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
        """Of the learning rates in the step under way: linear warm-up over 3% of the steps, then a cosine to a tenth."""
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
        """On texts that are not trained on, to `depths`; 0: as trained."""
        depths = depths or self.section.depths
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        with self._autocast():
            for chosen in texts.batches(self.section.batch_tokens, 0):
                batch = texts.batch(chosen, depths).to(self.device)
                _, alphas, entropies = batch_backward(
                    self.module, self.frozen, batch, Objective("tv"), depths, backward=False
                )
                parts.append((alphas, entropies, batch.valid))
        return HeldOut(*(torch.cat(column) for column in zip(*parts, strict=True)))

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """The head, in the policy's type, and what training goes on from; each file is whole or the one before."""
        weights = self.module.weights()
        replace_tensors({name: w.to(dtype).contiguous() for name, w in weights.items()}, folder / FILE)
        state = {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        state |= {_MOMENTS + name: value for name, value in self.optimizer.moments().items()}
        replace_tensors(weights | state, folder / CHECKPOINT)

    def resume(self, folder: Path) -> bool:
        """Goes on from a checkpoint, if there is one.

        Raises:
            SafetensorError: it is damaged; nothing has changed.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return False
        tensors = load_file(path)
        self.step, self.seconds = int(tensors["step"]), float(tensors["seconds"])
        self.module.load_weights(tensors)
        self.optimizer.load({n.removeprefix(_MOMENTS): t for n, t in tensors.items() if n.startswith(_MOMENTS)})
        return True


def new_module(config: ModelConfig, tensors: dict[str, Tensor], start: Sequence[Path], seed: int) -> MTPModule:
    """The head to begin with: of the files `start`, or one made of the last layer among the target's `tensors`."""
    module = MTPModule(config)
    if start:
        module.load_weights({name: tensor.float() for name, tensor in head_tensors(start).items()})
    else:
        module.start_from(tensors, torch.Generator().manual_seed(seed))
    return module
