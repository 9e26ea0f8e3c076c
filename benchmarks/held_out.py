"""Rewards on held-out prompts of a generator as it is, without engine or learner."""

from pathlib import Path

import numpy as np

from learner.evaluation import evaluation_source
from pipeline.config import Config
from pipeline.config.types import TaskSection
from pipeline.engine.generator import FinishedSample, GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.models.chat import chat_template
from pipeline.models.tokenizer import Tokenizer
from pipeline.tasks import load_task
from pipeline.tasks.jsonl import read_examples
from pipeline.tasks.prompts import rollout_sampling
from pipeline.tasks.rewards import load_reward, reward_name, score_group

Scored = tuple[np.ndarray, FinishedSample, float]
"""Prompt ids, sample, reward."""


class HeldOut:
    """`learner.eval_samples` responses to each of the first `learner.eval_prompts` held-out prompts; each time with the
    same seeds."""

    def __init__(self, config: Config, folder: Path) -> None:
        """
        Args:
            config: of the task and its evaluation.
            folder: checkpoint whose tokenizer is used.

        Raises:
            UsageError: there is no held-out prompt.
        """
        self._tokenizer, self._reward = Tokenizer(folder), load_reward(reward_name(config.task))
        sampling = rollout_sampling(config.sampling, tuple(self._tokenizer.eos_token_ids))
        source = evaluation_source(
            load_task(config.task, config.run.seed, chat_template(folder)), self._tokenizer.encode, sampling, config
        )
        self._leases = {lease.id: lease for lease in source(0)}

    @property
    def prompts(self) -> list[np.ndarray]:
        return [np.array(lease.prompt_ids, np.int64) for lease in self._leases.values()]

    def sample(self, generator: NativeGenerator, *, full_cache: bool = False) -> list[Scored]:
        """All responses, prompt by prompt.

        Raises:
            UsageError: the reward function fails on one.
        """
        for lease in self._leases.values():
            prompt = np.array(lease.prompt_ids, np.int64)
            generator.add(GroupRequest(lease.id, prompt, lease.sampling, lease.seeds, full_cache=full_cache))
        samples: dict[int, dict[int, FinishedSample]] = {group: {} for group in self._leases}
        while generator.has_work():
            for sample in generator.step():
                samples[sample.group][sample.sample] = sample
        return [scored for group in samples for scored in self._scored(group, samples[group])]

    def _scored(self, group: int, samples: dict[int, FinishedSample]) -> list[Scored]:
        lease = self._leases[group]
        ordered = [samples[index] for index in range(lease.group_size)]
        columns = {key: [value] * lease.group_size for key, value in lease.columns.items()}
        texts = [self._tokenizer.decode(sample.token_ids.tolist()) for sample in ordered]
        prompt = np.array(lease.prompt_ids, np.int64)
        found = []
        for sample, score in zip(
            ordered, score_group(self._reward, [lease.prompt] * len(ordered), texts, columns), strict=True
        ):
            if score.reward is None:
                raise UsageError(f"the reward of a held-out response failed: {score.error}")
            found.append((prompt, sample, score.reward))
        return found


def check_apart(held_out: Path, training: Path) -> None:
    """Nothing that is measured on may have been trained on.

    Raises:
        UsageError: a prompt is in both files.
    """
    section = TaskSection(kind="jsonl")
    held, trained = ({example.prompt for example in read_examples(path, section)} for path in (held_out, training))
    if shared := held & trained:
        raise UsageError(
            f"{len(shared)} prompts of {held_out} are in {training} too; hold out prompts that are not trained on"
        )
