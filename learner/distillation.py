"""The small model of `engine.switching`, trained on fresh rollouts towards the policy and published with it.

On the states that a batch visited, the loss is KL(pi || small), the mean over generated tokens of
sum_v pi(v | s_t) (log pi(v | s_t) - log small(v | s_t)): forward distillation on rollouts of the two models together
(generalised knowledge distillation, arXiv 2306.13649, with lambda = 1 and forward KL). Temperature 1. Nothing of it
reaches the policy, which is read without a gradient; the small model has an optimizer of its own.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from learner.attention import segment_arguments
from learner.policy import load_policy, policy_state
from learner.step_metrics import Metrics
from pipeline.config import Config
from pipeline.durable import sync
from pipeline.errors import UsageError
from pipeline.messages import Role, Trajectory
from pipeline.models.checkpoint import SMALL_MODEL
from pipeline.models.tokenizer import check_same_tokenizer
from pipeline.weights.filesystem import replace_tensors

CHUNK = 512
"""positions whose distributions over the vocabulary are in memory at once"""
FILE = "small-model.safetensors"


class Distillation:
    """Trains the small model on a part of every batch."""

    def __init__(self, policy: PreTrainedModel, small: PreTrainedModel, learning_rate: float, tokens: int) -> None:
        """
        Args:
            policy: is read and never changed.
            small: of the same tokenizer; its vocabulary may be padded to another size.
            learning_rate: of AdamW without weight decay.
            tokens: most tokens of a batch, prompts included, that a step reads.
        """
        self._policy, self._small, self._tokens = policy, small, tokens
        self.optimizer = torch.optim.AdamW(small.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)

    @staticmethod
    def from_config(config: Config, policy: PreTrainedModel, folder: Path) -> "Distillation | None":
        """None where `engine.switching.distill` is off; `folder` is the policy's checkpoint.

        Raises:
            UsageError: another tokenizer, or the policy is divided among several ranks.
        """
        switching = config.engine.switching
        if not switching.distill:
            return None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("engine.switching.distill = true needs a learner of one rank; start it without torchrun")
        check_same_tokenizer(folder, Path(switching.small_model), "engine.switching.small_model")
        small = load_policy(switching.small_model, str(policy.device))
        return Distillation(policy, small, switching.distill_learning_rate, switching.distill_tokens)

    def train(self, groups: Sequence[Sequence[Trajectory]]) -> Metrics:
        """One optimiser step; `small_model_kl` is the loss before it, in nats a token. Empty where nothing fits."""
        texts = self._texts([sample for group in groups for sample in group])
        if not texts:
            return {}
        tokens, rows, starts = _packed(texts)
        with torch.no_grad():
            taught = _hidden(self._policy, tokens, starts)[rows.to(self._policy.device)]
        hidden = _hidden(self._small, tokens, starts)[rows.to(self._small.device)]
        total = hidden.new_zeros(())
        for chunk, teacher in zip(hidden.split(CHUNK), taught.split(CHUNK), strict=True):
            part = checkpoint(self._divergence, chunk, teacher, use_reentrant=False)
            assert isinstance(part, Tensor)
            total = total + part
        loss = total / len(rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._small.parameters(), 1.0)
        self.optimizer.step()
        return {"small_model_kl": loss.item(), "small_model_tokens": len(rows)}

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The small model's weights, for a publication."""
        state = policy_state(self._small)
        return {SMALL_MODEL + name: tensor.to(dtype).cpu().contiguous() for name, tensor in state.items()}

    def save(self, root: Path, step: int, keep: int) -> None:
        """Into `root/step-N`, before the checkpoint of that step; older ones but `keep` go."""
        folder = root / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in policy_state(self._small).items()}
        for name, parameter in self._small.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"adam.{key}.{name}"] = value
        replace_tensors(state, folder / FILE)
        sync(root)
        folders = sorted(root.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for old in folders[: -(keep + 1)]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, root: Path, step: int) -> bool:
        """As it was at the checkpoint of `step`; False where there is nothing of it, or a damaged file."""
        path = root / f"step-{step}" / FILE
        if not path.exists():
            return False
        try:
            tensors = load_file(path)
        except SafetensorError:
            return False
        with torch.no_grad():
            for name, parameter in self._small.named_parameters():
                parameter.copy_(tensors[name])
                if f"adam.step.{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"adam.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        return True

    def _texts(self, samples: Sequence[Trajectory]) -> list[Trajectory]:
        """As many samples as fit."""
        chosen, size = [], 0
        for sample in samples:
            length = len(sample.prompt_ids) + len(sample.token_ids)
            if len(sample.prompt_ids) and (sample.roles == Role.GENERATED).any() and size + length <= self._tokens:
                chosen.append(sample)
                size += length
        return chosen

    def _divergence(self, hidden: Tensor, taught: Tensor) -> Tensor:
        """Sum of KL(pi || small) over positions, from hidden states [N, H] of each; over the ids that both models have,
        whose vocabularies may be padded differently."""
        heads: tuple[Any, Any] = self._small.get_output_embeddings(), self._policy.get_output_embeddings()
        known = min(len(head.weight) for head in heads)
        q = heads[0](hidden)[:, :known].float().log_softmax(-1)
        with torch.no_grad():
            p = heads[1](taught)[:, :known].float().log_softmax(-1)
        return (p.exp() * (p - q)).sum()


def _packed(samples: Sequence[Trajectory]) -> tuple[np.ndarray, Tensor, Tensor]:
    """Token ids [N] of all, the rows int64 that predict generated tokens, and where each begins, int32 [S + 1]."""
    ids = [np.concatenate([s.prompt_ids, s.token_ids]).astype(np.int64) for s in samples]
    starts = np.cumsum([0, *map(len, ids)])
    rows = [
        start + len(s.prompt_ids) - 1 + np.flatnonzero(s.roles == Role.GENERATED)
        for start, s in zip(starts, samples, strict=False)
    ]
    return np.concatenate(ids), torch.from_numpy(np.concatenate(rows)), torch.from_numpy(starts.astype(np.int32))


def _hidden(model: PreTrainedModel, tokens: np.ndarray, starts: Tensor) -> Tensor:
    """float32 [N, H] after the final norm; ids that a model has no embedding for are read as its last."""
    embedding: Any = model.get_input_embeddings()
    base: Any = model.base_model
    known = torch.from_numpy(tokens).clamp(max=len(embedding.weight) - 1).to(model.device)
    lengths = starts.diff().tolist()
    positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    states: Tensor = base(
        input_ids=known[None], position_ids=positions[None], use_cache=False, **segment_arguments(starts)
    ).last_hidden_state[0]
    return states.float()
