"""The draft head of the run, trained on fresh rollouts beside the policy and published with it.

Nothing of it reaches the policy: hidden states are computed without a gradient, embedding and output head are read as
constants, and the head has an optimizer of its own. The policy it learns is the one that is published next.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import PreTrainedModel

from drafters.mtp.data import Batch, padded_batch
from drafters.mtp.fitting import trainable_head
from drafters.mtp.training import DamagedCheckpoint, FrozenHead, HeadTraining, new_module
from learner.attention import segment_arguments
from learner.policy import policy_state
from learner.step_metrics import Metrics
from pipeline.config import Config
from pipeline.config.types import DrafterSection
from pipeline.durable import sync
from pipeline.errors import UsageError
from pipeline.messages import Trajectory
from pipeline.models.config import ModelConfig


class HeadCoTraining:
    """Trains a head on a part of every batch."""

    def __init__(
        self, model: PreTrainedModel, config: ModelConfig, section: DrafterSection, start: Sequence[Path], seed: int,
        compute: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """
        Args:
            model: the policy, which is read and never changed.
            config: of the policy.
            section: of the configuration; its steps are batches of the run, of which `warm_up` is a part.
            start: files of the head to begin with, which fits; none: one made of the policy's last layer.
            seed: of its random part.
            compute: type of matrix products.
        """
        self._model, self._section, self._compute = model, section, compute
        state = {} if start else {name: t.float().cpu() for name, t in policy_state(model).items()}
        module = new_module(config, state, start, seed).to(model.device)
        own = msgspec.structs.replace(section, optimizer="adamw", learning_rate=section.co_learning_rate)
        self.training = HeadTraining(module, self._frozen(), own, seed, compute)

    @staticmethod
    def from_config(config: Config, model: PreTrainedModel, folder: Path) -> "HeadCoTraining | None":
        """None where `drafter.co_train` is off.

        Raises:
            UsageError: no head that fits and can be trained, or the policy is divided among several ranks.
        """
        section = config.drafter
        if not section.co_train:
            return None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("drafter.co_train = true needs a learner of one rank; start it without torchrun")
        of_policy = ModelConfig.from_folder(folder)
        start = trainable_head(section.start, folder, of_policy)
        compute = torch.bfloat16 if config.learner.dtype == "bfloat16" else torch.float32
        section = msgspec.structs.replace(section, steps=config.run.steps)
        return HeadCoTraining(model, of_policy, section, start, config.run.seed, compute)

    def train(self, groups: Sequence[Sequence[Trajectory]]) -> Metrics:
        """One optimiser step on up to `drafter.batch_tokens` tokens of a batch; its loss and chances of acceptance."""
        batch = self._batch([sample for group in groups for sample in group])
        if batch is None or not len(batch.rows):
            return {}
        self.training.step += 1
        self.training.frozen = self._frozen()
        loss, alphas = self.training.fit(batch, self.training.objective)
        depths = {f"draft_head_acceptance_{depth}": alpha for depth, alpha in enumerate(alphas, 1)}
        return {"draft_head_loss": loss, **depths}

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The head's weights, for a publication."""
        return {name: t.to(dtype).cpu().contiguous() for name, t in self.training.module.weights().items()}

    def save(self, root: Path, step: int, keep: int) -> None:
        """Into `root/step-N`, before the checkpoint of that step; older ones but `keep` go."""
        folder = root / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.training.save(folder, torch.float32)
        sync(root)
        folders = sorted(root.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for old in folders[: -(keep + 1)]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, root: Path, step: int) -> bool:
        """As it was at the checkpoint of `step`; False where there is nothing of it, or a damaged file."""
        try:
            return self.training.resume(root / f"step-{step}")
        except DamagedCheckpoint:
            return False

    def _frozen(self) -> FrozenHead:
        embedding: Any = self._model.get_input_embeddings()
        head: Any = self._model.get_output_embeddings()
        return FrozenHead(embedding.weight.detach(), head.weight.detach().to(self._compute))

    @torch.no_grad()
    def _batch(self, samples: Sequence[Trajectory]) -> Batch | None:
        """Hidden states of as many samples as fit, in one pass of the policy as it is now."""
        texts: list[tuple[np.ndarray, int]] = []
        starts = [0]
        for sample in samples:
            ids = np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64)
            if len(ids) >= 3 and (not texts or starts[-1] + len(ids) <= self._section.batch_tokens):
                texts.append((ids, len(sample.prompt_ids)))
                starts.append(starts[-1] + len(ids))
        if not texts:
            return None
        device = self._model.device
        tokens = torch.from_numpy(np.concatenate([ids for ids, _ in texts])).to(device)
        positions = torch.from_numpy(np.concatenate([np.arange(len(ids)) for ids, _ in texts])).to(device)
        base: Any = self._model.base_model
        with torch.autocast(device.type, self._compute, enabled=self._compute != torch.float32):
            hidden = base(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False,
                **segment_arguments(torch.tensor(starts, dtype=torch.int32), device=device),
            ).last_hidden_state[0].float()  # fmt: skip
        return padded_batch(texts, hidden.split([len(ids) for ids, _ in texts]), self._section.depths)
