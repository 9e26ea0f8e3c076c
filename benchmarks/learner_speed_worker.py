"""One system of `learner_speed`, in a process of its own: trains a step for every line it reads, answers in JSON."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import resident_bytes
from learner.objective import Objective
from learner.policy import load_policy
from learner.trainer import Trainer
from pipeline.config.types import LearnerSection, ObjectiveSection
from pipeline.messages import SCHEMA, SamplingParams, Trajectory, TrajectoryHeader

LEARNING_RATE = 1e-6


def serve(settings: dict[str, Any]) -> None:
    """Answer every line of the standard input with a step, until it ends or `steps` are done."""
    torch.set_num_threads(settings["threads"])
    groups = json.loads(Path(settings["batch"]).read_text())
    (_rollahead if settings["system"] == "rollahead" else _trl)(settings, groups)


class Clock:
    """Waits for the word to begin a step, and reports it."""

    def begin(self) -> bool:
        """False when there is nothing more to do."""
        if not sys.stdin.readline():
            return False
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return True

    def end(self, loss: float) -> None:
        seconds, cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu
        _say(seconds=seconds, cpu_seconds=cpu_seconds, loss=loss, peak_bytes=resident_bytes(peak=True))


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _rollahead(settings: dict[str, Any], groups: list[list[dict[str, Any]]]) -> None:
    imported = resident_bytes()
    objective = Objective.from_config(
        ObjectiveSection(
            proximal="behaviour",
            corrections=[],
            gates=[],
            surrogate={"name": "ppo-clip", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0},
        )
    )
    section = LearnerSection(
        minibatches=1, dtype=settings["dtype"], micro_batch_tokens=settings["micro_batch_tokens"],
        gradient_checkpointing=settings["checkpointing"], learning_rate=LEARNING_RATE,
    )  # fmt: skip
    trainer = Trainer(load_policy(settings["model"], "cpu"), objective, section, temperature=1.0)
    trainer.shares_prompts = settings["share_prompts"]
    trajectories = [[_trajectory(sample, lease, index) for index, sample in enumerate(group)]
                    for lease, group in enumerate(groups)]  # fmt: skip
    _say(imported_bytes=imported, idle_bytes=resident_bytes())
    clock = Clock()
    while clock.begin():
        loss = trainer.train(trajectories, publication=0)["loss"]
        assert loss is not None
        clock.end(loss)


def _trajectory(sample: dict[str, Any], lease: int, index: int) -> Trajectory:
    length = len(sample["response"])
    header = TrajectoryHeader(
        schema=SCHEMA, producer="bench", incarnation=0, sequence=0, lease=lease, sample=index,
        prompt_tokens=len(sample["prompt"]), response_tokens=length, has_entropy=False, reward=sample["reward"],
        reward_parts={}, finish_reason="stop", sampling=SamplingParams(), drafters={}, verifications=length,
    )  # fmt: skip
    return Trajectory(
        header=header,
        prompt_ids=np.array(sample["prompt"], np.uint32),
        token_ids=np.array(sample["response"], np.uint32),
        logprobs=np.array(sample["logprobs"], np.float32),
        entropies=None,
        versions=np.zeros(length, np.uint32),
        samplers=np.zeros(length, np.uint8),
        roles=np.zeros(length, np.uint8),
    )


def _trl(settings: dict[str, Any], groups: list[list[dict[str, Any]]]) -> None:
    """GRPOTrainer's own `train()`; only where its completions come from is replaced."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    imported = resident_bytes()
    clock, batch = Clock(), _padded(groups)
    losses: list[float] = []

    class PreparedTrainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            return dict(batch)

        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            losses.append(float(loss.detach()))
            return loss

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            losses.clear()
            if not clock.begin():
                control.should_training_stop = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end(sum(losses))

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    samples = sum(len(group) for group in groups)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=settings["steps"], per_device_train_batch_size=settings["samples"],
            gradient_accumulation_steps=samples // settings["samples"], num_generations=len(groups[0]),
            max_completion_length=batch["completion_ids"].shape[1], learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", bf16=settings["dtype"] == "bfloat16", use_cpu=True, beta=0.0,
            loss_type="dapo", epsilon=0.2, gradient_checkpointing=settings["checkpointing"], report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
        )  # fmt: skip
        trainer = PreparedTrainer(
            model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "x"}] * len(groups)),
            processing_class=tokenizer,
            callbacks=[Turns()],
        )
        _say(imported_bytes=imported, idle_bytes=resident_bytes())
        trainer.train()


def _padded(groups: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """What TRL makes of a batch: prompts padded on the left, completions on the right, to the longest of the batch."""
    samples = [sample for group in groups for sample in group]
    advantages = []
    for group in groups:
        rewards = torch.tensor([sample["reward"] for sample in group], dtype=torch.float64)
        advantages += ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).tolist()
    prompts = [torch.tensor(sample["prompt"]) for sample in samples]
    completions = [torch.tensor(sample["response"]) for sample in samples]
    masks = [torch.ones_like(completion) for completion in completions]
    logprobs = [torch.tensor(sample["logprobs"]) for sample in samples]
    left = [torch.nn.utils.rnn.pad_sequence([p.flip(0) for p in rows], batch_first=True).flip(1)
            for rows in (prompts, [torch.ones_like(p) for p in prompts])]  # fmt: skip
    return {
        "prompt_ids": left[0], "prompt_mask": left[1],
        "completion_ids": torch.nn.utils.rnn.pad_sequence(completions, batch_first=True),
        "completion_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
        "old_per_token_logps": torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True),
        "advantages": torch.tensor(advantages, dtype=torch.float32),
        "num_items_in_batch": torch.tensor(sum(len(c) for c in completions)),
    }  # fmt: skip


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
