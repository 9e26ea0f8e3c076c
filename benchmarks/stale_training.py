"""Training with rollouts of an exact age in one process: no transport, and nothing that depends on who was faster."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from learner.composition import build_objective
from learner.policy import load_policy, policy_state
from learner.prompts import LeaseSource
from learner.step_metrics import Metrics
from learner.tokens import Needs
from learner.trainer import Trainer
from pipeline.config import Config
from pipeline.engine.generator import FinishedSample, GroupRequest
from pipeline.engine.leased import trajectory_of
from pipeline.engine.rewarding import FinishedGroup, ScoredGroup
from pipeline.engine.startup import build_generator
from pipeline.messages import Lease, Trajectory
from pipeline.models.chat import chat_template
from pipeline.models.tokenizer import Tokenizer
from pipeline.tasks import load_task
from pipeline.tasks.prompts import check_prompts
from pipeline.tasks.rewards import load_reward, reward_name, score_group
from pipeline.telemetry import Log
from pipeline.weights import FilesystemPublisher


def train(
    config: Config, folder: Path, staleness: int, finished: Callable[[Path], None] | None = None
) -> Iterator[Metrics]:
    """Metrics of each of `run.steps` batches; batch t is sampled by the policy after `max(0, t - staleness)` batches.

    Args:
        folder: Hugging Face checkpoint to start from.
        staleness: in batches; the first ones are younger, as there is no older policy.
        finished: told of the folder with the weights after the last batch, while it exists.
    """
    objective = build_objective(config)
    reference = load_policy(folder) if Needs.REFERENCE in objective.needs else None
    trainer = Trainer(
        load_policy(folder), objective, config.learner, config.sampling.temperature, config.run.seed,
        reference=reference, max_response_tokens=config.sampling.max_new_tokens,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        publisher = FilesystemPublisher(Path(temporary), staleness + 2, folder)
        rollouts = Rollouts(config, folder, objective.lease_temperature)
        for step in range(config.run.steps):
            publisher.publish({n: t.contiguous() for n, t in policy_state(trainer.model).items()}, step)
            publisher.retire(None)
            version = max(0, step - staleness)
            groups = rollouts.batch(Path(temporary) / f"v{version}", version)
            yield trainer.train(groups, publication=step)
        if finished:
            publisher.publish({n: t.contiguous() for n, t in policy_state(trainer.model).items()}, config.run.steps)
            finished(Path(temporary) / f"v{config.run.steps}")


class Rollouts:
    """Batches of scored groups, in the order of the run's leases."""

    def __init__(self, config: Config, folder: Path, temperature: Any) -> None:
        tokenizer, task = Tokenizer(folder), load_task(config.task, config.run.seed, chat_template(folder))
        usable = check_prompts(task, tokenizer.encode, config.sampling.max_prompt_tokens, config.task.long_prompts)
        stop = tuple(tokenizer.eos_token_ids)
        self._source = LeaseSource(task, usable, tokenizer.encode, stop, config, temperature)
        self._generator = build_generator(config, folder, Log("bench"))
        self._groups = config.learner.batch_size // config.learner.group_size
        self._reward, self._decode = load_reward(reward_name(config.task)), tokenizer.decode
        self._next = 0

    def batch(self, weights: Path, version: int) -> list[list[Trajectory]]:
        """The next batch, sampled by the weights in a folder."""
        if version != self._generator.version:
            self._generator.load_weights(weights, version)
        leases = [self._source(self._next + i, version) for i in range(self._groups)]
        self._next += self._groups
        samples: dict[int, dict[int, FinishedSample]] = {lease.id: {} for lease in leases}
        for lease in leases:
            prompt = torch.tensor(lease.prompt_ids).numpy()
            self._generator.add(GroupRequest(lease.id, prompt, lease.sampling, lease.seeds, lease.temperatures))
        while self._generator.has_work():
            for sample in self._generator.step():
                samples[sample.group][sample.sample] = sample
        return [self._scored(lease, samples[lease.id]) for lease in leases]

    def _scored(self, lease: Lease, samples: dict[int, FinishedSample]) -> list[Trajectory]:
        ordered = [samples[index] for index in range(lease.group_size)]
        columns = {key: [value] * lease.group_size for key, value in lease.columns.items()}
        texts = [self._decode(sample.token_ids.tolist()) for sample in ordered]
        scores = score_group(self._reward, [lease.prompt] * lease.group_size, texts, columns)
        group = ScoredGroup(FinishedGroup(lease, ordered), scores)
        return [trajectory_of(group, index) for index in range(lease.group_size)]
