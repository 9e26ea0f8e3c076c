"""Which prompt a lease gets, and which seed a sample: pure functions of numbers, so that any of it can be repeated."""

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from pipeline.config.types import SamplingSection
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.tasks.base import Task

_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 6
_PLAIN = SamplingParams()


def mix64(*values: int) -> int:
    """A 64-bit hash of the integers, in order: splitmix64's finaliser chained over them (Steele, Lea, Flood 2014)."""
    state = 0
    for value in values:
        state = (state + (value & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def sample_seed(run_seed: int, epoch: int, lease: int, sample: int) -> int:
    """Seed of one sample, in [0, 2^62)."""
    return mix64(run_seed, epoch, lease, sample) >> 2


def rollout_sampling(section: SamplingSection, eos_token_ids: Sequence[int]) -> SamplingParams:
    """The sampling parameters of every rollout of a run; the model's end-of-text ids end a response too.

    Raises:
        UsageError: a value that no generator can use, or a key of `sampling.logit_bias` that is no token id.
    """
    options = msgspec.to_builtins(section)
    del options["max_prompt_tokens"]
    try:
        options["logit_bias"] = [(int(token), value) for token, value in section.logit_bias.items()]
        options["stop_token_ids"] = [*dict.fromkeys([*eos_token_ids, *section.stop_token_ids])]
        params = msgspec.convert(options, SamplingParams)
    except ValueError as error:  # of int() and of msgspec
        raise UsageError(f"the table [sampling] cannot be used: {error}") from None
    # A float that equals a default is left out of messages only when it is that very object.
    return SamplingParams(**{
        name: value for name, value in msgspec.structs.asdict(params).items() if value != getattr(_PLAIN, name)
    })  # fmt: skip


class PromptOrder:
    """The order of `size` training prompts: every epoch a permutation of its own, computed and never stored.

    A Feistel network over the smallest even number of bits that holds `size` permutes that power of two; walking the
    cycle until the value is below `size` restricts it to the prompts (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002, method 2).
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)

    def __call__(self, lease: int) -> tuple[int, int]:
        """(epoch, index of the prompt) of a lease, both from 0."""
        epoch, position = divmod(lease, self._size)
        key = mix64(self._seed, epoch)
        index = self._permute(position, key)
        while index >= self._size:
            index = self._permute(index, key)
        return epoch, index

    def _permute(self, value: int, key: int) -> int:
        low_mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & low_mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (mix64(key, round_number, right) & low_mask)
        return left << self._half_bits | right


def check_prompts(
    task: Task, encode: Callable[[str], Sequence[int]], limit: int, long_prompts: Literal["error", "skip"]
) -> Sequence[int]:
    """Indices of the training prompts that can be used: those of 1 to `limit` tokens.

    Raises:
        UsageError: a prompt is empty, or too long where `long_prompts` is "error"; or all of them are too long.
    """
    if task.longest_prompt is not None:
        tokens = len(encode(task.longest_prompt))
        if tokens > limit:
            raise UsageError(
                f"the task's longest prompts have {tokens} tokens, above sampling.max_prompt_tokens = {limit}; "
                "raise it, or lower task.digits or task.operands"
            )
        return range(len(task.train))
    usable = []
    for index, example in enumerate(task.train):
        tokens = len(encode(example.prompt))
        if tokens == 0:
            raise UsageError(f"{example.origin}: the prompt is empty; fill the sample in or take the line out")
        if tokens <= limit:
            usable.append(index)
        elif long_prompts == "error":
            raise UsageError(
                f"{example.origin}: the prompt has {tokens} tokens, above sampling.max_prompt_tokens = {limit}; "
                'raise it, or set task.long_prompts = "skip" to leave such prompts out'
            )
    if not usable:
        raise UsageError(
            f"all {len(task.train)} training prompts are above sampling.max_prompt_tokens = {limit}; raise it"
        )
    return usable
