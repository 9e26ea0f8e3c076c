"""What a lease contains: a pure function of its number, so that any lease can be issued again after a crash."""

from collections.abc import Callable, Sequence

from pipeline.config import Config
from pipeline.messages import Lease
from pipeline.tasks.base import Task
from pipeline.tasks.prompts import PromptOrder, rollout_sampling, sample_seed


class LeaseSource:
    """Numbers leases 0, 1, 2, ... through epochs of the task's training prompts, each epoch in its own order."""

    def __init__(
        self,
        task: Task,
        usable: Sequence[int],
        encode: Callable[[str], list[int]],
        stop_token_ids: tuple[int, ...],
        config: Config,
        temperature: Callable[[int], float | None] = lambda lease_id: None,
    ) -> None:
        """
        Args:
            temperature: of a lease's samples, where it explores; None: the configuration's. The one thing in a lease
                that need not be the same when it is issued again: samples say what they were sampled with.
        """
        self._task, self._usable, self._encode = task, usable, encode
        self._order = PromptOrder(len(usable), config.run.seed)
        self._seed, self._group_size = config.run.seed, config.learner.group_size
        self._temperature = temperature
        self._sampling = rollout_sampling(config.sampling, stop_token_ids)

    def __call__(self, lease_id: int, version: int) -> Lease:
        """Lease `lease_id`, to be started under publication `version` or later."""
        epoch, position = self._order(lease_id)
        example = self._task.train[self._usable[position]]
        temperature = self._temperature(lease_id)
        return Lease(
            id=lease_id,
            epoch=epoch,
            kind="train",
            prompt=example.prompt,
            prompt_ids=tuple(self._encode(example.prompt)),
            columns=example.columns,
            group_size=self._group_size,
            sampling=self._sampling,
            seeds=tuple(sample_seed(self._seed, epoch, lease_id, sample) for sample in range(self._group_size)),
            version=version,
            temperatures=() if temperature is None else (temperature,) * self._group_size,
        )
